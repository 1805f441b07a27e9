# SPDX-License-Identifier: Apache-2.0
"""When a module's weights may be read, so that its work is done elsewhere."""

import itertools
from collections.abc import Callable
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ctxops import _autocast

Module = TypeVar("Module", bound=nn.Module)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TRACKER = "torch.utils.module_tracker"
# torch.export traces with the call of torch.fx, which does what torch's own does.
_CALLS = (nn.Module.__module__, "torch.fx._symbolic_trace")


def is_plain(
    module: nn.Module, *kinds: type[Module], like: Tensor | None = None
) -> TypeGuard[Module]:
    """May the caller read the weights of ``module`` instead of calling it?

    Only if a call would do nothing but compute its class's ``forward`` on weights that are there. A
    module that anybody has changed must be called: adapters replace its ``forward`` or that of its
    class, its class or its weights, pruning and spectral norm make the weights in hooks or
    parametrisations, offloading and sharding bring them in when it is called, hooks want to see its
    input and output.

    Args:
        module: the module, or a container of modules, which says nothing about its children.
        kinds: the classes that the caller knows; a class derived from one of them is another one.
        like: what the weights must have the device and dtype of; under autocast the dtype may
            differ. None: anything but meta.
    """
    return (
        type(module) in kinds
        and "forward" not in module.__dict__
        and _is_written_in(type(module).forward, type(module).__module__)
        and is_unwatched(module)
        and all(
            _is_here(tensor, like)
            for tensor in itertools.chain(module._parameters.values(), module._buffers.values())
            if tensor is not None
        )
    )


def is_unwatched(module: nn.Module) -> bool:
    """Does a call do nothing but ``forward``, whosever that is?"""
    return (
        _is_written_in(type(module).__call__, *_CALLS)
        and module._compiled_call_impl is None
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and not _has_global_hooks()
    )


def _is_written_in(method: Callable, *modules: str) -> bool:
    """Or has a tool replaced it for all? Adaptation at test time does so with batch norm's forward,
    and what records the calls of modules with ``nn.Module.__call__``.
    """
    return getattr(method, "__globals__", {}).get("__name__") in modules


def _has_global_hooks() -> bool:
    """Has anybody hooked all modules? torch's tracker of their names does not count: torch's FLOP
    counter uses it, and is to count what runs without it.
    """
    # Private: torch 2.8 to 2.15 keep them so. Where one is missing, nobody can have used it.
    return any(
        getattr(hook, "__module__", None) != _TRACKER
        for hooks in (
            torch_module._global_forward_pre_hooks,
            torch_module._global_forward_hooks,
            torch_module._global_backward_pre_hooks,
            torch_module._global_backward_hooks,
        )
        for hook in hooks.values()
    )


def _is_here(tensor: Tensor, like: Tensor | None) -> bool:
    """Is it a tensor of torch's own, with values, and of the device and dtype of ``like``?"""
    # torch.export puts tensors of its own in the place of the weights.
    if type(tensor) not in (Tensor, nn.Parameter) and not torch.compiler.is_exporting():
        return False
    if like is None:
        return tensor.device.type != "meta"
    fits = not tensor.is_floating_point() or tensor.dtype == like.dtype
    return tensor.device == like.device and (fits or _autocast.is_active(like.device.type))
