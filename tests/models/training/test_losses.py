# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

pytest.importorskip("torchvision")

from ctxops.models import SegmentationOutput
from ctxops.models.data import IGNORE
from ctxops.models.training.losses import Loss, cross_entropy, ohem_cross_entropy
from ctxops.nn import representation_consistency_loss
from networks import NUM_CLASSES, images, network_of


def case(classes=4):
    """Logits, labels of which a third is ignored, and the loss of each labelled pixel."""
    logits = torch.randn(2, classes, 5, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(classes, (2, 5, 7))
    labels[torch.rand(labels.shape) < 1 / 3] = IGNORE
    assert 0 < (labels == IGNORE).sum() < labels.numel()
    losses = [
        -logits[b, :, y, x].log_softmax(0)[labels[b, y, x]]
        for b, y, x in (labels != IGNORE).nonzero().tolist()
    ]
    return logits, labels, torch.stack(losses)


def test_cross_entropy_is_the_mean_over_labelled_pixels():
    logits, labels, losses = case()
    torch.testing.assert_close(cross_entropy(logits, labels), losses.mean())


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_ohem_keeps_a_share_of_the_labelled_pixels(keep):
    logits, labels, losses = case()
    hardest = losses.sort(descending=True).values[: math.ceil(keep * len(losses))]
    torch.testing.assert_close(ohem_cross_entropy(logits, labels, keep), hardest.mean())


def test_ohem_keeps_what_is_below_the_threshold():
    logits, labels, losses = case()
    below = losses[(-losses).exp() < 0.3]
    assert 0.1 * len(losses) < len(below) < len(losses)
    actual = ohem_cross_entropy(logits, labels, 0.01, threshold=0.3)
    torch.testing.assert_close(actual, below.mean())
    # whichever of the two keeps more
    actual = ohem_cross_entropy(logits, labels, 1.0, threshold=0.3)
    torch.testing.assert_close(actual, losses.mean())


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy])
def test_ignored_pixels_have_no_part(loss):
    logits, labels, _ = case()
    with torch.no_grad():
        logits.masked_fill_((labels == IGNORE)[:, None], 50.0)
    value = loss(logits, labels)
    value.backward()
    ignored = (labels == IGNORE)[:, None].expand_as(logits)
    assert not logits.grad[ignored].any()
    assert logits.grad[~ignored].any()
    with torch.no_grad():
        logits[ignored] = torch.randn_like(logits[ignored])
    torch.testing.assert_close(loss(logits, labels), value)


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy])
def test_no_label_at_all(loss):
    logits, labels, _ = case()
    value = loss(logits, torch.full_like(labels, IGNORE))
    value.backward()
    assert value == 0
    assert not logits.grad.any()


def test_auxiliary_heads_have_a_plain_cross_entropy():
    logits, labels, _ = case()
    other = torch.randn_like(logits)
    output = SegmentationOutput(logits, {"a": other, "b": logits})
    actual = Loss("ohem", keep=0.5, auxiliary=0.3)(torch.nn.Identity(), output, labels)
    expected = ohem_cross_entropy(logits, labels, 0.5)
    expected = expected + 0.3 * (cross_entropy(other, labels) + cross_entropy(logits, labels))
    torch.testing.assert_close(actual, expected)


def test_a_memory_s_rows_have_a_loss():
    network = network_of("mcibi").train()
    output = network(images(33, 33, batch=2))
    labels = torch.randint(NUM_CLASSES, (2, 33, 33))
    network.bank(output.features, labels)
    network.classifier.eval()  # its dropout would differ
    expected = cross_entropy(output.logits, labels)
    expected = expected + 0.4 * sum(cross_entropy(x, labels) for x in output.auxiliary.values())
    bank = network.bank
    rows = representation_consistency_loss(network.classifier, bank.memory, bank.initialized)
    assert rows > 0
    actual = Loss(consistency=2.0)(network, output, labels)
    torch.testing.assert_close(actual, expected + 2 * rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "focal"}, r"kind must be one of \('cross_entropy', 'ohem'\), got 'focal'"),
        ({"keep": 0.0}, "keep must be above 0 and at most 1, got 0"),
        ({"threshold": 1.0}, "threshold must be at least 0 and below 1, got 1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        Loss(**options)
