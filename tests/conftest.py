# SPDX-License-Identifier: Apache-2.0
import gc
import hashlib
import importlib.util
import os
from pathlib import Path

# Each worker of pytest-xdist has one core. To be set before OpenMP starts, with torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# Before anything imports triton, which torch.compile does on the CPU as well.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Saves a program for each instruction set, which tells whether the compiler knows it.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Saves a pool of processes, each of which imports torch: the workers of pytest-xdist are the pool.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Its key does not see an operator's autograd rule: after a change it would serve the former one.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

from ctxops import _native

ROOT = Path(__file__).parents[1]

# The same draws on every run: whether a change may land is no matter of luck.
for profile, examples in (("quick", 12), ("all", 30)):
    hypothesis.settings.register_profile(
        profile, derandomize=True, deadline=None, max_examples=examples
    )


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked slow as well")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A worker for each core, up to eight, where pytest-xdist is installed; -n0: none."""
    free = getattr(config.option, "numprocesses", 0) is None and not config.getoption("usepdb")
    if free and not hasattr(config, "workerinput"):  # a worker has none of its own
        config.option.numprocesses = min(len(os.sched_getaffinity(0)), 8)
        config.option.dist = "worksteal"


def pytest_report_header(config):
    lines = []
    if not config.getoption("--all"):
        lines.append("without the slow tests; --all runs them as well")
    if not torch.cuda.is_available():
        lines.append("without the tests marked cuda, which need an NVIDIA GPU")
    return lines


def source_hash() -> str:
    """The hash of csrc/ and CMakeLists.txt, as CMakeLists.txt computes it."""
    files = (path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file())
    paths = [*sorted(path.as_posix() for path in files), "CMakeLists.txt"]
    lines = (f"{path} {hashlib.sha256((ROOT / path).read_bytes()).hexdigest()}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def pytest_sessionstart(session):
    """Never test the references alone, nor yesterday's extension."""
    if _native.extension is None:
        pytest.exit(f"ctxops has no extension ({_native.load_error}): pip install .", returncode=3)
    if _native.extension.source_hash != source_hash():
        pytest.exit(
            f"the extension {_native.extension.__file__} was built from other sources than "
            f"{ROOT / 'csrc'}: pip install .",
            returncode=3,
        )


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None):  # the workers run the tests
        return
    hypothesis.settings.load_profile("all" if config.getoption("--all") else "quick")
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from triton_interpreter import index_with_scalars, widen_bfloat16_dot

        widen_bfloat16_dot()
        index_with_scalars()
    # Fills every allocation with NaN, inside compiled code too: an output that nobody wrote shows.
    torch.use_deterministic_algorithms(True)


def pytest_collection(session):
    gc.disable()  # to look through thousands of new tests again and again takes seconds


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config, items):
    left_out = set() if config.getoption("--all") else {"slow"}
    left_out |= set() if torch.cuda.is_available() else {"cuda"}

    def runs(item):
        return not any(item.get_closest_marker(marker) for marker in left_out)

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = filter(runs, items)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param
