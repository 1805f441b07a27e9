# SPDX-License-Identifier: Apache-2.0
"""What ctxops adds around its kernels: the time to import it, and the time to call an operator.

    python benchmarks/overhead.py

A call on eight elements is compared with a no-op of the same schema that is registered through
torch.library in the same way (definition, kernel, fake, autograd rule) and returns new outputs of
the same sizes; and with a bare no-op, defined with a kernel alone, that returns its input.
"""

import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

import ctxops
from harness import percentile

ROUNDS, CALLS = 30, 1000
SCHEMA = "(Tensor input, int[] sizes, bool maximum, bool save) -> (Tensor, Tensor)"
IMPORT = """
import time, torch
start = time.perf_counter()
import ctxops, ctxops.nn
print(time.perf_counter() - start)
"""


def import_seconds(runs: int = 5) -> float:
    """Median seconds that importing ctxops takes after torch, each in a new process."""
    command = [sys.executable, "-c", IMPORT]
    runs = (subprocess.run(command, capture_output=True, check=True).stdout for _ in range(runs))
    return percentile([float(output) for output in runs], 50)


def make_no_ops(library: Library) -> tuple[Callable, Callable]:
    """The no-op registered as our operators are, and the bare one."""

    def allocate(input: Tensor, sizes: list[int], maximum: bool, save: bool):
        batch, channels, _, _ = input.shape
        bins = sum(n * n for n in sizes)
        return input.new_empty((batch, channels, bins)), input.new_empty(0, dtype=torch.int32)

    for name in ("full", "bare"):
        library.define(name + SCHEMA)
    library.impl("full", allocate, "CPU")
    library.impl("bare", lambda input, sizes, maximum, save: (input, input), "CPU")
    register_fake("ctxops_overhead::full", allocate, lib=library)
    register_autograd(
        "ctxops_overhead::full",
        lambda ctx, *grads: (None,) * 4,
        setup_context=lambda ctx, inputs, output: None,
        lib=library,
    )
    operators = torch.ops.ctxops_overhead
    return operators.full.default, operators.bare.default


def call_microseconds() -> dict[str, float]:
    """Median microseconds of a call, measured in alternating rounds."""
    library = Library("ctxops_overhead", "DEF")
    full, bare = make_no_ops(library)
    x = torch.randn(1, 2, 2, 2)
    calls = {
        "ctxops.pyramid_pool": lambda: ctxops.pyramid_pool(x, (1,)),
        "no-op": lambda: full(x, (1,), False, False),
        "bare no-op": lambda: bare(x, (1,), False, False),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                samples[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return {name: percentile(values, 50) for name, values in samples.items()}


def main() -> int:
    print(f"import ctxops after torch: {import_seconds():.3f} s")
    calls = call_microseconds()
    for name, microseconds in calls.items():
        print(f"{name:<20}{microseconds:8.1f} us a call on 8 elements, no gradient")
    ours = calls["ctxops.pyramid_pool"]
    print(f"above the no-op: {ours - calls['no-op']:.1f} us")
    print(f"above the bare no-op: {ours - calls['bare no-op']:.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
