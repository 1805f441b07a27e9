# SPDX-License-Identifier: Apache-2.0
"""Looks into a network: ``ctxops look``. They need matplotlib: ``pip install "ctxops[look]"``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ctxops._checks import check_known
from ctxops.models.convert import load_model
from ctxops.models.data.files import read_image, read_numbers
from ctxops.models.data.spec import Spec, colours
from ctxops.models.pictures.attention import attention, has_weights
from ctxops.models.pictures.gates import gates, masks
from ctxops.models.pictures.inside import distributes, field, heads, memory
from ctxops.models.pictures.panels import Panel, Scatter, draw
from ctxops.models.pictures.predictions import classes_over_image, errors
from ctxops.models.pictures.subject import Subject
from ctxops.nn.feature_memory import FeatureMemory
from ctxops.nn.gated_fusion import GatedFullyFusion
from ctxops.nn.local_distribution import LDv1

__all__ = ["LOOKS", "Look", "Panel", "Scatter", "Subject", "available", "draw", "look"]


class Look(NamedTuple):
    """
    Attributes:
        panels: what the picture consists of, in rows.
        shows: in a few words.
        needs: a network has this look if one of its modules is such; None: every network has it.
    """

    panels: Callable[[Subject], Sequence[Sequence[Panel | Scatter]]]
    shows: str
    needs: Callable[[nn.Module], bool] | None = None


def _is(kind: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, kind)


LOOKS = {
    "overlay": Look(classes_over_image, "the image under the colours of its classes"),
    "errors": Look(errors, "the wrong pixels; needs --labels"),
    "field": Look(field, "the effective receptive field of a pixel"),
    "attention": Look(attention, "what a pixel attends to", has_weights),
    "gates": Look(gates, "the gates of GFF", _is(GatedFullyFusion)),
    "masks": Look(masks, "the masks of LDv1", _is(LDv1)),
    "heads": Look(heads, "GALD before GA, after it and after LD", distributes),
    "memory": Look(memory, "the memory of MCIBI in two dimensions", _is(FeatureMemory)),
}


def available(network: nn.Module) -> list[str]:
    """The looks that a network has."""
    modules = list(network.modules())
    return [kind for kind, x in LOOKS.items() if x.needs is None or any(map(x.needs, modules))]


def look(
    kind: str,
    checkpoint: str | Path,
    image: str | Path,
    out: str | Path,
    *,
    at: Sequence[int] | None = None,
    labels: str | Path | None = None,
    device: str | None = None,
) -> Path:
    """Writes a picture of what a network does with an image.

    Args:
        kind: of :data:`LOOKS`.
        checkpoint: of ``ctxops fit`` or ``ctxops convert``.
        image: a file.
        out: the file to write, PNG or what else its name ends with.
        at: row and column of the pixel that is asked about; None: the middle of the image.
        labels: a file with the class of every pixel, 255 where it is ignored.
        device: None: a GPU if there is one.

    Returns:
        ``out``.

    Raises:
        OSError: no such file.
        ValueError: an unknown look, or one that the network has not; files of another kind; labels
            of another size or with other numbers; a pixel outside of the image.
    """
    check_known("look", kind, LOOKS)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_model(checkpoint).to(device)
    there = available(network)
    if kind not in there:
        raise ValueError(
            f"{checkpoint} has no {kind} to look at: its network has {', '.join(there)}"
        )
    saved: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    classes = saved.get("classes") or [str(k) for k in range(network.num_classes)]
    pixels = read_image(image)
    subject = Subject(
        network,
        pixels,
        classes,
        saved.get("palette") or colours(network.num_classes),
        _pixel(at, pixels),
        None if labels is None else _read_labels(labels, pixels, classes),
    )
    draw(LOOKS[kind].panels(subject), out)
    return Path(out)


def _pixel(at: Sequence[int] | None, image: Tensor) -> tuple[int, int]:
    height, width = image.shape[1:]
    row, column = (height // 2, width // 2) if at is None else at
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"at must be a row below {height} and a column below {width}, got {(row, column)}"
        )
    return row, column


def _read_labels(path: str | Path, image: Tensor, classes: Sequence[str]) -> Tensor:
    numbers = read_numbers(path)
    if numbers.shape != image.shape[1:]:
        raise ValueError(
            f"{path} must have the size of the image, {tuple(image.shape[1:])}, got {numbers.shape}"
        )
    labels, unknown = Spec("labels", tuple(classes), {}).to_classes(numbers)
    if unknown:
        raise ValueError(f"{path} must have numbers below {len(classes)} or 255, got {unknown[:3]}")
    return torch.from_numpy(labels)
