# SPDX-License-Identifier: Apache-2.0
"""A child that other tools have changed is called, and whatever its call does counts."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import spectral_norm

from covering import chosen, product
from ctxops.nn import (
    AFNB,
    APNB,
    CrissCrossAttention,
    DenseFeaturePyramid,
    DualAttention,
    GatedFullyFusion,
    LDv2,
    NonLocal2d,
    PyramidPooling,
)
from ctxops.nn.plain import is_plain
from ctxops.nn.pointwise import PointwiseConv2d, convolve_concatenation
from modules import flop_counter, randomise

LOW, HIGH = (2, 6, 5, 7), (2, 8, 6, 9)
PAPER = {"variant": "paper", "output_sizes": (1, 2)}
# A block and the shapes of its maps; the last three take a list of maps.
BLOCKS = {
    "apnb": (lambda: APNB(8, 4, 4, output_sizes=(1, 2), fuse="concat"), [HIGH]),
    "apnb_separate": (lambda: APNB(8, 4, 4, output_sizes=(1, 2), share=None, fuse="add"), [HIGH]),
    "apnb_value": (lambda: APNB(8, 4, 4, output_sizes=(1, 2), share="key_value"), [HIGH]),
    "apnb_paper": (lambda: APNB(8, 9, 9, share=None, fuse="concat", **PAPER), [HIGH]),
    "apnb_paper_shared": (lambda: APNB(8, 9, 9, fuse="concat", **PAPER), [HIGH]),
    "afnb": (lambda: AFNB(6, 8, 4, 5, output_sizes=(1, 2), fuse="concat"), [LOW, HIGH]),
    "nonlocal": (lambda: NonLocal2d(8, 4, 4, share=None, fuse="add", variant="paper"), [HIGH]),
    "ldv2": (lambda: LDv2(6, 8, 4, 3, bias=True), [(2, 6, 6, 9), HIGH]),
    "gated_fusion": (lambda: GatedFullyFusion([6, 8], 4, "reduced"), [[LOW, HIGH]]),
    "dense_pyramid": (lambda: DenseFeaturePyramid([6, 8], 8, 4), [[LOW, HIGH], HIGH]),
}


@pytest.fixture
def made(block):
    make, shapes = BLOCKS[block]

    def draw(shape):
        if isinstance(shape, list):
            return [draw(s) for s in shape]
        return torch.randn(shape, dtype=torch.float64)

    return randomise(make()).double(), [draw(shape) for shape in shapes]


def first_of(output):
    return torch.cat([y.flatten() for y in output]) if isinstance(output, tuple) else output


def results(block, inputs):
    """The output and all gradients, of a copy: running statistics change."""
    block = copy.deepcopy(block)
    leaves = [_requiring_grad(x) for x in inputs]
    y = first_of(block(*leaves))
    flat = [x for leaf in leaves for x in (leaf if isinstance(leaf, list) else [leaf])]
    return [y, *torch.autograd.grad(y.square().sum(), [*flat, *block.parameters()])]


def _requiring_grad(x):
    return [_requiring_grad(y) for y in x] if isinstance(x, list) else x.clone().requires_grad_()


def all_called(block):
    """A copy in which every module has a hook, so that none is read."""
    block = copy.deepcopy(block)
    for module in block.modules():
        module.register_forward_hook(_watch)
    return block


def _watch(module, inputs, output):
    pass


def _convolutions(block):
    return [name for name, m in block.named_modules() if isinstance(m, nn.Conv2d)]


class _Adapted:
    """What an adapter puts in the place of ``forward``."""

    def __init__(self, convolution):
        self.convolution = convolution
        self.delta = torch.randn_like(convolution.weight)

    def __call__(self, x):
        return type(self.convolution).forward(self.convolution, x) + F.conv2d(x, self.delta)


def replace_forward(convolution):
    convolution.forward = _Adapted(convolution)


def mixed(y):
    """Another map than ``y``, also behind a norm that takes away its scale."""
    return 2 * y + y.roll(1, dims=1)


class _Mixed(PointwiseConv2d):
    def forward(self, x):
        return mixed(super().forward(x))


def replace_class(convolution):
    convolution.__class__ = _Mixed


def change_output_in_hook(convolution):
    convolution.register_forward_hook(_mix_output)


def _mix_output(module, inputs, output):
    return mixed(output)


def change_input_in_hook(convolution):
    convolution.register_forward_pre_hook(_mix_input)


def _mix_input(module, inputs):
    return tuple(x / 2 + x.roll(1, dims=1) for x in inputs)


def change_gradient_in_hook(convolution):
    convolution.register_full_backward_hook(_double_gradient)


def _double_gradient(module, grad_input, grad_output):
    return tuple(g if g is None else 2 * g for g in grad_input)


class _Scaled(nn.Module):
    def forward(self, weight):
        return 3 * weight + weight.roll(1, dims=0)


def parametrise(convolution):
    parametrize.register_parametrization(convolution, "weight", _Scaled())


class _Wrapped(torch.Tensor):
    """A weight that is more than its elements say, as sharded and quantised ones are."""


CHANGES = {
    f.__name__: f
    for f in (
        replace_forward,
        replace_class,
        change_output_in_hook,
        change_input_in_hook,
        change_gradient_in_hook,
        parametrise,
    )
}


def every_block_twice(indices):
    """In training and in evaluation, under another change; and every change in both as well."""
    blocks, changes, training = indices
    return [(i, (i + 3 * t) % len(changes), t) for i in blocks for t in training]


@chosen(every_block_twice, block=list(BLOCKS), change=list(CHANGES), training=[True, False])
def test_what_a_change_does_to_a_convolution_counts(block, made, change, training):
    block, inputs = made
    block.train(training)
    before = results(block, inputs)
    for name in _convolutions(block):
        changed = copy.deepcopy(block)
        CHANGES[change](changed.get_submodule(name))
        got, want = results(changed, inputs), results(all_called(changed), inputs)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
        assert not all(
            a is b or torch.allclose(a, b, rtol=1e-6, atol=1e-10)
            for a, b in zip(got, before, strict=True)
        ), f"{name} was not called"


@product(block=list(BLOCKS), training=[True, False])
def test_every_child_is_called_where_it_has_a_hook(block, made, training):
    block, inputs = made
    block.train(training)
    for name, module in block.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            seen = []
            handle = module.register_forward_hook(lambda m, i, y, seen=seen: seen.append(y.shape))
            block(*inputs)
            handle.remove()
            assert len(seen) == 1, name
            assert len(seen[0]) == 4
            assert seen[0][2:] in {(5, 7), (6, 9)}, f"{name} saw no map: {seen[0]}"


@product(block=list(BLOCKS))
def test_hooks_of_all_modules_see_every_child(block, made):
    block, inputs = made
    block.eval()
    children = {m for m in block.modules() if not isinstance(m, nn.ModuleList)}
    seen = set()
    with register_module_forward_hook(lambda m, i, o: seen.add(m)):
        block(*inputs)
    assert children <= seen
    seen.clear()
    for module in block.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # torch refuses backward hooks before one that works in place
    with register_module_full_backward_hook(lambda m, gi, go: seen.add(m)):
        first_of(block(*[_requiring_grad(x) for x in inputs])).square().sum().backward()
    assert {m for m in children if isinstance(m, nn.Conv2d)} <= seen


@product(block=list(BLOCKS))
def test_a_replaced_call_of_all_modules_sees_every_child(block, made, monkeypatch):
    """As tools replace it that record calls: torch.ao's and torchview do."""
    block, inputs = made
    block.eval()
    children = {m for m in block.modules() if not isinstance(m, nn.ModuleList)}
    seen, own = set(), nn.Module.__call__

    @functools.wraps(own)
    def call(module, *arguments):
        seen.add(module)
        return own(module, *arguments)

    monkeypatch.setattr(nn.Module, "__call__", call)
    block(*inputs)
    assert children <= seen


