# SPDX-License-Identifier: Apache-2.0
r"""What every operator promises, written once; its test file brings the cases and the formula.

    class TestMyOperator(OperatorContract):
        name = "my_operator"
        cases = [(1, 1, 1, 1), (2, 3, 7, 11)]
        drawn = st.tuples(st.tuples(*[st.integers(1, 20)] * 4), st.just("one"))
        valid = {"input": torch.ones(1, 2, 3, 3)}
        errors = [({"input": torch.ones(3)}, ValueError, r"input must have shape \(B, C, H, W\)")]
        products = [({}, {"my_operator": 36, "my_operator_backward": 72})]

        def case(self, *shape):
            return shape

        def make(self, case, mode, **options):
            return [torch.randn(case, **options)]

        def functions(self, case, mode):
            return ctxops.my_operator, reference

        def opchecks(self, inputs, case, mode):
            (x,) = inputs
            yield "my_operator", (x,)
            yield "my_operator", (x.clone().requires_grad_(),)
            yield "my_operator_backward", (torch.randn_like(x), x)

pytest then runs every test of :class:`OperatorContract` on it. A test takes what it varies as
arguments, and the names of the arguments say which values they have (:meth:`_axes`). The quick
suite runs combinations with every pair of values, ``--all`` with every triple.
"""

import contextlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import ctxops
from covering import each_value_once, first, none, product
from ctxops import _native, _operator
from modules import flop_counter
from numerics import DTYPES, LAYOUTS, check_operator

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Every loop of every kernel file: as tuples, so that none of them is left to `--all`.
KERNELS = {
    f"{isa}-{layout}-{str(dtype).removeprefix('torch.')}": (isa, layout, dtype)
    for isa, layout, dtype in itertools.product(_native.INSTRUCTION_SETS, FORMATS, DTYPES)
}
# The tests of the contract that are about the extension's kernels, and those that take gradients.
OF_KERNELS = ("test_every_instruction_set", "test_graph_capture_on_a_side_stream")
OF_GRADIENTS = (
    "test_gradcheck",
    "test_gradient_of_each_input_alone",
    "test_saved_tensors_may_come_back_in_another_layout",
    "test_checkpointing",
    "test_memory_format_of_the_gradients",
    "test_upstream_gradients_of_any_layout",
    "test_second_derivatives",
    "test_forward_mode",
    "test_backward_under_autocast",
)


def _with_gaps(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _with_offset(x: Tensor) -> Tensor:
    """At an address that is a multiple of the element alone."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


class TensorOfTools(Tensor):
    """As others make them: ``new_empty`` takes a sequence alone."""

    def new_empty(self, size, dtype=None, device=None, requires_grad=False):
        return super().new_empty(
            tuple(size), dtype=dtype, device=device, requires_grad=requires_grad
        )


# What hooks on saved tensors, which offload or compress them, may do to one.
SAVED = {
    "dense": (torch.Tensor.contiguous, lambda x: x),
    "channels_last": (_channels_last, lambda x: x),
    "gaps": (_with_gaps, lambda x: x),
    "offset": (_with_offset, lambda x: x),
    "copied": (lambda x: (x.device, x.to("cpu", copy=True)), lambda kept: kept[1].to(kept[0])),
}


def quick(choice: Callable) -> Callable[[Callable], Callable]:
    """Which combinations of its arguments a test of the contract has in the quick suite."""

    def mark(test):
        test.choice = choice
        return test

    return mark


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def joined(function: Callable) -> Callable[..., Tensor]:
    """``function`` with all of its outputs as one vector."""

    def call(*inputs):
        outputs = function(*inputs)
        return outputs if isinstance(outputs, Tensor) else torch.cat([y.flatten() for y in outputs])

    return call


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor of three to five dimensions in the layout of a map."""
    if x.dim() == 3:
        return LAYOUTS[layout](x[..., None])[..., 0]
    if x.dim() == 5:
        return LAYOUTS[layout](x.flatten(1, 2)).unflatten(1, x.shape[1:3])
    return LAYOUTS[layout](x)


def upstream(outputs: Sequence[Tensor], layout: str | None = None) -> list[Tensor]:
    """The same random gradients on every call, in the outputs' layouts unless another is named."""
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    gradients = [g.to(y.device, y.dtype) for g, y in zip(gradients, outputs, strict=True)]
    return [g if layout is None else laid_out(g, layout) for g in gradients]


def run(function: Callable, inputs: Sequence[Tensor | None], layout: str | None = None) -> list:
    """Outputs, and the gradients of the inputs that want one."""
    outputs = as_tuple(function(*inputs))
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    if not leaves:
        return list(outputs)
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream(outputs, layout))]


