# SPDX-License-Identifier: Apache-2.0
from ctxops.ops.neighborhood_attention.op import (
    Border,
    check_pair,
    neighborhood_attention,
    neighborhood_attention_weights,
)

__all__ = ["Border", "check_pair", "neighborhood_attention", "neighborhood_attention_weights"]
