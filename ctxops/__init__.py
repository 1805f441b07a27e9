# SPDX-License-Identifier: Apache-2.0
"""Context operators for semantic segmentation, with kernels for the CPU and for CUDA."""

from ctxops._native import build_info
from ctxops._operator import flop_formulas, use_reference
from ctxops.ops.asymmetric_attention import asymmetric_attention
from ctxops.ops.category_context import category_context
from ctxops.ops.category_statistics import category_statistics
from ctxops.ops.criss_cross_attention import (
    criss_cross_attention,
    criss_cross_attention_weights,
)
from ctxops.ops.gated_fusion import gated_fusion, self_gated_fusion
from ctxops.ops.neighborhood_attention import (
    neighborhood_attention,
    neighborhood_attention_weights,
)
from ctxops.ops.nonlocal_attention import nonlocal_attention
from ctxops.ops.pyramid_pool import pyramid_pool
from ctxops.ops.sample_anchors import random_anchor_indices, sample_anchors
from ctxops.patching import patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "asymmetric_attention",
    "build_info",
    "category_context",
    "category_statistics",
    "criss_cross_attention",
    "criss_cross_attention_weights",
    "flop_formulas",
    "gated_fusion",
    "neighborhood_attention",
    "neighborhood_attention_weights",
    "nonlocal_attention",
    "patch",
    "pyramid_pool",
    "random_anchor_indices",
    "sample_anchors",
    "self_gated_fusion",
    "unpatch",
    "use_reference",
]
