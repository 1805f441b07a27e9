# SPDX-License-Identifier: Apache-2.0
"""ctxops.patch against originals in plain torch, which bear the names of the packages' classes."""

import collections
import copy
import pickle
import sys
import types

import pytest
import torch
from torch import nn

import ctxops
import ctxops.nn
import originals
from ctxops.patching import KNOWN
from modules import flop_counter, mostly_slow, randomise
from numerics import LAYOUTS, assert_close

MMSEG, SSSEG = "mmseg.models.decode_heads", "ssseg.modules.models.segmentors"
MAP, LOW, ANCHORS = (2, 8, 5, 7), (2, 6, 9, 8), (2, 8, 4, 1)
# A name, which may end in a variant behind a space, the arguments and the shapes of the inputs.
CASES = {
    "mmcv.ops.cc_attention.CrissCrossAttention": ((8,), {}, [MAP]),
    "mmcv.cnn.bricks.non_local.NonLocal2d": ((8,), {}, [MAP]),
    "mmcv.cnn.bricks.non_local.NonLocal2d sampled": (
        (8,), {"sub_sample": True, "use_scale": False}, [MAP],
    ),
    "mmcv.cnn.bricks.non_local.NonLocal2d gaussian": ((8,), {"mode": "gaussian"}, [MAP]),
    "mmcv.cnn.bricks.non_local.NonLocal2d gaussian, sampled": (
        (8,), {"mode": "gaussian", "sub_sample": True}, [MAP],
    ),
    f"{SSSEG}.nonlocalnet.nonlocalblock.NonLocal2d": ((8,), {}, [MAP]),
    f"{MMSEG}.dnl_head.DisentangledNonLocal2d": ((8,), {}, [MAP]),
    f"{SSSEG}.dnlnet.dnlblock.DisentangledNonLocal2d": (
        (8,), {"temperature": 0.3, "use_scale": False}, [MAP],
    ),
    f"{MMSEG}.ann_head.SelfAttentionBlock": ((6, 8, 4, 8, False, (1, 3)), {}, [MAP, LOW]),
    f"{SSSEG}.base.selfattention.SelfAttentionBlock": ((6, 8, 4, 8), {}, [MAP, LOW]),
    f"{SSSEG}.base.selfattention.SelfAttentionBlock regions": (
        (8, 8, 4, 8), {"value_norm": True}, [MAP, ANCHORS],
    ),
    f"{SSSEG}.base.selfattention.SelfAttentionBlock pooled": (
        (6, 8, 4, 8), {"pool": nn.MaxPool2d(2)}, [MAP, LOW],
    ),
    f"{MMSEG}.ann_head.AFNB": ((6, 8, 4, 8), {}, [LOW, MAP]),
    f"{MMSEG}.ann_head.AFNB stages": ((6, 8, 4, 5), {"stages": 2}, [LOW, MAP]),
    f"{MMSEG}.ann_head.AFNB many anchors": ((6, 8, 2, 8), {"sizes": (1, 7)}, [LOW, MAP]),
    f"{MMSEG}.ann_head.APNB": ((8, 4, 8), {}, [MAP]),
    f"{SSSEG}.annnet.afnblock.AFNBlock": ((6, 8, 4, 8), {}, [LOW, MAP]),
    f"{SSSEG}.annnet.apnblock.APNBlock": ((8, 4, 8), {}, [MAP]),
    f"{MMSEG}.da_head.PAM": ((8, 2), {}, [MAP]),
    f"{SSSEG}.danet.pam.PositionAttentionModule": ((8, 2), {}, [MAP]),
    f"{MMSEG}.da_head.CAM": ((), {}, [MAP]),
    f"{SSSEG}.danet.cam.ChannelAttentionModule": ((), {}, [MAP]),
    f"{MMSEG}.ocr_head.ObjectAttentionBlock": ((8, 4), {}, [MAP, ANCHORS]),
    f"{SSSEG}.ocrnet.objectcontext.ObjectContextBlock": ((8, 4), {}, [MAP, ANCHORS]),
    f"{MMSEG}.psp_head.PPM": (((1, 2, 3), 8, 4), {}, [MAP]),
    f"{SSSEG}.pspnet.ppm.PyramidPoolingModule": ((8, 4, (1, 3), True), {}, [MAP]),
    "segmentation_models_pytorch.decoders.pspnet.decoder.PSPModule": ((8, (1, 2)), {}, [MAP]),
    "timm.layers.non_local_attn.NonLocalAttn": ((8, 4), {}, [MAP]),
}  # fmt: skip
EVERY = pytest.mark.parametrize("case", CASES)
CRISS_CROSS, ANN = "mmcv.ops.cc_attention.CrissCrossAttention", f"{MMSEG}.ann_head.AFNB"


def make(case, dtype=torch.float64):
    args, options, shapes = CASES[case]
    block = randomise(originals.CLASSES[case.partition(" ")[0]](*args, **options)).to(dtype)
    return block, [torch.randn(shape, dtype=dtype) for shape in shapes]


