# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF012 (nobody writes to what a contract declares)
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import ctxops
from ctxops.ops.category_statistics.reference import reference
from numerics import LAYOUTS, assert_close
from ops.contract import OF_GRADIENTS, OperatorContract

# Of the features (B, C, h, w), then of the labels (H, W).
SHAPES = [
    ((1, 1, 1, 1), (1, 1)),
    ((1, 3, 1, 1), (9, 14)),
    ((2, 5, 1, 7), (6, 20)),
    ((1, 9, 6, 1), (31, 5)),
    ((2, 16, 7, 11), (7, 11)),
    ((2, 19, 9, 8), (71, 65)),
    ((1, 40, 13, 10), (6, 4)),  # labels coarser than the map
    ((1, 8, 5, 12), (3, 97)),
    ((2, 513, 10, 67), (41, 130)),  # more than one tile
    ((3, 4, 17, 3), (34, 6)),
]
LABELS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
IGNORED = 255


def make(shape, size, classes=5, dtype=torch.float32, device="cpu", block=1):
    """Features, labels in blocks with some ignored, and a memory with a row of zeros."""
    height, width = (-(-extent // block) for extent in size)
    labels = torch.randint(0, classes, (shape[0], height, width))
    labels[torch.rand(labels.shape) < 0.1] = IGNORED
    labels = labels.repeat_interleave(block, 1).repeat_interleave(block, 2)
    memory = torch.randn(classes, shape[1])
    memory[-1] = 0
    features = torch.randn(shape)
    labels = labels[:, : size[0], : size[1]].contiguous()
    return features.to(device, dtype), labels.to(device), memory.to(device, dtype)


def check(features, labels, memory, classes=None, ignore_index=IGNORED, align_corners=False):
    options = {"ignore_index": ignore_index, "align_corners": align_corners}
    classes = len(memory) if classes is None else classes
    results = ctxops.category_statistics(features, labels, memory, num_classes=classes, **options)
    plain = partial(reference, num_classes=classes, **options)
    same = plain(features, labels, memory)
    exact = plain(features.double(), labels, None if memory is None else memory.double())
    assert_close(results[0], same[0], exact[0], "sums")
    assert_close(results[1], same[1], exact[1], "weights")
    assert results[2].dtype == torch.int64
    assert torch.equal(results[2], exact[2])


FEATURES, LABEL_MAP = torch.ones(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64)


class TestCategoryStatistics(OperatorContract):
    name = "category_statistics"
    cases = [(*sizes, 5, 3) for sizes in SHAPES]
    # align_corners, and is there a memory?
    modes = {
        f"{name}{'' if memory else '_without_memory'}": (align_corners, memory)
        for name, align_corners in (("aligned", True), ("not_aligned", False))
        for memory in (True, False)
    }
    constants = (0, 1, 2)
    drawn = st.tuples(
        st.tuples(
            st.tuples(*(st.integers(1, n) for n in (3, 40, 20, 20))),
            st.tuples(st.integers(1, 60), st.integers(1, 60)),
            st.integers(1, 40),
            st.integers(1, 9),
        ),
        st.tuples(st.booleans(), st.just(True)),
    )
    valid = {"features": FEATURES, "labels": LABEL_MAP, "num_classes": 5}
    # 32 positions of 3 channels: once, with a memory seven times
    products = (
        ({}, {"category_statistics": 192}),
        ({"memory": torch.ones(5, 3)}, {"category_statistics": 1344}),
    )
    errors = (
        ({"features": [1.0]}, TypeError, "features must be a torch.Tensor, got list"),
        ({"features": FEATURES.long()}, TypeError, "features must be float32.*int64"),
        ({"features": FEATURES[0]}, ValueError, r"features must have shape \(B, C, H, W\)"),
        ({"labels": [0]}, TypeError, "labels must be a torch.Tensor, got list"),
        ({"labels": LABEL_MAP.float()}, TypeError, "labels must be .* int64, got .*float32"),
        ({"labels": LABEL_MAP.bool()}, TypeError, "labels must be .* int64, got .*bool"),
        ({"labels": LABEL_MAP.to_sparse()}, TypeError, "labels must be strided.*sparse"),
        (
            {"labels": LABEL_MAP[:1]},
            ValueError,
            r"labels must have shape \(B, H, W\) = \(2, any, any\).* got \(1, 8, 8\)",
        ),
        ({"labels": LABEL_MAP[:, :0]}, ValueError, r"labels must have .* got \(2, 0, 8\)"),
        ({"labels": LABEL_MAP[:, None]}, ValueError, r"labels must have .* got \(2, 1, 8, 8\)"),
        ({"labels": LABEL_MAP.to("meta")}, ValueError, "labels must be on the device cpu"),
        ({"num_classes": None}, ValueError, "num_classes must be given without a memory"),
        ({"num_classes": 0}, ValueError, r"num_classes must be in \[1.*got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an integer"),
        ({"num_classes": True}, TypeError, "num_classes must be an integer"),
        (
            {"memory": torch.ones(5, 4)},
            ValueError,
            r"memory must have shape \(K, C\) = \(5, 3\), got \(5, 4\)",
        ),
        (
            {"memory": torch.ones(5, 4), "num_classes": None},
            ValueError,
            r"memory must have shape \(K, C\) = \(any, 3\), got \(5, 4\)",
        ),
        (
            {"memory": torch.ones(0, 3), "num_classes": None},
            ValueError,
            "memory must have at least one",
        ),
        (
            {"memory": torch.ones(5, 3), "num_classes": 4},
            ValueError,
            r"memory must have shape \(K, C\) = \(4, 3\), got \(5, 3\)",
        ),
        ({"memory": torch.ones(5, 3).long()}, TypeError, "memory must be float32"),
        (
            {"memory": torch.ones(5, 3, device="meta")},
            ValueError,
            "memory must be on the device cpu, got meta",
        ),
        ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got None"),
    )
    without = dict.fromkeys(OF_GRADIENTS, "its results are constants") | {
        "test_transforms_of_torch_func": "the range of the labels is looked at",
        "test_maps_of_different_layouts": "it takes one map",
        "test_the_first_map_decides_on_the_memory_format": "it gives no map",
    }

    def case(self, batch, channels, height, width):
        return (batch, channels, height, width), (4 * height + 5, 3 * width + 2), 5, 4

    def make(self, case, mode, **options):
        shape, size, classes, block = case
        *inputs, memory = make(shape, size, classes, block=block, **options)
        return [*inputs, memory if mode[1] else None]

    def functions(self, case, mode):
        options = {"num_classes": case[2], "ignore_index": IGNORED, "align_corners": mode[0]}
        return partial(ctxops.category_statistics, **options), partial(reference, **options)

    def check(self, inputs, case, mode):
        check(*inputs, classes=case[2], align_corners=mode[0])

    def opchecks(self, inputs, case, mode):
        yield "category_statistics", (*inputs, case[2], IGNORED, mode[0])


@pytest.mark.parametrize("align_corners", [False, True])
def test_reference_is_the_papers_procedure(align_corners):
    features, labels, memory = make((2, 6, 4, 5), (13, 18), dtype=torch.float64)
    resized = F.interpolate(features, (13, 18), mode="bilinear", align_corners=align_corners)
    sums, weights, counts = reference(features, labels, memory, 5, IGNORED, align_corners)
    for k in range(5):
        own = [resized[b, :, y, x] for b, y, x in (labels == k).nonzero().tolist()]
        cosines = [F.cosine_similarity(r, memory[k], dim=0) for r in own]
        torch.testing.assert_close(
            sums[k], sum((1 - s) * r for s, r in zip(cosines, own, strict=True))
        )
        torch.testing.assert_close(weights[k], sum(1 - s for s in cosines))
        assert counts[k] == len(own)


def test_strided_labels_and_memory(device):
    features, labels, memory = make((2, 20, 9, 14), (40, 50), device=device)
    for strided in (labels.mT.contiguous().mT, labels.repeat_interleave(2, 2)[..., ::2]):
        check(features, strided, memory.t().contiguous().t())
    check(features, labels[:1, :, :1].expand(2, 40, 50), memory)
    check(features.double(), labels, memory.double().t().contiguous().t())


@pytest.mark.parametrize("dtype", LABELS, ids=str)
def test_labels_of_every_integer_dtype(dtype, device):
    features, labels, memory = make((2, 20, 9, 14), (40, 50), device=device)
    ignored = 255 if dtype == torch.uint8 else -1
    labels = labels.masked_fill(labels == IGNORED, ignored).to(dtype)
    check(features, labels, memory, ignore_index=ignored)


def test_many_classes(device):
    features, labels, memory = make((1, 24, 30, 40), (120, 160), 1000, device=device)
    check(features, labels.masked_fill(labels == IGNORED, 254), memory, ignore_index=-1)


def test_a_map_in_several_parts(device):
    """Sums of parts are added; also where a class is missing in some of them."""
    features, labels, memory = make((3, 8, 40, 6), (80, 12), device=device, block=6)
    labels[0, :30] = 0
    labels[1:, 20:] = 3
    check(features, labels, memory)


def test_an_ignored_class_of_the_memory(device):
    features, labels, memory = make((1, 8, 4, 4), (16, 16), device=device)
    check(features, labels.masked_fill(labels == IGNORED, 2), memory, ignore_index=2)


@pytest.mark.parametrize("memory", [True, False])
def test_everything_ignored(memory, device):
    features, labels, rows = make((2, 8, 4, 4), (16, 16), device=device)
    labels = torch.full_like(labels, IGNORED)
    results = ctxops.category_statistics(
        features * torch.nan, labels, rows if memory else None, num_classes=5
    )
    assert [x.shape for x in results] == [(5, 8), (5,), (5,)]
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results)


def test_a_row_of_zeros_gives_a_plain_mean(device):
    features, labels, memory = make((2, 8, 4, 4), (16, 16), device=device)
    sums, weights, counts = ctxops.category_statistics(features, labels, memory)
    plain = ctxops.category_statistics(features, labels, num_classes=5)
    assert torch.equal(weights[-1], counts[-1].float())
    assert torch.equal(plain[1], counts.float())
    torch.testing.assert_close(sums[-1], plain[0][-1])


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-3, 1e15], ids=str)
def test_short_and_long_vectors(scale, device):
    """Vectors shorter than cosine_similarity's eps count as that long."""
    features, labels, memory = make((2, 8, 4, 4), (16, 16), device=device)
    check(features * scale, labels, memory)
    check(features, labels, memory * scale)


