# SPDX-License-Identifier: Apache-2.0
"""neighborhood_attention in plain torch: the definition of the operator."""

import torch
from torch import Tensor


def _neighbours(
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


def reference_weights(
    query: Tensor,
    key: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    border: str,
    num_heads: int,
) -> Tensor:
    """The softmax weights (B, heads, kh, kw, H, W)."""
    height, width = query.shape[2:]
    rows, row_inside = _neighbours(height, kernel_size[0], dilation[0], border, query.device)
    columns, column_inside = _neighbours(width, kernel_size[1], dilation[1], border, query.device)
    query, key = (x.unflatten(1, (num_heads, -1)) for x in (query, key))
    # (B, heads, C, H, kh, W, kw): every position with its window.
    windows = key[:, :, :, rows][..., columns]
    logits = (query[:, :, :, :, None, :, None] * windows).sum(2) * scale
    inside = row_inside[:, :, None, None] & column_inside
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
) -> Tensor:
    height, width = query.shape[2:]
    rows, row_inside = _neighbours(height, kernel_size[0], dilation[0], border, query.device)
    columns, column_inside = _neighbours(width, kernel_size[1], dilation[1], border, query.device)
    weights = reference_weights(query, key, kernel_size, dilation, scale, border, num_heads)
    windows = value.unflatten(1, (num_heads, -1))[:, :, :, rows][..., columns]
    inside = row_inside[:, :, None, None] & column_inside
    windows = windows.masked_fill(~inside, 0).permute(0, 1, 2, 4, 6, 3, 5)
    return (weights[:, :, None] * windows).sum((3, 4)).flatten(1, 2)
