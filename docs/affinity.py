# SPDX-License-Identifier: Apache-2.0
"""The windows of three pixels in a small network with LDv2, drawn to docs/affinity.png.

    python docs/affinity.py

The scene that is shown is not trained on. One thread and fixed seeds: the same figure every time on
one machine.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ctxops import neighborhood_attention_weights
from ctxops.nn import CGNL, LDv2

HEIGHT, WIDTH, STRIDE = 64, 96, 2
COLORS = torch.tensor([[0.45, 0.50, 0.55], [0.80, 0.45, 0.40], [0.42, 0.70, 0.45]])
CLASSES = ("background", "disc", "bar")
NOISE = 0.16
# The scene that is shown: (class, row, column, half height, half width), later ones on top.
SHOWN = [(1, 30, 48, 20, 20), (2, 52, 8, 7, 22), (2, 16, 84, 12, 6)]
# Positions of the map, which has one for every 2 x 2 pixels of the scene.
PIXELS = {"inside the disc": (13, 24), "at the disc's edge": (15, 33), "at the border": (25, 1)}
FRAMES = ("#0057b8", "#7b1fa2", "#d81b60")


def draw_scene(shapes: list[tuple[int, ...]], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A noisy image (3, HEIGHT, WIDTH) and its classes (HEIGHT, WIDTH)."""
    rows, columns = torch.arange(HEIGHT)[:, None], torch.arange(WIDTH)[None, :]
    labels = torch.zeros(HEIGHT, WIDTH, dtype=torch.long)
    for kind, row, column, tall, wide in shapes:
        y, x = (rows - row) / tall, (columns - column) / wide
        labels[(y.square() + x.square() <= 1) if kind == 1 else (y.abs().max(x.abs()) <= 1)] = kind
    noise = NOISE * torch.randn(HEIGHT, WIDTH, 3, generator=generator)
    return (COLORS[labels] + noise).clamp(0, 1).permute(2, 0, 1), labels


def random_shapes(generator: torch.Generator) -> list[tuple[int, ...]]:
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    shapes = []
    for _ in range(4):
        kind, tall = draw(1, 3), draw(5, 22)
        wide = tall if kind == 1 else draw(5, 22)
        shapes.append((kind, draw(0, HEIGHT), draw(0, WIDTH), tall, wide))
    return shapes