def test_neighbours_that_cancel(device):
    """Halfway between f and -f lies zero, and near it vectors far shorter than theirs."""
    features, labels, memory = make((1, 16, 6, 6), (90, 90), device=device)
    sign = 1 - 2 * ((torch.arange(6)[:, None] + torch.arange(6)) % 2)
    features = features[..., :1, :1] * sign.to(features)
    check(features, labels, memory)


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e12], ids=str)
def test_weights_are_of_cosines_where_neighbours_cancel(scale, device):
    """Rounding the neighbours leaves of their sum a part that their products do not resolve."""
    direction = torch.tensor([0.5, -1.3, 0.7, 2.1], device=device) * scale
    labels = torch.arange(40, device=device)[None, None]
    memory = torch.tensor([[0.3, -0.9, 1.7, 0.4]], device=device).expand(40, 4)
    for first in range(1, 39):
        opposite = -(39 - first) / first * direction
        features = torch.stack([direction, opposite], dim=1)[None, :, None]
        _, weights, _ = ctxops.category_statistics(features, labels, memory, align_corners=True)
        assert ((weights >= 0) & (weights <= 2)).all()


def test_vectors_along_their_memory(device):
    """1 - cos of parallel vectors is zero but for rounding."""
    memory = torch.randn(3, 32, device=device)
    labels = torch.tensor([[[0, 1, 2]]], device=device).repeat_interleave(4, 2)
    features = (2 * memory.t())[None, :, None]
    features = features.repeat_interleave(4, 3)
    sums, weights, counts = ctxops.category_statistics(features, labels, memory)
    assert (weights.abs() <= 1e-6).all()
    assert torch.equal(counts, torch.full_like(counts, 4))
    assert (sums.abs() <= 1e-5).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_values_that_are_not_finite_stay_in_their_classes(value, layout, device):
    features, labels, memory = make((1, 6, 5, 5), (25, 25), 5, device=device)
    labels[:] = 4
    labels[:, 15:] = 1
    features[0, 2, 1, 3] = value
    sums, weights, counts = ctxops.category_statistics(LAYOUTS[layout](features), labels, memory)
    assert not sums[4, 2].isfinite()
    assert sums[1].isfinite().all()
    assert weights[1].isfinite()
    assert torch.equal(counts[[1, 4]], torch.tensor([250, 375], device=device))
    plain = ctxops.category_statistics(LAYOUTS[layout](features), labels, num_classes=5)
    assert plain[0][4].isfinite().tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_values_that_are_not_finite_stay_in_their_pixel_at_equal_sizes(layout, device):
    features = torch.randn(1, 3, 6, 7, device=device)
    features[0, :, 2, 3] = torch.nan
    labels = torch.arange(42, device=device).view(1, 6, 7)
    for memory in (torch.randn(42, 3, device=device), None):
        sums, weights, _ = ctxops.category_statistics(
            LAYOUTS[layout](features), labels, memory, num_classes=42
        )
        assert sums.isnan().any(1).nonzero().tolist() == [[2 * 7 + 3]]
        assert weights.isnan().sum() == (memory is not None)


