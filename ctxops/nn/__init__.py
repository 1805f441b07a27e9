# SPDX-License-Identifier: Apache-2.0
"""Modules: parameters, and calls of the operators."""

from ctxops.nn.cgnl import CGNL
from ctxops.nn.criss_cross import CrissCrossAttention, RecurrentCrissCrossAttention
from ctxops.nn.dataset_context import (
    DatasetContextAggregation,
    representation_consistency_loss,
)
from ctxops.nn.feature_fusion import AdditionFusion, ConcatFusion, FeaturePyramidFusion
from ctxops.nn.feature_memory import FeatureMemory
from ctxops.nn.gated_fusion import (
    DenseFeaturePyramid,
    GatedFeaturePyramidFusion,
    GatedFullyFusion,
)
from ctxops.nn.global_convolution import (
    BoundaryRefinement,
    ConvolutionStack,
    GCNBottleneck,
    GlobalConvolution,
)
from ctxops.nn.local_distribution import GALD, LDv1, LDv2
from ctxops.nn.non_local import AFNB, APNB, FusionNonLocal2d, NonLocal2d

__all__ = [
    "AFNB",
    "APNB",
    "CGNL",
    "GALD",
    "AdditionFusion",
    "BoundaryRefinement",
    "ConcatFusion",
    "ConvolutionStack",
    "CrissCrossAttention",
    "DatasetContextAggregation",
    "DenseFeaturePyramid",
    "FeatureMemory",
    "FeaturePyramidFusion",
    "FusionNonLocal2d",
    "GCNBottleneck",
    "GatedFeaturePyramidFusion",
    "GatedFullyFusion",
    "GlobalConvolution",
    "LDv1",
    "LDv2",
    "NonLocal2d",
    "RecurrentCrissCrossAttention",
    "representation_consistency_loss",
]
