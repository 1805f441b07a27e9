# SPDX-License-Identifier: Apache-2.0
"""Maps at the size of others."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import wrap_torch_function

from ctxops import _layout


def resize(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """``x`` itself where it has that size, else its bilinear resize."""
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


@wrap_torch_function(lambda x, like, align_corners: (x, like))
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


def resize_rows(
    x: Tensor,
    size: Sequence[int],
    rows: range,
    align_corners: bool,
    *,
    first: int = 0,
    height: int | None = None,
) -> Tensor:
    """Some rows of a bilinear resize to ``size``, ``(B, C, len(rows), size[1])``.

    ``x`` has the rows from ``first`` on of a map of that ``height``; None: it is the whole map.
    """
    source = x.shape[2] if height is None else height
    if (source, x.shape[3]) == tuple(size):
        return x[:, :, rows.start - first : rows.stop - first]
    row = torch.arange(rows.start, rows.stop, device=x.device, dtype=torch.float64)
    if align_corners:
        position = row * ((source - 1) / max(size[0] - 1, 1))
    else:
        position = ((row + 0.5) * (source / size[0]) - 0.5).clamp_min(0)
    above = position.long().clamp_max(source - 1)
    share = (position - above).to(x.dtype)[:, None]
    low, high = (
        (i.clamp_max(source - 1) - first).clamp(0, x.shape[2] - 1) for i in (above, above + 1)
    )
    y = torch.lerp(x[:, :, low], x[:, :, high], share)
    return F.interpolate(y, (len(rows), size[1]), mode="bilinear", align_corners=align_corners)
