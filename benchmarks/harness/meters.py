# SPDX-License-Identifier: Apache-2.0
"""What one call takes: its time, the operations that it is spent in, and the memory."""

import os
import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# Seconds of a call beside which a first call's own costs do not count: the check times it as well.
NEEDS_NO_WARM_UP = 1.0

Clock = Callable[[Callable[[], object]], float]
Tensors = tuple[Tensor, ...]


def make_clock(device: torch.device) -> Clock:
    """A function that runs a call once and returns its seconds."""
    return _CudaClock(device) if device.type == "cuda" else _cpu_clock


def _cpu_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


class _CudaClock:
    """Time between two events on the stream, from an L2 cache that holds nothing of the call.

    The cache is flushed by reading: what a call finds there after a write, it has to write back
    first. The read takes longer than the launch of a graph, which is then not part of the time.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.zeros(cache, device=device)  # float32: four times the cache
        self.sum = torch.empty((), device=device)
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def __call__(self, call: Callable[[], object]) -> float:
        torch.sum(self.flush, dim=0, out=self.sum)
        self.start.record()
        result = call()
        self.end.record()
        self.end.synchronize()
        del result
        return self.start.elapsed_time(self.end) / 1e3


class Launches(NamedTuple):
    """What to time in place of the calls of a case. ``how``: "graph", where every call is a replay
    of its CUDA graph; "events", where Python launches all of them; None on the CPU. ``uncaptured``:
    the number of the call that is the reason for "events"."""

    calls: Sequence[Callable[[], object]]
    how: str | None = None
    uncaptured: int | None = None


def make_launches(calls: Sequence[Callable[[], object]], device: torch.device) -> Launches:
    """By graphs all calls or none: to compare a replay with a launch from Python is not fair."""
    if device.type != "cuda":
        return Launches(calls)
    # Graphs share their memory, as each writes what it reads and nobody keeps a result.
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
    graphs: list[torch.cuda.CUDAGraph] = []
    for call in calls:
        try:
            graphs.append(_capture(call, stream, pool))
        except RuntimeError:  # it waits for the GPU, or has no room beside the graphs
            torch.cuda.synchronize(device)
            return Launches(calls, "events", len(graphs))
    return Launches([graph.replay for graph in graphs], "graph")


def _capture(call: Callable[[], object], stream: torch.cuda.Stream, pool) -> torch.cuda.CUDAGraph:
    """The graph of a call, which has first run on the stream: libraries allocate at first calls."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        call()
    return graph


def _profiler(device: torch.device, profile_memory: bool = False) -> profile:
    """torch's profiler, without what its backend writes to the terminal."""
    # Read when the first profiler starts; by default it announces every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    return profile(activities=activities, profile_memory=profile_memory)


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
    with _profiler(device) as recorded:
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


def peak_memory(call: Callable[[], Tensors], device: torch.device) -> int:
    """Bytes that a call needs beyond its inputs and its results.

    ``max over time of (live bytes allocated by the call) - bytes of the results``, never below 0.
    CPU: the allocation events of torch's profiler (oneDNN's private buffers are not among them).
    CUDA: the caching allocator's maximum.
    """
    return observe_memory(call, device)[0]


def observe_memory(call: Callable[[], Tensors], device: torch.device) -> tuple[int, Tensors]:
    """The bytes of :func:`peak_memory`, and what the call returned."""
    measure = _peak_cuda if device.type == "cuda" else _peak_cpu
    peak, results = measure(call, device)
    return max(0, peak - storage_bytes(results)), results


def storage_bytes(tensors: Tensors) -> int:
    """Of the distinct storages behind the tensors."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _peak_cpu(call: Callable[[], Tensors], device: torch.device) -> tuple[int, Tensors]:
    with _profiler(device, profile_memory=True) as recorded:
        results = call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, results


def _peak_cuda(call: Callable[[], Tensors], device: torch.device) -> tuple[int, Tensors]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, results
