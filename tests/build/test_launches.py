# SPDX-License-Identifier: Apache-2.0
"""docs/kernels.md has what the operators launch at the papers' shapes."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("launches", Path(__file__).with_name("launches.py"))
launches = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(launches)


@pytest.mark.skipif(launches.GXX is None, reason="needs g++")
def test_the_page_has_every_launch():
    """To write the page again: resources.py says how."""
    page = (launches.ROOT / "docs" / "kernels.md").read_text()
    operators = {part.partition("\n")[0]: part for part in page.split("\n## ")[1:]}
    found = launches.rows_of(launches.record())
    assert found.keys() == operators.keys()
    for operator, rows in found.items():
        table = operators[operator].partition("| case |")[2].splitlines()[2:]
        # Behind these columns stands what depends on ptxas.
        written = [line.split(" | ")[: len(rows[0])] for line in table if line]
        assert written == [["| " + row[0], *row[1:]] for row in rows]
