# SPDX-License-Identifier: Apache-2.0
"""Combinations of test parameters: all of them, of which the quick suite runs every pair once."""

import itertools
from collections.abc import Sequence

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


def product(**axes: Sequence):
    """Parametrizes a test with every combination of the axes' values.

    What :func:`pairwise` does not need is marked ``slow``: the quick suite runs a covering array,
    ``pytest --all`` the whole product. A dictionary's keys name its values.
    """
    names = [list(map(_name, axis)) for axis in axes.values()]
    values = [
        list(axis.values()) if isinstance(axis, dict) else list(axis) for axis in axes.values()
    ]
    quick = set(pairwise(*values))
    every = itertools.product(*(range(len(axis)) for axis in values))
    rows = [
        pytest.param(
            *(axis[i] for axis, i in zip(values, combination, strict=True)),
            id="-".join(axis[i] for axis, i in zip(names, combination, strict=True)),
            marks=() if combination in quick else pytest.mark.slow,
        )
        for combination in every
    ]
    return pytest.mark.parametrize(tuple(axes), rows)


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")
