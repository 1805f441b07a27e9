# SPDX-License-Identifier: Apache-2.0
"""The references export to ONNX with sizes that stay open."""

import numpy as np
import pytest
import torch
from torch import nn

import ctxops
from ctxops.nn import APNB, CrissCrossAttention, DatasetContextAggregation
from modules import mostly_slow

pytest.importorskip("onnxscript", reason='needs pip install "ctxops[export]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "ctxops[export]"')


class Pool(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def forward(self, x):
        return ctxops.pyramid_pool(x, mode=self.mode)


class Attend(nn.Module):
    def __init__(self, border):
        super().__init__()
        self.border = border

    def forward(self, x):
        window = {"kernel_size": (3, 2), "dilation": (1, 2), "border": self.border}
        return ctxops.neighborhood_attention(x, x.flip(3), x * x, num_heads=2, **window)


class Fuse(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        features = [x, torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True), x.sin()]
        return torch.cat([y.flatten(1) for y in ctxops.self_gated_fusion(features, self.weight)], 1)


class CrissCross(nn.Module):
    def forward(self, x):
        return ctxops.criss_cross_attention(x, x.flip(3), x * x)


class DatasetContext(nn.Module):
    def __init__(self, hard):
        super().__init__()
        self.dca = DatasetContextAggregation(8, 6, 8, hard=hard)
        self.head = nn.Conv2d(6, 5, 1)
        self.register_buffer("memory", torch.randn(5, 6))

    def forward(self, x):
        r = self.dca.reduce(x)
        return self.dca(r, self.head(r), self.memory, x)


def criss_cross_block():
    module = CrissCrossAttention(8, 4).eval()
    nn.init.constant_(module.gamma, 0.7)
    return module


def block():
    module = APNB(8, 4, 4, fuse="concat").eval()
    nn.init.normal_(module.out.weight)
    return module


MODULES = {
    "avg": Pool("avg"),
    "max": Pool("max"),
    "zeros": Attend("zeros"),
    "mask": Attend("mask"),
    "shift": Attend("shift"),
    "fusion": Fuse(),
    "criss_cross": CrissCross(),
    "APNB": block(),
    "DatasetContextAggregation": DatasetContext(hard=False).eval(),
    "DatasetContextAggregation, hard": DatasetContext(hard=True).eval(),
    "CrissCrossAttention": criss_cross_block(),
}


@pytest.mark.parametrize("module", mostly_slow(MODULES, "avg", "fusion", "APNB"))
def test_onnx_with_dynamic_sizes(module, tmp_path):
    path = tmp_path / "module.onnx"
    x = torch.randn(1, 8, 12, 10)
    with ctxops.use_reference(), torch.no_grad():
        dynamic = [{2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}]
        torch.onnx.export(module, (x,), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in ((12, 10), (17, 23), (5, 7), (33, 8)):
        x = torch.randn(1, 8, *size)
        (exported,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(exported, module(x).detach(), rtol=1e-4, atol=1e-5)
