# SPDX-License-Identifier: Apache-2.0
"""Looks into a network: the numbers of each are those that the network computes with."""

import itertools
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from ctxops.__main__ import main
from ctxops.models import create_model, segment
from ctxops.models.data import IGNORE
from ctxops.models.inference import standardise
from ctxops.models.pictures import LOOKS, Subject, available
from ctxops.models.pictures.inside import half_radius, principal_plane, receptive_field
from ctxops.models.predict import overlay
from ctxops.nn import (
    APNB,
    GALD,
    GatedFullyFusion,
    LDv1,
    LDv2,
    NonLocal2d,
    RecurrentCrissCrossAttention,
)
from ctxops.ops.criss_cross_attention.reference import reference_weights as criss_cross_reference
from ctxops.ops.neighborhood_attention.reference import reference_weights as window_reference
from networks import NUM_CLASSES, make, network_of

HEIGHT, WIDTH = 72, 88
PALETTE = [(40 * k, 255 - 40 * k, 90) for k in range(NUM_CLASSES)]
CLASSES = [f"class {k}" for k in range(NUM_CLASSES)]
RED = torch.tensor([220, 30, 30], dtype=torch.uint8)


def slow(*values):
    values = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*value, marks=pytest.mark.slow) for value in values]


def subject_of(network, at=(30, 50), labelled=False, width=WIDTH):
    image = torch.randint(0, 256, (3, HEIGHT, width), dtype=torch.uint8)
    labels = torch.randint(0, NUM_CLASSES, (HEIGHT, WIDTH), dtype=torch.uint8)
    labels[:5] = IGNORE
    return Subject(network, image, CLASSES, PALETTE, at, labels if labelled else None)


def balanced(subject):
    """Of this image every class has the same mean score: many pixels of each class."""
    network = subject.network
    with torch.no_grad():
        scores = network.predict(maps_of(subject)).logits
    mean, deviation = (f((0, 2, 3), keepdim=True) for f in (scores.mean, scores.std))
    network.classifier.register_forward_hook(lambda _, inputs, y: (y - mean) / deviation)
    assert len(subject.predict().unique()) >= 4
    return subject


def look(kind, subject):
    rows = LOOKS[kind].panels(subject)
    for panel in itertools.chain(*rows):
        assert panel.title
    return rows


def find(network, kind):
    (module,) = (m for m in network.modules() if isinstance(m, kind))
    return module


def maps_of(subject):
    with torch.no_grad():
        return subject.network.encoder(standardise(subject.image[None], subject.network))


def is_red(panel):
    return (panel.image == RED[:, None, None]).all(0)


def criss_cross_matrix(query, key):
    """(N, N): the weights of all positions, each a row."""
    height, width = query.shape[2:]
    weights = criss_cross_reference(query, key, 1.0)[0]
    matrix = torch.zeros(height, width, height, width)
    for h, w in itertools.product(range(height), range(width)):
        matrix[h, w, :, w] = weights[h, w, :height]
        matrix[h, w, h, [j for j in range(width) if j != w]] = weights[h, w, height:]
    return matrix.flatten(2).flatten(0, 1)


def test_criss_cross_attention_of_one_and_two_rounds():
    """After one round a pixel has seen its cross, after two the whole map."""
    subject = subject_of(network_of("ccnet"), at=(71, 8))
    ((_, once, twice),) = look("attention", subject)
    head = find(subject.network, RecurrentCrissCrossAttention)
    with torch.no_grad():
        x = head.reduce(maps_of(subject)[-1])
        matrices = []
        for _ in range(2):
            attention = head.attention
            matrices.append(criss_cross_matrix(attention.query(x), attention.key(x)))
            x = attention(x)
    position = 8 * 11 + 1  # 72 x 88 pixels are 9 x 11 positions
    torch.testing.assert_close(once.values, matrices[0][position].view(9, 11))
    torch.testing.assert_close(twice.values, (matrices[1] @ matrices[0])[position].view(9, 11))
    for panel in (once, twice):
        torch.testing.assert_close(panel.values.sum(), torch.tensor(1.0))
        assert "100%" in panel.title
        assert panel.points == [(71, 8)]
    assert (once.values > 0).sum() == 9 + 11 - 1
    assert (twice.values > 0).all()