class Network(nn.Module):
    """Two convolutions see 7 x 7 pixels; what lies further off comes through CGNL and LDv2."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, stride=STRIDE), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.aggregate = CGNL(width, width, groups=4)
        self.distribute = LDv2(width, width, width)
        self.classify = nn.Conv2d(width, len(CLASSES), 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        y = self.classify(self.distribute(self.aggregate(x), x))
        return F.interpolate(y, image.shape[2:], mode="bilinear", align_corners=False)

    def weights(self, image: Tensor) -> Tensor:
        """The affinity window of every position: (kh * kw, H / 2, W / 2)."""
        x, ld = self.stem(image), self.distribute
        maps = self.aggregate(x), x
        return neighborhood_attention_weights(
            ld.query(*maps), ld.key(*maps), ld.kernel_size, ld.dilation,
            scale=ld.scale, border=ld.border, num_heads=ld.num_heads,
        )[0, 0]  # fmt: skip


def train(network: Network, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        scenes = [draw_scene(random_shapes(generator), generator) for _ in range(8)]
        images, labels = (torch.stack(maps) for maps in zip(*scenes, strict=True))
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()


def window(ld: LDv2, row: int, column: int) -> list[tuple[int, int]]:
    """Rows and columns of the neighbours n = i * kw + j, those outside the map included."""
    (kh, kw), (dh, dw) = ld.kernel_size, ld.dilation
    top, left = row - kh // 2 * dh, column - kw // 2 * dw
    return [(top + i * dh, left + j * dw) for i in range(kh) for j in range(kw)]


def report(network: Network, weights: Tensor, classes: Tensor) -> None:
    """Where do the weights go, over the map's positions with all neighbours inside?"""
    ld = network.distribute
    top, left = (k // 2 * d for k, d in zip(ld.kernel_size, ld.dilation, strict=True))
    neighbours = F.unfold(classes[None, None].double(), ld.kernel_size, ld.dilation)[0]
    same = neighbours == classes[top:-top, left:-left].flatten()
    shares = weights[:, top:-top, left:-left].flatten(1)
    mixed = ~same.all(0)
    share, even = ((p * same).sum(0)[mixed].mean() for p in (shares, same / len(same)))
    print(f"mixed windows: own class {share:.0%} of the weight, {even:.0%} of the area")
    height, width = classes.shape
    for name, (row, column) in PIXELS.items():
        kinds = {kind: [0, 0] for kind in (*CLASSES, "outside")}
        for n, (y, x) in enumerate(window(ld, row, column)):
            inside = 0 <= y < height and 0 <= x < width
            kind = kinds[CLASSES[classes[y, x]] if inside else "outside"]
            kind[0] += float(weights[n, row, column])
            kind[1] += 1
        print(f"{name}:", ", ".join(f"{k} {w:.1%} in {n}" for k, (w, n) in kinds.items() if n))


def draw_window(
    axes: plt.Axes, shares: list[float], places: list[tuple[int, int]], scale: Normalize
) -> None:
    """A square per neighbour, in the colour of its weight and with the weight in percent."""
    size, corner = 4, 0.5 * STRIDE - 0.5
    for share, (y, x) in zip(shares, places, strict=True):
        centre = (STRIDE * x + corner, STRIDE * y + corner)
        low = (centre[0] - size / 2, centre[1] - size / 2)
        axes.add_patch(Rectangle(low, size, size, color=plt.cm.magma(scale(share)), zorder=3))
        color = "white" if scale(share) < 0.6 else "black"
        axes.text(
            *centre, f"{100 * share:.0f}", color=color, size=8, ha="center", va="center", zorder=4
        )


def draw(network: Network, image: Tensor, labels: Tensor, weights: Tensor, path: Path) -> None:
    ld, picture = network.distribute, image.permute(1, 2, 0).numpy()
    with torch.no_grad():
        prediction = network(image[None])[0].argmax(0)
    figure = plt.figure(figsize=(10, 7.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.06, 1))
    scene, result = top.subplots(1, 2)
    panels = bottom.subplots(1, 3)
    scene.imshow(picture)
    result.imshow(prediction, cmap=ListedColormap(COLORS.numpy()), vmin=0, vmax=2)
    scale = Normalize(0, max(float(weights[:, y, x].max()) for y, x in PIXELS.values()))
    reach = STRIDE * (ld.kernel_size[0] // 2 * ld.dilation[0]) + 4
    for axes, color, (name, (row, column)) in zip(panels, FRAMES, PIXELS.items(), strict=True):
        places = window(ld, row, column)
        y, x = (STRIDE * place + 0.5 * STRIDE - 0.5 for place in (row, column))
        dots = torch.tensor(places) * STRIDE + 0.5 * STRIDE - 0.5
        scene.scatter(dots[:, 1], dots[:, 0], s=9, color=color, edgecolor="white", linewidth=0.5)
        scene.plot(x, y, "s", color=color, markeredgecolor="white", markersize=8)
        axes.imshow(picture, alpha=0.55)
        for kind in (1, 2):
            axes.contour(labels == kind, levels=[0.5], colors="black", linewidths=1.5)
        axes.add_patch(Rectangle((-0.5, -0.5), WIDTH, HEIGHT, fill=False, linewidth=2))
        draw_window(axes, weights[:, row, column].tolist(), places, scale)
        axes.plot(x, y, "s", color=color, markersize=34, fillstyle="none", mew=3, zorder=5)
        axes.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach), xticks=[], yticks=[])
        axes.set_title(name, color=color)
    scene.set(xlim=(-0.5, WIDTH - 0.5), ylim=(HEIGHT - 0.5, -0.5), xticks=[], yticks=[])
    scene.set_title("input, three pixels and their windows")
    result.set(title="prediction", xticks=[], yticks=[])
    colors = plt.cm.ScalarMappable(scale, "magma")
    bottom.colorbar(colors, ax=panels, label="weight (in the squares: percent)", shrink=0.85)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    print(f"pixels of this scene that are right: {(prediction == labels).float().mean():.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("affinity.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = Network()
    train(network, 300, generator)
    image, labels = draw_scene(SHOWN, generator)
    with torch.no_grad():
        weights = network.weights(image[None])
    report(network, weights, labels[::STRIDE, ::STRIDE])
    draw(network, image, labels, weights, options.out)


if __name__ == "__main__":
    main()
