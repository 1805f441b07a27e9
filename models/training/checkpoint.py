# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written so that no kill breaks them, read by networks, and started from."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from ctxops.models.base import SegmentationNetwork
from ctxops.models.convert import load_checkpoint, load_weights

_PREFIX = "network."


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and puts it in its place at once: whole, or as it was before."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


def from_task(checkpoint: dict[str, Any]) -> None:
    """Names a task's weights as its network does."""
    weights = checkpoint["state_dict"].items()
    checkpoint["state_dict"] = {name.removeprefix(_PREFIX): x for name, x in weights}


def to_task(checkpoint: dict[str, Any]) -> None:
    """Names a network's weights as a task does."""
    weights = checkpoint["state_dict"].items()
    checkpoint["state_dict"] = {_PREFIX + name: x for name, x in weights}


def initialise(
    network: SegmentationNetwork, path: str | Path, strict: bool, rename: Mapping[str, str]
) -> None:
    """Loads the weights of a checkpoint to start a run from, as :func:`load_weights` does.

    It prints what does not fit where that is allowed. A memory's momentum is annealed anew, as the
    learning rate is.

    Raises:
        OSError, ValueError: as :func:`load_checkpoint` and :func:`load_weights`.
    """
    try:
        left = load_weights(network, load_checkpoint(path), strict=strict, rename=rename)
    except ValueError as error:
        raise ValueError(f"init_from {path}: {error}") from error
    if left:
        rank_zero_only(print)(f"init_from {path}, not taken: {left}")
    bank = getattr(network, "bank", None)
    if bank is not None:
        bank.step.zero_()