@pytest.mark.parametrize(
    ("variant", "sampling"), [("released", "avg"), *slow(("paper", "avg"), ("released", "max"))]
)
def test_anchors_of_both_blocks(variant, sampling):
    network = make("ann", variant=variant, sampling=sampling, key_channels=8, value_channels=8)
    subject = subject_of(network, at=(0, 87))
    rows = look("attention", subject)
    assert [len(row) for row in rows] == [5, 5]  # the image, and grids of 1, 3, 6 and 8
    pool = {"avg": F.adaptive_avg_pool2d, "max": F.adaptive_max_pool2d}[sampling]
    *_, low, high = maps_of(subject)
    decoder = network.decoder
    with torch.no_grad():
        x = decoder.reduce(decoder.fusion(low, high))
        for row, block, of_query, of_key in (
            (rows[0], decoder.fusion, high, low),
            (rows[1], find(network, APNB), x, x),
        ):
            query = block.query(of_query)[0, :, 0, -1]
            key = block.key(of_key)
            anchors = torch.cat([pool(key, n).flatten(2) for n in (1, 3, 6, 8)], dim=2)[0]
            expected = (block.scale * query @ anchors).softmax(0)
            weights = torch.cat([panel.values.flatten() for panel in row[1:]])
            torch.testing.assert_close(weights, expected)
            assert [tuple(p.values.shape) for p in row[1:]] == [(n, n) for n in (1, 3, 6, 8)]


def test_random_anchors_are_nowhere():
    network = make("ann", sampling="random")
    assert available(network) == ["overlay", "errors", "field"]


def test_attention_to_all_positions():
    subject = subject_of(network_of("nonlocal"))
    ((_, panel),) = look("attention", subject)
    block = find(subject.network, NonLocal2d)
    ((((x,), _),),) = subject.run(block)
    with torch.no_grad():
        query, key = block.query(x)[0], block.key(x)[0]
    expected = (block.scale * query[:, 3, 6] @ key.flatten(1)).softmax(0)  # 30 x 50 px: 3 x 6
    torch.testing.assert_close(panel.values.flatten(), expected)


@pytest.mark.parametrize("at", [(40, 40), (0, 0)])
def test_windows(at):
    """At a corner some neighbours lie outside of the map, and keep their share."""
    subject = subject_of(make("gald", local_distribution="ldv2", kernel_size=3), at)
    ((_, panel),) = look("attention", subject)
    module = find(subject.network, LDv2)
    ((_, query),), ((_, key),) = subject.run(module.query, module.key)
    weights = window_reference(query, key, (3, 3), (3, 3), module.scale, "zeros", 1)[0, 0]
    expected = torch.full((9, 11), torch.nan)
    row, column = at[0] // 8, at[1] // 8
    for i, j in itertools.product(range(3), range(3)):
        y, x = row + 3 * (i - 1), column + 3 * (j - 1)
        if 0 <= y < 9 and 0 <= x < 11:
            expected[y, x] = weights[i, j, row, column]
    torch.testing.assert_close(panel.values, expected, equal_nan=True)
    inside = panel.values.nansum()
    assert (inside < 0.999) if at == (0, 0) else (inside > 0.999)


@pytest.mark.parametrize("labelled", [True, *slow(False)])
def test_gates_and_what_changes_without_them(labelled):
    subject = balanced(subject_of(network_of("gff"), labelled=labelled))
    (_, *opened), (_, *changed) = look("gates", subject)
    fusion = find(subject.network, GatedFullyFusion)
    predicted = subject.predict()
    with torch.no_grad():
        expected = fusion.gates(maps_of(subject))
    assert len(opened) == len(changed) == 4
    for level, (panel, gate) in enumerate(zip(opened, expected, strict=True)):
        torch.testing.assert_close(panel.values, gate[0, 0])
        bias = fusion.gate[level].bias
        with torch.no_grad():
            kept = bias.clone()
            bias.fill_(-torch.inf)  # a gate of 0
            without = subject.predict()
            bias.copy_(kept)
        wrong = without != predicted
        assert wrong.any()
        if labelled:
            wrong &= (predicted == subject.labels) & (without != subject.labels)
        assert torch.equal(is_red(changed[level]), wrong)


