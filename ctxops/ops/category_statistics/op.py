# SPDX-License-Identifier: Apache-2.0
"""category_statistics: what the features of every category add up to, seen at label resolution."""

import functools

import torch
from torch import Tensor

from ctxops import _autocast, _layout, _native, _operator
from ctxops._checks import check_map, check_shape
from ctxops.ops.category_statistics.reference import reference

_LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Of torch.nn.functional.cosine_similarity: shorter vectors count as that long.
_EPS = 1e-8
# Parts of the map have sums of their own, which are added in the end: so many bytes at most, and
# no fewer rows of the map in a part. On CUDA, where blocks take the parts, no fewer positions, one
# for each of a block's warps, and no more parts than keep a large GPU busy.
_PART_BYTES = 32 << 20
_PART_ROWS = 8
_PART_POSITIONS = 16
_CUDA_PARTS = 256
# Two rows of a tile of the map should stay in the CPU's second-level cache. Of the 48 bytes that a
# class takes at every position, few are touched: they count for a quarter.
_TILE_BYTES = 512 << 10
_CLASS_BYTES = 12


@_operator.served_by(cpu="C++", cuda="C++")
def category_statistics(
    features: Tensor,
    labels: Tensor,
    memory: Tensor | None = None,
    *,
    num_classes: int | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Sums of the features of every category, weighted by how little they resemble its memory.

    .. math::
        S_k = \sum_{p:\, l_p = k} a_p r_p, \qquad A_k = \sum_{p:\, l_p = k} a_p, \qquad
        a_p = 1 - \cos(r_p, m_k)

    r is the map of features, resized bilinearly to the labels; p runs over the labels' pixels.
    :math:`S_k / A_k` is the mean of the paper. The resized map is never built.

    Args:
        features: map of shape ``(B, C, h, w)``.
        labels: l, integers of shape ``(B, H, W)``, in ``[0, K)`` or ``ignore_index``.
        memory: m, ``(K, C)``, one vector per category. None, or a row of zeros: a_p = 1.
        num_classes: K; needed without a memory.
        ignore_index: the label of pixels that are left out.
        align_corners: of the bilinear resize.

    Returns:
        ``sums (K, C)`` and ``weights (K,)`` in float32 (float64 for float64), and ``counts (K,)``,
        the number of pixels of every category, int64. A category without pixels has zeros.

    Raises:
        TypeError: no floating features or memory, no integer labels, class number or ignored label.
        ValueError: shapes or devices that do not fit; on the CPU a label outside ``[0, K)``. On
            CUDA, where looking would mean to wait for the device, and in a compiled reference, such
            a label turns all sums and weights into NaN.

    Source: Jin et al., Mining Contextual Information Beyond Image, ICCV 2021, eq. 8 to 10.

    Dtypes: float32, float64, float16, bfloat16; the kernels sum in float64. Labels: uint8, int8,
        int16, int32, int64. A cosine takes vectors shorter than 1e-8 to be that long, as torch's.
        Under autocast nothing is cast down.
    Gradients: none; the results are constants.
    Deterministic: yes, for any number of threads.
    Memory: sums of P parts of the map, 8 * K * (C + 2) bytes each, together 32 MiB at most unless
        P = 1. On the CPU also a tile of the map for each part, N * (2 * C * s + 48 * K + 96) + 16 *
        (W + N) bytes, with s = 4 (8 for float64) and so many of its w columns, N - 1, that the
        first term is about 512 KiB at most, the second 2 MiB. On CUDA 4 * B * H * W bytes (8 for
        float64) where there is a memory, and a channels_last copy of features that are not so. P is
        B * ceil(h / 8) at most, on CUDA 256. Besides, two float64 copies of the memory.
    """
    check_map("features", features)
    classes = _check(features, labels, memory, num_classes)
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    features = features.detach()
    memory = None if memory is None else memory.detach()
    if not _STATISTICS.serves(features):
        if not torch.compiler.is_compiling() and labels.device.type == "cpu":
            _check_range(labels, classes, ignore_index)
        with _autocast.disabled(features.device.type):
            return reference(features, labels, memory, classes, ignore_index, align_corners)
    options = (classes, ignore_index, align_corners)
    return _STATISTICS(features, labels, memory, *options)


def _check(features: Tensor, labels: Tensor, memory: Tensor | None, num_classes: int | None) -> int:
    """The number of categories; raises unless the arguments fit together."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
    if labels.layout != torch.strided or labels.dtype not in _LABELS:
        raise TypeError(
            "labels must be strided and uint8, int8, int16, int32 or int64, got "
            f"{labels.layout} {labels.dtype}"
        )
    shape = tuple(labels.shape)
    if len(shape) != 3 or shape[0] != features.shape[0] or 0 in shape[1:]:
        raise ValueError(
            f"labels must have shape (B, H, W) = ({features.shape[0]}, any, any) with H and W of "
            f"at least 1, got {shape}"
        )
    if labels.device != features.device:
        raise ValueError(f"labels must be on the device {features.device}, got {labels.device}")
    if num_classes is not None:
        if not isinstance(num_classes, (int, torch.SymInt)) or isinstance(num_classes, bool):
            raise TypeError(f"num_classes must be an integer or None, got {num_classes!r}")
        if not 1 <= num_classes < 2**31:
            raise ValueError(f"num_classes must be in [1, 2147483648), got {num_classes}")
    elif memory is None:
        raise ValueError("num_classes must be given without a memory, got None")
    if memory is None:
        return num_classes
    check_shape("memory", memory, features, (num_classes, features.shape[1]), "(K, C)")
    if memory.shape[0] == 0:
        raise ValueError(f"memory must have at least one row, got {tuple(memory.shape)}")
    return memory.shape[0]


def _check_range(labels: Tensor, classes: int, ignore_index: int) -> None:
    labels = labels.long()  # a comparison would wrap the number to the labels' dtype
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    if outside.any():
        raise ValueError(_outside(int(labels[outside][0]), classes, ignore_index))


def _outside(label: int, classes: int, ignore_index: int) -> str:
    return f"labels must be in [0, {classes}) or ignore_index = {ignore_index}, got {label}"


def _statistics(
    features: Tensor,
    labels: Tensor,
    memory: Tensor | None,
    num_classes: int,
    ignore_index: int,
    align_corners: bool,
    *,
    fake: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = features.shape
    dtype, long = _operator.accumulator(features.dtype), torch.int64
    sums = features.new_empty((num_classes, channels), dtype=dtype)
    weights = features.new_empty((num_classes,), dtype=dtype)
    counts = features.new_empty((num_classes,), dtype=long)
    if fake:
        return sums, weights, counts
    if batch == 0:
        return sums.zero_(), weights.zero_(), counts.zero_()
    double = torch.float64
    directions = features.new_empty((0,), dtype=double)
    if memory is not None:
        rows = memory.to(double).contiguous()
        directions = torch.nn.functional.normalize(rows, dim=1, eps=_EPS)
    if features.is_cuda:
        parts = min(-(-batch * height * width // _PART_POSITIONS), _CUDA_PARTS)
    else:
        parts = batch * -(-height // _PART_ROWS)
    parts = max(1, min(parts, _PART_BYTES // (8 * num_classes * (channels + 2))))
    if features.is_cuda:
        features = features.contiguous(memory_format=torch.channels_last)
        scratch = features.new_empty((0,) if memory is None else labels.shape, dtype=dtype)
    else:
        features = _layout.inner_dense(features)
        largest = max(2 * channels * max(4, features.itemsize), _CLASS_BYTES * num_classes)
        columns = -(-width // -(-width * largest // _TILE_BYTES)) + 1
        values = _native.extension.category_statistics_scratch(
            dtype == double, channels, num_classes, labels.shape[2], columns
        )
        scratch = features.new_empty((parts, columns, values), dtype=double)
    outside = features.new_empty((2,), dtype=long)
    _operator.launch(
        "category_statistics", features,
        features=features, labels=labels, directions=directions, sums=sums, weights=weights,
        counts=counts, outside=outside,
        part_sums=features.new_empty((parts, num_classes, channels), dtype=double),
        part_weights=features.new_empty((parts, num_classes), dtype=double),
        part_counts=features.new_empty((parts, num_classes), dtype=long), scratch=scratch,
        ignore_index=ignore_index, align_corners=align_corners,
    )  # fmt: skip
    if not features.is_cuda and outside[0]:
        raise ValueError(_outside(int(outside[1]), num_classes, ignore_index))
    return sums, weights, counts


def _not_differentiable(ctx, *grads):
    raise NotImplementedError("category_statistics has no gradient: its results are constants")


def _flops(features: torch.Size, labels: object, memory: torch.Size | None, *_) -> int:
    """Every position's part in the sum of one category; with a memory also the products with its
    row, of the position with itself and with its neighbours to the right, below and on both
    diagonals. Where categories meet there are more, which shapes do not tell.
    """
    batch, channels, height, width = features
    return 2 * batch * channels * height * width * (1 if memory is None else 7)


_STATISTICS = _operator.Operator(
    "category_statistics(Tensor features, Tensor labels, Tensor? memory, SymInt num_classes, "
    "int ignore_index, bool align_corners) -> (Tensor, Tensor, Tensor)",
    fake=functools.partial(_statistics, fake=True),
    kernels=_operator.native_devices(_statistics),
    backward=_not_differentiable,
    flops=_flops,
)
