# SPDX-License-Identifier: Apache-2.0
from ctxops.ops.neighborhood_attention.op import (
    neighborhood_attention,
    neighborhood_attention_weights,
)

__all__ = ["neighborhood_attention", "neighborhood_attention_weights"]
