# SPDX-License-Identifier: Apache-2.0
"""What operators, modules and networks check of their arguments, and of the maps they are given.

A message names the argument, what was expected and what came.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ctxops._torch import in_forward_mode

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_map(name: str, x: Tensor) -> None:
    """Raises unless ``x`` is a floating, strided (B, C, H, W) with C, H and W at least 1."""
    check_dtype(name, x)
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"{name} must have shape (B, C, H, W), got {tuple(shape)}")
    _, channels, height, width = shape
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"{name} must have C, H and W of at least 1, got {tuple(shape)}")


def check_shape(
    name: str, x: Tensor, like: Tensor, shape: tuple[int | None, ...], meaning: str
) -> None:
    """Raises unless ``x`` is floating, on the device of ``like``, of that shape (None: any)."""
    check_dtype(name, x)
    if x.dim() != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, x.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape {meaning} = ({wanted}), got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device {like.device}, got {x.device}")


def check_same_dtype(**tensors: Tensor | None) -> None:
    """Raises unless all tensors have the dtype of the first."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and tensor.dtype != reference.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first}, {reference.dtype}, got {tensor.dtype}"
            )


def check_dtype(name: str, x: Tensor) -> None:
    """Raises unless ``x`` is a strided tensor of a floating dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else x.layout
        raise TypeError(f"{name} must be a dense, strided tensor, got {layout}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}")


def resolve_scale(scale: float | None, channels: int) -> float:
    """``scale`` as a float, ``channels ** -0.5`` for None; raises unless it is a number."""
    if scale is None:
        return channels**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    return float(scale)


def check_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """Raises for dual tensors: kernels have no forward-mode rule, and torch would yield zeros."""
    if not in_forward_mode():
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative; call it under ctxops.use_reference()"
            )


def check_choice(name: str, value: object, modes: Any) -> None:
    """Raises unless the value is one of a Literal."""
    choices = get_args(modes)
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_sizes(**sizes: int) -> None:
    """Raises unless each is an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_groups(name: str, groups: int, **channels: int) -> None:
    """Raises unless ``groups`` is an integer that divides all these numbers of channels."""
    check_sizes(**{name: groups})
    for what, count in channels.items():
        if count % groups:
            raise ValueError(f"{name} must divide {what}, {count}, got {groups}")


def check_power_of_two(name: str, value: int, at_least: int) -> None:
    check_sizes(**{name: value})
    if value < at_least or value & (value - 1):
        raise ValueError(f"{name} must be a power of two of at least {at_least}, got {value}")


def check_kernel_size(kernel_size: int, at_least: int = 1, name: str = "kernel_size") -> None:
    """Raises unless it is an odd integer of at least ``at_least``."""
    check_sizes(**{name: kernel_size})
    if kernel_size < at_least or kernel_size % 2 == 0:
        raise ValueError(f"{name} must be odd and at least {at_least}, got {kernel_size}")


def check_module(name: str, module: object, kinds: tuple[type[nn.Module], ...]) -> None:
    """Raises unless ``module`` is None or one of these."""
    if module is not None and not isinstance(module, kinds):
        wanted = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name} must be {wanted} or None, got {type(module).__name__}")


def check_maps(**maps: tuple[Tensor, int | None] | tuple[Tensor, int, nn.Module]) -> None:
    """Raises unless each is a floating (B, C, H, W) with its channels (None: any), of one batch.

    With the map and its channels may come the module that takes it: a tool that prunes channels
    narrows the module's convolutions, and knows nothing of numbers that are kept beside them.
    """
    for name, (x, channels, *takers) in maps.items():
        check_map(name, x)
        if takers and x.shape[1] != channels:
            channels = taken_channels(*takers)
        if channels is not None and x.shape[1] != channels:
            raise ValueError(f"{name} must have shape (B, {channels}, H, W), got {tuple(x.shape)}")
    (first, (x, *_)), *others = maps.items()
    for name, (other, *_) in others:
        if other.shape[0] != x.shape[0] or other.device != x.device:
            raise ValueError(
                f"{name} must have the batch and device of {first}, {x.shape[0]} on "
                f"{x.device}, got {other.shape[0]} on {other.device}"
            )


def check_concatenated(taker: nn.Module, **maps: tuple[Tensor, int]) -> None:
    """check_maps of maps that the first convolution of ``taker`` takes one behind the other.

    If a tool has pruned the convolution, it tells how many channels they have in all.
    """
    taken = taken_channels(taker)
    if taken in (None, sum(channels for _, channels in maps.values())):
        return check_maps(**maps)
    check_maps(**{name: (x, None) for name, (x, _) in maps.items()})
    widths = [x.shape[1] for x, _ in maps.values()]
    if sum(widths) != taken:
        raise ValueError(f"{' and '.join(maps)} must have {taken} channels in all, got {widths}")


def taken_channels(module: nn.Module) -> int | None:
    """The channels that the first convolution of a module takes; None: it has no convolution."""
    for part in module.modules():  # which torch 2.8 compiles, and next() of a generator not
        if isinstance(part, nn.Conv2d):
            return part.in_channels
    return None


def check_levels(name: str, channels: Sequence[int]) -> tuple[int, ...]:
    """The channels of each level; raises unless there are at least two levels with some."""
    if not isinstance(channels, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple of integers, got {channels!r}")
    if len(channels) < 2:
        raise ValueError(f"{name} must have at least two levels, got {channels!r}")
    check_sizes(**{f"{name}[{level}]": width for level, width in enumerate(channels)})
    return tuple(channels)


def check_features(
    features: Sequence[Tensor],
    channels: Sequence[int | None],
    takers: Iterable[nn.Module] = (),
    **others: tuple[Tensor, int, nn.Module],
) -> None:
    """Raises unless there is a map for each level; these and the others as in check_maps."""
    if not isinstance(features, (list, tuple)):
        raise TypeError(
            f"features must be a list or tuple of tensors, got {type(features).__name__}"
        )
    if len(features) != len(channels):
        raise ValueError(f"features must have {len(channels)} levels, got {len(features)}")
    columns = [features, channels, *([takers] if takers else [])]
    levels = enumerate(zip(*columns, strict=True))
    check_maps(**{f"features[{level}]": x for level, x in levels}, **others)


def check_flags(**flags: bool) -> None:
    """Raises unless each is a bool: the word "false", given by a command, would count as true."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def check_known(what: str, name: str, choices: Iterable[str], listed: str | None = None) -> None:
    """Raises unless ``name`` is one of the choices: it names the closest, and all or where to look.

    ``listed``: the call that lists them, for more than one would read.
    """
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a string, got {name!r}")
    choices = sorted(choices)
    if name in choices:
        return
    close = difflib.get_close_matches(name, choices, n=1)
    closest = f", the closest is {close[0]!r}" if close else ""
    known = f"{listed} names all" if listed else f"choose from {', '.join(choices) or 'none'}"
    raise ValueError(f"unknown {what} {name!r}{closest}; {known}")
