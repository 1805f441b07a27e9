# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest

from covering import pairwise, product

AXES = [range(8), range(2), range(4), range(3)]


def test_any_two_values_of_two_axes_meet():
    chosen = pairwise(*AXES)
    for first, second in itertools.combinations(range(len(AXES)), 2):
        met = {(c[first], c[second]) for c in chosen}
        assert met == set(itertools.product(AXES[first], AXES[second]))
    # 192 combinations; no array with every pair of the two longest axes has fewer than 32.
    assert len(chosen) <= 36
    assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize(("axes", "count"), [((), 1), (([1, 2, 3],), 3), (([1], [2], []), 0)])
def test_few_axes(axes, count):
    assert len(pairwise(*axes)) == count


def test_the_whole_product_runs_with_the_slow_tests():
    rows = product(a=[1, 2, 3], b={"x": 4, "y": 5}, c=[True, False]).args[1]
    assert {row.values for row in rows} == set(itertools.product((1, 2, 3), (4, 5), (True, False)))
    quick = [row.values for row in rows if not row.marks]
    assert len(quick) == 6
    assert rows[0].id == "1-x-True"
