# SPDX-License-Identifier: Apache-2.0
"""Networks with context against one without, trained on scenes where a far landmark decides.

    python benchmarks/scenes.py
    python benchmarks/scenes.py --seeds 3 --json scenes.json --plot scenes.png
    python benchmarks/scenes.py --zones 2 --networks pspnet ccnet gald

Each network is trained by `ctxops fit` with the recipe `scenes`, in a process of one thread, as
many at a time as there are cores, and scored on 60 scenes that neither training nor validation
uses. "Right place": of the pixels whose pair of classes is right, the share whose place, town or
harbour, is right too; 0.5 is a guess. What has been trained stays in the folder of the runs: the
same command again goes on where it was stopped, and trains nothing twice.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from ctxops.models import load_model, segment
from ctxops.models.data import IGNORE, right_places, scene
from ctxops.models.data.scenes import CLASSES, PAIRED, PALETTE
from ctxops.models.predict import overlay, save_labels
from ctxops.models.training.metrics import scores
from harness import output_file
from harness.machine import describe_machine, machine_line
from harness.report import require

# What the recipe does not say of a network, and its name in the figure.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "fcn": ("FCN", {}),
    "ann": ("ANN", {"key_channels": 32, "value_channels": 32}),
    "pspnet": ("global average", {"output_sizes": [1]}),
    "ccnet": ("CCNet", {}),
    "gald": ("GALD, LDv2", {"local_distribution": "ldv2"}),
}
SHARED = {"channels": 64, "auxiliary_channels": 0}
SCENES = 60
SIZE = (80, 256)  # wider than the recipe's: an FCN does not see across half of it
STEP, BINS = 32, 7  # of the distance, in pixels
SHOWN = 3  # the scene of the figure
LEAST = 1000  # pixels that a share is taken of


class Run(NamedTuple):
    """A network that is trained once."""

    network: str
    seed: int
    zones: int
    steps: int

    def arguments(self) -> list[str]:
        """Those of ``ctxops fit``."""
        options = SHARED | NETWORKS[self.network][1]
        epoch = min(100, self.steps)
        return [
            *("--seed_everything", str(self.seed)),
            *("--model.network", self.network, "--model.options", json.dumps(options)),
            *("--data.options", json.dumps({"zones": self.zones, "size": SIZE})),
            *("--data.steps_per_epoch", str(epoch)),
            *("--trainer.max_epochs", str(self.steps // epoch)),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        ]


def train(run: Run, folder: Path) -> None:
    """The run by ``ctxops fit``, or what is left of it by ``ctxops resume``."""
    command = [sys.executable, "-m", "ctxops.models.train"]
    if (folder / "last.ckpt").exists():
        command += ["resume", str(folder)]
    else:
        command += ["fit", "--run_folder", str(folder), *run.arguments()]
    log = folder / "log.txt"
    with open(log, "a") as file:
        done = subprocess.run(
            command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    if done.returncode:
        raise SystemExit(f"{run.network}, seed {run.seed}, could not be trained: see {log}")


def learning_curve(folder: Path) -> list[tuple[int, float]]:
    """Steps done and mean IoU on the validation scenes, after each epoch."""
    rows = []
    for file in folder.glob("logs/version_*/metrics.csv"):
        with open(file) as lines:
            rows += [
                (int(r["step"]) + 1, float(r["mIoU"])) for r in csv.DictReader(lines) if r["mIoU"]
            ]
    return sorted(rows)


def score(checkpoint: Path, zones: int) -> dict[str, Any]:
    """What a network makes of the test scenes."""
    network, count = load_model(checkpoint), len(CLASSES)
    confusion = torch.zeros(count, count, dtype=torch.int64)
    places = torch.zeros(2, BINS, dtype=torch.int64)
    for index in range(SCENES):
        image, labels, distance = scene(index, split="test", size=SIZE, zones=zones)
        predicted = segment(network, image[None])[0]
        known = labels != IGNORE
        confusion.index_put_(
            (labels[known].long(), predicted[known].long()), torch.tensor(1), accumulate=True
        )
        places += right_places(labels, predicted, distance, step=STEP, bins=BINS)
    result = scores(confusion, CLASSES)
    return {
        "mean_iou": result.mean_iou,
        "paired_iou": sum(result.iou[name] for name in PAIRED) / len(PAIRED),
        "iou": result.iou,
        "right_place": places[0].tolist(),
        "pixels": places[1].tolist(),
    }


def perform(run: Run, folder: Path) -> dict[str, Any]:
    """Trains and scores a run, or reads what came out of it before."""
    file = folder / "result.json"
    result = {**run._asdict(), "scenes": SCENES, "size": list(SIZE)}
    if file.exists():
        stored = json.loads(file.read_text())
        if any(stored[name] != value for name, value in result.items()):
            raise SystemExit(f"{folder} holds another run: choose another folder by --runs")
        if "mean_iou" in stored:
            return stored
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result))
    train(run, folder)
    result |= score(folder / "best.ckpt", run.zones)
    result |= {"learning": learning_curve(folder), "machine": describe_machine(torch.device("cpu"))}
    file.write_text(json.dumps(result))
    print(f"{run.network}, seed {run.seed}: mean IoU {result['mean_iou']:.3f}", flush=True)
    return result


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The deviation is that of a sample; 0 of a single value."""
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), x.std().item() if len(values) > 1 else 0.0


