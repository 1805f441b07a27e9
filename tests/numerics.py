# SPDX-License-Identifier: Apache-2.0
"""How close is close enough, and the inputs that operators are tried on."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

# Ways to lay out a map (B, C, H, W) in memory; the values stay.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channel_slice": lambda x: torch.cat([x, x + 1, x + 2], dim=1)[:, : x.shape[1]],
    "channels_last_slice": lambda x: torch.cat([x + 1, x], dim=1).contiguous(
        memory_format=torch.channels_last
    )[:, x.shape[1] :],
    "every_other_column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(x.shape),
}


# A tensor of fewer elements may come out of plain torch nearly exact by luck, so that its rounding
# is measured so many times more, each with another upstream gradient.
FEW = 16
MORE_DRAWS = 8


def assert_close(
    actual: Tensor, same_dtype: Tensor, exact: Tensor, what: str = "output", rounding: float = 0.0
) -> None:
    """``actual`` errs at most four times as much as plain torch does in the same dtype.

    ``exact`` is the float64 reference, ``same_dtype`` the reference in the dtype of ``actual``;
    ``rounding`` is the largest error that it made in comparable cases. To the bounds, on the
    largest error, on the relative L2 error and on the angle, come four units in the last place of
    the largest value; for float64, whose oracle rounds as much as what it judges, 64. NaN and inf
    must stand in the same places.
    """
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert actual.dtype == same_dtype.dtype, f"{what}: {actual.dtype}, not {same_dtype.dtype}"
    ulps = (64 if actual.dtype == torch.float64 else 4) * torch.finfo(actual.dtype).eps
    actual, same_dtype, exact = (x.detach().double().cpu() for x in (actual, same_dtype, exact))
    finite = same_dtype.isfinite()
    assert torch.equal(actual.isnan(), same_dtype.isnan()), f"{what}: NaN in other places"
    assert torch.equal(actual[~finite].nan_to_num(), same_dtype[~finite].nan_to_num()), (
        f"{what}: inf in other places"
    )
    actual, same_dtype, exact = actual[finite], same_dtype[finite], exact[finite]
    if exact.numel() == 0:
        return
    largest = exact.abs().max()
    rounded = (same_dtype - exact).abs().max().clamp(min=rounding)
    error, bound = (actual - exact).abs().max(), 4 * rounded + ulps * largest
    assert error <= bound, f"{what}: error {error:.3e}, bound {bound:.3e}, largest {largest:.3e}"
    norm = exact.norm()
    rounded = (same_dtype - exact).norm().clamp(min=rounding)
    error, bound = (actual - exact).norm(), 4 * rounded + ulps * norm
    assert error <= bound, f"{what}: L2 error {error:.3e}, bound {bound:.3e}, norm {norm:.3e}"
    if norm > 0:
        # 1 - cosine; computed from the cosine itself, it would be the rounding of long sums.
        turned = (actual / actual.norm() - exact / norm).norm() ** 2 / 2
        assert turned <= 2 * (bound / norm) ** 2, f"{what}: 1 - cosine {turned:.3e}"


def random_like(x: Tensor) -> Tensor:
    """Standard normal values in the layout of ``x``: an all-ones gradient hides transpositions."""
    return torch.randn(x.shape, dtype=torch.float64).to(x)


def check_operator(
    operator: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    constants: Collection[int] = (),
) -> None:
    """Values and gradients of ``operator(*inputs)`` against its reference in float64.

    ``constants`` are the positions of the inputs that have no gradient.
    """

    def run(function: Callable[..., Tensor], convert: Callable[[Tensor], Tensor]):
        tensors = [None if x is None else convert(x).detach() for x in inputs]
        leaves = [x for i, x in enumerate(tensors) if x is not None and i not in constants]
        for x in leaves:
            x.requires_grad_()
        return function(*tensors), leaves

    output, leaves = run(operator, lambda x: x)
    same_dtype, same_leaves = run(reference, lambda x: x)
    exact, exact_leaves = run(reference, lambda x: x.double())
    assert_close(output, same_dtype, exact)
    if not leaves:
        return
    few = [i for i, x in enumerate(leaves) if 0 < x.numel() < FEW]
    rounding = dict.fromkeys(range(len(leaves)), 0.0)
    for _ in range(MORE_DRAWS if few else 0):
        upstream = random_like(same_dtype)
        draws = (
            torch.autograd.grad(y, [x[i] for i in few], upstream.to(y), retain_graph=True)
            for y, x in ((same_dtype, same_leaves), (exact, exact_leaves))
        )
        for i, plain, oracle in zip(few, *draws, strict=True):
            error = (plain.double() - oracle).nan_to_num(0, 0, 0).abs().max().item()
            rounding[i] = max(rounding[i], error)
    upstream = random_like(exact)
    gradients = zip(
        torch.autograd.grad(output, leaves, upstream.to(output)),
        torch.autograd.grad(same_dtype, same_leaves, upstream.to(same_dtype)),
        # The upstream gradient that the operator saw, rounding included.
        torch.autograd.grad(exact, exact_leaves, upstream.to(output).double()),
        strict=True,
    )
    for index, (actual, plain, oracle) in enumerate(gradients):
        assert_close(actual, plain, oracle, f"gradient of input {index}", rounding[index])
