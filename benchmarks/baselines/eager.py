# SPDX-License-Identifier: Apache-2.0
"""The modules of ctxops.nn in eager torch, each in the fastest of the forms that the operators'
benchmark compares.
"""

import copy
import types
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops.nn import AFNB, APNB, CrissCrossAttention, GatedFullyFusion, LDv2, PyramidPooling
from ctxops.nn.dataset_context import _CrossAttention
from ctxops.nn.pointwise import PointwiseConv2d, convolve_concatenation
from ctxops.nn.resize import resize

__all__ = [
    "as_rows",
    "cross_by_bmm",
    "cross_by_einsum",
    "eager_twin",
    "fuse_levels",
    "sdpa",
    "softmax_attention",
    "windows_by_shifts",
    "windows_by_unfold",
]


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """Query (B, C, H, W), key (B, C, S), value (B, Cv, S) -> (B, Cv, H, W)."""
    scale = query.shape[1] ** -0.5 if scale is None else scale
    scaled = query.flatten(2).transpose(1, 2) * scale
    weights = (scaled @ key).softmax(dim=-1)
    return (weights @ value.transpose(1, 2)).transpose(1, 2).unflatten(2, query.shape[2:])


def as_rows(x: Tensor) -> Tensor:
    """(B, C, ...) as (B, 1, N, C), each row contiguous."""
    return x.flatten(2).transpose(1, 2).contiguous().unsqueeze(1)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Query (B, C, H, W), key and value (B, C, ...) -> (B, C, H, W)."""
    context = F.scaled_dot_product_attention(as_rows(query), as_rows(key), as_rows(value))
    return context.squeeze(1).transpose(1, 2).unflatten(2, query.shape[2:])


def windows_by_unfold(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel: int,
    dilation: int,
    scale: float | None = None,
) -> Tensor:
    """LDv2 as it is usually written: every position's window is copied out."""
    padding = kernel // 2 * dilation
    scale = query.shape[1] ** -0.5 if scale is None else scale

    def windows(x: Tensor) -> Tensor:
        columns = F.unfold(x, kernel, dilation, padding)
        return columns.view(*x.shape[:2], kernel * kernel, *x.shape[2:])

    weights = ((query * scale)[:, :, None] * windows(key)).sum(dim=1).softmax(dim=1)
    return (weights[:, None] * windows(value)).sum(dim=2)


def windows_by_shifts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel: int,
    dilation: int,
    scale: float | None = None,
) -> Tensor:
    """One pass over shifted maps for each neighbour: nothing is copied but the padding."""
    height, width = query.shape[2:]
    padding = kernel // 2 * dilation
    key, value = F.pad(key, (padding,) * 4), F.pad(value, (padding,) * 4)
    shifts = [
        (..., slice(i * dilation, i * dilation + height), slice(j * dilation, j * dilation + width))
        for i in range(kernel)
        for j in range(kernel)
    ]
    scaled = query * (query.shape[1] ** -0.5 if scale is None else scale)
    weights = torch.stack([(scaled * key[at]).sum(dim=1) for at in shifts], dim=1).softmax(dim=1)
    return sum(weights[:, n, None] * value[at] for n, at in enumerate(shifts))