@product(block=list(BLOCKS))
def test_weights_that_are_there_in_the_call_alone(block, made):
    """As offloading has them: meta outside."""
    block, inputs = made
    block.eval()
    with torch.no_grad():
        want = first_of(block(*inputs))
        for module in block.modules():
            _offload(module)
        torch.testing.assert_close(first_of(block(*inputs)), want, rtol=1e-4, atol=1e-4)


def _offload(module):
    stores = [module._parameters, module._buffers]
    here = [{n: t for n, t in store.items() if t is not None} for store in stores]
    away = [
        {n: nn.Parameter(t.to("meta"), False) if store is stores[0] else t.to("meta")}
        for store, tensors in zip(stores, here, strict=True)
        for n, t in tensors.items()
    ]
    run = module.forward

    def put(tensors):
        for values in tensors:
            for n, t in values.items():
                (stores[0] if n in stores[0] else stores[1])[n] = t

    def forward(*args, **kwargs):
        put(here)
        try:
            return run(*args, **kwargs)
        finally:
            put(away)

    put(away)
    module.forward = forward


def test_a_norm_of_another_class_is_called():
    class Adapting(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True)

    x = torch.randn(2, 8, 6, 9)
    block = randomise(APNB(8, 4, 4, output_sizes=(1, 2), norm_layer=Adapting)).eval()
    torch.testing.assert_close(block(x), all_called(block)(x), rtol=1e-4, atol=1e-5)


