"""Networks of sssegmentation, written out in plain torch, against what their checkpoints become.

``sssegmentation_r18.txt`` has the names of their checkpoints.
"""

import ast
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from checkpoints import (
    Original,
    anchors,
    attention,
    psa_mask,
    random_state_dict,
    read_listings,
)
from modules import mostly_slow

pytest.importorskip("timm")

from ctxops.__main__ import main
from ctxops.models import import_checkpoint
from ctxops.nn import FeatureMemory

LISTINGS = read_listings(Path(__file__).with_name("sssegmentation_r18.txt"))
SIZE = (35, 43)


def checkpoint(name):
    state_dict = random_state_dict(LISTINGS[name])
    # One module under two names.
    shared = "apn_block.stages.0.key_project"
    for key in [key for key in state_dict if key.startswith(shared)]:
        state_dict[key.replace("key_project", "query_project")] = state_dict[key]
    return state_dict


# Their networks, written out ----------------------------------------------------------------------


def resnet18(o, image, output_stride=8):
    """The maps of all stages; the first convolution of a block alone is dilated."""
    dilations = {8: [(1, 1), (1, 1), (1, 2), (2, 4)], 32: [(1, 1)] * 4}[output_stride]
    x = o.conv("backbone_net.conv1", image, stride=2, padding=3)
    x = F.max_pool2d(o.norm("backbone_net.bn1", x).relu(), 3, 2, 1)
    maps = []
    for stage, rates in enumerate(dilations, 1):
        for i, d in enumerate(rates):
            name = f"backbone_net.layer{stage}.{i}"
            stride = 2 if i == 0 and stage > 1 and 2**stage < output_stride else 1
            y = o.conv(f"{name}.conv1", x, stride=stride, padding=d, dilation=d)
            y = o.conv(f"{name}.conv2", o.norm(f"{name}.bn1", y).relu(), padding=1)
            if f"{name}.downsample.0.weight" in o.tensors:
                x = o.conv(f"{name}.downsample.0", x, stride=stride)
                x = o.norm(f"{name}.downsample.1", x)
            x = (x + o.norm(f"{name}.bn2", y)).relu()
        maps.append(x)
    return maps


def end(o, x):
    """Convolution, norm, ReLU, dropout, classifier."""
    return o.conv("decoder.4", o.cbr("decoder", x))


def fcn(o, maps):
    y = o.cbr("decoder", maps[-1])
    y = o.norm("decoder.4", o.conv("decoder.3", y, padding=1)).relu()
    return o.conv("decoder.7", y)


def fcn1(o, maps):
    return end(o, maps[-1])


def ppm(o, name, x):
    y = [x]
    for i, n in enumerate((1, 2, 3, 6)):
        grid = o.conv(f"{name}.branches.{i}.1", F.adaptive_avg_pool2d(x, n))
        y.append(o.resize(o.norm(f"{name}.branches.{i}.2", grid).relu(), x.shape[2:]))
    return o.cbr(f"{name}.bottleneck", torch.cat(y, 1))


def aspp(o, name, x):
    y = [o.cbr(f"{name}.parallel_branches.{i}", x, d) for i, d in enumerate((1, 12, 24, 36))]
    image = o.conv(f"{name}.global_branch.1", x.mean((2, 3), keepdim=True))
    y.append(o.norm(f"{name}.global_branch.2", image).relu().expand_as(y[0]))
    return o.cbr(f"{name}.bottleneck", torch.cat(y, 1))


