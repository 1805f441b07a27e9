# SPDX-License-Identifier: Apache-2.0
"""Autocast, as torch's own operations have it."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def is_active(device: str) -> bool:
    # Other devices may have no autocast, and asking torch 2.8 for that cannot be traced.
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def cast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on; float64 stays, as in torch."""
    device = next(t for t in tensors if t is not None).device.type
    if not is_active(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


@contextlib.contextmanager
def disabled(device: str) -> Iterator[None]:
    """For kernels made of torch's own operations, which autocast would cast down once more."""
    if not is_active(device):
        yield
        return
    with torch.autocast(device, enabled=False):
        yield
