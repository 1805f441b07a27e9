# SPDX-License-Identifier: Apache-2.0
"""Maps at the size of others."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ctxops import _layout


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """``x`` itself where it has that size, else its bilinear resize."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def resize_like(x: Tensor, like: Tensor, align_corners: bool) -> Tensor:
    """``x`` in the size and memory format of a map: maps of one format concatenate without more.

    No shortcut where ``x`` has that size: an exported graph would then refuse maps of that size.
    """
    resized = F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=align_corners)
    return resized.contiguous(memory_format=_layout.memory_format(like))


def broadcast_like(x: Tensor, like: Tensor) -> Tensor:
    """``x``, of one position per image, at every position of a map, in its memory format."""
    spread = x.expand(-1, -1, *like.shape[2:])
    return spread.contiguous(memory_format=_layout.memory_format(like))
