# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from torch import nn
from torch._subclasses import FakeTensorMode

import ctxops
from covering import product
from ctxops.nn import AFNB, APNB, FusionNonLocal2d, NonLocal2d, non_local
from harness import peak_memory
from modules import assert_same, flop_counter, mostly_slow, randomise
from numerics import LAYOUTS, random_like


def embed(convolution, x):
    weight, bias = convolution.weight.flatten(1), convolution.bias
    y = torch.einsum("oi,bihw->bohw", weight, x)
    return y if bias is None else y + bias[:, None, None]


def follow(layer, x):
    """A norm or an activation; running statistics are left alone."""
    if isinstance(layer, nn.ReLU):
        return x.relu()
    mean, variance = layer.running_mean.clone(), layer.running_var.clone()
    return F.batch_norm(x, mean, variance, layer.weight, layer.bias, layer.training)


def apply(branch, x):
    """A branch of a block: a 1x1 convolution, then whatever follows it."""
    if not isinstance(branch, nn.Sequential):
        return embed(branch, x)
    x = embed(branch[0], x)
    for layer in branch[1:]:
        x = follow(layer, x)
    return x


def formula(block, x, context, sample=lambda x: x):
    """The block as the paper's equations have it, one after the other."""
    query, key = apply(block.query, x), sample(apply(block.key, context)).flatten(2)
    value = key if block.share == "key_value" else sample(apply(block.value, context)).flatten(2)
    weights = (block.scale * torch.einsum("bchw,bcs->bhws", query, key)).softmax(-1)
    y = embed(block.out, torch.einsum("bhws,bcs->bchw", weights, value))
    if block.out_norm is not None:
        y = follow(block.out_norm, y)
    if block.fuse == "add":
        return y + x
    if block.fuse == "concat":
        return apply(block.fusion, torch.cat([y, x], dim=1))
    return y


SHARE = {"query_key": "query_key", "key_value": "key_value", "separate": None}
FOLD = {"fold": True, "plain": False}
FORM = {
    "variant": ("released", "paper"),
    "fuse": {"alone": None, "add": "add", "concat": "concat"},
    "bias": {"bias": True, "no bias": False},
    "out_norm": {"norm": True, "no norm": False},
}
# The maximum is not linear: fold says nothing there.
SAMPLING = {
    "avg fold": {"sampling": "avg", "fold": True},
    "avg plain": {"sampling": "avg", "fold": False},
    "max": {"sampling": "max"},
}


@pytest.fixture
def form(variant, fuse, bias, out_norm):
    return {"variant": variant, "fuse": fuse, "bias": bias, "out_norm": out_norm}


@product(share=SHARE, **FORM, sampling=SAMPLING, training={"train": True, "eval": False})
def test_apnb_is_its_formula(share, form, sampling, training):
    block = randomise(APNB(12, 6, 6, output_sizes=(1, 2, 3), share=share, **sampling, **form))
    block.double().train(training)

    def pool(x):
        return ctxops.pyramid_pool(x, (1, 2, 3), mode=sampling["sampling"])

    x = torch.randn(2, 12, 7, 9)
    assert_same(block, [x], lambda x: formula(block, x, x, pool))


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_that_is_folded_in_evaluation(bias):
    block = randomise(APNB(12, 6, 6, output_sizes=(1, 2), bias=bias)).double().eval()
    x = torch.randn(2, 12, 7, 9, dtype=torch.float64)
    folded, block.fold = block(x), False
    torch.testing.assert_close(folded, block(x))


@product(share=SHARE, **FORM, fold=FOLD)
def test_random_sampling(share, form, fold, monkeypatch):
    indices = ctxops.random_anchor_indices(7, 9, (1, 3))
    monkeypatch.setattr(non_local, "random_anchor_indices", lambda *_, device: indices)
    options = {"share": share, "fold": fold, "sampling": "random"}
    block = randomise(APNB(12, 6, 6, output_sizes=(1, 3), **options, **form)).double()

    def sample(x):
        return ctxops.sample_anchors(x, indices)

    assert_same(block, [torch.randn(2, 12, 7, 9)], lambda x: formula(block, x, x, sample))


def test_random_sampling_draws_anew():
    block = randomise(APNB(6, 4, 4, output_sizes=(2,), sampling="random")).eval()
    x = torch.randn(1, 6, 30, 30)
    assert not torch.allclose(block(x), block(x))


