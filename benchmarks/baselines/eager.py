# SPDX-License-Identifier: Apache-2.0
"""The modules of ctxops.nn in eager torch, each in the fastest of the forms of functions.py."""

import copy
import types
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.functions import (
    cross_by_bmm,
    cross_by_einsum,
    fuse_levels,
    sdpa,
    softmax_attention,
    windows_by_shifts,
)
from ctxops.nn import AFNB, APNB, CrissCrossAttention, GatedFullyFusion, LDv2, PyramidPooling
from ctxops.nn.dataset_context import _CrossAttention
from ctxops.nn.pointwise import PointwiseConv2d, convolve_concatenation
from ctxops.nn.resize import resize


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
