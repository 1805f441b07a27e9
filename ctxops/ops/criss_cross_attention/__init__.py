# SPDX-License-Identifier: Apache-2.0
from ctxops.ops.criss_cross_attention.op import (
    criss_cross_attention,
    criss_cross_attention_weights,
)

__all__ = ["criss_cross_attention", "criss_cross_attention_weights"]
