# SPDX-License-Identifier: Apache-2.0
"""The eager twins of our modules, which the heads are compared with."""

import sys
from types import ModuleType

import pytest
import torch

import ctxops.compat.natten
from baselines.eager import eager_twin
from baselines.functions import (
    cross_by_bmm,
    cross_by_einsum,
    windows_by_natten,
    windows_by_shifts,
    windows_by_unfold,
)
from baselines.released import randomize
from ctxops.nn import (
    AFNB,
    APNB,
    CrissCrossAttention,
    DatasetContextAggregation,
    DenseFeaturePyramid,
    GatedFullyFusion,
    LDv2,
    PyramidPooling,
)

LEVELS = [(6, 17, 13), (8, 9, 7), (4, 9, 7)]


def maps(*shapes):
    return [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]


def dataset_context():
    return [*maps((8, 6, 5), (3, 6, 5)), torch.randn(3, 8, dtype=torch.float64)]


MODULES = {
    "APNB": (lambda: APNB(8, 6, 4, fuse="concat"), lambda: maps((8, 9, 7))),
    "AFNB": (lambda: AFNB(6, 8, 4, 4, fuse="add"), lambda: maps((6, 9, 7), (8, 5, 6))),
    "LDv2": (lambda: LDv2(6, 8, 4, kernel_size=3), lambda: maps((6, 9, 7), (8, 9, 7))),
    "CrissCrossAttention": (lambda: CrissCrossAttention(8, 2), lambda: maps((8, 9, 7))),
    "GatedFullyFusion": (
        lambda: GatedFullyFusion([c for c, _, _ in LEVELS], 4),
        lambda: [maps(*LEVELS)],
    ),
    "GatedFullyFusion-reduced": (
        lambda: GatedFullyFusion([c for c, _, _ in LEVELS], 4, "reduced"),
        lambda: [maps(*LEVELS)],
    ),
    "DenseFeaturePyramid": (
        lambda: DenseFeaturePyramid([c for c, _, _ in LEVELS], 5, 4),
        lambda: [maps(*LEVELS), *maps((5, 9, 7))],
    ),
    "PyramidPooling": (lambda: PyramidPooling(8, 4), lambda: maps((8, 9, 7))),
    "DatasetContextAggregation": (lambda: DatasetContextAggregation(8, 8), dataset_context),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", MODULES)
def test_twins_agree(name, layout):
    make, make_inputs = MODULES[name]
    module = randomize(make()).double().eval()
    twin = eager_twin(module)

    def formatted(x):
        if isinstance(x, list):
            return [formatted(y) for y in x]
        return x.contiguous(memory_format=layout) if x.dim() == 4 else x

    inputs = [formatted(x) for x in make_inputs()]
    with torch.no_grad():
        results, expected = module(*inputs), twin(*inputs)
    torch.testing.assert_close(results, expected)
    results = [results] if isinstance(results, torch.Tensor) else results
    assert all(y.std() > 1e-3 for y in results)


@pytest.mark.parametrize("name", ["APNB", "LDv2", "CrissCrossAttention", "GatedFullyFusion"])
def test_twins_call_no_operator_of_ours(name):
    make, make_inputs = MODULES[name]
    module, inputs = randomize(make()).double().eval(), make_inputs()

    def called(module):
        with torch.profiler.profile() as recorded, torch.no_grad():
            module(*inputs)
        return {e.name for e in recorded.events() if e.name.startswith("ctxops::")}

    assert called(module)
    assert not called(eager_twin(module))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_forms_of_one_operator_agree(scale):
    query, key, value = maps((4, 9, 7), (4, 9, 7), (6, 9, 7))
    torch.testing.assert_close(
        cross_by_bmm(query, key, value, scale), cross_by_einsum(query, key, value, scale)
    )
    window = {"kernel": 3, "dilation": 2, "scale": scale}
    torch.testing.assert_close(
        windows_by_shifts(query, key, value, **window),
        windows_by_unfold(query, key, value, **window),
    )


def test_form_of_natten(monkeypatch):
    """On the CPU it calls the functions that ctxops.compat.natten has as well."""
    monkeypatch.setitem(sys.modules, "natten", ModuleType("natten"))
    monkeypatch.setitem(sys.modules, "natten.functional", ctxops.compat.natten)
    query, key, value = maps((4, 9, 7), (4, 9, 7), (6, 9, 7))
    torch.testing.assert_close(
        windows_by_natten(query, key, value, kernel=3, dilation=2),
        ctxops.neighborhood_attention(query, key, value, kernel_size=3, dilation=2, border="shift"),
    )
