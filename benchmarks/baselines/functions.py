# SPDX-License-Identifier: Apache-2.0
"""The operators of ctxops in plain torch, in the forms that people write and in faster ones."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import ModuleType
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ctxops.nn.resize import resize

# What torch's SDPA may choose on a GPU, and what a row is called that leaves it no choice.
SDPA_BACKENDS = {
    "SDPA, Flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
}
IGNORED = 255  # the label, of category means


def adaptive_pools(x: Tensor, output_sizes: Sequence[int], mode: str) -> Tensor:
    """(B, C, H, W) -> (B, C, S), the n x n of each size one after the other."""
    pool = F.adaptive_avg_pool2d if mode == "avg" else F.adaptive_max_pool2d
    return torch.cat([pool(x, n).flatten(2) for n in output_sizes], dim=2)


def _bin_averages(extent: int, n: int) -> Tensor:
    """(n, extent): row i averages the positions of torch's adaptive bin i."""
    matrix = torch.zeros(n, extent)
    for i in range(n):
        start, end = i * extent // n, -(-(i + 1) * extent // n)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def make_bin_product(
    size: tuple[int, int], output_sizes: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Average pooling as products with two matrices; one for the rows of all grids together."""
    height, width = size
    rows = torch.cat([_bin_averages(height, n) for n in output_sizes]).to(device, dtype)
    columns = [_bin_averages(width, n).to(rows) for n in output_sizes]

    def pool(x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        if x.is_contiguous():
            parts = (rows @ x).split(output_sizes, dim=2)
            pooled = [part @ c.t() for part, c in zip(parts, columns, strict=True)]
            return torch.cat([p.flatten(2) for p in pooled], dim=2)
        lines = rows @ x.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
        parts = lines.unflatten(2, (width, channels)).split(output_sizes, dim=1)
        pooled = [c @ part for part, c in zip(parts, columns, strict=True)]
        return torch.cat([p.flatten(1, 2) for p in pooled], dim=1).transpose(1, 2)

    return pool


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """Query (B, C, H, W), key (B, C, S), value (B, Cv, S) -> (B, Cv, H, W)."""
    scale = query.shape[1] ** -0.5 if scale is None else scale
    scaled = query.flatten(2).transpose(1, 2) * scale
    weights = (scaled @ key).softmax(dim=-1)
    return (weights @ value.transpose(1, 2)).transpose(1, 2).unflatten(2, query.shape[2:])


def as_rows(x: Tensor) -> Tensor:
    """(B, C, ...) as (B, 1, N, C), each row contiguous."""
    return x.flatten(2).transpose(1, 2).contiguous().unsqueeze(1)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Query (B, C, H, W), key and value (B, C, ...) -> (B, C, H, W)."""
    context = F.scaled_dot_product_attention(as_rows(query), as_rows(key), as_rows(value))
    return context.squeeze(1).transpose(1, 2).unflatten(2, query.shape[2:])


def sdpa_on(query: Tensor, key: Tensor, value: Tensor, *, backend: SDPBackend) -> Tensor:
    """SDPA where torch has no choice."""
    with sdpa_kernel(backend):
        return sdpa(query, key, value)


def windows_by_unfold(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel: int,
    dilation: int,
    scale: float | None = None,
) -> Tensor:
    """LDv2 as it is usually written: every position's window is copied out."""
    padding = kernel // 2 * dilation
    scale = query.shape[1] ** -0.5 if scale is None else scale

    def windows(x: Tensor) -> Tensor:
        columns = F.unfold(x, kernel, dilation, padding)
        return columns.view(*x.shape[:2], kernel * kernel, *x.shape[2:])

    weights = ((query * scale)[:, :, None] * windows(key)).sum(dim=1).softmax(dim=1)
    return (weights[:, None] * windows(value)).sum(dim=2)


def windows_by_shifts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel: int,
    dilation: int,
    scale: float | None = None,
) -> Tensor:
    """One pass over shifted maps for each neighbour: nothing is copied but the padding."""
    height, width = query.shape[2:]
    padding = kernel // 2 * dilation
    key, value = F.pad(key, (padding,) * 4), F.pad(value, (padding,) * 4)
    shifts = [
        (..., slice(i * dilation, i * dilation + height), slice(j * dilation, j * dilation + width))
        for i in range(kernel)
        for j in range(kernel)
    ]
    scaled = query * (query.shape[1] ** -0.5 if scale is None else scale)
    weights = torch.stack([(scaled * key[at]).sum(dim=1) for at in shifts], dim=1).softmax(dim=1)
    return sum(weights[:, n, None] * value[at] for n, at in enumerate(shifts))


