# SPDX-License-Identifier: Apache-2.0
"""The disentangled non-local block (Yin et al., ECCV 2020)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ctxops._checks import check_maps, check_sizes
from ctxops.nn.cbr import cbr
from ctxops.nn.pointwise import PointwiseConv2d
from ctxops.ops.nonlocal_attention import nonlocal_attention


class DisentangledNonLocal(nn.Module):
    r"""Disentangled non-local block: a whitened pairwise and a unary attention, added to the map.

    .. math::
        Y = X + \operatorname{norm}\Big(W_o \sum_j \big(
            \operatorname{softmax}_j(s \langle q_i - \bar q,\, k_j - \bar k \rangle / \tau)
            + \operatorname{softmax}_j(m_j) \big)\, v_j\Big)

    with :math:`q, k, v = W_q X, W_k X, W_v X`, the mask :math:`m = W_m X` of one channel, and means
    over the positions of an image. The pairwise part is :func:`ctxops.nonlocal_attention`: never
    N x N.

    Args:
        in_channels: channels of the map.
        key_channels: channels of q, k and v; None: ``in_channels // 2``.
        temperature: :math:`\tau`. 0.05: the released networks.
        use_scale: s is ``key_channels ** -0.5``, as in the released networks; False: 1.
        norm_layer: makes the norm that follows W_o from a number of channels.

    The four projections have biases, W_o has none. The norm's gain starts at zero, as in the
    released code: the untrained block is the identity.

    Shape: ``(B, in_channels, h, w)`` -> the same, in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a temperature that is no number, a map that is no
            floating tensor.
        ValueError: sizes below 1, a temperature that is not positive, a map of another shape.

    Source: Yin et al., Disentangled Non-Local Neural Networks, ECCV 2020, its disentangled block.
    In ``ConcatContext`` between two 3 x 3 CBR of 512 channels it is Table 3's DNL of Jin et al.
    (ICCV 2021): 24,122,625 parameters.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int | None = None,
        *,
        temperature: float = 0.05,
        use_scale: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels)
        key_channels = max(1, in_channels // 2) if key_channels is None else key_channels
        check_sizes(key_channels=key_channels)
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError(f"temperature must be a number, got {temperature!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.in_channels, self.key_channels = in_channels, key_channels
        self.temperature, self.use_scale = temperature, use_scale
        self.query = PointwiseConv2d(in_channels, key_channels)
        self.key = PointwiseConv2d(in_channels, key_channels)
        self.value = PointwiseConv2d(in_channels, key_channels)
        self.mask = PointwiseConv2d(in_channels, 1)
        self.out = cbr(key_channels, in_channels, 1, norm_layer, activation=False)
        for parameter in self.out[1].parameters(recurse=False):
            nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, key_channels={self.key_channels}, "
            f"temperature={self.temperature}, use_scale={self.use_scale}, "
            "the norm's gain starts at zero"
        )

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.in_channels, self))
        scale = (self.key_channels**-0.5 if self.use_scale else 1.0) / self.temperature
        embeddings = self.query(x), self.key(x), self.value(x)
        return x + self.out(disentangled_attention(*embeddings, self.mask(x), scale))


def disentangled_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """The whitened pairwise and the unary attention, added: maps of one size, the mask's channel is
    one.
    """
    query = query - query.mean((2, 3), keepdim=True)
    key = key - key.mean((2, 3), keepdim=True)
    pairwise = nonlocal_attention(query, key, value, scale=scale)
    weights = mask.flatten(2).softmax(dim=2)
    unary = torch.bmm(value.flatten(2), weights.mT).unsqueeze(3)
    return pairwise + unary
