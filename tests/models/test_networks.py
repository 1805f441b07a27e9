# SPDX-License-Identifier: Apache-2.0
"""What every network must do; a new one is tested as soon as it is registered."""

import pickle

import pytest
import torch

from ctxops.models import list_models, model_options
from modules import mostly_slow
from networks import NUM_CLASSES, images, make, network_of, networks, traceable
from numerics import LAYOUTS, assert_close, random_like

SIZES = [(33, 33), (37, 53)]


@networks
@pytest.mark.parametrize(
    "size", [pytest.param(SIZES[0], marks=pytest.mark.slow), SIZES[1]], ids=str
)
def test_evaluation_gives_logits_at_the_size_of_the_image(name, size):
    output = network_of(name)(images(*size))
    assert output.logits.shape == (1, NUM_CLASSES, *size)
    assert output.logits.isfinite().all()
    assert output.auxiliary == {}
    assert output.features is None


@networks
def test_training_gives_auxiliary_logits_and_every_gradient(name):
    network = network_of(name).train()
    output = network(images(37, 53, batch=2))
    every = [output.logits, *output.auxiliary.values()]
    expects_head = bool(model_options(name).get("auxiliary_channels"))
    assert ("auxiliary" in output.auxiliary) == expects_head
    for logits in every:
        assert logits.shape == (2, NUM_CLASSES, 37, 53)
    sum((logits * random_like(logits)).sum() for logits in every).backward()
    for what, parameter in network.named_parameters():
        assert parameter.grad is not None, f"{what} has no gradient"
        # The bias of a key shifts all logits of an attention alike, so it may well have none.
        assert parameter.grad.any() or what.endswith("bias"), f"the gradient of {what} is zero"


@networks
@pytest.mark.parametrize("channels", [0, 8])
def test_auxiliary_head(name, channels):
    if "auxiliary_channels" not in model_options(name):
        pytest.skip("it has none")
    network = make(name, auxiliary_channels=channels).train()
    parameters = [what for what, _ in network.named_parameters() if what.startswith("auxiliary.")]
    assert bool(parameters) == bool(channels)
    output = network(images(33, 33, batch=2))
    assert ("auxiliary" in output.auxiliary) == bool(channels)


@networks
@pytest.mark.parametrize("dtype", mostly_slow([torch.float64, torch.float32], "torch.float32"))
def test_memory_formats_agree(name, dtype):
    network = network_of(name).double()
    image = images(37, 53).to(dtype)
    exact = network(image.double()).logits
    plain = network.to(dtype)(image).logits
    network.to(memory_format=torch.channels_last)
    logits = network(LAYOUTS["channels_last"](image)).logits
    assert_close(logits, plain, exact)


@networks
def test_autocast(name):
    network = network_of(name)
    image = images(33, 33)
    expected = network(image).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(image).logits
    assert logits.isfinite().all()
    assert (logits - expected).norm() < 0.1 * expected.norm()


@networks
def test_state_dict_copies_and_pickles(name):
    torch.manual_seed(1)
    network, other = network_of(name), make(name)
    image = images(33, 33)
    expected = network(image).logits
    assert (other(image).logits - expected).abs().max() > 1e-3
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(other(image).logits, expected, rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(network))
    torch.testing.assert_close(again(image).logits, expected, rtol=0, atol=0)


@networks
def test_safetensors_finds_no_tensor_under_two_names(name):
    file = pytest.importorskip("safetensors.torch")
    state = network_of(name).state_dict()
    assert file.load(file.save(state)).keys() == state.keys()


# What evaluation does not call, and containers.
IN_TRAINING = "auxiliary", "bank", "channel_classifier", "position_classifier"


@networks
def test_hooks_see_every_module_and_its_gradient(name):
    """As Grad-CAM does on the module that it is given."""
    network, seen = traceable(name), {}
    for what, module in network.named_modules():
        module.register_forward_hook(lambda m, x, y, what=what: seen.setdefault(what, y))
    logits = network(images(33, 37)).logits
    missed = {
        what
        for what, module in network.named_modules()
        if not isinstance(module, torch.nn.ModuleList) and not what.startswith(IN_TRAINING)
    } - seen.keys()
    assert not missed
    maps = {what: y for what, y in seen.items() if isinstance(y, torch.Tensor) and y.requires_grad}
    grads = torch.autograd.grad(logits[0, 1].sum(), maps.values(), allow_unused=True)
    unused = [what for what, grad in zip(maps, grads, strict=True) if grad is None]
    assert [what for what in unused if not what.startswith("encoder")] == []


# What computes in a network is a module, and compiles in the module's own test: here are those that
# do more than encoder, decoder, classifier.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ann", "fcn", "gff", "mcibi", "ocrnet"])
def test_compiles_once_for_all_sizes(name):
    if name == "fcn" and torch.__version__ < (2, 9):
        pytest.skip("torch 2.8 compiles the backbone's pools anew for odd sizes and for even ones")
    torch._dynamo.reset()
    network = traceable(name).double()
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in [(65, 41), (37, 53)]:
            image = images(*size).double()
            torch.testing.assert_close(compiled(image).logits, network(image).logits)


@pytest.mark.parametrize("name", mostly_slow(list_models(), "ann"))
def test_exports_with_dynamic_sizes(name):
    network = traceable(name).double()
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(network, (images(65, 41).double(),), dynamic_shapes=[sizes])
    for size in SIZES:
        image = images(*size).double()
        exported = program.module()(image)
        torch.testing.assert_close(exported.logits, network(image).logits)