def make_windows_by_flex(
    size: tuple[int, int], device: torch.device, *, kernel: int, dilation: int
) -> Callable[..., Tensor]:
    """FlexAttention to the positions of maps that are padded with zeros, masked to the window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    height, width = size
    padding = kernel // 2 * dilation
    rows, columns = height + 2 * padding, width + 2 * padding

    def in_window(batch, head, query, key):
        down, right = key // columns - query // width, key % columns - query % width
        rows_fit = (down >= 0) & (down <= 2 * padding) & (down % dilation == 0)
        return rows_fit & (right >= 0) & (right <= 2 * padding) & (right % dilation == 0)

    # Uncompiled it would make the whole mask, height * width * rows * columns numbers.
    mask = torch.compile(create_block_mask)(
        in_window, None, None, height * width, rows * columns, device=device
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    # Compiled together with what lays out its operands, it fails on the CPU (torch 2.15).
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (as_rows(F.pad(x, (padding,) * 4)) for x in (key, value))
        context = compiled(as_rows(query), key, value, block_mask=mask)
        return context.squeeze(1).transpose(1, 2).unflatten(2, (height, width))

    return attend


def windows_by_natten(
    query: Tensor, key: Tensor, value: Tensor, *, kernel: int, dilation: int
) -> Tensor:
    """NATTEN, one head, by the names of 0.17, the last that serves the CPU. What it fuses is for
    GPUs and takes maps (B, H, W, heads, C), the other functions take (B, heads, H, W, C)."""
    functional, window = _import_natten(), {"kernel_size": kernel, "dilation": dilation}
    query, key, value = (x.permute(0, 2, 3, 1) for x in (query, key, value))
    if query.device.type != "cpu":
        query, key, value = (x.unsqueeze(3) for x in (query, key, value))
        return functional.na2d(query, key, value, **window).squeeze(3).permute(0, 3, 1, 2)
    query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    logits = functional.na2d_qk(query * query.shape[4] ** -0.5, key, **window)
    context = functional.na2d_av(logits.softmax(dim=4), value, **window)
    return context.squeeze(1).permute(0, 3, 1, 2)


def _import_natten() -> ModuleType:
    """At its import 0.17 asks for the capability of a GPU, also where there is none, and for a name
    that torch no longer has."""
    absent = patch.object(torch.cuda, "get_device_capability", lambda *_: (0, 0))
    with (
        nullcontext() if torch.cuda.is_available() else absent,
        patch.object(torch.cuda, "_device_t", object, create=True),
    ):
        return importlib.import_module("natten.functional")


def cross_by_einsum(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> Tensor:
    """Query and key (B, C, H, W), value (B, Cv, H, W) -> (B, Cv, H, W)."""
    height = query.shape[2]
    query = query * (query.shape[1] ** -0.5 if scale is None else scale)
    itself = torch.eye(height, dtype=torch.bool, device=query.device)[:, None]
    column = torch.einsum("bchw,bciw->bhwi", query, key).masked_fill(itself, -torch.inf)
    row = torch.einsum("bchw,bchj->bhwj", query, key)
    weights = torch.cat([column, row], dim=3).softmax(dim=3)
    attended = torch.einsum("bhwi,bciw->bchw", weights[..., :height], value)
    return attended + torch.einsum("bhwj,bchj->bchw", weights[..., height:], value)


def cross_by_bmm(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """The recipe of CCNet's released code: every map is copied to columns and to rows."""
    batch, _, height, width = query.shape
    query = query * (query.shape[1] ** -0.5 if scale is None else scale)

    def columns(x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2).contiguous().view(batch * width, -1, height)

    def rows(x: Tensor) -> Tensor:
        return x.permute(0, 2, 1, 3).contiguous().view(batch * height, -1, width)

    itself = torch.eye(height, dtype=torch.bool, device=query.device)
    column = torch.bmm(columns(query).mT, columns(key)).masked_fill(itself, -torch.inf)
    column = column.view(batch, width, height, height).transpose(1, 2)
    row = torch.bmm(rows(query).mT, rows(key)).view(batch, height, width, width)
    weights = torch.cat([column, row], dim=3).softmax(dim=3)
    column = weights[..., :height].transpose(1, 2).contiguous().view(-1, height, height)
    row = weights[..., height:].contiguous().view(-1, width, width)
    column = torch.bmm(columns(value), column.mT).view(batch, width, -1, height)
    row = torch.bmm(rows(value), row.mT).view(batch, height, -1, width)
    return column.permute(0, 2, 3, 1) + row.permute(0, 2, 1, 3)


def fuse_levels(
    features: Sequence[Tensor], gates: Sequence[Tensor], align_corners: bool = False
) -> tuple[Tensor, ...]:
    """Maps (B, C, H_l, W_l) and gates (B, 1, H_l, W_l) -> fused maps.

    With the sum of all levels of a size, so that none is added up again for every other.
    """
    sent = [gate * x for x, gate in zip(features, gates, strict=True)]
    sums: dict[torch.Size, Tensor] = {}
    for x in sent:
        sums[x.shape[2:]] = sums[x.shape[2:]] + x if x.shape[2:] in sums else x
    totals = {
        size: sum(
            (resize(x, size, align_corners) for other, x in sums.items() if other != size), total
        )
        for size, total in sums.items()
    }
    return tuple(
        (1 + gate) * x + (1 - gate) * (totals[x.shape[2:]] - gated)
        for x, gate, gated in zip(features, gates, sent, strict=True)
    )


