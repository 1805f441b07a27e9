# SPDX-License-Identifier: Apache-2.0
"""Decoders of more than one network."""

from collections.abc import Callable

from torch import nn

from ctxops.nn.cbr import cbr
from ctxops.nn.concat_context import ConcatContext


def concat_block(
    block: nn.Module,
    in_channels: int,
    channels: int,
    norm_layer: Callable[[int], nn.Module],
    *,
    block_channels: int | None = None,
) -> ConcatContext:
    """A block on the reduced map, between two 3 x 3 CBR, and its result beside the map.

    ``block_channels``: those of the block's result; None: ``channels``.
    """
    context = nn.Sequential(
        cbr(in_channels, channels, 3, norm_layer),
        block,
        cbr(block_channels or channels, channels, 3, norm_layer),
    )
    return ConcatContext(context, in_channels, channels, channels, norm_layer=norm_layer)
