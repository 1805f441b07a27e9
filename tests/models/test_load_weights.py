# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

pytest.importorskip("timm")

from ctxops.models import create_model
from ctxops.models.convert import load_weights

SMALL = {"backbone": "test_resnet", "auxiliary_channels": 8}


def network_of(name, num_classes=5, **options):
    network = create_model(name, num_classes=num_classes, **SMALL, **options)
    for x in network.state_dict().values():
        if x.is_floating_point():
            x.normal_()
    return network


def test_all_weights_of_the_same_network():
    ours, theirs = network_of("fcn"), network_of("fcn").state_dict()
    assert load_weights(ours, theirs) == ""
    torch.testing.assert_close(ours.state_dict(), theirs, rtol=0, atol=0)


def test_another_number_of_classes():
    """Refused, unless a part is asked for; then what is left is named."""
    ours, theirs = network_of("fcn"), network_of("fcn", num_classes=7).state_dict()
    before = {name: x.clone() for name, x in ours.state_dict().items()}
    with pytest.raises(ValueError, match=r"shapes classifier.1.weight \(7, \d+, 1, 1\) instead of"):
        load_weights(ours, theirs)
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)
    left = load_weights(ours, theirs, strict=False)
    for part in ("shapes", "classifier.1.bias (7,) instead of (5,)", "auxiliary"):
        assert part in left
    for name, x in ours.state_dict().items():
        same = before if x.shape != theirs[name].shape else theirs
        assert torch.equal(x, same[name]), name


def test_a_module_of_another_name():
    """GFF starts from a trained PSPNet, its pyramid pooling included."""
    theirs = network_of("pspnet", channels=8, branch_activation=False).state_dict()
    ours = network_of("gff", channels=8, context_channels=8)
    left = load_weights(ours, theirs, strict=False, rename={"decoder": "decoder.context"})
    state = ours.state_dict()
    for name, x in theirs.items():
        if not name.startswith("classifier."):
            renamed = name.replace("decoder.", "decoder.context.")
            assert torch.equal(state[renamed], x), name
            assert renamed not in left
    assert "missing decoder.fusion." in left


def test_what_is_not_there():
    ours = network_of("fcn")
    with pytest.raises(ValueError, match="no weight of the checkpoint is in a module 'neck'"):
        load_weights(ours, ours.state_dict(), rename={"neck": "decoder"})
    with pytest.raises(ValueError, match=r"do not fit the network: missing .*; unexpected a"):
        load_weights(ours, {"a": torch.zeros(1)}, strict=False)
