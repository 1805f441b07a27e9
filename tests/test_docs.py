# SPDX-License-Identifier: Apache-2.0
"""README and the pages: links lead somewhere, code compiles, tables say what is there."""

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import ctxops

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
# Their examples need neither files nor torchvision.
COMPLETE = [README, *(DOCS / f"{name}.md" for name in ("modules", "networks", "operators"))]
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages(paths):
    return pytest.mark.parametrize("page", paths, ids=lambda page: page.name)


def python_blocks(page):
    return [code for language, code in CODE.findall(page.read_text()) if language == "python"]


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def operators():
    functions = {name: getattr(ctxops, name) for name in ctxops.__all__ if name != "flop_formulas"}
    return [name for name, f in functions.items() if f.__module__.startswith("ctxops.ops.")]


def speeds():
    spec = importlib.util.spec_from_file_location("speeds", DOCS / "speeds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pages(PAGES)
def test_links(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.resolve().is_relative_to(ROOT), f"{link} leaves the repository"
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pages(PAGES)
def test_python_compiles(page):
    for code in python_blocks(page):
        ast.parse(code)


@pytest.mark.slow
@pages(COMPLETE)
def test_python_runs(page):
    """Each block by itself; results have the shapes that stand beside them."""
    pytest.importorskip("timm")
    for code in python_blocks(page):
        namespace = {}
        exec(code, namespace)
        for name, shape in re.findall(r"^(\w+) = .*  # (\([\d, *]+\))", code, re.MULTILINE):
            assert tuple(namespace[name].shape) == eval(shape), code


def test_every_page_is_linked():
    text = README.read_text()
    assert not [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text]


def test_two_commands():
    """Each on a line of its own; the gate takes the second one from README."""
    blocks = [code.splitlines() for _, code in CODE.findall(README.read_text())]
    commands = [block for block in blocks if any("venv" in line for line in block)]
    install = "python3 -m venv .venv && .venv/bin/pip install"
    assert commands == [
        [f'{install} ".[bench]" && .venv/bin/python benchmarks/nonlocal_vs_apnb.py'],
        [f'{install} ".[test]" && .venv/bin/pytest'],
    ]


def test_table_of_operators():
    section = README.read_text().partition("\n## Operators\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(listed) == sorted(operators())


def test_arguments_of_operators():
    (block,) = (
        code for kind, code in CODE.findall((DOCS / "operators.md").read_text()) if not kind
    )
    namespace = {}
    for line in block.splitlines():
        exec(f"def {line}: ...", namespace)
    del namespace["__builtins__"]
    assert sorted(namespace) == sorted(operators())
    for name, written in namespace.items():
        signatures = (inspect.signature(f).parameters for f in (written, getattr(ctxops, name)))
        expected, actual = (
            [(p.name, p.kind, p.default) for p in parameters.values()] for parameters in signatures
        )
        assert expected == actual, name


def test_tables_of_speeds():
    """To write them again: docs/speeds.py says how."""
    module = speeds()
    assert module.readme_table() in README.read_text()
    assert module.page() + "\n" == (DOCS / "speeds.md").read_text()