@product(**FORM)
def test_afnb_is_its_formula(form):
    block = randomise(AFNB(10, 12, 6, 5, output_sizes=(1, 2, 3), **form)).double()
    low, high = torch.randn(2, 10, 5, 8), torch.randn(2, 12, 7, 9)

    def pool(x):
        return ctxops.pyramid_pool(x, (1, 2, 3))

    assert_same(block, [low, high], lambda low, high: formula(block, high, low, pool))


@product(share=SHARE, **FORM)
def test_non_local_is_its_formula(share, form):
    block = randomise(NonLocal2d(12, 6, 6, share=share, **form)).double()
    assert_same(block, [torch.randn(2, 12, 4, 5)], lambda x: formula(block, x, x))


@product(**FORM)
def test_fusion_non_local_is_its_formula(form):
    block = randomise(FusionNonLocal2d(10, 12, 6, 8, **form)).double()
    low, high = torch.randn(2, 10, 3, 4), torch.randn(2, 12, 4, 5)
    assert_same(block, [low, high], lambda low, high: formula(block, high, low))


BLOCKS = {
    "NonLocal2d": lambda **form: NonLocal2d(12, 16, 6, **form),
    "FusionNonLocal2d": lambda **form: FusionNonLocal2d(10, 12, 16, 8, **form),
    "APNB": lambda **form: APNB(12, 16, 6, output_sizes=(1, 2), **form),
    "AFNB": lambda **form: AFNB(10, 12, 16, 5, output_sizes=(1, 2), **form),
}


@pytest.mark.parametrize(("variant", "default"), [("released", 0.25), ("paper", 1.0)])
@pytest.mark.parametrize("build", BLOCKS.values(), ids=BLOCKS)
def test_scale(build, variant, default):
    """16 ** -0.5, or 1; a number that is given stays, 0 too."""
    assert build(variant=variant).scale == default
    for scale in (0.0, -1.5):
        assert build(variant=variant, scale=scale).scale == scale


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("share", SHARE.values(), ids=SHARE)
def test_a_scale_with_a_bias(share, variant, fold):
    """A folded bias of the query is scaled as its weight is. Few queries' channels fold best."""
    options = {"share": share, "variant": variant, "bias": True, "scale": 0.3, "fold": fold}
    block = randomise(APNB(4, 9, 9, output_sizes=(1, 2, 3), **options)).double()

    def pool(x):
        return ctxops.pyramid_pool(x, (1, 2, 3))

    assert_same(block, [torch.randn(2, 4, 7, 9)], lambda x: formula(block, x, x, pool))


@pytest.mark.parametrize("widths", [(12, 6, 5, 20), (4, 9, 13, 3), (40, 3, 30, 2)], ids=str)
@pytest.mark.parametrize("fuse", [None, "concat"])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_folding_decided_by_any_widths(widths, fuse, variant):
    channels, key, value, out = widths
    block = randomise(
        APNB(channels, key, value, out, (1, 2), share=None, fuse=fuse, variant=variant)
    ).double()
    x = torch.randn(2, channels, 6, 5)
    assert_same(
        block, [x], lambda x: formula(block, x, x, lambda x: ctxops.pyramid_pool(x, (1, 2)))
    )


def test_folding_does_fewer_operations():
    x, counts = torch.randn(1, 64, 16, 16), {}
    for fold in (True, False):
        block = APNB(64, 32, 32, output_sizes=(1, 2), fold=fold, variant="paper").eval()
        with flop_counter() as counter:
            block(x)
        counts[fold] = counter.get_total_flops()
    assert counts[True] < counts[False] / 4


def test_parameter_counts_of_the_released_network():
    def parameters(module):
        return sum(p.numel() for p in module.parameters())

    embedding, projection = 256 + 2 * 256, 256  # bias and norm, bias
    afnb = AFNB(1024, 2048, 256, 256, fuse="concat")
    assert parameters(afnb) == (
        (2048 * 256 + embedding)
        + (1024 * 256 + embedding)
        + (1024 * 256 + projection)
        + (256 * 2048 + 2048)
        + (4096 * 2048 + 3 * 2048)
    )
    apnb = APNB(512, 256, 256, fuse="concat")
    assert parameters(apnb) == (
        (512 * 256 + embedding)
        + (512 * 256 + projection)
        + (256 * 512 + 512)
        + (1024 * 512 + 3 * 512)
    )
    # ANN on ResNet-101 (deep stem, no auxiliary head) has 42,623,936 in the backbone; a 3x3
    # convolution with norm stands between the blocks, a classifier after them.
    reduction, classifier = 2048 * 512 * 9 + 3 * 512, 512 * 19 + 19
    total = 42_623_936 + parameters(afnb) + reduction + parameters(apnb) + classifier
    assert total == 62_964_435


