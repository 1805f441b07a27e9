"""NATTEN's names compute what its papers define, position by position."""

import sys
import types

import pytest
import torch

import ctxops
from ctxops.compat import natten

CASES = [((7, 9), (3, 3), (1, 1)), ((11, 8), (5, 3), (2, 1)), ((10, 13), (3, 5), (3, 2))]


def first_neighbour(position, extent, kernel, dilation):
    """The window slides so that all of its positions are inside, in steps of the dilation."""
    start = position - kernel // 2 * dilation
    while start < 0:
        start += dilation
    while start + (kernel - 1) * dilation >= extent:
        start -= dilation
    return start


def neighbours(size, kernel, dilation):
    """(h, w, n), the neighbour's h and w, and the index of its bias."""
    for h in range(size[0]):
        for w in range(size[1]):
            top = first_neighbour(h, size[0], kernel[0], dilation[0])
            left = first_neighbour(w, size[1], kernel[1], dilation[1])
            for n in range(kernel[0] * kernel[1]):
                y = top + n // kernel[1] * dilation[0]
                x = left + n % kernel[1] * dilation[1]
                bias = (
                    (y - h) // dilation[0] + kernel[0] - 1,
                    (x - w) // dilation[1] + kernel[1] - 1,
                )
                yield h, w, n, y, x, bias


def inputs(size, kernel, heads=2, dim=3, dtype=torch.float64):
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, heads, *size, dim, dtype=dtype).requires_grad_().unbind()
    value = torch.randn(2, heads, *size, dim + 1, dtype=dtype, requires_grad=True)
    bias = torch.randn(heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1, dtype=dtype, requires_grad=True)
    return query, key, value, bias


@pytest.mark.parametrize(("size", "kernel", "dilation"), CASES)
def test_logits_and_sums(size, kernel, dilation):
    query, key, value, bias = inputs(size, kernel)
    logits = natten.na2d_qk(query, key, kernel, dilation, rpb=bias)
    weights = logits.softmax(-1)
    output = natten.na2d_av(weights, value, kernel, dilation)
    expected = torch.zeros_like(logits)
    summed = torch.zeros_like(output)
    for h, w, n, y, x, (i, j) in neighbours(size, kernel, dilation):
        product = (query[:, :, h, w] * key[:, :, y, x]).sum(-1)
        expected[:, :, h, w, n] = product + bias[:, i, j]
        summed[:, :, h, w] += weights[:, :, h, w, n, None] * value[:, :, y, x]
    torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output, summed, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(logits)
    ours = torch.autograd.grad(logits, (bias,), grad)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (bias,), grad)[0])


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(("size", "kernel", "dilation"), CASES)
def test_attention_is_its_parts(size, kernel, dilation, biased):
    query, key, value, bias = inputs(size, kernel)
    bias = bias if biased else None
    logits = natten.natten2dqkrpb(query * 0.3, key, bias, kernel, dilation)
    expected = natten.natten2dav(logits.softmax(-1), value, kernel, dilation)
    maps = [x.permute(0, 2, 3, 1, 4) for x in (query, key, value)]
    output = natten.na2d(*maps, kernel, dilation, rpb=bias, scale=0.3)
    assert output.shape == maps[2].shape
    torch.testing.assert_close(output, expected.permute(0, 2, 3, 1, 4))
    grad = torch.randn_like(output)
    leaves = [query, key, value, *([bias] if biased else [])]
    ours = torch.autograd.grad(output, leaves, grad)
    theirs = torch.autograd.grad(expected, leaves, grad.permute(0, 3, 1, 2, 4))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dilation", [1, 2])
