# SPDX-License-Identifier: Apache-2.0
"""Networks under torch's ``fully_shard``, which has weights in calls alone, and under DDP."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("timm")

from torch.distributed.fsdp import fully_shard

from ctxops.models import list_models
from ctxops.nn import (
    DatasetContextAggregation,
    GatedFullyFusion,
    representation_consistency_loss,
)
from modules import mostly_slow, randomise
from networks import NUM_CLASSES, images, traceable
from numerics import random_like


@pytest.fixture(scope="module", autouse=True)
def mesh(tmp_path_factory):
    meeting = tmp_path_factory.mktemp("processes") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


UNITS = {
    "children": lambda network: [
        m for m in network.children() if next(m.parameters(), None) is not None
    ],
    "convolutions": lambda network: [m for m in network.modules() if isinstance(m, nn.Conv2d)],
}
CASES = {f"{name}, children": (name, "children") for name in list_models()}
CASES |= {f"{name}, convolutions": (name, "convolutions") for name in ("ann", "dnlnet")}
# These read weights, or call a decoder's children themselves.
QUICK = "ann, convolutions", "mcibi, children"


def without_dropout(name):
    network = traceable(name).double()
    for module in network.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0
    return network


def results(network, image):
    """All logits and every gradient, in evaluation and in training."""
    found = []
    for training in (False, True):
        output = network.train(training)(image)
        logits = [output.logits, *output.auxiliary.values()]
        torch.manual_seed(0)
        sum((y * random_like(y)).sum() for y in logits).backward()
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        found += [*logits, *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads)]
    return found


@pytest.mark.parametrize(("name", "units"), mostly_slow(CASES, *QUICK))
def test_a_sharded_network_computes_the_same(name, units, mesh):
    network, image = without_dropout(name), images(17, 21, batch=2).double()
    expected = results(copy.deepcopy(network), image)
    for unit in reversed(UNITS[units](network)):
        fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh)
    torch.testing.assert_close(results(network, image), expected, rtol=1e-6, atol=1e-8)


def test_methods_besides_forward_have_the_weights(mesh):
    dca, x = randomise(DatasetContextAggregation(8, 6)).eval(), torch.randn(1, 8, 5, 7)
    gff = randomise(GatedFullyFusion([8, 8], 6)).eval()
    expected = dca.reduce(x), gff.gates([x, x])
    for module in (dca, gff):
        fully_shard(module, mesh=mesh)
    for _ in range(2):
        torch.testing.assert_close((dca.reduce(x), gff.gates([x, x])), expected)


def test_a_memory_is_trained_under_ddp():
    """Two steps: a parameter without gradient stops the second."""
    network, image = without_dropout("mcibi").train(), images(17, 21, batch=2).double()
    labels, states = torch.randint(NUM_CLASSES, (2, 17, 21)), []
    for model in (copy.deepcopy(network), nn.parallel.DistributedDataParallel(network)):
        inner = getattr(model, "module", model)
        for step in range(2):
            output = model(image)
            every = output.logits, *output.auxiliary.values()
            loss = sum(logits.square().mean() for logits in every)
            memory, initialized = inner.bank.memory, inner.bank.initialized
            loss = loss + representation_consistency_loss(inner.classifier, memory, initialized)
            loss.backward()
            inner.bank(output.features, labels, generator=torch.Generator().manual_seed(step))
        grads = {name: p.grad for name, p in inner.named_parameters()}
        states.append([grads, inner.state_dict()])
    torch.testing.assert_close(*states)
