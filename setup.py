# SPDX-License-Identifier: Apache-2.0
"""Builds the extension by calling CMake, and places models/. The rest is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def missing_tools() -> list[str]:
    """The build tools that pip has to fetch. They are large, and many machines have them."""
    missing = []
    for tool, least in (("cmake", (3, 24)), ("ninja", (1, 10))):
        try:
            output = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
        except OSError:
            output = ""
        found = re.search(r"(\d+)\.(\d+)", output)
        if not found or tuple(map(int, found.groups())) < least:
            missing.append(f"{tool}>={least[0]}.{least[1]}")
    return missing


class FreshBuild(build):
    """Starts from nothing: what an earlier build left would ship files that were deleted since."""

    def run(self) -> None:
        shutil.rmtree(self.build_base, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """``ctxops._C`` through CMake and ninja, configured afresh every time.

    A build tree that an earlier, isolated build left behind names tools that are gone.
    """

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        tree = (Path(self.build_temp) / "cmake").resolve()
        shutil.rmtree(tree, ignore_errors=True)
        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "PYBIND11_FINDPYTHON": "NEW",
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        for name in ("CTXOPS_CUDA", "CTXOPS_CUDA_ARCHS", "CTXOPS_WERROR"):
            if name in os.environ:
                options[name] = os.environ[name]
        configure = [f"-D{name}={value}" for name, value in options.items() if value]
        subprocess.run(["cmake", "-S", ROOT, "-B", tree, "-G", "Ninja", *configure], check=True)
        subprocess.run(["cmake", "--build", tree], check=True)


setup(
    # pip asks for these when it prepares the isolated environment of the build.
    setup_requires=missing_tools(),
    # models/ stands at the top of the tree and is a package of ctxops. The link to it in ctxops/ is
    # for editors and type checkers: not every copy of the tree has it.
    packages=[
        *find_packages(include=["ctxops", "ctxops.*"], exclude=["ctxops.models*"]),
        "ctxops.models",
        *(f"ctxops.models.{name}" for name in find_packages("models")),
    ],
    package_dir={"ctxops.models": "models"},
    ext_modules=[Extension("ctxops._C", sources=[])],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
)
