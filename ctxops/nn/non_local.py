# SPDX-License-Identifier: Apache-2.0
"""Non-local blocks and their asymmetric pyramid forms (Zhu et al., ICCV 2019)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ctxops._checks import check_choice, check_maps, check_sizes
from ctxops.nn.bands import average_pyramids, reach
from ctxops.nn.folding import Folding, on_anchors
from ctxops.nn.plain import is_plain
from ctxops.nn.pointwise import (
    PointwiseConv2d,
    accumulate,
    convolve_concatenation,
    pointwise,
    split_weight,
)
from ctxops.ops.asymmetric_attention import asymmetric_attention
from ctxops.ops.nonlocal_attention import nonlocal_attention
from ctxops.ops.pyramid_pool import check_output_sizes, pyramid_pool
from ctxops.ops.sample_anchors import random_anchor_indices, sample_anchors

Share = Literal["query_key", "key_value", None]
Fuse = Literal[None, "add", "concat"]
Variant = Literal["released", "paper"]
Sampling = Literal["avg", "max", "random"]

# What else a shared embedding, which is registered as the key, stands for.
_TWIN: dict[object, str] = {"query_key": "query", "key_value": "value"}


def _may_be_equal(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    try:
        return torch.equal(a, b)
    except (RuntimeError, NotImplementedError):  # meta and fake tensors have no values
        return a.shape == b.shape


class NonLocalBlock(nn.Module):
    """Embeddings of a query map and a context map, a sampler, attention, W_o, and the fusion.

    The arguments are those of :class:`APNB`; ``sampling=None`` attends to all positions.
    """

    def __init__(
        self,
        query_channels: int,
        context_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int | None,
        *,
        share: Share,
        fuse: Fuse,
        fuse_activation: bool,
        bias: bool,
        variant: Variant,
        scale: float | None,
        out_norm: bool,
        norm_layer: Callable[[int], nn.Module],
        sampling: Sampling | None = None,
        output_sizes: Sequence[int] = (),
        fold: bool = False,
    ) -> None:
        super().__init__()
        out_channels = query_channels if out_channels is None else out_channels
        check_sizes(
            query_channels=query_channels,
            context_channels=context_channels,
            key_channels=key_channels,
            value_channels=value_channels,
            out_channels=out_channels,
        )
        check_choice("share", share, Share)
        check_choice("fuse", fuse, Fuse)
        check_choice("variant", variant, Variant)
        if sampling is not None:
            check_choice("sampling", sampling, Sampling)
            output_sizes = check_output_sizes(output_sizes)
        if share == "key_value" and key_channels != value_channels:
            raise ValueError(
                f"share='key_value' needs equal widths, got key_channels {key_channels} and "
                f"value_channels {value_channels}"
            )
        if fuse == "add" and out_channels != query_channels:
            raise ValueError(
                f"fuse='add' needs out_channels equal to the map's {query_channels}, "
                f"got {out_channels}"
            )
        self.share, self.fuse, self.variant = share, fuse, variant
        self.query_channels, self.context_channels = query_channels, context_channels
        self.key_channels, self.value_channels = key_channels, value_channels
        self.out_channels = out_channels
        self.sampling, self.output_sizes, self.fold = sampling, output_sizes, fold
        released_scale = key_channels**-0.5
        self.scale = (released_scale if variant == "released" else 1.0) if scale is None else scale

        def embedding(channels: int) -> nn.Module:
            convolution = PointwiseConv2d(channels, key_channels, bias=bias)
            if variant == "paper":
                return convolution
            return nn.Sequential(convolution, norm_layer(key_channels), nn.ReLU(inplace=True))

        self.key = embedding(context_channels)
        if share != "query_key":
            self.query = embedding(query_channels)  # type: ignore[misc]
        if share != "key_value":
            self.value = PointwiseConv2d(  # type: ignore[misc]
                context_channels, value_channels, bias=bias
            )
        self.out = PointwiseConv2d(value_channels, out_channels, bias=bias)
        nn.init.zeros_(self.out.weight)
        if bias:
            nn.init.zeros_(self.out.bias)
        if share is not None:
            self.register_load_state_dict_pre_hook(NonLocalBlock.merge_twins)
        self.out_norm = norm_layer(out_channels) if out_norm else None
        if fuse == "concat":
            layers = [
                PointwiseConv2d(out_channels + query_channels, out_channels, bias=bias),
                norm_layer(out_channels),
            ]
            self.fusion = nn.Sequential(*layers, *[nn.ReLU(inplace=True)] * fuse_activation)
        else:
            self.fusion = None

    def extra_repr(self) -> str:
        anchors = ""
        if self.sampling is not None:
            anchors = (
                f"output_sizes={self.output_sizes}, sampling={self.sampling!r}, fold={self.fold} "
                f"(on the anchors: {Folding.of(self)}), "
            )
        return (
            f"{anchors}variant={self.variant!r}, share={self.share!r}, fuse={self.fuse!r}, "
            f"scale={self.scale:.6g}, out projection starts at zero"
        )

    # A shared embedding is registered once, as the key, and answers to both names. nn.Module finds
    # and sets what is a module past properties, so that they do for other embeddings too.
    @property
    def query(self) -> nn.Module:
        return cast(nn.Module, self.__getattr__("key" if self.share == "query_key" else "query"))

    @property
    def value(self) -> nn.Module:
        return cast(nn.Module, self.__getattr__("key" if self.share == "key_value" else "value"))

    def __setattr__(self, name: str, value: Any) -> None:
        twin = _TWIN.get(self.__dict__.get("share"))
        super().__setattr__("key" if name == twin else name, value)

    def merge_twins(self, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        """Leaves one name to a shared embedding, which other code and old files save under two.

        Raises where a checkpoint with separate weights, whose names fit, meets shared ones.
        """
        if self.share is None:
            return
        one, twin = f"{prefix}key.", f"{prefix}{_TWIN[self.share]}."
        for name in [name for name in state_dict if name.startswith(twin)]:
            tensor = state_dict.pop(name)
            other = state_dict.setdefault(one + name.removeprefix(twin), tensor)
            if not _may_be_equal(tensor, other):
                raise ValueError(
                    f"the block has share={self.share!r}, but {name} of the state dict differs "
                    f"from its twin of {one[:-1]}: it was saved with share=None"
                )

    def _sample(self, context: Tensor, *maps: Tensor | None) -> list[Any]:
        """The anchors of maps of the context's size: the same positions of all."""
        if self.sampling is None:
            return list(maps)
        present = [x for x in maps if x is not None]
        if self.sampling == "avg":
            sampled = average_pyramids(present, self.output_sizes)
        elif self.sampling == "max":
            sampled = [pyramid_pool(x, self.output_sizes, mode="max") for x in present]
        else:
            height, width = context.shape[2:]
            indices = random_anchor_indices(height, width, self.output_sizes, device=context.device)
            sampled = [sample_anchors(x, indices) for x in present]
        anchors = iter(sampled)
        return [None if x is None else next(anchors) for x in maps]

    def _reach(self) -> float:
        """Of blocks whose anchors are averages."""
        return reach(*self.children()) if self.sampling == "avg" else math.inf

    def _attend(self, x: Tensor, context: Tensor) -> Tensor:
        """The block on the query's map ``x`` and the context, of which key and value are made."""
        folding = Folding.of(self, x)
        key_map = None if folding.key else folding.embed(self.key, context)
        anchors, key, value = self._sample(
            context,
            context if folding.key or folding.value else None,
            key_map,
            None if folding.value or self.share == "key_value" else self.value(context),
        )
        if folding.key:
            key = on_anchors(self.key, anchors)
        if folding.value:
            value = on_anchors(self.value, anchors)
        elif self.share == "key_value":
            value = key

        bias = None
        if folding.query:
            # <W_q x + b_q, k> = <x, W_q^T k> + <b_q, k>
            query, embedding = x, cast(PointwiseConv2d, self.query)
            if embedding.bias is not None:
                bias = self.scale * torch.einsum("c,bcs->bs", embedding.bias, key)
            key = torch.einsum("ci,bcs->bis", embedding.weight.flatten(1), key)
        elif self.share == "query_key" and key_map is not None:
            query = key_map
        else:
            query = folding.embed(self.query, x)

        if self.sampling is None:
            attended = nonlocal_attention(query, key, value, scale=self.scale)
        else:
            value = folding.project(self, value, x)
            attended = asymmetric_attention(query, key, value, bias=bias, scale=self.scale)
        if not folding.out:
            attended = self.out(attended)
        return self._fuse(attended, x, projected=folding.fusion)

    def _fuse(self, context: Tensor, x: Tensor, *, projected: bool = False) -> Tensor:
        """The block's last step, on W_o's output and the query's map ``x``.

        ``projected``: the context's part of the fusion has been applied already.
        """
        if self.out_norm is not None:
            context = self.out_norm(context)
        if self.fuse is None:
            return context
        if self.fuse == "add":
            return context + x
        if not is_plain(self.fusion, nn.Sequential):
            return self.fusion(torch.cat([context, x], dim=1))
        first, *rest = self.fusion
        convolution = cast(PointwiseConv2d, first)
        if projected:
            _, weight = split_weight(convolution, (context, x))
            y = accumulate(pointwise(x, weight, convolution.bias), context)
        else:
            y = convolve_concatenation(convolution, context, x)
        for layer in rest:
            y = layer(y)
        return y


