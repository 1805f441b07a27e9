# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops.nn import AsymmetricNonLocalContext, CommonFusion, FusedContext, SummedFusions
from modules import activate, assert_same, cbr, count, normalise, pool, randomise


def convolve(layer, x):
    return F.conv2d(x, layer.weight, layer.bias)


def embed(embedding, x):
    return activate(convolve(embedding[0], x), embedding[1])


def attend(block, query, context, x, sizes):
    """Eq. 8-11, then W_o, and the fusion up to its norm."""
    key, value = embed(block.key, context), convolve(block.value, context)
    key, value = (torch.cat([pool(y, n).flatten(2) for n in sizes], 2) for y in (key, value))
    weights = (torch.einsum("bchw,bcs->bshw", query, key) / key.shape[1] ** 0.5).softmax(1)
    attended = convolve(block.out, torch.einsum("bshw,bcs->bchw", weights, value))
    convolution, norm = block.fusion[:2]
    return normalise(convolve(convolution, torch.cat([attended, x], 1)), norm)


def formula(module, low, high, sizes):
    fusion, context = module.fusion, module.context
    y = attend(fusion, embed(fusion.query, high), low, high, sizes)
    y = cbr(module.reduce, y, bias=module.reduce[0].bias is not None)
    return attend(context, embed(context.key, y), y, y, sizes).relu()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_is_its_formula(bias, fold, training):
    options = {"key_channels": 4, "value_channels": 2, "output_sizes": (1, 2)}
    module = AsymmetricNonLocalContext(3, 6, 5, **options, bias=bias, fold=fold)
    module = randomise(module).double().train(training)
    inputs = [torch.randn(2, 3, 6, 8), torch.randn(2, 6, 3, 4)]
    assert_same(module, inputs, lambda *inputs: formula(module, *inputs, (1, 2)))


@pytest.mark.parametrize("size", [(3, 4), (6, 8)], ids=str)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_common_fusion(bias, align_corners, size):
    fusion = CommonFusion(3, 6, bias=bias, align_corners=align_corners)
    fusion = randomise(fusion).double()
    convolution, norm, _ = fusion.convolution
    assert (convolution.bias is not None) is bias

    def formula(low, high):
        y = activate(convolve(convolution, low), norm)
        return high + F.interpolate(y, (3, 4), mode="bilinear", align_corners=align_corners)

    assert_same(fusion, [torch.randn(2, 3, *size), torch.randn(2, 6, 3, 4)], formula)


def test_fusions_are_summed():
    module = randomise(SummedFusions([CommonFusion(3, 6), CommonFusion(5, 6)])).double()
    inputs = [torch.randn(2, 3, 6, 8), torch.randn(2, 5, 3, 4), torch.randn(2, 6, 3, 4)]
    assert_same(module, inputs, lambda a, b, high: module[0](a, high) + module[1](b, high))


def test_fused_context_is_its_parts_one_after_the_other():
    fusion, reduce, context = CommonFusion(3, 4), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1)
    low, high = torch.randn(2, 3, 6, 8), torch.randn(2, 4, 3, 4)
    module = FusedContext(fusion, reduce, context).eval()
    torch.testing.assert_close(module(low, high), context(reduce(fusion(low, high))))
    torch.testing.assert_close(FusedContext(None, reduce, None)(high), reduce(high))
    assert {name.split(".")[0] for name in module.state_dict()} == {"fusion", "reduce", "context"}


def test_dropout_follows_the_fusion():
    module, seen = FusedContext(None, nn.Identity(), None, dropout=0.5), []
    module.reduce.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    module(torch.ones(4, 100, 2, 2))
    dropped = (seen[0] == 0).all(dim=(2, 3))
    assert 0.3 < dropped.float().mean() < 0.7
    assert (seen[0][~dropped] == 2).all()


def test_hands_its_options_on():
    module = AsymmetricNonLocalContext(
        3, 6, 5, key_channels=2, value_channels=4, fuse="add", variant="paper", sampling="max",
        fold=False,
    )  # fmt: skip
    for block in (module.fusion, module.context):
        assert (block.key_channels, block.value_channels, block.fuse) == (2, 4, "add")
        assert (block.variant, block.sampling, block.fold) == ("paper", "max", False)
    assert module(torch.randn(2, 3, 4, 4), torch.randn(2, 6, 4, 4)).shape == (2, 5, 4, 4)


def test_parameter_counts():
    with torch.device("meta"):
        assert count(AsymmetricNonLocalContext(1024, 2048, bias=False)) == 20_323_840
        biases = (256 * 3 + 2048 + 2048) + 512 + (256 * 2 + 512 + 512)
        assert count(AsymmetricNonLocalContext(1024, 2048)) == 20_323_840 + biases


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: AsymmetricNonLocalContext(0, 4),
            ValueError,
            "low_channels must be at least 1, got 0",
        ),
        (
            lambda: AsymmetricNonLocalContext(4, 4, fuse="no"),
            ValueError,
            r"fuse must be one of \(None, 'add', 'concat'\), got 'no'",
        ),
        (
            lambda: AsymmetricNonLocalContext(4, 6)(torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2)),
            ValueError,
            r"high must have shape \(B, 6, H, W\), got \(1, 4, 2, 2\)",
        ),
        (
            lambda: CommonFusion(4, 6)(torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2)),
            ValueError,
            r"high must have shape \(B, 6, H, W\), got \(1, 4, 2, 2\)",
        ),
        (
            lambda: SummedFusions([CommonFusion(4, 6)])(torch.ones(1, 4, 2, 2)),
            ValueError,
            "maps must be 1 and the last level's, got 1",
        ),
        (
            lambda: FusedContext("afnb", None, None),
            TypeError,
            "fusion must be Module or None, got str",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
