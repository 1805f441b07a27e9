# SPDX-License-Identifier: Apache-2.0
"""What happens beside the steps of a run."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from ctxops.models.predict import overlay


class FiniteLoss(Callback):
    """Stops where the loss was not finite, and names the step and its images.

    It looks at the loss of the step before, for which nobody has to wait.
    """

    def __init__(self) -> None:
        self._previous: tuple[Tensor, int, Tensor] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._check(trainer)
        step = trainer.current_epoch * trainer.num_training_batches + batch_idx
        self._previous = outputs["loss"].detach(), step, batch[2]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        if self._previous is not None and not self._previous[0].isfinite():
            _, step, indices = self._previous
            names = ", ".join(trainer.datamodule.train.name(i) for i in indices.tolist())
            raise ValueError(f"the loss of step {step} is not finite; its images: {names}")


class Pictures(Callback):
    """Shows TensorBoard the first images of every validation: image, labels, prediction."""

    def __init__(self, images: int = 4) -> None:
        self.images = images

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.is_global_zero or batch_idx >= self.images or outputs is None:
            return
        image, labels, predicted = (x[0].cpu() for x in (*batch, outputs))
        covered = (overlay(image, x, pl_module.palette) for x in (labels, predicted))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                shown = torch.cat((image, *covered), dim=2)
                name = f"validation/{batch_idx}"
                logger.experiment.add_image(name, shown, trainer.global_step)
