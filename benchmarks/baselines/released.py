# SPDX-License-Identifier: Apache-2.0
"""The blocks of ANN (Zhu et al., ICCV 2019) in plain torch, as the authors' released code computes
them, and the non-local block as it is best written today.

Child modules carry the names that ``ctxops.nn`` uses, so that weights travel by
``ours.load_state_dict(released.state_dict())``.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["ReleasedAPNB", "ReleasedNonLocal2d", "SdpaNonLocal2d", "randomize"]


class ReleasedNonLocal2d(nn.Module):
    """The non-local block (NB): ``W_o(softmax(s Q K^T) V)`` with the N x N matrix in memory.

    Query and key share their convolution, batch norm and ReLU, which run twice all the same. The
    scale ``s = key_channels ** -0.5`` multiplies the finished product. Nothing is added to or
    concatenated with the result.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.scale = key_channels**-0.5
        self.query = nn.Sequential(
            nn.Conv2d(in_channels, key_channels, 1), nn.BatchNorm2d(key_channels), nn.ReLU()
        )
        self.key = self.query
        self.value = nn.Conv2d(in_channels, value_channels, 1)
        self.out = nn.Conv2d(value_channels, out_channels or in_channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def sample(self, x: Tensor) -> Tensor:
        """The positions that serve as keys and values, (B, C, N): all of them."""
        return x.flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self._attend(x).unflatten(2, x.shape[2:]))

    def at(self, x: Tensor, positions: Tensor) -> Tensor:
        """The output at some of the H * W positions, (B, C, n): the others' rows of the matrix are
        not needed."""
        return self.out(self._attend(x, positions).unsqueeze(3)).squeeze(3)

    def _attend(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        value = self.sample(self.value(x)).transpose(1, 2)
        query = self.query(x).flatten(2)
        query = (query if positions is None else query[..., positions]).transpose(1, 2)
        key = self.sample(self.key(x))
        similarity = query @ key
        similarity = self.scale * similarity
        similarity = similarity.softmax(dim=-1)
        return (similarity @ value).transpose(1, 2).contiguous()


class ReleasedAPNB(ReleasedNonLocal2d):
    """The asymmetric pyramid non-local block: NB with pooled keys and values.

    Adaptive average pooling to each n x n of ``output_sizes``, flattened and concatenated, leaves
    ``S = sum(n * n)`` of the N positions, 110 by default.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int | None = None,
        output_sizes: tuple[int, ...] = (1, 3, 6, 8),
    ) -> None:
        super().__init__(in_channels, key_channels, value_channels, out_channels)
        self.output_sizes = output_sizes

    def sample(self, x: Tensor) -> Tensor:
        return torch.cat([F.adaptive_avg_pool2d(x, n).flatten(2) for n in self.output_sizes], dim=2)


class SdpaNonLocal2d(ReleasedNonLocal2d):
    """NB on ``scaled_dot_product_attention``, laid out so that a fused backend takes it.

    The shared convolution runs once, and the channels of every operand lie side by side: a copy of
    the small maps where the format is contiguous, none where it is channels_last. With ``backend``
    torch has no choice among its own.
    """

    backend: SDPBackend | None = None

    def forward(self, x: Tensor) -> Tensor:
        query = self._rows(self.query(x))
        value = self._rows(self.value(x))
        with sdpa_kernel(self.backend) if self.backend else nullcontext():
            context = F.scaled_dot_product_attention(query, query, value, scale=self.scale)
        return self.out(context.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))

    @staticmethod
    def _rows(x: Tensor) -> Tensor:
        """(B, C, H, W) as (B, 1, N, C)."""
        return x.flatten(2).transpose(1, 2).contiguous().unsqueeze(1)


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter and running statistic a non-trivial value; returns the module.

    A freshly made block returns zeros (its output projection starts there) and normalises by
    (0, 1), so that any two blocks would agree. Convolutions keep the magnitude of their input.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, mean: float, spread: float) -> Tensor:
        return (mean + spread * torch.randn(like.shape, generator=generator)).to(like)

    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            child.weight.copy_(normal(child.weight, 0.0, child.weight[0].numel() ** -0.5))
            if child.bias is not None:
                child.bias.copy_(normal(child.bias, 0.0, 0.1))
        elif isinstance(child, nn.BatchNorm2d):
            child.weight.copy_(normal(child.weight, 1.0, 0.1))
            child.bias.copy_(normal(child.bias, 0.0, 0.1))
            child.running_mean.copy_(normal(child.running_mean, 0.0, 0.1))
            child.running_var.copy_(normal(child.running_var, 1.0, 0.1).abs())
        else:  # gains, such as those that start at zero
            for parameter in child.parameters(recurse=False):
                parameter.copy_(normal(parameter, 1.0, 0.1))
    return module