@pytest.mark.parametrize("block", [APNB(8, 4, 4), NonLocal2d(8, 4, 4)], ids=["APNB", "NonLocal2d"])
def test_output_projection_starts_at_zero_and_says_so(block):
    assert not block(torch.randn(1, 8, 6, 6)).any()
    assert "starts at zero" in repr(block)


@pytest.mark.parametrize("which", ["out", "value", "fusion", "query"])
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_hooks_of_the_children_count(which, variant):
    """Pruning masks the weight in a hook before each call: folding must not use a stale one."""
    block = randomise(
        APNB(12, 6, 6, output_sizes=(1, 2), share=None, fuse="concat", variant=variant)
    ).double()
    child = getattr(block, which)
    child = child[0] if isinstance(child, nn.Sequential) else child
    prune.l1_unstructured(child, "weight", amount=0.5)
    with torch.no_grad():
        child.weight_orig.mul_(2)
    x = torch.randn(2, 12, 7, 9, dtype=torch.float64)
    folded = block(x)
    block.fold = False
    torch.testing.assert_close(folded, block(x))
    folded.backward(random_like(folded))
    assert child.weight_orig.grad.abs().sum() > 0


def test_a_child_may_be_replaced():
    block = randomise(APNB(12, 6, 6, output_sizes=(1, 2)))
    x = torch.randn(2, 12, 7, 9)
    expected = block.eval()(x)
    block.out = nn.Sequential(block.out, nn.Dropout(0.0))
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("share", ["query_key", "key_value"])
def test_weights_that_are_not_shared_do_not_load_into_shared_ones(share):
    shared, separate = (APNB(8, 4, 4, share=s, variant="paper") for s in (share, None))
    shared.load_state_dict(shared.state_dict())
    nn.Sequential(shared).load_state_dict(nn.Sequential(shared).state_dict())
    with pytest.raises(ValueError, match="it was saved with share=None"):
        shared.load_state_dict(separate.state_dict())


def test_folding_takes_no_more_memory_with_a_batch():
    x = torch.randn(16, 64, 8, 8).contiguous(memory_format=torch.channels_last)
    used = {}
    for fold in (True, False):
        block = APNB(64, 32, 32, output_sizes=(1, 2), fold=fold, fuse="concat")

        def run(block=block):
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(block(leaf).sum(), [leaf, *block.parameters()])

        used[fold] = peak_memory(run, torch.device("cpu"))
    assert used[True] < used[False]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("fuse", [None, "add", "concat"])
def test_keeps_the_memory_format(layout, fuse, device):
    x = LAYOUTS[layout](torch.randn(2, 16, 7, 9, device=device))
    for block in (APNB(16, 8, 8, fuse=fuse), NonLocal2d(16, 8, 8, fuse=fuse)):
        y = block.to(device)(x)
        assert y.stride() == LAYOUTS[layout](y).stride()


@pytest.mark.parametrize(
    ("variant", "training"),
    mostly_slow(
        {
            f"{variant}-{mode}": (variant, mode == "train")
            for variant in ("released", "paper")
            for mode in ("train", "eval")
        },
        "released-eval",
    ),
)
def test_compiles_once_for_all_sizes(variant, training, device):
    torch._dynamo.reset()
    block = randomise(APNB(16, 8, 8, output_sizes=(1, 3), fuse="concat", variant=variant))
    block = block.to(device).train(training)
    backend = "inductor" if (variant, training) == ("released", False) else "aot_eager"
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.set_grad_enabled(training):
        for size in ((12, 10), (17, 9), (31, 45)):
            x = torch.randn(2, 16, *size, device=device)
            torch.testing.assert_close(compiled(x), block(x))


def random_apnb(*widths):
    return APNB(*widths, sampling="random")


@pytest.mark.parametrize("make", [APNB, NonLocal2d, random_apnb], ids=lambda f: f.__name__)
def test_exports_with_dynamic_sizes(make):
    block = randomise(make(8, 4, 4)).eval()
    height, width = (torch.export.Dim(n, min=2, max=4096) for n in ("height", "width"))
    program = torch.export.export(
        block, (torch.randn(1, 8, 12, 10),), dynamic_shapes=[{2: height, 3: width}]
    )
    for size in ((17, 23), (5, 40)):
        x = torch.randn(1, 8, *size)
        exported = program.module()(x)
        if make is not random_apnb:
            torch.testing.assert_close(exported, block(x))


