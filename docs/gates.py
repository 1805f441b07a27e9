# SPDX-License-Identifier: Apache-2.0
"""The gates of a small network with GatedFullyFusion, drawn to docs/gates.png.

    python docs/gates.py

The scene that is shown is not trained on, nor are the scenes that are counted. One thread and fixed
seeds: the same figure every time on one machine.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from torch import Tensor, nn

from ctxops.nn import GatedFullyFusion

HEIGHT, WIDTH = 64, 96
COLORS = torch.tensor([[0.50, 0.50, 0.55], [0.57, 0.46, 0.46], [0.20, 0.55, 0.25]])
CLASSES = ("ground", "block", "pole")
PALETTE = ("#dddddd", "#c98f70", "#2f7d32")
NOISE = 0.3
LEVELS = 4
# The scene that is shown: (class, top, left, height, width), later ones on top.
SHOWN = [
    (1, 8, 6, 34, 30),
    (1, 32, 54, 26, 34),
    (2, 6, 46, 50, 2),
    (2, 4, 76, 48, 2),
    (2, 22, 18, 38, 2),
]


def draw_scene(shapes: list[tuple[int, ...]], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A noisy image (3, HEIGHT, WIDTH) and its classes (HEIGHT, WIDTH)."""
    labels = torch.zeros(HEIGHT, WIDTH, dtype=torch.long)
    for kind, top, left, tall, wide in shapes:
        labels[top : top + tall, left : left + wide] = kind
    noise = NOISE * torch.randn(HEIGHT, WIDTH, 3, generator=generator)
    return (COLORS[labels] + noise).clamp(0, 1).permute(2, 0, 1), labels


def random_shapes(generator: torch.Generator) -> list[tuple[int, ...]]:
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    blocks = [(1, draw(0, 44), draw(0, 70), draw(18, 40), draw(18, 40)) for _ in range(2)]
    poles = [(2, draw(0, 40), draw(0, WIDTH), draw(16, 56), 2) for _ in range(3)]
    return blocks + poles


def convolution(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


class Network(nn.Module):
    """Four levels of one convolution each; fused, refined, and classified together."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            convolution(width if level else 3, width, stride=2) for level in range(LEVELS)
        )
        self.fuse = GatedFullyFusion([width] * LEVELS, width)
        self.refine = nn.ModuleList(convolution(width, width) for _ in range(LEVELS))
        self.classify = nn.Conv2d(LEVELS * width, len(CLASSES), 1)

    def levels(self, image: Tensor) -> list[Tensor]:
        levels = []
        for stage in self.stages:
            image = stage(image)
            levels.append(image)
        return levels

    def forward(self, image: Tensor, closed: tuple[int, ...] = ()) -> Tensor:
        fused = self.fuse(self.levels(image), closed)
        maps = [refine(x) for refine, x in zip(self.refine, fused, strict=True)]
        y = self.classify(torch.cat([resize(x, maps[0].shape[2:]) for x in maps], dim=1))
        return resize(y, image.shape[2:])


def resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def train(network: Network, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        images, labels = draw_scenes(8, generator)
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


def draw_scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    scenes = [draw_scene(random_shapes(generator), generator) for _ in range(count)]
    images, labels = (torch.stack(maps) for maps in zip(*scenes, strict=True))
    return images, labels


def by_class(values: Tensor, labels: Tensor) -> list[float]:
    return [float(values[labels == kind].mean()) for kind in range(len(CLASSES))]


def report(network: Network, images: Tensor, labels: Tensor) -> None:
    """Over many scenes: how far is each gate open, and which pixels are right without it?"""

    def line(name: str, values: Tensor) -> None:
        shares = zip(CLASSES, by_class(values, labels), strict=True)
        print(f"{name:20}", ", ".join(f"{kind} {share:.1%}" for kind, share in shares))

    for level, gate in enumerate(network.fuse.gates(network.levels(images)), start=1):
        line(f"G{level} is open by", resize(gate, images.shape[2:])[:, 0])
    everything = tuple(range(LEVELS))
    for closed in ((), *((level,) for level in everything), everything):
        name = "".join(f" G{level + 1} = 0" for level in closed[:1])
        name = "right, all closed" if len(closed) > 1 else f"right{name and ','}{name}"
        line(name, (network(images, closed).argmax(1) == labels).float())


def draw(network: Network, image: Tensor, labels: Tensor, path: Path) -> None:
    prediction = network(image[None])[0].argmax(0)
    gates = [gate[0, 0] for gate in network.fuse.gates(network.levels(image[None]))]
    low, high = (float(torch.cat([g.flatten() for g in gates]).quantile(q)) for q in (0.01, 0.99))
    figure, panels = plt.subplots(2, LEVELS + 1, figsize=(13, 4.1), layout="constrained")
    panels[0, 0].imshow(image.permute(1, 2, 0))
    panels[0, 0].set_title("input")
    panels[1, 0].imshow(prediction, cmap=ListedColormap(PALETTE), vmin=0, vmax=2)
    panels[1, 0].set_title("prediction")
    for level, gate in enumerate(gates):
        shown = panels[0, level + 1].imshow(gate, vmin=low, vmax=high, cmap="magma")
        panels[0, level + 1].set_title(f"$G_{level + 1}$, {gate.shape[0]} x {gate.shape[1]}")
        without = network(image[None], closed=(level,))[0].argmax(0)
        changed = torch.ones(HEIGHT, WIDTH, 3)
        changed[labels > 0] = 0.85
        changed[(prediction == labels) & (without != labels)] = torch.tensor([0.80, 0.10, 0.10])
        changed[(prediction != labels) & (without == labels)] = torch.tensor([0.10, 0.35, 0.80])
        panels[1, level + 1].imshow(changed)
        panels[1, level + 1].set_title(f"$G_{level + 1} = 0$")
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=panels, label="gate", extend="both")
    figure.savefig(path, dpi=100, metadata={"Software": None})
    print(f"pixels of this scene that are right: {(prediction == labels).float().mean():.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("gates.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = Network()
    train(network, 300, generator)
    with torch.no_grad():
        report(network, *draw_scenes(100, generator))
        draw(network, *draw_scene(SHOWN, generator), options.out)


if __name__ == "__main__":
    main()
