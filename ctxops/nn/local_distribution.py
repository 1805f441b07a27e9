# SPDX-License-Identifier: Apache-2.0
"""Global aggregation then local distribution (Li et al., TIP 2021)."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops._checks import (
    check_choice,
    check_concatenated,
    check_groups,
    check_maps,
    check_module,
    check_power_of_two,
    check_sizes,
    resolve_scale,
)
from ctxops.nn.bands import reach
from ctxops.nn.pointwise import PointwiseConv2d, convolve_concatenation
from ctxops.ops.neighborhood_attention import Border, check_pair, neighborhood_attention

Downsample = Literal["conv", "bilinear", "avg"]
Source = Literal["both", "global", "local"]
Arrangement = Literal["gald", "ldga", "parallel"]


class _DepthwiseDownsampling(nn.Sequential):
    """log2(ratio) depth-wise 3 x 3 convolutions of stride 2, unpadded, each with norm and ReLU.

    ``2 * ratio - 1`` positions leave one; a map with fewer on a side is padded by replication.
    """

    def __init__(self, channels: int, ratio: int, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__(
            *(
                nn.Sequential(
                    nn.Conv2d(channels, channels, 3, stride=2, groups=channels),
                    norm_layer(channels),
                    nn.ReLU(inplace=True),
                )
                for _ in range(ratio.bit_length() - 1)
            )
        )
        self.ratio, self.smallest = ratio, 2 * ratio - 1

    def reach(self) -> float:
        """With a resize back: to the next position, shifted by what the borders lack."""
        rest = [layer for stage in self.children() for layer in [*stage.children()][1:]]
        return 3 * self.ratio - 1 + reach(*rest)

    def forward(self, x: Tensor) -> Tensor:
        # A branch on the size, which graphs of large maps leave out. They are bound to large maps
        # anyway: torch tells a strided convolution's output of one position from a longer one.
        height, width = (max(0, self.smallest - side) for side in x.shape[2:])
        if height > 0 or width > 0:
            sides = (width // 2, width - width // 2, height // 2, height - height // 2)
            x = F.pad(x, sides, mode="replicate")
        return super().forward(x)


class LDv1(nn.Module):
    r"""Local distribution, version 1: a mask per channel says where the global map applies.

    .. math::
        M = \sigma(\operatorname{resize}(W_d X_g)), \qquad X_{gald} = M \odot X_g + X_g

    Args:
        channels: channels of the map. If W_d has no parameters, other numbers are taken too.
        downsample: W_d. "conv": log2(ratio) depth-wise 3 x 3 convolutions of stride 2 with bias and
            without padding, each with norm and ReLU. "bilinear" and "avg" have no parameters: a
            resize, and the averages of ratio x ratio cells, to sides of ceil(side / ratio).
        ratio: by how much W_d downsamples; a power of two for "conv".
        align_corners: of all bilinear resizes.
        norm_layer: makes a norm from a number of channels.

    :meth:`mask` returns M.

    Shape: ``(B, channels, H, W)`` -> the same, in the same memory format. What W_d lacks is
    replicated from the border: for "conv" up to a side of ``2 * ratio - 1`` (the released code
    fails on smaller maps), for "avg" up to whole cells. In training, batch norm refuses a single
    position, a batch of one map with both sides below ``3 * ratio - 1`` (23). A graph exported with
    open sizes, or traced, serves sides from ``3 * ratio - 1`` on for "conv", ``ratio + 1`` for the
    others.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, an unknown ``downsample``, a ratio that is no power of two of at
            least 2, a map of another shape.

    Source: Li et al., Global Aggregation then Local Distribution for Scene Parsing, TIP 2021, eq. 1
    and 2, Table II (a). The released block adds X_g to this once more: :class:`GALD`, ``residual``.
    """

    def __init__(
        self,
        channels: int,
        downsample: Downsample = "conv",
        ratio: int = 8,
        *,
        align_corners: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, ratio=ratio)
        check_choice("downsample", downsample, Downsample)
        self.channels, self.downsample, self.ratio = channels, downsample, ratio
        self.align_corners = align_corners
        self.down = None
        if downsample == "conv":
            check_power_of_two("ratio", ratio, at_least=2)
            self.down = _DepthwiseDownsampling(channels, ratio, norm_layer)

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, downsample={self.downsample!r}, ratio={self.ratio}, "
            f"align_corners={self.align_corners}"
        )

    def mask(self, x: Tensor) -> Tensor:
        """M, of the shape of x, with values between 0 and 1."""
        check_maps(x=(x, self.channels, self))
        return self._resize(self._downsample(x), x.shape[2:]).sigmoid()

    def reach(self) -> float:
        return math.inf if self.down is None else reach(self.down)

    def forward(self, x: Tensor) -> Tensor:
        return x + x * self.mask(x)

    def _downsample(self, x: Tensor) -> Tensor:
        if self.downsample == "conv":
            return self.down(x)
        if self.downsample == "bilinear":
            return self._resize(x, [(side + self.ratio - 1) // self.ratio for side in x.shape[2:]])
        # ceil_mode would do without the copy, but cannot be exported with open sizes.
        lacking = self.ratio - 1
        return F.avg_pool2d(F.pad(x, (0, lacking, 0, lacking), mode="replicate"), self.ratio)

    def _resize(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(x, tuple(size), mode="bilinear", align_corners=self.align_corners)


class LDv2(nn.Module):
    r"""Local distribution, version 2: attention to a dilated window of the global and local maps.

    .. math::
        X_{gald}(p) = \sum_{n} \operatorname{softmax}_n(s \,
                      \langle W_\theta x(p), W_\phi x(p + \Delta_n) \rangle) \; W_g x(p + \Delta_n),
        \qquad x = \operatorname{cat}(X_g, X_l)

    Args:
        global_channels: channels of X_g; 0: there is none, and x = X_l.
        local_channels: channels of X_l.
        channels: channels of the value and the output; the paper's C'.
        kernel_size, dilation, border, num_heads: those of
            :func:`ctxops.ops.neighborhood_attention.neighborhood_attention`.
        key_channels: channels of query and key; None: ``channels``.
        scale: s; None: ``(key_channels / num_heads) ** -0.5``.
        query_from, key_from, value_from: "both": the projection is one of x; "global": of X_g
            alone (Table II c, for the key or the query); "local": of X_l alone.
        bias: biases of the three projections.

    The maps are projected first, and the projections continue beyond the border as zeros. That is
    eq. 8 on zero-padded maps as long as there is no bias; with one, eq. 8 read to the letter would
    put the bias there. The concatenation is never made.

    Shape: X_g ``(B, global_channels, H, W)`` and X_l ``(B, local_channels, H, W)``
        -> ``(B, channels, H, W)`` in the memory format of the map that the query is made of, X_l
        for both. Without global aggregation X_l is the first and only map.

    Raises:
        TypeError: sizes that are no integers, a map too few or too many or no floating tensor.
        ValueError: sizes below 1, unknown names, "global" without global channels, heads that do
            not divide the channels, maps of other shapes, sizes or batches.

    Source: Li et al., TIP 2021, eq. 7 and 8, whose s is 1, with zero padding. No code is released.
    The paper names two best dilations for kernel_size 5: 6 in Table II (b), 3, the default here, in
    the text, which uses it for all other data sets. It does not say whether the projections have
    biases, and no widths reproduce the 2.3 M parameters of Table IV for certain.
    """

    def __init__(
        self,
        global_channels: int,
        local_channels: int,
        channels: int,
        kernel_size: int | Sequence[int] = 5,
        dilation: int | Sequence[int] = 3,
        *,
        key_channels: int | None = None,
        scale: float | None = 1.0,
        border: Border = "zeros",
        num_heads: int = 1,
        query_from: Source = "both",
        key_from: Source = "both",
        value_from: Source = "both",
        bias: bool = False,
    ) -> None:
        super().__init__()
        key_channels = channels if key_channels is None else key_channels
        check_sizes(local_channels=local_channels, channels=channels, key_channels=key_channels)
        if global_channels != 0:
            check_sizes(global_channels=global_channels)
        check_groups("num_heads", num_heads, key_channels=key_channels, channels=channels)
        check_choice("border", border, Border)
        self.global_channels, self.local_channels = global_channels, local_channels
        self.channels, self.key_channels, self.num_heads = channels, key_channels, num_heads
        self.kernel_size = check_pair("kernel_size", kernel_size)
        self.dilation = check_pair("dilation", dilation)
        self.scale = resolve_scale(scale, key_channels // num_heads)
        self.border = border
        self.query_from, self.key_from, self.value_from = query_from, key_from, value_from

        def projection(name: str, source: Source, width: int) -> nn.Module:
            check_choice(name, source, Source)
            if source == "global":
                if global_channels == 0:
                    raise ValueError(f"{name}='global' needs global_channels of at least 1, got 0")
                return PointwiseConv2d(global_channels, width, bias=bias)
            if source == "local" or global_channels == 0:
                return PointwiseConv2d(local_channels, width, bias=bias)
            return PointwiseConv2d(global_channels + local_channels, width, bias=bias)

        self.query = projection("query_from", query_from, key_channels)
        self.key = projection("key_from", key_from, key_channels)
        self.value = projection("value_from", value_from, channels)

    def extra_repr(self) -> str:
        return (
            f"kernel_size={self.kernel_size}, dilation={self.dilation}, scale={self.scale:.6g}, "
            f"border={self.border!r}, num_heads={self.num_heads}, query_from={self.query_from!r}, "
            f"key_from={self.key_from!r}, value_from={self.value_from!r}"
        )

    def reach(self) -> float:
        seen = self.dilation[0] * (self.kernel_size[0] // 2)
        return math.inf if self.border == "shift" else seen + reach(*self.children())

    def forward(self, x_global: Tensor, x_local: Tensor | None = None) -> Tensor:
        if self.global_channels == 0:
            if x_local is not None:
                raise TypeError("with global_channels=0 LDv2 takes x_local alone, got two maps")
            maps = {"local": (x_global, self.local_channels)}
        else:
            check_maps(x_global=(x_global, None), x_local=(x_local, None))
            if x_global.shape[2:] != x_local.shape[2:]:
                raise ValueError(
                    f"x_local must have the height and width of x_global, "
                    f"{tuple(x_global.shape[2:])}, got {tuple(x_local.shape[2:])}"
                )
            maps = {
                "global": (x_global, self.global_channels),
                "local": (x_local, self.local_channels),
            }

        def project(embedding: nn.Module, source: Source) -> Tensor:
            taken = {f"x_{name}": maps[name] for name in maps if source in (name, "both")}
            check_concatenated(embedding, **taken)
            return convolve_concatenation(embedding, *(x for x, _ in taken.values()))

        return neighborhood_attention(
            project(self.query, self.query_from),
            project(self.key, self.key_from),
            project(self.value, self.value_from),
            self.kernel_size,
            self.dilation,
            scale=self.scale,
            border=self.border,
            num_heads=self.num_heads,
        )


class GALD(nn.Module):
    r"""Global aggregation (GA), then local distribution (LD) of what it found.

    ``X_g = resize(GA(down(X)))``, and by ``arrangement``:

    - "gald": ``LD(X_g)`` with :class:`LDv1`, ``LD(X_g, X)`` with :class:`LDv2`
    - "ldga": ``resize(GA(down(LD(X))))``
    - "parallel": ``cat(X_g, LD(X))``

    Args:
        global_aggregation: a module from map to map, such as :class:`ctxops.nn.CGNL`, or None: LD
            alone. It sees ``channels`` channels ("ldga": those of LD) and keeps the size.
        local_distribution: :class:`LDv1`, :class:`LDv2`, or None: GA alone.
        arrangement: the paper shows "ldga" and "parallel" for LDv1 alone. With LDv2, our reading is
            x = X, that is ``global_channels=0``; so without GA.
        downsample: 2: X is halved before GA by an unpadded depth-wise 3 x 3 convolution of stride 2
            with bias, norm and ReLU, and what comes out is resized to the size of X. Any power of
            two: so many halvings. 1, or no GA: neither.
        channels: channels of X.
        residual: adds the input of LDv1 to its output once more: ``2 X_g + M * X_g``. None: with
            LDv1.
        concat: returns ``cat(Y, X)`` instead of the result Y.
        align_corners: of the resize after GA.
        norm_layer: makes the norm of the downsampling from a number of channels.

    The defaults are the block of the released code with LDv1. Its network concatenates later, after
    another convolution, and with the wider map that the block's input is made of. The paper's
    equations are ``residual=False, concat=True``.

    Shape: ``(B, channels, H, W)`` -> ``(B, C, H, W)``, where C is what the parts make of it. A side
    below ``2 * downsample - 1`` is padded by replication, where the released code fails. A graph
    exported with open sizes serves sides from ``3 * downsample - 1`` on, and those of its parts.

    Raises:
        TypeError: parts of another kind, sizes that are no integers, X that is no floating tensor.
        ValueError: no part at all, or one where two are to be arranged, parts whose channels do not
            fit, ``residual=True`` without LDv1, an unknown arrangement, a ``downsample`` that is no
            power of two, X of another shape.

    Source: Li et al., TIP 2021, eq. 1-3, Table I, Fig. 6. With :class:`CGNL` and :class:`LDv1`
    ``GALD(CGNL(512, 256), LDv1(512), channels=512)`` is the released block: 435,200 parameters.
    """

    def __init__(
        self,
        global_aggregation: nn.Module | None,
        local_distribution: LDv1 | LDv2 | None,
        arrangement: Arrangement = "gald",
        downsample: int = 2,
        *,
        channels: int,
        residual: bool | None = None,
        concat: bool = False,
        align_corners: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_module("global_aggregation", global_aggregation, (nn.Module,))
        check_module("local_distribution", local_distribution, (LDv1, LDv2))
        if global_aggregation is None and local_distribution is None:
            raise ValueError("global_aggregation and local_distribution must not both be None")
        check_choice("arrangement", arrangement, Arrangement)
        if arrangement != "gald" and (global_aggregation is None or local_distribution is None):
            raise ValueError(
                f"arrangement={arrangement!r} needs global_aggregation and local_distribution, "
                f"got None for one of them"
            )
        check_power_of_two("downsample", downsample, at_least=1)
        check_sizes(channels=channels)
        self.arrangement, self.channels, self.concat = arrangement, channels, concat
        # Where does LD see the global map?
        self._distributes = arrangement == "gald" and global_aggregation is not None
        self._check_local_distribution(local_distribution)
        if residual is None:
            residual = isinstance(local_distribution, LDv1)
        elif residual and not isinstance(local_distribution, LDv1):
            kind = type(local_distribution).__name__
            raise ValueError(f"residual=True needs an LDv1 as local_distribution, got {kind}")
        self.residual, self.align_corners = residual, align_corners
        self._starts_with_ldv2 = arrangement == "ldga" and isinstance(local_distribution, LDv2)
        self.downsample = 1 if global_aggregation is None else downsample
        self.down = None
        if self.downsample > 1:
            width = local_distribution.channels if arrangement == "ldga" else channels
            self.down = _DepthwiseDownsampling(width, downsample, norm_layer)
        self.global_aggregation = global_aggregation
        self.local_distribution = local_distribution

    def extra_repr(self) -> str:
        return (
            f"arrangement={self.arrangement!r}, downsample={self.downsample}, "
            f"residual={self.residual}, concat={self.concat}, align_corners={self.align_corners}"
        )

    def reach(self) -> float:
        inside = self.downsample * reach(self.global_aggregation)
        return reach(self.down, self.local_distribution) + inside

    def forward(self, x: Tensor) -> Tensor:
        # Where LDv2 comes first, the halving that is registered before it has another width.
        first = self.local_distribution if self._starts_with_ldv2 else self
        check_maps(x=(x, self.channels, first))
        if self.arrangement == "gald":
            y = self._distribute(self._aggregate(x), x)
        elif self.arrangement == "ldga":
            y = self._aggregate(self._distribute(x))
        else:
            y = torch.cat([self._aggregate(x), self._distribute(x)], dim=1)
        return torch.cat([y, x], dim=1) if self.concat else y

    def _check_local_distribution(self, module: LDv1 | LDv2 | None) -> None:
        if isinstance(module, LDv2):
            if module.local_channels != self.channels:
                raise ValueError(
                    f"local_distribution must have local_channels equal to channels, "
                    f"{self.channels}, got {module.local_channels}"
                )
            if (module.global_channels > 0) != self._distributes:
                wanted = "at least 1" if self._distributes else "0"
                raise ValueError(
                    f"local_distribution must have global_channels of {wanted} for "
                    f"arrangement={self.arrangement!r} with the global_aggregation given, "
                    f"got {module.global_channels}"
                )
        elif module is not None and not self._distributes and module.channels != self.channels:
            raise ValueError(
                f"local_distribution must have channels equal to those of x, {self.channels}, "
                f"got {module.channels}"
            )

    def _aggregate(self, x: Tensor) -> Tensor:
        """X_g of the size of x."""
        if self.global_aggregation is None:
            return x
        if self.down is None:
            return self.global_aggregation(x)
        y = self.global_aggregation(self.down(x))
        return F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=self.align_corners)

    def _distribute(self, x: Tensor, x_local: Tensor | None = None) -> Tensor:
        if self.local_distribution is None:
            return x
        if isinstance(self.local_distribution, LDv2) and self._distributes:
            return self.local_distribution(x, x_local)
        y = self.local_distribution(x)
        return y + x if self.residual else y
