# SPDX-License-Identifier: Apache-2.0
"""From images to classes: whole, in windows, at several scales, in tiles; and files."""

import itertools
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("torchvision")

from ctxops.__main__ import main
from ctxops.models import Encoder, convert, create_model, inference, list_models, segment
from ctxops.models.inference import encode_in_tiles, receptive_radius, standardise
from ctxops.models.predict import overlay
from ctxops.nn.bands import map_in_bands, reach
from harness import peak_memory
from modules import mostly_slow
from networks import NUM_CLASSES, make, network_of, networks


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def bytes_image(height, width, batch=1):
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)


def balanced(name, image):
    """The network in float64. In this image every class has the same mean score."""
    network = network_of(name).double()
    with torch.no_grad():
        scores = network.predict(network.encoder(standardise(image, network))).logits
    mean, deviation = (f((0, 2, 3), keepdim=True) for f in (scores.mean, scores.std))
    network.classifier.register_forward_hook(lambda _, inputs, y: (y - mean) / deviation)
    assert len(segment(network, image).unique()) >= 4
    return network


def logits(network, image):
    with torch.no_grad():
        return network(standardise(image, network)).logits


@pytest.mark.parametrize("name", mostly_slow(list_models(), "ann", "gff", "mcibi", "ocrnet"))
def test_whole(name):
    image = bytes_image(97, 131, batch=2)
    network = balanced(name, image)
    labels = segment(network, image)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, logits(network, image).argmax(1).byte())


def test_standardise():
    network, image = network_of("fcn"), bytes_image(33, 33)
    expected = (image / 255 - 0.5) / 0.5  # of timm's test_resnet
    torch.testing.assert_close(standardise(image, network), expected)
    torch.testing.assert_close(standardise(image / 255, network), expected)
    grey = create_model("fcn", "resnet18", 2, in_channels=1)
    torch.testing.assert_close(standardise(image[:, :1], grey), expected[:, :1])
    colours = create_model("fcn", "resnet18", 2)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    torch.testing.assert_close(standardise(image, colours), (image / 255 - mean) / deviation)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_scales_and_mirror_images(average):
    image = bytes_image(96, 128)
    network = balanced("ann", image)
    total = 0
    for scale, flip in itertools.product((0.5, 1.0, 1.5), (False, True)):
        x = standardise(image, network)
        size = [round(side * scale) for side in (96, 128)]
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
        maps = network.encoder(x.flip(3) if flip else x)
        with torch.no_grad():
            scores = network._resize(network.predict(maps).logits, (96, 128))
        scores = scores.flip(3) if flip else scores
        total = total + (scores.softmax(1) if average == "probabilities" else scores)
    actual = segment(network, image, scales=(0.5, 1.0, 1.5), flip=True, average=average)
    assert torch.equal(actual, total.argmax(1).byte())


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_sliding_windows(average):
    image = bytes_image(100, 150)
    network = balanced("ann", image)
    total, count = torch.zeros(1, NUM_CLASSES, 100, 150), torch.zeros(100, 150)
    for y, x in itertools.product((0, 32, 36), (0, 32, 64, 86)):
        scores = logits(network, image[:, :, y : y + 64, x : x + 64])
        scores = scores.softmax(1) if average == "probabilities" else scores
        total[:, :, y : y + 64, x : x + 64] += scores
        count[y : y + 64, x : x + 64] += 1
    actual = segment(network, image, window=64, context="window", overlap=0.5, average=average)
    assert torch.equal(actual, (total / count).argmax(1).byte())
    assert not torch.equal(actual, segment(network, image))


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_sliding_windows_at_several_scales(average):
    image = bytes_image(60, 80)
    network, total = balanced("fcn", image), 0
    options = {"window": 30, "context": "window", "overlap": 0.4, "average": average}
    for scale, flip in itertools.product((0.6, 1.3), (False, True)):
        x = standardise(image, network)
        x = F.interpolate(x, [round(s * scale) for s in (60, 80)], mode="bilinear", antialias=True)
        x = x.flip(3) if flip else x
        scores, count = torch.zeros(1, NUM_CLASSES, *x.shape[2:]).double(), 0
        height, width = x.shape[2:]
        starts = [[*range(0, side - 30, 18), side - 30] for side in (height, width)]
        for top, left in itertools.product(*starts):
            part = network(x[:, :, top : top + 30, left : left + 30]).logits
            part = part.softmax(1) if average == "probabilities" else part
            around = (left, width - left - 30, top, height - top - 30)
            scores = scores + F.pad(part, around)
            count = count + F.pad(torch.ones(30, 30), around)
        scores = F.interpolate(scores / count, (60, 80), mode="bilinear", align_corners=True)
        total = total + (scores.flip(3) if flip else scores)
    assert network.align_corners
    filled = torch.empty(1, NUM_CLASSES, 60, 80, dtype=torch.float64)
    actual = segment(network, image, scales=(0.6, 1.3), flip=True, probabilities=filled, **options)
    assert torch.equal(actual, total.argmax(1).byte())
    torch.testing.assert_close(
        filled, total / 4 if average == "probabilities" else (total / 4).softmax(1)
    )


