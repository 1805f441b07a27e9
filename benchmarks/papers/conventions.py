# SPDX-License-Identifier: Apache-2.0
"""The operations of a module as the papers' tools count them, from the shapes of one forward.

Three conventions occur in the papers. None of them counts softmax, resizes, concatenations or
element-wise arithmetic, and none is what torch's FlopCounterMode counts:

- ``"T"`` (MCIBI, by mmcv's tool): convolutions as multiply-accumulates and biases, batch norm 2 and
  ReLU 1 for each element, pooling modules the elements of their input. No matrix product.
- ``"S"`` (ANN, by its modified torchstat): as T, but adaptive pooling window + 1 for each bin, and
  a matrix product 2 for each multiply-accumulate. A module keeps its last call alone, so that of
  the two products of a non-local block one counts, and a shared convolution or pooling once.
- ``"F"`` (GFF): convolutions 2 for each multiply-accumulate, and biases, batch norm 2 and ReLU 1
  for each element.

Our modules call operators where the original networks have pooling and product modules. Those that
the tools would have seen are counted with the module that stands for them: the grids of
``PyramidPooling``, the grids of key and value and the products of the non-local blocks. The pooling
of ``AdaptiveContext`` is a function in the original, so no tool sees it. The released non-local
blocks run the embedding that query and key share twice, ours once: it counts twice where calls
add up. Blocks that fold linear steps into their anchors do fewer operations than the original: they
must have ``fold=False``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ctxops.nn import AFNB, APNB, FusionNonLocal2d, NonLocal2d, PyramidPooling

CONVENTIONS = ("T", "S", "F")

# From a module, its inputs and its output to the number of operations of that call.
Rule = Callable[[nn.Module, tuple[Tensor, ...], Tensor], int]


def count_operations(module: nn.Module, *inputs: Tensor, convention: str = "T") -> int:
    """The operations of ``module(*inputs)`` by one of the three conventions.

    The forward runs: on the meta device it costs nothing. A leaf module with a weight that the
    convention does not know raises TypeError.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {CONVENTIONS}, got {convention!r}")
    rules = _RULES[convention]
    calls: dict[nn.Module, list[int]] = {}

    def tally(called: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rule = next((r for kinds, r in rules.items() if isinstance(called, kinds)), None)
        if rule is not None:
            calls.setdefault(called, []).append(rule(called, inputs, output))
        elif "weight" in called._parameters:
            raise TypeError(f"convention {convention} has no rule for {type(called).__name__}")

    hooks = [m.register_forward_hook(tally) for m in module.modules()]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if convention == "S":
        return sum(counts[-1] for counts in calls.values())
    shared = [
        layer
        for block in module.modules()
        if isinstance(block, _NON_LOCAL) and block.share == "query_key"
        for layer in block.key.modules()
    ]
    return sum(sum(counts) * (1 + shared.count(called)) for called, counts in calls.items())


def _convolution(each: int) -> Rule:
    """``each``: operations of a multiply-accumulate."""

    def rule(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> int:
        per_element = each * module.weight[0].numel() + (module.bias is not None)
        return output.numel() * per_element

    return rule


def _norm(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    return 2 * output.numel()


def _relu(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    return output.numel()


def _pooling_input(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    return inputs[0].numel()


def _grids_input(module: PyramidPooling, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    return len(module.output_sizes) * inputs[0].numel()


def _anchors_input(module: AFNB | APNB, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """Every grid pools the key's map and the value's map."""
    _check_unfolded(module)
    batch, _, height, width = inputs[0].shape
    pooled = batch * height * width * (module.key_channels + module.value_channels)
    return len(module.output_sizes) * pooled


def _windows(size: Sequence[int], output_sizes: Sequence[int]) -> int:
    """Window + 1 for each bin of all grids, for one channel."""
    height, width = size
    return sum(n * n * ((height // n) * (width // n) + 1) for n in output_sizes)


def _pooling_windows(
    module: nn.AdaptiveAvgPool2d, inputs: tuple[Tensor, ...], output: Tensor
) -> int:
    (x,) = inputs
    batch, channels, height, width = output.shape
    window = (x.shape[2] // height) * (x.shape[3] // width)
    return batch * channels * height * width * (window + 1)


def _grids_windows(module: PyramidPooling, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    (x,) = inputs
    return x.shape[0] * x.shape[1] * _windows(x.shape[2:], module.output_sizes)


def _anchor_products(module: AFNB | APNB, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    """Both products, and the pooling of the value, which comes after the key's."""
    _check_unfolded(module)
    context, x = inputs[0], inputs[-1]
    anchors = sum(n * n for n in module.output_sizes)
    positions = x.shape[0] * x.shape[2] * x.shape[3]
    products = 2 * positions * anchors * (module.key_channels + module.value_channels)
    windows = _windows(context.shape[2:], module.output_sizes)
    return products + x.shape[0] * module.value_channels * windows


def _dense_products(
    module: NonLocal2d | FusionNonLocal2d, inputs: tuple[Tensor, ...], output: Tensor
) -> int:
    """The second of the two products, both calls of one module."""
    context, x = inputs[0], inputs[-1]
    positions = x.shape[2] * x.shape[3] * context.shape[2] * context.shape[3]
    return 2 * x.shape[0] * positions * module.value_channels


def _check_unfolded(module: AFNB | APNB) -> None:
    if module.fold:
        raise ValueError(f"{type(module).__name__} must have fold=False to be counted")


_Kinds = tuple[type[nn.Module], ...]
_NON_LOCAL: _Kinds = (AFNB, APNB, FusionNonLocal2d, NonLocal2d)
_POOLING: _Kinds = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.MaxPool2d)

_RULES: dict[str, dict[_Kinds, Rule]] = {
    "T": {
        (nn.Conv2d,): _convolution(1),
        (nn.BatchNorm2d,): _norm,
        (nn.ReLU,): _relu,
        _POOLING: _pooling_input,
        (PyramidPooling,): _grids_input,
        (AFNB, APNB): _anchors_input,
    },
    "S": {
        (nn.Conv2d,): _convolution(1),
        (nn.BatchNorm2d,): _norm,
        (nn.ReLU,): _relu,
        (nn.AdaptiveAvgPool2d,): _pooling_windows,
        (PyramidPooling,): _grids_windows,
        (AFNB, APNB): _anchor_products,
        (NonLocal2d, FusionNonLocal2d): _dense_products,
    },
    "F": {
        (nn.Conv2d,): _convolution(2),
        (nn.BatchNorm2d,): _norm,
        (nn.ReLU,): _relu,
    },
}
