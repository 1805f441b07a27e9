# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of criss-cross attention: every position attends to its column and its row.

Maps are channels_last, (B, N, C) with N = H * W positions. Each kernel works along lines: on all
columns first, then on all rows, where a position leaves out itself. The second launch of the
forward takes up the softmax where the first has left it, with the column's log-sum-exp as maximum
and its output as sum; those of the backward add to the gradients of the first. A program owns what
it writes: no atomics, so the results are deterministic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _program_positions(LINES, L, s_line, s_n, BN: tl.constexpr):
    """Index in (B, N) of the line's first position, and the rows of this program's tile.

    grid.x holds batch item, line and tile; grid.y ends at 65535.
    """
    n_blocks = tl.cdiv(L, BN)
    i_n = tl.program_id(0) % n_blocks
    i_line = tl.program_id(0) // n_blocks
    i_b = (i_line // LINES).to(tl.int64)
    i_start = i_b * LINES * L + (i_line % LINES).to(tl.int64) * s_line
    return i_start, i_n.to(tl.int64) * BN + tl.arange(0, BN)


@triton.jit
def _inner_products(
    p_a,  # (BN, 1) -> channel 0 of the tile's rows
    p_b,  # (1, BS) -> channel 0 of the tile's columns
    m_n,  # (BN, 1)
    m_s,  # (1, BS)
    C,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BN, BS) in float32, summed over C channels."""
    b_y = tl.zeros([BN, BS], dtype=tl.float32)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        b_a = tl.load(p_a + o_c[None, :], mask=m_n & (o_c < C)[None, :], other=0.0)
        b_b = tl.load(p_b + o_c[:, None], mask=m_s & (o_c < C)[:, None], other=0.0)
        b_y = tl.dot(b_a, b_b, b_y, input_precision=PRECISION)
    return b_y


@triton.jit
def criss_cross_attention_forward_kernel(
    p_q,  # (B, N, C)
    p_k,  # (B, N, C)
    p_v,  # (B, N, Cv)
    p_o,  # (B, N, Cv), written; with OTHERS the column's part, added to
    p_former,  # (B, N) float32, with OTHERS: log-sum-exp over the column
    p_lse,  # (B, N) float32, written
    scale,
    LINES,
    L,
    C,
    Cv,
    s_line,
    s_n,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
    OTHERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention along lines for one tile of value channels."""
    i_start, o_n = _program_positions(LINES, L, s_line, s_n, BN)
    i_n = i_start + o_n * s_n
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_n = (o_n < L)[:, None]
    m_v = (o_v < Cv)[None, :]
    p_o += (i_n * Cv)[:, None] + o_v[None, :]

    if OTHERS:
        b_m = tl.load(p_former + i_n, mask=o_n < L, other=0.0)
        b_l = tl.full([BN], 1.0, dtype=tl.float32)
        b_o = tl.load(p_o, mask=m_n & m_v, other=0.0).to(tl.float32)
        # a column of which nothing counts has left 0 / 0
        b_o = tl.where((b_m == float("-inf"))[:, None], 0.0, b_o)
    else:
        b_m = tl.full([BN], float("-inf"), dtype=tl.float32)
        b_l = tl.zeros([BN], dtype=tl.float32)
        b_o = tl.zeros([BN, BV], dtype=tl.float32)
    for i_s in range(0, L, BS):
        o_s = i_s + tl.arange(0, BS)
        i_k = i_start + o_s.to(tl.int64) * s_n
        m_s = (o_s < L)[None, :]
        p_a, p_b = p_q + (i_n * C)[:, None], p_k + (i_k * C)[None, :]
        b_s = _inner_products(p_a, p_b, m_n, m_s, C, BN, BS, BC, PRECISION) * scale
        if OTHERS:
            m_s = m_s & (o_n[:, None] != o_s[None, :])
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_max = tl.maximum(b_m, tl.max(b_s, 1))
        # a position that has seen nothing but -inf keeps a finite pivot: exp(-inf - -inf) is NaN
        b_pivot = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_r = tl.exp(b_m - b_pivot)
        b_p = tl.exp(b_s - b_pivot[:, None])
        b_l = b_l * b_r + tl.sum(b_p, 1)
        p_w = p_v + (i_k * Cv)[:, None] + o_v[None, :]
        b_v = tl.load(p_w, mask=(o_s < L)[:, None] & m_v, other=0.0)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_r[:, None], input_precision=PRECISION)
        b_m = b_max
    tl.store(p_o, (b_o / b_l[:, None]).to(p_o.dtype.element_ty), mask=m_n & m_v)
    if tl.program_id(1) == 0:
        tl.store(p_lse + i_n, b_m + tl.log(b_l), mask=o_n < L)