class NonLocal2d(NonLocalBlock):
    """Non-local block: every position attends to every other (ANN, eq. 1-5).

    ``O = softmax(scale * query^T key) value``, then ``W_o(O)``, then the fusion.

    Args:
        in_channels: channels of the map.
        key_channels: channels of query and key.
        value_channels: channels of the value.
        out_channels: channels of W_o; None: in_channels.
        share: "query_key" (released code): one embedding for both. "key_value" (the paper's text):
            the value is the key. None: three embeddings.
        fuse: None returns ``W_o(O)``; "add" adds the map; "concat" owns the 1x1 convolution and
            norm that follow ``cat(W_o(O), x)``.
        bias: biases in all 1x1 convolutions.
        variant: "released": query and key are conv + norm + ReLU, scale ``key_channels ** -0.5``.
            "paper": plain linear embeddings, scale 1.
        scale: overrides the variant's.
        out_norm: a norm after W_o (appendix C of the paper).
        norm_layer: makes a norm from a number of channels.

    W_o starts at zero, as in the released code: so does the block's ``W_o(O)``. A shared query and
    key embedding runs, and updates its running statistics, once per forward. The released code runs
    it twice: the same result in training, but its statistics move at momentum ``1 - (1 - m) ** 2``.

    Shape: ``(B, in_channels, H, W)`` -> ``(B, out_channels, H, W)``, in the same memory format.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int | None = None,
        *,
        share: Share = "query_key",
        fuse: Fuse = None,
        bias: bool = True,
        variant: Variant = "released",
        scale: float | None = None,
        out_norm: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__(
            in_channels,
            in_channels,
            key_channels,
            value_channels,
            out_channels,
            share=share,
            fuse=fuse,
            fuse_activation=False,
            bias=bias,
            variant=variant,
            scale=scale,
            out_norm=out_norm,
            norm_layer=norm_layer,
        )

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.query_channels, self.key))
        return self._attend(x, x)


class FusionNonLocal2d(NonLocalBlock):
    """Fusion non-local block: a high-level map attends to a low-level one (ANN, eq. 14-17).

    Args:
        low_channels: channels of the low-level map, of which key and value are made.
        high_channels: channels of the high-level map, of which the query is made.
        out_channels: channels of W_o; None: high_channels.

    All others as in :class:`NonLocal2d`; nothing is shared between query and key.

    Shape: low ``(B, low_channels, H2, W2)``, high ``(B, high_channels, H, W)``
        -> ``(B, out_channels, H, W)``.
    """

    def __init__(
        self,
        low_channels: int,
        high_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int | None = None,
        *,
        fuse: Fuse = None,
        bias: bool = True,
        variant: Variant = "released",
        scale: float | None = None,
        out_norm: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__(
            high_channels,
            low_channels,
            key_channels,
            value_channels,
            out_channels,
            share=None,
            fuse=fuse,
            fuse_activation=False,
            bias=bias,
            variant=variant,
            scale=scale,
            out_norm=out_norm,
            norm_layer=norm_layer,
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        check_maps(
            low=(low, self.context_channels, self.key),
            high=(high, self.query_channels, self.query),
        )
        return self._attend(high, low)


class APNB(NonLocalBlock):
    """Asymmetric pyramid non-local block: attention to S pooled anchors (ANN, eq. 8-11, Fig. 3).

    ``O = softmax(scale * query^T P(key)) P(value)`` with the pyramid sampling ``P``, then
    ``W_o(O)``, then the fusion.

    Args:
        in_channels: channels of the map.
        key_channels: channels of query and key.
        value_channels: channels of the value.
        out_channels: channels of W_o; None: in_channels.
        output_sizes: the grids of the pyramid; S is the sum of their squares.
        share: "query_key" (released code): one embedding for both, run once. "key_value" (the
            paper's text): the value is the key. None: three embeddings.
        fuse: None returns ``W_o(O)``; "add" adds the map; "concat" owns the 1x1 convolution, norm
            and ReLU that follow ``cat(W_o(O), x)``, and splits its weight instead.
        bias: biases in all 1x1 convolutions.
        variant: "released": query and key are conv + norm + ReLU, scale ``key_channels ** -0.5``.
            "paper": plain linear embeddings, scale 1.
        sampling: "avg", "max" or "random" (Table 7), which draws anew in every forward.
        fold: exact algebra that moves linear steps to the anchors, wherever it saves operations:
            the value and W_o, the fusion, in the paper's form also query and key; in evaluation
            the embeddings' batch norm moves into their convolution. Not with "max". A child that
            has hooks, an adapter, parametrisations or weights elsewhere is called on the map.
        scale: overrides the variant's.
        out_norm: a norm after W_o (appendix C of the paper).
        norm_layer: makes a norm from a number of channels.

    W_o starts at zero, as in the released code. The dropout that follows the fusion there is left
    to the network. A shared query and key embedding runs, and updates its running statistics, once
    per forward. The released code runs it twice: the same result in training, but its statistics
    move at momentum ``1 - (1 - m) ** 2``.

    Shape: ``(B, in_channels, H, W)`` -> ``(B, out_channels, H, W)``, in the same memory format.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int | None = None,
        output_sizes: Sequence[int] = (1, 3, 6, 8),
        *,
        share: Share = "query_key",
        fuse: Fuse = None,
        bias: bool = True,
        variant: Variant = "released",
        sampling: Sampling = "avg",
        fold: bool = True,
        scale: float | None = None,
        out_norm: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__(
            in_channels,
            in_channels,
            key_channels,
            value_channels,
            out_channels,
            output_sizes=output_sizes,
            sampling=sampling,
            fold=fold,
            share=share,
            fuse=fuse,
            fuse_activation=True,
            bias=bias,
            variant=variant,
            scale=scale,
            out_norm=out_norm,
            norm_layer=norm_layer,
        )

    def reach(self) -> float:
        return self._reach()

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.query_channels, self.key))
        return self._attend(x, x)


