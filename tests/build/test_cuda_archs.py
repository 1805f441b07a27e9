# SPDX-License-Identifier: Apache-2.0
"""Which GPUs the build makes machine code for: configured only, with an nvidia-smi of ours."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEFAULT = "80 86-real 90-real"

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("nvcc", "cmake", "ninja")),
    reason="needs nvcc, cmake and ninja",
)


@pytest.fixture(scope="module")
def configure(tmp_path_factory):
    """Configures one tree anew, which spares the search for the compilers."""
    folder = tmp_path_factory.mktemp("cuda_archs")
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.touch(0o755)
    environment = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    # Nothing is compiled: in place of pybind11 and Python's headers what CMakeLists.txt calls.
    (folder / "pybind11Config.cmake").write_text(
        "function(pybind11_add_module name module no_extras)\n"
        "  add_library(${name} MODULE ${ARGN})\n"
        "endfunction()\n"
    )
    (folder / "pybind11ConfigVersion.cmake").write_text("set(PACKAGE_VERSION_COMPATIBLE TRUE)\n")
    command = ["cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja"]
    command += ["-DCTXOPS_CUDA=ON", f"-Dpybind11_DIR={folder}"]

    def run(nvidia_smi, archs=""):
        """What the extension will say that it was built for, build.ninja, and CMake's messages."""
        tool.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        done = subprocess.run(
            [*command, f"-DCTXOPS_CUDA_ARCHS={archs}"],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        ninja = (folder / "build" / "build.ninja").read_text()
        (named,) = set(re.findall(r'-DCTXOPS_CUDA_ARCHS="?\\"([^"\\]*)\\"', ninja))
        return named, ninja, done.stdout

    return run


@pytest.mark.parametrize(
    ("nvidia_smi", "archs", "said"),
    [
        ("echo 9.0", "90", "the GPUs of this machine"),
        ("echo 8.9; echo 8.0; echo 8.9", "80 89-real", "the GPUs of this machine"),
        ("echo 12.0; echo 9.0", "90 120-real", "the GPUs of this machine"),
        ("echo 7.0", DEFAULT, "compute capability 7.0, they need 8.0"),
        ("echo 7.0; echo 8.6", "86", "compute capability 7.0, they need 8.0"),
        ("echo 99.0", DEFAULT, "nvcc does not know compute capability 99.0"),
        ("echo 99.0; echo 8.6", "86", "nvcc does not know compute capability 99.0"),
        ("echo 'No devices; were [found]'", DEFAULT, "which is no compute capability"),
        ("true", DEFAULT, "nvidia-smi names no GPU"),
        ("echo 9.0; exit 9", DEFAULT, "nvidia-smi names no GPU"),
    ],
    ids=str,
)
def test_the_gpus_of_the_machine(nvidia_smi, archs, said, configure):
    named, ninja, messages = configure(nvidia_smi)
    assert named == archs
    assert said in messages
    # What nvcc is told is what the extension says of itself.
    assert codes(ninja) == {said_code for arch in archs.split() for said_code in said_codes(arch)}
    assert len(set(re.findall(r"arch=compute_(\d+)", ninja))) == 1  # translated to PTX once


def codes(ninja):
    return {
        code
        for listed in re.findall(r"--generate-code=arch=\w+,code=\[([^\]]+)\]", ninja)
        for code in listed.split(",")
    }


def said_codes(arch):
    number, _, kind = arch.partition("-")
    prefixes = {"real": ("sm",), "virtual": ("compute",), "": ("sm", "compute")}[kind]
    return {f"{prefix}_{number}" for prefix in prefixes}


def test_a_choice_overrides_the_gpus(configure):
    named, ninja, messages = configure("echo 8.0", archs="86-real;90;100-virtual")
    assert named == "86-real 90 100-virtual"
    assert codes(ninja) == {"sm_86", "sm_90", "compute_90", "compute_100"}
    assert "ctxops: CUDA architectures" not in messages
    named, ninja, _ = configure("echo 8.0", archs="90a")  # by CMake itself
    assert named == "90a"
    assert codes(ninja) == {"sm_90a", "compute_90a"}
