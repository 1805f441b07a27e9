# SPDX-License-Identifier: Apache-2.0
"""The feature memory of MCIBI: one vector per category, gathered over the whole data set."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops import _operator
from ctxops._checks import check_choice, check_maps, check_sizes
from ctxops.ops.category_statistics import category_statistics

Momentum = Literal["poly", "constant", "lr"]
Init = Literal["random", "mean", "clustering"]
Sync = Literal["statistics", "reference", None]
# How many random pixels of a category its first row is made from.
_PIXELS = {"random": 1, "mean": 0, "clustering": 64}
_CLUSTERING_ROUNDS = 10
# Pixels whose weights, 1 - cosine, are that small on average are parallel to their row: in float32
# a cosine is known to about 1e-7.
_PARALLEL = 1e-6


class _Group:
    """A process group, which cannot be copied or saved: copies share it, and files leave it out."""

    def __init__(self, group: "dist.ProcessGroup | None") -> None:
        self.group = group

    def __deepcopy__(self, memo: dict) -> "_Group":
        return self

    def __reduce__(self) -> tuple:
        return _Group, (None,)


class FeatureMemory(nn.Module):
    r"""One vector per category: a moving average of the features of the category's pixels.

    .. math::
        M_k \leftarrow (1 - m) M_k + m\, T_k, \qquad
        T_k = \frac{\sum_{p:\, l_p = k} a_p r_p}{\sum_{p:\, l_p = k} a_p}, \qquad
        a_p = 1 - \cos(r_p, M_k)

    where r is the map of features, resized bilinearly to the labels l, as in
    :func:`ctxops.category_statistics`. The momentum m weighs what is new.

    ``forward(features, labels, lr=None, generator=None)`` is one such step and returns nothing. It
    is meant for training and does not look at the module's mode. A category that is met for the
    first time gets its row from ``init`` instead. A row stays where the category is absent, or
    where its pixels are all parallel to it, so that the weights sum to nothing. NaN in the features
    of a category, and on CUDA labels out of range, make the row NaN.

    Args:
        num_classes: categories K.
        channels: C.
        momentum: "poly": :math:`m = (1 - t / T)^p (m_0 - m_0 / 100) + m_0 / 100` with t the steps
            done before, the last value after T of them. "constant": m_0. "lr": m_0 * lr / base_lr,
            with the ``lr`` that each step is given (the others ignore it): a number or a tensor ().
            A tensor outside of [0, base_lr / m_0] makes rows NaN, since looking at it would mean to
            wait for the device. Compiled code of torch 2.8 is compiled anew for every number.
        base_momentum: m_0.
        total_steps: T, of "poly".
        power: p, of "poly".
        base_lr: the learning rate that belongs to m_0, of "lr".
        init: a category's first row. "random": the features of one of its pixels, any of them as
            likely. "mean": the plain mean of all. "clustering": 64 such pixels are parted into two
            clusters by spherical k-means; the row is the mean direction of the larger one, times
            the mean length of its members. The random numbers come from ``generator``, None: the
            global one.
        cosine: without it a_p = 1 (the ablation of Table 2).
        sync: what processes do in a step where torch.distributed runs. "statistics": sums, weights
            and counts of all are added before the mean is formed, and all draw the same random
            pixels (with the numbers of the first process): the step of one process that sees all
            their batches, equal to the bit on all of them. "reference": what the released code
            does. Each makes the step on its own batch, then the memories are averaged, also with
            those of processes that did not meet the category: these pull the row towards what it
            was, and a new row towards zero. None: each for itself.
        process_group: who takes part, None: all. A copy has the same; a saved module has None.
        ignore_index: the label of pixels that are left out.
        align_corners: of the bilinear resize.

    Buffers, none of which is trained: ``memory (K, C)``, float32 also after ``.half()`` or
    ``.double()``, because a small step is lost in fewer bits, and zero for rows without value;
    ``step ()``, int64, the number of steps so far, those without any labelled pixel included.
    ``initialized (K,)``, bool, is read from ``memory``: a row of zeros holds nothing. Both buffers
    may be averaged over models. A step writes in place: what uses ``memory`` in a graph before the
    step and runs backward after it takes ``memory.clone()``; torch raises otherwise.

    Shape: features ``(B, C, h, w)``, integer labels ``(B, H, W)`` in ``[0, K)`` or
        ``ignore_index``.

    Raises:
        TypeError: arguments of another type, no floating features, no integer labels.
        ValueError: sizes below 1, unknown names, a momentum outside [0, 1], what the chosen
            ``momentum`` needs and did not get, shapes or devices that do not fit, on the CPU a
            label out of range.

    Source: Jin et al., Mining Contextual Information Beyond Image, ICCV 2021, section 3.2, eq. 6 to
    10, Table 2. The released code has "mean" for its ``init``, and "reference" for its ``sync``.
    The paper clusters without saying how; "clustering" is our reading.

    Gradients: none; nothing flows into the features.
    Deterministic: yes, given the state of the generator. No step waits for the device, not even to
        learn that no category is new: every step looks for the first row's pixels and clusters.
    Memory: that of the operator; then, unless ``init`` is "mean", 8 * B * H * (2 * W + 3 * K) bytes
        to find the pixels, and with "clustering" about 64 * K * max(14 * W, 24 * C) more.
    """

    memory: Tensor
    step: Tensor

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        momentum: Momentum = "poly",
        base_momentum: float = 0.9,
        total_steps: int | None = None,
        power: float = 0.9,
        base_lr: float | None = None,
        init: Init = "random",
        cosine: bool = True,
        sync: Sync = "statistics",
        process_group: "dist.ProcessGroup | None" = None,
        ignore_index: int = 255,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(num_classes=num_classes, channels=channels)
        check_choice("momentum", momentum, Momentum)
        check_choice("init", init, Init)
        check_choice("sync", sync, Sync)
        _check_numbers(base_momentum=base_momentum, power=power)
        if not 0 <= base_momentum <= 1:
            raise ValueError(f"base_momentum must be in [0, 1], got {base_momentum}")
        if not power >= 0:
            raise ValueError(f"power must be at least 0, got {power}")
        if momentum == "poly":
            if total_steps is None:
                raise ValueError("total_steps must be given for momentum='poly', got None")
            check_sizes(total_steps=total_steps)
        if momentum == "lr":
            if base_lr is None:
                raise ValueError("base_lr must be given for momentum='lr', got None")
            _check_numbers(base_lr=base_lr)
            if not base_lr > 0:
                raise ValueError(f"base_lr must be above 0, got {base_lr}")
        self.num_classes, self.channels = num_classes, channels
        self.momentum, self.base_momentum = momentum, base_momentum
        self.total_steps, self.power, self.base_lr = total_steps, power, base_lr
        self.init, self.cosine = init, cosine
        self.sync, self._group = sync, _Group(process_group)
        self.ignore_index, self.align_corners = ignore_index, align_corners
        memory = torch.zeros(num_classes, channels, dtype=torch.float32)
        self.register_buffer("memory", memory)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_pre_hook(FeatureMemory._drop_initialized)

    @property
    def initialized(self) -> Tensor:
        """Which rows hold something: ``(K,)``, bool."""
        return (self.memory != 0).any(dim=1)

    @property
    def process_group(self) -> "dist.ProcessGroup | None":
        return self._group.group

    def _drop_initialized(self, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        """Earlier checkpoints hold what the memory itself tells."""
        state_dict.pop(f"{prefix}initialized", None)

    def extra_repr(self) -> str:
        momentum = {"poly": f", total_steps={self.total_steps}, power={self.power}"}
        momentum["lr"] = f", base_lr={self.base_lr}"
        return (
            f"{self.num_classes}, {self.channels}, momentum={self.momentum!r}, "
            f"base_momentum={self.base_momentum}{momentum.get(self.momentum, '')}, "
            f"init={self.init!r}, cosine={self.cosine}, sync={self.sync!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def move(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        return super()._apply(move, recurse)

    @torch.no_grad()
    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        lr: float | Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        check_maps(features=(features, self.memory.shape[1]))
        momentum = self._momentum(lr)
        sums, weights, counts = category_statistics(
            features,
            labels,
            self.memory if self.cosine else None,
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
        )
        processes = self._processes()
        together = processes > 1 and self.sync == "statistics"
        draws = torch.rand(
            (self.num_classes, _PIXELS[self.init]),
            dtype=torch.float64,
            device=features.device,
            generator=generator,
        )
        before = torch.zeros_like(counts)
        if together:
            draws, before, counts = self._share_draws(draws, counts, processes)
        # The pixels of a category are numbered through all images of all processes.
        numbers = (draws * counts[:, None]).long() - before[:, None]
        pixels = self._pixels(features, labels, numbers)
        parts = [sums, weights[:, None], pixels.flatten(1)]
        statistics = torch.cat([part.double() for part in parts], dim=1)
        if together:
            dist.all_reduce(statistics, group=self.process_group)
        self._update(statistics, counts, momentum)
        if processes > 1 and self.sync == "reference":
            self._average(processes)

    def _momentum(self, lr: float | Tensor | None) -> float | Tensor:
        """m of this step: a number, or a float64 tensor ()."""
        if self.momentum == "constant":
            return self.base_momentum
        if self.momentum == "lr":
            if lr is None:
                raise ValueError("lr must be given for momentum='lr', got None")
            if isinstance(lr, Tensor):
                if lr.dim() != 0:
                    raise ValueError(f"lr must be a number or have shape (), got {tuple(lr.shape)}")
                given = self.base_momentum * lr.double() / self.base_lr
                return given.where((given >= 0) & (given <= 1), torch.nan)
            _check_numbers(lr=lr)
            momentum = self.base_momentum * lr / self.base_lr
            if not 0 <= momentum <= 1:
                raise ValueError(
                    "lr must make a momentum, base_momentum * lr / base_lr, in [0, 1], got "
                    f"{self.base_momentum} * {lr} / {self.base_lr} = {momentum}"
                )
            return momentum
        last = self.base_momentum / 100
        left = 1 - (self.step.double() / self.total_steps).clamp_max(1)
        return left**self.power * (self.base_momentum - last) + last

    def _processes(self) -> int:
        if self.sync is None or not dist.is_available() or not dist.is_initialized():
            return 1
        return dist.get_world_size(self.process_group)

    def _share_draws(
        self, draws: Tensor, counts: Tensor, processes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The first process's draws; each category's pixels in earlier processes, and in all."""
        rank = dist.get_rank(self.process_group)
        # Doubles hold counts up to 2 ** 53, and both travel at once.
        table = draws.new_zeros((self.num_classes, processes + draws.shape[1]))
        table[:, rank] = counts.double()
        if rank == 0:
            table[:, processes:] = draws
        dist.all_reduce(table, group=self.process_group)
        every = table[:, :processes].long()
        return table[:, processes:], every[:, :rank].sum(1), every.sum(1)

    def _pixels(self, features: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
        """Pixels of each category by their numbers (K, S) -> (K, S, C), zeros for those not here.

        The labels' lines are counted first, so that only one line per number is looked through.
        """
        dtype = _operator.accumulator(features.dtype)
        if features.shape[0] == 0 or numbers.shape[1] == 0:
            return features.new_zeros((*numbers.shape, features.shape[1]), dtype=dtype)
        height, width = labels.shape[1:]
        # Categories are columns from 1 on, between all that lies below and all that lies above. One
        # that is ignored may keep its pixels: its row, of no weight, stays anyway.
        labels = labels.flatten(0, 1).long().clamp(-1, self.num_classes).add_(1)
        counts = labels.new_zeros((labels.shape[0], self.num_classes + 2))
        counts.scatter_add_(1, labels, labels.new_ones(()).expand_as(labels))
        counts = counts[:, 1:-1].T.contiguous()
        ends = counts.cumsum(1)
        last = labels.shape[0] - 1
        line = torch.searchsorted(ends, numbers.contiguous(), right=True).clamp_max(last)
        number_in_line = numbers - (ends - counts).gather(1, line)
        categories = torch.arange(1, self.num_classes + 1, device=labels.device)
        passed = (labels[line] == categories[:, None, None]).cumsum(2, dtype=torch.int32)
        column = (passed <= number_in_line[:, :, None]).sum(2).clamp_max(width - 1)
        image, row = line // height, line % height
        rows = self._taps(row, features.shape[2], height)
        columns = self._taps(column, features.shape[3], width)
        pixels = sum(
            features[image, :, y, x].to(dtype) * (wy * wx).to(dtype)[:, :, None]
            for y, wy in rows
            for x, wx in columns
        )
        here = (numbers >= 0) & (numbers < ends[:, -1:])
        return torch.where(here[:, :, None], pixels, 0)

    def _taps(self, target: Tensor, source: int, size: int) -> list[tuple[Tensor, Tensor]]:
        """The two positions of an axis of the map, with weights, that one of the labels sees."""
        if self.align_corners:
            position = target.double() * ((source - 1) / max(size - 1, 1))
        else:
            position = ((target + 0.5).double() * (source / size) - 0.5).clamp_min(0)
        low = position.long().clamp_max(source - 1)
        weight = position - low
        return [(low, 1 - weight), ((low + 1).clamp_max(source - 1), weight)]

    def _update(self, statistics: Tensor, counts: Tensor, momentum: float | Tensor) -> None:
        """Statistics (K, C + 1 + S * C): sums, weights and pixels; counts (K,)."""
        channels = self.memory.shape[1]
        sums, weights = statistics[:, :channels], statistics[:, channels]
        means = sums / weights[:, None]
        first = means
        if self.init != "mean":
            pixels = statistics[:, channels + 1 :].unflatten(1, (-1, channels))
            first = pixels[:, 0] if self.init == "random" else _largest_cluster(pixels)
            # Of NaN in other pixels, and of labels out of range on CUDA, the chosen cannot tell.
            first = torch.where(means.isnan(), means, first)
        moved = (1 - momentum) * self.memory.double() + momentum * means
        rows = torch.where(self.initialized[:, None], moved, first)
        # Not the other way round: NaN must not stay.
        stays = weights <= _PARALLEL * counts
        self.memory.copy_(torch.where(stays[:, None], self.memory.double(), rows))
        self.step.add_(1)

    def _average(self, processes: int) -> None:
        table = self.memory / processes
        dist.all_reduce(table, group=self.process_group)
        self.memory.copy_(table)


def _largest_cluster(pixels: Tensor) -> Tensor:
    """Each category's pixels (K, S, C), in float64 -> (K, C), by spherical 2-means.

    The first centres are the pixel that is least like the mean direction, and what is least like
    that pixel.
    """
    lengths = pixels.norm(dim=2, keepdim=True)
    directions = F.normalize(pixels, dim=2)

    def least_like(centre: Tensor) -> Tensor:
        """(K, C) -> the direction least like it, (K, 1, C)."""
        index = (directions @ centre[:, :, None]).argmin(1, keepdim=True)
        return directions.gather(1, index.expand(-1, -1, directions.shape[2]))

    second = least_like(directions.mean(1))
    centres = torch.cat([least_like(second[:, 0]), second], dim=1)
    for _ in range(_CLUSTERING_ROUNDS):
        similarities = directions @ centres.mT
        nearest = similarities.argmax(2, keepdim=True)
        members = torch.cat([nearest == 0, nearest == 1], dim=2).to(pixels.dtype)
        centres = F.normalize(members.mT @ directions, dim=2)
    sizes = members.sum(1)
    mean_lengths = (members.mT @ lengths) / sizes[:, :, None]
    largest = sizes.argmax(1)[:, None, None].expand(-1, 1, pixels.shape[2])
    return (centres * mean_lengths).gather(1, largest)[:, 0]


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(
            number, (int, float, torch.SymInt, torch.SymFloat)
        ):
            raise TypeError(f"{name} must be a number, got {number!r}")