@pytest.mark.parametrize("fold", [True, False], ids=["fold", "plain"])
def test_autocast(fold, device):
    block = randomise(APNB(16, 8, 8, fold=fold)).to(device).eval()
    x = torch.randn(2, 16, 12, 9, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    expected = block(x)
    assert (y - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: APNB(8, 4, 4, share="all"), "share must be one of .* got 'all'"),
        (lambda: APNB(8, 4, 4, fuse="sum"), "fuse must be one of .* got 'sum'"),
        (lambda: APNB(8, 4, 4, variant="mine"), "variant must be one of .* got 'mine'"),
        (lambda: APNB(8, 4, 4, sampling="median"), "sampling must be one of .* got 'median'"),
        (lambda: APNB(8, 4, 5, share="key_value"), "key_channels 4 and value_channels 5"),
        (lambda: APNB(8, 4, 4, 6, fuse="add"), "out_channels equal to the map's 8, got 6"),
        (lambda: APNB(8, 0, 4), "key_channels must be at least 1, got 0"),
        (lambda: APNB(8, 4, 4, output_sizes=(1, 0)), "output_sizes must be in .* got 0"),
        (lambda: APNB(8, 4, 4)(torch.ones(1, 8, 0, 5)), r"x must have C, H and W .* 0, 5\)"),
        (
            lambda: AFNB(6, 8, 4, 4)(torch.ones(1, 6, 5, 5), torch.ones(2, 8, 5, 5)),
            "high must have the batch and device of low, 1 on cpu, got 2 on cpu",
        ),
        (lambda: APNB(8, 4, 4)(torch.ones(1, 7, 5, 5)), r"x must have shape \(B, 8, H, W\), got"),
        (lambda: APNB(8, 4, 4)(torch.ones(8, 5, 5)), r"x must have shape \(B, C, H, W\), got"),
        (
            lambda: AFNB(6, 8, 4, 4)(torch.ones(1, 8, 5, 5), torch.ones(1, 8, 5, 5)),
            r"low must have shape \(B, 6, H, W\), got \(1, 8, 5, 5\)",
        ),
    ],
    ids=lambda x: None,
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("share", ["query_key", "key_value"])
def test_a_shared_embedding_has_one_name(share):
    block = randomise(APNB(8, 4, 4, output_sizes=(1, 2), share=share)).eval()
    twin = "query" if share == "query_key" else "value"
    assert getattr(block, twin) is block.key
    assert not any(name.startswith(twin) for name in block.state_dict())
    names = [name for name, _ in block.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(map(id, block.parameters())))
    x = torch.randn(2, 8, 7, 6)
    doubled = {name: 2 * p.detach() for name, p in block.named_parameters()}
    called = torch.func.functional_call(block, doubled, (x,))
    block.load_state_dict(doubled, strict=False)
    torch.testing.assert_close(called, block(x))


@pytest.mark.parametrize("share", ["query_key", "key_value", None])
def test_an_embedding_is_replaced_under_each_of_its_names(share):
    x = torch.randn(2, 8, 7, 6)
    for name in ("query", "key", "value"):
        block = randomise(APNB(8, 4, 4, output_sizes=(1, 2), share=share)).eval()
        other, calls = nn.Sequential(getattr(block, name)), []
        other.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        setattr(block, name, other)
        assert getattr(block, name) is other
        block(x)
        assert calls == [1]
    del block.key
    assert not hasattr(block, "key")
    assert hasattr(block, "query") == (share != "query_key")


@pytest.mark.parametrize("share", ["query_key", "key_value"])
@pytest.mark.parametrize("names", ["both", "the other alone"])
@pytest.mark.parametrize("kind", ["real", "meta", "fake"])
def test_files_with_two_names_for_a_shared_embedding(share, names, kind):
    source = randomise(APNB(8, 4, 4, share=share))
    twin = "query" if share == "query_key" else "value"
    old = dict(source.state_dict())
    for name in [name for name in old if name.startswith("key.")]:
        old[twin + name.removeprefix("key")] = old[name].clone()
        if names != "both":
            del old[name]
    block = nn.Sequential(APNB(8, 4, 4, share=share))
    given = {f"0.{name}": x.to("meta") if kind == "meta" else x for name, x in old.items()}
    if kind == "real":
        block.load_state_dict(given)
        torch.testing.assert_close(block[0].state_dict(), source.state_dict())
    elif kind == "meta":
        block.to("meta").load_state_dict(given)
    else:
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(x) for name, x in given.items()}
            block.load_state_dict(fake, assign=True)
    assert len(given) > 0
