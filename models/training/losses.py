# SPDX-License-Identifier: Apache-2.0
"""What training minimises. Ignored pixels count neither in sums nor in means."""

import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxops._checks import check_choice
from ctxops.models.base import SegmentationNetwork, SegmentationOutput
from ctxops.models.data.spec import IGNORE
from ctxops.nn.dataset_context import representation_consistency_loss

Kind = Literal["cross_entropy", "ohem"]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the labelled pixels; 0 where none is.

    Shape: logits ``(B, K, H, W)``, labels ``(B, H, W)``, int64, in [0, K) or ``IGNORE``.
    """
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return losses / (labels != IGNORE).sum().clamp_min(1)


def ohem_cross_entropy(
    logits: Tensor, labels: Tensor, keep: float = 0.25, threshold: float = 0.0
) -> Tensor:
    """Online hard example mining: the mean of the largest losses alone.

    Args:
        logits, labels: as in :func:`cross_entropy`.
        keep: the least share of the labelled pixels that is kept, those of the largest losses.
        threshold: pixels whose own class has a lower probability are kept in any case.

    Source: Shrivastava et al., CVPR 2016, for pixels. It does not wait for the device.
    """
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    labelled = labels != IGNORE
    # A loss is never negative: what is ignored comes last.
    hardest = losses.masked_fill(~labelled, -1).flatten().sort(descending=True).values
    rank = torch.arange(len(hardest), device=hardest.device)
    kept = rank < (keep * labelled.sum()).ceil()
    if threshold > 0:
        kept |= hardest > -math.log(threshold)
    return hardest.where(kept, 0).sum() / kept.sum().clamp_min(1)


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of a network's output: of its logits, and of what supervises it inside.

    Attributes:
        kind: of the logits: :func:`cross_entropy` or :func:`ohem_cross_entropy`.
        keep, threshold: of "ohem".
        auxiliary: weight of the cross entropy of every auxiliary head (ANN eq. 18: lambda, 0.4).
        consistency: weight of a memory's :func:`ctxops.nn.representation_consistency_loss`, of
            networks that have one (MCIBI eq. 19: beta, 1).
    """

    kind: Kind = "cross_entropy"
    keep: float = 0.25
    threshold: float = 0.0
    auxiliary: float = 0.4
    consistency: float = 1.0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, Kind)
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must be at least 0 and below 1, got {self.threshold}")

    def __call__(
        self, network: SegmentationNetwork, output: SegmentationOutput, labels: Tensor
    ) -> Tensor:
        if self.kind == "ohem":
            loss = ohem_cross_entropy(output.logits, labels, self.keep, self.threshold)
        else:
            loss = cross_entropy(output.logits, labels)
        for logits in output.auxiliary.values():
            loss = loss + self.auxiliary * cross_entropy(logits, labels)
        bank = getattr(network, "bank", None)
        if bank is not None:
            rows = representation_consistency_loss(
                network.classifier, bank.memory, bank.initialized
            )
            loss = loss + self.consistency * rows
        return loss
