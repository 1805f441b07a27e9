# SPDX-License-Identifier: Apache-2.0
"""A network in training, for Lightning."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics.classification import MulticlassConfusionMatrix

from ctxops.models._timm import require_timm
from ctxops.models.convert import load_checkpoint
from ctxops.models.data.order import seed_of
from ctxops.models.data.spec import IGNORE
from ctxops.models.inference import Inference, segment, standardise
from ctxops.models.registry import create_model
from ctxops.models.training.losses import Loss
from ctxops.models.training.metrics import Scores, scores
from ctxops.models.training.optimization import Optimization

_PREFIX = "network."


class SegmentationTask(LightningModule):
    """A network with its loss, its optimization, and how it is evaluated.

    Its checkpoints are files for :func:`ctxops.models.load_model` as well.

    Args:
        classes: their names.
        palette: a colour for each.
        network: of ctxops.models.list_models().
        backbone: a timm model; null: the network's own.
        pretrained: starts from timm's weights of the backbone.
        init_from: a checkpoint of the same network whose weights to start from.
        options: further arguments of create_model, of the network and of its backbone.
        loss: what is minimised.
        optimization: how.
        channels_last: the memory format of the weights.
        freeze_norm: batch norms keep their statistics and parameters.
        seed: of dropout and all other chance in a step; that of the run.

    Attributes:
        inference: how images are validated.
        result: the scores of the last validation.
    """

    def __init__(
        self,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]],
        network: str = "ann",
        backbone: str | None = None,
        pretrained: bool = False,
        init_from: str | None = None,
        options: dict | None = None,
        loss: Loss = Loss(),  # noqa: B008
        optimization: Optimization = Optimization(),  # noqa: B008
        channels_last: bool = False,
        freeze_norm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classes, self.palette = list(classes), [list(colour) for colour in palette]
        self.model = network
        self.arguments = {"backbone": backbone, "num_classes": len(classes), **(options or {})}
        self.loss, self.optimization = loss, optimization
        self.inference = Inference()
        self.seed = seed
        self.network = create_model(network, pretrained=pretrained, **self.arguments)
        if init_from is not None:
            self.network.load_state_dict(load_checkpoint(init_from))
        if channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.freeze_norm = freeze_norm
        self._freeze()
        self.confusion = MulticlassConfusionMatrix(
            len(classes), ignore_index=IGNORE, validate_args=False
        )
        self.result: Scores | None = None
        self._previous: tuple[Tensor, int, list[int]] | None = None
        self._remembered: tuple[Tensor, Tensor] | None = None

    def _freeze(self) -> None:
        for module in self.network.modules():
            if self.freeze_norm and isinstance(module, _BatchNorm):
                module.eval().requires_grad_(False)  # Lightning keeps each module's mode

    def setup(self, stage: str) -> None:
        # Never without need: it is for GPUs alone, and costs time.
        if self.trainer.world_size > 1 and self.trainer.strategy.root_device.type == "cuda":
            self.network = require_timm().layers.convert_sync_batchnorm(self.network)
            self._freeze()

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
        torch.manual_seed(seed_of(self.seed, self._number(batch_idx), self.global_rank, 2))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        image, labels, indices = batch
        labels = labels.long()
        output = self.network(standardise(image, self.network))
        loss = self.loss(self.network, output, labels)
        self._remembered = (output.features, labels)
        self._check_previous()
        self._previous = loss.detach(), self._number(batch_idx), indices.tolist()
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_after_backward(self) -> None:
        bank = getattr(self.network, "bank", None)
        if bank is not None:
            bank(*self._remembered)

    def on_train_epoch_end(self) -> None:
        self._check_previous()

    def _number(self, batch_idx: int) -> int:
        """Of a batch, in the whole run."""
        return self.current_epoch * self.trainer.num_training_batches + batch_idx

    def _check_previous(self) -> None:
        """Stops where the loss was NaN: of the step before, for which nobody has to wait."""
        if self._previous is not None and not self._previous[0].isfinite():
            _, step, indices = self._previous
            names = ", ".join(self.trainer.datamodule.train.name(i) for i in indices)
            raise ValueError(f"the loss of step {step} is not finite; its images: {names}")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if not batch:  # its image was passed over
            return
        image, labels = batch
        predicted = segment(self.network, image, **dataclasses.asdict(self.inference))
        self.confusion.update(predicted.flatten(), labels.long().flatten())

    def on_validation_epoch_end(self) -> None:
        confusion = self.confusion.compute()
        self.confusion.reset()
        if confusion.any():  # not so where a trial run saw ignored pixels alone
            self.result = scores(confusion, self.classes)
            self.log("mIoU", self.result.mean_iou, prog_bar=True)
            self.log("accuracy", self.result.accuracy)
            self.log_dict({f"iou/{name}": iou for name, iou in self.result.iou.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name.removeprefix(_PREFIX): x for name, x in weights}
        checkpoint |= {"model": self.model, "arguments": self.arguments}
        checkpoint |= {"classes": self.classes, "palette": self.palette}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in ("model", "classes"):
            ours, theirs = getattr(self, name), checkpoint.get(name)
            if ours != theirs:
                raise ValueError(f"the checkpoint is of another {name}: {theirs}, not {ours}")
        weights = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {_PREFIX + name: x for name, x in weights}
