# SPDX-License-Identifier: Apache-2.0
"""Memory formats, and the allocation of maps in them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ctxops._torch import is_transformed


def empty_map(
    shape: Sequence[int], like: Tensor, layout: torch.memory_format | None = None
) -> Tensor:
    """An uninitialised map in the dtype and device of ``like``, in its or another memory format."""
    layout = memory_format(like) if layout is None else layout
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last if and only if the map is that and not also contiguous."""
    if x.is_contiguous() or is_transformed():  # vmap does not tell of channels_last
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def inner_dense(x: Tensor) -> Tensor:
    """``x`` itself where its channels or its columns lie side by side, else a contiguous copy."""
    _, channels, _, width = x.shape
    _, stride_c, _, stride_w = x.stride()
    return x if stride_w == 1 or stride_c == 1 or width == 1 or channels == 1 else x.contiguous()
