# SPDX-License-Identifier: Apache-2.0
"""Modules on a map in bands of rows, so that what they compute is never there at once.

A module takes part by two things. Its ``reach`` says how many rows above and below a position it
sees. What depends on all positions is no part of that: it is asked for by a function of this file
or by one that torch has for it (:class:`_Bands`). On a whole map these functions are what they say.
In bands the answer to the first one is gathered from all bands, and a second pass knows it; n such
steps take n + 1 passes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, wrap_torch_function

from ctxops import _operator
from ctxops.nn.pointwise import PointwiseConv2d
from ctxops.nn.resize import resize_like, resize_rows
from ctxops.ops.pyramid_pool import pyramid_pool

# These see one position, or are no more than their children.
_LOCAL = (nn.Dropout2d, nn.Identity, nn.ReLU, nn.Sequential)
# So do these with the statistics of training.
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def reach(*modules: nn.Module | None) -> float:
    """How many rows above and below a position these modules see, one after the other.

    What they ask of all rows does not count. Infinity: they can only be called on the whole map.
    """
    return sum(_reach(module) for module in modules if module is not None)


def _reach(module: Any) -> float:
    if module._compiled_call_impl is not None:
        return math.inf  # a compiler does not ask
    for kind in type(module).__mro__:
        if "reach" in vars(kind):
            return module.reach()
        if kind in (nn.Conv2d, PointwiseConv2d):
            seen = module.dilation[0] * (module.kernel_size[0] - 1)
            keeps_size = module.stride == (1, 1) and module.padding[0] * 2 == seen
            return seen // 2 if keeps_size else math.inf
        if kind in _NORMS:
            return math.inf if module.training or module.running_mean is None else 0
        if kind in _LOCAL:
            return reach(*module.children())
        if "forward" in vars(kind) or "predict" in vars(kind):
            break  # whatever a base class says holds for another forward
    return math.inf


@wrap_torch_function(lambda summand, *maps, **_: maps)
def total(
    summand: Callable[..., Tensor],
    *maps: Tensor,
    combine: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> Tensor:
    """``summand(*maps)``, where that of a map is ``combine`` of those of its bands."""
    return summand(*maps)


@wrap_torch_function(lambda maps, output_sizes: maps)
def average_pyramids(maps: Sequence[Tensor], output_sizes: Sequence[int]) -> list[Tensor]:
    """:func:`ctxops.pyramid_pool` of maps ``(B, C, H, W)``, each ``(B, C, S)``."""
    return [pyramid_pool(x, output_sizes) for x in maps]


@wrap_torch_function(lambda x: (x,))
def positions(x: Tensor) -> int:
    """How many positions a map ``(..., H, W)`` has."""
    return x.shape[-2] * x.shape[-1]


@wrap_torch_function(lambda x: (x,))
def softmax_over_positions(x: Tensor) -> Tensor:
    """The softmax of each channel ``(B, C, H, W)`` over all positions."""
    return x.flatten(2).softmax(dim=2).unflatten(2, x.shape[2:])


def map_in_bands(
    function: Callable[..., Tensor],
    maps: Sequence[Tensor],
    rows: int,
    halo: int,
    multiples: Sequence[int],
) -> Tensor:
    """``function(*maps)``, made of what it is on bands of ``rows`` rows.

    Args:
        function: takes maps to one of the size of the last; all its modules have a finite reach.
        maps: ``(B, C_l, H_l, W_l)``, each of all rows.
        rows: of a band of the last map; the strides in the modules divide it.
        halo: rows that each band has above and below besides; at least the modules' :func:`reach`,
            and the strides divide it too.
        multiples: how many rows of each map stand beside one of the last.
    """
    bands, height = _Bands(), maps[-1].shape[2]
    while True:
        done = []
        for top in range(0, height, rows):
            inputs = bands.begin(maps, top, top + rows, halo, multiples)
            try:
                with bands:
                    y = function(*inputs)
            except _Unanswered:
                continue
            done.append(bands.core(y).clone())
        if done:
            return torch.cat(done, dim=2)
        bands.answer()


class _Unanswered(Exception):  # noqa: N818
    """No error: the pass needs an answer that the bands do not have yet."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a band's map lies in the map of all rows."""

    first: int  # its first row, of the halo above
    top: int  # the rows that are the band's own: top to bottom - 1
    bottom: int
    height: int  # of the map of all rows


