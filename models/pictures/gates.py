# SPDX-License-Identifier: Apache-2.0
"""What gates and masks let through."""

import torch

from ctxops.models.pictures.panels import Panel
from ctxops.models.pictures.predictions import in_red, truth, wrong_pixels
from ctxops.models.pictures.subject import Subject
from ctxops.nn.gated_fusion import GatedFullyFusion
from ctxops.nn.local_distribution import LDv1


@torch.no_grad()
def gates(subject: Subject) -> list[list[Panel]]:
    """The gate of each level, and what changes where it is closed (GFF, Figures 6 and 7).

    Below each gate are the pixels that change their class when the gate is set to 0, in red. With
    labels, as in Figure 7 b, only those that are right with the gate and wrong without it.
    """
    ((_, fusion),) = subject.find(GatedFullyFusion).items()
    ((((features,), _),),) = subject.run(fusion)
    opened = fusion.gates(features)
    predicted = subject.predict()
    above = [Panel("image", subject.image)]
    below = truth(subject) or [Panel("image", subject.image)]
    for level, gate in enumerate(opened):
        title = f"$G_{level + 1}$, {gate.shape[2]} x {gate.shape[3]}, mean {gate.mean():.2f}"
        above.append(Panel(title, subject.image, gate[0, 0].cpu(), (0, 1)))

        def close(_, arguments: tuple, options: dict, level: int = level) -> tuple[tuple, dict]:
            return arguments, options | {"closed": (level,)}

        with fusion.register_forward_pre_hook(close, with_kwargs=True):
            without = subject.predict()
        changed = without != predicted
        if subject.labels is not None:
            changed &= wrong_pixels(without, subject.labels)
            changed &= ~wrong_pixels(predicted, subject.labels)
        title = f"$G_{level + 1} = 0$: {changed.float().mean():.1%} of the pixels"
        below.append(Panel(title, in_red(subject.image, changed)))
    return [above, below]


@torch.no_grad()
def masks(subject: Subject) -> list[list[Panel]]:
    """The mean over the channels of each mask of LDv1 (GALD, Figure 7)."""
    modules = subject.find(LDv1)
    panels = [Panel("image", subject.image)]
    for (name, module), calls in zip(modules.items(), subject.run(*modules.values()), strict=True):
        ((x,), _) = calls[0]
        mask = module.mask(x)[0].mean(0).cpu()
        panels.append(Panel(f"mask of {name}", subject.image, mask))
    return [panels]
