# SPDX-License-Identifier: Apache-2.0
"""Gated fully fusion and the dense feature pyramid (Li et al., AAAI 2020)."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops._checks import (
    check_choice,
    check_concatenated,
    check_features,
    check_levels,
    check_sizes,
)
from ctxops._torch import forward_method
from ctxops.nn.cbr import cbr
from ctxops.nn.feature_fusion import LevelFusion, resized_sum
from ctxops.nn.pointwise import PointwiseConv2d, is_readable, pointwise, split_weight
from ctxops.nn.resize import resize
from ctxops.ops.gated_fusion import gated_fusion, self_gated_fusion

GateSource = Literal["input", "reduced"]


class GatedFullyFusion(LevelFusion):
    r"""Gated fully fusion: every level receives, where it has little to say, what others send.

    .. math::
        Y_l = (1 + G_l) X_l
              + (1 - G_l) \sum_{i \ne l} \operatorname{resize}_l(G_i X_i), \qquad
        G_l = \sigma(w_l \cdot Z_l + b_l)

    where X are the maps after their reduction, each by a 1 x 1 convolution, norm and ReLU, and
    every G_l is one number per position.

    Args:
        in_channels: channels of each level's map, at least two levels.
        channels: channels that each map is reduced to, and those of the result.
        gate_from: what Z is. "input": the map before its reduction (eq. 5, whose w_l has that many
            weights). "reduced": X, of which gates and fusion are computed in a single pass.
        align_corners: of the bilinear resizes.
        norm_layer: makes a norm from a number of channels.

    :meth:`gates` returns G. ``forward(features, closed=(0, 2))`` has G_0 = G_2 = 0: these levels
    send nothing, and receive everything (the paper's Figure 7 b).

    Shape: maps ``(B, in_channels[l], H_l, W_l)`` of any sizes, as list or tuple
        -> as many maps ``(B, channels, H_l, W_l)``, as tuple, in the memory format of the first. A
        graph exported with open sizes keeps which levels differ in height.

    Raises:
        TypeError: sizes that are no integers, features that are no list of floating tensors.
        ValueError: sizes below 1, fewer than two levels, an unknown ``gate_from``, another number
            of maps, maps of other channels or another batch than the first's, a closed level that
            does not exist.

    Source: Li et al., Gated Fully Fusion for Semantic Segmentation, AAAI 2020, eq. 5, Figure 2. The
    paper leaves out the resize; that products are resized, not their factors, is our reading. The
    two 3 x 3 convolutions that refine each level belong to the network. The authors' later code has
    a gate per channel instead; this is the paper's one.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 256,
        gate_from: GateSource = "input",
        *,
        align_corners: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__(in_channels, channels, align_corners=align_corners, norm_layer=norm_layer)
        check_choice("gate_from", gate_from, GateSource)
        self.gate_from = gate_from
        self.gate = nn.ModuleList(
            PointwiseConv2d(width if gate_from == "input" else channels, 1)
            for width in self.in_channels
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gate_from={self.gate_from!r}"

    @forward_method
    def gates(self, features: Sequence[Tensor]) -> list[Tensor]:
        """G: for every level a map ``(B, 1, H_l, W_l)`` with values between 0 and 1."""
        if self.gate_from == "reduced":
            return self._gates(self._reduce(features))
        check_features(features, self.in_channels, self.gate)
        return self._gates(features)

    def forward(self, features: Sequence[Tensor], closed: Sequence[int] = ()) -> tuple[Tensor, ...]:
        levels = range(len(self.gate))
        if not isinstance(closed, (list, tuple)) or any(
            not isinstance(level, int) or level not in levels for level in closed
        ):
            raise ValueError(
                f"closed must be a list or tuple of levels from 0 to {levels[-1]}, got {closed!r}"
            )
        maps = self._reduce(features)
        readable = [
            gate
            for gate, x in zip(self.gate, maps, strict=True)
            if is_readable(gate, x) and gate.bias is not None
        ]
        if self.gate_from == "reduced" and len(readable) == len(maps):
            weight = torch.cat([gate.weight.flatten(1) for gate in readable])
            bias = [
                torch.full_like(gate.bias, -torch.inf) if level in closed else gate.bias
                for level, gate in enumerate(readable)
            ]
            return self_gated_fusion(
                maps, weight, torch.cat(bias), align_corners=self.align_corners
            )
        gates = self._gates(features if self.gate_from == "input" else maps)
        for level in closed:
            gates[level] = torch.zeros_like(gates[level])
        return gated_fusion(maps, gates, align_corners=self.align_corners)

    def _gates(self, sources: Sequence[Tensor]) -> list[Tensor]:
        return [gate(x).sigmoid() for gate, x in zip(self.gate, sources, strict=True)]


class GatedFeaturePyramidFusion(LevelFusion):
    r"""Feature pyramid with the gates of :class:`GatedFullyFusion` in its top-down pathway.

    .. math::
        Y_L = X_L, \qquad
        Y_l = (1 + G_l) X_l + (1 - G_l) \operatorname{resize}_l(G_{l+1} Y_{l+1}), \qquad
        G_l = \sigma(w_l \cdot Z_l + b_l)

    where X are the maps Z after their reduction. Arguments, shapes and what raises as in
    :class:`ctxops.nn.FeaturePyramidFusion`; the gates come from the maps before their reduction.

    Source: Li et al., AAAI 2020, Table 1 and the text beside it, which gives no equation: this one
    is our reading.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 256,
        *,
        align_corners: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__(in_channels, channels, align_corners=align_corners, norm_layer=norm_layer)
        self.gate = nn.ModuleList(PointwiseConv2d(width, 1) for width in self.in_channels)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        *maps, y = self._reduce(features)
        *gates, gate_above = (
            gate(x).sigmoid() for gate, x in zip(self.gate, features, strict=True)
        )
        fused = [y]
        for x, gate in zip(reversed(maps), reversed(gates), strict=True):
            received = resize(gate_above * y, x.shape[2:], self.align_corners)
            y = (1 + gate) * x + (1 - gate) * received
            gate_above = gate
            fused.append(y)
        return tuple(reversed(fused))


class _DenseFusion(nn.Module):
    """H_i: the convolution of all maps so far, resized and concatenated, then norm and ReLU.

    Each map meets its part of the weight at its own size, since a 1 x 1 convolution commutes with
    a bilinear resize, and the concatenation is never made.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        align_corners: bool,
        norm_layer: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.conv = PointwiseConv2d(sum(in_channels), channels, bias=False)
        self.norm = norm_layer(channels)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        return F.relu(self.norm(self._convolve(maps, size)))

    def _convolve(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        if not is_readable(self.conv, maps[0]) or self.conv.bias is not None:
            return self.conv(torch.cat([resize(x, size, self.align_corners) for x in maps], dim=1))
        parts = zip(maps, split_weight(self.conv, maps), strict=True)
        maps = [pointwise(x, weight) for x, weight in parts]
        return resized_sum(maps, size, self.align_corners)


class DenseFeaturePyramid(nn.Module):
    r"""Dense feature pyramid: the context map reaches every level, each level all that follow.

    .. math::
        y_0 = R(C), \qquad y_i = H_i(\operatorname{cat}(y_0, X_L, X_{L-1}, \ldots, X_{L-i+1})),
        \qquad i = 1 \ldots L

    all at the size of the finest map, X_1, to which they are resized. R and H_i are 1 x 1
    convolutions with norm and ReLU, C is the context map and X_L the level below it.

    Args:
        in_channels: channels of each level's map, at least two levels, the finest first: those of
            :class:`GatedFullyFusion`'s result, or what the network has made of them.
        context_channels: channels of C.
        channels: channels of y.
        literal: H_i does without X_{L-i+1}, as eq. 6 is printed; the finest map is then not used.
        align_corners: of the bilinear resizes.
        norm_layer: makes a norm from a number of channels.

    Shape: maps ``(B, in_channels[l], H_l, W_l)`` of any sizes, as list or tuple, and C
        ``(B, context_channels, H_c, W_c)`` -> a tuple y_0, ..., y_L of maps
        ``(B, channels, H_0, W_0)``. A graph exported with open sizes keeps which maps differ in
        height.

    Raises:
        TypeError: sizes that are no integers, features that are no list of floating tensors, a
            context map that is none.
        ValueError: sizes below 1, fewer than two levels, another number of maps, maps of other
            channels or another batch than the first's.

    Source: Li et al., AAAI 2020, eq. 6, Figure 3, "Dense Feature Pyramid", which numbers the levels
    top-down: its X_i is X_{L-i+1} here. Eq. 6 prints cat(y_0, X_1, ..., X_{i-1}), which never uses
    the finest map; hence the default. The 0.8 M parameters that Table 3 adds for it are those of
    ``literal=True``: 788,992 for four levels of 256 channels and a context map of 512, against
    1,051,136.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        context_channels: int,
        channels: int = 256,
        *,
        literal: bool = False,
        align_corners: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.in_channels = check_levels("in_channels", in_channels)
        check_sizes(context_channels=context_channels, channels=channels)
        self.context_channels, self.channels = context_channels, channels
        self.literal, self.align_corners = literal, align_corners
        self.reduce = cbr(context_channels, channels, 1, norm_layer)
        widths = (channels, *reversed(self.in_channels))
        self.fuse = nn.ModuleList(
            _DenseFusion(widths[: level + (not literal)], channels, align_corners, norm_layer)
            for level in range(1, len(widths))
        )

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, context_channels={self.context_channels}, "
            f"channels={self.channels}, literal={self.literal}, align_corners={self.align_corners}"
        )

    def forward(self, features: Sequence[Tensor], context: Tensor) -> tuple[Tensor, ...]:
        check_features(
            features,
            [None for _ in self.in_channels],
            context=(context, self.context_channels, self.reduce),
        )
        size, y = features[0].shape[2:], self.reduce(context)
        self._check_channels(features, y)
        maps = [y, *reversed(features)]
        fused = (
            fuse(maps[: level + (not self.literal)], size)
            for level, fuse in enumerate(self.fuse, start=1)
        )
        return resize(y, size, self.align_corners), *fused

    def _check_channels(self, features: Sequence[Tensor], y: Tensor) -> None:
        levels = enumerate(zip(features, self.in_channels, strict=True))
        maps = {f"features[{level}]": x for level, x in levels}
        if self.literal:
            del maps["features[0]"]  # not used
        check_concatenated(self.fuse[-1], y_0=(y, self.channels), **maps)
