# SPDX-License-Identifier: Apache-2.0
"""From images to classes: whole, in windows, at several scales, in tiles; and files."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

pytest.importorskip("torchvision")

from ctxops.__main__ import main
from ctxops.models import Encoder, convert, create_model, segment
from ctxops.models.inference import encode_in_tiles, receptive_radius, standardise
from ctxops.models.predict import overlay
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


@networks
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
        ([x, x, "-o", str(tmp_path)], "is no file of tensors and plain values"),
        ([path, x, "--context", "window", "--window", "41"], "window must be at most the sides"),
    ):
        assert main(["predict", *arguments]) == 1
        assert message in capsys.readouterr().err
