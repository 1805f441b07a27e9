# SPDX-License-Identifier: Apache-2.0
"""Linear steps of a non-local block, taken on its few anchors instead of the map."""

import dataclasses
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ctxops.nn.plain import is_plain
from ctxops.nn.pointwise import is_readable, pointwise, split_weight

if TYPE_CHECKING:
    from ctxops.nn.non_local import NonLocalBlock


@dataclasses.dataclass(frozen=True)
class Folding:
    """Which linear steps of a block are taken on its anchors.

    Average and random sampling commute with a 1 x 1 convolution; a norm and a ReLU do not. A step
    is folded if that saves operations and its convolution's weights may be read.
    """

    key: bool = False  # the key's linear embedding
    query: bool = False  # <W_q x, k> = <x, W_q^T k>
    value: bool = False  # the value's
    out: bool = False  # W_o (V P) + b = (W_o V + b) P, for the weights P of a position sum to one
    fusion: bool = False  # so does what follows W_o: the context's part of the fusion's convolution
    norm: bool = False  # in evaluation, the batch norm of query and key, which is linear then

    @classmethod
    def of(cls, block: "NonLocalBlock", like: Tensor | None = None) -> "Folding":
        """``like``: a map, for the device and the dtype that the weights must have."""
        if not block.fold or block.sampling not in ("avg", "random"):
            return cls()
        count = sum(size * size for size in block.output_sizes)
        linear = block.variant == "paper"
        out = (
            is_cheaper(count, block.value_channels, block.out_channels)
            and is_readable(block.out, like)
        )  # fmt: skip
        return cls(
            key=linear and is_readable(block.key, like),
            query=linear
            and is_cheaper(count, block.key_channels, block.query_channels)
            and is_readable(block.query, like),
            value=block.share != "key_value" and is_readable(block.value, like),
            out=out,
            fusion=out
            and block.fuse == "concat"
            and block.out_norm is None
            and is_plain(block.fusion, nn.Sequential)
            and is_readable(block.fusion[0], like),
            norm=not linear,
        )

    def __str__(self) -> str:
        steps = [field.name for field in dataclasses.fields(self) if getattr(self, field.name)]
        return ", ".join(steps) or "nothing"

    def embed(self, embedding: nn.Module, x: Tensor) -> Tensor:
        """``embedding(x)``; in evaluation its batch norm goes into the convolution."""
        steps = _plain_steps(embedding, x) if self.norm else None
        if steps is None:
            return embedding(x)
        convolution, norm, activation = steps
        gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = 0 if convolution.bias is None else convolution.bias
        weight = convolution.weight * gain[:, None, None, None]
        return activation(pointwise(x, weight, norm.bias + (bias - norm.running_mean) * gain))

    def project(self, block: "NonLocalBlock", value: Tensor, x: Tensor) -> Tensor:
        """What follows the attention, on the anchors' values ``(B, C_v, S)`` as far as it folds."""
        if self.out:
            value = on_anchors(block.out, value)
        if self.fusion:
            convolution = cast(nn.Conv2d, block.fusion[0])
            weight, _ = split_weight(convolution, (value, x))
            value = pointwise(value.unsqueeze(3), weight).squeeze(3)
        return value


def on_anchors(convolution: nn.Module, anchors: Tensor) -> Tensor:
    """A 1 x 1 convolution on anchors (B, C, S), which it sees as the map (B, C, S, 1)."""
    convolution = cast(nn.Conv2d, convolution)
    y = pointwise(anchors.unsqueeze(3), convolution.weight, convolution.bias)
    return y.squeeze(3)


def _plain_steps(embedding: nn.Module, x: Tensor) -> tuple[nn.Conv2d, _BatchNorm, nn.Module] | None:
    """Its plain convolution, plain batch norm in evaluation, and activation, if it is made so."""
    if not (is_plain(embedding, nn.Sequential) and len(embedding) == 3):
        return None
    convolution, norm, activation = embedding
    if (
        is_plain(norm, nn.BatchNorm2d, nn.SyncBatchNorm, like=x)
        and norm.affine
        and norm.running_var is not None
        and not norm.training
        and is_readable(convolution, x)
        and convolution.weight.dtype.itemsize >= 4  # half precision would round the weights twice
    ):
        return convolution, norm, activation
    return None


def is_cheaper(anchors: int, inner: int, outer: int) -> bool:
    """Does attention of width ``outer`` cost less than one of ``inner`` and a convolution?"""
    return anchors * outer <= anchors * inner + inner * outer
