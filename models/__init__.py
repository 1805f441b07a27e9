# SPDX-License-Identifier: Apache-2.0
"""Whole networks: a backbone of timm, context modules of ``ctxops.nn``, heads."""

# The networks: each registers itself.
from ctxops.models import ann as ann
from ctxops.models import apcnet as apcnet
from ctxops.models import ccnet as ccnet
from ctxops.models import danet as danet
from ctxops.models import deeplabv3 as deeplabv3
from ctxops.models import denseaspp as denseaspp
from ctxops.models import dnlnet as dnlnet
from ctxops.models import fcn as fcn
from ctxops.models import gald as gald
from ctxops.models import gcn as gcn
from ctxops.models import gff as gff
from ctxops.models import mcibi as mcibi
from ctxops.models import non_local as non_local
from ctxops.models import ocrnet as ocrnet
from ctxops.models import psanet as psanet
from ctxops.models import pspnet as pspnet
from ctxops.models.base import LogitsOnly, SegmentationNetwork, SegmentationOutput
from ctxops.models.convert import (
    ImportedModel,
    convert_checkpoint,
    import_checkpoint,
    load_backbone,
    load_checkpoint,
    load_model,
)
from ctxops.models.encoder import Encoder
from ctxops.models.registry import create_model, list_models, model_options, register_model

__all__ = [
    "Encoder",
    "ImportedModel",
    "LogitsOnly",
    "SegmentationNetwork",
    "SegmentationOutput",
    "convert_checkpoint",
    "create_model",
    "import_checkpoint",
    "list_models",
    "load_backbone",
    "load_checkpoint",
    "load_model",
    "model_options",
    "register_model",
]
