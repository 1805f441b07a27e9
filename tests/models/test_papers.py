# SPDX-License-Identifier: Apache-2.0
"""Every row of the papers' tables that names a network is a call of ``create_model``."""

import itertools
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("timm")

import timm

from ctxops.models import create_model
from modules import mostly_slow

TABLES = {"ANN": 9, "GALD": 11, "GFF": 10, "GCN": 11, "MCIBI": 9}


def net(name, backbone, num_classes=19, **options):
    return {"name": name, "backbone": backbone, "num_classes": num_classes, **options}


def ann(**options):
    return net("ann", "resnet101s", **options)


def gald(global_aggregation, local_distribution, backbone="resnet50s", **options):
    return net(
        "gald",
        backbone,
        global_aggregation=global_aggregation,
        local_distribution=local_distribution,
        **options,
    )


def ldv2(global_aggregation, kernel_size=5, dilation=6, **options):
    """The settings of Table II (b) that give the figures of Table I (d)."""
    sampling = {"kernel_size": kernel_size, "dilation": dilation}
    return gald(global_aggregation, "ldv2", **sampling, **options)


def authors_pspnet(backbone="resnet101s", **options):
    """The PSPNet of the authors of GFF and GALD."""
    details = {"branch_activation": False, "auxiliary_channels": 512, "auxiliary_bias": True}
    return net("pspnet", backbone, **details, **options)


def gff(backbone="resnet101s", **options):
    return net("gff", backbone, **options)


def gcn(score="gcn", kernel_size=15, backbone="resnet152", num_classes=21, **options):
    """Without boundary refinement, as the paper has its networks but for Tables 5 to 10."""
    options = {"boundary_refinement": False} | options
    if score != "pointwise":
        options["kernel_size"] = kernel_size
    return net("gcn", backbone, num_classes, score=score, **options)


def refined_gcn(**options):
    return gcn(boundary_refinement=True, **options)


def mcibi(context, backbone="resnet50c", num_classes=150, **options):
    return net("mcibi", backbone, num_classes, context=context, **options)


def ade(name, backbone="resnet50c", **options):
    return net(name, backbone, 150, **options)


ASPP_LDV2_101 = ldv2("aspp", backbone="resnet101s")
# Other data sets have the dilation of the text.
GALDV2 = ldv2("aspp", dilation=3, backbone="resnet101s")
GALDV1 = gald("cgnl", "ldv1", backbone="resnet101s")