def cross_by_einsum(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """Query and key (B, C, H, W), value (B, Cv, H, W) -> (B, Cv, H, W)."""
    height = query.shape[2]
    query = query * (query.shape[1] ** -0.5 if scale is None else scale)
    itself = torch.eye(height, dtype=torch.bool, device=query.device)[:, None]
    column = torch.einsum("bchw,bciw->bhwi", query, key).masked_fill(itself, -torch.inf)
    row = torch.einsum("bchw,bchj->bhwj", query, key)
    weights = torch.cat([column, row], dim=3).softmax(dim=3)
    attended = torch.einsum("bhwi,bciw->bchw", weights[..., :height], value)
    return attended + torch.einsum("bhwj,bchj->bchw", weights[..., height:], value)


def cross_by_bmm(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """The recipe of CCNet's released code: every map is copied to columns and to rows."""
    batch, _, height, width = query.shape
    query = query * (query.shape[1] ** -0.5 if scale is None else scale)

    def columns(x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2).contiguous().view(batch * width, -1, height)

    def rows(x: Tensor) -> Tensor:
        return x.permute(0, 2, 1, 3).contiguous().view(batch * height, -1, width)

    itself = torch.eye(height, dtype=torch.bool, device=query.device)
    column = torch.bmm(columns(query).mT, columns(key)).masked_fill(itself, -torch.inf)
    column = column.view(batch, width, height, height).transpose(1, 2)
    row = torch.bmm(rows(query).mT, rows(key)).view(batch, height, width, width)
    weights = torch.cat([column, row], dim=3).softmax(dim=3)
    column = weights[..., :height].transpose(1, 2).contiguous().view(-1, height, height)
    row = weights[..., height:].contiguous().view(-1, width, width)
    column = torch.bmm(columns(value), column.mT).view(batch, width, -1, height)
    row = torch.bmm(rows(value), row.mT).view(batch, height, -1, width)
    return column.permute(0, 2, 3, 1) + row.permute(0, 2, 1, 3)


def fuse_levels(
    features: Sequence[Tensor], gates: Sequence[Tensor], align_corners: bool = False
) -> tuple[Tensor, ...]:
    """Maps (B, C, H_l, W_l) and gates (B, 1, H_l, W_l) -> fused maps.

    With the sum of all levels of a size, so that none is added up again for every other.
    """
    sent = [gate * x for x, gate in zip(features, gates, strict=True)]
    sums: dict[torch.Size, Tensor] = {}
    for x in sent:
        sums[x.shape[2:]] = sums[x.shape[2:]] + x if x.shape[2:] in sums else x
    totals = {
        size: sum(
            (resize(x, size, align_corners) for other, x in sums.items() if other != size), total
        )
        for size, total in sums.items()
    }
    return tuple(
        (1 + gate) * x + (1 - gate) * (totals[x.shape[2:]] - own)
        for x, gate, own in zip(features, gates, sent, strict=True)
    )


def _attend_to_anchors(self: APNB | AFNB, x: Tensor, context: Tensor) -> Tensor:
    """As released, but that a shared embedding runs once."""
    key_map = self.key(context)
    query = key_map if self.share == "query_key" else self.query(x)

    def sample(x: Tensor) -> Tensor:
        pools = [F.adaptive_avg_pool2d(x, n).flatten(2) for n in self.output_sizes]
        return torch.cat(pools, dim=2)

    value = sample(key_map if self.share == "key_value" else self.value(context))
    return self._fuse(self.out(softmax_attention(query, sample(key_map), value, self.scale)), x)


def _distribute(self: LDv2, x_global: Tensor, x_local: Tensor) -> Tensor:
    sources = {"both": (x_global, x_local), "global": (x_global,), "local": (x_local,)}
    return windows_by_shifts(
        convolve_concatenation(self.query, *sources[self.query_from]),
        convolve_concatenation(self.key, *sources[self.key_from]),
        convolve_concatenation(self.value, *sources[self.value_from]),
        kernel=self.kernel_size[0],
        dilation=self.dilation[0],
        scale=self.scale,
    )


def _attend_to_cross(self: CrissCrossAttention, x: Tensor) -> Tensor:
    cross = cross_by_bmm if x.is_contiguous() else cross_by_einsum
    return self.gamma * cross(self.query(x), self.key(x), self.value(x), 1.0) + x


def _fuse_gated(self: GatedFullyFusion, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
    maps = self._reduce(features)
    gates = self._gates(features if self.gate_from == "input" else maps)
    return fuse_levels(maps, gates, self.align_corners)


def _attend_to_map(self: _CrossAttention, x: Tensor, context: Tensor) -> Tensor:
    return self.out(sdpa(self.query(x), self.key(context), self.value(context)))


def _pool_pyramid(self: PyramidPooling, x: Tensor) -> Tensor:
    contexts = [
        resize(branch(F.adaptive_avg_pool2d(x, n)), x.shape[2:], self.align_corners)
        for branch, n in zip(self.branches, self.output_sizes, strict=True)
    ]
    return self.fuse(torch.cat([x, *contexts], dim=1))


# What replaces which method. A convolution whose forward is replaced is called, and gets the
# concatenation of the maps that ours keeps apart.
_EAGER: dict[type[nn.Module], dict[str, Callable]] = {
    PointwiseConv2d: {"forward": nn.Conv2d.forward},
    APNB: {"_attend": _attend_to_anchors},
    AFNB: {"_attend": _attend_to_anchors},
    LDv2: {"forward": _distribute},
    CrissCrossAttention: {"forward": _attend_to_cross},
    GatedFullyFusion: {"forward": _fuse_gated},
    _CrossAttention: {"forward": _attend_to_map},
    PyramidPooling: {"forward": _pool_pyramid},
}


def eager_twin(module: nn.Module) -> nn.Module:
    """A copy of a module whose parts of ctxops compute in eager torch, with the same weights."""
    twin = copy.deepcopy(module)
    for child in twin.modules():
        for kind, methods in _EAGER.items():
            if isinstance(child, kind):
                for name, method in methods.items():
                    setattr(child, name, types.MethodType(method, child))
    return twin
