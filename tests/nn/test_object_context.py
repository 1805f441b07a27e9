# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import ctxops
from ctxops.nn import ObjectContext
from modules import assert_same, cbr, count, randomise


def formula(module, x, logits):
    pixels = cbr(module.reduce, x)
    belonging = (module.scale * logits).exp()
    belonging = belonging / belonging.sum((2, 3), keepdim=True)
    regions = torch.einsum("bkhw,bchw->bck", belonging, pixels)[..., None]
    query = cbr(module.query, pixels)
    key, value = cbr(module.key, regions)[..., 0], cbr(module.value, regions)[..., 0]
    relations = (torch.einsum("bchw,bck->bkhw", query, key) / query.shape[1] ** 0.5).exp()
    relations = relations / relations.sum(1, keepdim=True)
    context = cbr(module.out, torch.einsum("bkhw,bck->bchw", relations, value))
    return cbr(module.fuse, torch.cat([context, pixels], 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize(
    "arguments", [{}, {"scale": 0.5, "kernel_size": 1, "fuse_kernel_size": 3}], ids=str
)
def test_is_its_formula(arguments, classes, training):
    module = randomise(ObjectContext(7, 5, 3, **arguments)).double().train(training)
    assert (len(module.query), len(module.key), len(module.value)) == (6, 6, 3)
    inputs = [torch.randn(2, 7, 4, 6), torch.randn(2, classes, 4, 6)]
    assert_same(module, inputs, lambda *inputs: formula(module, *inputs))


def test_uses_the_operator(monkeypatch):
    calls = []
    module = __import__("ctxops.nn.object_context", fromlist=["object_context"])

    def attend(query, key, value, **options):
        calls.append(key.shape[2])
        return ctxops.asymmetric_attention(query, key, value, **options)

    monkeypatch.setattr(module, "asymmetric_attention", attend)
    ObjectContext(4, 4, 2)(torch.randn(2, 4, 3, 4), torch.randn(2, 5, 3, 4))
    assert calls == [5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_takes_logits_of_another_dtype_under_autocast(dtype):
    module = randomise(ObjectContext(4, 4, 2)).eval()
    x, logits = torch.randn(2, 4, 3, 4), torch.randn(2, 5, 3, 4)
    expected = module(x, logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x, logits.to(dtype))
    assert (y - expected).norm() < 0.05 * expected.norm()


def test_parameter_count():
    """A 3 x 3 reduction, five layers to or in the keys' width, one back, one over both maps."""
    with torch.device("meta"):
        weights = 2048 * 512 * 9 + 3 * 512 * 256 + 2 * 256 * 256 + 256 * 512 + 1024 * 512
        norms = 2 * (512 + 5 * 256 + 512 + 512)
        assert count(ObjectContext(2048)) == weights + norms
        assert count(ObjectContext(2048, kernel_size=1)) == weights - 2048 * 512 * 8 + norms


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ObjectContext(4, 4, 0), ValueError, "key_channels must be at least 1, got 0"),
        (lambda: ObjectContext(4, scale=None), TypeError, "scale must be a number, got None"),
        (
            lambda: ObjectContext(4, 4, 2)(torch.ones(1, 4, 3, 4), None),
            TypeError,
            r"logits must be a torch\.Tensor, got NoneType",
        ),
        (
            lambda: ObjectContext(4, 4, 2)(torch.ones(1, 4, 3, 4), torch.ones(1, 5, 3, 3)),
            ValueError,
            r"logits must have the height and width of x, \(3, 4\), got \(3, 3\)",
        ),
        (
            lambda: ObjectContext(4, 4, 2)(torch.ones(1, 4, 3, 4), torch.ones(2, 5, 3, 4)),
            ValueError,
            "logits must have the batch and device of x, 1 on cpu, got 2 on cpu",
        ),
        (
            lambda: ObjectContext(4, 4, 2)(torch.ones(1, 4, 3, 4), torch.ones(1, 5, 3, 4).double()),
            TypeError,
            r"logits must have the dtype of x, torch\.float32, got torch\.float64",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