ROWS = {
    ("ANN", "2"): {
        "DenseASPP": net("denseaspp", "densenet161"),
        "PSANet": net("psanet", "resnet101s", mask_size=(129, 257)),
        "Ours": ann(),
    },
    ("ANN", "3"): {"Ours": ann()},
    ("ANN", "4"): {"Ours": ann(num_classes=150)},
    ("ANN", "5"): {"Ours": ann(num_classes=60)},
    ("ANN", "6"): {
        "Baseline": ann(fusion=None, attention=None),
        "+ NB": ann(fusion=None, attention="nb"),
        "+ APNB": ann(fusion=None, attention="apnb"),
        "+ Common fusion": ann(fusion="common", attention=None),
        "+ FNB": ann(fusion="fnb", attention=None),
        "+ AFNB": ann(fusion="afnb", attention=None),
        "+ Common fusion + NB": ann(fusion="common", attention="nb"),
        "+ FNB + NB": ann(fusion="fnb", attention="nb"),
        "+ AFNB + APNB (Full)": ann(),
    },
    ("ANN", "7"): {
        "random 15": ann(sampling="random", output_sizes=(15,)),
        "max 15": ann(sampling="max", output_sizes=(15,)),
        "average 15": ann(sampling="avg", output_sizes=(15,)),
        "pyramid random 1,2,3,6": ann(sampling="random", output_sizes=(1, 2, 3, 6)),
        "pyramid max 1,2,3,6": ann(sampling="max", output_sizes=(1, 2, 3, 6)),
        "pyramid average 1,2,3,6": ann(output_sizes=(1, 2, 3, 6)),
        "pyramid average 1,3,6,8": ann(output_sizes=(1, 3, 6, 8)),
        "pyramid average 1,4,8,12": ann(output_sizes=(1, 4, 8, 12)),
    },
    ("ANN", "8"): {"COCO-Stuff Ours": ann(num_classes=171), "NYUD-V2 Ours": ann(num_classes=40)},
    ("ANN", "9"): {
        "Baseline": ann(fusion=None, attention=None),
        "4 & 5": ann(attention=None, fuse_stages=(4,)),
        "3 & 5, 4 & 5": ann(attention=None, fuse_stages=(3, 4)),
        "2 & 5, 3 & 5, 4 & 5": ann(attention=None, fuse_stages=(2, 3, 4)),
    },
    ("GALD", "I a"): {
        "FCN": net("fcn", "resnet50s"),
        "+ASPP": gald("aspp", None),
        "+NL": gald("nonlocal", None),
        "+PSP": gald("ppm", None),
        "+CGNL": gald("cgnl", None),
    },
    ("GALD", "I b"): {
        "FCN": net("fcn", "resnet50s"),
        "+LDv1": gald(None, "ldv1"),
        "+PSP + LDv1": gald("ppm", "ldv1"),
        "+ASPP + LDv1": gald("aspp", "ldv1"),
        "+NL + LDv1": gald("nonlocal", "ldv1"),
        "+CGNL + LDv1": gald("cgnl", "ldv1"),
    },
    ("GALD", "I c"): {
        "FCN": net("fcn", "resnet50s"),
        "+Parallel": gald("cgnl", "ldv1", arrangement="parallel"),
        "+LDGA": gald("cgnl", "ldv1", arrangement="ldga"),
        "+GALD": gald("cgnl", "ldv1", arrangement="gald"),
    },
    ("GALD", "I d"): {
        "FCN": net("fcn", "resnet50s"),
        "+LDv2": ldv2(None, kernel_size=7),
        "+PSP + LDv2": ldv2("ppm"),
        "+ASPP + LDv2": ldv2("aspp"),
        "+NL + LDv2": ldv2("nonlocal"),
        "+CGNL + LDv2": ldv2("cgnl"),
    },
    ("GALD", "II a"): {
        "FCN": net("fcn", "resnet50s"),
        "FCN + CGNL": gald("cgnl", None),
        "+CGNL+LD(depth-wise convolution)": gald("cgnl", "ldv1", mask_downsample="conv"),
        "+CGNL+LD(bilinear interpolation)": gald("cgnl", "ldv1", mask_downsample="bilinear"),
        "+CGNL+LD(average pooling)": gald("cgnl", "ldv1", mask_downsample="avg"),
    },
    ("GALD", "II b"): {
        "FCN": net("fcn", "resnet50s"),
        "+LDv2(k=3, r=3)": ldv2(None, 3, 3),
        "+LDv2(k=5, r=3)": ldv2(None, 5, 3),
        "+LDv2(k=5, r=6)": ldv2(None, 5, 6),
        "+LDv2(k=7, r=6)": ldv2(None, 7, 6),
        "FCN + ASPP": gald("aspp", None),
        "+ASPP+LDv2(k=3, r=3)": ldv2("aspp", 3, 3),
        "+ASPP+LDv2(k=3, r=6)": ldv2("aspp", 3, 6),
        "+ASPP+LDv2(k=5, r=3)": ldv2("aspp", 5, 3),
        "+ASPP+LDv2(k=5, r=6)": ldv2("aspp", 5, 6),
        "+ASPP+LDv2(k=7, r=6)": ldv2("aspp", 7, 6),
    },
    ("GALD", "II c"): {
        "Key & Query": ldv2("aspp"),
        "Key": ldv2("aspp", key_from="global"),
        "Query": ldv2("aspp", query_from="global"),
    },
    ("GALD", "III"): {
        "ResNet50": ldv2("aspp"),
        "ResNet101": ASPP_LDV2_101,
        "ResNet101 MG": ASPP_LDV2_101 | {"multi_grid": (1, 2, 4)},
    },
    ("GALD", "IV"): {
        "FCN": net("fcn", "resnet50s"),
        "GA": gald("aspp", None),
        "GA LDv1": gald("aspp", "ldv1"),
        "GA LDv2": ldv2("aspp"),
        "FCN (ResNet101) GA": gald("aspp", None, backbone="resnet101s"),
    },
    ("GALD", "VI"): {
        "PSPNet": authors_pspnet(),
        "DenseASPP": net("denseaspp", "densenet161"),
        "CCNet": net("ccnet", "resnet101s"),
        "DANet": net("danet", "resnet101s"),
        "OCRNet": net("ocrnet", "resnet101s"),
        "GFFNet": gff(),
        "GALDv1": GALDV1,
        "GALDv2": ASPP_LDV2_101,
    },
    ("GALD", "VIII"): {
        "ANN": ann(num_classes=60),
        "APCNet": net("apcnet", "resnet101s", 60),
        "GALDv1": GALDV1 | {"num_classes": 60},
        "GALDv2": GALDV2 | {"num_classes": 60},
    },
    ("GALD", "IX"): {
        "CGNL only": gald("cgnl", None, backbone="resnet101s", num_classes=150),
        "GALDv1": GALDV1 | {"num_classes": 150},
        "ASPP only": gald("aspp", None, backbone="resnet101s", num_classes=150),
        "GALDv2": GALDV2 | {"num_classes": 150},
    },
    ("GALD", "X"): {
        "GALDv1": GALDV1 | {"num_classes": 11},
        "GALDv2": GALDV2 | {"num_classes": 11},
    },
    ("GALD", "XI"): {
        "GALDv1": GALDV1 | {"num_classes": 171},
        "GALDv2": GALDV2 | {"num_classes": 171},
    },
    ("GFF", "1"): {
        "PSPNet": authors_pspnet(),
        "PSPNet + Concat": gff(fusion="concat", dense_pyramid=False),
        "PSPNet + Addition": gff(fusion="addition", dense_pyramid=False),
        "PSPNet + FPN": gff(fusion="fpn", dense_pyramid=False),
        "PSPNet + Gated FPN": gff(fusion="gated_fpn", dense_pyramid=False),
        "PSPNet + GFF": gff(dense_pyramid=False),
    },
    ("GFF", "2"): {
        "PSPNet": authors_pspnet(),
        "PSPNet + GFF": gff(dense_pyramid=False),
        "PSPNet + GFF + DFP": gff(),
    },
    ("GFF", "3"): {
        "PSPNet": authors_pspnet(ceil_mode=True),
        "PSPNet + GFF": gff(dense_pyramid=False, ceil_mode=True),
        "PSPNet + GFF + DFP": gff(literal=True, ceil_mode=True),
    },
    ("GFF", "4"): {
        "DenseASPP": net("denseaspp", "densenet121"),
        "DenseASPP+GFF": gff("densenet121", context="denseaspp", dense_pyramid=False),
        "DenseASPP+GFF+DFP": gff("densenet121", context="denseaspp"),
        "PSP": authors_pspnet("resnet18"),
        "PSP + GFF": gff("resnet18", dense_pyramid=False),
        "PSP + GFF+DFP": gff("resnet18"),
    },
    ("GFF", "5"): {"GFFNet": gff()},
    ("GFF", "6"): {"GFFNet": gff(num_classes=150)},
    ("GFF", "7"): {"GFFNet": gff()},
    ("GFF", "9"): {
        "GFFNet ResNet50": gff("resnet50s", num_classes=60),
        "GFFNet ResNet101": gff(num_classes=60),
    },
    ("GFF", "10"): {"GFFNet": gff(num_classes=171)},
    ("GCN", "1"): {
        "base": gcn("pointwise"),
        **{f"k = {k}": gcn(kernel_size=k) for k in (3, 5, 7, 9, 11, 13, 15)},
    },
    ("GCN", "2"): {
        f"k = {k} {label}": gcn(score, k)
        for label, score in (("GCN", "gcn"), ("Conv", "conv"))
        for k in (3, 5, 7, 9)
    },
    ("GCN", "3"): {
        f"k = {k} {label}": gcn(score, k)
        for label, score in (("GCN", "gcn"), ("Stack", "stack"))
        for k in (3, 5, 7, 9, 11)
    },
    ("GCN", "4"): {
        "m = 2048 (Stack)": gcn("stack", 7),
        "m = 1024 (Stack)": gcn("stack", 7, mid_channels=1024),
        "m = 210 (Stack)": gcn("stack", 7, mid_channels=210),
        "2048 (GCN)": gcn(kernel_size=7),
    },
    ("GCN", "5"): {"Baseline": gcn("pointwise"), "GCN": gcn(), "GCN + BR": refined_gcn()},
    ("GCN", "6"): {
        "ResNet50 Baseline": gcn("pointwise", backbone="resnet50"),
        "ResNet50-GCN Baseline": gcn("pointwise", backbone="resnet50", global_backbone=True),
        "ResNet50 GCN + BR": refined_gcn(backbone="resnet50"),
        "ResNet50-GCN GCN + BR": refined_gcn(backbone="resnet50", global_backbone=True),
    },
    ("GCN", "7"): {"Baseline": gcn("pointwise"), "GCN": gcn(), "GCN + BR": refined_gcn()},
    ("GCN", "8"): {"Our approach": refined_gcn()},
    ("GCN", "9"): {"GCN + BR": refined_gcn(kernel_size=25, num_classes=19)},
    ("GCN", "10"): {"Our approach": refined_gcn(kernel_size=25, num_classes=19)},
    ("MCIBI", "1"): {
        "Baseline": ade("fcn"),
        "add": mcibi(None, fusion="add"),
        "weighted add": mcibi(None, fusion="weighted_add"),
        "concatenation": mcibi(None, fusion="concat"),
    },
    ("MCIBI", "2"): {
        "Poly": mcibi(None, memory_options={"cosine": False}),
        "Cosine": mcibi(None, memory_options={"momentum": "constant"}),
        "Cosine, Poly": mcibi(None),
        "Cosine, Poly, Clustering": mcibi(None, memory_options={"init": "clustering"}),
    },
    ("MCIBI", "5"): {
        "FCN": ade("fcn"),
        "FCN+MCIBI": mcibi(None),
        "PSPNet": ade("pspnet"),
        "PSPNet+MCIBI": mcibi("ppm"),
        "OCRNet": ade("ocrnet"),
        "OCRNet+MCIBI": mcibi("ocr"),
        "DeepLabV3": ade("deeplabv3"),
        "DeepLabV3+MCIBI": mcibi("aspp"),
    },
    ("MCIBI", "6"): {
        "CCNet": ade("ccnet", "resnet101c"),
        "PSPNet": ade("pspnet", "resnet101c"),
        "PSANet": ade("psanet", "resnet101c"),
        "APCNet": ade("apcnet", "resnet101c"),
        "OCRNet": ade("ocrnet", "resnet101c"),
        "OCRNet HRNetV2-W48": ade("ocrnet", "hrnet_w48", output_stride=4),
        "DeepLabV3 ResNeSt-50": ade("deeplabv3", "resnest50d"),
        "DeepLabV3 ResNeSt-101": ade("deeplabv3", "resnest101e"),
        "DeepLabV3+MCIBI ResNet-50": mcibi("aspp"),
        "DeepLabV3+MCIBI ResNet-101": mcibi("aspp", "resnet101c"),
        "DeepLabV3+MCIBI ResNeSt-101": mcibi("aspp", "resnest101e"),
        "DeepLabV3+MCIBI ViT-Large": mcibi("aspp", "vit_large_patch16_224", output_stride=16),
    },
    ("MCIBI", "7"): {
        "DeepLabV3+MCIBI ResNet-50": mcibi("aspp", num_classes=20),
        "DeepLabV3+MCIBI ResNet-101": mcibi("aspp", "resnet101c", 20),
        "DeepLabV3+MCIBI ResNeSt-101": mcibi("aspp", "resnest101e", 20),
        "DeepLabV3+MCIBI HRNetV2-W48": mcibi("aspp", "hrnet_w48", 20, output_stride=4),
    },
    ("MCIBI", "8"): {
        "DeepLabV3+MCIBI ResNet-50": mcibi("aspp", num_classes=19),
        "DeepLabV3+MCIBI ResNet-101": mcibi("aspp", "resnet101c", 19),
        "DeepLabV3+MCIBI ResNeSt-101": mcibi("aspp", "resnest101e", 19),
        "DeepLabV3+MCIBI HRNetV2-W48": mcibi("aspp", "hrnet_w48", 19, output_stride=4),
    },
    ("MCIBI", "9"): {
        "DeepLabV3+MCIBI ResNet-50": mcibi("aspp", num_classes=171),
        "DeepLabV3+MCIBI ResNet-101": mcibi("aspp", "resnet101c", 171),
        "DeepLabV3+MCIBI ResNeSt-101": mcibi("aspp", "resnest101e", 171),
        "DeepLabV3+MCIBI ViT-Large": mcibi("aspp", "vit_large_patch16_224", 171, output_stride=16),
    },
}

