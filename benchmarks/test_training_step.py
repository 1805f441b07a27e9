# SPDX-License-Identifier: Apache-2.0
"""A small step of training under pytest-benchmark."""

import math

import pytest
import torch

from training_step import Training, loading_seconds, parser


@pytest.mark.parametrize("network", ["ann", "mcibi"])
def test_training_step(benchmark, network):
    small = ["--backbone", "test_resnet", "--size", "32x32", "--batch-size", "2", "--workers", "0"]
    arguments = parser().parse_args(["--network", network, "--device", "cpu", *small])
    training = Training(arguments, steps=10_000)
    before = [p.detach().clone() for p in training.network.parameters()]
    parts = benchmark(training.step)
    expected = {"wait", "copy", "forward", "loss", "backward", "optimizer"}
    assert parts.keys() == expected | ({"memory"} if network == "mcibi" else set())
    assert all(0 < seconds < math.inf for seconds in parts.values())
    after = training.network.parameters()
    assert not all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert loading_seconds(training.loader, 1, training.clock) > 0