def test_masks():
    subject = subject_of(network_of("gald"))
    ((_, panel),) = look("masks", subject)
    module = find(subject.network, LDv1)
    (((x,), y),) = subject.run(module)[0]
    torch.testing.assert_close(panel.values, (y / x - 1)[0].mean(0), rtol=1e-3, atol=1e-3)
    assert ((panel.values >= 0) & (panel.values <= 1)).all()


@pytest.mark.parametrize("distribution", ["ldv1", "ldv2"])
def test_heads(distribution):
    """Without local distribution the block gives what global aggregation gives."""
    network = make("gald", local_distribution=distribution)
    subject = balanced(subject_of(network))
    ((_, before, between, after),) = look("heads", subject)

    def shown():
        return overlay(subject.image, subject.predict(), PALETTE)

    assert torch.equal(after.image, shown())
    block = find(network, GALD)
    block.local_distribution = None
    assert torch.equal(between.image, shown())
    block.forward = lambda x: x
    assert torch.equal(before.image, shown())
    assert not torch.equal(before.image, between.image)
    assert not torch.equal(between.image, after.image)


def test_memory():
    """Rows and means of classes lie where the plane of the rows has them."""
    subject = subject_of(network_of("mcibi"), labelled=True)
    subject.network.bank.memory[3] = 0  # holds nothing
    subject.labels[subject.labels == 1] = 0
    ((_, _, scatter),) = look("memory", subject)
    held = [0, 1, 2, 4]
    assert scatter.names == [CLASSES[k] for k in held]
    assert scatter.colours == [PALETTE[k] for k in held]
    with torch.no_grad():
        r = subject.network.decoder.reduce(maps_of(subject)[-1])
    features = F.interpolate(r, (HEIGHT, WIDTH), mode="bilinear", align_corners=False)[0]
    means = torch.stack([features[:, subject.labels == k].mean(1) for k in held])
    rows, dots, _ = principal_plane(subject.network.bank.memory[held], means)
    torch.testing.assert_close(scatter.rows, rows)
    torch.testing.assert_close(scatter.dots, dots, equal_nan=True, rtol=1e-3, atol=1e-4)
    assert scatter.dots.isnan().any(1).tolist() == [False, True, False, False]


def test_the_principal_plane_keeps_what_lies_in_a_plane():
    plane = torch.linalg.qr(torch.randn(9, 2)).Q
    points = torch.randn(6, 2) * torch.tensor([3.0, 1.0])
    far = points @ plane.T + torch.randn(9)
    rows, others, share = principal_plane(far, far[:2])
    assert share == pytest.approx(1)
    torch.testing.assert_close(torch.cdist(rows, rows), torch.cdist(points, points))
    torch.testing.assert_close(others, rows[:2])
    assert rows[:, 0].var() > rows[:, 1].var()


def test_an_empty_memory_is_not_shown():
    network = network_of("mcibi")
    network.bank.memory.zero_()
    with pytest.raises(ValueError, match="the memory must hold at least 2 rows to be shown, got 0"):
        look("memory", subject_of(network))


def test_receptive_field_of_a_stack():
    """Of n convolutions with ones: the n-fold product of 1, 1, 1 with itself in both directions."""
    stack = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1, bias=False) for _ in range(3)))
    for layer in stack:
        nn.init.ones_(layer.weight)
    gradient = receptive_field(lambda x: stack(x), torch.randn(1, 1, 12, 15), (5, 8))
    line = torch.tensor([1.0, 3, 6, 7, 6, 3, 1])
    expected = torch.zeros(12, 15)
    expected[2:9, 5:12] = line[:, None] * line
    torch.testing.assert_close(gradient, expected)


def test_receptive_field_is_of_the_most_likely_class():
    weight = torch.tensor([1.0, -3.0, 2.0]).view(3, 1, 1, 1)
    gradient = receptive_field(
        lambda x: F.conv2d(x, weight), torch.full((1, 1, 4, 4), -1.0), (2, 1)
    )
    expected = torch.zeros(4, 4)
    expected[2, 1] = 3
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(("far", "radius"), [(2.0, 5), (0.5, 0)])
def test_half_radius(far, radius):
    weights = torch.zeros(9, 12)
    weights[3, 3], weights[7, 6] = 1, far  # 4 rows and 3 columns apart
    assert half_radius(weights, (3, 3)) == radius


