# SPDX-License-Identifier: Apache-2.0
"""What torch knows of itself and does not publish. Tried on torch 2.8, 2.11 and 2.14."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

Method = TypeVar("Method", bound=Callable[..., Any])


def is_transformed() -> bool:
    """Do torch.func's transforms run, such as vmap? A compiler has taken them away."""
    if torch.compiler.is_compiling():
        return False
    return _functorch.peek_interpreter_stack() is not None


def in_forward_mode() -> bool:
    """May a tensor carry a tangent?"""
    return forward_ad._current_level >= 0


def forward_method(method: Method) -> Method:
    """A method that takes a module's weights, besides ``forward``, which does not call it.

    A unit of ``fully_shard`` has its weights in calls alone, and in methods that torch is told of.
    """

    @functools.wraps(method)
    def run(module, *args):
        fsdp = None if torch.compiler.is_compiling() else sys.modules.get("torch.distributed.fsdp")
        if fsdp and isinstance(module, fsdp.FSDPModule) and method.__name__ not in vars(module):
            fsdp.register_fsdp_forward_method(module, method.__name__)
            return getattr(module, method.__name__)(*args)
        return method(module, *args)

    return run  # type: ignore[return-value]
