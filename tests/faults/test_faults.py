# SPDX-License-Identifier: Apache-2.0
"""The list of deliberate faults, which ``run.py`` injects to see whether the tests notice them,
still fits the sources.
"""

from pathlib import Path

from faults.faults import FAULTS

ROOT = Path(__file__).parents[2]


def test_every_fault_fits_its_file():
    texts = {file: (ROOT / file).read_text() for file in {fault.file for fault in FAULTS}}
    assert not [fault.name for fault in FAULTS if texts[fault.file].count(fault.old) != 1]
    assert not [fault.name for fault in FAULTS if fault.new == fault.old]


def test_every_fault_has_tests():
    for fault in FAULTS:
        files = [argument for argument in fault.tests if "/" in argument]
        assert files, fault.name
        assert all((ROOT / file).is_file() for file in files), fault.name


def test_faults_are_many_and_have_names_of_their_own():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 80
