# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctxops
from covering import chosen, values
from ctxops.nn import DatasetContextAggregation, representation_consistency_loss
from modules import activate, assert_same, cbr, mostly_slow, randomise
from numerics import LAYOUTS, random_like

FORMS = {
    "alone": {},
    "attention": {"within_channels": 6},
    "attention to a wider map": {"within_channels": 9},
    "concat": {"within_channels": 6, "within_attention": False},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
fusions = pytest.mark.parametrize("fusion", ["concat", "add", "weighted_add"])
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class Steps(nn.Module):
    """Both steps of a network: X, the memory and perhaps W to Y."""

    def __init__(self, **arguments):
        super().__init__()
        self.dca = DatasetContextAggregation(5, 6, **arguments)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x, memory, *within):
        r = self.dca.reduce(x)
        return self.dca(r, self.head(r), memory, *within)


def make(form, device="cpu", **arguments):
    return randomise(Steps(**form, **arguments)).to(device)


def draw(form, size=(5, 4), batch=3, device="cpu"):
    """X, M and, where the form has it, W."""
    shapes = [(batch, 5, *size), (4, 6)]
    if form:
        shapes.append((batch, form["within_channels"], *size))
    return tuple(torch.randn(shape, device=device) for shape in shapes)


def attend(attention, x, context):
    """Eq. 13 and 14."""
    query, key = cbr(attention.query, x), cbr(attention.key, context)
    value = cbr(attention.value, context).flatten(2)
    relations = query.flatten(2).mT @ key.flatten(2) / (x.shape[1] / 2) ** 0.5
    weights = relations.exp() / relations.exp().sum(2, keepdim=True)
    attended = torch.einsum("bij,bcj->bci", weights, value)
    return cbr(attention.out, attended.unflatten(2, x.shape[2:]))


def fuse(module, kind, *maps):
    if kind == "add":
        return sum(maps)
    if kind == "concat":
        return cbr(module.convolution, torch.cat(maps, 1))
    scores = F.conv2d(torch.cat(maps, 1), module.weights.weight, module.weights.bias).exp()
    return sum(scores[:, i, None] / scores.sum(1, keepdim=True) * x for i, x in enumerate(maps))


def formula(steps, x, memory, *within):
    dca, head = steps.dca, steps.head
    r = cbr(dca.bottleneck, x)
    logits = F.conv2d(r, head.weight, head.bias)
    if dca.hard:
        coarse = memory[logits.argmax(1)].permute(0, 3, 1, 2)
    else:
        probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
        coarse = torch.einsum("bkhw,kc->bchw", probabilities, memory)
    context = attend(dca.attention, r, coarse)
    if dca.attention_within is None:
        return fuse(dca.fuse, dca.fusion, r, context, *within)
    mixed = fuse(dca.fuse, dca.fusion, r, context)
    return fuse(dca.fuse_within, dca.fusion, attend(dca.attention_within, r, *within), mixed)


@modes
@fusions
@forms
def test_is_its_formula(form, fusion, training):
    steps = make(form, fusion=fusion).double().train(training)
    assert_same(steps, draw(form), lambda *x: formula(steps, *x))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1)], ids=str)
@forms
def test_other_sizes(form, size):
    steps = make(form).double()
    assert_same(steps, draw(form, size), lambda *x: formula(steps, *x))


@pytest.mark.parametrize(
    "arguments",
    [{"projection_layers": 1}, {"kernel_size": 1}, {"kernel_size": 3}, {"hard": True}],
    ids=str,
)
@forms
def test_options_are_their_formulas(form, arguments):
    steps = make(form, **arguments).double()
    assert_same(steps, draw(form), lambda *x: formula(steps, *x))
    assert len(steps.dca.attention.query) == 3 * arguments.get("projection_layers", 2)
    width = steps.dca.bottleneck[0].kernel_size[0]
    assert width == arguments.get("kernel_size", 1 if form else 3)


