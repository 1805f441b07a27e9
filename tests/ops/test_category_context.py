# SPDX-License-Identifier: Apache-2.0
from functools import partial

import pytest
import torch

import ctxops
from ctxops.ops.category_context.reference import reference
from numerics import DTYPES, LAYOUTS, check_operator, random_like

# logits (B, K, h, w), memory's C
CASES = [
    ((1, 1, 1, 1), 1),
    ((2, 3, 7, 5), 8),
    ((3, 19, 6, 9), 5),
    ((1, 2, 1, 23), 33),
    ((2, 5, 19, 1), 1),
]


def make(shape, channels, dtype=torch.float32, device="cpu"):
    logits = 2 * torch.randn(shape, dtype=dtype, device=device)
    return logits, torch.randn(shape[1], channels, dtype=dtype, device=device)


def formula(logits, memory, hard):
    """Eq. 11-12 position by position."""
    batch, classes, height, width = logits.shape
    output = logits.new_zeros(batch, memory.shape[1], height, width)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                scores = logits[b, :, i, j]
                if hard:
                    output[b, :, i, j] = memory[scores.tolist().index(scores.max())]
                    continue
                exponentials = (scores - scores.max()).exp()
                for k in range(classes):
                    output[b, :, i, j] += exponentials[k] / exponentials.sum() * memory[k]
    return output


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (1, 7, 1, 4)], ids=str)
def test_reference_is_its_formula(shape, hard):
    logits, memory = make(shape, 6, torch.float64)
    torch.testing.assert_close(reference(logits, memory, hard), formula(logits, memory, hard))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, layout, dtype, device):
    logits, memory = make(*case, dtype, device)
    inputs = LAYOUTS[layout](logits), memory
    check_operator(ctxops.category_context, partial(reference, hard=False), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, device):
    logits, memory = make((2, 6, 7, 8), 5, device=device)
    for rows in (memory, memory.t().contiguous().t(), memory.repeat_interleave(2, dim=0)[::2]):
        inputs = LAYOUTS[layout](logits), rows
        check_operator(ctxops.category_context, partial(reference, hard=False), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hard_takes_rows(layout, dtype, device):
    logits, memory = make((3, 6, 5, 4), 7, dtype, device)
    logits, memory = LAYOUTS[layout](logits), memory.requires_grad_()
    y = ctxops.category_context(logits, memory, hard=True)
    assert torch.equal(y, formula(logits, memory, hard=True))
    upstream = random_like(y)
    (grad,) = torch.autograd.grad(y, memory, upstream)
    expected = torch.stack(
        [upstream.movedim(1, 3)[logits.argmax(1) == k].double().sum(0) for k in range(6)]
    )
    tolerance = {"rtol": 30 * torch.finfo(dtype).eps, "atol": 30 * torch.finfo(dtype).eps}
    torch.testing.assert_close(grad.double(), expected, **tolerance)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_hard_reads_no_other_row(layout, value, device):
    logits, memory = make((2, 4, 3, 5), 6, device=device)
    logits[:, 2] -= 1e9
    memory[2] = value
    for context in (torch.no_grad(), ctxops.use_reference()):
        with context:
            y = ctxops.category_context(LAYOUTS[layout](logits), memory, hard=True)
        assert torch.equal(y, formula(logits, memory, hard=True))


def test_hard_has_no_gradient_for_the_logits(device):
    logits, memory = make((2, 4, 3, 5), 6, device=device)
    assert not ctxops.category_context(logits.requires_grad_(), memory, hard=True).requires_grad
    y = ctxops.category_context(logits, memory.requires_grad_(), hard=True)
    y.backward(random_like(y))
    assert logits.grad is None
    assert memory.grad.abs().sum() > 0


def test_confident_logits_are_hard():
    logits, memory = make((2, 4, 3, 5), 6, torch.float64)
    y = ctxops.category_context(1e6 * logits, memory)
    torch.testing.assert_close(y, ctxops.category_context(logits, memory, hard=True))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_the_memory_format(layout, hard, device):
    logits, memory = make((2, 6, 7, 8), 5, device=device)
    for reference_is_used in (False, True):
        if reference_is_used:
            with ctxops.use_reference():
                y = ctxops.category_context(LAYOUTS[layout](logits), memory, hard=hard)
        else:
            y = ctxops.category_context(LAYOUTS[layout](logits), memory, hard=hard)
        assert y.stride() == LAYOUTS[layout](torch.empty(2, 5, 7, 8)).stride()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_batch_of_zero(layout, hard, device):
    logits, memory = make((0, 4, 3, 3), 5, device=device)
    y = ctxops.category_context(LAYOUTS[layout](logits), memory, hard=hard)
    assert y.shape == (0, 5, 3, 3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_derivatives_of_higher_order(layout):
    logits, memory = make((2, 3, 2, 2), 4, torch.float64)
    inputs = LAYOUTS[layout](logits).requires_grad_(), memory.requires_grad_()
    assert torch.autograd.gradcheck(ctxops.category_context, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ctxops.category_context, inputs)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiles_once_for_all_sizes(layout, dtype, hard, device):
    torch._dynamo.reset()
    operator = partial(ctxops.category_context, hard=hard)
    compiled = torch.compile(operator, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((12, 10), (17, 9), (31, 45)):
            logits, memory = make((2, 8, *size), 5, dtype, device)
            logits = LAYOUTS[layout](logits)
            torch.testing.assert_close(compiled(logits, memory), operator(logits, memory))


def test_compiles_by_inductor(device):
    logits, memory = make((2, 8, 9, 7), 5, device=device)
    compiled = torch.compile(ctxops.category_context, fullgraph=True)
    torch.testing.assert_close(compiled(logits, memory), ctxops.category_context(logits, memory))


class Context(torch.nn.Module):
    def __init__(self, hard):
        super().__init__()
        self.hard = hard

    def forward(self, logits, memory):
        return ctxops.category_context(logits, memory, hard=self.hard)


@pytest.mark.parametrize("hard", [False, True])
def test_exports_with_dynamic_sizes(hard):
    module = Context(hard)
    height, width = (torch.export.Dim(n, min=2, max=4096) for n in ("height", "width"))
    program = torch.export.export(
        module, make((1, 8, 12, 10), 5), dynamic_shapes=[{2: height, 3: width}, None]
    )
    for size in ((17, 23), (2, 40)):
        inputs = make((1, 8, *size), 5)
        torch.testing.assert_close(program.module()(*inputs), module(*inputs))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_autocast_casts_down(layout, hard, device):
    logits, memory = make((2, 8, 7, 8), 5, device=device)
    logits = LAYOUTS[layout](logits)
    with torch.autocast(device, dtype=torch.bfloat16):
        # As under a head: the scores come cast, the memory does not.
        y = ctxops.category_context(logits.bfloat16(), memory, hard=hard)
        assert torch.equal(y, ctxops.category_context(logits, memory, hard=hard))
    assert y.dtype == torch.bfloat16
    expected = ctxops.category_context(logits.bfloat16(), memory.bfloat16(), hard=hard)
    torch.testing.assert_close(y, expected)


def test_use_reference(monkeypatch):
    module = __import__("ctxops.ops.category_context.op", fromlist=["op"])
    calls = []
    monkeypatch.setattr(module, "reference", lambda *a: calls.append(a) or reference(*a))
    inputs = make((2, 4, 3, 5), 6)
    y = ctxops.category_context(*inputs)
    assert not calls
    with ctxops.use_reference():
        torch.testing.assert_close(ctxops.category_context(*inputs), y)
    assert len(calls) == 1


def test_meta_tensors():
    y = ctxops.category_context(*make((2, 4, 3, 5), 6, device="meta"))
    assert y.shape == (2, 6, 3, 5)


@pytest.mark.parametrize(
    ("logits", "memory", "error", "message"),
    [
        (torch.ones(4, 3, 3), torch.ones(4, 2), ValueError, r"logits must have shape \(B, C, H, W"),
        (torch.ones(1, 4, 0, 3), torch.ones(4, 2), ValueError, "logits must have C, H and W of"),
        (torch.ones(1, 4, 3, 3).long(), torch.ones(4, 2), TypeError, "logits must be float32"),
        (
            torch.ones(1, 4, 3, 3),
            torch.ones(5, 2),
            ValueError,
            r"memory must have shape \(K, C\) = \(4, any\), got \(5, 2\)",
        ),
        (torch.ones(1, 4, 3, 3), torch.ones(4), ValueError, r"memory must have shape \(K, C\) ="),
        (torch.ones(1, 4, 3, 3), [1.0], TypeError, r"memory must be a torch\.Tensor, got list"),
        (
            torch.ones(1, 4, 3, 3),
            torch.ones(4, 2).double(),
            TypeError,
            r"memory must have the dtype of logits, torch\.float32, got torch\.float64",
        ),
        (
            torch.ones(1, 4, 3, 3),
            torch.ones(4, 2, device="meta"),
            ValueError,
            "memory must be on the device cpu, got meta",
        ),
    ],
    ids=lambda x: None,
)
def test_bad_input(logits, memory, error, message):
    with pytest.raises(error, match=message):
        ctxops.category_context(logits, memory)