def converted(inputs: Sequence[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [x if x is None or not x.is_floating_point() else x.detach().to(dtype) for x in inputs]


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """To the last bit."""
    assert_close(list(actual), list(expected), rtol=0, atol=0)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Module(torch.nn.Module):
    """A function for ``torch.export``."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


class OperatorContract:
    # As messages and torch.ops name it, and the folder of its op.py.
    name: str
    stem: str = ""  # the name, unless the folder has another
    # The shapes, in a form of the operator's own.
    cases: Sequence[Any]
    # What else chooses another path: a border, a flag. A dictionary's keys name its values.
    modes: Sequence[Any] | dict[str, Any] = ("one",)
    # Has it C++ kernels?
    native: bool = True
    # Under autocast: "down" casts to its dtype, "keep" computes as outside.
    autocast: str = "keep"
    # "first": a second derivative and forward mode raise; "all": they are torch's own.
    derivatives: str = "first"
    second_derivative_error: tuple[type[Exception], str] | None = None
    # The inputs, by position, that have no gradient.
    constants: Sequence[int] = ()
    # Arguments of a legal call, and rows (what to replace in them, error, message).
    valid: dict[str, Any]
    errors: Sequence[tuple[dict[str, Any], type[Exception], str]]
    # Rows (what to replace in the legal call, what its products count by registered operator).
    products: Sequence[tuple[dict[str, Any], dict[str, int]]] = ()
    # Hypothesis draws (case, mode) from it.
    drawn: st.SearchStrategy
    # Tests of the contract that do not fit, and why not.
    without: dict[str, str] = {}  # noqa: RUF012

    def case(self, batch: int, channels: int, height: int, width: int) -> Any:
        """A case of about that size."""
        raise NotImplementedError

    def make(self, case: Any, mode: Any, **options: Any) -> list[Tensor | None]:
        """Contiguous inputs on ``device`` and in ``dtype``; the contract lays out the maps."""
        raise NotImplementedError

    def functions(self, case: Any, mode: Any) -> tuple[Callable, Callable]:
        """The operator and its reference, as functions of the inputs."""
        raise NotImplementedError

    def call(self, **arguments: Any) -> Any:
        """The public function."""
        return getattr(ctxops, self.name)(**arguments)

    @classmethod
    def arguments(cls, device="cpu", dtype=torch.float32, grad=False, **replaced: Any) -> dict:
        """Those of the legal call, in copies that want a gradient where asked."""

        def convert(x):
            if isinstance(x, list):
                return [convert(y) for y in x]
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x.to(device) if isinstance(x, Tensor) else x
            return x.to(device, dtype, copy=True).requires_grad_(grad)

        return {name: convert(x) for name, x in (cls.valid | replaced).items()}

    def opchecks(self, inputs: list, case: Any, mode: Any) -> Iterator[tuple[str, tuple]]:
        """Names under ``torch.ops.ctxops`` and arguments, of the backward too."""
        raise NotImplementedError

    def check(self, inputs: Sequence[Tensor | None], case: Any, mode: Any) -> None:
        """Values and gradients against the reference in float64."""
        operator, reference = map(joined, self.functions(case, mode))
        check_operator(operator, reference, inputs, self.constants)

    # The machinery.

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        without = {} if cls.native else dict.fromkeys(OF_KERNELS, "it has no C++ kernels")
        for test, reason in (without | cls.without).items():
            assert hasattr(OperatorContract, test), f"the contract has no {test}"
            setattr(cls, test, _skipped(test, reason))

    def _axes(self) -> dict[str, Sequence | dict]:
        return {
            "case": self.cases,
            "layout": list(FORMATS),
            "strides": list(LAYOUTS),
            "opcheck_layout": ["contiguous", "channels_last", "transposed"],
            "kernel": KERNELS,
            "dtype": DTYPES,
            "narrow_or_not": [torch.float32, torch.bfloat16],
            "mode": self.modes,
            "bad": {f"{i}-{'-'.join(row[0])}": row for i, row in enumerate(self.errors)},
        }

    def pytest_generate_tests(self, metafunc) -> None:
        axes = {n: axis for n, axis in self._axes().items() if n in metafunc.fixturenames}
        if not axes:
            return
        for name, axis in axes.items():
            assert len(axis), f"{type(self).__name__} has nothing for the argument {name}"
        choice = getattr(metafunc.function, "choice", product)
        metafunc.parametrize(*choice(**axes).args)

    def _inputs(self, case, mode, layout="contiguous", dtype=torch.float32, device="cpu") -> list:
        inputs = self.make(case, mode, dtype=dtype, device=device)
        return [LAYOUTS[layout](x) if _is_map(x) else x for x in inputs]

    def _variables(self, inputs: Sequence[Tensor | None]) -> list[int]:
        """The positions of the inputs that have a gradient."""
        return [i for i, x in enumerate(inputs) if x is not None and i not in self.constants]

    def _leaves(self, *arguments, **options) -> list:
        inputs = self._inputs(*arguments, **options)
        for i in self._variables(inputs):
            inputs[i].requires_grad_()
        return inputs

    # Values.

    def test_values_and_gradients(self, case, layout, dtype, mode, device):
        self.check(self._inputs(case, mode, layout, dtype, device), case, mode)

    def test_strided_inputs(self, strides, narrow_or_not, mode, device):
        case = self.case(2, 20, 9, 14)
        self.check(self._inputs(case, mode, strides, narrow_or_not, device), case, mode)

    def test_maps_of_different_layouts(self, strides, mode, device):
        case = self.case(2, 20, 7, 8)
        inputs = self.make(case, mode, dtype=torch.float32, device=device)
        layouts = itertools.islice(itertools.cycle(LAYOUTS), list(LAYOUTS).index(strides), None)
        inputs = [LAYOUTS[next(layouts)](x) if _is_map(x) else x for x in inputs]
        self.check(inputs, case, mode)

    def test_every_instruction_set(self, kernel, mode, monkeypatch):
        isa, layout, dtype = kernel
        kernels = getattr(_native.extension, isa, None)
        if kernels is None:
            pytest.skip(f"this processor has no {isa}")
        monkeypatch.setattr(_native, "cpu", kernels)
        case = self.case(2, 38, 19, 23)
        self.check(self._inputs(case, mode, layout, dtype), case, mode)

    # One body, many classes: what it draws is the class's own.
    @settings(suppress_health_check=[HealthCheck.differing_executors])
    @given(data=st.data(), layout=st.sampled_from(list(LAYOUTS)))
    def test_drawn_shapes(self, data, layout):
        case, mode = data.draw(self.drawn)
        torch.manual_seed(0)  # a failure is to be found again
        self.check(self._inputs(case, mode, layout), case, mode)

    def test_batch_of_zero(self, layout, mode, device):
        case = self.case(0, 4, 5, 7)
        operator, reference = self.functions(case, mode)
        leaves = self._leaves(case, mode, layout, device=device)
        # Outputs and gradients: sums over nothing are zero.
        assert_close(run(operator, leaves), run(reference, leaves), check_stride=False)

    # Derivatives.

    @quick(each_value_once)
    def test_gradcheck(self, layout, mode, device):
        case = self.case(2, 2, 4, 3)
        operator, _ = self.functions(case, mode)
        leaves = self._leaves(case, mode, layout, torch.float64, device)
        forward = self.derivatives == "all"
        assert torch.autograd.gradcheck(operator, leaves, check_forward_ad=forward)

    def test_gradient_of_each_input_alone(self, mode, device):
        case = self.case(2, 4, 6, 5)
        operator, _ = self.functions(case, mode)
        leaves = self._leaves(case, mode, device=device)
        count = len(as_tuple(operator(*leaves)))
        expected = run(operator, leaves)[count:]
        for wanted, gradient in zip(self._variables(leaves), expected, strict=True):
            inputs = [None if x is None else x.detach() for x in leaves]
            inputs[wanted].requires_grad_()
            assert_close(run(operator, inputs)[count:], [gradient])

    def test_upstream_gradients_of_any_layout(self, strides, layout, device):
        mode = _first(self.modes)
        case = self.case(2, 6, 7, 8)
        operator, reference = self.functions(case, mode)
        leaves = self._leaves(case, mode, layout, device=device)
        expected = run(reference, leaves, strides)
        assert_close(run(operator, leaves, strides), expected, check_stride=False)

    def test_saved_tensors_may_come_back_in_another_layout(self, layout, mode, device):
        case = self.case(2, 4, 5, 6)
        operator, _ = self.functions(case, mode)
        leaves = self._leaves(case, mode, layout, device=device)
        expected = run(operator, leaves)

        for name, hooks in SAVED.items():
            with torch.autograd.graph.saved_tensors_hooks(*hooks):
                outputs = as_tuple(operator(*leaves))
            wanted = [leaves[i] for i in self._variables(leaves)]
            gradients = torch.autograd.grad(outputs, wanted, upstream(outputs))
            # In another layout a kernel may sum in another order, and torch's products always may.
            exact = self.native and layout == "contiguous" and name != "channels_last"
            (assert_equal if exact else assert_close)([*outputs, *gradients], expected)

    def test_checkpointing(self, layout, mode, device):
        case = self.case(2, 4, 5, 6)
        operator, _ = self.functions(case, mode)
        leaves = self._leaves(case, mode, layout, device=device)
        expected = run(operator, leaves)
        wanted = [leaves[i] for i in self._variables(leaves)]
        for use_reentrant in (False, True):
            for leaf in wanted:
                leaf.grad = None
            outputs = as_tuple(checkpoint(operator, *leaves, use_reentrant=use_reentrant))
            torch.autograd.backward(outputs, upstream(outputs))
            assert_equal([*outputs, *(leaf.grad for leaf in wanted)], expected)

    @quick(each_value_once)
    def test_second_derivatives(self, layout, mode, device):
        case = self.case(1, 2, 3, 2)
        operator, _ = self.functions(case, mode)
        leaves = self._leaves(case, mode, layout, torch.float64, device)

        def cubed(*inputs):
            return joined(operator)(*inputs) ** 3

        if self.derivatives == "all":
            assert torch.autograd.gradgradcheck(cubed, leaves)
            return
        wanted = [leaves[i] for i in self._variables(leaves)]
        gradients = torch.autograd.grad(cubed(*leaves).sum(), wanted, create_graph=True)
        error, message = self.second_derivative_error or (
            NotImplementedError, rf"{self.stem or self.name}.*use_reference",
        )  # fmt: skip
        for gradient in gradients:
            with pytest.raises(error, match=message):
                gradient.sum().backward(retain_graph=True)
        with ctxops.use_reference():
            assert torch.autograd.gradgradcheck(cubed, leaves)

    def test_forward_mode(self, mode):
        case = self.case(1, 2, 3, 2)
        operator, _ = self.functions(case, mode)
        leaves = self._leaves(case, mode, dtype=torch.float64)
        with torch.autograd.forward_ad.dual_level():
            for i in self._variables(leaves):
                inputs = [None if x is None else x.detach() for x in leaves]
                inputs[i] = torch.autograd.forward_ad.make_dual(inputs[i], inputs[i])
                if self.derivatives == "first":
                    message = f"{self.name} has no forward-mode"
                    with pytest.raises(NotImplementedError, match=message):
                        operator(*inputs)
                inputs[i] = torch.autograd.forward_ad.unpack_dual(inputs[i]).primal
                operator(*inputs)  # the open level by itself forbids nothing
        with ctxops.use_reference():
            assert torch.autograd.gradcheck(
                operator, leaves, check_forward_ad=True, check_backward_ad=False
            )

    def test_transforms_of_torch_func(self, mode):
        case = self.case(2, 2, 3, 4)
        operator, _ = self.functions(case, mode)
        examples = [self._inputs(case, mode, dtype=torch.float64) for _ in range(3)]
        stacked = [None if x[0] is None else torch.stack(x) for x in zip(*examples, strict=True)]
        axes = tuple(None if x is None else 0 for x in stacked)
        expected = [as_tuple(operator(*inputs)) for inputs in examples]
        actual = as_tuple(torch.vmap(operator, in_dims=axes)(*stacked))
        assert_close(list(actual), [torch.stack(y) for y in zip(*expected, strict=True)])
        leaves = self._leaves(case, mode, dtype=torch.float64)
        variables = self._variables(leaves)
        if not variables:
            return

        def loss(*inputs):
            return joined(operator)(*inputs).square().sum()

        expected = torch.autograd.grad(loss(*leaves), [leaves[i] for i in variables])
        inputs = [None if x is None else x.detach() for x in leaves]
        assert_close(torch.func.grad(loss, argnums=tuple(variables))(*inputs), expected)

    # What torch sees.

    @quick(first)
    def test_opcheck(self, opcheck_layout, mode, device):
        case = self.case(2, 4, 5, 7)
        inputs = self._inputs(case, mode, opcheck_layout, device=device)
        tried = 0
        for name, arguments in self.opchecks(inputs, case, mode):
            torch.library.opcheck(getattr(torch.ops.ctxops, name).default, arguments)
            tried += 1
        assert tried >= 1

    @quick(first)
    def test_compiles_once_for_all_sizes(self, mode, device):
        self._check_compiled("aot_eager", mode, device)

    @quick(none)  # a module's compilation holds operators
    def test_compiled_by_inductor(self, mode, device):
        self._check_compiled("inductor", mode, device)

    def _check_compiled(self, backend, mode, device):
        torch._dynamo.reset()
        operator, _ = self.functions(self.case(2, 4, 12, 10), mode)

        def function(first, *others):
            # Neighbours that every backend computes to the last bit.
            first, *rest = as_tuple(operator(first.relu(), *others))
            return 2 * first, *rest

        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for size in ((12, 10), (17, 9), (31, 45)):
                leaves = self._leaves(self.case(2, 4, *size), mode, device=device)
                assert_close(run(compiled, leaves), run(function, leaves), check_stride=False)

    @quick(first)
    def test_trains_after_an_export_without_gradients(self, layout, mode):
        case = self.case(2, 4, 7, 5)
        operator, _ = self.functions(case, mode)
        inputs = self._inputs(case, mode, layout)
        exported = torch.export.export(Module(operator), tuple(inputs)).module()
        assert_close(run(exported, inputs), run(operator, inputs))
        leaves = self._leaves(case, mode, layout)
        assert_close(run(exported, leaves), run(operator, leaves))

    def test_tensors_of_another_class(self, layout, mode):
        """Medical and geographic images carry their metadata in a class of their own."""
        case = self.case(2, 4, 7, 5)
        operator, _ = self.functions(case, mode)
        leaves = self._leaves(case, mode, layout)
        wrapped = [
            None
            if x is None
            else x.detach().as_subclass(TensorOfTools).requires_grad_(x.requires_grad)
            for x in leaves
        ]
        assert_equal([y.as_subclass(Tensor) for y in run(operator, wrapped)], run(operator, leaves))

    def test_meta_tensors(self, layout, mode):
        case = self.case(2, 4, 7, 5)
        operator, _ = self.functions(case, mode)
        inputs = self._inputs(case, mode, layout)
        on_meta = [None if x is None else x.to("meta") for x in inputs]
        for context in (contextlib.nullcontext(), ctxops.use_reference()):
            with context:
                outputs, expected = as_tuple(operator(*on_meta)), as_tuple(operator(*inputs))
            for y, exact in zip(outputs, expected, strict=True):
                assert y.is_meta
                assert (y.shape, y.dtype) == (exact.shape, exact.dtype)

    def test_use_reference(self, mode, monkeypatch):
        module = sys.modules[f"ctxops.ops.{self.stem or self.name}.op"]
        calls = []
        for name in ("reference", "reference_weights"):
            plain = getattr(module, name, None)
            if plain is not None:
                monkeypatch.setattr(
                    module, name, lambda *a, plain=plain, **k: calls.append(a) or plain(*a, **k)
                )
        case = self.case(2, 4, 7, 5)
        operator, _ = self.functions(case, mode)
        inputs = self._inputs(case, mode)
        y = as_tuple(operator(*inputs))
        assert not calls
        with ctxops.use_reference():
            assert_close(as_tuple(operator(*inputs)), y)
        assert len(calls) == 1

    @pytest.mark.parametrize("where", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)])
    def test_products(self, where):
        """FlopCounterMode's, which counts every product with an operator of ours."""
        names = set()
        for replaced, expected in self.products:
            arguments = self.arguments(where, grad=not self.constants, **replaced)
            with flop_counter() as counter:
                outputs = [y for y in as_tuple(self.call(**arguments)) if y.requires_grad]
                if outputs:
                    torch.autograd.backward(outputs, upstream(outputs))
            counts = {str(packet): n for packet, n in counter.get_flop_counts()["Global"].items()}
            assert counts == {f"ctxops.{name}": n for name, n in expected.items()}
            assert counter.get_total_flops() == sum(expected.values())
            names |= expected.keys()
        if not self.stem:
            own = {self.name, f"{self.name}_backward"}
            assert names == own & _operator.operators.keys()

    # Layouts.

    def test_the_first_map_decides_on_the_memory_format(self, layout, mode, device):
        case = self.case(2, 6, 7, 8)
        operator, _ = self.functions(case, mode)
        for others in FORMATS:
            first, *rest = self._inputs(case, mode, others, device=device)
            first = laid_out(first, layout)
            for context in (contextlib.nullcontext(), ctxops.use_reference()):
                with context:
                    outputs = as_tuple(operator(first, *rest))
                assert any(map(_is_map, outputs))
                for y in filter(_is_map, outputs):
                    assert y.is_contiguous(memory_format=FORMATS[layout])

    def test_memory_format_of_the_gradients(self, layout, mode, device):
        """A gradient has the format of its map, whatever that of the upstream gradient."""
        case = self.case(2, 6, 7, 8)
        operator, _ = self.functions(case, mode)
        leaves = self._leaves(case, mode, layout, device=device)
        count = len(as_tuple(operator(*leaves)))
        gradients = run(operator, leaves, "contiguous")[count:]
        assert any(map(_is_map, gradients))
        for gradient in filter(_is_map, gradients):
            assert gradient.is_contiguous(memory_format=FORMATS[layout])

    # Autocast.

    def test_autocast(self, layout, mode, device):
        case = self.case(2, 4, 7, 8)
        operator, _ = self.functions(case, mode)
        leaves = self._leaves(case, mode, layout, device=device)
        halves = converted(leaves, torch.bfloat16)
        low, plain = run(operator, halves), run(operator, leaves)
        with torch.autocast(device, dtype=torch.bfloat16):
            outputs, lows = as_tuple(operator(*leaves)), run(operator, halves)
        assert_equal(lows, low)
        variables = [leaves[i] for i in self._variables(leaves)]
        gradients = torch.autograd.grad(outputs, variables, upstream(outputs)) if variables else ()
        assert all(g.dtype == torch.float32 for g in gradients)
        if self.autocast == "keep":
            assert_equal([*outputs, *gradients], plain)
        else:  # half precision may be computed in another way where a gradient is wanted
            for i in self._variables(leaves):
                halves[i].requires_grad_()
            assert_close(outputs, as_tuple(operator(*halves)))
        with ctxops.use_reference():
            expected = operator(*(leaves if self.autocast == "keep" else halves))
            with torch.autocast(device, dtype=torch.bfloat16):
                assert_close(as_tuple(operator(*leaves)), as_tuple(expected))

    def test_autocast_leaves_float64_alone(self, mode, device):
        case = self.case(2, 4, 7, 8)
        operator, reference = self.functions(case, mode)
        inputs = self._inputs(case, mode, dtype=torch.float64, device=device)
        expected = as_tuple(reference(*inputs))
        with torch.autocast(device, dtype=torch.bfloat16):
            assert_close(as_tuple(operator(*inputs)), expected, check_stride=False)

    def test_backward_under_autocast(self, layout, mode, device):
        case = self.case(2, 4, 7, 8)
        operator, _ = self.functions(case, mode)
        leaves = self._leaves(case, mode, layout, device=device)
        expected = run(operator, leaves)
        outputs = as_tuple(operator(*leaves))
        with torch.autocast(device, dtype=torch.bfloat16):
            gradients = torch.autograd.grad(
                outputs, [leaves[i] for i in self._variables(leaves)], upstream(outputs)
            )
        assert_close([*outputs, *gradients], expected)

    # Repetition.

    def test_deterministic(self, layout, mode, device, request):
        """Whatever the number of threads; plain torch promises nothing of other numbers.

        In float64 too: sums in double that differ may round to one float.
        """
        case = self.case(2, 40, 33, 47)
        operator, _ = self.functions(case, mode)
        for dtype in (torch.float32, torch.float64):
            leaves = self._leaves(case, mode, layout, dtype, device)
            first = run(operator, leaves)
            for repetition in range(10 if request.config.getoption("--all") else 3):
                with threads(1 + repetition % 3 if self.native else torch.get_num_threads()):
                    assert_equal(run(operator, leaves), first)

    @pytest.mark.cuda
    def test_graph_capture_on_a_side_stream(self, layout, mode):
        case = self.case(2, 16, 40, 30)
        operator, _ = self.functions(case, mode)
        inputs = self._inputs(case, mode, layout, device="cuda")
        expected = as_tuple(operator(*inputs))
        static = [None if x is None else torch.zeros_like(x) for x in inputs]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = as_tuple(operator(*static))
        for to, x in zip(static, inputs, strict=True):
            if x is not None:
                to.copy_(x)
        graph.replay()
        assert_close(outputs, expected)

    # Errors.

    def test_bad_input(self, bad):
        replaced, error, message = bad
        self.call(**self.valid)
        for context in (contextlib.nullcontext(), ctxops.use_reference()):
            with context, pytest.raises(error, match=message):
                self.call(**(self.valid | replaced))


def contracts() -> dict[str, type[OperatorContract]]:
    """That of every operator by name, from the test files."""
    found = {}
    for path in sorted(Path(ctxops.__file__).parent.glob("ops/*/op.py")):
        for kind in vars(importlib.import_module(f"ops.test_{path.parent.name}")).values():
            if (
                isinstance(kind, type)
                and issubclass(kind, OperatorContract)
                and "name" in vars(kind)
            ):
                found[kind.name] = kind
    return found


def _is_map(x: Tensor | None) -> bool:
    return x is not None and x.dim() == 4


def _first(axis: Sequence | dict) -> Any:
    return next(iter(axis.values() if isinstance(axis, dict) else axis))


def _skipped(name: str, reason: str) -> Callable:
    @pytest.mark.skip(reason=reason)
    def test(self):
        pass

    test.__name__ = name
    return test
