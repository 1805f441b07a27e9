# SPDX-License-Identifier: Apache-2.0
from ctxops.ops.gated_fusion.op import gated_fusion, self_gated_fusion

__all__ = ["gated_fusion", "self_gated_fusion"]