def test_the_forward_of_a_class_may_be_replaced(monkeypatch):
    """As adaptation at test time does, which lets all batch norms normalise by the batch."""
    x = torch.randn(2, 8, 6, 9)
    block = randomise(APNB(8, 4, 4, output_sizes=(1, 2), fuse="concat")).eval()
    own = PointwiseConv2d.forward
    for kind, forward in (
        (nn.BatchNorm2d, lambda norm, y: F.batch_norm(y, None, None, training=True)),
        (PointwiseConv2d, functools.wraps(own)(lambda convolution, y: 2 * own(convolution, y))),
    ):
        before = block(x)
        monkeypatch.setattr(kind, "forward", forward)
        torch.testing.assert_close(block(x), all_called(block)(x), rtol=1e-4, atol=1e-5)
        assert (block(x) - before).abs().max() > 0.1


def test_a_replaced_step_of_a_convolution_counts():
    """As tools that continue maps around their borders replace it."""
    x = torch.randn(2, 8, 6, 9, dtype=torch.float64)
    block = randomise(APNB(8, 4, 4, output_sizes=(1, 2), fuse="concat")).double().eval()
    for convolution in (block.key[0], block.value, block.out, block.fusion[0]):
        before, own = block(x), convolution._conv_forward
        convolution._conv_forward = lambda y, *weights, own=own: 2 * own(y, *weights)
        torch.testing.assert_close(block(x), all_called(block)(x))
        assert (block(x) - before).abs().max() > 1e-4


def test_weights_of_a_tensor_class_are_not_read():
    convolution = nn.Conv2d(2, 3, 1)
    convolution.weight = nn.Parameter(convolution.weight.detach().as_subclass(_Wrapped), False)
    assert type(convolution.weight) is _Wrapped
    assert not is_plain(convolution, nn.Conv2d)


def test_a_compiled_child():
    block = randomise(APNB(8, 4, 4, output_sizes=(1, 2), fuse="concat")).eval()
    x = torch.randn(2, 8, 6, 9)
    want = block(x)
    block.key = torch.compile(block.key, backend="eager")
    block.out.compile(backend="eager")
    torch.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)


def test_a_parametrised_concatenation_is_evaluated_once():
    class Count(nn.Module):
        calls = 0

        def forward(self, weight):
            Count.calls += 1
            return weight

    block = LDv2(6, 8, 4, 3)
    parametrize.register_parametrization(block.query, "weight", Count())
    Count.calls = 0
    block(torch.randn(2, 6, 6, 9), torch.randn(2, 8, 6, 9))
    assert Count.calls == 1