def psanet(o, maps):
    """On a map with an even side."""
    x = maps[-1]
    size = tuple(side // 2 for side in x.shape[2:])
    parts = []
    for kind, end_of_name in ("collect", ""), ("distribute", "_p"):
        y = o.resize(o.cbr(f"reduce{end_of_name}", x), size)
        mask = o.conv(f"attention{end_of_name}.3", o.cbr(f"attention{end_of_name}", y))
        weights = psa_mask(kind, mask, (5, 5)).softmax(1).flatten(2)
        parts.append((y.flatten(2) @ weights).unflatten(2, size))
    y = o.cbr("proj", F.pad(torch.cat(parts, 1), (1, 1, 1, 1)))
    return end(o, torch.cat([x, o.resize(y, x.shape[2:])], 1))


def pspnet(o, maps):
    return o.conv("decoder.1", ppm(o, "ppm_net", maps[-1]))


def deeplabv3(o, maps):
    return o.conv("decoder.1", aspp(o, "aspp_net", maps[-1]))


def ann(o, maps):
    def block(name, low, high):
        part = f"{name}.stages.0"
        query, key = o.cbr(f"{part}.query_project", high), o.cbr(f"{part}.key_project", low)
        value = anchors(o.conv(f"{part}.value_project", low))
        context = attention(query, anchors(key), value, 8**-0.5)
        context = o.conv(f"{part}.out_project", context)
        return o.cb(f"{name}.bottleneck", torch.cat([context, high], 1))

    x = o.cbr("bottleneck", block("afn_block", *maps[-2:]))
    return o.conv("decoder.1", block("apn_block", x, x).relu())


def apcnet(o, maps):
    x = maps[-1]
    contexts = [x]
    for i, n in enumerate((1, 2, 3, 6)):
        name = f"acm_modules.{i}"
        grid = o.cbr(f"{name}.pooled_redu_conv", F.adaptive_avg_pool2d(x, n)).flatten(2)
        y = o.cbr(f"{name}.input_redu_conv", x)
        mean = o.cbr(f"{name}.global_info", y.mean((2, 3), keepdim=True))
        affinity = o.conv(f"{name}.gla", y + mean).sigmoid()
        z = (grid @ affinity.flatten(2)).unflatten(2, y.shape[2:])
        z = (o.cbr(f"{name}.residual_conv", z) + y).relu()
        contexts.append(o.cbr(f"{name}.fusion_conv", z))
    return end(o, torch.cat(contexts, 1))


def between(o, x, suffix, block):
    y = block(o.cbr(f"conv_before_{suffix}", x))
    return end(o, torch.cat([x, o.cbr(f"conv_after_{suffix}", y)], 1))


def ccnet(o, maps):
    def criss_cross(x):
        q, k, v = (o.conv(f"cca.{part}_conv", x) for part in ("query", "key", "value"))
        column = torch.einsum("bchw,bciw->bhwi", q, k)
        row = torch.einsum("bchw,bchj->bhwj", q, k)
        height = x.shape[2]
        itself = torch.eye(height, dtype=torch.bool)[:, None, :]
        column = column.masked_fill(itself, -torch.inf)  # the row has it
        weights = torch.cat([column, row], 3).softmax(3)
        y = torch.einsum("bciw,bhwi->bchw", v, weights[..., :height])
        y = y + torch.einsum("bchj,bhwj->bchw", v, weights[..., height:])
        return o.tensors["cca.gamma.scale"] * y + x

    return between(o, maps[-1], "cca", lambda x: criss_cross(criss_cross(x)))


def danet(o, maps):
    x = o.cbr("pam_in_conv", maps[-1])
    parts = (o.conv(f"pam_net.{part}_project", x) for part in ("query", "key", "value"))
    position = o.cbr("pam_out_conv", o.tensors["pam_net.gamma.scale"] * attention(*parts) + x)
    x = o.cbr("cam_in_conv", maps[-1])
    rows = x.flatten(2)
    energy = rows @ rows.mT
    weights = (energy.amax(2, keepdim=True) - energy).softmax(2)
    attended = (weights @ rows).unflatten(2, x.shape[2:])
    channel = o.cbr("cam_out_conv", o.tensors["cam_net.gamma.scale"] * attended + x)
    return o.conv("decoder_pamcam.1", position + channel)


def dnlnet(o, maps):
    def block(x):
        q, k, v = (o.conv(f"dnl_block.{part}.0", x) for part in ("theta", "phi", "g"))
        q, k = (y - y.mean((2, 3), keepdim=True) for y in (q, k))
        pairwise = attention(q, k, v, 8**-0.5 / 0.05)
        mask = o.conv("dnl_block.conv_mask", x).flatten(2).softmax(2)
        unary = (v.flatten(2) @ mask.mT).unsqueeze(3)
        return x + o.cb("dnl_block.conv_out", pairwise + unary)

    return between(o, maps[-1], "dnl", block)


def nonlocal_(o, maps):
    def block(x):
        q, k, v = (o.conv(f"nl_block.{part}.0", x) for part in ("theta", "phi", "g"))
        return x + o.cb("nl_block.conv_out", attention(q, k, v, 8**-0.5))

    return between(o, maps[-1], "nl", block)


def self_attention(o, name, query, context):
    query, key = (
        o.cbr(f"{name}.{part}_project.1", o.cbr(f"{name}.{part}_project.0", x))
        for part, x in (("query", query), ("key", context))
    )
    attended = attention(query, key, o.cbr(f"{name}.value_project", context), 8**-0.5)
    return o.cbr(f"{name}.out_project", attended)


def ocrnet(o, maps):
    regions = o.conv("auxiliary_decoder.4", o.cbr("auxiliary_decoder", maps[-2]))
    pixels = o.cbr("bottleneck", maps[-1])
    objects = (pixels.flatten(2) @ regions.flatten(2).softmax(2).mT).unsqueeze(3)
    name = "object_context_block"
    context = self_attention(o, name, pixels, objects)
    return o.conv("decoder.1", o.cbr(f"{name}.bottleneck", torch.cat([context, pixels], 1)))


def mcibi(o, maps, context=None, hard=False):
    name = "memory_module"
    r = o.cbr("bottleneck", maps[-1])
    weights = o.conv("decoder_stage1.4", o.cbr("decoder_stage1", r)).softmax(1)
    if hard:
        weights = F.one_hot(weights.argmax(1), 7).movedim(3, 1).float()
    rows = torch.einsum("bkhw,kc->bchw", weights, o.tensors[f"{name}.memory"][:, 0])
    y = torch.cat([r, self_attention(o, f"{name}.self_attention", r, rows)], 1)
    y = o.cbr(f"{name}.bottleneck", y)
    if context is not None:
        within = context(o, "context_within_image_module", maps[-1])
        within = self_attention(o, f"{name}.self_attention_ms", r, within)
        y = o.cbr(f"{name}.bottleneck_ms", torch.cat([within, y], 1))
    return o.conv("decoder_stage2.4", o.cbr("decoder_stage2", y))


def upernet(o, maps):
    *finer, last = maps
    y = ppm(o, "ppm_net", last)
    levels = [y]
    for i in (2, 1, 0):
        y = o.cbr(f"lateral_convs.{i}", finer[i]) + o.resize(y, finer[i].shape[2:])
        levels.insert(0, o.cbr(f"fpn_convs.{i}", y))
    return end(o, torch.cat([o.resize(x, maps[0].shape[2:]) for x in levels], 1))


HEADS = {
    "ann": ann,
    "apcnet": apcnet,
    "ccnet": ccnet,
    "danet": danet,
    "deeplabv3": deeplabv3,
    "dnlnet": dnlnet,
    "fcn": fcn,
    "fcn1": fcn1,
    "mcibi": mcibi,
    "mcibi_aspp": lambda o, maps: mcibi(o, maps, aspp),
    "mcibi_ppm": lambda o, maps: mcibi(o, maps, ppm),
    "nonlocal": nonlocal_,
    "ocrnet": ocrnet,
    "psanet": psanet,
    "pspnet": pspnet,
    "upernet": upernet,
}


# Tests --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def maps(image):
    """Those of the backbone, whose numbers are the same in all checkpoints."""
    o = Original(checkpoint("fcn"))
    with torch.no_grad():
        return resnet18(o, image)


def assert_imports(name, image, maps, head, **options):
    state_dict = checkpoint(name)
    imported = import_checkpoint(state_dict, **options)
    model = name.split("_")[0].rstrip("1")
    assert (imported.source, imported.model) == ("sssegmentation", model)
    o = Original(state_dict, conv="{}.0", norm="{}.1")
    network = imported.build()
    with torch.no_grad():
        expected = o.resize(head(o, maps), SIZE)
        assert expected.std() > 0.1
        torch.testing.assert_close(network(image).logits, expected, rtol=0, atol=1e-5)
        if network.auxiliary is not None:
            expected = o.conv("auxiliary_decoder.4", o.cbr("auxiliary_decoder", maps[-2]))
            torch.testing.assert_close(network.auxiliary(maps[-2]), expected, rtol=0, atol=1e-5)
    return imported


@pytest.mark.parametrize(
    "name", mostly_slow(sorted(HEADS), "ann", "deeplabv3", "mcibi_aspp", "upernet")
)
def test_network(name, image, maps):
    if name == "upernet":
        with torch.no_grad():
            maps = resnet18(Original(checkpoint(name)), image, output_stride=32)
    assert_imports(name, image, maps, HEADS[name])


def test_upernet_of_mmsegmentation():
    """The same network by other names."""
    ours = checkpoint("upernet")
    names = {
        r"backbone_net\.(.*)": r"backbone.\1",
        r"ppm_net\.branches\.(.)\.1": r"decode_head.psp_modules.\1.1.conv",
        r"ppm_net\.branches\.(.)\.2": r"decode_head.psp_modules.\1.1.bn",
        r"ppm_net\.bottleneck\.0": "decode_head.bottleneck.conv",
        r"ppm_net\.bottleneck\.1": "decode_head.bottleneck.bn",
        r"(lateral|fpn)_convs\.(.)\.0": r"decode_head.\1_convs.\2.conv",
        r"(lateral|fpn)_convs\.(.)\.1": r"decode_head.\1_convs.\2.bn",
        r"decoder\.0": "decode_head.fpn_bottleneck.conv",
        r"decoder\.1": "decode_head.fpn_bottleneck.bn",
        r"decoder\.4": "decode_head.conv_seg",
        r"auxiliary_decoder\.0": "auxiliary_head.convs.0.conv",
        r"auxiliary_decoder\.1": "auxiliary_head.convs.0.bn",
        r"auxiliary_decoder\.4": "auxiliary_head.conv_seg",
    }
    theirs = {}
    for name, x in ours.items():
        module, _, leaf = name.rpartition(".")
        (pattern,) = (each for each in names if re.fullmatch(each, module))
        theirs[re.sub(pattern, names[pattern], module) + "." + leaf] = x
    imported, expected = import_checkpoint(theirs), import_checkpoint(ours)
    assert (imported.source, imported.model) == ("mmsegmentation", "upernet")
    usual = {"output_stride": 32, "contract_dilation": True, "output_sizes": (1, 2, 3, 6)}
    usual |= {"dropout": 0.1, "auxiliary_dilation": 1, "auxiliary_bias": False}
    assert imported.arguments == expected.arguments | usual
    assert imported.state_dict.keys() == expected.state_dict.keys()
    assert all(x.equal(expected.state_dict[name]) for name, x in imported.state_dict.items())


def test_hard_weights(image, maps):
    """Which no shape tells."""
    assert_imports("mcibi", image, maps, lambda *args: mcibi(*args, hard=True), hard=True)


def test_memory():
    """The rows, those that hold something, and no step."""
    state_dict = checkpoint("mcibi_ppm")
    state_dict["memory_module.memory"][2] = 0
    imported = import_checkpoint(state_dict)
    assert imported.zeros == ["bank.step"]
    bank = imported.build().bank
    assert bank.memory.equal(state_dict["memory_module.memory"][:, 0])
    assert bank.initialized.tolist() == [True, True, False, True, True, True, True]


@pytest.mark.parametrize("ignored", [-100, 255])
def test_step_of_the_memory(ignored):
    """With the options that the documentation names, it is theirs."""
    generator = torch.Generator().manual_seed(1)
    bank = FeatureMemory(
        7, 16, momentum="lr", base_lr=0.01, init="mean", sync="reference", ignore_index=ignored
    )
    memory = torch.zeros(7, 16)
    for step in range(3):
        features = torch.randn(2, 16, 5, 6, generator=generator)
        labels = torch.randint(7 - 2 * (step == 0), (2, 9, 11), generator=generator)
        labels[:, :2] = ignored
        lr = 0.01 * (1 - step / 9)
        bank(features, labels, lr=lr)
        pixels = F.interpolate(features, (9, 11), mode="bilinear").movedim(1, 3)
        for k in range(7):
            rows = pixels[labels == k]
            if not memory[k].any():
                memory[k] = rows.mean(0) if len(rows) else 0
            else:
                weights = 1 - F.cosine_similarity(rows, memory[k].expand_as(rows))
                mean = (rows * (weights / weights.sum())[:, None]).sum(0)
                momentum = 0.9 * lr / 0.01
                memory[k] = (1 - momentum) * memory[k] + momentum * mean
        torch.testing.assert_close(bank.memory, memory, rtol=1e-5, atol=1e-6)
    assert bank.initialized.all()


@pytest.mark.slow
def test_check(tmp_path, monkeypatch, capsys):
    """The command prints what the page's script prints of the original; an option changes it."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(1).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 60)).save("street.png")
    state_dict = checkpoint("fcn1")
    torch.save(state_dict, "theirs.pth")
    command = ["convert", "theirs.pth", "ours.pt", "--check", "street.png"]
    command += ["--option", "output_stride=32"]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert main([*command, "--option", "align_corners=True"]) == 0
    other = capsys.readouterr().out.splitlines()[-1]

    class TheirNetwork:
        def encode_decode(self, image, metas):
            o = Original(state_dict, conv="{}.0", norm="{}.1")
            logits = fcn1(o, resnet18(o, image, output_stride=32))
            return o.resize(logits, metas[0]["img_shape"])

    apis = types.SimpleNamespace(init_model=lambda *args, device: TheirNetwork())
    monkeypatch.setitem(sys.modules, "mmseg", types.SimpleNamespace(apis=apis))
    monkeypatch.setitem(sys.modules, "mmseg.apis", apis)
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    (script,) = re.findall(r"```python\n([^`]*mmseg[^`]*)```", page)
    exec(script, {})
    numbers, counts = capsys.readouterr().out.splitlines()
    shape, (mean, deviation) = numbers[: numbers.index(")") + 1], numbers.split()[-2:]
    expected = f"check of street.png: logits {shape}, mean {float(mean):.5g}, "
    expected += f"deviation {float(deviation):.5g}, pixels of each class "
    assert (printed, shape) == (expected + counts, "(1, 7, 512, 512)")
    counts, others = (ast.literal_eval(x.partition("class ")[2]) for x in (printed, other))
    assert sum(counts) == sum(others) == 512 * 512
    assert sum(abs(a - b) for a, b in zip(counts, others, strict=True)) > 512 * 512 / 1000


def test_check_of_no_image(tmp_path, capsys):
    """Nothing is converted."""
    theirs, ours = tmp_path / "theirs.pth", tmp_path / "ours.pt"
    torch.save(checkpoint("fcn1"), theirs)
    assert main(["convert", str(theirs), str(ours), "--check", str(theirs)]) == 1
    assert "theirs.pth is no image that can be read" in capsys.readouterr().err
    assert not ours.exists()


def test_several_representatives_of_a_category():
    state_dict = checkpoint("mcibi")
    state_dict["memory_module.memory"] = torch.zeros(7, 2, 16)
    with pytest.raises(ValueError, match=r"bank\.memory \(7, 2, 16\) instead of \(7, 16\)"):
        import_checkpoint(state_dict)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["memory_module.memory", "decoder_pr.conv1.weight"],
            r"of sssegmentation's MCIBI\+\+, which",
        ),
        (["enc_module.encoding_project.0.weight"], "EncNet, PointRend or another network, which"),
    ],
)
def test_other_networks_are_refused_by_name(names, message):
    names = ["backbone_net.conv1.weight", *names]
    with pytest.raises(ValueError, match=message):
        import_checkpoint({name: torch.zeros(1) for name in names})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cls_token", "a ViT or a BEiT"),
        ("stages.0.blocks.0.norm1.weight", "a Swin"),
        ("downsample_layers.0.0.weight", "a ConvNeXt"),
        ("patch_embeds.0.projection.weight", "a Twins"),
    ],
)
def test_other_backbones_are_refused_by_name(name, kind):
    state_dict = {n: x for n, x in checkpoint("upernet").items() if not n.startswith("backbone")}
    state_dict[f"backbone_net.{name}"] = torch.zeros(1)
    with pytest.raises(ValueError, match=f"the backbone is {kind}; ResNets, ResNeSts and HRNets"):
        import_checkpoint(state_dict)


def test_weight_of_no_convolution():
    state_dict = checkpoint("deeplabv3")
    state_dict["aspp_net.bottleneck.0.weight"] = torch.zeros(16)
    with pytest.raises(ValueError, match=r"decoder\.fuse\.0\.weight \(16,\) instead of \(16, 80,"):
        import_checkpoint(state_dict)
