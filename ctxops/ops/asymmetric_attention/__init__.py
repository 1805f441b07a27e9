# SPDX-License-Identifier: Apache-2.0
from ctxops.ops.asymmetric_attention.op import asymmetric_attention

__all__ = ["asymmetric_attention"]
