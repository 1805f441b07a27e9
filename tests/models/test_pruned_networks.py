# SPDX-License-Identifier: Apache-2.0
"""Networks that Torch-Pruning narrows, where it is installed; docs/training.md tells how."""

import pytest
from torch import nn

pytest.importorskip("timm")

from networks import NUM_CLASSES, images, make, networks

torch_pruning = pytest.importorskip("torch_pruning")

# What must keep its channels: those of an attention's logits, or that stand for positions.
KEPT = {
    "apcnet": ["decoder.contexts"],
    "ccnet": ["decoder.context.attention.query", "decoder.context.attention.key"],
    "psanet": ["decoder.context"],
}
# In a grouped convolution the tool wants several channels to a group.
OPTIONS = {"gald": {"channels": 64}}


@networks
def test_a_pruned_network_computes_and_trains(name):
    network, image = make(name, **OPTIONS.get(name, {})), images(33, 33, batch=2)
    before = {n: m.weight.shape for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    classifiers = [n for n in before if before[n][0] == NUM_CLASSES]
    torch_pruning.pruner.MagnitudePruner(
        network,
        image,
        torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.3,
        ignored_layers=[network.get_submodule(n) for n in (*classifiers, *KEPT.get(name, ()))],
        forward_fn=lambda network, image: network.train()(image),
    ).step()
    narrower = {n for n in before if network.get_submodule(n).weight.numel() < before[n].numel()}
    assert len(narrower) > len(before) / 3
    for training in (True, False):
        output = network.train(training)(image)
        every = [output.logits, *output.auxiliary.values()]
        for logits in every:
            assert logits.shape == (2, NUM_CLASSES, 33, 33)
            assert logits.isfinite().all()
        if training:
            sum(logits.square().mean() for logits in every).backward()
