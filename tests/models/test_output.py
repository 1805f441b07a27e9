# SPDX-License-Identifier: Apache-2.0
"""What a network returns, as other tools look at it."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

pytest.importorskip("timm")

from ctxops.models import LogitsOnly, SegmentationOutput
from networks import images, network_of, traceable


@pytest.fixture
def output():
    logits, head = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    return SegmentationOutput(logits, {"auxiliary": head})


def assert_same(a, b):
    assert type(a) is SegmentationOutput
    assert list(a) == list(b)
    assert torch.equal(a.logits, b.logits)
    assert a["logits"] is a.logits
    assert a.auxiliary.keys() == b.auxiliary.keys()
    assert a.features is b.features is None


def test_is_a_dictionary_of_what_it_holds(output):
    assert dict(**output) == {"logits": output.logits, "auxiliary": output.auxiliary}
    assert output["logits"] is output[0] is output[-2] is output.logits
    assert output.to_tuple() == output[:] == (output.logits, output.auxiliary)
    assert list(SegmentationOutput(output.logits)) == ["logits"]
    with pytest.raises(KeyError, match="features"):
        output["features"]


@pytest.mark.parametrize("change", ["attribute", "item", "update"])
def test_attributes_and_items_are_one(output, change):
    features = torch.ones(1)
    if change == "attribute":
        output.features = features
    elif change == "item":
        output["features"] = features
    else:
        output.update(features=features)
    assert output.features is output["features"] is output[2] is features
    output.features = None
    assert "features" not in output
    with pytest.raises(KeyError, match="'logit'; an output has logits, auxiliary, features"):
        output["logit"] = features


@pytest.mark.parametrize(
    ("change", "held"),
    [
        (lambda y: y.pop("auxiliary"), ["logits"]),
        (lambda y: y.pop("features", None), ["logits", "auxiliary"]),
        (lambda y: y.__delitem__("logits"), ["auxiliary"]),
        (lambda y: y.clear(), []),
        (lambda y: y.setdefault("features", torch.ones(1)), ["logits", "auxiliary", "features"]),
        (lambda y: y.__ior__({"features": torch.ones(1)}), ["logits", "auxiliary", "features"]),
        (lambda y: setattr(y, "loss", torch.ones(1)), ["logits", "auxiliary"]),
    ],
    ids=["pop", "pop_nothing", "del", "clear", "setdefault", "union", "another_attribute"],
)
def test_every_change_of_the_dictionary_is_one_of_the_attributes(output, change, held):
    change(output)
    assert list(output) == held
    for name in ("logits", "auxiliary", "features"):
        attribute = getattr(output, name)
        assert output[name] is attribute if name in held else attribute in (None, {})


def test_holds_what_a_tool_makes_of_its_tensors(output):
    shapes = pytree.tree_map(lambda tensor: tensor.shape, output)
    assert shapes["logits"] == shapes.auxiliary["auxiliary"] == output.logits.shape
    arrays = pytree.tree_map(torch.Tensor.numpy, output)
    assert arrays["logits"].shape == output.logits.shape


def test_stays_a_dataclass(output):
    names = [field.name for field in dataclasses.fields(output)]
    assert names == ["logits", "auxiliary", "features"]
    doubled = dataclasses.replace(output, logits=2 * output.logits)
    assert torch.equal(doubled["logits"], 2 * output.logits)


@pytest.mark.parametrize(
    "rebuild",
    [
        lambda y: type(y)(y),
        lambda y: type(y)(y.items()),
        lambda y: type(y)((k, v) for k, v in y.items()),
        copy.copy,
        copy.deepcopy,
        lambda y: pickle.loads(pickle.dumps(y)),
        lambda y: pytree.tree_map(torch.clone, y),
    ],
    ids=["mapping", "items", "pairs", "copy", "deepcopy", "pickle", "pytree"],
)
def test_is_rebuilt(output, rebuild):
    assert_same(rebuild(output), output)


def test_tracing():
    network, image, other = network_of("fcn"), images(33, 37), images(41, 35)
    traced = torch.jit.trace(network, image, strict=False, check_trace=False)
    torch.testing.assert_close(traced(other)["logits"].shape, network(other).logits.shape)
    traced = torch.jit.trace(LogitsOnly(network), image, check_trace=False)
    torch.testing.assert_close(traced(image), network(image).logits)


@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
def test_compiled_and_exported(training):
    network, image = traceable("pspnet").train(training), images(33, 37, batch=2)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    outputs = [network(image), compiled(image)]
    if not training:
        outputs.append(torch.export.export(network, (image,)).module()(image))
    for output in outputs:
        assert type(output) is SegmentationOutput
        assert output["logits"] is output.logits
        assert list(output) == ["logits", "auxiliary"][: 1 + training]
