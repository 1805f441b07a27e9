# SPDX-License-Identifier: Apache-2.0
"""gated_fusion: maps of several levels, fused through the gates of sender and receiver."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ctxops import _autocast, _layout, _native, _operator
from ctxops._checks import check_forward_mode, check_map, check_same_dtype, check_shape
from ctxops.ops.gated_fusion.reference import reference, reference_gates

_MAX_LEVELS = _native.limit("max_tensors")
_BUT = "" if _native.extension is None else f"more than {_MAX_LEVELS} levels: reference"


@_operator.served_by(cpu="C++", cuda="C++", but=_BUT)
def gated_fusion(
    features: Sequence[Tensor], gates: Sequence[Tensor], *, align_corners: bool = False
) -> tuple[Tensor, ...]:
    r"""Every level takes in what the gates of the others send and its own gate leaves room for.

    .. math::
        \tilde X_l = (1 + G_l) \odot X_l + (1 - G_l) \odot
                     \sum_{i \neq l} \operatorname{resize}_l(G_i \odot X_i)

    Args:
        features: X_l, at least two maps of shape ``(B, C, H_l, W_l)``, of any sizes.
        gates: G_l, as many maps of shape ``(B, 1, H_l, W_l)``, meant to be in [0, 1].
        align_corners: of the bilinear resize to the size of level l; the sums of levels of one size
            are resized, not the levels.

    Returns:
        A tuple of maps like the features, all in the memory format of the first.

    Raises:
        TypeError: no sequences, no floating tensors, or of different dtypes.
        ValueError: fewer than two levels, numbers, shapes or devices that do not fit.
        NotImplementedError: forward-mode or second derivatives (use :func:`ctxops.use_reference`).

    Source: Li et al., Gated Fully Fusion for Semantic Segmentation, AAAI 2020, eq. 5, which leaves
    the resize out; that it is applied to G_i X_i is our reading.

    Dtypes: float32, float64, float16, bfloat16; sums in float32 (float64). Under autocast all maps
        take the widest dtype among them.
    Gradients: features and gates.
    Deterministic: yes, forward and backward, for any number of threads. On CUDA, results may differ
        in the last bits between buffers of different alignment.
    Memory: one value of 4 bytes (8 for float64) for every position of every level, and with levels
        of several sizes so many maps of that dtype, one of each size; kept with gradient. Backward:
        as many values again, and two such maps of each size. Besides, a copy of every map that is
        not in the format of the first, and on the CPU float32 copies of maps in half precision.
        More than 8 levels are served by the reference.
    """
    _check_features(features)
    if not isinstance(gates, (list, tuple)):
        raise TypeError(f"gates must be a list or tuple of tensors, got {type(gates).__name__}")
    if len(gates) != len(features):
        raise ValueError(
            f"gates must be as many as the features, {len(features)}, got {len(gates)}"
        )
    for level, (x, gate) in enumerate(zip(features, gates, strict=True)):
        shape = (x.shape[0], 1, *x.shape[2:])
        check_shape(f"gates[{level}]", gate, x, shape, "(B, 1, H, W)")
    maps = _promote(features[0].device.type, *features, *gates)
    features, gates = maps[: len(features)], maps[len(features) :]
    named = {f"features[{level}]": x for level, x in enumerate(features)}
    named |= {f"gates[{level}]": gate for level, gate in enumerate(gates)}
    check_same_dtype(**named)
    if not _serves(features):
        return _in_format_of(features[0], reference(features, gates, align_corners))
    check_forward_mode("gated_fusion", *features, *gates)
    grad = _operator.needs_grad(*features, *gates)
    dtype = _operator.accumulator(features[0].dtype)
    flat = torch.cat([gate.flatten() for gate in gates]).to(dtype)
    fused = _FORWARD(features, flat, None, None, align_corners, grad)[0]
    return tuple(fused)


@_operator.served_by(cpu="C++", cuda="C++", but=_BUT)
def self_gated_fusion(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    align_corners: bool = False,
) -> tuple[Tensor, ...]:
    r""":func:`gated_fusion` with gates that are computed in the same pass from the maps themselves.

    .. math::
        G_l = \operatorname{sigmoid}(\langle w_l, X_l \rangle + b_l)

    Args:
        features: X_l, at least two maps of shape ``(B, C, H_l, W_l)``, of any sizes.
        weight: w_l, ``(L, C)``.
        bias: b_l, ``(L,)``, or None. A bias of -inf closes its gate: G_l = 0.
        align_corners: as for :func:`gated_fusion`.

    Returns:
        A tuple of maps like the features, all in the memory format of the first.

    Raises:
        What :func:`gated_fusion` raises.

    Source: Li et al., Gated Fully Fusion for Semantic Segmentation, AAAI 2020, eq. 5. There the
    gates come from the maps before their channels are reduced.

    Dtypes: float32, float64, float16, bfloat16; sums and gates in float32 (float64). Under autocast
        all maps take the widest dtype among them, weight and bias that of the maps.
    Gradients: features, weight and bias.
    Deterministic: yes, forward and backward, for any number of threads. On CUDA, results may differ
        in the last bits between buffers of different alignment.
    Memory: what :func:`gated_fusion` needs; without gradient, and with levels of one size, nothing.
        Backward, besides: L C values for every 64 positions of the largest level.
    """
    _check_features(features)
    levels, channels = len(features), features[0].shape[1]
    check_shape("weight", weight, features[0], (levels, channels), "(L, C)")
    if bias is not None:
        check_shape("bias", bias, features[0], (levels,), "(L,)")
    features = _promote(features[0].device.type, *features)
    if _autocast.is_active(features[0].device.type):
        weight, bias = (t if t is None else t.to(features[0].dtype) for t in (weight, bias))
    named = {f"features[{level}]": x for level, x in enumerate(features)}
    check_same_dtype(**named, weight=weight, bias=bias)
    if not _serves(features):
        gates = reference_gates(features, weight, bias)
        return _in_format_of(features[0], reference(features, gates, align_corners))
    check_forward_mode("self_gated_fusion", *features, weight, bias)
    grad = _operator.needs_grad(*features, weight, bias)
    arguments = (features, None, weight, bias, align_corners, grad)
    return tuple(_FORWARD(*arguments)[0])


def _check_features(features: Sequence[Tensor]) -> None:
    if not isinstance(features, (list, tuple)):
        raise TypeError(
            f"features must be a list or tuple of tensors, got {type(features).__name__}"
        )
    if len(features) < 2:
        raise ValueError(f"features must have at least two levels, got {len(features)}")
    for level, x in enumerate(features):
        check_map(f"features[{level}]", x)
        shape = (*features[0].shape[:2], None, None)
        check_shape(f"features[{level}]", x, features[0], shape, "(B, C, H, W)")


def _promote(device: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the widest dtype among them where autocast is on, as torch.cat does it."""
    if not _autocast.is_active(device):
        return tensors
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def _serves(features: Sequence[Tensor]) -> bool:
    return len(features) <= _MAX_LEVELS and _FORWARD.serves(features[0])


