# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest

from covering import covering, each_value_once, product

AXES = [range(8), range(2), range(4), range(3)]


# Of the 192 combinations no array with every pair of the two longest axes has fewer than 32, and
# none with every triple of the three longest fewer than 96.
@pytest.mark.parametrize(("strength", "most"), [(2, 36), (3, 110)])
def test_any_values_of_as_many_axes_meet(strength, most):
    chosen = covering(strength, *AXES)
    for places in itertools.combinations(range(len(AXES)), strength):
        met = {tuple(c[i] for i in places) for c in chosen}
        assert met == set(itertools.product(*(AXES[i] for i in places)))
    assert len(chosen) <= most
    assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize(("axes", "count"), [((), 1), (([1, 2, 3],), 3), (([1], [2], []), 0)])
def test_few_axes(axes, count):
    assert len(covering(2, *axes)) == count


def test_the_slow_tests_add_what_is_missing():
    axes = {"a": [1, 2, 3], "b": {"x": 4, "y": 5}, "c": [True, False]}
    every = set(itertools.product((1, 2, 3), (4, 5), (True, False)))
    rows = product(**axes).args[1]
    assert {row.values for row in rows} == every
    assert len([row for row in rows if not row.marks]) == 6
    assert rows[0].id == "1-x-True"
    rows = each_value_once(**axes).args[1]
    assert {(1, 4, True), (2, 5, False)} < {row.values for row in rows if not row.marks}
    assert len(rows) < len(every)
