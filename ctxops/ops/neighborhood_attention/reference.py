# SPDX-License-Identifier: Apache-2.0
"""neighborhood_attention in plain torch: the definition of the operator."""

import torch
from torch import Tensor


def neighbours(
    extent: int, kernel: int, dilation: int, border: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Along one axis: the neighbours' positions, and which are inside; both (extent, kernel)."""
    position = torch.arange(extent, device=device)[:, None]
    start = position // dilation - kernel // 2
    if border == "shift":
        steps = (extent - 1 - position % dilation) // dilation + 1
        start = torch.minimum(start.clamp(min=0), steps - kernel)
    step = start + torch.arange(kernel, device=device)
    neighbour = position % dilation + step * dilation
    inside = (neighbour >= 0) & (neighbour < extent)
    return neighbour.clamp(0, extent - 1), inside


def relative_steps(positions: Tensor, dilation: int) -> Tensor:
    """Along one axis: the steps to each position's neighbours plus kernel - 1, (extent, kernel)."""
    extent, kernel = positions.shape
    own = torch.arange(extent, device=positions.device)[:, None]
    return positions // dilation - own // dilation + kernel - 1


def _windows(
    x: Tensor, kernel_size: tuple[int, int], dilation: tuple[int, int], border: str, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Every position's window (B, heads, C, H, kh, W, kw), and what of it is inside."""
    height, width = x.shape[2:]
    rows, row_inside = neighbours(height, kernel_size[0], dilation[0], border, x.device)
    columns, column_inside = neighbours(width, kernel_size[1], dilation[1], border, x.device)
    windows = x.unflatten(1, (num_heads, -1))[:, :, :, rows][..., columns]
    return windows, row_inside[:, :, None, None] & column_inside


def reference_weights(
    query: Tensor,
    key: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    border: str,
    num_heads: int,
    rel_pos_bias: Tensor | None = None,
) -> Tensor:
    """The softmax weights (B, heads, kh, kw, H, W)."""
    windows, inside = _windows(key, kernel_size, dilation, border, num_heads)
    query = query.unflatten(1, (num_heads, -1))
    logits = (query[:, :, :, :, None, :, None] * windows).sum(2) * scale
    if rel_pos_bias is not None:
        rows, columns = (
            relative_steps(neighbours(*axis, border, query.device)[0], axis[2])
            for axis in zip(query.shape[-2:], kernel_size, dilation, strict=True)
        )
        logits = logits + rel_pos_bias[:, rows[:, :, None, None], columns]
    logits = logits.masked_fill(~inside, -torch.inf if border == "mask" else 0)
    # (B, heads, kh, kw, H, W)
    logits = logits.permute(0, 1, 3, 5, 2, 4)
    return logits.flatten(2, 3).softmax(2).unflatten(2, kernel_size)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    border: str,
    num_heads: int,
    rel_pos_bias: Tensor | None = None,
) -> Tensor:
    weights = reference_weights(
        query, key, kernel_size, dilation, scale, border, num_heads, rel_pos_bias
    )
    windows, inside = _windows(value, kernel_size, dilation, border, num_heads)
    windows = windows.masked_fill(~inside, 0).permute(0, 1, 2, 4, 6, 3, 5)
    return (weights[:, :, None] * windows).sum((3, 4)).flatten(1, 2)
