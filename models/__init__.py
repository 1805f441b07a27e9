# SPDX-License-Identifier: Apache-2.0
"""Whole networks: a backbone of timm, context modules of ``ctxops.nn``, heads.

:func:`create_model` makes them by name. The builders in small letters, such as :func:`ann`, make
the decoder of one alone.
"""

from ctxops.models.ann import ann
from ctxops.models.apcnet import apcnet
from ctxops.models.base import Decoder, LogitsOnly, SegmentationNetwork, SegmentationOutput
from ctxops.models.ccnet import ccnet
from ctxops.models.convert import (
    ImportedModel,
    convert_checkpoint,
    import_checkpoint,
    load_backbone,
    load_checkpoint,
    load_config,
    load_model,
)
from ctxops.models.danet import danet
from ctxops.models.deeplabv3 import deeplabv3
from ctxops.models.denseaspp import denseaspp
from ctxops.models.dnlnet import dnlnet
from ctxops.models.encoder import Encoder
from ctxops.models.fcn import fcn
from ctxops.models.gald import gald
from ctxops.models.gcn import gcn
from ctxops.models.gff import gff
from ctxops.models.inference import Inference, segment
from ctxops.models.mcibi import mcibi
from ctxops.models.non_local import non_local
from ctxops.models.ocrnet import ocrnet
from ctxops.models.psanet import psanet
from ctxops.models.pspnet import pspnet
from ctxops.models.registry import create_model, list_models, model_options, register_model
from ctxops.models.upernet import upernet

__all__ = [
    "Decoder",
    "Encoder",
    "ImportedModel",
    "Inference",
    "LogitsOnly",
    "SegmentationNetwork",
    "SegmentationOutput",
    "ann",
    "apcnet",
    "ccnet",
    "convert_checkpoint",
    "create_model",
    "danet",
    "deeplabv3",
    "denseaspp",
    "dnlnet",
    "fcn",
    "gald",
    "gcn",
    "gff",
    "import_checkpoint",
    "list_models",
    "load_backbone",
    "load_checkpoint",
    "load_config",
    "load_model",
    "mcibi",
    "model_options",
    "non_local",
    "ocrnet",
    "psanet",
    "pspnet",
    "register_model",
    "segment",
    "upernet",
]
