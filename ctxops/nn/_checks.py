# SPDX-License-Identifier: Apache-2.0
"""What modules check, of their arguments and of the maps they are given."""

from collections.abc import Sequence

from torch import Tensor, nn

from ctxops import _library


def check_choice(name: str, value: object, choices: Sequence) -> None:
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


def check_maps(**maps: tuple[Tensor, int] | tuple[Tensor, int, nn.Module]) -> None:
    """Raises unless each map is a floating (B, C, H, W) with its channels, of one batch.

    With the map and its channels may come the module that takes it: a tool that prunes channels
    narrows the module's convolutions, and knows nothing of numbers that are kept beside them.
    """
    for name, (x, channels, *takers) in maps.items():
        _library.check_map(name, x)
        if x.shape[1] != channels:
            channels = next(filter(None, map(_taken_channels, takers)), channels)
        if x.shape[1] != channels:
            raise ValueError(f"{name} must have shape (B, {channels}, H, W), got {tuple(x.shape)}")
    (first, (x, *_)), *others = maps.items()
    for name, (other, *_) in others:
        if other.shape[0] != x.shape[0] or other.device != x.device:
            raise ValueError(
                f"{name} must have the batch and device of {first}, {x.shape[0]} on "
                f"{x.device}, got {other.shape[0]} on {other.device}"
            )


def _taken_channels(module: nn.Module) -> int | None:
    """The channels that the first convolution of a module takes."""
    convolutions = (m for m in module.modules() if isinstance(m, nn.Conv2d))
    return next((convolution.in_channels for convolution in convolutions), None)


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
    channels: Sequence[int],
    takers: Sequence[nn.Module] = (),
    **others: tuple[Tensor, int],
) -> None:
    """Raises unless there is a map for each level; these and the others as in check_maps."""
    if not isinstance(features, (list, tuple)):
        raise TypeError(
            f"features must be a list or tuple of tensors, got {type(features).__name__}"
        )
    if len(features) != len(channels):
        raise ValueError(f"features must have {len(channels)} levels, got {len(features)}")
    levels = enumerate(zip(*filter(len, (features, channels, takers)), strict=True))
    check_maps(**{f"features[{level}]": x for level, x in levels}, **others)