def test_one_axis(dilation):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 11, 4, dtype=torch.float64).unbind()
    bias = torch.randn(2, 9, dtype=torch.float64)
    logits = natten.na1d_qk(query, key, 5, dilation, rpb=bias)
    assert torch.equal(logits, natten.natten1dqkrpb(query, key, bias, 5, dilation))
    for position in range(11):
        first = first_neighbour(position, 11, 5, dilation)
        for n in range(5):
            other = first + n * dilation
            product = (query[:, :, position] * key[:, :, other]).sum(-1)
            expected = product + bias[:, (other - position) // dilation + 4]
            torch.testing.assert_close(logits[:, :, position, n], expected)
    output = natten.natten1dav((logits / 2).softmax(-1), value, 5, dilation)
    assert torch.equal(output, natten.na1d_av((logits / 2).softmax(-1), value, 5, dilation))
    maps = [x.transpose(1, 2) for x in (query, key, value)]
    torch.testing.assert_close(
        natten.na1d(*maps, 5, dilation, rpb=bias / 2, scale=0.5).transpose(1, 2), output
    )
    plain = natten.na1d_qk(query / 2, key, (5,), dilation).softmax(-1)
    torch.testing.assert_close(
        natten.na1d(*maps, 5, dilation).transpose(1, 2),
        natten.na1d_av(plain, value, 5, (dilation,)),
    )


def test_fused_attention_copies_no_map():
    """NATTEN's layout is channels_last."""
    maps = torch.randn(3, 1, 8, 8, 2, 4).unbind()
    with ctxops.use_reference():
        expected = natten.na2d(*maps, 3)
    output = natten.na2d(*maps, 3)
    torch.testing.assert_close(output, expected)
    assert output.is_contiguous()


MAPS = torch.zeros(3, 1, 8, 8, 2, 4).unbind()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: natten.na2d(*MAPS, 9), ValueError, "border='shift' needs kernel_size"),
        (lambda: natten.na2d(*MAPS, 3, 1, True), NotImplementedError, "is_causal must be False"),
        (
            lambda: natten.na2d(MAPS[0][0], *MAPS[1:], 3),
            ValueError,
            r"query must have shape \(B, H",
        ),
        (lambda: natten.na2d(MAPS[0], MAPS[1][:, :4], MAPS[2], 3), ValueError, "key must have"),
        (lambda: natten.na2d(*MAPS, 3, rpb=torch.zeros(2, 3, 3)), ValueError, r"rpb must have .*5"),
        (lambda: natten.na2d_qk(*MAPS[:2], 3, 1, MAPS[0]), NotImplementedError, "additional_keys"),
        (lambda: natten.na2d_qk(*MAPS[:2], 3, 5), ValueError, "H of at least 15, got 8"),
        (lambda: natten.na2d_av(*MAPS[:2], 3), ValueError, r"attn must have shape .*kh \* kw"),
        (lambda: natten.na1d(*MAPS, 3), ValueError, r"query must have shape \(B, L, heads, D\)"),
        (
            lambda: natten.na1d(*(x[0] for x in MAPS), (3, 3)),
            ValueError,
            "kernel_size must be one integer for one axis",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
def test_dinat(monkeypatch):
    """The Dinat of transformers, which asks for NATTEN's old names, runs forward and backward."""
    transformers = pytest.importorskip("transformers")
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version >= (4, 54):
        pytest.skip("this transformers gives NATTEN maps of another shape: its Dinat fails")
    package = types.ModuleType("natten")
    package.__version__, package.functional = "0.17.5", natten
    package.__spec__ = types.SimpleNamespace(name="natten", origin=None)
    monkeypatch.setitem(sys.modules, "natten", package)
    monkeypatch.setitem(sys.modules, "natten.functional", natten)
    modeling = pytest.importorskip("transformers.models.dinat.modeling_dinat")
    monkeypatch.setattr(modeling, "natten2dqkrpb", natten.natten2dqkrpb)
    monkeypatch.setattr(modeling, "natten2dav", natten.natten2dav)
    monkeypatch.setattr(modeling, "requires_backends", lambda *arguments: None)
    config = transformers.DinatConfig(
        embed_dim=8, depths=[1, 2], num_heads=[1, 2], kernel_size=3, dilations=[[1], [1, 2]]
    )
    network = modeling.DinatModel(config).double().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    image = torch.randn(1, 3, 32, 40, dtype=torch.float64, requires_grad=True)

    def run():
        output = network(image).last_hidden_state
        return output, *torch.autograd.grad(output.square().sum(), [image, *network.parameters()])

    def by_positions(query, key, rpb, kernel, dilation):
        logits = query.new_zeros(*query.shape[:4], kernel * kernel)
        sides = (kernel, kernel), (dilation, dilation)
        for h, w, n, y, x, (i, j) in neighbours(query.shape[2:4], *sides):
            product = (query[:, :, h, w] * key[:, :, y, x]).sum(-1)
            logits[:, :, h, w, n] = product + rpb[:, i, j]
        return logits

    def sum_by_positions(weights, value, kernel, dilation):
        output = torch.zeros_like(value)
        sides = (kernel, kernel), (dilation, dilation)
        for h, w, n, y, x, _ in neighbours(value.shape[2:4], *sides):
            output[:, :, h, w] += weights[:, :, h, w, n, None] * value[:, :, y, x]
        return output

    ours = run()
    monkeypatch.setattr(modeling, "natten2dqkrpb", by_positions)
    monkeypatch.setattr(modeling, "natten2dav", sum_by_positions)
    torch.testing.assert_close(ours, run())
