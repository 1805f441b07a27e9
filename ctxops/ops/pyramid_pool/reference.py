# SPDX-License-Identifier: Apache-2.0
"""pyramid_pool in plain torch: the definition of the operator."""

import torch
from torch import Tensor


def _windows(extent: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of n adaptive bins along an axis, and which of them count: both (n, longest)."""
    i = torch.arange(n, device=device)[:, None]
    start, end = i * extent // n, ((i + 1) * extent + n - 1) // n
    position = start + torch.arange(extent // n + 2, device=device)
    return position.clamp(max=extent - 1), position < end


def reference(input: Tensor, output_sizes: tuple[int, ...], mode: str) -> Tensor:
    height, width = input.shape[2:]
    pooled = []
    for n in output_sizes:
        row, row_counts = _windows(height, n, input.device)
        column, column_counts = _windows(width, n, input.device)
        # (B, C, n, rows, n, columns): every bin with the positions of the longest one.
        windows = input[:, :, row][..., column]
        counts = row_counts[:, :, None, None] & column_counts
        if mode == "max":
            windows = windows.masked_fill(~counts, -torch.inf).transpose(3, 4).flatten(4)
            values = windows.max(dim=4).values
        else:
            values = windows.masked_fill(~counts, 0).sum((3, 5)) / counts.sum((1, 3))
        pooled.append(values.flatten(2))
    return torch.cat(pooled, dim=2)