@pytest.mark.parametrize("active", [True, False])
def test_labels_of_eight_bits_outside_of_their_range(active):
    features, labels, _ = make((2, 8, 4, 4), (16, 16))
    with ctxops.use_reference() if active else torch.no_grad():
        ignored = labels.masked_fill(labels == IGNORED, 0).to(torch.int8)
        ignored[0, 0, 0] = -1
        with pytest.raises(ValueError, match=r"labels must be in .* got -1"):
            ctxops.category_statistics(features, ignored, num_classes=5)
        _, _, counts = ctxops.category_statistics(
            features, labels.to(torch.uint8), num_classes=300, ignore_index=-1
        )
        assert counts.sum() == labels.numel()


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("finer", [(1, 1), (3, 1), (1, 3)], ids=str)
def test_values_that_are_not_finite_stay_in_their_line(finer, align_corners, memory, device):
    """Along an axis on which the labels are as fine as the map, no position has a neighbour."""
    features, _, _ = make((1, 6, 5, 5), (1, 1), device=device)
    features[0, :, 1, 3] = torch.nan
    line = torch.arange(5, device=device)
    line = line[:, None].expand(5, 5) if finer == (1, 3) else line.expand(5, 5)
    labels = line.repeat_interleave(finer[0], 0).repeat_interleave(finer[1], 1)[None]
    rows = torch.randn(5, 6, device=device) if memory else None
    sums, _, _ = ctxops.category_statistics(
        features, labels, rows, num_classes=5, align_corners=align_corners
    )
    met = 1 if finer == (1, 3) else 3
    assert sums.isnan().any(1).tolist() == [k == met for k in range(5)]