def test_hard_gives_the_head_no_gradient():
    for hard, expected in ((True, False), (False, True)):
        steps, inputs = make({}, hard=hard), draw({})
        y = steps(*inputs)
        y.backward(random_like(y))
        assert (steps.head.weight.grad is not None) is expected
        assert steps.dca.attention.value[0].weight.grad.abs().sum() > 0


def count(module):
    return sum(p.numel() for p in module.parameters())


class ASPP(nn.Module):
    """ASPP of the paper's Table 3, for its parameters."""

    def __init__(self, in_channels, channels):
        super().__init__()

        def cbr(width, kernel_size):
            convolution = nn.Conv2d(width, channels, kernel_size, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())

        kernels = [1, 3, 3, 3, 1]
        self.branches = nn.ModuleList(cbr(in_channels, kernel) for kernel in kernels)
        self.fusion = cbr(len(kernels) * channels, 3)


def test_published_parameter_counts():
    with torch.device("meta"):
        aspp = count(ASPP(2048, 512))
        assert aspp == 42_211_328
        assert count(DatasetContextAggregation(2048)) == 14_816_768
        assert aspp + count(DatasetContextAggregation(2048, 512, 512)) == 45_629_440
        once = DatasetContextAggregation(2048, 512, 512, within_attention=False)
        assert count(once) == 2_496_000
        released = DatasetContextAggregation(2048, 512, 512, kernel_size=3)
        assert aspp + count(released) == 62_406_656
        linear = DatasetContextAggregation(2048, projection_layers=1)
        assert count(linear) == 14_816_768 - 2 * (256 * 256 + 2 * 256)
        added = DatasetContextAggregation(2048, fusion="add")
        assert count(added) == 14_816_768 - (1024 * 512 * 9 + 2 * 512)
        weighted = DatasetContextAggregation(2048, fusion="weighted_add")
        assert count(weighted) == count(added) + 2 * 1024 + 2


