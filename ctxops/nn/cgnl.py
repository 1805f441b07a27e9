# SPDX-License-Identifier: Apache-2.0
"""The compact generalized non-local block (Yue et al., NeurIPS 2018)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ctxops._checks import check_groups, check_maps, check_sizes
from ctxops.nn.bands import positions, reach, total
from ctxops.nn.pointwise import PointwiseConv2d


class CGNL(nn.Module):
    r"""Compact generalized non-local block with the dot product kernel, GALD's global aggregation.

    .. math::
        Y = X + \operatorname{norm}(W_z A), \qquad
        A_k = (\operatorname{vec} \theta_k) (\operatorname{vec} \phi_k)^T (\operatorname{vec} g_k)
            = \langle \phi_k, g_k \rangle \, \theta_k

    with :math:`\theta = W_\theta X`, :math:`\phi = W_\phi X`, :math:`g = W_g X`, each split into
    groups k of channels. Every entry of a group attends to every entry of the same group, channels
    included; of that affinity matrix one number per group is left to compute.

    Args:
        in_channels: channels of the map.
        channels: channels of the three embeddings.
        groups: of the embeddings, of W_z and of the default norm; divides both channel counts.
        use_scale: divides the number of a group by the square root of its count of entries.
        norm_layer: makes the norm that follows W_z from a number of channels; None: group norm in
            ``groups`` groups.

    Since W_z has the same groups, the group's number is applied after it. With the default norm it
    then cancels but for its sign and the norm's epsilon. It is summed in float32 (float64).

    Shape: ``(B, in_channels, H, W)`` -> the same, in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, groups that do not divide the channels, a map of another shape.

    Source: Yue et al., Compact Generalized Non-local Network, NeurIPS 2018, as in the released code
    of Li et al. (GALD, TIP 2021): no biases, ``use_scale=False``, all parameters as torch
    initialises them.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        groups: int = 8,
        *,
        use_scale: bool = False,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, channels=channels)
        check_groups("groups", groups, in_channels=in_channels, channels=channels)
        self.in_channels, self.channels = in_channels, channels
        self.groups, self.use_scale = groups, use_scale
        self.theta = PointwiseConv2d(in_channels, channels, bias=False)
        self.phi = PointwiseConv2d(in_channels, channels, bias=False)
        self.g = PointwiseConv2d(in_channels, channels, bias=False)
        self.z = nn.Conv2d(channels, in_channels, 1, groups=groups, bias=False)
        self.norm = (
            nn.GroupNorm(groups, in_channels) if norm_layer is None else norm_layer(in_channels)
        )

    def extra_repr(self) -> str:
        return f"groups={self.groups}, use_scale={self.use_scale}"

    def reach(self) -> float:
        of_norm = 0 if isinstance(self.norm, nn.GroupNorm) else reach(self.norm)
        return of_norm + reach(self.theta, self.phi, self.g)

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.in_channels, self))
        phi, g = (embed(x).unflatten(1, (self.groups, -1)) for embed in (self.phi, self.g))
        affinity = total(_affinity, phi, g)
        if self.use_scale:
            affinity = affinity * (phi.shape[2] * positions(phi)) ** -0.5
        projected = self.z(self.theta(x)).unflatten(1, (self.groups, -1))
        aggregated = (affinity[:, :, None, None, None] * projected).flatten(1, 2)
        # Under autocast it stays float32 for the norm; a module of half precision wants its own.
        dtype = torch.promote_types(x.dtype, self.z.weight.dtype)
        return x + self.norm(aggregated.to(dtype))


def _affinity(phi: Tensor, g: Tensor) -> Tensor:
    """The inner product of each group, ``(B, groups)``."""
    # A product of half precision, or its sum, may leave the range.
    return (phi.to(torch.promote_types(phi.dtype, torch.float32)) * g).sum((2, 3, 4))
