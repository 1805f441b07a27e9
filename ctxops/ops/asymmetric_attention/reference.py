# SPDX-License-Identifier: Apache-2.0
"""asymmetric_attention in plain torch: the definition of the operator."""

import torch
from torch import Tensor


def reference(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    logits = torch.einsum("bchw,bcs->bhws", query, key) * scale
    if bias is not None:
        logits = logits + bias[:, None, None, :]
    return torch.einsum("bhws,bvs->bvhw", logits.softmax(dim=-1), value)
