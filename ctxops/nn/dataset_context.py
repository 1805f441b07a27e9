# SPDX-License-Identifier: Apache-2.0
"""Context from beyond the image, and the loss that goes with it (Jin et al., ICCV 2021)."""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ctxops import _autocast, _operator
from ctxops._checks import (
    check_choice,
    check_concatenated,
    check_kernel_size,
    check_maps,
    check_same_dtype,
    check_shape,
    check_sizes,
    taken_channels,
)
from ctxops._torch import forward_method
from ctxops.nn.cbr import cbr
from ctxops.nn.pointwise import PointwiseConv2d
from ctxops.ops.category_context import category_context
from ctxops.ops.nonlocal_attention import nonlocal_attention

ProjectionLayers = Literal[1, 2]
MemoryFusion = Literal["concat", "add", "weighted_add"]


class _CrossAttention(nn.Module):
    """Attention of a map to another one at half of its channels, every projection a CBR."""

    def __init__(
        self,
        channels: int,
        context_channels: int,
        projection_layers: ProjectionLayers,
        norm_layer: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        width = channels // 2
        self.scale = width**-0.5  # also of query and key that a tool prunes later

        def projection(in_channels: int) -> nn.Sequential:
            layers = cbr(in_channels, width, 1, norm_layer)
            for _ in range(projection_layers - 1):
                layers.extend(cbr(width, width, 1, norm_layer))
            return layers

        self.query, self.key = projection(channels), projection(context_channels)
        self.value = cbr(context_channels, width, 1, norm_layer)
        self.out = cbr(width, channels, 1, norm_layer)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(context), self.value(context)
        return self.out(nonlocal_attention(query, key, value, scale=self.scale))


class _Concatenation(nn.Module):
    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, *maps: Tensor) -> Tensor:
        return self.convolution(torch.cat(maps, dim=1))


class _Addition(nn.Module):
    def forward(self, *maps: Tensor) -> Tensor:
        return functools.reduce(operator.add, maps)


