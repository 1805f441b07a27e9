# SPDX-License-Identifier: Apache-2.0
"""A deliberate fault, and the tests that are responsible for the file that it is in."""

from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    file: str
    effect: str  # what a user sees of it
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]  # arguments of pytest: files, perhaps with -k


def faults_in(file: str, tests: str, *faults: tuple[str, str, str, str]) -> list[Fault]:
    return [Fault(name, file, *rest, tuple(tests.split())) for name, *rest in faults]
