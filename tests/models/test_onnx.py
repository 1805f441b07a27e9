# SPDX-License-Identifier: Apache-2.0
"""Every network exports to ONNX, on the references, with sizes that stay open."""

import pytest
import torch

import ctxops
from ctxops.models import LogitsOnly, list_models
from modules import mostly_slow
from networks import images, traceable

pytest.importorskip("onnxscript", reason='needs pip install "ctxops[export]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "ctxops[export]"')


@pytest.mark.parametrize("name", mostly_slow(list_models(), "ccnet"))
def test_onnx_with_dynamic_sizes(name, tmp_path):
    path = tmp_path / "network.onnx"
    module = LogitsOnly(traceable(name)).eval()
    dynamic = [{2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}]
    with ctxops.use_reference(), torch.no_grad():
        torch.onnx.export(
            module, (images(65, 41),), path, dynamo=True, dynamic_shapes=dynamic, optimize=False
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in [(33, 33), (37, 53)]:
        image = images(*size)
        (exported,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        expected = module(image).detach()
        torch.testing.assert_close(
            torch.from_numpy(exported), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
        )