def patched(block):
    block = copy.deepcopy(block)
    swaps = ctxops.patch(block)
    assert swaps
    assert not any(swap.refused for swap in swaps)
    return block


def maps_of(block, inputs):
    output = block(*inputs)
    return output if isinstance(output, list) else [output]


def results(block, inputs, upstream):
    """The maps of a copy, all gradients, and what the call left in the buffers."""
    block = copy.deepcopy(block)
    leaves = [x.detach().requires_grad_() for x in inputs]
    maps = maps_of(block, leaves)
    y = torch.cat([x.flatten() for x in maps])
    gradients = torch.autograd.grad(y, [*leaves, *block.parameters()], upstream)
    return maps, gradients, [*block.buffers(), torch.ones(1)]


def test_every_class_has_a_case():
    assert {case.partition(" ")[0] for case in CASES} == set(KNOWN)


@EVERY
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_equals_original(case, training):
    block, inputs = make(case)
    block.train(training)
    count = sum(x.numel() for x in maps_of(copy.deepcopy(block), inputs))
    upstream = torch.randn(count, dtype=torch.float64)
    expected, actual = (results(b, inputs, upstream) for b in (block, patched(block)))
    for theirs, ours in zip(expected, actual, strict=True):
        # Some gradients are zero but for rounding: that of a key's bias, which a softmax cancels.
        scale = max(x.abs().max() for x in theirs)
        for x, y in zip(theirs, ours, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-9, atol=1e-13 * scale.item())


@pytest.mark.parametrize("case", mostly_slow(list(CASES), ANN))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float32(case, layout):
    block, inputs = make(case, torch.float32)
    block.eval()
    inputs = [LAYOUTS[layout](x) for x in inputs]
    exact = maps_of(block.double(), [x.double() for x in inputs])
    block.float()
    for theirs, ours, oracle in zip(
        maps_of(block, inputs), maps_of(patched(block), inputs), exact, strict=True
    ):
        assert_close(ours, theirs, oracle)


@pytest.mark.parametrize("case", mostly_slow(list(CASES), ANN, CRISS_CROSS))
def test_autocast(case):
    block, inputs = make(case, torch.float32)
    block.train()
    exact = maps_of(block.double(), [x.double() for x in inputs])
    block.float()
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = maps_of(block, inputs), maps_of(patched(block), inputs)
    for theirs, ours, oracle in zip(expected, actual, exact, strict=True):
        assert ours.dtype == theirs.dtype
        bound = 4 * (theirs.double() - oracle).norm() + 2**-8 * oracle.norm()
        assert (ours.double() - oracle).norm() <= bound


@EVERY
def test_leaves_everything_but_forward(case):
    block, inputs = make(case)
    block.eval()
    before = block.state_dict()
    attributes = {name: set(module.__dict__) for name, module in block.named_modules()}
    expected = maps_of(block, inputs)
    swaps = ctxops.patch(block)
    name = case.partition(" ")[0]
    assert swaps[0] == ("", name, KNOWN[name].by, "")
    assert ctxops.patch(block) == []
    assert type(block) is originals.CLASSES[name]
    after = block.state_dict()
    assert list(before) == list(after)
    assert all(before[key].data_ptr() == after[key].data_ptr() for key in before)
    ctxops.unpatch(block)
    assert attributes == {name: set(module.__dict__) for name, module in block.named_modules()}
    assert all(map(torch.equal, maps_of(block, inputs), expected))


def firing(block):
    """How often each module of a block is called from now on."""
    fired = collections.Counter()
    for name, module in block.named_modules():
        module.register_forward_hook(lambda *args, name=name: fired.update([name]))
    return fired


@EVERY
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_hooks_fire_as_often(case, training):
    block, inputs = make(case)
    block.train(training)
    ours = patched(block)
    expected, actual = firing(block), firing(ours)
    block(*inputs)
    ours(*inputs)
    assert actual == expected


@pytest.mark.parametrize("case", mostly_slow(list(CASES), ANN, CRISS_CROSS))
def test_children_that_were_changed_are_called(case):
    """What the hook of a single child makes of its output counts."""
    block, inputs = make(case)
    block.eval()
    ours = patched(block)
    for name in [name for name, _ in block.named_modules() if name]:
        handles = [
            b.get_submodule(name).register_forward_hook(lambda *args: args[-1] * 1.5 + 0.1)
            for b in (block, ours)
        ]
        for x, y in zip(maps_of(ours, inputs), maps_of(block, inputs), strict=True):
            torch.testing.assert_close(x, y)
        for handle in handles:
            handle.remove()


def test_names_and_unknown_classes():
    """Only known classes are swapped, a class derived from one is not."""

    class Derived(originals.CrissCrossAttention):
        pass

    block = originals.CrissCrossAttention(8)
    model = nn.ModuleDict({"a": nn.Sequential(nn.ReLU(), block), "b": Derived(8)})
    assert ctxops.patch(model) == [("a.1", CRISS_CROSS, "criss_cross_attention", "")]
    assert "forward" not in model["b"].__dict__


