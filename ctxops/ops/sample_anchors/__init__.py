# SPDX-License-Identifier: Apache-2.0
from ctxops.ops.sample_anchors.op import random_anchor_indices, sample_anchors

__all__ = ["random_anchor_indices", "sample_anchors"]