@pytest.mark.parametrize("options", [{}, {"window": 64}, {"average": "logits"}, {"flip": True}])
def test_probabilities(options):
    image = bytes_image(70, 90)
    network = balanced("ann", image)
    filled = torch.empty(1, NUM_CLASSES, 70, 90, dtype=torch.float64)
    labels = segment(network, image, probabilities=filled, **options)
    assert torch.equal(labels, segment(network, image, **options))
    assert torch.equal(labels, filled.argmax(1).byte())
    torch.testing.assert_close(filled.sum(1), torch.ones(1, 70, 90, dtype=torch.float64))
    if "flip" not in options:
        torch.testing.assert_close(filled, logits(network, image).softmax(1))


@pytest.mark.parametrize("name", ["ann", *slow("ccnet", "gald", "gcn", "gff", "mcibi")])
def test_tiles_see_the_whole_image(name):
    image = bytes_image(201, 205)
    network = balanced(name, image)
    with torch.no_grad():
        x = standardise(image, network)
        maps = encode_in_tiles(network.encoder, x, 96)
        for actual, expected in zip(maps, network.encoder(x), strict=True):
            torch.testing.assert_close(actual, expected)
    assert torch.equal(segment(network, image, window=96), segment(network, image))


# Networks whose decoders go through the map in bands, with what keeps these narrow.
IN_BANDS = {
    "ann": {},
    "apcnet": {},
    "deeplabv3": {"dilations": (2, 3)},
    "denseaspp": {"dilations": (1, 2), "hidden_channels": 8},
    "fcn": {"convolutions": 2},
    "gald": {},
    "ocrnet": {},
    "pspnet": {},
}


@pytest.mark.parametrize("name", ["ann", *slow(*sorted(IN_BANDS.keys() - {"ann"}))])
def test_decoders_in_bands_see_the_whole_image(name, monkeypatch):
    network = make(name, **IN_BANDS[name]).double()
    image, calls = bytes_image(583, 301), []

    def spy(function, maps, *arguments):
        calls.append(maps[-1].shape[2])
        return map_in_bands(function, maps, *arguments)

    monkeypatch.setattr(inference, "map_in_bands", spy)
    tiles = {"window": 256, "halo": 96}
    whole, tiled = torch.empty(2, 1, NUM_CLASSES, 583, 301, dtype=torch.float64)
    labels = segment(network, image, probabilities=whole)
    assert not calls
    assert torch.equal(segment(network, image, **tiles, probabilities=tiled), labels)
    assert calls == [73]
    torch.testing.assert_close(tiled, whole, rtol=1e-9, atol=1e-12)


@networks
def test_decoders_of_the_whole_map(name):
    assert (reach(network_of(name)) == math.inf) is (name not in IN_BANDS)


@pytest.mark.slow
def test_memory_in_tiles():
    """The peak is that of a tile and what the docstring of segment has for each pixel."""
    network, window, halo = make("ann", channels=32), 128, 64
    with torch.no_grad():
        tile = torch.rand(1, 3, *2 * (window + 2 * halo,))
        of_tile = peak_memory(lambda: (network.encoder(tile)[-1],), torch.device("cpu"))

    def peak(height, width, **options):
        image = bytes_image(height, width)
        return peak_memory(lambda: (segment(network, image, **options),), torch.device("cpu"))

    for height, width in ((384, 512), (512, 1024)):
        channels, strides = network.encoder.channels[-2:], network.encoder.strides[-2:]
        maps = sum(4 * c / s**2 for c, s in zip(channels, strides, strict=True))
        bound = of_tile + height * width * (maps + 8 * NUM_CLASSES / strides[-1] ** 2)
        assert 0.8 * bound <= peak(height, width, window=window, halo=halo) <= 1.2 * bound
    assert peak(512, 1024, window=window, halo=halo) <= peak(512, 1024) / 3


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the variable is glibc's")
def test_resident_memory_in_tiles():
    """That of the process is what the formula says, where what is freed is given back at once."""
    program = Path(__file__).parents[2] / "benchmarks/large_images.py"
    options = "memory --size 512 1024 --window 128 --halo 32".split()
    variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), *options]
    run = subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
    used, bound = map(int, re.findall(r"(\d+) MiB", run.stdout))
    assert 0.8 * bound <= used <= 1.2 * bound


