# SPDX-License-Identifier: Apache-2.0
"""Operators in threads, in forked workers, and under the interpreter's options."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import ctxops


def results(seed):
    """What the kernels of the extension give, forward and backward."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(2, 16, 33, 29, generator=generator).requires_grad_() for _ in range(2))
    weight = torch.randn(2, 16, generator=generator)
    labels = torch.randint(0, 5, (2, 66, 58), generator=generator)
    outputs = [
        ctxops.pyramid_pool(x, (1, 3, 6)),
        ctxops.pyramid_pool(x, (1, 3, 6), mode="max"),
        ctxops.neighborhood_attention(x, y, x, 3, 2),
        *ctxops.self_gated_fusion([x, y], weight),
        ctxops.criss_cross_attention(x, y, x),
    ]
    gradients = torch.autograd.grad([z.square().sum() for z in outputs], [x, y])
    statistics = ctxops.category_statistics(x.detach(), labels, num_classes=5)
    return [*outputs, *gradients, *statistics]


def test_threads():
    """Eight at once, each of which computes what one alone does."""
    expected = [results(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for actual, wanted in zip(pool.map(results, range(8)), expected, strict=True):
                for a, b in zip(actual, wanted, strict=True):
                    assert torch.equal(a, b)


DATA_LOADER = """
import torch, ctxops

class Pooled(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        x = torch.full((1, 64, 48, 48), i / 8)
        y = ctxops.neighborhood_attention(x, x, x, 3)
        return ctxops.pyramid_pool(y, (1, 2))[0]

if __name__ == "__main__":
    torch.set_num_threads(2)
    Pooled()[0]  # OpenMP's threads, which a fork does not take along
    loader = torch.utils.data.DataLoader(Pooled(), 2, num_workers=2, multiprocessing_context="fork")
    print(torch.equal(torch.cat(list(loader)), torch.stack([Pooled()[i] for i in range(8)])))
"""

PLAIN = """
import torch, ctxops
from ctxops.nn import APNB, GatedFullyFusion
torch.manual_seed(0)
x = torch.randn(2, 8, 9, 7, requires_grad=True)
outputs = [
    APNB(8, 4, 4, fuse="concat")(x),
    GatedFullyFusion([8, 8], 4)([x, x])[0],
    ctxops.neighborhood_attention(x, x, x, 3),
    ctxops.pyramid_pool(x, (1, 2), mode="max"),
]
torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
print(x.grad.flatten().tolist())
try:
    ctxops.pyramid_pool(x, (0,))
except ValueError as error:
    print(error)
"""


def run(program, *options):
    command = [sys.executable, *options, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_workers_of_a_data_loader_after_openmp():
    assert run(DATA_LOADER) == "True\n"


@pytest.mark.slow
@pytest.mark.parametrize("options", [("-OO",), ("-W", "error::UserWarning")], ids=str)
def test_options_of_the_interpreter(options):
    printed = run(PLAIN, *options)
    assert printed == run(PLAIN)
    assert "output_sizes" in printed