@pytest.mark.parametrize("label", [5, 254, -1, -(2**40)], ids=str)
def test_labels_outside(label):
    features, labels, memory = make((2, 8, 4, 4), (16, 16))
    labels[1, 3, 9] = label
    message = rf"labels must be in \[0, 5\) or ignore_index = 255, got {label}"
    for context in (torch.no_grad(), ctxops.use_reference()):
        with context, pytest.raises(ValueError, match=message):
            ctxops.category_statistics(features, labels, memory)


def test_names_the_first_label_outside_of_several_parts():
    features, labels, memory = make((3, 8, 40, 6), (80, 12))
    labels[0, 0, 0] = 7
    with pytest.raises(ValueError, match=r"got 7$"):
        ctxops.category_statistics(features, labels, memory)
    labels[1, 40, 3] = 9
    with pytest.raises(ValueError, match=r"got 7$"):
        ctxops.category_statistics(features, labels, memory)


@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index"),
    [(torch.uint8, 255, -1), (torch.int8, -1, 255), (torch.int16, -1, 2**40)],
    ids=str,
)
def test_labels_outside_of_narrow_dtypes(dtype, label, ignore_index):
    """Neither what is ignored nor the number of classes need fit the dtype."""
    features, labels, memory = make((2, 8, 4, 4), (16, 16))
    labels = labels.masked_fill(labels == IGNORED, 0).to(dtype)
    rows = torch.randn(300, 8)
    for context in (torch.no_grad(), ctxops.use_reference()):
        with context:
            ctxops.category_statistics(features, labels, rows, ignore_index=ignore_index)
            labels[1, 3, 9] = label
            with pytest.raises(ValueError, match=rf"ignore_index = {ignore_index}, got {label}"):
                ctxops.category_statistics(features, labels, memory, ignore_index=ignore_index)
            labels[1, 3, 9] = 0


