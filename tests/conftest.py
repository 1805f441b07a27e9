# SPDX-License-Identifier: Apache-2.0
import hashlib
import importlib.util
import os
from pathlib import Path

import hypothesis
import pytest
import torch

# Before anything imports triton, which torch.compile does on the CPU as well.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Its key does not see an operator's autograd rule: after a change it would serve the former one.
os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

from ctxops import _native

ROOT = Path(__file__).parents[1]

# The same draws on every run: whether a change may land is no matter of luck.
hypothesis.settings.register_profile("same_draws", derandomize=True)
hypothesis.settings.load_profile("same_draws")


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
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        from triton_interpreter import index_with_scalars, widen_bfloat16_dot

        widen_bfloat16_dot()
        index_with_scalars()
    # Fills every allocation with NaN, inside compiled code too: an output that nobody wrote shows.
    torch.use_deterministic_algorithms(True)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return request.param
