# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

pytest.importorskip("timm")

from ctxops.models import create_model
from ctxops.nn import representation_consistency_loss
from modules import feature_pyramid, randomise

CONTEXTS = [None, "ppm", "aspp", "ocr", "uper"]


def network(context="aspp", **options):
    model = create_model("mcibi", "test_resnet", 5, context=context, channels=16, **options)
    model.bank.memory.normal_()
    return randomise(model).double()


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"context": "aspp"}, 45_629_440),
        ({"context": None}, 14_816_768),
        ({"context": "aspp", "within_attention": False}, 42_211_328 + 2_496_000),
    ],
)
def test_parameters_of_the_context(options, parameters):
    with torch.device("meta"):
        model = create_model("mcibi", "resnet50", **options)
    parts = [part for part in (model.decoder, model.within) if part is not None]
    assert sum(p.numel() for part in parts for p in part.parameters()) == parameters


def test_heads_are_two_pointwise_layers():
    with torch.device("meta"):
        model = create_model("mcibi", "resnet50", 150, auxiliary_channels=0)
    for head in (model.classifier, model.first_classifier):
        expected = 512 * 512 + 2 * 512 + 512 * 150 + 150
        assert sum(p.numel() for p in head.parameters()) == expected


@pytest.mark.parametrize("context", CONTEXTS)
def test_logits(context):
    # As initialised, for large weights make the attention pick single positions.
    model = create_model("mcibi", "test_resnet", 5, context=context, channels=16)
    model.double().eval().bank.memory.normal_()
    maps = model.encoder(torch.randn(1, 3, 65, 67, dtype=torch.float64))
    x, decoder = maps[-1], model.decoder
    r = decoder.reduce(x)
    first = model.first_classifier(r)
    within = {None: lambda: (), "ocr": lambda: (model.within(x, first),)}
    contexts = within.get(context, lambda: (model.within(x),))()
    y = decoder(r, first, model.bank.memory, *contexts)
    if context == "uper":
        y = feature_pyramid(model.pyramid, *maps[:-1], y)
    expected = model.classifier(y)
    torch.testing.assert_close(model.predict(maps).logits, expected, rtol=1e-9, atol=1e-12)


def test_memory_says_something():
    model = network().eval()
    image = torch.randn(1, 3, 65, 67, dtype=torch.float64)
    before = model(image).logits
    model.bank.memory.normal_()
    assert (model(image).logits - before).abs().max() > 1e-3


def test_outputs_in_training_alone():
    model = network()
    image = torch.randn(2, 3, 65, 67, dtype=torch.float64)
    output = model(image)
    assert set(output.auxiliary) == {"first", "auxiliary"}
    assert output.features.shape == (2, 16, 9, 9)
    assert not output.features.requires_grad
    maps = model.encoder(image)
    torch.testing.assert_close(output.features, model.decoder.reduce(maps[-1]))
    output = model.eval()(image)
    assert output.auxiliary == {}
    assert output.features is None


@pytest.mark.parametrize("update_first", [False, True])
def test_training_step(update_first):
    """As the docstring has it; the update may as well come before the backward."""
    model = network(memory_options={"total_steps": 10, "init": "mean"})
    output = model(torch.randn(2, 3, 65, 67, dtype=torch.float64))
    labels = torch.randint(0, 5, (2, 65, 67))
    if update_first:
        model.bank(output.features, labels)
    bank = model.bank
    consistency = representation_consistency_loss(
        model.classifier, bank.memory, torch.ones_like(bank.initialized)
    )
    logits = [output.logits, *output.auxiliary.values()]
    losses = [torch.nn.functional.cross_entropy(x, labels) for x in logits]
    (sum(losses) + consistency).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if not update_first:
        model.bank(output.features, labels)
    assert bank.initialized.all()
    assert bank.step == 1


def test_memory_is_in_the_state_dict():
    assert {"bank.memory", "bank.step"} <= network().state_dict().keys()


def test_options_reach_the_memory_and_the_decoder():
    memory_options = {"momentum": "constant", "init": "clustering", "cosine": False}
    model = network(
        memory_options=memory_options, fusion="weighted_add", projection_layers=1, hard=True
    )
    bank, decoder = model.bank, model.decoder
    assert (bank.momentum, bank.init, bank.cosine) == ("constant", "clustering", False)
    assert (decoder.fusion, decoder.projection_layers, decoder.hard) == ("weighted_add", 1, True)
    bank = create_model("mcibi", "test_resnet", 5, align_corners=True).bank
    assert (bank.momentum, bank.total_steps, bank.align_corners) == ("poly", 164_190, True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": "nonlocal"}, ValueError, "context must be one of"),
        ({"memory_options": {"momentum": "linear"}}, ValueError, "momentum must be one of"),
        ({"memory_options": {"steps": 3}}, TypeError, "steps"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        create_model("mcibi", "test_resnet", 5, **options)
