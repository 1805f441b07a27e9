# SPDX-License-Identifier: Apache-2.0
import copy
import datetime
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ctxops.nn import FeatureMemory
from ctxops.nn.feature_memory import _largest_cluster
from modules import mostly_slow

INITS = ["random", "mean", "clustering"]
K, C, IGNORED = 5, 6, 255
ROUNDING = {"rtol": 2e-6, "atol": 2e-6}


def pixels_of(features, labels, category, align_corners=False):
    """The features (N, C) of the pixels of a category, from the upsampled map."""
    size = labels.shape[1:]
    resized = F.interpolate(features.double(), size, mode="bilinear", align_corners=align_corners)
    return resized.movedim(1, -1)[labels == category]


def equation_10(pixels, row):
    weights = 1 - pixels @ row / (pixels.norm(dim=1) * row.norm())
    return (weights[:, None] / weights.sum() * pixels).sum(0)


def batch(steps=0, categories=range(K), sizes=((4, 5), (9, 11)), images=2):
    """Features and labels whose categories come in patches, some pixels ignored."""
    generator = torch.Generator().manual_seed(steps)
    (h, w), (height, width) = sizes
    features = torch.randn(images, C, h, w, generator=generator) + 0.3
    drawn = torch.randint(len(categories), (images, height, width), generator=generator)
    labels = torch.tensor(list(categories))[drawn]
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORED
    return features, labels


def memory_of(**options):
    options = {"momentum": "constant", "base_momentum": 0.3, "init": "mean"} | options
    return FeatureMemory(K, C, **options)


def started(**options):
    memory = memory_of(**options)
    memory(*batch(99))
    return memory


@pytest.mark.parametrize("sizes", [((4, 5), (9, 11)), ((7, 6), (7, 6)), ((1, 3), (8, 1))], ids=str)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("cosine", [True, False])
def test_is_its_formula(cosine, align_corners, sizes):
    memory = FeatureMemory(
        K, C, total_steps=4, init="mean", cosine=cosine, align_corners=align_corners
    )
    expected = {}
    for step, categories in enumerate([(0, 1), (1, 3), (0, 1, 2, 3), (0,), (1, 2)]):
        features, labels = batch(step, categories, sizes)
        m = (1 - step / 4) ** 0.9 * (0.9 - 0.9 / 100) + 0.9 / 100
        for k in labels[labels != IGNORED].unique().tolist():
            pixels = pixels_of(features, labels, k, align_corners)
            if k not in expected:
                expected[k] = pixels.mean(0)
                continue
            mean = equation_10(pixels, expected[k]) if cosine else pixels.mean(0)
            expected[k] = (1 - m) * expected[k] + m * mean
        memory(features.double(), labels)
        assert memory.initialized.tolist() == [k in expected for k in range(K)]
        for k in range(K):
            row = expected.get(k, torch.zeros(C, dtype=torch.float64))
            torch.testing.assert_close(memory.memory[k].double(), row, **ROUNDING)
        assert memory.step == step + 1


def momenta(memory, lrs):
    """The momentum of each step, from how far a row moves."""
    first, then = torch.eye(C)[:2, :, None, None].split(1)
    label, found = torch.zeros(1, 1, 1, dtype=torch.int64), []
    for lr in lrs:
        memory.memory.copy_(first[0, :, 0, 0].expand(K, C))
        memory(then, label, lr=lr)
        assert torch.equal(memory.memory[1:], first[0, :, 0, 0].expand(K - 1, C))
        found.append(memory.memory[0, 1].item())
    return found


def test_poly_momentum_falls_and_stays_at_a_hundredth():
    memory = memory_of(momentum="poly", base_momentum=0.8, power=0.5, total_steps=4, cosine=False)
    expected = [0.792 * left**0.5 + 0.008 for left in (1, 0.75, 0.5, 0.25, 0, 0, 0)]
    assert momenta(memory, [None] * 7) == pytest.approx(expected, rel=1e-6)


