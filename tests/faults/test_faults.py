# SPDX-License-Identifier: Apache-2.0
"""The list of deliberate faults still fits the sources. ``run.py`` injects them."""

from pathlib import Path

import pytest

from faults.faults import FAULTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_fits_its_file(fault):
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.new != fault.old
    files = [test for test in fault.tests if "/" in test]
    assert files
    assert all((ROOT / file).is_file() for file in files)


def test_faults_are_many_and_have_names_of_their_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 80
