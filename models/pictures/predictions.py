# SPDX-License-Identifier: Apache-2.0
"""What a network makes of an image."""

import torch
from torch import Tensor

from ctxops.models.data.spec import IGNORE
from ctxops.models.pictures.panels import Panel
from ctxops.models.pictures.subject import Subject
from ctxops.models.predict import overlay

_RED = torch.tensor([220, 30, 30], dtype=torch.uint8)[:, None, None]
_FADED = 3  # so many times lighter


def classes_over_image(subject: Subject) -> list[list[Panel]]:
    """The image, and under the colours of its classes."""
    predicted = overlay(subject.image, subject.predict(), subject.palette)
    return [[Panel("image", subject.image), Panel("prediction", predicted), *truth(subject)]]


def errors(subject: Subject) -> list[list[Panel]]:
    """The wrong pixels in red (GALD, Figure 10); ignored ones are never wrong."""
    if subject.labels is None:
        raise ValueError("labels are needed to tell which pixels are wrong, got none")
    predicted = subject.predict()
    wrong = wrong_pixels(predicted, subject.labels)
    share = wrong.sum() / (subject.labels != IGNORE).sum().clamp_min(1)
    title = f"wrong: {share:.1%} of the labelled pixels"
    shown = overlay(subject.image, predicted, subject.palette)
    return [
        [
            Panel("prediction", shown),
            *truth(subject),
            Panel(title, in_red(subject.image, wrong)),
        ]
    ]


def truth(subject: Subject) -> list[Panel]:
    """A panel of the labels, where they are known."""
    if subject.labels is None:
        return []
    return [Panel("labels", overlay(subject.image, subject.labels, subject.palette))]


def wrong_pixels(predicted: Tensor, labels: Tensor) -> Tensor:
    """``(H, W)``, bool."""
    return (predicted != labels) & (labels != IGNORE)


def in_red(image: Tensor, where: Tensor) -> Tensor:
    """The image ``(3, H, W)`` in light grey, and some of its pixels in red."""
    grey = image.float().mean(0, keepdim=True)
    faded = (255 - (255 - grey) / _FADED).to(torch.uint8).expand_as(image)
    return torch.where(where, _RED, faded)