@pytest.mark.parametrize("label", [5, -1], ids=str)
def test_reference_of_labels_outside(label, device):
    """Where nobody may look: no memory is read with it."""
    features, labels, memory = make((2, 8, 4, 4), (16, 16), device=device)
    _, _, counts = reference(features, labels, memory, 5, IGNORED, False)
    first = labels[1, 3, 9].item()
    labels[1, 3, 9] = label
    sums, weights, found = reference(features, labels, memory, 5, IGNORED, False)
    assert sums.isnan().all()
    assert weights.isnan().all()
    counts[first] -= 1
    assert torch.equal(found, counts)


@pytest.mark.cuda
@pytest.mark.parametrize("label", [5, -1], ids=str)
def test_labels_outside_on_cuda(label):
    features, labels, memory = make((2, 8, 4, 4), (16, 16), device="cuda")
    labels[1, 3, 9] = label
    for rows in (memory, None):
        sums, weights, _ = ctxops.category_statistics(features, labels, rows, num_classes=5)
        assert sums.isnan().all()
        assert weights.isnan().all()


@pytest.mark.parametrize("classes", [19, 171])
def test_errs_at_most_twice_as_much_as_the_released_procedure(classes, device):
    """On the mean of every class, against float64."""
    features, labels, memory = make((2, 128, 16, 32), (128, 256), classes, device=device, block=4)

    def released(dtype):
        resized = F.interpolate(features.to(dtype), labels.shape[1:], mode="bilinear")
        pixels = resized.permute(0, 2, 3, 1).flatten(0, 2)
        means = []
        for k in range(classes):
            own, row = pixels[labels.flatten() == k], memory[k].to(dtype)
            weights = 1 - F.cosine_similarity(own, row.expand_as(own), dim=1)
            means.append(((weights / weights.sum())[:, None] * own).sum(dim=0))
        return torch.stack(means)

    exact = released(torch.float64)
    sums, weights, counts = ctxops.category_statistics(features, labels, memory)
    assert counts.min() > 0
    error = (sums / weights[:, None] - exact).norm(dim=1)
    assert (error <= 2 * (released(torch.float32) - exact).norm(dim=1)).all()


def test_results_are_constants(device):
    features, labels, memory = make((2, 8, 4, 5), (16, 16), device=device)
    features.requires_grad_()
    memory.requires_grad_()
    for result in ctxops.category_statistics(features, labels, memory):
        assert not result.requires_grad
    with ctxops.use_reference():
        for result in ctxops.category_statistics(features, labels, memory):
            assert not result.requires_grad


def test_features_and_memory_may_differ_in_dtype(device):
    features, labels, memory = make((2, 8, 4, 5), (16, 16), device=device)
    features = features.bfloat16()
    results = ctxops.category_statistics(features, labels, memory)
    expected = ctxops.category_statistics(features.float(), labels, memory)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
