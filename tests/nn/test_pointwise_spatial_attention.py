# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

from ctxops.nn import ConcatContext, PointwiseSpatialAttention
from modules import assert_same, cbr, count, randomise


def predict(mask, x):
    return torch.einsum("oi,bihw->bohw", mask[1].weight.flatten(1), cbr(mask[0], x))


def formula(module, x):
    """Position by position, offset by offset."""
    factor, align_corners = module.shrink_factor, module.align_corners
    size = [(extent - 1) // factor + 1 for extent in x.shape[2:]]
    border = module.variant == "mmsegmentation"
    if border and factor > 1:
        align_corners = all(extent % factor for extent in x.shape[2:])
        if not align_corners:
            size = [extent // factor for extent in x.shape[2:]]
    options = {"mode": "bilinear", "align_corners": align_corners}
    reduced = [cbr(r, x) for r in (module.reduce_collect, module.reduce_distribute)]
    if size != list(x.shape[2:]):
        reduced = [F.interpolate(y, size, **options) for y in reduced]
    masks = [
        predict(m, y).unflatten(1, module.mask_size)
        for m, y in zip((module.collect, module.distribute), reduced, strict=True)
    ]
    middle = [(extent - 1) // 2 for extent in module.mask_size]
    positions = [(h, w) for h in range(size[0]) for w in range(size[1])]

    def logit(mask, at, towards):
        offset = [t - a + m for t, a, m in zip(towards, at, middle, strict=True)]
        if all(0 <= o < extent for o, extent in zip(offset, module.mask_size, strict=True)):
            return mask[:, offset[0], offset[1], at[0], at[1]]
        return torch.zeros_like(mask[:, 0, 0, 0, 0])

    sums = [[], []]
    for i in positions:
        logits = (
            torch.stack([logit(masks[0], i, j) for j in positions], 1),
            torch.stack([logit(masks[1], j, i) for j in positions], 1),
        )
        for kind in (0, 1):
            weights = logits[kind].softmax(1)
            sums[kind].append(torch.einsum("bj,bcj->bc", weights, reduced[kind].flatten(2)))
    context = torch.cat([torch.stack(s, 2).unflatten(2, size) for s in sums], 1)
    y = cbr(module.out, F.pad(context, (1, 1, 1, 1)) if border else context)
    if border or size != list(x.shape[2:]):
        y = F.interpolate(y, x.shape[2:], **options)
    return y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("mask_size", "shrink_factor"), [((5, 7), 1), ((3, 3), 1), ((3, 5), 2), ((9, 9), 2)], ids=str
)
def test_is_its_formula(mask_size, shrink_factor, training):
    module = PointwiseSpatialAttention(5, 4, mask_size, shrink_factor=shrink_factor)
    module = randomise(module).double().train(training)
    assert_same(module, [torch.randn(2, 5, 3, 4)], lambda x: formula(module, x))


@pytest.mark.parametrize("mask_size", [(3, 5), (4, 2)], ids=str)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    ("size", "shrink_factor"), [((3, 4), 1), ((3, 5), 2), ((3, 4), 2), ((7, 5), 3)], ids=str
)
def test_variant_of_mmsegmentation(size, shrink_factor, align_corners, mask_size):
    options = {"shrink_factor": shrink_factor, "align_corners": align_corners}
    module = PointwiseSpatialAttention(5, 4, mask_size, variant="mmsegmentation", **options)
    module = randomise(module).double().eval()
    assert_same(module, [torch.randn(2, 5, *size)], lambda x: formula(module, x))


def test_parameter_count():
    """The head of PSANet for 2048 x 1024 pixels, its classifier apart."""
    with torch.device("meta"):
        psa = PointwiseSpatialAttention(2048, 512, (257, 129))
        head = ConcatContext(psa, 2048, 2048, 512)
    attention = 2048 * 512 + 512 * 512 + 4 * 512 + 512 * 257 * 129
    assert count(psa) == 2 * attention + 1024 * 2048 + 2 * 2048
    assert count(head) == count(psa) + 4096 * 512 * 9 + 2 * 512


def test_says_what_it_is():
    """The masks of the released networks reach all of a map of 97 x 97, halved to 49 x 49."""
    assert "mask_size=(97, 97)" in repr(PointwiseSpatialAttention(4, 4))
    text = repr(PointwiseSpatialAttention(4, 4, (3, 5)))
    assert "mask_size=(3, 5), shrink_factor=2, align_corners=True" in text


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: PointwiseSpatialAttention(4, 4, 5),
            TypeError,
            "mask_size must be a height and a width, got 5",
        ),
        (
            lambda: PointwiseSpatialAttention(4, 4, (3, 4)),
            ValueError,
            r"mask_size\[1\] must be odd and at least 1, got 4",
        ),
        (
            lambda: PointwiseSpatialAttention(4, 4, shrink_factor=0),
            ValueError,
            "shrink_factor must be at least 1, got 0",
        ),
        (
            lambda: PointwiseSpatialAttention(4, 4, variant="mmseg"),
            ValueError,
            r"variant must be one of \('released', 'mmsegmentation'\), got 'mmseg'",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