QUOTED = "figures quoted from other papers, of networks as these built and trained them"
SCALES = "the network of the row before, evaluated at several scales"
TRAINING = "the same network, trained on other data or in another phase"

# (paper, table) or (paper, table, row) -> why it is no call of create_model.
LEFT_OUT = {
    ("ANN", "1"): "single blocks, not networks",
    ("ANN", "3", "the other methods"): QUOTED,
    ("ANN", "4", "the other methods"): QUOTED,
    ("ANN", "5", "the other methods"): QUOTED,
    ("ANN", "8", "the other methods"): QUOTED,
    ("GALD", "III", "ResNet101 MG MS"): SCALES,
    ("GALD", "V"): "F-scores of the boundaries of GALDv1 and GALDv2, and quoted ones, by class",
    ("GALD", "VI", "AAF, SPyGR, SPNet, DGCNet, DMNet, HANet, ACNet"): QUOTED,
    ("GALD", "VII"): "GALDv1 and GALDv2 of Table VI, trained on other data, and quoted figures",
    ("GALD", "VIII", "the other methods"): QUOTED,
    ("GALD", "IX", "the other methods"): QUOTED,
    ("GALD", "X", "the other methods"): QUOTED,
    ("GALD", "X", "pretrained on Cityscapes"): TRAINING,
    ("GALD", "XI", "the other methods"): QUOTED,
    ("GFF", "2", "PSPNet + GFF + DFP + MS"): SCALES,
    ("GFF", "5", "the other methods"): QUOTED,
    ("GFF", "6", "the other methods"): QUOTED,
    ("GFF", "7", "the other methods"): QUOTED,
    ("GFF", "8"): "DeepLabv3+ with a Wider-ResNet, which timm does not have, and quoted figures",
    ("GFF", "9", "the other methods"): QUOTED,
    ("GFF", "10", "the other methods"): QUOTED,
    ("GCN", "6", "ImageNet cls err"): "classification of images",
    ("GCN", "7", "Stage-1, Stage-2, Stage-3"): TRAINING,
    ("GCN", "7", "Stage-3-MS, Stage-3-MS-CRF"): "evaluation at several scales, and a dense CRF",
    ("GCN", "8", "the other methods"): QUOTED,
    ("GCN", "9", "Stage-1, Stage-2, Stage-2-MS, Stage-2-MS-CRF"): TRAINING,
    ("GCN", "10", "the other methods"): QUOTED,
    ("GCN", "11"): "the backbones of Table 6, layer by layer",
    ("MCIBI", "2", "the rows with RCL"): "the networks of the rows without: RCL is a loss",
    ("MCIBI", "3"): "single modules, not networks",
    ("MCIBI", "4"): "FCN, DeepLabV3 and both with MCIBI of Table 5, tested on other data",
    ("MCIBI", "6", "the other methods"): QUOTED,
    ("MCIBI", "7", "the other methods"): QUOTED,
    ("MCIBI", "8", "the other methods"): QUOTED,
    ("MCIBI", "9", "the other methods"): QUOTED,
}

