# SPDX-License-Identifier: Apache-2.0
"""A network in training, for Lightning."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ctxops.models._timm import require_timm
from ctxops.models.data.order import seed_of
from ctxops.models.inference import Inference, segment, standardise
from ctxops.models.registry import create_model
from ctxops.models.training.checkpoint import from_task, initialise, to_task
from ctxops.models.training.evaluation import Evaluation
from ctxops.models.training.losses import Loss
from ctxops.models.training.metrics import Metrics, Scores
from ctxops.models.training.optimization import Optimization, freeze_norms


class SegmentationTask(LightningModule):
    """A network with its loss, its optimization, and how it is evaluated.

    Its checkpoints are files for :func:`ctxops.models.load_model` as well.

    Args:
        classes: their names.
        palette: a colour for each.
        network: of ctxops.models.list_models().
        backbone: a timm model; null: the network's own.
        pretrained: starts from timm's weights of the backbone.
        init_from: a checkpoint whose weights to start from.
        init_strict: all of its weights must fit, and be all; false: takes those that do, and prints
            what it does not take.
        init_rename: modules that the checkpoint calls by another name, as "theirs: ours".
        options: further arguments of create_model, of the network and of its backbone.
        loss: what is minimised.
        optimization: how.
        channels_last: the memory format of the weights.
        freeze_norm: batch norms keep their statistics and parameters.
        compile: backend of torch.compile for the steps of training, such as inductor; null: none.
        seed: of dropout and all other chance in a step; that of the run.

    Attributes:
        result: the scores of the last evaluation; None where no pixel had a label.
    """

    def __init__(
        self,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]],
        network: str = "ann",
        backbone: str | None = None,
        pretrained: bool = False,
        init_from: str | None = None,
        init_strict: bool = True,
        init_rename: dict[str, str] | None = None,
        options: dict | None = None,
        loss: Loss = Loss(),  # noqa: B008
        optimization: Optimization = Optimization(),  # noqa: B008
        channels_last: bool = False,
        freeze_norm: bool = False,
        compile: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classes, self.palette = list(classes), [list(colour) for colour in palette]
        self.model, self.seed, self.frozen = network, seed, freeze_norm
        self.arguments = {"backbone": backbone, "num_classes": len(classes), **(options or {})}
        self.loss, self.optimization = loss, optimization
        self.network = create_model(network, pretrained=pretrained, **self.arguments)
        if init_from is not None:
            initialise(self.network, init_from, init_strict, init_rename or {})
        if channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if freeze_norm:
            freeze_norms(self.network)  # Lightning keeps each module's mode
        if compile is not None:
            self.network.compile(backend=compile)
        self.result: Scores | None = None
        self.evaluate_by(Inference(), Metrics())

    def evaluate_by(self, inference: Inference, metrics: Metrics) -> None:
        """Says how images are segmented, and what is scored of that."""
        self.inference, self.evaluation = inference, Evaluation(self.classes, metrics)

    def setup(self, stage: str) -> None:
        # Never without need: it is for GPUs alone, and costs time.
        several = self.trainer.world_size > 1 and self.trainer.strategy.root_device.type == "cuda"
        if several and not self.frozen:
            self.network = require_timm().layers.convert_sync_batchnorm(self.network)

    def configure_optimizers(self) -> dict[str, Any]:
        steps = int(self.trainer.estimated_stepping_batches)
        bank = getattr(self.network, "bank", None)
        if bank is not None:
            # Over which its momentum is annealed; it takes one with every batch.
            bank.total_steps = steps * self.trainer.accumulate_grad_batches
        optimizer, schedule = self.optimization.of(self.network, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        # Chance is a function of the step: a resumed run goes on as an uninterrupted one.
        step = self.current_epoch * self.trainer.num_training_batches + batch_idx
        torch.manual_seed(seed_of(self.seed, step, self.global_rank, 2))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        image, labels = batch[0], batch[1].long()
        output = self.network(standardise(image, self.network))
        loss = self.loss(self.network, output, labels)
        self._remembered = output.features, labels
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def on_after_backward(self) -> None:
        bank = getattr(self.network, "bank", None)
        if bank is not None:
            bank(*self._remembered)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        image, labels = batch
        predicted = segment(self.network, image, **dataclasses.asdict(self.inference))
        self.evaluation.update(predicted, labels)
        return predicted

    def on_validation_epoch_end(self) -> None:
        self.result = self.evaluation.compute()
        self.evaluation.reset()
        if self.result is not None:  # a trial run may see ignored pixels alone
            named = self.result.by_name()
            self.log("mIoU", named.pop("mIoU"), prog_bar=True)
            self.log_dict(named)

    test_step, on_test_epoch_end = validation_step, on_validation_epoch_end

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        from_task(checkpoint)
        checkpoint |= {"model": self.model, "arguments": self.arguments}
        checkpoint |= {"classes": self.classes, "palette": self.palette}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in ("model", "classes"):
            ours, theirs = getattr(self, name), checkpoint.get(name)
            if ours != theirs:
                raise ValueError(f"the checkpoint is of another {name}: {theirs}, not {ours}")
        to_task(checkpoint)
