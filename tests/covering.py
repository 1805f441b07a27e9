# SPDX-License-Identifier: Apache-2.0
"""Combinations of test parameters: all of them, of which the quick suite runs every pair once."""

import itertools
from collections.abc import Callable, Sequence

import pytest


def pairwise(*axes: Sequence) -> list[tuple[int, ...]]:
    """Combinations, as indices into the axes, in which any two values of two axes meet.

    Greedy: the next combination is the one with the most pairs that have not met, the first such
    one in the order of the product.
    """
    every = list(itertools.product(*(range(len(axis)) for axis in axes)))
    if len(axes) < 2:
        return every
    # A set of pairs is an integer with a bit for each.
    bits: dict[tuple, int] = {}
    pairs = [
        sum(
            1 << bits.setdefault(pair, len(bits))
            for pair in itertools.combinations(enumerate(c), 2)
        )
        for c in every
    ]
    missing, chosen = (1 << len(bits)) - 1, []
    while missing:
        best = max(range(len(every)), key=lambda i: (pairs[i] & missing).bit_count())
        chosen.append(every[best])
        missing &= ~pairs[best]
    return chosen


def chosen(quick: Callable[[list[range]], Sequence[tuple[int, ...]]], **axes: Sequence | dict):
    """Parametrizes a test with every combination of the axes' values.

    ``quick`` says which of them, as indices, the quick suite runs; the rest are marked ``slow``. A
    dictionary's keys name its values.
    """
    names = [list(map(_name, axis)) for axis in axes.values()]
    values = [
        list(axis.values()) if isinstance(axis, dict) else list(axis) for axis in axes.values()
    ]
    indices = [range(len(axis)) for axis in values]
    wanted = set(quick(indices))
    rows = [
        pytest.param(
            *(axis[i] for axis, i in zip(values, combination, strict=True)),
            id="-".join(axis[i] for axis, i in zip(names, combination, strict=True)),
            marks=() if combination in wanted else pytest.mark.slow,
        )
        for combination in itertools.product(*indices)
    ]
    return pytest.mark.parametrize(tuple(axes), rows)


def product(**axes: Sequence | dict):
    """The quick suite runs a covering array of all pairs, ``pytest --all`` the whole product."""
    return chosen(lambda indices: pairwise(*indices), **axes)


def each_value_once(**axes: Sequence | dict):
    """Where the pairs cost too much: the quick suite runs every value of every axis."""

    def quick(indices):
        return [tuple(i % len(axis) for axis in indices) for i in range(max(map(len, indices)))]

    return chosen(quick, **axes)


def first(**axes: Sequence | dict):
    """Where even that costs too much: the first value of every axis."""
    return chosen(lambda indices: [(0,) * len(indices)], **axes)


def none(**axes: Sequence | dict):
    return chosen(lambda indices: [], **axes)


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")