@triton.jit
def criss_cross_attention_delta_kernel(
    p_do,  # (B, N, Cv)
    p_o,  # (B, N, Cv)
    p_delta,  # (B, N) float32, written
    N,  # positions of the batch
    Cv,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """The inner products of output and its gradient: sums of P * dP over a position's keys."""
    i_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = (i_n < N)[:, None]
    b_d = tl.zeros([BN], dtype=tl.float32)
    for i_c in range(0, Cv, BC):
        o_c = i_c + tl.arange(0, BC)
        o_x = (i_n * Cv)[:, None] + o_c[None, :]
        m_x = m_n & (o_c < Cv)[None, :]
        b_do = tl.load(p_do + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_d += tl.sum(b_do * tl.load(p_o + o_x, mask=m_x, other=0.0).to(tl.float32), 1)
    tl.store(p_delta + i_n, b_d, mask=i_n < N)


@triton.jit
def criss_cross_attention_backward_kernel(
    p_a,  # (B, N, C), query (KEYS: key)
    p_b,  # (B, N, C), key (KEYS: query)
    p_x,  # (B, N, Cv) or None, gradient of the output (KEYS: value)
    p_y,  # (B, N, Cv) or None, value (KEYS: gradient of the output)
    p_z,  # (B, N, D), what is summed
    p_g,  # (B, N, D), written; with OTHERS the column's part, added to
    p_lse,  # (B, N) float32
    p_delta,  # (B, N) float32 or None
    scale,
    LINES,
    L,
    C,
    Cv,
    D,
    s_line,
    s_n,
    BN: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
    KEYS: tl.constexpr,
    OTHERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums along lines, weighted with P = exp(logits - lse) or dS = scale * P * (dP - delta).

    The rows of a tile are queries and its columns keys, or with KEYS the other way round. Summing
    keys with dS is the gradient of the query, queries with dS (KEYS) that of the key, gradients of
    the output with P (KEYS, no p_x) that of the value.
    """
    i_start, o_n = _program_positions(LINES, L, s_line, s_n, BN)
    i_n = i_start + o_n * s_n
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    m_n = (o_n < L)[:, None]
    m_v = (o_v < D)[None, :]
    p_g += (i_n * D)[:, None] + o_v[None, :]

    b_g = tl.zeros([BN, BV], dtype=tl.float32)
    for i_s in range(0, L, BS):
        o_s = i_s + tl.arange(0, BS)
        i_k = i_start + o_s.to(tl.int64) * s_n
        m_s = (o_s < L)[None, :]
        if KEYS:
            b_lse = tl.load(p_lse + i_k, mask=o_s < L, other=0.0)[None, :]
        else:
            b_lse = tl.load(p_lse + i_n, mask=o_n < L, other=0.0)[:, None]
        p_r, p_c = p_a + (i_n * C)[:, None], p_b + (i_k * C)[None, :]
        b_s = _inner_products(p_r, p_c, m_n, m_s, C, BN, BS, BC, PRECISION) * scale
        b_p = tl.exp(b_s - b_lse)
        if p_x is not None:
            if KEYS:
                b_d = tl.load(p_delta + i_k, mask=o_s < L, other=0.0)[None, :]
            else:
                b_d = tl.load(p_delta + i_n, mask=o_n < L, other=0.0)[:, None]
            p_r, p_c = p_x + (i_n * Cv)[:, None], p_y + (i_k * Cv)[None, :]
            b_dp = _inner_products(p_r, p_c, m_n, m_s, Cv, BN, BS, BC, PRECISION)
            b_p *= (b_dp - b_d) * scale
        m_p = m_n & m_s
        if OTHERS:
            m_p = m_p & (o_n[:, None] != o_s[None, :])
        b_p = tl.where(m_p, b_p, 0.0)
        p_w = p_z + (i_k * D)[:, None] + o_v[None, :]
        b_z = tl.load(p_w, mask=(o_s < L)[:, None] & m_v, other=0.0)
        b_g = tl.dot(b_p.to(b_z.dtype), b_z, b_g, input_precision=PRECISION)
    if OTHERS:
        b_g += tl.load(p_g, mask=m_n & m_v, other=0.0).to(tl.float32)
    tl.store(p_g, b_g.to(p_g.dtype.element_ty), mask=m_n & m_v)


class Tiles(NamedTuple):
    BN: int  # positions of a program
    BS: int  # positions of the line that are taken in one step
    BC: int  # channels summed in one step
    BV: int  # channels written by a program
    num_warps: int
    num_stages: int


# The largest tried that spill no register on sm_80 to sm_100 and fit 99 KB of shared memory. "fma"
# is float32 without TF32.
_TILES = {
    "half": Tiles(64, 64, 64, 256, 8, 3),
    "tf32": Tiles(64, 32, 32, 128, 8, 2),
    "fma": Tiles(32, 32, 16, 32, 4, 2),
}


def _dot_size(n: int) -> int:
    return max(16, triton.next_power_of_2(n))  # tl.dot takes no less than 16


def choose_tiles(L: int, summed: int, written: int, element_size: int, precision: str) -> Tiles:
    """Tiles for lines of L positions; ``summed`` and ``written`` are numbers of channels."""
    tiles = _TILES["half" if element_size == 2 else "tf32" if precision == "tf32" else "fma"]
    return tiles._replace(
        BN=min(tiles.BN, _dot_size(L)),
        BS=min(tiles.BS, _dot_size(L)),
        BC=min(tiles.BC, _dot_size(summed)),
        BV=min(tiles.BV, _dot_size(written)),
    )


def dot_precision(dtype: torch.dtype) -> str:
    """What torch uses for matrix products; it matters to float32 alone."""
    matmul = torch.backends.cuda.matmul
    # torch >= 2.9 raises on the older flag once the newer one was set
    newer = hasattr(matmul, "fp32_precision")
    allowed = matmul.fp32_precision == "tf32" if newer else matmul.allow_tf32
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def _lines(shape: torch.Size) -> list[tuple[int, int, int, int, bool]]:
    """LINES, L, s_line, s_n and OTHERS of the launches: the columns, then the rows."""
    _, _, height, width = shape
    columns, rows = (width, height, 1, width, False), (height, width, width, 1, True)
    return [columns, rows] if width > 1 else [columns]


def _channels_last(*maps: Tensor) -> list[Tensor]:
    return [x.contiguous(memory_format=torch.channels_last) for x in maps]


def _empty_channels_last(x: Tensor) -> Tensor:
    """``x`` itself where the kernels can write to it, else a map to be copied from afterwards."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return torch.empty_like(x, memory_format=torch.channels_last)


def forward(
    query: Tensor,  # (B, C, H, W)
    key: Tensor,  # (B, C, H, W)
    value: Tensor,  # (B, Cv, H, W)
    scale: float,
    output: Tensor,  # (B, Cv, H, W), written
    lse: Tensor,  # (B, H, W) float32, written: log(sum(exp(logits)))
) -> None:
    """Memory: one channels_last copy of every map that is not so, and one float32 a position."""
    if output.numel() == 0:
        return
    B, C, _, _ = query.shape
    Cv = value.shape[1]
    precision = dot_precision(query.dtype)
    query, key, value = _channels_last(query, key, value)
    written = _empty_channels_last(output)
    launches = _lines(query.shape)
    # each launch has its own: programs of other channels may still read the former
    states = [None, *(torch.empty_like(lse) for _ in launches[1:]), lse]
    with torch.cuda.device_of(query):
        for i, (LINES, L, s_line, s_n, others) in enumerate(launches):
            tiles = choose_tiles(L, C, Cv, query.element_size(), precision)
            grid = (B * LINES * triton.cdiv(L, tiles.BN), triton.cdiv(Cv, tiles.BV))
            criss_cross_attention_forward_kernel[grid](
                *(query, key, value, written, states[i], states[i + 1]),
                *(scale, LINES, L, C, Cv, s_line, s_n),
                **tiles._asdict(),
                OTHERS=others,
                PRECISION=precision,
            )
    if written is not output:
        output.copy_(written)


def backward(
    grad: Tensor,  # (B, Cv, H, W)
    query: Tensor,  # (B, C, H, W)
    key: Tensor,  # (B, C, H, W)
    value: Tensor,  # (B, Cv, H, W)
    scale: float,
    output: Tensor,  # (B, Cv, H, W)
    lse: Tensor,  # (B, H, W) float32
    grad_query: Tensor,  # (B, C, H, W), written
    grad_key: Tensor,  # (B, C, H, W), written
    grad_value: Tensor,  # (B, Cv, H, W), written
) -> None:
    """Gradients of `forward`; deterministic.

    Memory: one channels_last copy of every map that is not so, and one float32 a position.
    """
    if output.numel() == 0:
        return
    B, C, H, W = query.shape
    Cv = value.shape[1]
    size, precision = query.element_size(), dot_precision(query.dtype)
    grad, query, key, value, output = _channels_last(grad, query, key, value, output)
    results = (grad_query, grad_key, grad_value)
    dq, dk, dv = (_empty_channels_last(x) for x in results)
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(query):
        BC = min(128, _dot_size(Cv))
        criss_cross_attention_delta_kernel[(triton.cdiv(B * H * W, 32),)](
            *(grad, output, delta, B * H * W, Cv), BN=32, BC=BC, num_warps=4
        )
        products = (
            (query, key, grad, value, key, dq, delta, False),
            (key, query, value, grad, query, dk, delta, True),
            (key, query, None, None, grad, dv, None, True),
        )
        for LINES, L, s_line, s_n, others in _lines(query.shape):
            for a, b, x, y, z, g, d, keys in products:
                channels = g.shape[1]
                tiles = choose_tiles(L, C if x is None else max(C, Cv), channels, size, precision)
                grid = (B * LINES * triton.cdiv(L, tiles.BN), triton.cdiv(channels, tiles.BV))
                criss_cross_attention_backward_kernel[grid](
                    *(a, b, x, y, z, g, lse, d, scale, LINES, L, C, Cv, channels, s_line, s_n),
                    **tiles._asdict(),
                    KEYS=keys,
                    OTHERS=others,
                    PRECISION=precision,
                )
    for result, written in zip(results, (dq, dk, dv), strict=True):
        if result is not written:
            result.copy_(written)
