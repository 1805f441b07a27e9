# SPDX-License-Identifier: Apache-2.0
"""nonlocal_attention in plain torch: the definition of the operator, N x N weights included."""

from torch import Tensor


def reference(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    logits = query.flatten(2).transpose(1, 2) @ key.flatten(2) * scale
    output = value.flatten(2) @ logits.softmax(dim=-1).transpose(1, 2)
    return output.unflatten(2, query.shape[2:])
