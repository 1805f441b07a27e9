# SPDX-License-Identifier: Apache-2.0
"""What torch knows of itself and does not publish. Tried on torch 2.8, 2.11 and 2.14."""

import torch
from torch._C import _functorch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Do torch.func's transforms run, such as vmap? A compiler has taken them away."""
    if torch.compiler.is_compiling():
        return False
    return _functorch.peek_interpreter_stack() is not None


def in_forward_mode() -> bool:
    """May a tensor carry a tangent?"""
    return forward_ad._current_level >= 0
