# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the scenes: what it trains, what it scores, what it prints."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")

import scenes
from ctxops.models import create_model, segment
from ctxops.models.data import IGNORE, scene
from ctxops.models.data.scenes import CLASSES, PAIRED

ROOT = Path(__file__).parents[2]


def result(network, seed, paired, right):
    return {
        "network": network,
        "seed": seed,
        "mean_iou": paired - 0.1,
        "paired_iou": paired,
        "right_place": right,
        "pixels": [10_000, 10_000, 0, 0, 0, 0, 500],
        "learning": [[100, 0.2], [200, 0.3]],
    }


RESULTS = [
    result("fcn", 0, 0.40, [9000, 5000, 0, 0, 0, 0, 1]),
    result("ann", 0, 0.55, [9000, 9000, 0, 0, 0, 0, 1]),
    result("fcn", 1, 0.42, [9000, 6000, 0, 0, 0, 0, 1]),
    result("ann", 1, 0.61, [9000, 9500, 0, 0, 0, 0, 1]),
]


def test_the_table():
    """A share of few pixels is left out."""
    _, _, fcn, ann = scenes.table(RESULTS, ["fcn", "ann"])
    assert fcn == "| FCN | 0.310 ± 0.014 | 0.410 ± 0.014 | 0.90 | 0.55 |  |  |  |  |  |"
    assert ann == "| ANN | 0.480 ± 0.042 | 0.580 ± 0.042 | 0.90 | 0.93 |  |  |  |  |  |"


def test_the_comparison():
    assert scenes.comparisons(RESULTS, ["fcn", "ann"]) == [
        "ANN against FCN: +17.0 points of mIoU on the paired classes, where the larger deviation "
        "between seeds is 4.2."
    ]
    assert scenes.comparisons(RESULTS[:2], ["ann", "fcn"]) == [
        "FCN against ANN: -15.0 points of mIoU on the paired classes."
    ]


def test_readme_has_the_table_of_the_file():
    runs = json.loads((ROOT / "benchmarks/results/cpu/scenes.json").read_text())["runs"]
    assert "\n".join(scenes.table(runs, ["fcn", "ann"])) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", scenes.NETWORKS)
def test_every_network_can_be_made(name):
    options = scenes.SHARED | scenes.NETWORKS[name][1]
    create_model(name, "test_resnet", len(CLASSES), **options)


def test_scores_of_the_test_scenes(monkeypatch):
    """IoU and places counted by hand, of a network that is not trained."""
    monkeypatch.setattr(scenes, "SCENES", 12)
    network = create_model("fcn", "test_resnet", len(CLASSES), channels=8).eval()
    torch.nn.init.normal_(network.classifier[1].weight)
    monkeypatch.setattr(scenes, "load_model", lambda path: network)
    scored = scenes.score(None, 2)
    shown = [scene(index, split="test", size=scenes.SIZE, zones=2) for index in range(12)]
    predicted = torch.stack([segment(network, x.image[None])[0] for x in shown])
    labels, distance = (torch.stack([x[k] for x in shown]) for k in (1, 2))
    predicted = predicted.where(labels != IGNORE, IGNORE)
    for name, value in scored["iou"].items():
        one, other = (x == CLASSES.index(name) for x in (labels, predicted))
        assert value == pytest.approx((one & other).sum() / (one | other).sum())
    ious = [scored["iou"][name] for name in PAIRED]
    assert scored["paired_iou"] == pytest.approx(sum(ious) / len(PAIRED))
    near = (labels >= 4) & (labels != IGNORE) & (labels // 2 == predicted // 2) & (distance < 32)
    assert scored["pixels"][0] == near.sum()
    assert scored["right_place"][0] == (near & (labels == predicted)).sum()


def test_a_finished_run_is_read(tmp_path, monkeypatch):
    """And one of other settings in its folder is refused."""
    run = scenes.Run("fcn", 0, 1, 100)
    folder = tmp_path / "fcn_0"

    def train(run, folder):
        (folder / "logs/version_0").mkdir(parents=True)
        (folder / "logs/version_0/metrics.csv").write_text("step,mIoU\n99,0.5\n49,\n49,0.4\n")

    monkeypatch.setattr(scenes, "train", train)
    monkeypatch.setattr(scenes, "score", lambda path, zones: {"mean_iou": 0.25})
    first = scenes.perform(run, folder)
    assert first["learning"] == [(50, 0.4), (100, 0.5)]
    assert json.loads((folder / "result.json").read_text())["mean_iou"] == 0.25
    monkeypatch.setattr(scenes, "train", None)
    assert scenes.perform(run, folder)["mean_iou"] == 0.25
    with pytest.raises(SystemExit, match="fcn_0 holds another run: choose another folder"):
        scenes.perform(run._replace(steps=200), folder)


@pytest.mark.slow
def test_the_program(tmp_path, monkeypatch, capsys):
    """It trains a network for two steps, scores and draws it."""
    pytest.importorskip("lightning", reason='needs pip install "ctxops[train]"')
    file, plot = tmp_path / "a.json", tmp_path / "a.png"
    monkeypatch.setattr(scenes, "SCENES", 12)
    options = [
        "--networks",
        "fcn",
        "--steps",
        "2",
        "--runs",
        str(tmp_path / "runs"),
        "--json",
        str(file),
    ]
    threads = torch.get_num_threads()
    assert scenes.main([*options, "--plot", str(plot)]) == 0
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "| FCN |" in printed
    content = json.loads(file.read_text())
    assert [run["network"] for run in content["runs"]] == ["fcn"]
    assert all(len(run["learning"]) == 1 for run in content["runs"])
    assert plot.stat().st_size > 10_000
    assert (tmp_path / "runs/fcn_0/best.ckpt").exists()
    assert (tmp_path / "runs/scene.png").exists()
