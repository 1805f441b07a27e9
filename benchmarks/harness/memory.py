# SPDX-License-Identifier: Apache-2.0
"""Memory: what a call holds at most, and what the machine has left."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from harness.profiler import make_profiler


def peak_memory(call: Callable[[], tuple[Tensor, ...]], device: torch.device) -> int:
    """Bytes that a call needs beyond its inputs and its results.

    ``max over time of (live bytes allocated by the call) - bytes of the results``, never below 0.
    CPU: the allocation events of torch's profiler (oneDNN's private buffers are not among them).
    CUDA: the caching allocator's maximum.
    """
    return observe_memory(call, device)[0]


def observe_memory(
    call: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[int, tuple[Tensor, ...]]:
    """The bytes of :func:`peak_memory`, and what the call returned."""
    measure = _peak_cuda if device.type == "cuda" else _peak_cpu
    peak, results = measure(call, device)
    return max(0, peak - sum(storage_bytes(results).values())), results


def storage_bytes(tensors: tuple[Tensor, ...]) -> dict[int, int]:
    """Bytes by address of the distinct storages behind the tensors."""
    storages = [t.untyped_storage() for t in tensors]
    return {s.data_ptr(): s.nbytes() for s in storages}


def _peak_cpu(
    call: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[int, tuple[Tensor, ...]]:
    with make_profiler(device, profile_memory=True) as recorded:
        results = call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, results


def _peak_cuda(
    call: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[int, tuple[Tensor, ...]]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, results


def available_memory(device: torch.device) -> int:
    """Bytes that a new allocation may take, torch's own cached blocks included."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return min(_machine_memory(), _control_group_memory())


def _machine_memory() -> int:
    """What Linux could free without swapping; elsewhere, the pages that are free now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _control_group_memory() -> float:
    """What is left of a container's limit; infinity where there is none."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        return float(limit) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return float("inf")
