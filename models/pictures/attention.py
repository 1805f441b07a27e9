# SPDX-License-Identifier: Apache-2.0
"""What a pixel attends to.

Attention is linear in its value: the weight that a position gives to another one is the derivative
of what it receives by the value there. So the operators themselves tell their weights, whatever
they attend to, and also over several rounds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctxops.models.pictures.panels import Panel
from ctxops.models.pictures.subject import Subject
from ctxops.nn.criss_cross import CrissCrossAttention
from ctxops.nn.local_distribution import LDv2
from ctxops.nn.non_local import NonLocalBlock
from ctxops.ops.asymmetric_attention import asymmetric_attention
from ctxops.ops.criss_cross_attention import criss_cross_attention
from ctxops.ops.neighborhood_attention import neighborhood_attention
from ctxops.ops.nonlocal_attention import nonlocal_attention
from ctxops.ops.pyramid_pool import pyramid_pool


def attention(subject: Subject) -> list[list[Panel]]:
    """The weights that one pixel gives, a row for each module with attention."""
    rows = []
    for name, module in subject.find(*_LOOKS).items():
        if not has_weights(module):
            continue
        look = next(look for kind, look in _LOOKS.items() if isinstance(module, kind))
        rows.append(
            [Panel("image", subject.image, points=[subject.at]), *look(name, module, subject)]
        )
    return rows


def has_weights(module: nn.Module) -> bool:
    """Can its attention be shown? Anchors at random positions are others in every forward."""
    return isinstance(module, tuple(_LOOKS)) and getattr(module, "sampling", None) != "random"


def weights_at(
    attend: Callable[[Tensor], Tensor], value: Tensor, position: tuple[int, int]
) -> Tensor:
    """The weights with which a position receives the value of each other one.

    Args:
        attend: attention as a function of the value, ``(1, C, ...)`` -> ``(1, C, h, w)``. Each head
            has one of the C channels.
        value: ``(1, C, ...)``, whose shape, dtype and device count.
        position: its row and column.

    Returns:
        ``(...)``, the mean over the heads.
    """
    value = torch.zeros_like(value, requires_grad=True)
    with torch.enable_grad():
        received = attend(value)[0, :, position[0], position[1]].sum()
        (weights,) = torch.autograd.grad(received, value)
    return weights[0].mean(0)


def criss_cross_weights(
    rounds: Sequence[tuple[Tensor, Tensor]], position: tuple[int, int]
) -> Tensor:
    """What a position has received from each other one after rounds of criss-cross attention.

    Args:
        rounds: query and key ``(1, C, h, w)`` of each round, in order.
        position: its row and column.

    Returns:
        ``(h, w)``, the product of the rounds' weights, which sums to one. The residuals, which add
        the map to what attention gives, are left out.

    Source: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, ICCV 2019, Figure
    4 and section 3.3.
    """

    def attend(value: Tensor) -> Tensor:
        for query, key in rounds:
            value = criss_cross_attention(query, key, value, scale=1.0)
        return value

    return weights_at(attend, rounds[0][0][:, :1], position)


def _criss_cross(name: str, module: CrissCrossAttention, subject: Subject) -> list[Panel]:
    queries, keys = ([result for _, result in calls] for calls in _embeddings(module, subject))
    rounds = list(zip(queries, keys, strict=True))
    position = subject.cell(queries[0].shape[2:])
    panels = []
    for count in range(1, len(rounds) + 1):
        weights = criss_cross_weights(rounds[:count], position)
        plural = "s" if count > 1 else ""
        panels.append(_panel(f"{name}, {count} recurrence{plural}", weights, subject))
    return panels


def anchor_weights(
    query: Tensor, anchors: Tensor, scale: float, position: tuple[int, int]
) -> Tensor:
    """The weights ``(S,)`` that a position gives to the anchors ``(1, C, S)``."""

    def attend(value: Tensor) -> Tensor:
        return asymmetric_attention(query, anchors, value, scale=scale)

    return weights_at(attend, anchors[:, :1], position)


def _non_local(name: str, module: NonLocalBlock, subject: Subject) -> list[Panel]:
    """A panel for each grid of anchors (ANN, Figure 3), or one of all positions."""
    queries, keys = _embeddings(module, subject)
    query, key = queries[0][1], keys[0][1]
    position = subject.cell(query.shape[2:])
    if module.sampling is None:

        def attend(value: Tensor) -> Tensor:
            return nonlocal_attention(query, key, value, scale=module.scale)

        return [_panel(name, weights_at(attend, key[:, :1], position), subject)]
    anchors = pyramid_pool(key, module.output_sizes, mode=module.sampling)
    weights = anchor_weights(query, anchors, module.scale, position)
    grids = weights.split([n * n for n in module.output_sizes])
    return [
        _panel(f"{name}, {n} x {n}", grid.view(n, n), subject)
        for grid, n in zip(grids, module.output_sizes, strict=True)
    ]


def _window(name: str, module: LDv2, subject: Subject) -> list[Panel]:
    """The window of LDv2 (GALD, Figure 9); what is no neighbour is transparent."""
    queries, keys = _embeddings(module, subject)
    query, key = queries[0][1], keys[0][1]

    def attend(value: Tensor) -> Tensor:
        return neighborhood_attention(
            query, key, value, module.kernel_size, module.dilation,
            scale=module.scale, border=module.border, num_heads=module.num_heads,
        )  # fmt: skip

    value = key[:, :1].expand(-1, module.num_heads, -1, -1)
    weights = weights_at(attend, value, subject.cell(query.shape[2:]))
    return [_panel(name, weights.where(weights > 0, torch.nan), subject)]


def _embeddings(module: Any, subject: Subject) -> list[list[tuple[tuple, Tensor]]]:
    """The calls of the module's query and key, which are called where a hook wants to see them."""
    if module.query is module.key:
        (calls,) = subject.run(module.key)
        return [calls, calls]
    return subject.run(module.query, module.key)


def _panel(title: str, weights: Tensor, subject: Subject) -> Panel:
    title += f": {weights.nansum():.0%} of the weight"
    return Panel(title, subject.image, weights.cpu(), points=[subject.at])


_LOOKS: dict[type[nn.Module], Callable[..., list[Panel]]] = {
    CrissCrossAttention: _criss_cross,
    NonLocalBlock: _non_local,
    LDv2: _window,
}
