# SPDX-License-Identifier: Apache-2.0
"""What the parts of a network contribute: of GALD's block, of a memory, of the image's pixels."""

from collections.abc import Callable
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from ctxops.models.mcibi import MemoryNetwork
from ctxops.models.pictures.panels import Panel, Scatter
from ctxops.models.pictures.predictions import truth
from ctxops.models.pictures.subject import Subject
from ctxops.models.predict import overlay
from ctxops.nn.local_distribution import GALD
from ctxops.ops.category_statistics import category_statistics


def distributes(module: nn.Module) -> TypeGuard[GALD]:
    """Is it a block in which local distribution follows global aggregation?"""
    return (
        isinstance(module, GALD)
        and module.arrangement == "gald"
        and module.global_aggregation is not None
        and module.local_distribution is not None
    )


def heads(subject: Subject) -> list[list[Panel]]:
    """What the classifier makes of the map before GA, after GA and after LD (GALD, Figure 8).

    In the place of the block's result the rest of the network gets the block's input, then what
    global aggregation makes of it. It was trained on the result alone, while each part of the
    paper's network has a head of its own.
    """
    (block,) = (module for module in subject.network.modules() if distributes(module))
    inside, whole = subject.run(block.local_distribution, block)
    stages = {"before GA": whole[0][0][0], "after GA": inside[0][0][0], "after LD": whole[0][1]}
    panels = [Panel("image", subject.image)]
    for title, result in stages.items():
        with block.register_forward_hook(lambda *_, result=result: result):
            predicted = subject.predict()
        panels.append(Panel(title, overlay(subject.image, predicted, subject.palette)))
    return [panels + truth(subject)]


def memory(subject: Subject) -> list[list[Panel | Scatter]]:
    """The memory's rows and the image's mean features of each class, in two dimensions.

    Squares are rows, dots are means over the pixels of a class: those of the labels, or without
    labels those of the prediction. MCIBI's Figure 3 has the means of many images by t-SNE; here
    both are projected to the two principal components of the rows.
    """
    network = cast(MemoryNetwork, subject.network)
    bank = network.bank
    held = bank.initialized.nonzero()[:, 0]
    if len(held) < 2:
        raise ValueError(f"the memory must hold at least 2 rows to be shown, got {len(held)}")
    ((_, features),) = subject.run(network.decoder.bottleneck)[0]
    labels = subject.predict() if subject.labels is None else subject.labels
    sums, weights, _ = category_statistics(
        features, labels[None].to(features.device), num_classes=len(subject.classes)
    )
    means = sums / weights[:, None]  # NaN where the image has not the class
    rows, dots, share = principal_plane(bank.memory[held], means[held])
    title = f"memory, 2 components with {share:.0%} of the variance"
    return [
        [
            Panel("image", subject.image),
            Panel("classes", overlay(subject.image, labels, subject.palette)),
            Scatter(
                title,
                rows.cpu(),
                [subject.classes[k] for k in held],
                [subject.palette[k] for k in held],
                dots.cpu(),
            ),
        ]
    ]


def principal_plane(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor, float]:
    """Rows ``(N, C)`` and others ``(M, C)`` in the plane in which the rows differ most.

    Returns:
        ``(N, 2)``, ``(M, 2)``, and the share of the rows' variance that the plane holds.
    """
    mean = rows.mean(0)
    _, sizes, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    plane = axes[:2].T
    share = sizes[:2].square().sum() / sizes.square().sum()
    return (rows - mean) @ plane, (others - mean) @ plane, share.item()


def field(subject: Subject) -> list[list[Panel]]:
    """The pixels that the score of one pixel depends on (GCN, Figure 3).

    The paper measures it by hiding parts of the image; this is the gradient.
    """
    gradient = receptive_field(lambda x: subject.network(x).logits, subject.input, subject.at)
    radius = half_radius(gradient, subject.at)
    title = f"gradient, half of it within {radius:.0f} px"
    # Few pixels hold most of it: the square root shows the others too.
    shown = (gradient / gradient.max()).sqrt().cpu()
    points = [subject.at]
    return [[Panel("image", subject.image, points=points), Panel(title, subject.image, shown)]]


def receptive_field(
    function: Callable[[Tensor], Tensor], image: Tensor, at: tuple[int, int]
) -> Tensor:
    """How much the largest score at a pixel depends on every pixel, to first order.

    Args:
        function: from the image to scores ``(1, K, H, W)``.
        image: ``(1, C, H, W)``.
        at: row and column.

    Returns:
        ``(H, W)``, the sum over the channels of the gradient's absolute values.

    Source: the effective receptive field of Luo et al., NeurIPS 2016, of one image.
    """
    image = image.detach().requires_grad_()
    with torch.enable_grad():
        score = function(image)[0, :, at[0], at[1]].max()
        (gradient,) = torch.autograd.grad(score, image)
    return gradient[0].abs().sum(0)


def half_radius(weights: Tensor, at: tuple[int, int]) -> float:
    """The radius around a pixel within which half of the weights ``(H, W)`` lie."""
    rows, columns = (torch.arange(n, device=weights.device) for n in weights.shape)
    distance = torch.hypot(rows[:, None] - at[0], (columns - at[1]).float()).flatten()
    order = distance.argsort()
    passed = weights.flatten()[order].double().cumsum(0)
    return distance[order][(passed >= passed[-1] / 2).nonzero()[0]].item()
