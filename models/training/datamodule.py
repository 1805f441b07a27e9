# SPDX-License-Identifier: Apache-2.0
"""The data of a run, for Lightning."""

from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from ctxops.models.data import (
    Augmentation,
    Augmented,
    StreamSampler,
    class_names,
    mirrored_classes,
    open_split,
)


class SegmentationData(LightningDataModule):
    """Training samples as one endless stream, of which an epoch takes a fixed number of steps.

    Args:
        name: of a data set such as cityscapes; folder: your own; scenes: synthetic, without files.
        root: the folder of its files.
        train_split: trained on; several joined by "+".
        val_split: validated on.
        test_split: tested on.
        options: of scenes: length, size, zones.
        batch_size: images of a step, of all processes together.
        steps_per_epoch: steps between two validations.
        scale: both sides of an image are multiplied by a number drawn between these two.
        crop: height and width of a random crop.
        most_of_one_class: a crop of which one class has a larger share is drawn again.
        flip: probability of a mirror image. In it, classes called "left ..." and "right ..." change
            places.
        brightness: the factor is drawn between 1 - x and 1 + x.
        contrast: likewise.
        saturation: likewise.
        hue: the shift is drawn between -x and x.
        workers: processes that load, of each training process.
        skip_bad: an image or labels that cannot be read, or do not fit, are reported and passed
            over. In training the data set's next pair takes their place. False: they are an error.
        seed: of order and augmentation; that of the run.

    Attributes:
        classes: their names.
        palette: a colour for each.
    """

    def __init__(
        self,
        name: str = "scenes",
        root: str | None = None,
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        options: dict | None = None,
        batch_size: int = 4,
        steps_per_epoch: int = 100,
        scale: tuple[float, float] = (1.0, 1.0),
        crop: tuple[int, int] | None = None,
        most_of_one_class: float = 1.0,
        flip: float = 0.5,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        workers: int = 0,
        skip_bad: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.classes, self.palette = class_names(name, root)
        self.name, self.root, self.options = name, root, options or {}
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.workers, self.skip_bad, self.seed = workers, skip_bad, seed
        self.augmentation = Augmentation(
            scale,
            crop,
            most_of_one_class,
            flip,
            brightness,
            contrast,
            saturation,
            hue,
            mirrored_classes(self.classes),
        )
        self.train: Any = None
        self.val: Any = None
        self._epoch = 0  # in which the run begins

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.trainer.current_epoch + 1}  # checkpoints are at the ends of epochs

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._epoch = state_dict["epoch"]

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.train is None:
            self.train = self._open(self.train_split)
        if self.val is None:
            self.val = self._open(self.test_split if stage == "test" else self.val_split)

    def _open(self, split: str) -> Dataset:
        return open_split(self.name, split, self.root, skip_bad=self.skip_bad, **self.options)

    def teardown(self, stage: str) -> None:
        for split, pairs in ((self.train_split, self.train), (self.val_split, self.val)):
            skipped = getattr(pairs, "skipped", 0)
            if skipped:
                print(f"{skipped} of the {len(pairs)} pairs of {split} were passed over")

    def train_dataloader(self) -> DataLoader:
        sampler = StreamSampler(
            len(self.train),
            self.batch_size,
            self.steps_per_epoch,
            seed=self.seed,
            rank=self.trainer.global_rank,
            processes=self.trainer.world_size,
        )
        # Of a resumed run, Lightning says so only after the workers have begun to load.
        sampler.set_epoch(self._epoch)
        return DataLoader(
            Augmented(self.train, self.augmentation, self.seed),
            sampler.share,
            sampler=sampler,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def val_dataloader(self) -> DataLoader:
        """Each image once, in one of the processes: one at a time, as their sizes may differ."""
        mine = range(self.trainer.global_rank, len(self.val), self.trainer.world_size)
        return _Readable(
            Subset(self.val, mine), 1, num_workers=self.workers, collate_fn=_collate_readable
        )

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()


class _Readable(DataLoader):
    """Without the batches of which nothing is left."""

    def __iter__(self) -> Any:
        return filter(None, super().__iter__())


def _collate_readable(samples: list) -> Any:
    readable = [sample for sample in samples if sample is not None]
    return default_collate(readable) if readable else []
