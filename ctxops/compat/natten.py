# SPDX-License-Identifier: Apache-2.0
"""NATTEN's functions: neighborhood attention in one and two dimensions, on the CPU as well.

Names, order of arguments and layouts are those of NATTEN 0.17, and the two names that it dropped
are there. ``na1d`` and ``na2d`` are :func:`ctxops.neighborhood_attention` with ``border="shift"``:
the window slides inside the map, so that every position has all of its neighbours. The functions
that give the logits (``*_qk``) or take the weights (``*_av``) are computed by torch from every
position's window, which takes the memory of the window's length times the map.

Source: Hassani et al., Neighborhood Attention Transformer, CVPR 2023; Hassani and Shi, Dilated
Neighborhood Attention Transformer, 2022.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxops._checks import check_shape
from ctxops.ops.neighborhood_attention import check_pair, neighborhood_attention
from ctxops.ops.neighborhood_attention.reference import neighbours, relative_steps

__all__ = [
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "natten1dav",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqkrpb",
]

Size = int | Sequence[int]


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    is_causal: bool = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""Attention of every position to its kh x kw nearest neighbours, in steps of the dilation.

    .. math::
        y_p = \sum_n \operatorname{softmax}_n(s \, \langle q_p, k_n \rangle + b_{n - p}) \; v_n

    Args:
        query: ``(B, H, W, heads, D)``.
        key: the same shape.
        value: ``(B, H, W, heads, Dv)``.
        kernel_size: kh and kw, or one number for both.
        dilation: along each axis, or one number for both.
        is_causal: must be False.
        rpb: the bias b, ``(heads, 2 * kh - 1, 2 * kw - 1)``, by the steps from the query to the
            neighbour: ``[kh - 1, kw - 1]`` is the query's own.
        scale: s; None: ``D ** -0.5``.

    Returns:
        ``(B, H, W, heads, Dv)``.

    Raises:
        TypeError, ValueError: as :func:`ctxops.neighborhood_attention`.
        NotImplementedError: causal masks.
    """
    _check_causal(is_causal)
    check_shape("query", query, query, (None,) * 5, "(B, H, W, heads, D)")
    check_shape("key", key, query, query.shape, "(B, H, W, heads, D)")
    check_shape("value", value, query, (*query.shape[:4], None), "(B, H, W, heads, Dv)")
    heads = query.shape[3]
    _check_rpb(rpb, query, heads, check_pair("kernel_size", kernel_size))
    # (B, heads * D, H, W) in channels_last: no copy.
    query, key, value = (x.flatten(3).permute(0, 3, 1, 2) for x in (query, key, value))
    output = neighborhood_attention(
        query, key, value, kernel_size, dilation, scale=scale, border="shift", num_heads=heads,
        rel_pos_bias=rpb,
    )  # fmt: skip
    return output.permute(0, 2, 3, 1).unflatten(3, (heads, -1))


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    additional_keys: None = None,
    is_causal: bool = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """The logits of :func:`na2d` at s = 1.

    Args:
        query: ``(B, heads, H, W, D)``, and so ``key``.
        additional_keys: must be None.

    The other arguments are those of :func:`na2d`.

    Returns:
        ``(B, heads, H, W, kh * kw)``, neighbours row by row.
    """
    _check_causal(is_causal)
    _check_none("additional_keys", additional_keys)
    check_shape("query", query, query, (None,) * 5, "(B, heads, H, W, D)")
    check_shape("key", key, query, query.shape, "(B, heads, H, W, D)")
    kernel = check_pair("kernel_size", kernel_size)
    _check_rpb(rpb, query, query.shape[1], kernel)
    axes = _axes(query, kernel, check_pair("dilation", dilation))
    logits = torch.einsum("bmhwd,bmhiwjd->bmhwij", query, _windows(key, axes))
    if rpb is not None:
        (_, rows), (_, columns) = axes
        logits = logits + rpb[:, rows[:, None, :, None], columns[:, None, :]]
    return logits.flatten(-2)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    additional_values: None = None,
    is_causal: bool = False,
) -> Tensor:
    """The sum of every position's neighbours, each with its weight.

    Args:
        attn: ``(B, heads, H, W, kh * kw)``: weights, as :func:`na2d_qk` orders the neighbours.
        value: ``(B, heads, H, W, D)``.
        additional_values: must be None.

    The other arguments are those of :func:`na2d`.

    Returns:
        ``(B, heads, H, W, D)``.
    """
    _check_causal(is_causal)
    _check_none("additional_values", additional_values)
    check_shape("value", value, value, (None,) * 5, "(B, heads, H, W, D)")
    kernel = check_pair("kernel_size", kernel_size)
    shape = (*value.shape[:4], kernel[0] * kernel[1])
    check_shape("attn", attn, value, shape, "(B, heads, H, W, kh * kw)")
    windows = _windows(value, _axes(value, kernel, check_pair("dilation", dilation)))
    return torch.einsum("bmhwij,bmhiwjd->bmhwd", attn.unflatten(-1, kernel), windows)


