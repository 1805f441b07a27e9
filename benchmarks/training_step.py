# SPDX-License-Identifier: Apache-2.0
"""A step of training by part, and whether the network waits for its images.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --data cityscapes --root FOLDER --network ann \\
        --backbone resnet101s --size 769x769 --batch-size 8

"wait" is the time until the loader hands over the next batch; the last line has the time that the
loader needs for a batch while nothing else runs.
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ctxops.models import create_model
from ctxops.models.data import Augmentation, Augmented, StreamSampler, class_names, open_split
from ctxops.models.inference import standardise
from ctxops.models.training.losses import Loss
from ctxops.models.training.optimization import Optimization
from harness import parse_size, percentile
from harness.machine import NOTEWORTHY_CORES, Interference, describe_machine, machine_line
from harness.meters import make_clock

WARM_UP = 2
SCALE, BRIGHTNESS = (0.5, 2.0), 0.1  # of ANN, section 4.2


class Training:
    """A network and its data; ``step()`` gives the seconds of each part."""

    def __init__(self, arguments: argparse.Namespace, steps: int) -> None:
        classes, _ = class_names(arguments.data, arguments.root)
        samples = open_split(arguments.data, "train", arguments.root)
        augmentation = Augmentation(SCALE, arguments.size, flip=0.5, brightness=BRIGHTNESS)
        self.loader = DataLoader(
            Augmented(samples, augmentation),
            arguments.batch_size,
            sampler=StreamSampler(len(samples), arguments.batch_size, steps),
            num_workers=arguments.workers,
        )
        self.device = torch.device(arguments.device)
        self.clock = make_clock(self.device)
        network = create_model(arguments.network, arguments.backbone, len(classes))
        self.network, self.loss = network.to(self.device).train(), Loss("ohem")
        self.optimizer, _ = Optimization().of(self.network, steps)
        self.batches: Iterator = iter(self.loader)
        self._batch: list[Tensor] = []

    def step(self) -> dict[str, float]:
        parts = {
            "wait": self._wait,
            "copy": self._copy,
            "forward": self._forward,
            "loss": self._loss,
            "backward": self._backward,
            "memory": self._memory,
            "optimizer": self._optimizer,
        }
        if not hasattr(self.network, "bank"):
            del parts["memory"]
        return {name: self.clock(part) for name, part in parts.items()}

    def _wait(self) -> None:
        self._batch = next(self.batches)

    def _copy(self) -> None:
        image, labels, _ = self._batch
        self._image = standardise(image, self.network)
        self._labels = labels.to(self.device).long()

    def _forward(self) -> None:
        self._output = self.network(self._image)

    def _loss(self) -> None:
        self._value = self.loss(self.network, self._output, self._labels)

    def _backward(self) -> None:
        self._value.backward()

    def _memory(self) -> None:
        self.network.bank(self._output.features, self._labels)

    def _optimizer(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def loading_seconds(loader: DataLoader, steps: int, clock) -> float:
    """For a batch, while nothing else runs; the workers have begun."""
    batches = iter(loader)
    for _ in range(WARM_UP):
        next(batches)
    return clock(lambda: [next(batches) for _ in range(steps)]) / steps


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--network", default="ann")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--data", default="scenes", help="a data set; default: synthetic scenes")
    parser.add_argument("--root", help="its folder")
    parser.add_argument("--size", type=parse_size, default=(96, 192), help="crop; default: 96x192")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> int:
    arguments = parser().parse_args()
    training = Training(arguments, WARM_UP + arguments.steps)
    print(machine_line(describe_machine(training.device)))
    interference = Interference()
    samples = [training.step() for _ in range(WARM_UP + arguments.steps)][WARM_UP:]
    foreign = interference.cores() or 0.0
    height, width = arguments.size
    print(
        f"{arguments.network}, {arguments.backbone}, {arguments.batch_size} crops of {height} x "
        f"{width} of {arguments.data}, {arguments.workers} workers; median of {len(samples)} steps"
    )
    medians = {name: 1e3 * percentile([s[name] for s in samples], 50) for name in samples[0]}
    for name, milliseconds in medians.items():
        print(f"{name:<10}{milliseconds:10.1f} ms")
    # Also the workers of the loader are other programs to it, while they run.
    if foreign > arguments.workers + NOTEWORTHY_CORES:
        print(f"DISTURBED: other programs kept {foreign:.2f} cores busy meanwhile.")
    whole = 1e3 * percentile([sum(s.values()) for s in samples], 50)
    print(f"{'step':<10}{whole:10.1f} ms")
    loading = 1e3 * loading_seconds(training.loader, arguments.steps, training.clock)
    computing = whole - medians["wait"]
    verdict = "is the bottleneck" if loading > computing else "is not the bottleneck"
    print(f"a batch is loaded in {loading:.1f} ms, computed in {computing:.1f}: loading {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
