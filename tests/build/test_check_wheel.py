# SPDX-License-Identifier: Apache-2.0
import importlib.util
import shutil
import zipfile
from pathlib import Path

import pytest

from ctxops import _native

pytestmark = pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")


@pytest.fixture
def check_wheel(monkeypatch):
    path = Path(__file__).parent / "check_wheel.py"
    spec = importlib.util.spec_from_file_location("check_wheel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # This system may be newer than those that the wheel is for.
    monkeypatch.setattr(module, "BOUNDS", dict.fromkeys(module.BOUNDS, "999"))
    return module


def wheel(folder, *files):
    with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        for file in files:
            archive.write(file, f"ctxops/{Path(file).name}")
    return folder / "a.whl"


def test_what_is_new_enough_passes(check_wheel, tmp_path, capsys):
    assert check_wheel.check(wheel(tmp_path, _native.extension.__file__)) == []
    assert " needs GLIBC 2." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["GLIBC", "GLIBCXX", "CXXABI"])
def test_what_is_too_new_fails(name, check_wheel, tmp_path):
    check_wheel.BOUNDS[name] = "1.2.3"
    (problem,) = check_wheel.check(wheel(tmp_path, _native.extension.__file__))
    assert f"needs {name} " in problem
    assert problem.endswith("newer than 1.2.3")


def test_other_libraries_and_no_extension_fail(check_wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(check_wheel, "LIBRARIES", check_wheel.LIBRARIES - {"libgomp.so.1"})
    (problem,) = check_wheel.check(wheel(tmp_path, _native.extension.__file__))
    assert problem.endswith("needs libgomp.so.1")
    (problem,) = check_wheel.check(wheel(tmp_path, __file__))
    assert problem == "a.whl has no extension"


def test_what_the_wheel_lacks_is_named(check_wheel, tmp_path):
    root = check_wheel.ROOT
    lacking = check_wheel.left_out(wheel(tmp_path, root / "ctxops/__init__.py"))
    assert "ctxops/__init__.py" not in lacking
    expected = {"ctxops/nn/cbr.py", "ctxops/models/fcn.py", "ctxops/models/recipes/scenes.yaml"}
    assert expected <= set(lacking)
