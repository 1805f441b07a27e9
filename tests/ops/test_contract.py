# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest

import ctxops
from ops.contract import OperatorContract, each_value_once, first

HERE = Path(__file__).parent
OPERATORS = sorted(path.parent.name for path in Path(ctxops.__file__).parent.glob("ops/*/op.py"))


@pytest.mark.parametrize("stem", OPERATORS)
def test_every_operator_takes_the_contract(stem):
    source = (HERE / f"test_{stem}.py").read_text()
    assert re.search(r"^class Test\w+\(OperatorContract\):", source, re.MULTILINE)


def test_there_are_operators():
    assert len(OPERATORS) >= 9


def test_only_tests_of_the_contract_are_switched_off():
    with pytest.raises(AssertionError, match="the contract has no test_of_nothing"):
        type("Wrong", (OperatorContract,), {"without": {"test_of_nothing": "a slip"}})


class _Metafunc:
    def __init__(self, name):
        self.function = getattr(OperatorContract, name)
        self.fixturenames = self.function.__code__.co_varnames[: self.function.__code__.co_argcount]


def test_no_test_runs_on_nothing():
    empty = type("Empty", (OperatorContract,), {"cases": [], "errors": []})()
    for name in ("test_values_and_gradients", "test_bad_input"):
        with pytest.raises(AssertionError, match="Empty has nothing for the argument"):
            empty.pytest_generate_tests(_Metafunc(name))


@pytest.mark.parametrize(("choice", "count"), [(each_value_once, 3), (first, 1)])
def test_what_the_quick_suite_chooses(choice, count):
    rows = choice(a=[1, 2], b={"x": 3, "y": 4, "z": 5}).args[1]
    quick = [row.values for row in rows if not row.marks]
    assert (len(rows), len(quick), quick[0]) == (6, count, (1, 3))
    assert choice is first or {a for a, _ in quick} == {1, 2}
    assert choice is first or {b for _, b in quick} == {3, 4, 5}