class AFNB(NonLocalBlock):
    """Asymmetric fusion non-local block: a high-level map attends to anchors of a low-level one.

    ANN, section 3.3: :class:`FusionNonLocal2d` with the pyramid sampling of :class:`APNB` on key
    and value.

    Args:
        low_channels: channels of the low-level map, of which key and value are made.
        high_channels: channels of the high-level map, of which the query is made.
        out_channels: channels of W_o; None: high_channels.

    All others as in :class:`APNB`; query, key and value share nothing, and ``fuse="concat"`` ends
    with the norm, without a ReLU.

    Shape: low ``(B, low_channels, H2, W2)``, high ``(B, high_channels, H, W)``
        -> ``(B, out_channels, H, W)``.
    """

    def __init__(
        self,
        low_channels: int,
        high_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int | None = None,
        output_sizes: Sequence[int] = (1, 3, 6, 8),
        *,
        fuse: Fuse = None,
        bias: bool = True,
        variant: Variant = "released",
        sampling: Sampling = "avg",
        fold: bool = True,
        scale: float | None = None,
        out_norm: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__(
            high_channels,
            low_channels,
            key_channels,
            value_channels,
            out_channels,
            output_sizes=output_sizes,
            sampling=sampling,
            fold=fold,
            share=None,
            fuse=fuse,
            fuse_activation=False,
            bias=bias,
            variant=variant,
            scale=scale,
            out_norm=out_norm,
            norm_layer=norm_layer,
        )

    def reach(self) -> float:
        return self._reach()

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        check_maps(
            low=(low, self.context_channels, self.key),
            high=(high, self.query_channels, self.query),
        )
        return self._attend(high, low)
