# SPDX-License-Identifier: Apache-2.0
from ctxops.ops.nonlocal_attention.op import nonlocal_attention

__all__ = ["nonlocal_attention"]