def test_uses_the_operators(monkeypatch):
    calls = []
    module = __import__("ctxops.nn.dataset_context", fromlist=["dataset_context"])
    for name in ("category_context", "nonlocal_attention"):

        def operator(*inputs, name=name, **arguments):
            calls.append(name)
            return getattr(ctxops, name)(*inputs, **arguments)

        monkeypatch.setattr(module, name, operator)
    form = FORMS["attention"]
    make(form)(*draw(form))
    assert calls == ["category_context", "nonlocal_attention", "nonlocal_attention"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@fusions
@forms
def test_keeps_the_memory_format(form, fusion, layout, device):
    x, memory, *within = draw(form, (7, 9), device=device)
    y = make(form, device, fusion=fusion)(LAYOUTS[layout](x), memory, *map(LAYOUTS[layout], within))
    assert y.stride() == LAYOUTS[layout](y).stride()


@torch.no_grad()
@pytest.mark.parametrize(
    ("form", "fusion"),
    mostly_slow(
        {
            "alone-add": ("alone", "add"),
            "attention-concat": ("attention", "concat"),
            "concat-weighted_add": ("concat", "weighted_add"),
        },
    ),
)
def test_compiles_once_for_all_sizes(form, fusion, device):
    torch._dynamo.reset()
    form = FORMS[form]
    steps = make(form, device, fusion=fusion).eval()
    # The exports and the gradients trace what is behind dynamo's graph.
    compiled = torch.compile(steps, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((12, 10), (17, 9), (31, 33)):
            inputs = draw(form, size, 2, device)
            torch.testing.assert_close(compiled(*inputs), steps(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@forms
def test_compiled_gradients(form, device):
    torch._dynamo.reset()
    steps, inputs = make(form, device).eval(), draw(form, device=device)
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")
    leaves = [inputs[0].requires_grad_(), *steps.parameters()]
    expected = steps(*inputs)
    upstream = random_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, upstream)
    grads = torch.autograd.grad(compiled(*inputs), leaves, upstream)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


@chosen(lambda axes: [(0, 0)], values, form=FORMS, fusion=["concat", "add", "weighted_add"])
def test_exports_with_dynamic_sizes(form, fusion):
    steps, inputs = make(form, fusion=fusion).eval(), draw(form, (12, 10), 1)
    height, width = (torch.export.Dim(n, min=2, max=4096) for n in ("height", "width"))
    maps = {2: height, 3: width}
    shapes = [maps, None, *[(maps,) for _ in inputs[2:]]]
    program = torch.export.export(steps, inputs, dynamic_shapes=shapes)
    for size in ((17, 23), (2, 40)):
        inputs = draw(form, size, 1)
        y, expected = program.module()(*inputs), steps(*inputs)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@fusions
@forms
def test_autocast(form, fusion, device):
    steps, inputs = make(form, device, fusion=fusion).eval(), draw(form, device=device)
    expected = steps(*inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = steps(*inputs)
    assert (y - expected).norm() < 0.05 * expected.norm()


@fusions
@forms
def test_bfloat16_with_a_float32_memory(form, fusion, device):
    steps, (x, memory, *within) = (
        make(form, device, fusion=fusion).eval(),
        draw(form, device=device),
    )
    expected = steps(x, memory, *within)
    y = steps.bfloat16()(x.bfloat16(), memory, *(w.bfloat16() for w in within))
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.05 * expected.norm()


def test_memory_may_be_updated_before_the_backward():
    steps, (x, memory) = make({}), draw({})
    upstream = random_like(steps(x, memory))

    def gradients(update):
        y = steps.eval()(x, memory)
        if update:
            memory.add_(1)
        return torch.autograd.grad(y, list(steps.parameters()), upstream)

    expected = gradients(update=False)
    for a, b in zip(gradients(update=True), expected, strict=True):
        assert torch.equal(a, b)


def test_state_dict_round_trip():
    form = FORMS["attention"]
    steps, other, inputs = make(form).eval(), make(form).eval(), draw(form)
    assert not torch.allclose(steps(*inputs), other(*inputs))
    other.load_state_dict(steps.state_dict())
    torch.testing.assert_close(steps(*inputs), other(*inputs))


def test_takes_another_norm():
    form = FORMS["attention"]
    steps = make(form, norm_layer=lambda channels: nn.GroupNorm(1, channels))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in steps.modules())
    assert steps(*draw(form)).shape == (3, 6, 5, 4)


def test_says_what_it_is():
    text = repr(DatasetContextAggregation(8, 6, 4, fusion="add", hard=True))
    assert "8, channels=6, within_channels=4, within_attention=True, projection_layers=2" in text
    assert "kernel_size=1, fusion='add', hard=True" in text


def dca_call(*changes, **arguments):
    r, logits, memory = torch.ones(2, 6, 3, 4), torch.ones(2, 5, 3, 4), torch.ones(5, 6)
    inputs = {"r": r, "logits": logits, "memory": memory, **dict(changes)}
    return lambda: DatasetContextAggregation(8, 6, **arguments)(**inputs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DatasetContextAggregation(0), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: DatasetContextAggregation(8, 1), ValueError, "channels must be at least 2, got 1"),
        (
            lambda: DatasetContextAggregation(8, 6, -1),
            ValueError,
            "within_channels must be at least 1, got -1",
        ),
        (
            lambda: DatasetContextAggregation(8, 6, projection_layers=3),
            ValueError,
            r"projection_layers must be one of \(1, 2\), got 3",
        ),
        (
            lambda: DatasetContextAggregation(8, 6, kernel_size=2),
            ValueError,
            "kernel_size must be odd and at least 1, got 2",
        ),
        (
            lambda: DatasetContextAggregation(8, 6, fusion="mul"),
            ValueError,
            r"fusion must be one of \('concat', 'add', 'weighted_add'\), got 'mul'",
        ),
        (
            lambda: DatasetContextAggregation(8, 6, 7, fusion="add", within_attention=False),
            ValueError,
            "fusion='add' with within_attention=False needs within_channels equal to channels, 6, "
            "got 7",
        ),
        (
            lambda: DatasetContextAggregation(8, 6).reduce(torch.ones(1, 7, 2, 2)),
            ValueError,
            r"x must have shape \(B, 8, H, W\), got \(1, 7, 2, 2\)",
        ),
        (
            dca_call(("r", torch.ones(2, 8, 3, 4))),
            ValueError,
            r"r must have shape \(B, 6, H, W\), got \(2, 8, 3, 4\)",
        ),
        (
            dca_call(("logits", torch.ones(2, 5, 3, 3))),
            ValueError,
            r"logits must have the height and width of r, \(3, 4\), got \(3, 3\)",
        ),
        (
            dca_call(("logits", torch.ones(1, 5, 3, 4))),
            ValueError,
            "logits must have the batch and device of r, 2 on cpu, got 1 on cpu",
        ),
        (
            dca_call(("logits", torch.ones(2, 5, 3, 4).double())),
            TypeError,
            r"logits must have the dtype of r, torch\.float32, got torch\.float64",
        ),
        (dca_call(("logits", None)), TypeError, r"logits must be a torch\.Tensor, got NoneType"),
        (
            dca_call(("memory", torch.ones(5, 8))),
            ValueError,
            r"memory must have shape \(K, channels\) = \(5, 6\), got \(5, 8\)",
        ),
        (
            dca_call(("memory", torch.ones(4, 6))),
            ValueError,
            r"memory must have shape \(K, channels\) = \(5, 6\), got \(4, 6\)",
        ),
        (
            dca_call(("within", torch.ones(2, 6, 3, 4))),
            TypeError,
            "within must be None with within_channels=0, got a map",
        ),
        (
            dca_call(within_channels=6),
            TypeError,
            r"within must be a torch\.Tensor, got NoneType",
        ),
        (
            dca_call(("within", torch.ones(2, 6, 6, 8)), within_channels=6),
            ValueError,
            r"within must have the height and width of r, \(3, 4\), got \(6, 8\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def consistency_inputs(classes=5, channels=6, device="cpu"):
    head = nn.Sequential(
        nn.Conv2d(channels, 8, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, classes, 1),
    )
    memory = torch.randn(classes, channels, device=device)
    initialized = torch.arange(classes, device=device) % 3 != 1
    return randomise(head).to(device), memory, initialized


def consistency_formula(head, memory, initialized):
    """Eq. 15 and 17, class by class."""
    rows = torch.stack([m if i else 0 * m for m, i in zip(memory, initialized, strict=True)])
    first, norm, _, last = head
    hidden = activate((rows @ first.weight.flatten(1).T)[:, :, None, None], norm).flatten(1)
    logits = hidden @ last.weight.flatten(1).T + last.bias
    losses = [
        logits[k].exp().sum().log() - logits[k, k] for k in range(len(memory)) if initialized[k]
    ]
    return sum(losses) / len(losses)


@modes
@pytest.mark.parametrize("freeze", [True, False])
def test_consistency_is_its_formula(freeze, training):
    head, memory, initialized = consistency_inputs()
    head, memory = head.double().train(training), memory.double().requires_grad_()
    expected = consistency_formula(head, memory, initialized)
    loss = representation_consistency_loss(head, memory, initialized, freeze_statistics=freeze)
    torch.testing.assert_close(loss, expected)
    parameters = list(head.parameters())
    grads = torch.autograd.grad(loss, [*parameters, memory], allow_unused=True)
    assert grads[-1] is None
    expected_grads = torch.autograd.grad(expected, parameters)
    for a, b in zip(grads[:-1], expected_grads, strict=True):
        torch.testing.assert_close(a, b)


@modes
@pytest.mark.parametrize("freeze", [True, False])
def test_consistency_and_running_statistics(freeze, training):
    head, memory, initialized = consistency_inputs()
    head.train(training)
    before = {name: x.clone() for name, x in head.named_buffers()}
    representation_consistency_loss(head, memory, initialized, freeze_statistics=freeze)
    for name, x in head.named_buffers():
        assert torch.equal(x, before[name]) is (freeze or not training), name
    assert head[1].track_running_stats
    # The next pixels count again.
    head.train()(torch.randn(2, 6, 3, 3))
    assert not torch.equal(head[1].running_mean, before["1.running_mean"])


def test_frozen_statistics_are_released_when_the_head_raises():
    head, memory, initialized = consistency_inputs()
    head.append(nn.Conv2d(7, 7, 1))
    head.append(nn.BatchNorm2d(7, track_running_stats=False))
    with pytest.raises(RuntimeError, match="expected input"):
        representation_consistency_loss(head, memory, initialized, freeze_statistics=True)
    assert head[1].track_running_stats
    assert not head[5].track_running_stats


def test_rows_without_value_count_for_nothing():
    head, memory, initialized = consistency_inputs()
    expected = representation_consistency_loss(head, memory, initialized)
    memory[~initialized] = torch.nan
    loss = representation_consistency_loss(head, memory, initialized)
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_no_row_with_value():
    head, memory, initialized = consistency_inputs()
    loss = representation_consistency_loss(head, memory, torch.zeros_like(initialized))
    assert loss.item() == 0
    loss.backward()
    assert all(not p.grad.any() for p in head.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [True, False])
def test_consistency_compiles_for_any_rows(freeze, device):
    torch._dynamo.reset()
    head, memory, initialized = consistency_inputs(device=device)

    def loss_of(initialized):
        return representation_consistency_loss(head, memory, initialized, freeze_statistics=freeze)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (initialized, ~initialized, torch.zeros_like(initialized)):
            before = head[1].running_mean.clone()
            loss = compiled(rows)
            assert torch.equal(head[1].running_mean, before) is freeze
            torch.testing.assert_close(loss, loss_of(rows))
            grads = torch.autograd.grad(loss, list(head.parameters()))
            expected = torch.autograd.grad(loss_of(rows), list(head.parameters()))
            torch.testing.assert_close(grads, expected)
            head[1].track_running_stats = True


def test_consistency_in_half_types(device):
    head, memory, initialized = consistency_inputs(device=device)
    expected = representation_consistency_loss(head, memory, initialized)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = representation_consistency_loss(head, memory, initialized)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)
    loss = representation_consistency_loss(head.bfloat16(), memory, initialized)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)


def consistency_call(*changes):
    inputs = dict(zip(("head", "memory", "initialized"), consistency_inputs(), strict=True))
    inputs.update(changes)
    return lambda: representation_consistency_loss(**inputs)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            consistency_call(("head", torch.relu)),
            TypeError,
            r"head must be a torch\.nn\.Module, got builtin_function_or_method",
        ),
        (
            consistency_call(("memory", torch.ones(5))),
            ValueError,
            r"memory must have shape \(K, C\) = \(any, any\), got \(5,\)",
        ),
        (
            consistency_call(("initialized", torch.ones(5))),
            TypeError,
            r"initialized must be a bool tensor, got torch\.float32",
        ),
        (
            consistency_call(("initialized", [True] * 5)),
            TypeError,
            "initialized must be a bool tensor, got list",
        ),
        (
            consistency_call(("initialized", torch.ones(4).bool())),
            ValueError,
            r"initialized must have shape \(K,\) = \(5,\) on cpu, got \(4,\) on cpu",
        ),
        (
            consistency_call(("head", nn.Conv2d(6, 4, 1))),
            ValueError,
            r"head must return \(K, K, 1, 1\) = \(5, 5, 1, 1\) .*, got \(5, 4, 1, 1\)",
        ),
    ],
)
def test_bad_consistency_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