def test_memory_of_sliding_windows(monkeypatch):
    monkeypatch.setattr(inference, "_BAND", 1 << 13)
    network = make("fcn", channels=8, auxiliary_channels=0)

    def peak(height):
        image, options = bytes_image(height, 128), {"window": 64, "context": "window"}
        return peak_memory(lambda: (segment(network, image, **options),), torch.device("cpu"))

    assert peak(1024) <= 1.05 * peak(512)


@pytest.mark.parametrize(
    ("backbone", "stride", "options"),
    [
        ("test_resnet", 8, {}),
        ("test_resnet", 16, {"ceil_mode": True}),
        pytest.param("resnet18", 8, {}, marks=pytest.mark.slow),
        pytest.param("convnext_atto", 32, {}, marks=pytest.mark.slow),
        pytest.param("hrnet_w18_small", 4, {}, marks=pytest.mark.slow),
    ],
)
def test_the_radius_is_what_tiles_need(backbone, stride, options):
    encoder = Encoder(backbone, stride, **options).double().eval()
    for tensor in encoder.parameters():
        if tensor.abs().max() < 1e-3:  # as the gains of residual branches are at the beginning
            torch.nn.init.normal_(tensor)
    radius = receptive_radius(encoder)
    image = torch.rand(1, 3, 2 * radius + 257, 64, dtype=torch.float64)
    with torch.no_grad():
        whole = encoder(image)
        tiled = encode_in_tiles(encoder, image, 128)
        less = encode_in_tiles(encoder, image, 128, halo=32)
    for actual, expected in zip(tiled, whole, strict=True):
        torch.testing.assert_close(actual, expected)
    assert not torch.allclose(less[-1], whole[-1])


def test_the_radius_by_hand():
    """The stem of a ResNet-18, 3 + 2, then 3 x 3 convolutions, some of them with a stride."""
    radius = 3 + 2 + 4 * 4 + (4 + 3 * 8) + (8 + 3 * 16) + (16 + 3 * 32)
    assert receptive_radius(Encoder("resnet18", 32)) == radius


