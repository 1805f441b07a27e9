# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch

import ctxops
from ctxops import _layout, _native, _operator
from ctxops.ops.pyramid_pool import op
from ctxops.ops.pyramid_pool.reference import reference
from numerics import LAYOUTS


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_empty_map_takes_the_memory_format(layout):
    like = LAYOUTS[layout](torch.randn(2, 3, 4, 5))
    empty = _layout.empty_map((2, 7, 4, 5), like)
    assert empty.stride() == LAYOUTS[layout](torch.randn(2, 7, 4, 5)).stride()


def test_memory_format_of_an_ambiguous_map_is_contiguous():
    one_channel = torch.randn(2, 1, 4, 5).contiguous(memory_format=torch.channels_last)
    assert _layout.memory_format(one_channel) == torch.contiguous_format


def test_use_reference_switches_and_restores(monkeypatch):
    calls = []
    monkeypatch.setattr(op, "reference", lambda *a: calls.append(a) or reference(*a))
    x = torch.randn(1, 2, 5, 5)
    ctxops.pyramid_pool(x)
    assert not calls
    with ctxops.use_reference():
        ctxops.pyramid_pool(x)
        with ctxops.use_reference():
            pass
        ctxops.pyramid_pool(x)
    assert len(calls) == 2
    with pytest.raises(ZeroDivisionError), ctxops.use_reference():
        raise ZeroDivisionError
    ctxops.pyramid_pool(x)
    assert len(calls) == 2


def test_overlapping_contexts_end_with_the_last():
    first, second = ctxops.use_reference(), ctxops.use_reference()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _operator.reference_active
    second.__exit__(None, None, None)
    assert not _operator.reference_active


class Graphs:
    """A backend of torch.compile that counts our operators in the graphs that it is given."""

    def __init__(self):
        self.operators = 0

    def __call__(self, graph, inputs):
        self.operators += sum("ctxops" in str(node.target) for node in graph.graph.nodes)
        return graph


def test_use_reference_around_a_compiled_function():
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(
        lambda x: ctxops.pyramid_pool(x, (1, 2)), fullgraph=True, backend=graphs
    )
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    with ctxops.use_reference():
        plain = compiled(x)
    assert graphs.operators == 0
    torch.testing.assert_close(compiled(x), plain)
    assert graphs.operators == 1


def test_use_reference_inside_a_compiled_function():
    torch._dynamo.reset()
    graphs = Graphs()

    @torch.compile(fullgraph=True, backend=graphs)
    def both(x):
        with ctxops.use_reference():
            a = ctxops.pyramid_pool(x, (1, 2))
        return a, ctxops.pyramid_pool(x, (1, 2))

    torch.testing.assert_close(*both(torch.randn(1, 2, 6, 6)))
    assert graphs.operators == 1
    assert not _operator.reference_active


def test_a_device_without_kernels_is_served_by_the_reference(monkeypatch):
    calls = []
    monkeypatch.setattr(op, "reference", lambda *a: calls.append(a) or reference(*a))
    monkeypatch.setattr(op._FORWARD, "devices", frozenset({"cuda"}))
    x = torch.randn(2, 3, 9, 8)
    assert torch.equal(ctxops.pyramid_pool(x), reference(x, (1, 3, 6, 8), "avg"))
    assert len(calls) == 1


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True)])
@pytest.mark.parametrize("name", _operator.operators)
def test_an_old_gpu_is_served_by_the_references(name, capability, served, monkeypatch):
    x = SimpleNamespace(device=torch.device("cuda", 1), is_cuda=True)
    asked = []

    def properties(device):
        asked.append(device)
        return SimpleNamespace(major=capability[0], minor=capability[1])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(_operator.operators[name], "devices", frozenset({"cuda"}))
    assert _operator.operators[name].serves(x) == served
    assert asked == [x.device]


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends to be on a GPU")
def test_a_kernel_is_launched_with_the_device_of_its_tensors(monkeypatch):
    """torch switches to it and back, so that no context is made on a device that has none."""
    device, current, launched = torch.device("cuda", 1), [0], []

    def switch(index):
        former, current[0] = current[0], index
        return former

    stream = SimpleNamespace(cuda_stream=7)
    kernels = SimpleNamespace(kernel=lambda *arguments: launched.append((*arguments, current[0])))
    monkeypatch.setattr(torch.cuda, "_exchange_device", switch)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", switch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(_native, "cuda", kernels)
    _operator.launch("kernel", SimpleNamespace(device=device, is_cuda=True), size=3)
    assert launched == [({"size": 3}, 7, 1)]
    assert current == [0]


def test_meta_tensors_get_their_shapes():
    x = torch.empty(2, 3, 9, 8, device="meta")
    assert ctxops.pyramid_pool(x).shape == (2, 3, 110)
    key, value = (torch.empty(2, 3, 5, device="meta") for _ in range(2))
    assert ctxops.asymmetric_attention(x, key, value).shape == x.shape


def test_works_under_inference_mode():
    x = torch.randn(1, 2, 9, 8)
    with torch.inference_mode():
        torch.testing.assert_close(ctxops.pyramid_pool(x), reference(x, (1, 3, 6, 8), "avg"))


def test_public_names_all_exist():
    assert all(hasattr(ctxops, name) for name in ctxops.__all__)