def test_momentum_defaults_to_equation_7():
    memory = FeatureMemory(K, C, total_steps=10, cosine=False)
    expected = [0.891 * (1 - t / 10) ** 0.9 + 0.009 for t in range(3)]
    assert momenta(memory, [None] * 3) == pytest.approx(expected, rel=1e-6)


def test_constant_momentum():
    memory = memory_of(base_momentum=0.25, cosine=False)
    assert momenta(memory, [None, 0.1, 7.0]) == [0.25] * 3


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_momentum_of_the_learning_rate(kind):
    memory = memory_of(momentum="lr", base_momentum=0.9, base_lr=0.02, cosine=False)
    found = momenta(memory, [kind(lr) for lr in (0.02, 0.01, 0.0)])
    assert found == pytest.approx([0.9, 0.45, 0], rel=1e-6)


@pytest.mark.parametrize("lr", [-0.01, 0.03])
def test_momentum_of_a_tensor_outside_its_range_is_nan(lr):
    memory = memory_of(momentum="lr", base_momentum=0.9, base_lr=0.02, cosine=False)
    (found,) = momenta(memory, [torch.tensor(lr)])
    assert found != found


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sizes", [((4, 5), (9, 11)), ((5, 3), (4, 7)), ((1, 4), (5, 1))], ids=str)
def test_random_first_row_is_a_pixel(sizes, align_corners):
    features, labels = batch(3, (0, 1, 3, 4), sizes, images=3)
    for _ in range(10):
        memory = memory_of(init="random", align_corners=align_corners)
        memory(features.double(), labels)
        for k in range(K):
            pixels = pixels_of(features, labels, k, align_corners)
            assert memory.initialized[k] == (len(pixels) > 0)
            if len(pixels) == 0:
                assert torch.equal(memory.memory[k], torch.zeros(C))
            else:
                assert (pixels - memory.memory[k]).abs().amax(1).min() < 1e-6


def test_random_first_row_is_any_pixel_alike():
    images, height, width = 3, 4, 5
    features = torch.arange(images * height * width).view(images, 1, height, width).float() + 1
    labels = torch.full((images, height, width), IGNORED)
    # As many pixels in every image as chance would have it, at the map's ends too.
    labels.view(-1)[[0, 4, 6, 19, 41, 42, 43, 44, 45, 50, 58, 59]] = 1
    labels.view(-1)[[1, 2, 3, 5, 20, 30, 40]] = 0
    drawn = torch.zeros(2, images * height * width)
    for _ in range(800):
        memory = FeatureMemory(2, 1, total_steps=1)
        memory(features, labels)
        for k, value in enumerate(memory.memory[:, 0].int().tolist()):
            drawn[k, value - 1] += 1
    for k, counts in enumerate(drawn):
        mine = labels.flatten() == k
        assert counts[~mine].sum() == 0
        expected = 800 / mine.sum()
        # Chi-square with 6 and 11 degrees of freedom: 31 and 40 are passed once in 30,000 times.
        assert ((counts[mine] - expected) ** 2 / expected).sum() < {7: 31, 12: 40}[int(mine.sum())]


@pytest.mark.parametrize("init", ["random", "clustering"])
def test_random_numbers_come_from_the_generator(init):
    rows = []
    for seed in (1, 1, 2):
        memory = memory_of(init=init)
        memory(*batch(), generator=torch.Generator().manual_seed(seed))
        rows.append(memory.memory)
    torch.manual_seed(1)
    memory = memory_of(init=init)
    memory(*batch())
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], memory.memory)
    assert not torch.allclose(rows[0], rows[2])


def test_clustering_takes_the_larger_cluster():
    """Three quarters of the pixels point one way, the rest, much longer, another."""
    directions = F.normalize(torch.randn(2, C), dim=1)
    lengths = torch.tensor([2.0, 50.0])
    which = torch.zeros(2, 8, 8, dtype=torch.int64)
    which[:, ::2, ::2] = 1
    features = (directions * lengths[:, None])[which].movedim(-1, 1)
    memory = memory_of(init="clustering")
    memory(features, torch.zeros_like(which))
    torch.testing.assert_close(memory.memory[0], directions[0] * 2, **ROUNDING)


