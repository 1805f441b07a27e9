# SPDX-License-Identifier: Apache-2.0
"""What a measurement was made with."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

import ctxops


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
