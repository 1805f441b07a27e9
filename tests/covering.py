# SPDX-License-Identifier: Apache-2.0
"""Combinations of test parameters: those in which any two or any three values meet.

A fault that shows needs two or three of its conditions at once, hardly ever more. The quick suite
runs every pair of values, ``pytest --all`` every triple.
"""

import itertools
from collections.abc import Callable, Sequence

import pytest


def covering(strength: int, *axes: Sequence) -> list[tuple[int, ...]]:
    """Combinations, as indices into the axes, in which any values of ``strength`` axes meet.

    Greedy: the next combination is the one with the most meetings that are missing, the first such
    one in the order of the product.
    """
    every = list(itertools.product(*(range(len(axis)) for axis in axes)))
    if len(axes) <= strength:
        return every
    # A set of meetings is an integer with a bit for each.
    bits: dict[tuple, int] = {}
    meetings = [
        sum(
            1 << bits.setdefault(meeting, len(bits))
            for meeting in itertools.combinations(enumerate(c), strength)
        )
        for c in every
    ]
    missing, chosen = (1 << len(bits)) - 1, []
    while missing:
        best = max(range(len(every)), key=lambda i: (meetings[i] & missing).bit_count())
        chosen.append(every[best])
        missing &= ~meetings[best]
    return chosen


def pairs(axes: Sequence[range]) -> list[tuple[int, ...]]:
    return covering(2, *axes)


def triples(axes: Sequence[range]) -> list[tuple[int, ...]]:
    return covering(3, *axes)


def values(axes: Sequence[range]) -> list[tuple[int, ...]]:
    return [tuple(i % len(axis) for axis in axes) for i in range(max(map(len, axes)))]


Choice = Callable[[Sequence[range]], Sequence[tuple[int, ...]]]


def chosen(quick: Choice, more: Choice = lambda axes: list(itertools.product(*axes)), **axes):
    """Parametrizes a test with combinations of the axes' values.

    ``quick`` says which of them, as indices, the quick suite runs; what ``more`` adds is marked
    ``slow``. A dictionary's keys name its values.
    """
    names = [list(map(_name, axis)) for axis in axes.values()]
    listed = [
        list(axis.values()) if isinstance(axis, dict) else list(axis) for axis in axes.values()
    ]
    indices = [range(len(axis)) for axis in listed]
    wanted = set(quick(indices))
    rows = [
        pytest.param(
            *(axis[i] for axis, i in zip(listed, combination, strict=True)),
            id="-".join(axis[i] for axis, i in zip(names, combination, strict=True)),
            marks=() if combination in wanted else pytest.mark.slow,
        )
        for combination in sorted(wanted | set(more(indices)))
    ]
    return pytest.mark.parametrize(tuple(axes), rows)


def product(**axes: Sequence | dict):
    """The quick suite runs a covering array of all pairs, ``pytest --all`` one of all triples."""
    return chosen(pairs, triples, **axes)


def each_value_once(**axes: Sequence | dict):
    """Where the pairs cost too much: the quick suite runs every value of every axis."""
    return chosen(values, pairs, **axes)


def first(**axes: Sequence | dict):
    """Where even that costs too much: the first value of every axis."""
    return chosen(lambda axes: [(0,) * len(axes)], pairs, **axes)


def none(**axes: Sequence | dict):
    return chosen(lambda axes: [], values, **axes)


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")
