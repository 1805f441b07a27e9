# SPDX-License-Identifier: Apache-2.0
"""Randomness without state: which sample comes when is a function of the seed and the position."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from ctxops._checks import check_sizes


def generator(*key: int) -> torch.Generator:
    """Random numbers that are a function of these numbers of at least 0."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key: int) -> int:
    """A seed made of several numbers of at least 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


class StreamSampler(Sampler[tuple[int, int]]):
    """Epochs of a fixed number of steps, out of one endless stream of shuffled samples.

    The stream shuffles all samples anew after each round. Processes share it: together they see
    what one alone would see, step by step. A run that starts in a later epoch sees what an
    uninterrupted one does.

    Args:
        length: of the data set.
        batch_size: samples of a step, of all processes together.
        steps: of an epoch.
        seed: of the order.
        rank, processes: which part of each step is this process's.

    Yields:
        The index of the sample, and its position in the stream: the key of its augmentation.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        steps: int,
        *,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        check_sizes(length=length, batch_size=batch_size, steps=steps, processes=processes)
        if batch_size % processes:
            raise ValueError(
                f"batch_size is of all processes together: {processes} of them must divide it, "
                f"got {batch_size}"
            )
        self.length, self.batch_size, self.steps, self.seed = length, batch_size, steps, seed
        self.rank, self.share, self.epoch = rank, batch_size // processes, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.share

    def __iter__(self) -> Iterator[tuple[int, int]]:
        shuffled, order = -1, torch.empty(0)
        for step in range(self.epoch * self.steps, (self.epoch + 1) * self.steps):
            first = step * self.batch_size + self.rank * self.share
            for position in range(first, first + self.share):
                round_, place = divmod(position, self.length)
                if round_ != shuffled:
                    order = torch.randperm(self.length, generator=generator(self.seed, round_))
                    shuffled = round_
                yield int(order[place]), position