def test_clustering_of_pixels_that_are_alike():
    pixel = torch.randn(C)
    memory = memory_of(init="clustering")
    memory(pixel[None, :, None, None].expand(2, C, 3, 3), torch.ones(2, 5, 5, dtype=torch.uint8))
    torch.testing.assert_close(memory.memory[1], pixel, **ROUNDING)


def spherical_2_means(pixels):
    """Loops over pixels and clusters, until nothing moves."""
    directions = [p / p.norm() for p in pixels]
    mean = sum(directions)
    second = min(directions, key=lambda d: float(d @ mean))
    centres = [min(directions, key=lambda d: float(d @ second)), second]
    while True:
        nearest = [max((0, 1), key=lambda i: float(d @ centres[i])) for d in directions]
        clusters = [[i for i, n in enumerate(nearest) if n == j] for j in (0, 1)]
        moved = [sum(directions[i] for i in cluster) for cluster in clusters]
        moved = [centre / centre.norm() for centre in moved]
        if all(torch.allclose(a, b, atol=1e-12) for a, b in zip(moved, centres, strict=True)):
            break
        centres = moved
    largest = max((0, 1), key=lambda j: len(clusters[j]))
    members = clusters[largest]
    return centres[largest] * sum(pixels[i].norm() for i in members) / len(members)


def test_clustering_is_spherical_2_means():
    centre = torch.randn(7, 2, C, dtype=torch.float64)
    which = (torch.rand(7, 30) < 0.4).long()
    pixels = torch.stack([c[w] for c, w in zip(centre, which, strict=True)])
    pixels = pixels + 0.6 * torch.randn_like(pixels)
    expected = torch.stack([spherical_2_means(p) for p in pixels])
    torch.testing.assert_close(_largest_cluster(pixels), expected)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("cosine", [True, False])
def test_absent_categories_stay(cosine, init):
    memory = started(init=init, cosine=cosine)
    before = memory.memory.clone()
    memory(*batch(1, (1, 3)))
    moved = (memory.memory != before).any(1)
    assert moved.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("start", [memory_of, started], ids=["fresh", "started"])
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("images", [2, 0])
def test_nothing_labelled(images, init, start):
    memory = start(init=init)
    before = copy.deepcopy(memory.state_dict())
    features, labels = batch(1)
    memory(features[:images], torch.full_like(labels, IGNORED)[:images])
    after = memory.state_dict()
    assert torch.equal(after["memory"], before["memory"])
    assert after["step"] == before["step"] + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_parallel_pixels_leave_their_row(dtype):
    memory = started(base_momentum=0.9)
    memory.memory.copy_(memory.memory.to(dtype))
    before = memory.memory.clone()
    # Powers of two: the lengths differ, and rounding does not touch the directions.
    lengths = torch.tensor([0.5, 1, 2, 4, 8]).repeat(2, 3, 1)
    labels = torch.arange(K).expand(2, 3, K).contiguous()
    features = (before[labels] * lengths[..., None]).movedim(-1, 1).to(dtype)
    memory(features, labels)
    assert torch.equal(memory.memory, before)


def test_nearly_parallel_pixels_leave_their_row():
    memory = started(base_momentum=0.9)
    before = memory.memory.clone()
    labels = torch.arange(K).expand(2, 3, K).contiguous()
    memory((3.7 * before[labels]).movedim(-1, 1), labels)
    assert torch.equal(memory.memory, before)