class _WeightedAddition(nn.Module):
    """The mean of the maps by weights that a 1 x 1 convolution of all of them predicts."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.weights = PointwiseConv2d(sum(widths), len(widths))

    def forward(self, *maps: Tensor) -> Tensor:
        # Autocast has softmax in float32.
        weights = self.weights(torch.cat(maps, dim=1)).softmax(dim=1).to(maps[0].dtype)
        parts = [weight * x for weight, x in zip(weights.split(1, dim=1), maps, strict=True)]
        return functools.reduce(operator.add, parts)


class DatasetContextAggregation(nn.Module):
    r"""Dataset-level context aggregation (DCA): what all images say of the classes seen here.

    .. math::
        R = \operatorname{CBR}(X), \qquad
        C' = \operatorname{softmax}_k(H_1(R))\, M, \qquad
        C = g_o\big(\operatorname{attention}(g_q(R),\, g_k(C'),\, g_v(C'))\big), \qquad
        Y = F(R, C)

    with the memory M of one row per class, the attention of :func:`ctxops.nonlocal_attention`, its
    scale ``(channels // 2) ** -0.5``, and every g a 1 x 1 convolution without bias, a norm and ReLU
    (CBR). The heads stay outside. H_1 runs on R, so that a forward has two steps, and the memory is
    fed with R::

        r = dca.reduce(x)                   # (B, channels, h, w)
        logits = h1(r)                      # (B, K, h, w), with a loss of its own
        y = dca(r, logits, bank.memory)     # with within_channels its map comes last
        scores = h2(y)                      # (B, K, h, w)
        bank(r.detach(), labels)            # in training; bank: a ctxops.nn.FeatureMemory

    Args:
        in_channels: channels of X.
        channels: channels of R, of the memory and of the result.
        within_channels: channels of the map of context within the image; 0: there is none.
        within_attention: how that map W joins. True: ``F(attention(R, W), F(R, C))``, the second
            attention like the first; the released code, and the paper's Table 3. False:
            ``F(R, C, W)``, as eq. 4 has it; the increase that the paper's text gives.
        projection_layers: CBR in each of g_q and g_k. 2: the released code, and the published
            counts. 1: eq. 13.
        kernel_size: of the convolutions in R and in F by "concat". None: the published counts, 3
            without a map of context within the image and 1 with one. The released code has 3.
        fusion: F of eq. 4, Table 1. "concat": CBR of the concatenation. "add": the sum.
            "weighted_add": the sum by weights that a 1 x 1 convolution predicts; that it sees the
            concatenation, and that a softmax makes its output one weight per map and position, is
            our reading.
        hard: takes the memory's row of the most likely class for C', which gives H_1 no gradient
            (an option of the released code).
        norm_layer: makes a norm from a number of channels.

    The memory may be updated between forward and backward, and may be float32 where the maps are
    half: C' is made of a copy.

    Shape: ``reduce``: ``(B, in_channels, h, w)`` -> ``(B, channels, h, w)``. ``forward``: that, the
        logits ``(B, K, h, w)``, the memory ``(K, channels)`` and, where there is one, the map
        ``(B, within_channels, h, w)`` -> ``(B, channels, h, w)``, in the memory format of R.

    Raises:
        TypeError: sizes that are no integers, maps that are no floating tensors or, outside
            autocast, differ in dtype, a map of context within the image where there is none, or
            none where there is one.
        ValueError: sizes below 1, fewer than 2 channels, an even kernel, an unknown ``fusion`` or
            ``projection_layers``, sums of maps with different channels, maps of another shape.

    Source: Jin et al., Mining Contextual Information Beyond Image for Semantic Segmentation, ICCV
    2021, section 3.3, eq. 4 and 11-14, Figure 2. ``DatasetContextAggregation(2048)`` is Table 3's
    DCA: 14,816,768 parameters. With ``within_channels=512`` it adds 3,418,112 to ASPP's, as the
    table has it; with ``within_attention=False`` besides 2,496,000, as the text has it.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        within_channels: int = 0,
        *,
        within_attention: bool = True,
        projection_layers: ProjectionLayers = 2,
        kernel_size: int | None = None,
        fusion: MemoryFusion = "concat",
        hard: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, channels=channels)
        if channels < 2:
            raise ValueError(f"channels must be at least 2, got {channels}")
        if within_channels != 0:
            check_sizes(within_channels=within_channels)
        check_choice("projection_layers", projection_layers, ProjectionLayers)
        check_choice("fusion", fusion, MemoryFusion)
        if kernel_size is None:
            kernel_size = 1 if within_channels else 3
        check_kernel_size(kernel_size)
        widths = [channels, channels]
        if within_channels and not within_attention:
            if fusion != "concat" and within_channels != channels:
                raise ValueError(
                    f"fusion={fusion!r} with within_attention=False needs within_channels equal to "
                    f"channels, {channels}, got {within_channels}"
                )
            widths.append(within_channels)
        self.in_channels, self.channels = in_channels, channels
        self.within_channels, self.within_attention = within_channels, within_attention
        self.projection_layers, self.kernel_size = projection_layers, kernel_size
        self.fusion, self.hard = fusion, hard

        def fuse(*widths: int) -> nn.Module:
            if fusion == "add":
                return _Addition()
            if fusion == "weighted_add":
                return _WeightedAddition(widths)
            return _Concatenation(cbr(sum(widths), channels, kernel_size, norm_layer))

        def attention(context_channels: int) -> _CrossAttention:
            return _CrossAttention(channels, context_channels, projection_layers, norm_layer)

        self.bottleneck = cbr(in_channels, channels, kernel_size, norm_layer)
        self.attention, self.fuse = attention(channels), fuse(*widths)
        self.attention_within = self.fuse_within = None
        if within_channels and within_attention:
            self.attention_within = attention(within_channels)
            self.fuse_within = fuse(channels, channels)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, channels={self.channels}, "
            f"within_channels={self.within_channels}, within_attention={self.within_attention}, "
            f"projection_layers={self.projection_layers}, kernel_size={self.kernel_size}, "
            f"fusion={self.fusion!r}, hard={self.hard}"
        )

    @forward_method
    def reduce(self, x: Tensor) -> Tensor:
        """R, of which H_1's logits and the memory are made."""
        check_maps(x=(x, self.in_channels, self.bottleneck))
        return self.bottleneck(x)

    def forward(
        self, r: Tensor, logits: Tensor, memory: Tensor, within: Tensor | None = None
    ) -> Tensor:
        self._check(r, logits, memory, within)
        # A copy: the memory's own update, which writes in place, may come before the backward.
        memory = memory.to(logits.dtype, copy=True)
        coarse = category_context(logits, memory, hard=self.hard)
        context = self.attention(r, coarse)
        if self.within_channels == 0:
            return self.fuse(r, context)
        if self.attention_within is None:
            width = r.shape[1]
            within_width = self.within_channels if self.fusion == "concat" else width
            maps = {"r": (r, width), "context": (context, width), "within": (within, within_width)}
            check_concatenated(self.fuse, **maps)
            return self.fuse(r, context, within)
        return self.fuse_within(self.attention_within(r, within), self.fuse(r, context))

    def _check(self, r: Tensor, logits: Tensor, memory: Tensor, within: Tensor | None) -> None:
        maps: dict[str, Any] = {
            "r": (r, self.channels, self.attention.query),
            "logits": (logits, None),
        }
        if self.attention_within is not None:
            maps["within"] = (within, self.within_channels, self.attention_within.key)
        elif self.within_channels:
            maps["within"] = (within, None)
        elif within is not None:
            raise TypeError(
                "within must be None with within_channels=0, got a map of context within the image"
            )
        check_maps(**maps)
        for name, (x, *_) in maps.items():
            if x.shape[2:] != r.shape[2:]:
                raise ValueError(
                    f"{name} must have the height and width of r, {tuple(r.shape[2:])}, "
                    f"got {tuple(x.shape[2:])}"
                )
        if not _autocast.is_active(r.device.type):
            check_same_dtype(**{name: x for name, (x, *_) in maps.items()})
        rows = (logits.shape[1], taken_channels(self.attention.key))
        check_shape("memory", memory, r, rows, "(K, channels)")


