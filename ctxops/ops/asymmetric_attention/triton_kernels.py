# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of asymmetric attention: every position attends to S anchors.

Positions (N = H * W) are the rows of every tile, anchors its columns. The forward keeps the logits
in registers: all of them where S fits one tile, tile by tile with an online softmax where it does
not. The backward writes P and dS for as many positions as a fixed budget holds; the products with
them are large and plain, so cuBLAS takes them: faster than a second kernel, and deterministic.

Keys and values are padded with zeros to whole tiles (SP anchors): rows of 110 elements would load
one element at a time, aligned rows load 16 bytes, and no load needs a mask over S.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

WORKSPACE_BYTES = 64 << 20  # P and dS together


@triton.jit
def _program_positions(N, BN: tl.constexpr):
    """Batch item and positions of this program; grid.x holds both, grid.y ends at 65535."""
    n_blocks = tl.cdiv(N, BN)
    i_b = (tl.program_id(0) // n_blocks).to(tl.int64)
    o_n = (tl.program_id(0) % n_blocks).to(tl.int64) * BN + tl.arange(0, BN)
    return i_b, o_n


@triton.jit
def _channel_product(
    p_x,  # (BN, 1) -> channel 0 of the positions
    p_a,  # (1, BS) -> channel 0 of the anchors
    m_n,  # (BN, 1)
    C,
    s_xc,
    s_ac,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Positions (BN, C) times anchors (C, BS) in float32."""
    b_y = tl.zeros([BN, BS], dtype=tl.float32)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC).to(tl.int64)
        b_x = tl.load(p_x + o_c[None, :] * s_xc, mask=m_n & (o_c < C)[None, :], other=0.0)
        b_a = tl.load(p_a + o_c[:, None] * s_ac, mask=(o_c < C)[:, None], other=0.0)
        b_y = tl.dot(b_x, b_a, b_y, input_precision=PRECISION)
    return b_y


@triton.jit
def _logits(
    p_q,  # (BN, 1) -> channel 0 of the queries
    p_k,  # (C, SP), this item's
    p_bias,  # (S,) or None, this item's
    m_n,
    o_s,
    scale,
    S,
    SP,
    C,
    s_qc,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scale * q k + bias for one tile of anchors; -inf in the padding."""
    b_s = _channel_product(p_q, p_k + o_s[None, :], m_n, C, s_qc, SP, BN, BS, BC, PRECISION) * scale
    if p_bias is not None:
        b_s += tl.load(p_bias + o_s, mask=o_s < S, other=0.0).to(tl.float32)[None, :]
    return tl.where((o_s < S)[None, :], b_s, float("-inf"))


@triton.jit
def asymmetric_attention_forward_kernel(
    p_q,  # (B, C, N)
    p_k,  # (B, C, SP)
    p_v,  # (B, Cv, SP)
    p_bias,  # (B, S) or None
    p_o,  # (B, Cv, N)
    p_lse,  # (B, N) float32 or None
    scale,
    N,
    S,
    SP,
    C,
    Cv,
    v_slice,
    s_qb,
    s_qc,
    s_qn,
    s_ob,
    s_oc,
    s_on,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All anchors in one tile (SP = BS): P is computed once for a slice of the value channels."""
    i_b, o_n = _program_positions(N, BN)
    o_s = tl.arange(0, BS)
    m_n = (o_n < N)[:, None]
    p_q += i_b * s_qb + o_n[:, None] * s_qn
    p_k += i_b * C * SP
    p_v += i_b * Cv * SP + o_s[None, :]
    p_o += i_b * s_ob + o_n[:, None] * s_on
    if p_bias is not None:
        p_bias += i_b * S

    b_s = _logits(p_q, p_k, p_bias, m_n, o_s, scale, S, SP, C, s_qc, BN, BS, BC, PRECISION)
    b_m = tl.max(b_s, 1)
    b_m = tl.where(b_m == float("-inf"), 0.0, b_m)
    b_p = tl.exp(b_s - b_m[:, None])
    b_l = tl.sum(b_p, 1)
    if p_lse is not None:
        if tl.program_id(1) == 0:
            tl.store(p_lse + i_b * N + o_n, b_m + tl.log(b_l), mask=o_n < N)

    b_p = b_p.to(p_v.dtype.element_ty)
    b_r = 1.0 / b_l
    v_begin = tl.program_id(1) * v_slice
    v_end = tl.minimum(v_begin + v_slice, Cv)
    for i_v in range(v_begin, v_end, BV):
        o_v = i_v + tl.arange(0, BV).to(tl.int64)
        m_v = o_v < v_end
        b_v = tl.load(p_v + o_v[:, None] * SP, mask=m_v[:, None], other=0.0)
        b_o = tl.dot(b_p, tl.trans(b_v), input_precision=PRECISION) * b_r[:, None]
        b_o = b_o.to(p_o.dtype.element_ty)
        tl.store(p_o + o_v[None, :] * s_oc, b_o, mask=m_n & m_v[None, :])


@triton.jit
def asymmetric_attention_forward_online_kernel(
    p_q,  # (B, C, N)
    p_k,  # (B, C, SP)
    p_v,  # (B, Cv, SP)
    p_bias,  # (B, S) or None
    p_o,  # (B, Cv, N)
    p_lse,  # (B, N) float32 or None
    scale,
    N,
    S,
    SP,
    C,
    Cv,
    s_qb,
    s_qc,
    s_qn,
    s_ob,
    s_oc,
    s_on,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Anchors tile by tile, for one tile of BV value channels."""
    i_b, o_n = _program_positions(N, BN)
    o_v = tl.program_id(1) * BV + tl.arange(0, BV).to(tl.int64)
    m_n = (o_n < N)[:, None]
    m_v = o_v < Cv
    p_q += i_b * s_qb + o_n[:, None] * s_qn
    p_k += i_b * C * SP
    p_v += i_b * Cv * SP + o_v[:, None] * SP
    p_o += i_b * s_ob + o_n[:, None] * s_on
    if p_bias is not None:
        p_bias += i_b * S

    b_m = tl.full([BN], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BN], dtype=tl.float32)
    b_o = tl.zeros([BN, BV], dtype=tl.float32)
    for i_s in range(0, SP, BS):
        o_s = i_s + tl.arange(0, BS)
        b_s = _logits(p_q, p_k, p_bias, m_n, o_s, scale, S, SP, C, s_qc, BN, BS, BC, PRECISION)
        b_max = tl.maximum(b_m, tl.max(b_s, 1))
        # a row that has seen nothing but -inf keeps a finite pivot: exp(-inf - -inf) is NaN
        b_pivot = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_r = tl.exp(b_m - b_pivot)
        b_p = tl.exp(b_s - b_pivot[:, None])
        b_l = b_l * b_r + tl.sum(b_p, 1)
        b_v = tl.load(p_v + o_s[None, :], mask=m_v[:, None], other=0.0)
        b_p = b_p.to(b_v.dtype)
        b_o = tl.dot(b_p, tl.trans(b_v), b_o * b_r[:, None], input_precision=PRECISION)
        b_m = b_max
    b_o = (b_o / b_l[:, None]).to(p_o.dtype.element_ty)
    tl.store(p_o + o_v[None, :] * s_oc, b_o, mask=m_n & m_v[None, :])
    if p_lse is not None:
        if tl.program_id(1) == 0:
            tl.store(p_lse + i_b * N + o_n, b_m + tl.log(b_l), mask=o_n < N)


@triton.jit
def asymmetric_attention_backward_kernel(
    p_do,  # (B, Cv, N)
    p_q,  # (B, C, N)
    p_k,  # (B, C, SP)
    p_v,  # (B, Cv, SP)
    p_bias,  # (B, S) or None
    p_lse,  # (B, N) float32
    p_p,  # (B, N, SP), written
    p_ds,  # (B, N, SP), written
    scale,
    N,
    S,
    SP,
    C,
    Cv,
    s_gb,
    s_gc,
    s_gn,
    s_qb,
    s_qc,
    s_qn,
    s_lb,
    s_pb,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P = exp(logits - lse) and dS = P * (dP - rowsum(P * dP)) with dP = dO v."""
    i_b, o_n = _program_positions(N, BN)
    m_n = (o_n < N)[:, None]
    p_do += i_b * s_gb + o_n[:, None] * s_gn
    p_q += i_b * s_qb + o_n[:, None] * s_qn
    p_k += i_b * C * SP
    p_v += i_b * Cv * SP
    p_p += i_b * s_pb + o_n[:, None] * SP
    p_ds += i_b * s_pb + o_n[:, None] * SP
    if p_bias is not None:
        p_bias += i_b * S

    b_lse = tl.load(p_lse + i_b * s_lb + o_n, mask=o_n < N, other=0.0)
    b_d = tl.zeros([BN], dtype=tl.float32)
    for i_s in range(0, BS if ONE_TILE else SP, BS):  # one step is no loop: fewer registers
        o_s = i_s + tl.arange(0, BS)
        b_s = _logits(p_q, p_k, p_bias, m_n, o_s, scale, S, SP, C, s_qc, BN, BS, BC, PRECISION)
        b_p = tl.exp(b_s - b_lse[:, None])
        tl.store(p_p + o_s[None, :], b_p.to(p_p.dtype.element_ty), mask=m_n)
        b_ds = _channel_product(p_do, p_v + o_s[None, :], m_n, Cv, s_gc, SP, BN, BS, BC, PRECISION)
        b_d += tl.sum(b_p * b_ds, 1)
        if ONE_TILE:
            b_ds = b_p * (b_ds - b_d[:, None])
        tl.store(p_ds + o_s[None, :], b_ds.to(p_ds.dtype.element_ty), mask=m_n)

    if not ONE_TILE:
        tl.debug_barrier()  # the loads below may belong to other threads than the stores above
        for i_s in range(0, SP, BS):
            o_s = i_s + tl.arange(0, BS)
            b_p = tl.load(p_p + o_s[None, :], mask=m_n, other=0.0).to(tl.float32)
            b_dp = tl.load(p_ds + o_s[None, :], mask=m_n, other=0.0).to(tl.float32)
            b_ds = b_p * (b_dp - b_d[:, None])
            tl.store(p_ds + o_s[None, :], b_ds.to(p_ds.dtype.element_ty), mask=m_n)


class Tiles(NamedTuple):
    BN: int  # positions of a program
    BS: int  # anchors of a tile
    BC: int  # channels summed in one step
    BV: int  # value channels written in one step (forward)
    num_warps: int
    num_stages: int


# For S <= 128, S <= 256, any S: the largest tried that spill no register on sm_80 to sm_100.
# All but the second fit 99 KB of shared memory. "fma" is float32 without TF32.
_FORWARD = {
    "half": (
        Tiles(128, 128, 64, 64, 8, 3),
        Tiles(64, 256, 64, 64, 8, 3),
        Tiles(64, 64, 64, 128, 8, 3),
    ),
    "tf32": (
        Tiles(64, 128, 32, 32, 4, 3),
        Tiles(64, 256, 32, 32, 8, 2),
        Tiles(64, 64, 32, 64, 8, 3),
    ),
    "fma": (
        Tiles(64, 128, 16, 32, 8, 3),
        Tiles(32, 256, 16, 32, 8, 2),
        Tiles(64, 64, 16, 32, 8, 3),
    ),
}
# For S <= 128, any S.
_BACKWARD = {
    "half": (Tiles(64, 128, 64, 0, 8, 4), Tiles(64, 128, 32, 0, 8, 3)),
    "tf32": (Tiles(64, 128, 32, 0, 8, 3), Tiles(64, 128, 16, 0, 8, 3)),
    "fma": (Tiles(64, 128, 16, 0, 8, 3), Tiles(32, 128, 16, 0, 8, 3)),
}


def _unit(element_size: int, precision: str) -> str:
    return "half" if element_size == 2 else "tf32" if precision == "tf32" else "fma"


def _dot_size(n: int) -> int:
    return max(16, triton.next_power_of_2(n))  # tl.dot takes no less than 16


def forward_tiles(
    C: int, Cv: int, S: int, element_size: int, precision: str, shared_memory: int
) -> Tiles:
    """Tiles of the forward; S <= BS selects the kernel that keeps all anchors in one tile."""
    unit = _unit(element_size, precision)
    few, some, many = _FORWARD[unit]
    if S <= 128:
        tiles = few._replace(BS=_dot_size(S))
    elif S <= 256 and (unit == "fma" or shared_memory >= 140 << 10):
        tiles = some
    else:
        tiles = many
    return tiles._replace(BC=min(tiles.BC, _dot_size(C)), BV=min(tiles.BV, _dot_size(Cv)))


def backward_tiles(C: int, Cv: int, S: int, element_size: int, precision: str) -> Tiles:
    """Tiles of the backward."""
    few, many = _BACKWARD[_unit(element_size, precision)]
    tiles = few._replace(BS=_dot_size(S)) if S <= 128 else many
    return tiles._replace(BC=min(tiles.BC, _dot_size(max(C, Cv))))


def dot_precision(dtype: torch.dtype) -> str:
    """What torch uses for matrix products; it matters to float32 alone."""
    matmul = torch.backends.cuda.matmul
    # torch >= 2.9 raises on the older flag once the newer one was set
    newer = hasattr(matmul, "fp32_precision")
    allowed = matmul.fp32_precision == "tf32" if newer else matmul.allow_tf32
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


@lru_cache
def _device_limits(index: int) -> tuple[int, int]:
    """Shared memory of a block in bytes, number of multiprocessors."""
    if index < 0:  # a CPU tensor, in the interpreter
        return 99 << 10, 1
    limits = triton.runtime.driver.active.utils.get_device_properties(index)
    return limits["max_shared_mem"], limits["multiprocessor_count"]


def _pad_anchors(x: Tensor, BS: int) -> Tensor:
    """(B, C, S) -> (B, C, SP), contiguous; a copy only where needed."""
    padding = -x.shape[-1] % BS
    return (F.pad(x, (0, padding)) if padding else x).contiguous()


def _positions(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, N), always a view."""
    return x.view(*x.shape[:2], x.shape[2] * x.shape[3])


def forward(
    query: Tensor,  # (B, C, H, W)
    key: Tensor,  # (B, C, S)
    value: Tensor,  # (B, Cv, S)
    bias: Tensor | None,  # (B, S)
    scale: float,
    output: Tensor,  # (B, Cv, H, W), written
    lse: Tensor | None,  # (B, N) float32, written: log(sum(exp(logits)))
) -> None:
    """softmax(scale * query^T key + bias) value^T, for contiguous or channels_last maps.

    Memory: up to `B * (C + Cv) * SP` elements, SP being S in whole tiles of 16 to 256 anchors.
    """
    query, output = _positions(query), _positions(output)
    B, C, N = query.shape
    _, Cv, S = value.shape
    if B * N == 0:
        return
    precision = dot_precision(query.dtype)
    with torch.cuda.device_of(query):
        shared_memory, multiprocessors = _device_limits(query.get_device())
        tiles = forward_tiles(C, Cv, S, query.element_size(), precision, shared_memory)
        key, value = _pad_anchors(key, tiles.BS), _pad_anchors(value, tiles.BS)
        bias = None if bias is None else bias.contiguous()
        SP = key.shape[2]
        programs = B * triton.cdiv(N, tiles.BN)
        if S <= tiles.BS:
            # too few positions to fill the device: split the value channels, as long as computing
            # P again costs less than half of the product with v
            slices = min(triton.cdiv(2 * multiprocessors, programs), max(1, Cv // (2 * C)))
            v_slice = triton.cdiv(Cv, slices * tiles.BV) * tiles.BV
            v_size: tuple[int, ...]
            kernel, v_size = asymmetric_attention_forward_kernel, (v_slice,)
        else:
            kernel, v_slice, v_size = asymmetric_attention_forward_online_kernel, tiles.BV, ()
        kernel[programs, triton.cdiv(Cv, v_slice)](
            *(query, key, value, bias, output, lse),
            *(scale, N, S, SP, C, Cv, *v_size, *query.stride(), *output.stride()),
            **tiles._asdict(),
            PRECISION=precision,
        )


def backward(
    grad: Tensor,  # (B, Cv, H, W), in query's memory format
    query: Tensor,  # (B, C, H, W)
    key: Tensor,  # (B, C, S)
    value: Tensor,  # (B, Cv, S)
    bias: Tensor | None,  # (B, S)
    scale: float,
    lse: Tensor,  # (B, N) float32
    grad_query: Tensor,  # (B, C, H, W), written
    grad_key: Tensor,  # (B, C, S), written
    grad_value: Tensor,  # (B, Cv, S), written
    grad_bias: Tensor | None,  # (B, S), written
) -> None:
    """Gradients of `forward`; deterministic. To be called without autograd.

    Memory: P and dS take `2 * e * SP` bytes a position (e = bytes of an element) for as many
    positions as fill 64 MiB, 64 at least; the rest `(C + Cv) * SP * (B * e + I * (e + 4))`, where
    I <= B items fit that budget.
    """
    grad, query, grad_query = _positions(grad), _positions(query), _positions(grad_query)
    B, C, N = query.shape
    _, Cv, S = value.shape
    if B * N == 0:
        for x in (grad_key, grad_value, grad_bias):
            if x is not None:
                x.zero_()
        return
    precision = dot_precision(query.dtype)
    tiles = backward_tiles(C, Cv, S, query.element_size(), precision)
    with torch.cuda.device_of(query):
        key, value = _pad_anchors(key, tiles.BS), _pad_anchors(value, tiles.BS)
        bias = None if bias is None else bias.contiguous()
        SP = key.shape[2]

        # whole items while they fit the budget, else blocks of one item's positions
        rows = max(64, WORKSPACE_BYTES // (2 * SP * query.element_size()) // 64 * 64)
        items, rows = (min(B, rows // N), N) if N <= rows else (1, rows)
        workspace = query.new_empty((2, items, rows, SP))
        for b in range(0, B, items):
            i_b = slice(b, b + items)
            b_key, b_value = key[i_b], value[i_b]
            sum_key = torch.zeros_like(b_key, dtype=torch.float32)
            sum_value = torch.zeros_like(b_value, dtype=torch.float32)
            part_key, part_value = torch.empty_like(b_key), torch.empty_like(b_value)
            sum_bias: Any = 0.0
            for n in range(0, N, rows):
                i_n = slice(n, n + rows)
                n_grad, n_query, n_lse = grad[i_b, :, i_n], query[i_b, :, i_n], lse[i_b, i_n]
                n_grad_query = grad_query[i_b, :, i_n]
                n_items, _, n_rows = n_query.shape
                p, ds = workspace[:, :n_items, :n_rows]
                asymmetric_attention_backward_kernel[(n_items * triton.cdiv(n_rows, tiles.BN),)](
                    *(n_grad, n_query, b_key, b_value, None if bias is None else bias[i_b]),
                    *(n_lse, p, ds, scale, n_rows, S, SP, C, Cv),
                    *(*n_grad.stride(), *n_query.stride(), n_lse.stride(0), p.stride(0)),
                    BN=tiles.BN,
                    BS=tiles.BS,
                    BC=tiles.BC,
                    ONE_TILE=S <= tiles.BS,
                    PRECISION=precision,
                    num_warps=tiles.num_warps,
                    num_stages=tiles.num_stages,
                )
                # with out= no allocation, and autocast leaves the dtypes alone
                scaled = {"beta": 0, "alpha": scale}
                torch.baddbmm(n_grad_query, b_key, ds.mT, **scaled, out=n_grad_query)
                torch.baddbmm(part_key, n_query, ds, **scaled, out=part_key)
                torch.bmm(n_grad, p, out=part_value)
                sum_key += part_key
                sum_value += part_value
                if grad_bias is not None:
                    sum_bias = sum_bias + ds.sum(1, dtype=torch.float32)
            grad_key[i_b] = sum_key[..., :S]
            grad_value[i_b] = sum_value[..., :S]
            if grad_bias is not None:
                grad_bias[i_b] = sum_bias[..., :S]
