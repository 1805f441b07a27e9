# SPDX-License-Identifier: Apache-2.0
"""The defaults are a part of what a function is: most callers give nothing else.

python tests/test_defaults.py > tests/defaults.txt
"""

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import ctxops
import ctxops.nn

FILE = Path(__file__).with_name("defaults.txt")


def lines() -> Iterator[str]:
    """A line for each public function, module and network that has any."""
    from ctxops.models import list_models, model_options

    for module in (ctxops, ctxops.nn):
        for name in filter(lambda name: callable(getattr(module, name)), module.__all__):
            parameters = inspect.signature(getattr(module, name)).parameters.items()
            defaults = {n: p.default for n, p in parameters if p.default is not p.empty}
            if defaults:
                yield _line(f"{module.__name__}.{name}", defaults)
    for name in list_models():
        yield _line(f"create_model({name!r})", model_options(name))


def _line(name: str, defaults: Mapping[str, object]) -> str:
    shown = ((n, v.__name__ if isinstance(v, type) else repr(v)) for n, v in defaults.items())
    return f"{name}: {', '.join(f'{n}={v}' for n, v in shown)}"


def test_defaults():
    pytest.importorskip("timm")
    assert list(lines()) == FILE.read_text().splitlines()


if __name__ == "__main__":
    print(*lines(), sep="\n")