class _Bands(TorchFunctionMode):
    """Answers for a band what is asked of all rows.

    Maps of a band are known by their height and width.
    """

    def __init__(self) -> None:
        super().__init__()
        self._answers: list[Tensor] = []
        self._gathered: Tensor | None = None  # the next answer, as far as the bands have gone
        self._asked = 0
        self._places: dict[tuple[int, ...], _Place] = {}
        self._handlers: dict[object, Callable[..., Any]] = {
            total: self._total,
            average_pyramids: self._average_pyramids,
            positions: self._positions,
            softmax_over_positions: self._softmax,
            resize_like: self._resize_like,
            F.interpolate: self._resize,
            F.adaptive_avg_pool2d: self._average,
            F.group_norm: self._group_norm,
            torch.conv2d: self._convolve,
        }

    def begin(
        self, maps: Sequence[Tensor], top: int, bottom: int, halo: int, multiples: Sequence[int]
    ) -> list[Tensor]:
        """Goes to another band; its part of the maps."""
        self._asked, self._places = 0, {}
        first, end, height = max(top - halo, 0), bottom + halo, maps[-1].shape[2]
        parts = []
        for x, n in zip(maps, multiples, strict=True):
            parts.append(x[:, :, first * n : end * n])
            # The last band has what remains, which rounding may make more or less than a multiple.
            own = x.shape[2] if bottom >= height else bottom * n
            self._put(parts[-1], _Place(first * n, top * n, own, x.shape[2]))
        return parts

    def answer(self) -> None:
        """Ends a pass that was short of an answer."""
        assert self._gathered is not None
        self._answers.append(self._gathered)
        self._gathered = None

    def core(self, x: Tensor) -> Tensor:
        """The rows of a map ``(..., H, W)`` that are the band's own."""
        place = self._places[tuple(x.shape[-2:])]
        return x[..., place.top - place.first : place.bottom - place.first, :]

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return self._handlers.get(func, func)(*args, **(kwargs or {}))

    def _put(self, x: Tensor, place: _Place) -> None:
        known = self._places.setdefault(tuple(x.shape[-2:]), place)
        assert known == place, f"two maps of one size at {known} and {place}"

    def _total(
        self,
        summand: Callable[..., Tensor],
        *maps: Tensor,
        combine: Callable[[Tensor, Tensor], Tensor] = torch.add,
    ) -> Tensor:
        self._asked += 1
        if self._asked <= len(self._answers):
            return self._answers[self._asked - 1]
        part = summand(*map(self.core, maps))
        self._gathered = part if self._gathered is None else combine(self._gathered, part)
        raise _Unanswered

    def _average_pyramids(
        self, maps: Sequence[Tensor], output_sizes: Sequence[int]
    ) -> list[Tensor]:
        dtype = _operator.accumulator(maps[0].dtype)

        def sums(*cores: Tensor) -> Tensor:
            return torch.cat([pyramid(x, core) for x, core in zip(maps, cores, strict=True)], 1)

        def pyramid(x: Tensor, core: Tensor) -> Tensor:
            place = self._places[tuple(x.shape[-2:])]
            own = slice(place.top, place.bottom)
            grids = []
            for n in output_sizes:
                rows = _cells(n, place.height, x)[:, own]
                columns = _cells(n, x.shape[3], x)
                grids.append(torch.einsum("ih,bchw,jw->bcij", rows, core.to(dtype), columns))
            return torch.cat([grid.flatten(2) for grid in grids], dim=2)

        pooled = self._total(sums, *maps).split([x.shape[1] for x in maps], dim=1)
        return [p.to(x.dtype) for p, x in zip(pooled, maps, strict=True)]

    def _average(self, x: Tensor, output_size: int) -> Tensor:
        (pooled,) = self._average_pyramids([x], (output_size,))
        return pooled.unflatten(2, (output_size, output_size))

    def _positions(self, x: Tensor) -> int:
        return self._places[tuple(x.shape[-2:])].height * x.shape[-1]

    def _softmax(self, x: Tensor) -> Tensor:
        wide = x.to(_operator.accumulator(x.dtype))  # a sum of half precision may leave the range
        normaliser = self._total(
            lambda x: x.logsumexp((2, 3), keepdim=True), wide, combine=torch.logaddexp
        )
        return (wide - normaliser).exp().to(x.dtype)

    def _group_norm(
        self,
        x: Tensor,
        groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        def moments(x: Tensor) -> Tensor:
            grouped = x.unflatten(1, (groups, -1)).double()
            return torch.stack([(grouped**power).sum((2, 3, 4)) for power in range(3)])

        count, first, second = self._total(moments, x)
        mean = first / count
        gain = (second / count - mean**2).clamp_min(0).add(eps).rsqrt()
        gain, mean = (
            y.to(_operator.accumulator(x.dtype))[:, :, None, None, None] for y in (gain, mean)
        )
        y = ((x.unflatten(1, (groups, -1)) - mean) * gain).flatten(1, 2)
        if weight is not None:
            y = y * weight[:, None, None]
        if bias is not None:
            y = y + bias[:, None, None]
        return y.to(x.dtype)

    def _resize_like(self, x: Tensor, like: Tensor, align_corners: bool) -> Tensor:
        """Of a grid that stands for the whole image."""
        return self._rows(x, like.shape[2:], align_corners)

    def _resize(
        self, x: Tensor, size: Sequence[int], *, mode: str, align_corners: bool, **_: Any
    ) -> Tensor:
        """Of a band's map to another one's size."""
        assert mode == "bilinear", mode
        return self._rows(x, size, align_corners, self._places[tuple(x.shape[2:])])

    def _rows(
        self, x: Tensor, size: Sequence[int], align_corners: bool, source: _Place | None = None
    ) -> Tensor:
        place, (height, width) = self._places[tuple(size)], size
        rows = range(place.first, place.first + height)
        first, of = (0, x.shape[2]) if source is None else (source.first, source.height)
        return resize_rows(x, (place.height, width), rows, align_corners, first=first, height=of)

    def _convolve(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        *args: Any,
        **options: Any,
    ) -> Tensor:
        """Those with a stride have no padding: see ``reach``."""
        y = torch.conv2d(x, weight, bias, stride, *args, **options)
        place = self._places.get(tuple(x.shape[2:]))
        step = stride if isinstance(stride, int) else stride[0]
        if step > 1 and place is not None:
            height = (place.height - weight.shape[2]) // step + 1
            own = height if place.bottom == place.height else place.bottom // step
            self._put(y, _Place(place.first // step, place.top // step, own, height))
        return y


def _cells(n: int, length: int, like: Tensor) -> Tensor:
    """``(n, length)``: what each position counts in the average of each of n cells."""
    start = torch.arange(n, device=like.device)[:, None] * length
    position = torch.arange(length, device=like.device)
    cells = (position >= start // n) & (position < -(-(start + length) // n))
    return cells / cells.sum(1, keepdim=True, dtype=_operator.accumulator(like.dtype))