# Networks of a table on another backbone of the same family.
TINY = {
    "resnet": "test_resnet",
    "resnest": "test_resnet",
    "vit": "test_vit",
    "hrnet": "hrnet_w18_small",
    "densenet": "densenet121",
}
ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI")

STRIDES = {"gcn": 32, "hrnet_w48": 4, "vit_large_patch16_224": 16}


def stride_of(arguments: dict) -> int:
    parts = arguments["name"], arguments["backbone"]
    (stride,) = {STRIDES[part] for part in parts if part in STRIDES} or {8}
    return stride


def networks() -> Iterator:
    """Every network once, by its first row; in the quick suite once on each backbone."""
    seen, kinds = [], []
    for (paper, table), rows in ROWS.items():
        for row, arguments in rows.items():
            backbone = arguments["backbone"]
            (tiny,) = (name for family, name in TINY.items() if backbone.startswith(family))
            network = arguments | {"backbone": tiny}, stride_of(arguments)
            kind = arguments["name"], tiny
            if network not in seen:
                marks = pytest.mark.slow if kind in kinds else ()
                yield pytest.param(*network, id=f"{paper} {table}: {row}", marks=marks)
                seen.append(network)
                kinds.append(kind)


@pytest.mark.parametrize(("arguments", "stride"), [*networks()])
def test_row_is_a_network(arguments, stride):
    network = create_model(**arguments).eval()
    assert network.encoder.strides[-1] == stride
    with torch.no_grad():
        logits = network(torch.randn(1, 3, 33, 37)).logits
    assert logits.shape == (1, arguments["num_classes"], 33, 37)
    assert logits.isfinite().all()


