# SPDX-License-Identifier: Apache-2.0
"""Whole networks: a backbone of timm, context modules of ``ctxops.nn``, heads."""

# The networks: each registers itself.
from ctxops.models import ann as ann
from ctxops.models import fcn as fcn
from ctxops.models import gald as gald
from ctxops.models import gcn as gcn
from ctxops.models.base import SegmentationNetwork, SegmentationOutput
from ctxops.models.encoder import Encoder
from ctxops.models.registry import create_model, list_models, model_options, register_model

__all__ = [
    "Encoder",
    "SegmentationNetwork",
    "SegmentationOutput",
    "create_model",
    "list_models",
    "model_options",
    "register_model",
]