@pytest.mark.parametrize("backbone", ["test_efficientnet", "test_vit", "tf_efficientnet_lite0"])
def test_encoders_that_pool_the_image_are_approximated_on_demand_alone(backbone):
    stride = 16 if "vit" in backbone else 32
    network = create_model(
        "fcn", backbone, 3, output_stride=stride, channels=8, auxiliary_channels=0
    )
    network.eval()
    image = bytes_image(160, 160)
    with pytest.raises(ValueError, match=f"the maps of backbone '{backbone}' depend on the whole"):
        segment(network, image, window=96)
    assert segment(network, image, window=96, halo=32).shape == (1, 160, 160)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 65, "context": "window"}, r"window must be at most the sides .* \(64, 96\), g"),
        ({"overlap": 1.0}, r"overlap must be at least 0 and below 1, got 1\.0"),
        ({"halo": -1}, "halo must be an integer of at least 0, got -1"),
        ({"scales": ()}, r"scales must be numbers above 0, got \(\)"),
        ({"scales": (0.0,)}, "scales must be numbers above 0"),
        ({"context": "all"}, r"context must be one of \('image', 'window'\), got 'all'"),
        ({"average": "max"}, "average must be one of"),
        (
            {"probabilities": torch.empty(1, 2, 64, 96)},
            r"probabilities must have shape \(1, 5, 64, ",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        segment(network_of("fcn"), bytes_image(64, 96), **options)


def test_bad_networks_and_images():
    with pytest.raises(ValueError, match=r"in evaluation mode: call network\.eval\(\)"):
        segment(network_of("fcn").train(), bytes_image(64, 64))
    with pytest.raises(
        TypeError, match=r"image must be uint8, or floating in \[0, 1\], got torch.i"
    ):
        segment(network_of("fcn"), bytes_image(64, 64).int())


@pytest.fixture
def checkpoint(tmp_path):
    """A converted network, as ``ctxops convert`` writes it, and the network."""
    network = make("fcn", channels=8, auxiliary_channels=0)
    arguments = {"backbone": "test_resnet", "num_classes": NUM_CLASSES, "channels": 8}
    arguments["auxiliary_channels"] = 0
    model = convert.ImportedModel("a test", "fcn", arguments, network.state_dict(), [])
    model.save(tmp_path / "fcn.pt")
    return str(tmp_path / "fcn.pt"), network


def test_predict(checkpoint, tmp_path, capsys):
    path, network = checkpoint
    image = bytes_image(40, 60)
    (tmp_path / "more").mkdir()
    for name in ("a.png", "more/b.png"):
        Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / name)
    images = [str(tmp_path / "a.png"), str(tmp_path / "more")]
    out = tmp_path / "new/out"
    assert main(["predict", path, *images, "-o", str(out), "--overlay", "--flip"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(out / "a.png"), str(out / "b.png")]
    expected = segment(network, image, flip=True)[0]
    for name in ("a", "b"):
        labels = Image.open(out / f"{name}.png")
        assert labels.mode == "P"
        assert torch.equal(torch.from_numpy(np.array(labels)), expected)
        assert labels.getpalette()[3:6] == [128, 0, 0]
        assert np.asarray(Image.open(out / f"{name}_overlay.png")).shape == (40, 60, 3)


def test_predict_probabilities(checkpoint, tmp_path):
    path, network = checkpoint
    image = bytes_image(40, 60)
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    out = tmp_path / "out"
    assert main(["predict", path, str(tmp_path / "a.png"), "-o", str(out), "--probabilities"]) == 0
    written = torch.from_numpy(np.load(out / "a_probabilities.npy"))
    torch.testing.assert_close(written, logits(network, image)[0].softmax(0).half())


def test_predict_goes_on_after_a_bad_image(checkpoint, tmp_path, capsys):
    path, _ = checkpoint
    for name, side in (("a", 50), ("b", 30), ("d", 60)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.png").write_bytes(b"no image")
    out = tmp_path / "out"
    options = ["--window", "40", "--context", "window", "--probabilities"]
    assert main(["predict", path, str(tmp_path), "-o", str(out), *options]) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(out / "a.png"), str(out / "d.png")]
    assert "2 of 4 images failed" in printed.err
    assert f"{tmp_path / 'b.png'}: window must be at most the sides of the" in printed.err
    assert f"; {tmp_path / 'c.png'} is no image that can be read" in printed.err
    assert sorted(p.name for p in out.iterdir()) == [
        *("a.png", "a_probabilities.npy", "d.png", "d_probabilities.npy")
    ]


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "I;16"])
def test_predict_of_images_of_any_mode(mode, checkpoint, tmp_path):
    path, _ = checkpoint
    Image.new("RGB" if mode == "P" else mode, (40, 40)).convert(mode).save(tmp_path / "a.png")
    assert main(["predict", path, str(tmp_path / "a.png"), "-o", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out/a.png").size == (40, 40)


def test_overlay():
    image = torch.full((3, 1, 3), 100, dtype=torch.uint8)
    mixed = overlay(image, torch.tensor([[0, 1, 255]]), [(0, 0, 0), (200, 100, 0)])
    assert mixed[:, 0].T.tolist() == [[50, 50, 50], [150, 100, 50], [100, 100, 100]]


def test_predict_fails(checkpoint, tmp_path, capsys):
    path, _ = checkpoint
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / folder / "a.png")
    x, y = (str(tmp_path / folder / "a.png") for folder in ("x", "y"))
    for arguments, message in (
        ([path, "nothing*.png"], "'nothing*.png' is no image, no folder of images and no pattern"),
        ([path, x, y], "would both be written to a.png"),
        ([path, x, "-o", str(tmp_path / "x")], "would be written over: choose another out than"),
        ([x, x, "-o", str(tmp_path)], "is damaged, or neither torch.save"),
        ([path, x, "--context", "window", "--window", "41"], "window must be at most the sides"),
    ):
        assert main(["predict", *arguments]) == 1
        assert message in capsys.readouterr().err