def _in_format_of(first: Tensor, fused: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(y.contiguous(memory_format=_layout.memory_format(first)) for y in fused)


def _kernel_maps(maps: Sequence[Tensor], layout: torch.memory_format) -> list[Tensor]:
    """The maps as the kernels take them: all with channels side by side, or all with planes; on the
    CPU no half precision.
    """

    def fits(x: Tensor) -> bool:
        _, channels, height, width = x.shape
        _, stride_c, stride_h, stride_w = x.stride()
        # A map of one position is of both kinds, and has to be so in every list of maps.
        if layout == torch.channels_last or height == width == 1:
            return channels == 1 or stride_c == 1
        return (width == 1 or stride_w == 1) and (height == 1 or stride_h == width)

    dtype = maps[0].dtype if maps[0].is_cuda else _operator.accumulator(maps[0].dtype)
    return [
        x if x.dtype == dtype and fits(x) else x.to(dtype).contiguous(memory_format=layout)
        for x in maps
    ]


def _empty_kernel_maps(maps: Sequence[Tensor]) -> Sequence[Tensor]:
    """The maps themselves where the kernels can write to them, else some to be copied from."""
    if maps[0].is_cuda or maps[0].dtype.itemsize > 2:
        return maps
    return [torch.empty_like(x, dtype=torch.float32) for x in maps]


def _copy_unless_same(maps: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for x, source in zip(maps, sources, strict=True):
        if x is not source:
            x.copy_(source)


def _sizes(features: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The sizes of the levels, each once, in the order of their first levels."""
    sizes: list[tuple[int, int]] = []
    for x in features:
        if not any(x.shape[2] == height and x.shape[3] == width for height, width in sizes):
            sizes.append((x.shape[2], x.shape[3]))
    return sizes


def _new_sums(features: Sequence[Tensor]) -> Tensor:
    """An uninitialised map for each size of the levels, all in one; nothing if there is one."""
    batch, channels = features[0].shape[:2]
    sizes = _sizes(features)
    count = 0 if len(sizes) == 1 else sum(batch * channels * h * w for h, w in sizes)
    return features[0].new_empty((count,), dtype=_operator.accumulator(features[0].dtype))


def _new_gates(features: Sequence[Tensor]) -> Tensor:
    count = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in features)
    return features[0].new_empty((count,), dtype=_operator.accumulator(features[0].dtype))


def _forward(
    features: Sequence[Tensor],
    gates: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    align_corners: bool,
    save: bool,
    *,
    fake: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor]:
    layout = _layout.memory_format(features[0])
    fused = [_layout.empty_map(x.shape, x, layout) for x in features]
    # Two tensors without elements, not one twice: results must not alias.
    accumulator = _operator.accumulator(features[0].dtype)
    computed, sums = (features[0].new_empty((0,), dtype=accumulator) for _ in range(2))
    if save:
        sums = _new_sums(features)
        computed = _new_gates(features) if gates is None else computed
    if fake or fused[0].numel() == 0:
        return fused, computed, sums
    empty = features[0].new_empty((0,), dtype=accumulator)
    work = sums if save else _new_sums(features)
    if gates is None:
        gates = _new_gates(features) if work.numel() > 0 and not save else computed
    targets = _empty_kernel_maps(fused)
    _operator.launch(
        "gated_fusion_forward", features[0],
        features=_kernel_maps(features, layout), gates=gates.contiguous(),
        weight=empty if weight is None else weight.to(accumulator).contiguous(),
        bias=empty if bias is None else bias.to(accumulator).contiguous(),
        outputs=targets, sums=work, align_corners=align_corners,
    )  # fmt: skip
    _copy_unless_same(fused, targets)
    return fused, computed, sums


def _sum(values: Tensor, part: int) -> Tensor:
    """The sum of a vector, for any number of threads the same: torch splits long ones by it."""
    whole = len(values) // part * part
    return values[:whole].view(-1, part).sum(dim=0).sum() + values[whole:].sum()


def _backward(
    grads: Sequence[Tensor],
    features: Sequence[Tensor],
    gates: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    align_corners: bool,
    *,
    fake: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The gradients of features, of gates or with weight of their logits, of weight and bias."""
    layout = _layout.memory_format(features[0])
    grad_features = [_layout.empty_map(x.shape, x, layout) for x in features]
    grad_gates = torch.empty_like(gates)
    grad_weight = gates.new_empty((0,) if weight is None else weight.shape)
    grad_bias = gates.new_empty((0 if weight is None else len(features),))
    if fake:
        return grad_features, grad_gates, grad_weight, grad_bias
    if features[0].numel() == 0:
        return grad_features, grad_gates, grad_weight.zero_(), grad_bias.zero_()
    batch, channels = features[0].shape[:2]
    part = _native.extension.gated_fusion_part
    parts = batch * max(-(-x.shape[2] * x.shape[3] // part) for x in features)
    partial = gates.new_empty((0,) if weight is None else (len(features), parts, channels))
    targets = _empty_kernel_maps(grad_features)
    _operator.launch(
        "gated_fusion_backward", features[0],
        grads=_kernel_maps(grads, layout), features=_kernel_maps(features, layout),
        gates=gates.contiguous(),
        weight=grad_weight if weight is None else weight.to(gates.dtype).contiguous(),
        sums=sums.contiguous(), grad_sums=torch.empty_like(sums), grad_sent=torch.empty_like(sums),
        grad_gates=grad_gates, grad_features=targets, grad_weight=partial,
        align_corners=align_corners,
    )  # fmt: skip
    _copy_unless_same(grad_features, targets)
    if weight is not None:
        torch.sum(partial, dim=1, out=grad_weight)
        logits = grad_gates.split([x.shape[0] * x.shape[2] * x.shape[3] for x in features])
        torch.stack([_sum(x, part) for x in logits], out=grad_bias)
    return grad_features, grad_gates, grad_weight, grad_bias


def _setup_context(ctx, inputs, output):
    features, gates, weight, bias, ctx.align_corners, saved = inputs
    _, computed, sums = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(computed, sums)
    ctx.saved, ctx.layout = saved, _layout.memory_format(features[0])
    ctx.save_for_backward(*features, gates if weight is None else computed, weight, bias, sums)


def _autograd(ctx, grads, *_):
    *features, gates, weight, bias, sums = ctx.saved_tensors
    # Hooks on saved tensors may return them with other strides; the sums keep the layout.
    features = [x.contiguous(memory_format=ctx.layout) for x in features]
    if not ctx.saved:
        # A graph that was exported without gradients has neither gates nor sums: take them anew.
        given = None if weight is not None else gates
        _, computed, sums = _FORWARD(features, given, weight, bias, ctx.align_corners, True)
        gates = computed if given is None else given
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(features, grads, strict=True)]
    grad_features, grad_gates, grad_weight, grad_bias = _BACKWARD(
        grads, features, gates, weight, sums, ctx.align_corners
    )
    if weight is None:
        return grad_features, grad_gates, None, None, None, None
    grad_bias = None if bias is None else grad_bias.to(bias.dtype)
    return grad_features, None, grad_weight.to(weight.dtype), grad_bias, None, None


def _gate_flops(features: Sequence[torch.Size]) -> int:
    """The product of every position with its level's weight."""
    return sum(2 * batch * channels * h * w for batch, channels, h, w in features)


def _flops(features: Sequence[torch.Size], gates: object, weight: torch.Size | None, *_) -> int:
    """Gates that are given weigh maps, which is no product."""
    return 0 if weight is None else _gate_flops(features)


def _flops_backward(
    grads: object, features: Sequence[torch.Size], gates: object, weight: torch.Size | None, *_
) -> int:
    """What the gates send to the features and to the weight."""
    return 0 if weight is None else 2 * _gate_flops(features)


_FORWARD = _operator.Operator(
    "gated_fusion(Tensor[] features, Tensor? gates, Tensor? weight, Tensor? bias, "
    "bool align_corners, bool save) -> (Tensor[], Tensor, Tensor)",
    fake=functools.partial(_forward, fake=True),
    kernels=_operator.native_devices(_forward),
    setup_context=_setup_context,
    backward=_autograd,
    flops=_flops,
)
_BACKWARD = _operator.Operator(
    "gated_fusion_backward(Tensor[] grads, Tensor[] features, Tensor gates, Tensor? weight, "
    "Tensor sums, bool align_corners) -> (Tensor[], Tensor, Tensor, Tensor)",
    fake=functools.partial(_backward, fake=True),
    kernels=_operator.native_devices(_backward),
    backward=_operator.no_second_derivative("gated_fusion"),
    flops=_flops_backward,
)
