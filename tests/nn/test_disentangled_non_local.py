# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops.nn import ConcatContext, DisentangledNonLocal
from ctxops.nn.cbr import cbr
from modules import assert_same, count, normalise, randomise


def formula(block, x):
    def project(layer):
        y = torch.einsum("oi,bihw->bohw", layer.weight.flatten(1), x)
        return (y + layer.bias[:, None, None]).flatten(2)

    query, key, value, mask = map(project, (block.query, block.key, block.value, block.mask))
    query, key = (p - p.mean(2, keepdim=True) for p in (query, key))
    affinity = torch.einsum("bci,bcj->bij", query, key) / block.temperature
    if block.use_scale:
        affinity = affinity / block.key_channels**0.5
    weights = affinity.softmax(2) + mask.softmax(2)
    attended = torch.einsum("bij,bcj->bci", weights, value).unflatten(2, x.shape[2:])
    convolution, norm = block.out
    assert convolution.bias is None
    return x + normalise(F.conv2d(attended, convolution.weight), norm)


@pytest.mark.parametrize("size", [(5, 4), (1, 7)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "arguments", [{}, {"temperature": 2}, {"key_channels": 5, "use_scale": False}], ids=str
)
def test_is_its_formula(arguments, training, size):
    block = randomise(DisentangledNonLocal(6, **arguments)).double().train(training)
    assert_same(block, [torch.randn(2, 6, *size)], lambda x: formula(block, x))


def test_starts_as_the_identity():
    block, x = DisentangledNonLocal(16), torch.randn(2, 16, 5, 4)
    assert torch.equal(block(x), x)
    assert "the norm's gain starts at zero" in repr(block)
    assert (block.key_channels, block.temperature, block.use_scale) == (8, 0.05, True)


def test_parameter_count():
    with torch.device("meta"):
        layers = [cbr(2048, 512, 3, nn.BatchNorm2d), DisentangledNonLocal(512)]
        layers.append(cbr(512, 512, 3, nn.BatchNorm2d))
        head = ConcatContext(nn.Sequential(*layers), 2048, 512, 512)
    assert count(head) == 24_122_625


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: DisentangledNonLocal(8, 0),
            ValueError,
            "key_channels must be at least 1, got 0",
        ),
        (
            lambda: DisentangledNonLocal(8, temperature="1"),
            TypeError,
            "temperature must be a number, got '1'",
        ),
        (
            lambda: DisentangledNonLocal(8, temperature=0),
            ValueError,
            "temperature must be positive, got 0",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
