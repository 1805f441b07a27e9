# SPDX-License-Identifier: Apache-2.0
"""The defaults are a part of what a function is: most callers give nothing else."""

import inspect
from collections.abc import Callable

import ctxops
import ctxops.nn

# By public name what the arguments are where nobody gives them.
DEFAULTS = {
    "ctxops.asymmetric_attention": {"bias": None, "scale": None},
    "ctxops.category_context": {"hard": False},
    "ctxops.category_statistics": {
        "memory": None,
        "num_classes": None,
        "ignore_index": 255,
        "align_corners": False,
    },
    "ctxops.criss_cross_attention": {"scale": None},
    "ctxops.criss_cross_attention_weights": {"scale": None},
    "ctxops.gated_fusion": {"align_corners": False},
    "ctxops.neighborhood_attention": {
        "dilation": 1,
        "scale": None,
        "border": "zeros",
        "num_heads": 1,
    },
    "ctxops.neighborhood_attention_weights": {
        "dilation": 1,
        "scale": None,
        "border": "zeros",
        "num_heads": 1,
    },
    "ctxops.nonlocal_attention": {"scale": None},
    "ctxops.pyramid_pool": {"output_sizes": (1, 3, 6, 8), "mode": "avg"},
    "ctxops.random_anchor_indices": {"generator": None, "device": None},
    "ctxops.self_gated_fusion": {"bias": None, "align_corners": False},
    "ctxops.nn.AFNB": {
        "out_channels": None,
        "output_sizes": (1, 3, 6, 8),
        "fuse": None,
        "bias": True,
        "variant": "released",
        "sampling": "avg",
        "fold": True,
        "scale": None,
        "out_norm": False,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.APNB": {
        "out_channels": None,
        "output_sizes": (1, 3, 6, 8),
        "share": "query_key",
        "fuse": None,
        "bias": True,
        "variant": "released",
        "sampling": "avg",
        "fold": True,
        "scale": None,
        "out_norm": False,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.ASPP": {
        "channels": 512,
        "dilations": (12, 24, 36),
        "out_channels": None,
        "fuse_kernel_size": 3,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.AdaptiveContext": {
        "channels": 512,
        "output_sizes": (1, 2, 3, 6),
        "fusion": True,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.AdditionFusion": {
        "channels": 256,
        "align_corners": True,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.AsymmetricNonLocalContext": {
        "channels": 512,
        "key_channels": 256,
        "value_channels": 256,
        "output_sizes": (1, 3, 6, 8),
        "fuse": "concat",
        "bias": True,
        "variant": "released",
        "sampling": "avg",
        "fold": True,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.BoundaryRefinement": {"bias": True},
    "ctxops.nn.CGNL": {"groups": 8, "use_scale": False, "norm_layer": None},
    "ctxops.nn.ConcatContext": {"kernel_size": 3, "norm_layer": "torch.BatchNorm2d"},
    "ctxops.nn.ConcatFusion": {
        "channels": 256,
        "align_corners": True,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.ConvolutionStack": {"mid_channels": None, "bias": False},
    "ctxops.nn.CrissCrossAttention": {"reduction": 8},
    "ctxops.nn.DatasetContextAggregation": {
        "channels": 512,
        "within_channels": 0,
        "within_attention": True,
        "projection_layers": 2,
        "kernel_size": None,
        "fusion": "concat",
        "hard": False,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.DenseASPP": {
        "hidden_channels": 512,
        "channels": 128,
        "dilations": (3, 6, 12, 18, 24),
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.DenseFeaturePyramid": {
        "channels": 256,
        "literal": False,
        "align_corners": True,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.DisentangledNonLocal": {
        "key_channels": None,
        "temperature": 0.05,
        "use_scale": True,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.DualAttention": {
        "channels": 512,
        "reduction": 8,
        "bias": False,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.FeatureMemory": {
        "momentum": "poly",
        "base_momentum": 0.9,
        "total_steps": None,
        "power": 0.9,
        "base_lr": None,
        "init": "random",
        "cosine": True,
        "sync": "statistics",
        "process_group": None,
        "ignore_index": 255,
        "align_corners": False,
    },
    "ctxops.nn.FeaturePyramidFusion": {
        "channels": 256,
        "align_corners": True,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.FusionNonLocal2d": {
        "out_channels": None,
        "fuse": None,
        "bias": True,
        "variant": "released",
        "scale": None,
        "out_norm": False,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.GALD": {
        "arrangement": "gald",
        "downsample": 2,
        "residual": None,
        "concat": False,
        "align_corners": True,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.GCNBottleneck": {"stride": 1, "norm_layer": "torch.BatchNorm2d"},
    "ctxops.nn.GatedFeaturePyramidFusion": {
        "channels": 256,
        "align_corners": True,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.GatedFullyFusion": {
        "channels": 256,
        "gate_from": "input",
        "align_corners": True,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.GlobalConvolution": {"bias": False},
    "ctxops.nn.LDv1": {
        "downsample": "conv",
        "ratio": 8,
        "align_corners": True,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.LDv2": {
        "kernel_size": 5,
        "dilation": 3,
        "key_channels": None,
        "scale": 1.0,
        "border": "zeros",
        "num_heads": 1,
        "query_from": "both",
        "key_from": "both",
        "value_from": "both",
        "bias": False,
    },
    "ctxops.nn.NonLocal2d": {
        "out_channels": None,
        "share": "query_key",
        "fuse": None,
        "bias": True,
        "variant": "released",
        "scale": None,
        "out_norm": False,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.ObjectContext": {
        "channels": 512,
        "key_channels": 256,
        "kernel_size": 3,
        "scale": 1.0,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.PointwiseSpatialAttention": {
        "channels": 512,
        "mask_size": (97, 97),
        "shrink_factor": 2,
        "align_corners": True,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.PositionAttention": {"reduction": 8, "bias": False},
    "ctxops.nn.PyramidPooling": {
        "channels": 512,
        "output_sizes": (1, 2, 3, 6),
        "activation": True,
        "kernel_size": 3,
        "align_corners": False,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.RecurrentCrissCrossAttention": {
        "channels": None,
        "out_channels": None,
        "recurrence": 2,
        "reduction": 8,
        "norm_layer": "torch.BatchNorm2d",
    },
    "ctxops.nn.representation_consistency_loss": {"freeze_statistics": False},
}


def defaults(function: Callable) -> dict[str, object]:
    return {
        name: f"torch.{p.default.__name__}" if isinstance(p.default, type) else p.default
        for name, p in inspect.signature(function).parameters.items()
        if p.default is not p.empty
    }


def test_defaults():
    found = {
        f"{module.__name__}.{name}": defaults(getattr(module, name))
        for module in (ctxops, ctxops.nn)
        for name in module.__all__
        if callable(getattr(module, name))
    }
    assert {name: arguments for name, arguments in found.items() if arguments} == DEFAULTS