def natten2dqkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Size, dilation: Size
) -> Tensor:
    """:func:`na2d_qk` by its name before NATTEN 0.17."""
    return na2d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten2dav(attn: Tensor, value: Tensor, kernel_size: Size, dilation: Size) -> Tensor:
    """:func:`na2d_av` by its name before NATTEN 0.17."""
    return na2d_av(attn, value, kernel_size, dilation)


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    is_causal: bool = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`na2d` along one axis: ``(B, L, heads, D)``, rpb ``(heads, 2 * k - 1)``."""
    check_shape("query", query, query, (None,) * 4, "(B, L, heads, D)")
    row, steps = _one_row("kernel_size", kernel_size), _one_row("dilation", dilation)
    query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    bias = None if rpb is None else rpb.unsqueeze(1)
    return na2d(query, key, value, row, steps, is_causal, bias, scale).squeeze(1)


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    additional_keys: None = None,
    is_causal: bool = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """:func:`na2d_qk` along one axis: ``(B, heads, L, D)`` to ``(B, heads, L, k)``."""
    check_shape("query", query, query, (None,) * 4, "(B, heads, L, D)")
    row, steps = _one_row("kernel_size", kernel_size), _one_row("dilation", dilation)
    query, key = query.unsqueeze(2), key.unsqueeze(2)
    bias = None if rpb is None else rpb.unsqueeze(1)
    return na2d_qk(query, key, row, steps, additional_keys, is_causal, bias).squeeze(2)


def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: Size,
    dilation: Size = 1,
    additional_values: None = None,
    is_causal: bool = False,
) -> Tensor:
    """:func:`na2d_av` along one axis: ``(B, heads, L, k)`` and ``(B, heads, L, D)``."""
    check_shape("value", value, value, (None,) * 4, "(B, heads, L, D)")
    row, steps = _one_row("kernel_size", kernel_size), _one_row("dilation", dilation)
    attn, value = attn.unsqueeze(2), value.unsqueeze(2)
    return na2d_av(attn, value, row, steps, additional_values, is_causal).squeeze(2)


def natten1dqkrpb(
    query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Size, dilation: Size
) -> Tensor:
    """:func:`na1d_qk` by its name before NATTEN 0.17."""
    return na1d_qk(query, key, kernel_size, dilation, rpb=rpb)


def natten1dav(attn: Tensor, value: Tensor, kernel_size: Size, dilation: Size) -> Tensor:
    """:func:`na1d_av` by its name before NATTEN 0.17."""
    return na1d_av(attn, value, kernel_size, dilation)


Axis = tuple[Tensor, Tensor]


def _axes(x: Tensor, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[Axis, Axis]:
    """Along H and along W of ``(B, heads, H, W, D)``: the positions of the neighbours of each
    position, and the steps to them plus k - 1; both (extent, k)."""
    axes = []
    for name, extent, k, d in zip("HW", x.shape[2:4], kernel, dilation, strict=True):
        if k * d > extent:
            raise ValueError(
                f"kernel_size {k} with dilation {d} needs {name} of at least {k * d}, got {extent}"
            )
        positions, _ = neighbours(extent, k, d, "shift", x.device)
        axes.append((positions, relative_steps(positions, d)))
    return axes[0], axes[1]


def _windows(x: Tensor, axes: tuple[Axis, Axis]) -> Tensor:
    """``(B, heads, H, W, D)`` -> every position's window ``(B, heads, H, kh, W, kw, D)``."""
    (rows, _), (columns, _) = axes
    return x[:, :, rows][:, :, :, :, columns]


def _one_row(name: str, size: Size) -> tuple[int, int]:
    if isinstance(size, Sequence) and not isinstance(size, str):
        if len(size) != 1:
            raise ValueError(f"{name} must be one integer for one axis, got {size!r}")
        (size,) = size
    return 1, check_pair(name, size)[1]


def _check_causal(is_causal: bool | Sequence[bool]) -> None:
    if is_causal is not None and is_causal is not False:
        raise NotImplementedError(f"is_causal must be False, got {is_causal!r}")


def _check_rpb(rpb: Tensor | None, query: Tensor, heads: int, kernel: Sequence[int]) -> None:
    if rpb is not None:
        shape = (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
        check_shape("rpb", rpb, query, shape, "(heads, 2 * kh - 1, 2 * kw - 1)")


def _check_none(name: str, value: object) -> None:
    if value is not None:
        raise NotImplementedError(f"{name} must be None: no other tokens are attended to")
