# SPDX-License-Identifier: Apache-2.0
"""Where the time goes: a call's seconds by group of operations, from torch's profiler."""

import re
from collections.abc import Callable

import torch

from harness.profiler import make_profiler

# The first group with a match names an operation. The order matters: "softmax" before "max".
GROUPS = {
    "convolution": r"conv",
    "softmax": r"softmax",
    "pooling": r"pool",
    "norm + ReLU": r"batch_norm|relu|threshold|clamp_min",
    "fused attention": r"attention",
    "matmul": r"matmul|::linear|::b?mm\b|addb?mm|baddbmm",
}
_PATTERNS = {group: re.compile(pattern) for group, pattern in GROUPS.items()}


def time_by_operation(
    call: Callable[[], object], device: torch.device, repeats: int = 3
) -> dict[str, float]:
    """Mean seconds of a call in each of GROUPS, and in "other".

    An operation's own time, without that of the operations that it calls, goes to the group of the
    innermost of its callers (itself included) that has one: the copy inside a matmul is matmul.
    """
    cuda = device.type == "cuda"
    call()
    with make_profiler(device) as recorded:
        for _ in range(repeats):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    times = dict.fromkeys([*GROUPS, "other"], 0.0)
    for event in recorded.events():
        # Kernels appear a second time as events of the device; their launchers hold their time.
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        times[_group(event)] += own * 1e-6 / repeats
    return times


def _group(event) -> str:
    while event is not None:
        for group, pattern in _PATTERNS.items():
            if pattern.search(event.name):
                return group
        event = event.cpu_parent
    return "other"
