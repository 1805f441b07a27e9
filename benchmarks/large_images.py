# SPDX-License-Identifier: Apache-2.0
"""Images in tiles: the memory that they take, and what a halo that is too narrow costs.

    python benchmarks/large_images.py memory --size 2048 4096 --window 512
    python benchmarks/large_images.py memory --size 2048 4096
    python benchmarks/large_images.py halos --backbone resnet18
    python benchmarks/large_images.py radius --backbone convnext_tiny --output-stride 32

``memory`` prints the seconds and the peak of the process's resident memory above what it had
before the image, beside what the docstring of ``segment`` says; Linux alone. glibc keeps much of
what is freed, unless the environment has ``MALLOC_MMAP_THRESHOLD_=131072``. ``halos`` prints for
each halo the share of the pixels whose class differs from that of the whole image. The weights are
random, no gain is near zero, and every class has the same mean score, so that none hides another.
``radius`` prints the halo that is as wide as the encoder sees, or why there is none.
"""

import argparse
import ctypes
import re
import time
from pathlib import Path

import torch
from torch import nn

from ctxops.models import create_model, segment
from ctxops.models.encoder import Encoder
from ctxops.models.inference import encode_in_tiles, receptive_radius, standardise

NUM_CLASSES = 19
MIB = 1 << 20


def make_network(name: str, backbone: str, output_stride: int):
    network = create_model(name, backbone, NUM_CLASSES, output_stride=output_stride).eval()
    for module in network.modules():
        # timm's last norm of each residual branch starts at zero: nothing would be seen.
        if getattr(module, "running_var", None) is not None:
            nn.init.ones_(module.weight)
    return network


def make_image(height: int, width: int) -> torch.Tensor:
    """Noise at several scales, as photographs have it."""
    image = torch.zeros(1, 3, height, width)
    for cell in (4, 16, 64):
        noise = torch.rand(1, 3, -(-height // cell), -(-width // cell))
        image += nn.functional.interpolate(noise, (height, width), mode="bilinear")
    return (image * (255 / 3)).byte()


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status).group(1)) << 10


def memory(arguments: argparse.Namespace) -> None:
    network = make_network(arguments.network, arguments.backbone, arguments.output_stride)
    options = {}
    if arguments.window:
        halo = receptive_radius(network.encoder) if arguments.halo is None else arguments.halo
        options = {"window": arguments.window, "halo": halo}

    def peak(call) -> tuple[int, float]:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed does not count as there
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before, start = resident("VmRSS"), time.perf_counter()
        call()
        return resident("VmHWM") - before, time.perf_counter() - start

    segment(network, make_image(256, 256))
    height, width = arguments.size
    image = make_image(height, width)
    bound = None
    if options:
        # Of one tile alone, and what each pixel adds.
        side = arguments.window + 2 * halo
        with torch.no_grad():
            tile = torch.zeros(1, 3, side, side)
            of_tile, _ = peak(lambda: network.predict(network.encoder(tile)))
        strides, channels = network.encoder.strides, network.encoder.channels
        levels = {level % len(strides) for level in network.levels}
        per_pixel = sum(4 * channels[level] / strides[level] ** 2 for level in levels)
        per_pixel += 8 * NUM_CLASSES / strides[-1] ** 2
        bound = of_tile + height * width * (per_pixel + 1)
    used, seconds = peak(lambda: segment(network, image, **options))
    what = f"tiles of {options['window']}, halo {options['halo']}" if options else "whole"
    says = f", formula {bound / MIB:.0f} MiB" if options else ""
    print(f"{height} x {width}, {what}: {used / MIB:.0f} MiB{says}, {seconds:.0f} s")


@torch.no_grad()
def halos(arguments: argparse.Namespace) -> None:
    network = make_network(arguments.network, arguments.backbone, arguments.output_stride)
    image = make_image(*arguments.size)
    x, window = standardise(image, network), arguments.window or 256
    maps = network.encoder(x)
    scores = network.predict(maps).logits
    mean, deviation = (f((0, 2, 3), keepdim=True) for f in (scores.mean, scores.std))
    radius = receptive_radius(network.encoder)
    whole = ((scores - mean) / deviation).argmax(1)
    print(f"{arguments.backbone}, receptive radius {radius}, tiles of {window}")
    for halo in sorted({*range(0, 64, 16), *range(64, radius, 64), radius}):
        tiled = encode_in_tiles(network.encoder, x, window, halo)
        labels = ((network.predict(tiled).logits - mean) / deviation).argmax(1)
        share = (labels != whole).double().mean().item()
        error = ((tiled[-1] - maps[-1]).norm() / maps[-1].norm()).item()
        print(f"halo {halo:4d}: {share:9.4%} of the labels differ; last map {error:.1e}")


def radius(arguments: argparse.Namespace) -> None:
    encoder = Encoder(arguments.backbone, arguments.output_stride)
    try:
        print(f"{arguments.backbone}, receptive radius {receptive_radius(encoder)}")
    except ValueError as error:
        print(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("memory", "halos", "radius"))
    parser.add_argument("--network", default="ann")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--output-stride", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 768), metavar=("H", "W"))
    parser.add_argument("--window", type=int)
    parser.add_argument("--halo", type=int, help="default: as wide as the encoder sees")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    {"memory": memory, "halos": halos, "radius": radius}[arguments.what](arguments)


if __name__ == "__main__":
    main()
