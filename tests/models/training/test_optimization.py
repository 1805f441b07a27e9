# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")

from ctxops.models.training.optimization import Optimization, poly


def rates(optimization, steps):
    optimizer, schedule = optimization.of(nn.Linear(2, 2), steps)
    for _ in range(steps):
        yield optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
    yield optimizer.param_groups[0]["lr"]


def test_poly():
    expected = [0.1 * (1 - step / 5) ** 0.9 for step in range(6)]
    assert list(rates(Optimization(lr=0.1), 5)) == pytest.approx(expected)
    assert poly(7, 5) == 0
    assert poly(0, 5, power=0.0) == 1


def test_warm_up():
    expected = [0.1 * (1 - step / 5) ** 2 * min(1, (step + 1) / 3) for step in range(6)]
    actual = rates(Optimization(lr=0.1, power=2, warmup=3), 5)
    assert list(actual) == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_norms_and_biases_may_keep_their_size(optimizer):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimization = Optimization(optimizer, weight_decay=0.1, decay_norms=False)
    optimizer, _ = optimization.of(network, 5)
    decays = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert {n: decays[id(p)] for n, p in network.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_frozen_parameters_are_left_out():
    network = nn.Linear(2, 2)
    network.weight.requires_grad_(False)
    optimizer, _ = Optimization().of(network, 5)
    (group,) = optimizer.param_groups
    assert [p.shape for p in group["params"]] == [torch.Size([2])]
    assert group["momentum"] == 0.9


def test_bad_input():
    with pytest.raises(ValueError, match=r"optimizer must be one of .*, got 'adam'"):
        Optimization("adam")
    with pytest.raises(ValueError, match=r"lr must be at least 0, got -1"):
        Optimization(lr=-1)