@pytest.mark.parametrize("name", ["fcn", "ann"])
def test_receptive_field_of_a_network(name):
    """What an FCN does not see has no gradient; attention sees all."""
    subject = subject_of(network_of(name), at=(40, 0), width=200)
    ((_, panel),) = look("field", subject)
    assert panel.values.shape == (HEIGHT, 200)
    assert panel.values.max() == 1
    assert (panel.values[:, :40] > 0).any()
    assert (panel.values[:, 120:] > 0).any() == (name == "ann")


def test_errors():
    subject = balanced(subject_of(network_of("fcn"), labelled=True))
    ((_, _, panel),) = look("errors", subject)
    predicted = segment(subject.network, subject.image[None])[0]
    wrong = predicted != subject.labels
    wrong[:5] = False
    assert torch.equal(is_red(panel), wrong)
    assert f"{wrong.sum() / (HEIGHT - 5) / WIDTH:.1%}" in panel.title


def test_errors_need_labels():
    with pytest.raises(ValueError, match="labels are needed to tell which pixels are wrong"):
        look("errors", subject_of(network_of("fcn")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fcn", []),
        ("ann", ["attention"]),
        ("ccnet", ["attention"]),
        ("gald", ["masks", "heads"]),
        ("gff", ["gates"]),
        ("mcibi", ["memory"]),
        ("gcn", []),
    ],
)
def test_a_network_has_the_looks_of_its_modules(name, expected):
    assert available(network_of(name)) == ["overlay", "errors", "field", *expected]


OF_KIND = dict.fromkeys(LOOKS, "fcn") | {
    "attention": "ccnet",
    "gates": "gff",
    "masks": "gald",
    "heads": "gald",
    "memory": "mcibi",
}


@pytest.fixture
def files(tmp_path):
    """A checkpoint of a network, an image and labels."""

    def write(name, **more):
        options = {} if name == "gcn" else {"channels": 16}
        network = create_model(name, "test_resnet", NUM_CLASSES, **options)
        if name == "mcibi":
            nn.init.normal_(network.bank.memory)
        arguments = {"backbone": "test_resnet", "num_classes": NUM_CLASSES, **options}
        saved = {"model": name, "arguments": arguments, "state_dict": network.state_dict()}
        torch.save(saved | more, tmp_path / "a.ckpt")
        return [str(tmp_path / "a.ckpt"), str(tmp_path / "a.png")]

    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., 0] % NUM_CLASSES).save(tmp_path / "labels.png")
    return write


@pytest.mark.parametrize(
    "kind", ["attention", *slow(*(kind for kind in LOOKS if kind != "attention"))]
)
def test_the_command(kind, files, tmp_path, capsys):
    out = str(tmp_path / "out.png")
    given = files(OF_KIND[kind], classes=CLASSES, palette=PALETTE)
    options = ["-o", out, "--at", "5", "80", "--labels", str(tmp_path / "labels.png")]
    assert main(["look", kind, *given, *options]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    picture = Image.open(out)
    assert picture.width > 300
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("gates", [], r"a.ckpt has no gates to look at: its network has overlay, errors, field"),
        ("gaze", [], "unknown look 'gaze', the closest is 'gates'"),
        ("field", ["--at", "72", "0"], "at must be a row below 72 and a column below 88, got"),
        ("errors", ["--labels", "nowhere.png"], "nowhere.png"),
        ("errors", ["--labels", "large.png"], r"large.png must have the size of the image"),
        ("errors", ["--labels", "wild.png"], r"wild.png must have numbers below 5 or 255, got \[7"),
    ],
)
def test_bad_input(kind, options, message, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((80, 90), np.uint8)).save("large.png")
    Image.fromarray(np.full((HEIGHT, WIDTH), 7, np.uint8)).save("wild.png")
    assert main(["look", kind, *files("fcn"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ctxops look: ")
    assert re.search(message, error), error


def test_it_names_what_it_lacks(monkeypatch, capsys):
    for name in list(sys.modules):
        if name.startswith("ctxops.models.pictures"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert main(["look", "field", "a", "b"]) == 1
    expected = 'this needs matplotlib, which is not installed: pip install "ctxops[look]"'
    assert expected in capsys.readouterr().err