def shares(results: Sequence[dict[str, Any]]) -> list[float | None]:
    """The share of pixels in the right place by distance; None where there are few."""
    columns = zip(*(zip(r["right_place"], r["pixels"], strict=True) for r in results), strict=True)
    sums = (map(sum, zip(*column, strict=True)) for column in columns)
    return [right / pixels if pixels > LEAST else None for right, pixels in sums]


def of_network(results: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [result for result in results if result["network"] == name]


def table(results: Sequence[dict[str, Any]], networks: Sequence[str]) -> list[str]:
    """A row for each network, in Markdown."""
    distances = [f"{i * STEP}-{(i + 1) * STEP} px" for i in range(BINS)]
    head = ["network", "mIoU", "paired classes", *distances]
    rows = [head, ["---"] * len(head)]
    for name in networks:
        mine = of_network(results, name)
        cells = [NETWORKS[name][0]]
        for figure in ("mean_iou", "paired_iou"):
            mean, deviation = mean_and_deviation([result[figure] for result in mine])
            cells.append(f"{mean:.3f}" + (f" ± {deviation:.3f}" if len(mine) > 1 else ""))
        rows.append(cells + ["" if x is None else f"{x:.2f}" for x in shares(mine)])
    return [f"| {' | '.join(row)} |" for row in rows]


def comparisons(results: Sequence[dict[str, Any]], networks: Sequence[str]) -> list[str]:
    """Each network against the first, on the paired classes."""
    figures = {
        name: mean_and_deviation([r["paired_iou"] for r in of_network(results, name)])
        for name in networks
    }
    first, *others = networks
    lines = []
    for name in others:
        (low, a), (high, b) = figures[first], figures[name]
        line = (
            f"{NETWORKS[name][0]} against {NETWORKS[first][0]}: {100 * (high - low):+.1f} points "
            f"of mIoU on the paired classes"
        )
        if len(of_network(results, name)) > 1:
            line += f", where the larger deviation between seeds is {100 * max(a, b):.1f}"
        lines.append(f"{line}.")
    return lines


def draw(
    results: Sequence[dict[str, Any]],
    checkpoints: dict[str, Path],
    zones: int,
    path: Path,
    folder: Path,
) -> None:
    """Curves above, a scene as each network sees it below; the scene itself goes to the folder."""
    require("matplotlib").use("Agg")
    plt = require("matplotlib.pyplot")
    figure = plt.figure(figsize=(10, 4.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 1))
    learning, place = top.subplots(1, 2)
    for number, name in enumerate(checkpoints):
        mine, style = of_network(results, name), {"color": f"C{number}"}
        label = NETWORKS[name][0]
        for result in mine:
            learning.plot(*zip(*result["learning"], strict=True), label=label, **style)
            label = None
        known = [(STEP * (i + 0.5), x) for i, x in enumerate(shares(mine)) if x is not None]
        place.plot(*zip(*known, strict=True), marker="o", label=NETWORKS[name][0], **style)
    learning.set(xlabel="steps", ylabel="mean IoU, validation", ylim=0)
    place.axhline(0.5, color="grey", linestyle=":", label="a guess")
    place.set(xlabel="pixels from the landmark", ylabel="right place", ylim=(0.3, 1.03))
    for axes in (learning, place):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    image, labels, _ = scene(SHOWN, split="test", size=SIZE, zones=zones)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "scene.png")
    save_labels(labels, PALETTE, folder / "scene_labels.png")
    shown = {"image": image, "labels": overlay(image, labels, PALETTE)}
    for name, checkpoint in checkpoints.items():
        classes = segment(load_model(checkpoint), image[None])[0]
        shown[NETWORKS[name][0]] = overlay(image, classes, PALETTE)
    for axes, (name, x) in zip(bottom.subplots(1, len(shown)), shown.items(), strict=True):
        axes.imshow(x.permute(1, 2, 0).numpy())
        axes.set_title(name, fontsize=10)
        axes.set_axis_off()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=["fcn", "ann"],
        metavar="NAME",
        help=f"of {', '.join(NETWORKS)}; the first is what the others are compared with",
    )
    parser.add_argument("--seeds", type=int, default=1, help="how often each is trained")
    parser.add_argument("--zones", type=int, default=1, help="places side by side in a scene")
    parser.add_argument("--steps", type=int, default=1000, help="of training; a multiple of 100")
    parser.add_argument("--runs", type=Path, help="folder; default: runs/scenes_ZONES")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trained side by side")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every number")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="default: in --runs")
    options = parser.parse_args(arguments)
    require("matplotlib")
    torch.set_num_threads(1)
    folder = options.runs or Path(f"runs/scenes_{options.zones}")
    runs = [
        Run(name, seed, options.zones, options.steps)
        for seed in range(options.seeds)
        for name in options.networks
    ]
    folders = [folder / f"{run.network}_{run.seed}" for run in runs]
    machine = describe_machine(torch.device("cpu"))
    print(machine_line(machine))
    print(f"training in {folder}, {options.jobs} at a time", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(perform, runs, folders))
    lines = comparisons(results, options.networks)
    print(*table(results, options.networks), *lines, sep="\n")
    path = options.plot or folder / "scenes.png"
    first = {r.network: f / "best.ckpt" for r, f in zip(runs, folders, strict=True) if not r.seed}
    draw(results, first, options.zones, path, folder)
    print(f"the figure is {path}")
    if options.json:
        content = {"benchmark": "scenes", "machine": machine, "summary": lines, "runs": results}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