def fuse_by_convolutions(
    features: Sequence[Tensor], weight: Tensor, bias: Tensor
) -> tuple[Tensor, ...]:
    """Gates by 1 x 1 convolutions to one channel, and sigmoid."""
    gates = [
        F.conv2d(x, w[None, :, None, None], b[None]).sigmoid()
        for x, w, b in zip(features, weight, bias, strict=True)
    ]
    return fuse_levels(features, gates)


def fuse_by_sums(features: Sequence[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The same gates as sums of products, which a compiler can fuse."""
    gates = [
        ((x * w[:, None, None]).sum(dim=1, keepdim=True) + b).sigmoid()
        for x, w, b in zip(features, weight, bias, strict=True)
    ]
    return fuse_levels(features, gates)


def _axis_taps(size: int, labels: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Along an axis: the two positions around each pixel of the labels, the share of the second."""
    at = (torch.arange(labels, device=device, dtype=torch.float64) + 0.5) * (size / labels) - 0.5
    at = at.clamp(0, size - 1)
    low = at.floor().long()
    return low, (low + 1).clamp(max=size - 1), (at - low).float()


def category_means_as_released(features: Tensor, labels: Tensor, memory: Tensor) -> Tensor:
    """The procedure of MCIBI's released code: upsample, then class by class."""
    pixels = F.interpolate(features, labels.shape[1:], mode="bilinear", align_corners=False)
    pixels = pixels.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    labels = labels.flatten()
    means = torch.zeros_like(memory)
    for k in labels.unique().tolist():
        if k == IGNORED:
            continue
        members = pixels[labels == k]
        weights = 1 - F.cosine_similarity(members, memory[k].expand_as(members), dim=1)
        means[k] = ((weights / weights.sum())[:, None] * members).sum(dim=0)
    return means


def category_means_factorised(features: Tensor, labels: Tensor, memory: Tensor) -> Tensor:
    """The products of neighbours and with the memory on the features' own grid, and a matrix of
    coefficients (K, positions): nothing is upsampled but scalars."""
    batch, _, height, width = features.shape
    classes = len(memory)
    x = features.permute(0, 2, 3, 1).contiguous().float()  # squares need more than half precision
    up, low = x[:, :-1], x[:, 1:]

    def products_of(a: Tensor, b: Tensor) -> Tensor:
        """Of vectors; 0 where the map ends, and the share of the second is 0 too."""
        rows, columns = height - a.shape[1], width - a.shape[2]
        return F.pad((a * b).sum(dim=3), (0, columns, 0, rows)).flatten(1)

    squares = products_of(x, x)
    to_right = products_of(x[:, :, :-1], x[:, :, 1:])
    to_down = products_of(up, low)
    to_across = products_of(up[:, :, :-1], low[:, :, 1:])
    anti = products_of(up[:, :, 1:], low[:, :, :-1])
    products = x.flatten(1, 2) @ F.normalize(memory.float(), dim=1).t()
    top, bottom, v = _axis_taps(height, labels.shape[1], x.device)
    left, beside, u = _axis_taps(width, labels.shape[2], x.device)
    v = v[:, None]
    corners = [top[:, None] * width + left, top[:, None] * width + beside]
    corners += [bottom[:, None] * width + left, bottom[:, None] * width + beside]
    shares = [(1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u]
    a, b, c, d = shares
    square = sum(share * share * squares[:, at] for share, at in zip(shares, corners, strict=True))
    square = square + 2 * (
        a * b * to_right[:, corners[0]]
        + c * d * to_right[:, corners[2]]
        + a * c * to_down[:, corners[0]]
        + b * d * to_down[:, corners[1]]
        + a * d * to_across[:, corners[0]]
        + b * c * anti[:, corners[0]]
    )
    valid = labels != IGNORED
    labels = labels.masked_fill(~valid, 0)
    image = torch.arange(batch, device=x.device)[:, None, None]
    cosine = sum(
        share * products[image, at, labels] for share, at in zip(shares, corners, strict=True)
    )
    weights = (1 - cosine / square.clamp_min(0).sqrt().clamp_min(1e-8)) * valid
    coefficients = weights.new_zeros(batch, classes * height * width)
    for share, at in zip(shares, corners, strict=True):
        index = (labels * (height * width) + at).flatten(1)
        coefficients.scatter_add_(1, index, (weights * share).flatten(1))
    coefficients = coefficients.view(batch, classes, height * width)
    sums = (coefficients @ x.flatten(1, 2)).sum(dim=0)
    means = sums / coefficients.sum(dim=(0, 2)).clamp_min(1e-12)[:, None]
    return means.to(features.dtype)


def class_means_by_einsum(logits: Tensor, memory: Tensor) -> Tensor:
    """The rows (K, C) of a memory, averaged by the softmax of logits (B, K, H, W): (B, C, H, W)."""
    return torch.einsum("bkhw,kc->bchw", logits.softmax(dim=1), memory)


def class_means_by_convolution(logits: Tensor, memory: Tensor) -> Tensor:
    return F.conv2d(logits.softmax(dim=1), memory.t()[:, :, None, None])