def test_spectral_norm_of_a_concatenation():
    """One step of its power iteration, as on torch's convolution."""
    ours, plain = PointwiseConv2d(14, 5), nn.Conv2d(14, 5, 1)
    spectral_norm(ours), spectral_norm(plain)
    plain.load_state_dict(ours.state_dict())
    step = torch.randn(5, 14, 1, 1)  # of an optimiser
    for convolution in (ours, plain):
        convolution.parametrizations.weight.original.data.add_(step)
    maps = torch.randn(2, 6, 6, 9), torch.randn(2, 8, 6, 9)
    torch.testing.assert_close(convolve_concatenation(ours, *maps), plain(torch.cat(maps, dim=1)))


def test_norms_that_were_fused_into_their_convolutions():
    x = torch.randn(2, 8, 6, 9)
    for block in (APNB(8, 4, 4, output_sizes=(1, 2)), PyramidPooling(8, 4, (1, 2))):
        expected = randomise(block).eval()(x)
        for layers in [m for m in block.modules() if type(m) is nn.Sequential]:
            layers[0], layers[1] = fuse_conv_bn_eval(layers[0], layers[1]), nn.Identity()
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_a_convolution_is_built_as_its_class_is():
    """LoRA libraries make theirs of the class that they find."""
    for block in (CrissCrossAttention(16), PyramidPooling(16, 8), LDv2(8, 8, 8, 3), APNB(8, 4, 4)):
        for layer in block.modules():
            if isinstance(layer, nn.Conv2d):
                options = layer.kernel_size, layer.stride, layer.padding
                low = type(layer)(layer.in_channels, 4, *options, bias=False)
                high = type(layer)(4, layer.out_channels, (1, 1), (1, 1), bias=False)
                assert high(low(torch.randn(1, layer.in_channels, 7, 7))).shape[2:] == (7, 7)
    wide = type(CrissCrossAttention(16).query)(3, 4, 3, stride=2, padding=1, groups=1)
    plain = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    plain.load_state_dict(wide.state_dict())
    x = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(wide(x), plain(x))
    narrow, image = PointwiseConv2d(3, 4), torch.randn(3, 9, 8)
    torch.testing.assert_close(narrow(image), narrow(image[None])[0])


def test_a_flop_counter_counts_what_runs_without_it():
    block, x = APNB(64, 32, 32, output_sizes=(1,)).eval(), torch.randn(1, 64, 16, 16)
    counts = []
    for fold in (True, False):
        block.fold = fold
        with flop_counter() as counter:
            block(x)
        counts.append(counter.get_total_flops())
    assert counts[0] < counts[1]


def test_is_plain():
    convolution = nn.Conv2d(2, 3, 1)
    assert is_plain(convolution, nn.Conv2d)
    assert is_plain(convolution, nn.Linear, nn.Conv2d, like=torch.ones(1))
    assert not is_plain(convolution, nn.Module)
    assert not is_plain(convolution, nn.Conv2d, like=torch.ones(1, dtype=torch.float64))
    assert not is_plain(convolution, nn.Conv2d, like=torch.ones(1, device="meta"))
    assert not is_plain(convolution.to("meta"), nn.Conv2d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_plain(nn.Conv2d(2, 3, 1), nn.Conv2d, like=torch.ones(1, dtype=torch.bfloat16))


def test_the_block_says_what_it_folds():
    block = APNB(8, 4, 4, output_sizes=(1, 2), fuse="concat")
    assert "fold=True (on the anchors: value, out, fusion, norm)" in repr(block)
    block.out.register_forward_hook(_watch)
    assert "fold=True (on the anchors: value, norm)" in repr(block)
    block.fold = False
    assert "fold=False (on the anchors: nothing)" in repr(block)


@pytest.mark.parametrize("training", [True, False])
def test_hooks_on_dual_attention_in_its_network(training):
    from ctxops.models import create_model

    network = create_model("danet", "resnet18", 5).train(training)
    fired = []
    assert isinstance(network.decoder, DualAttention)
    network.decoder.register_forward_hook(lambda *_: fired.append(1))
    network(torch.randn(2, 3, 64, 64))
    assert fired == [1]