def test_backbones_are_those_of_timm():
    backbones = {row["backbone"] for rows in ROWS.values() for row in rows.values()}
    assert backbones <= set(timm.list_models())


# One row for each network on each backbone, and of each backbone one network.
BACKBONES = {
    f"{arguments['name']} {arguments['backbone']}": arguments
    for rows in ROWS.values()
    for arguments in rows.values()
}
FIRST = {arguments["backbone"]: name for name, arguments in reversed(BACKBONES.items())}


@pytest.mark.parametrize("arguments", mostly_slow(BACKBONES, next(iter(FIRST.values()))))
def test_backbones_have_the_stride(arguments):
    with torch.device("meta"):
        network = create_model(**arguments)
    assert network.encoder.strides[-1] == stride_of(arguments)


@pytest.mark.parametrize("table", ROWS, ids=" ".join)
def test_rows_of_a_table_differ(table):
    for (row, arguments), (other, others) in itertools.combinations(ROWS[table].items(), 2):
        assert arguments != others, f"{row} and {other} are one network"


@pytest.mark.parametrize("paper", TABLES)
def test_every_table_is_here_or_left_out(paper):
    numbers = range(TABLES[paper])
    known = {ROMAN[i] if paper == "GALD" else str(i + 1) for i in numbers}
    here = {key[1].split()[0] for key in (*ROWS, *LEFT_OUT) if key[0] == paper}
    assert here == known


def test_what_is_left_out_has_no_network():
    for key, reason in LEFT_OUT.items():
        assert reason
        rows = ROWS.get(key[:2], {})
        assert not (len(key) == 2 and rows), f"{key} is left out as a whole, but has rows"
        assert not (len(key) == 3 and key[2] in rows), f"{key} is left out, but has a network"
