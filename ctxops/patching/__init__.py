# SPDX-License-Identifier: Apache-2.0
"""Our operators in the modules of other packages. The table of these modules is in ``known.py``."""

import functools
import inspect
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ctxops.patching.forwards import class_name
from ctxops.patching.known import KNOWN, Known


class Swap(NamedTuple):
    """What became of one module of a known class."""

    name: str  # of the module in the model; "" for the model itself
    cls: str  # the class, with the package and file that it comes from
    by: str  # the operators that compute it now; "" if it was refused
    refused: str  # why it stays as it was; "" if it was swapped


def patch(model: nn.Module) -> list[Swap]:
    """Computes the modules of ``model`` that ctxops knows by its operators, in place.

    Each such module gets a ``forward`` of its own, which calls its children as before. Parameters,
    buffers, names, hooks, the configuration and the class stay, and so does the state dict. A
    plain child, without hooks or adapters, may be read instead of called. Outputs and gradients are
    the original's to rounding; maps come in the memory format of the input.

    Known are attention and pyramid pooling of mmcv, mmsegmentation, sssegmentation,
    segmentation_models.pytorch and timm: ``ctxops/patching/known.py`` lists the classes. They are
    recognised by their full names; no such package is imported. Every other class is left alone,
    also one derived from a known class.

    A known class is refused, and left alone, where it does not have the arguments, children and
    attributes of the version that ctxops knows, where an option is set that no operator computes,
    and where somebody has replaced its ``forward``.

    Copies and pickles of a patched model are patched; a copy computes with its own parameters. To
    read the pickle, ctxops must be installed. Patch before ``torch.compile`` and before wrappers
    that change classes, such as ``fully_shard``. The replicas of ``nn.DataParallel`` share a
    ``forward`` and fail.

    Args:
        model: the model, or any part of it.

    Returns:
        One entry for each module of a known class that was not patched before: its name, its class,
        the operators that compute it now, or why it was refused. A second call swaps nothing.

    Raises:
        TypeError: ``model`` is no module.
    """
    swaps = []
    for name, module in _modules(model):
        cls = class_name(module)
        known = KNOWN.get(cls)
        if known is None or _is_patched(module):
            continue
        misfit = _misfit(module, known)
        if not misfit:
            # Not a bound method: pickle would look up its name in the class.
            module.forward = functools.partial(known.forward, module)
        swaps.append(Swap(name, cls, "" if misfit else known.by, misfit))
    return swaps


def unpatch(model: nn.Module) -> None:
    """Gives all modules of ``model`` that :func:`patch` has changed their own ``forward`` again.

    Args:
        model: the model, or any part of it.

    Raises:
        TypeError: ``model`` is no module.
    """
    for _, module in _modules(model):
        if _is_patched(module):
            del module.forward


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return model.named_modules()


def _is_patched(module: nn.Module) -> bool:
    known = KNOWN.get(class_name(module))
    forward = module.__dict__.get("forward")
    return known is not None and getattr(forward, "func", None) is known.forward


def _misfit(module: nn.Module, known: Known) -> str:
    """Why the module is not of the version that we know; "" if it is."""
    if "forward" in module.__dict__:
        return "its forward has been replaced"
    own = type(module).forward
    if own.__globals__["__name__"] not in {kind.__module__ for kind in type(module).__mro__}:
        return "the forward of its class has been replaced"
    (_, *ours), (_, *theirs) = (inspect.signature(f).parameters for f in (known.forward, own))
    if ours != theirs:
        return f"its forward takes ({', '.join(theirs)}), expected ({', '.join(ours)})"
    for missing in (name for name in known.attributes.split() if not hasattr(module, name)):
        return f"it has no attribute {missing!r}"
    if known.children is not None:
        children = {name for name, child in module._modules.items() if child is not None}
        expected, optional = set(known.children.split()), set(known.optional.split())
        for name in sorted(expected - children):
            return f"it has no child {name!r}"
        for name in sorted(children - expected - optional):
            return f"it has an unknown child {name!r}"
    for name in [*module._parameters, *module._buffers]:
        return f"it has an unknown tensor {name!r}"
    return known.refuse(module)
