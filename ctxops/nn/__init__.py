# SPDX-License-Identifier: Apache-2.0
"""Modules: parameters, and calls of the operators."""

from ctxops.nn.adaptive_context import AdaptiveContext
from ctxops.nn.aspp import ASPP
from ctxops.nn.asymmetric_context import (
    AsymmetricNonLocalContext,
    CommonFusion,
    FusedContext,
    SummedFusions,
)
from ctxops.nn.cgnl import CGNL
from ctxops.nn.concat_context import ConcatContext
from ctxops.nn.criss_cross import CrissCrossAttention, RecurrentCrissCrossAttention
from ctxops.nn.dataset_context import (
    DatasetContextAggregation,
    representation_consistency_loss,
)
from ctxops.nn.dense_aspp import DenseASPP
from ctxops.nn.disentangled_non_local import DisentangledNonLocal
from ctxops.nn.dual_attention import ChannelAttention, DualAttention, PositionAttention
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
from ctxops.nn.level_fusion_decoder import LevelFusionDecoder
from ctxops.nn.local_distribution import GALD, LDv1, LDv2
from ctxops.nn.non_local import AFNB, APNB, FusionNonLocal2d, NonLocal2d
from ctxops.nn.object_context import ObjectContext
from ctxops.nn.pointwise_spatial_attention import PointwiseSpatialAttention
from ctxops.nn.pyramid_pooling import PyramidPooling
from ctxops.nn.score_pyramid import BilinearDeconvolution, ProgressiveUpsampling, ScorePyramid
from ctxops.nn.uper_decoder import UPerDecoder

__all__ = [
    "AFNB",
    "APNB",
    "ASPP",
    "CGNL",
    "GALD",
    "AdaptiveContext",
    "AdditionFusion",
    "AsymmetricNonLocalContext",
    "BilinearDeconvolution",
    "BoundaryRefinement",
    "ChannelAttention",
    "CommonFusion",
    "ConcatContext",
    "ConcatFusion",
    "ConvolutionStack",
    "CrissCrossAttention",
    "DatasetContextAggregation",
    "DenseASPP",
    "DenseFeaturePyramid",
    "DisentangledNonLocal",
    "DualAttention",
    "FeatureMemory",
    "FeaturePyramidFusion",
    "FusedContext",
    "FusionNonLocal2d",
    "GCNBottleneck",
    "GatedFeaturePyramidFusion",
    "GatedFullyFusion",
    "GlobalConvolution",
    "LDv1",
    "LDv2",
    "LevelFusionDecoder",
    "NonLocal2d",
    "ObjectContext",
    "PointwiseSpatialAttention",
    "PositionAttention",
    "ProgressiveUpsampling",
    "PyramidPooling",
    "RecurrentCrissCrossAttention",
    "ScorePyramid",
    "SummedFusions",
    "UPerDecoder",
    "representation_consistency_loss",
]
