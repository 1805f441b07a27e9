# SPDX-License-Identifier: Apache-2.0
"""The roofline of this machine: what memory and arithmetic give at best, measured here and now."""

import dataclasses

import torch
import torch.nn.functional as F

from harness.timing import Clock


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
    large = device.type == "cuda"
    speeds = {
        "matrix product": _matrix_product(8192 if large else 1024, device, dtype, clock, repeats),
        "1x1 convolution": _convolution(256 if large else 64, device, dtype, clock, repeats),
    }
    product = max(speeds, key=speeds.__getitem__)
    bandwidth = _copy(2**30 if large else 2**27, device, clock, repeats)
    return Roofline(bandwidth, speeds[product], product)


def _best(call, clock: Clock, repeats: int) -> float:
    with torch.no_grad():
        return min(clock(call) for _ in range(repeats + 1))


def _copy(size: int, device: torch.device, clock: Clock, repeats: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / _best(lambda: target.copy_(source), clock, repeats)


def _matrix_product(
    n: int, device: torch.device, dtype: torch.dtype, clock: Clock, repeats: int
) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: a @ b, clock, repeats)


def _convolution(
    side: int, device: torch.device, dtype: torch.dtype, clock: Clock, repeats: int
) -> float:
    x = torch.randn(1, 1024, side, side, device=device).to(dtype, memory_format=torch.channels_last)
    w = torch.randn(512, 1024, 1, 1, device=device).to(dtype, memory_format=torch.channels_last)
    return 2 * 1024 * 512 * side**2 / _best(lambda: F.conv2d(x, w), clock, repeats)
