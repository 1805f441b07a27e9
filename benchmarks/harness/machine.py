# SPDX-License-Identifier: Apache-2.0
"""The machine: what it is, what it has left, what others take of it, and what it gives at best."""

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import ctxops
from harness.meters import Clock

# Threads of a parallel region wait for each other: half a core lost can double a time.
NOTEWORTHY_CORES = 0.05


def describe_machine(device: torch.device) -> dict[str, object]:
    """Device, driver, versions and commit, as they go into every result file."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "ctxops": ctxops.__version__,
        "ctxops_build": ctxops.build_info(),
        "commit": _commit(),
    }


def machine_line(machine: dict[str, object]) -> str:
    parts = [f"{machine['device']}", f"{machine['threads']} threads", f"torch {machine['torch']}"]
    parts += [f"{name} {machine[name]}" for name in ("driver", "triton") if machine[name]]
    extension = "" if machine["ctxops_build"]["extension"] else " WITHOUT its extension"
    return ", ".join([*parts, f"ctxops {machine['ctxops']}{extension} at {machine['commit']}"])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(s.partition(":")[2].strip() for s in lines if s.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _driver() -> str | None:
    listed = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return listed.splitlines()[0] if listed else None


def _commit() -> str | None:
    """The commit of the benchmarks, marked where files differ from it.

    Results that an earlier run wrote are no such files.
    """
    commit = _command("git", "rev-parse", "--short=12", "HEAD")
    changed = _command("git", "status", "--short", "--", ":/", ":(top,exclude)benchmarks/results")
    return f"{commit} (modified)" if commit and changed else commit


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


class Interference:
    """``cores()``: mean number of cores that other programs kept busy since the start.

    None where the system does not tell (it needs Linux' /proc/stat).
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.busy = _busy_seconds()

    def cores(self) -> float | None:
        busy = _busy_seconds()
        if self.busy is None or busy is None:
            return None
        return max(0.0, (busy - self.busy) / (time.perf_counter() - self.start))


def _busy_seconds() -> float | None:
    """Processor time of all programs, less that of this one and its finished children."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq = (int(word) for word in first[:7])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / ticks - sum(os.times()[:4])


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Bytes per second of a large copy, and FLOP per second of the better of two large products."""

    bandwidth: float
    arithmetic: float
    product: str

    def seconds(self, flops: int, traffic: int) -> float:
        """``max(flops / arithmetic, traffic / bandwidth)``: no kernel with this work is faster."""
        return max(flops / self.arithmetic, traffic / self.bandwidth)

    def better(self, other: "Roofline") -> "Roofline":
        """The higher of two measurements, each roof by itself."""
        upper = max(self, other, key=lambda r: r.arithmetic)
        return Roofline(max(self.bandwidth, other.bandwidth), upper.arithmetic, upper.product)


def measure_roofline(
    device: torch.device, dtype: torch.dtype, clock: Clock, repeats: int = 5
) -> Roofline:
    """Copy of 128 MiB (1 GiB on a GPU), read and write counted; products of 2 FLOP per
    multiply-accumulate: a square matrix product and a 1x1 convolution in channels_last."""
    n, side, size = (8192, 256, 2**30) if device.type == "cuda" else (1024, 64, 2**27)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    x, w = (
        torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
        for shape in ((1, 1024, side, side), (512, 1024, 1, 1))
    )
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)

    def per_second(work: int, call: Callable[[], object]) -> float:
        with torch.no_grad():
            return work / min(clock(call) for _ in range(repeats + 1))

    speeds = {
        "matrix product": per_second(2 * n**3, lambda: a @ b),
        "1x1 convolution": per_second(2 * 1024 * 512 * side**2, lambda: F.conv2d(x, w)),
    }
    product = max(speeds, key=speeds.__getitem__)
    bandwidth = per_second(2 * size, lambda: target.copy_(source))
    return Roofline(bandwidth, speeds[product], product)