def test_one_pixel_beside_parallel_ones_has_all_the_weight():
    memory = started(base_momentum=0.5)
    before = memory.memory.clone()
    features = before[0].repeat(1, 4, 4, 1).movedim(-1, 1).clone()
    features[0, :, 2, 1] = torch.randn(C)
    memory(features, torch.zeros(1, 4, 4, dtype=torch.int64))
    torch.testing.assert_close(
        memory.memory[0], (before[0] + features[0, :, 2, 1]) / 2, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("init", INITS)
def test_a_first_row_is_not_averaged_too(init):
    memory = memory_of(init=init, base_momentum=1.0)
    features, labels = torch.randn(1, C, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64)
    memory(features, labels)
    torch.testing.assert_close(memory.memory[0], features[0, :, 0, 0], **ROUNDING)
    other = torch.randn(1, C, 1, 1)
    memory(other, labels)
    torch.testing.assert_close(memory.memory[0], other[0, :, 0, 0], **ROUNDING)


@pytest.mark.parametrize("cosine", [True, False])
def test_nan_is_not_swallowed(cosine):
    memory = started(cosine=cosine)
    features, labels = batch(1, sizes=((6, 6), (6, 6)))
    features[0, :, 2, 3], labels[0, 1:4, 2:5] = torch.nan, 4
    memory(features, labels)
    assert memory.memory.isnan().any(1).tolist() == [False] * 4 + [True]
    memory(*batch(2))
    assert memory.memory.isnan().any(1).tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("init", INITS)
def test_nan_reaches_a_first_row(init):
    memory = memory_of(init=init)
    features, labels = batch(1, sizes=((6, 6), (6, 6)))
    features[0, :, 2, 3], labels[0, 1:4, 2:5] = torch.nan, 4
    memory(features, labels)
    assert memory.memory.isnan().any(1).tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("start", [memory_of, started], ids=["fresh", "started"])
@pytest.mark.parametrize("init", INITS)
def test_nan_statistics_are_not_swallowed(init, start, monkeypatch):
    """What the operator returns on CUDA for labels out of range."""
    module = sys.modules[FeatureMemory.__module__]

    def bad(features, labels, memory, *, num_classes, **options):
        nan = torch.full((num_classes, C), torch.nan)
        return nan, nan[:, 0], torch.zeros(num_classes, dtype=torch.int64)

    memory = start(init=init)
    monkeypatch.setattr(module, "category_statistics", bad)
    memory(*batch(1))
    assert memory.memory.isnan().all()


def test_buffers_and_no_parameters():
    memory = FeatureMemory(K, C, total_steps=1)
    assert not list(memory.parameters())
    assert {name: (tuple(b.shape), b.dtype) for name, b in memory.named_buffers()} == {
        "memory": ((K, C), torch.float32),
        "step": ((), torch.int64),
    }
    assert not any(b.any() for b in memory.buffers())


@pytest.mark.parametrize("init", INITS)
def test_nothing_flows_into_the_features(init):
    features, labels = batch()
    memory = memory_of(init=init)
    for _ in range(2):
        assert memory(features.requires_grad_(), labels) is None
        assert not memory.memory.requires_grad
        assert memory.memory.grad_fn is None


def test_a_graph_that_used_the_memory_before_the_step_raises():
    memory = started()
    weights = torch.randn(3, K, requires_grad=True)
    context, copied = weights @ memory.memory, weights @ memory.memory.clone()
    memory(*batch(1))
    copied.backward(torch.randn_like(copied))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        context.backward(torch.randn_like(context))


def carried(memory):
    other = FeatureMemory(K, C, total_steps=9, init="mean")
    other.load_state_dict(memory.state_dict())
    return other


@pytest.mark.parametrize(
    "carry",
    [
        carried,
        copy.deepcopy,
        lambda m: m.to("cpu"),
        lambda m: carried(copy.deepcopy(m).to(torch.float64)),
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.double(),
    ],
    ids=["state_dict", "deepcopy", "to", "to_state_dict", "half", "bfloat16", "double"],
)
def test_goes_on_where_it_stood(carry):
    straight, memory = (FeatureMemory(K, C, total_steps=9, init="mean") for _ in range(2))
    for step in range(6):
        features, labels = batch(step, (0, 1, 2, 3) if step < 4 else range(K))
        straight(features, labels)
        memory(features, labels)
        if step == 2:
            memory = carry(memory)
    for name, buffer in straight.state_dict().items():
        assert buffer.dtype == memory.state_dict()[name].dtype
        assert torch.equal(buffer, memory.state_dict()[name])


def test_meta_device():
    with torch.device("meta"):
        memory = FeatureMemory(K, C, total_steps=9, init="mean").half()
    memory = memory.to_empty(device="cpu")
    memory.load_state_dict(started().state_dict())
    memory(*batch())
    assert memory.memory.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("init", INITS)
def test_features_of_fewer_bits(init, dtype):
    features, labels = batch()
    features = features.to(dtype)
    memory, expected = (memory_of(init=init) for _ in range(2))
    for _ in range(2):
        memory(features, labels, generator=torch.Generator().manual_seed(1))
        expected(features.double(), labels, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(memory.memory, expected.memory, **ROUNDING)


@pytest.mark.parametrize("init", INITS)
def test_autocast_changes_nothing(init, device):
    memory, expected = (memory_of(init=init).to(device) for _ in range(2))
    for step in range(2):
        features, labels = (x.to(device) for x in batch(step))
        torch.manual_seed(step)
        expected(features, labels)
        torch.manual_seed(step)
        with torch.autocast(device, dtype=torch.bfloat16):
            memory(features, labels)
    assert torch.equal(memory.memory, expected.memory)


@pytest.mark.parametrize("labels_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("init", INITS)
def test_layouts_and_label_dtypes(init, labels_dtype):
    features, labels = batch(1)
    memory, expected = (memory_of(init=init) for _ in range(2))
    expected(features, labels, generator=torch.Generator().manual_seed(1))
    memory(
        features.contiguous(memory_format=torch.channels_last),
        labels.to(labels_dtype).repeat_interleave(2, 2)[..., ::2],
        generator=torch.Generator().manual_seed(1),
    )
    torch.testing.assert_close(memory.memory, expected.memory, **ROUNDING)


def test_averaged_models():
    """torch's average takes every buffer, with subtraction."""
    memory = memory_of()
    average, decaying = (
        AveragedModel(memory, use_buffers=True, multi_avg_fn=multi_avg_fn)
        for multi_avg_fn in (None, get_ema_multi_avg_fn(0.5))
    )
    memories = []
    for step in range(3):
        memory(*batch(step))
        memories.append(memory.memory.clone())
        average.update_parameters(memory)
        decaying.update_parameters(memory)
    torch.testing.assert_close(average.module.memory, sum(memories) / 3, **ROUNDING)
    expected = 0.25 * memories[0] + 0.25 * memories[1] + 0.5 * memories[2]
    torch.testing.assert_close(decaying.module.memory, expected, **ROUNDING)
    assert torch.equal(average.module.initialized, memory.initialized)
    average.module(*batch(3))


def test_files_of_before_the_memory_told_what_is_initialized():
    source = started()
    old = source.state_dict() | {"initialized": source.initialized}
    memory = memory_of()
    nn.Sequential(memory).load_state_dict({f"0.{name}": x for name, x in old.items()})
    assert torch.equal(memory.memory, source.memory)
    assert torch.equal(memory.initialized, source.initialized)


def test_an_ignored_label_may_be_a_category():
    features, labels = batch(1)
    labels[labels == IGNORED] = 0
    memory = memory_of(init="random", ignore_index=0)
    memory(features, labels)
    assert memory.initialized.tolist() == [False, True, True, True, True]
    assert torch.equal(memory.memory[0], torch.zeros(C))


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("ignored", [-1, -100, K, 1000])
def test_any_label_may_be_ignored(ignored, init):
    features, labels = batch(1)
    memory, expected = (memory_of(init=init, ignore_index=i) for i in (ignored, IGNORED))
    expected(features, labels, generator=torch.Generator().manual_seed(1))
    labels[labels == IGNORED] = ignored
    memory(features, labels, generator=torch.Generator().manual_seed(1))
    assert torch.equal(memory.memory, expected.memory)


@pytest.mark.parametrize("momentum", mostly_slow(["poly", "lr"], "poly"))
@pytest.mark.parametrize("init", mostly_slow(INITS, "mean"))
def test_compiles_once_for_all_sizes(init, momentum, device):
    torch._dynamo.reset()
    options = {"momentum": momentum, "total_steps": 9, "base_lr": 0.1, "init": init}
    memory, expected = (FeatureMemory(K, C, **options).to(device) for _ in range(2))
    compiled = torch.compile(memory, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step, sizes in enumerate([((4, 5), (9, 11)), ((6, 3), (20, 17)), ((8, 8), (9, 30))]):
            features, labels = (x.to(device) for x in batch(step, range(step + 2), sizes))
            lr = torch.tensor(0.1 / (step + 1))
            torch.manual_seed(step)
            expected(features, labels, lr)
            torch.manual_seed(step)
            compiled(features, labels, lr)
            torch.testing.assert_close(memory.memory, expected.memory, **ROUNDING)
            assert torch.equal(memory.initialized, expected.initialized)
            assert memory.step == expected.step


@pytest.mark.cuda
@pytest.mark.parametrize("momentum", ["poly", "lr"])
@pytest.mark.parametrize("init", INITS)
def test_never_waits_for_the_device(init, momentum):
    memory = FeatureMemory(K, C, momentum=momentum, total_steps=9, base_lr=0.1, init=init).cuda()
    expected = copy.deepcopy(memory).cpu()
    batches = [batch(step) for step in range(3)]
    on_device = [[x.cuda() for x in each] for each in batches]
    memory(*on_device[0], 0.05)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in on_device[1:]:
            memory(*each, 0.05)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if init == "mean":
        for each in batches:
            expected(*each, 0.05)
        torch.testing.assert_close(memory.memory.cpu(), expected.memory, **ROUNDING)


def test_says_what_it_is():
    memory = FeatureMemory(19, 512, total_steps=100)
    assert "19, 512, momentum='poly', base_momentum=0.9, total_steps=100" in repr(memory)
    assert "init='random', cosine=True, sync='statistics'" in repr(memory)
    assert "base_lr=0.1" in repr(FeatureMemory(3, 4, momentum="lr", base_lr=0.1))


def call(features=None, labels=None, lr=None, **options):
    good_features, good_labels = batch()
    features = good_features if features is None else features
    return memory_of(**options)(features, good_labels if labels is None else labels, lr)


LR = {"momentum": "lr", "base_momentum": 0.9, "base_lr": 0.1}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FeatureMemory(0, 4), ValueError, "num_classes must be at least 1, got 0"),
        (lambda: FeatureMemory(4, 2.0), TypeError, r"channels must be an integer, got 2\.0"),
        (
            lambda: FeatureMemory(4, 4),
            ValueError,
            "total_steps must be given for momentum='poly', got None",
        ),
        (
            lambda: FeatureMemory(4, 4, total_steps=0),
            ValueError,
            "total_steps must be at least 1, got 0",
        ),
        (
            lambda: FeatureMemory(4, 4, total_steps=1e5),
            TypeError,
            r"total_steps must be an integer, got 100000\.0",
        ),
        (
            lambda: memory_of(momentum=0.9),
            ValueError,
            r"momentum must be one of \('poly', 'constant', 'lr'\), got 0\.9",
        ),
        (lambda: memory_of(init="kmeans"), ValueError, "init must be one of .*, got 'kmeans'"),
        (lambda: memory_of(sync="mean"), ValueError, "sync must be one of .*, got 'mean'"),
        (
            lambda: memory_of(base_momentum=1.1),
            ValueError,
            r"base_momentum must be in \[0, 1\], got 1\.1",
        ),
        (
            lambda: memory_of(base_momentum=float("nan")),
            ValueError,
            r"base_momentum must be in \[0, 1\], got nan",
        ),
        (
            lambda: memory_of(base_momentum="a"),
            TypeError,
            "base_momentum must be a number, got 'a'",
        ),
        (lambda: memory_of(power=-1), ValueError, "power must be at least 0, got -1"),
        (
            lambda: memory_of(momentum="lr"),
            ValueError,
            "base_lr must be given for momentum='lr', got None",
        ),
        (lambda: memory_of(**LR | {"base_lr": 0}), ValueError, "base_lr must be above 0, got 0"),
        (lambda: call(**LR), ValueError, "lr must be given for momentum='lr', got None"),
        (lambda: call(lr="a", **LR), TypeError, "lr must be a number, got 'a'"),
        (
            lambda: call(lr=torch.ones(2), **LR),
            ValueError,
            r"lr must be a number or have shape \(\), got \(2,\)",
        ),
        (
            lambda: call(lr=0.2, **LR),
            ValueError,
            r"lr must make a momentum, .*, in \[0, 1\], got 0\.9 \* 0\.2 / 0\.1 = 1\.8",
        ),
        (lambda: call(lr=-0.1, **LR), ValueError, r"lr must make .* = -0\.9"),
        (
            lambda: call(torch.ones(2, C + 1, 4, 5)),
            ValueError,
            r"features must have shape \(B, 6, H, W\), got \(2, 7, 4, 5\)",
        ),
        (lambda: call([1]), TypeError, r"features must be a torch\.Tensor, got list"),
        (
            lambda: call(labels=torch.zeros(3, 9, 11, dtype=torch.int64)),
            ValueError,
            r"labels must have shape \(B, H, W\) = \(2, any, any\) .*, got \(3, 9, 11\)",
        ),
        (
            lambda: call(labels=torch.zeros(2, 9, 11)),
            TypeError,
            r"labels must be .* torch\.float32",
        ),
        (
            lambda: call(labels=torch.full((2, 9, 11), K)),
            ValueError,
            r"labels must be in \[0, 5\) or ignore_index = 255, got 5",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_an_error_changes_nothing():
    memory = started()
    before = copy.deepcopy(memory.state_dict())
    with pytest.raises(ValueError, match="labels must be"):
        memory(batch()[0], torch.full((2, 9, 11), K))
    for name, buffer in memory.state_dict().items():
        assert torch.equal(buffer, before[name])


# Two processes. The first has the first two images of every batch, and meets no category 2 until
# the last step; the other has the rest, and meets category 1 in the last step alone.
STEPS = [((0, 3), (0, 2)), ((0,), (0, 2)), ((0, 2, 3), (0, 1))]
DISTRIBUTED = {
    **{f"{init}": {"init": init} for init in INITS},
    **{f"{init}, no cosine": {"init": init, "cosine": False} for init in INITS},
    "reference": {"sync": "reference"},
    "none": {"sync": None},
}


def halves(step):
    sizes, offset = ((4, 5), (9, 11)), 10 * step
    return [batch(offset + rank, STEPS[step][rank], sizes) for rank in (0, 1)]


class Network(nn.Module):
    """Its output depends on the memory, which makes its step before backward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)
        self.memory = FeatureMemory(K, C, total_steps=3)

    def forward(self, x, labels):
        features = self.conv(x)
        similarity = torch.einsum("bchw,kc->bkhw", features, self.memory.memory.clone())
        self.memory(features, labels)
        return features + similarity.sum(1, keepdim=True)


def train(network, batches):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for features, labels in batches:
        optimizer.zero_grad()
        network(features, labels).square().mean().backward()
        optimizer.step()


def process(rank, folder):
    """What this process and another do; the files that they write are what the tests look at."""
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        timeout=datetime.timedelta(seconds=120),
        rank=rank,
        world_size=2,
    )
    try:
        torch.save(results_of(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def results_of(rank):
    alone, both = [dist.new_group([r]) for r in (0, 1)], dist.new_group([0, 1])
    results, all_reduce, groups = {}, dist.all_reduce, []

    def record(tensor, group=None):
        groups.append(group)
        all_reduce(tensor, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", record)
        for sync in ("statistics", "reference"):
            memory = memory_of(process_group=both, sync=sync)
            twin, file = copy.deepcopy(memory), io.BytesIO()
            assert twin.process_group is both
            twin(*batch())
            torch.save(memory, file)
            file.seek(0)
            assert torch.load(file, weights_only=False).process_group is None
    assert len(groups) == 3
    assert all(group is both for group in groups)
    cases = DISTRIBUTED | {"alone": {"process_group": alone[rank]}}
    for seeds in ("equal", "different"):
        for name, options in cases.items():
            memory = memory_of(**options)
            torch.manual_seed(7 if seeds == "equal" else 7 + rank)
            for step in range(len(STEPS)):
                memory(*halves(step)[rank])
            results[f"{name}, {seeds} seeds"] = memory.state_dict()
    torch.manual_seed(7)
    network = nn.parallel.DistributedDataParallel(Network())
    train(network, [halves(step)[rank] for step in range(len(STEPS))])
    results["ddp"] = network.module.state_dict()
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    with subprocess.Popen([sys.executable, __file__, "1", str(folder)], env=env) as other:
        try:
            process(0, folder)
            other.wait(timeout=120)
        finally:
            other.kill()
    assert other.returncode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def both(step):
    return [torch.cat(parts) for parts in zip(*halves(step), strict=True)]


def assert_states_equal(first, second):
    for name, buffer in first.items():
        assert torch.equal(buffer, second[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("seeds", ["equal", "different"])
@pytest.mark.parametrize("name", [n for n in DISTRIBUTED if n != "none"])
def test_processes_agree_to_the_bit(name, seeds, results):
    first, second = (result[f"{name}, {seeds} seeds"] for result in results)
    assert_states_equal(first, second)
    assert first["step"] == len(STEPS)
    assert (first["memory"] != 0).any(1).tolist() == [True] * 4 + [False]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", ["equal", "different"])
@pytest.mark.parametrize("name", [n for n in DISTRIBUTED if n.split(",")[0] in INITS])
def test_processes_are_one_that_sees_both(name, seeds, results):
    memory = memory_of(**DISTRIBUTED[name])
    torch.manual_seed(7)
    for step in range(len(STEPS)):
        memory(*both(step))
    found = results[1][f"{name}, {seeds} seeds"]["memory"]
    torch.testing.assert_close(found, memory.memory, **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "alone"])
def test_processes_on_their_own(name, results):
    for rank, result in enumerate(results):
        memory = memory_of()
        for step in range(len(STEPS)):
            memory(*halves(step)[rank])
        assert_states_equal(memory.state_dict(), result[f"{name}, equal seeds"])


@pytest.mark.slow
def test_processes_as_in_the_released_code(results):
    """A row of zeros is one without value; the memories are averaged after every step."""
    memory, m = torch.zeros(K, C, dtype=torch.float64), 0.3
    for step in range(len(STEPS)):
        own = []
        for features, labels in halves(step):
            rows = memory.clone()
            for k in set(labels.flatten().tolist()) - {IGNORED}:
                pixels = pixels_of(features, labels, k)
                if not rows[k].any():
                    rows[k] = pixels.mean(0)
                else:
                    rows[k] = (1 - m) * rows[k] + m * equation_10(pixels, rows[k])
            own.append(rows)
        memory = sum(own) / 2
    found = results[0]["reference, equal seeds"]["memory"]
    torch.testing.assert_close(found.double(), memory, **ROUNDING)


@pytest.mark.slow
def test_in_a_network_under_ddp(results):
    assert_states_equal(*(result["ddp"] for result in results))
    torch.manual_seed(7)
    network = Network()
    train(network, [both(step) for step in range(len(STEPS))])
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(results[0]["ddp"][name], tensor, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2])