def register(monkeypatch):
    """Lets pickle find the originals where their names say."""
    for name, cls in originals.CLASSES.items():
        parts = name.split(".")
        for end in range(1, len(parts)):
            package = ".".join(parts[:end])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setattr(sys.modules[package], parts[-1], cls, raising=False)


@pytest.mark.parametrize("case", [CRISS_CROSS, ANN])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_compute_with_their_own_parameters(case, how, monkeypatch):
    block, inputs = make(case)
    block.eval()
    ours = patched(block)
    register(monkeypatch)
    twin = copy.deepcopy(ours) if how == "deepcopy" else pickle.loads(pickle.dumps(ours))
    assert twin.forward.func is ours.forward.func
    assert torch.equal(twin(*inputs), ours(*inputs))
    before = ours(*inputs)
    with torch.no_grad():
        for x in (*twin.parameters(), *block.parameters()):
            x.mul_(1.5)
    torch.testing.assert_close(twin(*inputs), block(*inputs))
    assert torch.equal(ours(*inputs), before)
    ctxops.unpatch(twin)
    torch.testing.assert_close(twin(*inputs), block(*inputs))


def changed(change, case=CRISS_CROSS):
    block = make(case)[0]
    change(block)
    return block


def _replace_forward(block):
    block.forward = lambda x: x


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (lambda: changed(_replace_forward), "its forward has been replaced"),
        (lambda: changed(lambda b: delattr(b, "key_conv")), "it has no child 'key_conv'"),
        (
            lambda: changed(lambda b: b.add_module("drop", nn.Dropout())),
            "it has an unknown child 'drop'",
        ),
        (
            lambda: changed(lambda b: b.register_buffer("bias", torch.ones(1))),
            "it has an unknown tensor 'bias'",
        ),
        (
            lambda: changed(lambda b: delattr(b, "mode"), "mmcv.cnn.bricks.non_local.NonLocal2d"),
            "it has no attribute 'mode'",
        ),
        (
            lambda: originals.Disentangled(8, mode="gaussian"),
            "it has no child 'phi'",
        ),
        (
            lambda: originals.Disentangled(8, sub_sample=True),
            "the original computes neither mode='gaussian' nor sub_sample=True correctly",
        ),
        (
            lambda: originals.NonLocal2d(8, mode="dot_product"),
            "no operator computes mode='dot_product'",
        ),
        (
            lambda: changed(
                lambda b: setattr(b, "query_downsample", nn.MaxPool2d(2)),
                f"{MMSEG}.ann_head.SelfAttentionBlock",
            ),
            "no operator computes query_downsample",
        ),
    ],
)  # fmt: skip
def test_refused(block, reason):
    block = block()
    before = block.__dict__.get("forward")
    (swap,) = ctxops.patch(nn.Sequential(block))
    assert (swap.name, swap.by, swap.refused) == ("0", "", reason)
    assert block.__dict__.get("forward") is before


def test_refused_signature(monkeypatch):
    def forward(self, x, mask=None):
        return x

    cls = originals.CrissCrossAttention
    monkeypatch.setattr(cls, "forward", forward)
    (swap,) = ctxops.patch(cls(8))
    assert swap.refused == "the forward of its class has been replaced"
    monkeypatch.setattr(
        cls, "forward", types.FunctionType(forward.__code__, {"__name__": cls.__module__})
    )
    (swap,) = ctxops.patch(cls(8))
    assert swap.refused == "its forward takes (x, mask), expected (x)"


def test_unpatch_leaves_what_others_put_there():
    block = patched(make(CRISS_CROSS)[0])
    _replace_forward(block)
    theirs = block.forward
    ctxops.unpatch(block)
    assert block.forward is theirs


@pytest.mark.parametrize("function", [ctxops.patch, ctxops.unpatch])
def test_argument(function):
    for wrong in (None, [nn.ReLU()]):
        with pytest.raises(TypeError, match="model must be"):
            function(wrong)


def test_blocks_of_ann_take_the_products_of_ours():
    """The concatenation of AFNB, its W_o and its value meet the anchors, not the map."""
    theirs = originals.AFNB(6, 8, 4, 8).eval()
    ours = ctxops.nn.AFNB(6, 8, 4, 4, output_sizes=(1, 3), fuse="concat").eval()
    counts = []
    for block in (ours, patched(theirs), theirs):
        with flop_counter() as counter:
            block(torch.randn(LOW), torch.randn(MAP))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] < counts[2]


@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    block, inputs = make(ANN)
    block.eval()
    compiled = torch.compile(patched(block), fullgraph=True, backend="aot_eager")
    for x, y in zip(maps_of(compiled, inputs), maps_of(block, inputs), strict=True):
        torch.testing.assert_close(x, y)
