# SPDX-License-Identifier: Apache-2.0
"""Optimizer and learning rate."""

import dataclasses
import functools
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ctxops._checks import check_choice

Algorithm = Literal["sgd", "adamw"]


@dataclasses.dataclass(frozen=True)
class Optimization:
    """How the parameters move.

    Attributes:
        optimizer: SGD with momentum, or AdamW.
        lr: learning rate of the first step.
        power: of the schedule, :func:`poly`.
        warmup: steps in which the learning rate rises to that.
        momentum: of SGD.
        weight_decay: of all parameters.
        decay_norms: of norms and biases too.
        ema: decay of a moving average of the parameters, which is validated and saved; 0: none.
    """

    optimizer: Algorithm = "sgd"
    lr: float = 0.01
    power: float = 0.9
    warmup: int = 0
    momentum: float = 0.9
    weight_decay: float = 0.0005
    decay_norms: bool = True
    ema: float = 0.0

    def __post_init__(self) -> None:
        check_choice("optimizer", self.optimizer, Algorithm)
        for name in ("lr", "power", "warmup", "momentum", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1, got {self.ema}")

    def of(self, network: nn.Module, steps: int) -> tuple[Optimizer, LambdaLR]:
        """Optimizer and schedule of a run of so many steps."""
        trained: list[Any] = [p for p in network.parameters() if p.requires_grad]
        if not self.decay_norms:  # which have one dimension, as biases have
            flat = [p for p in trained if p.dim() <= 1]
            trained = [
                {"params": [p for p in trained if p.dim() > 1]},
                {"params": flat, "weight_decay": 0.0},
            ]
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        optimizer: Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(trained, momentum=self.momentum, **options)
        else:
            optimizer = torch.optim.AdamW(trained, **options)
        schedule = functools.partial(poly, steps=steps, power=self.power, warmup=self.warmup)
        return optimizer, LambdaLR(optimizer, schedule)


def poly(step: int, steps: int, power: float = 0.9, warmup: int = 0) -> float:
    """The factor of the learning rate: ``(1 - step / steps) ** power``; 0 from ``steps`` on.

    In the first ``warmup`` steps it is multiplied by ``(step + 1) / warmup`` besides.
    """
    factor = max(0.0, 1 - step / steps) ** power
    return factor * min(1.0, (step + 1) / warmup) if warmup else factor


def freeze_norms(network: nn.Module) -> None:
    """Batch norms keep their statistics and parameters from now on."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.eval().requires_grad_(False)