@contextlib.contextmanager
def _running_statistics_frozen(module: nn.Module) -> Iterator[None]:
    """Batch norms normalise as they do in their mode, but leave their running statistics alone."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    tracked = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm, value in zip(norms, tracked, strict=True):
            norm.track_running_stats = value


def representation_consistency_loss(
    head: nn.Module, memory: Tensor, initialized: Tensor, *, freeze_statistics: bool = False
) -> Tensor:
    r"""The loss of representation consistent learning: the head must know the memory's rows.

    .. math::
        L_M = \frac{1}{|I|} \sum_{k \in I} \operatorname{CE}\big(H_2(M_k),\, k\big)

    where I are the classes whose row holds something; no such class: 0. The rows enter the head as
    K maps of 1 x 1. In the paper's sum (eq. 19) the weight of this loss is :math:`\beta = 1`, and
    that of H_1's cross entropy :math:`\alpha = 0.4`::

        consistency = representation_consistency_loss(h2, bank.memory, bank.initialized)
        loss = cross_entropy_of_h2 + 0.4 * cross_entropy_of_h1 + consistency

    Args:
        head: H_2, from maps ``(B, C, h, w)`` to logits ``(B, K, h, w)``.
        memory: M, ``(K, C)``; cast to the dtype of the head's parameters.
        initialized: ``(K,)``, bool: I.
        freeze_statistics: leaves the running statistics of the head's batch norms to the pixels,
            which evaluation sees. False: they see the rows too, as in the released code.

    In training a batch norm normalises the rows by the mean and variance of all K, with either
    value of ``freeze_statistics``; so K must be at least 2. The rows of classes outside I count as
    zeros there. In evaluation it uses its running statistics as always.

    Returns:
        A scalar in float32, for float64 logits in float64.

    Raises:
        TypeError: a head that is no module, a memory that is no floating tensor, ``initialized``
            that is no bool tensor.
        ValueError: wrong shapes, devices that differ, a head that returns another shape.

    Source: Jin et al., ICCV 2021, section 3.4, eq. 15 and 17, whose mean is over all K classes. The
    released code starts with this loss in its second epoch, when all rows should hold something.

    Gradients: the head's parameters, not the memory.
    """
    if not isinstance(head, nn.Module):
        raise TypeError(f"head must be a torch.nn.Module, got {type(head).__name__}")
    check_shape("memory", memory, memory, (None, None), "(K, C)")
    classes = memory.shape[0]
    if not isinstance(initialized, Tensor) or initialized.dtype != torch.bool:
        got = initialized.dtype if isinstance(initialized, Tensor) else type(initialized).__name__
        raise TypeError(f"initialized must be a bool tensor, got {got}")
    if initialized.shape != (classes,) or initialized.device != memory.device:
        raise ValueError(
            f"initialized must have shape (K,) = ({classes},) on {memory.device}, "
            f"got {tuple(initialized.shape)} on {initialized.device}"
        )
    rows = torch.where(initialized[:, None], memory.detach(), 0)
    parameters = list(head.parameters())
    if parameters:
        rows = rows.to(parameters[0].dtype)
    with _running_statistics_frozen(head) if freeze_statistics else contextlib.nullcontext():
        logits = head(rows[:, :, None, None])
    if logits.shape != (classes, classes, 1, 1):
        raise ValueError(
            f"head must return (K, K, 1, 1) = {(classes, classes, 1, 1)} for the rows of the "
            f"memory, got {tuple(logits.shape)}"
        )
    logits = logits.flatten(1).to(_operator.accumulator(logits.dtype))
    targets = torch.arange(classes, device=logits.device)
    losses = F.cross_entropy(logits, targets, reduction="none")
    losses = torch.where(initialized, losses, 0)
    return losses.sum() / initialized.sum().clamp(min=1)
