# SPDX-License-Identifier: Apache-2.0
"""criss_cross_attention in plain torch: the definition of the operator."""

import torch
from torch import Tensor


def _others(query: Tensor) -> Tensor:
    """(B, H, W, W - 1): the columns j of a row but w itself, ascending, for every position."""
    batch, _, height, width = query.shape
    w = torch.arange(width, device=query.device)
    j = w[:-1].expand(width, -1)
    return (j + (j >= w[:, None])).expand(batch, height, -1, -1)


def reference_weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(B, H, W, H + W - 1): the column's weights, then those of the row without the position."""
    column = torch.einsum("bchw,bciw->bhwi", query, key)
    # Left out, not masked: there is no number that is small enough beside any logits.
    row = torch.einsum("bchw,bchj->bhwj", query, key).gather(3, _others(query))
    return (torch.cat([column, row], dim=3) * scale).softmax(dim=3)


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    weights = reference_weights(query, key, scale)
    height, width = query.shape[2:]
    column, others = weights.split([height, width - 1], dim=3)
    row = others.new_zeros((*others.shape[:3], width)).scatter(3, _others(query), others)
    attended = torch.einsum("bhwi,bviw->bvhw", column, value)
    return attended + torch.einsum("bhwj,bvhj->bvhw", row, value)
