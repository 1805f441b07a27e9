# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, compiled for the host and run under sanitizers, against the CPU kernels.

``cuda_on_cpu.h`` stands in for the CUDA runtime; it is itself tested by ``harness.cpp``.
``barriers.py`` leaves out one barrier after the other and prints what notices it.
"""

import fcntl
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from covering import product

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
GXX = shutil.which("g++")
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
MISUSE = 97  # the exit code of cuda_on_cpu.h
RACE = 66  # that of the thread sanitizer

# Without optimisation the kernels compile in a third of the time, and with a trap in place of a
# message where the behaviour is undefined in two thirds of that; ASan reports where a trap was hit.
# What ASan sees itself need not be checked twice.
SANITIZE = [
    "-fsanitize=address,undefined", "-fno-sanitize=null,object-size,vptr,pointer-overflow",
    "-fsanitize-undefined-trap-on-error",
]  # fmt: skip
# The thread sanitizer sees the threads of a block, which only barriers order.
RACES = ["-fsanitize=thread"]
FLAGS = [
    "-std=c++17", "-O0", "-g1", "-fno-strict-aliasing",
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter",
    "-DCTXOPS_CUDA_ON_CPU", "-DCTXOPS_ISA=baseline", f"-I{CSRC}", f"-I{HERE}",
]  # fmt: skip


def _sources(program: Path) -> list[Path]:
    """The program, and the kernels of its operator; those for the CPU only where it calls them."""
    kernels = CSRC / program.stem
    sources = [program, *kernels.glob("*_cuda.cu")]
    if "ctxops::baseline::" in program.read_text():
        sources += kernels.glob("*_cpu.cpp")
    return sources


PROGRAMS = {program.stem: _sources(program) for program in HERE.glob("*.cpp")}

pytestmark = pytest.mark.skipif(GXX is None, reason="needs g++")


slow = pytest.mark.slow


class Programs:
    """The paths of the programs by name; each is compiled when it is first asked for."""

    def __init__(self, folder: Path, sanitize: Sequence[str] = SANITIZE):
        self.folder, self.sanitize = folder, sanitize
        folder.mkdir(exist_ok=True)

    def __getitem__(self, name: str) -> Path:
        program, errors = self.folder / name, self.folder / f"{name}.errors"
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the other workers wait, and find it
            if not program.exists() and not errors.exists():
                text = compile_program(PROGRAMS[name], program, self.sanitize)
                if text:
                    errors.write_text(text)
        assert program.exists(), errors.read_text()
        return program


def compile_program(sources: list[Path], program: Path, sanitize: Sequence[str]) -> str:
    """What the compiler says where it fails."""

    def run(*command: object) -> str:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        return "" if done.returncode == 0 else done.stderr or f"exit code {done.returncode}"

    objects = [program.with_name(f"{program.name}.{source.name}.o") for source in sources]
    with ThreadPoolExecutor(2) as pool:
        texts = pool.map(
            lambda source, to: run(GXX, *FLAGS, *sanitize, "-x", "c++", "-c", source, "-o", to),
            sources,
            objects,
        )
    finished = program.with_suffix(".linked")
    text = "".join(texts) or run(GXX, *sanitize, *objects, "-o", finished)
    if not text:
        finished.rename(program)
    return text


def _shared_folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # the workers' bases lie in


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Programs:
    return Programs(_shared_folder(tmp_path_factory) / "cuda_on_cpu")


@pytest.fixture(scope="session")
def watched(tmp_path_factory) -> Programs:
    """The programs under the thread sanitizer."""
    programs = Programs(_shared_folder(tmp_path_factory) / "cuda_on_cpu_races", RACES)
    done = execute(programs["harness"], "neighbour")
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run here")
    return programs


def execute(program: Path, *arguments: str, order: str = "ascending", **others: str):
    environment = os.environ | {
        # Leaks are looked for with ptrace, which containers often forbid.
        "ASAN_OPTIONS": "detect_leaks=0:handle_sigill=1",
        "TSAN_OPTIONS": f"halt_on_error=1:exitcode={RACE}",
        "CTXOPS_THREAD_ORDER": order,
        **others,
    }
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("sum_of_a_warp", [496.0] * 64),
        ("neighbour", [*map(float, range(1, 64)), 0.0]),
    ],
)
def test_right_kernel(programs, kernel, expected, order):
    done = execute(programs["harness"], kernel, order=order)
    assert done.returncode == 0, done.stderr
    assert [float(x) for x in done.stdout.split()] == expected


def test_shuffle_stays_within_its_mask(programs):
    done = execute(programs["harness"], "half_a_warp")
    assert done.returncode == 0, done.stderr
    first_warp = done.stdout.split()[:32]
    assert first_warp[:15] == [str(lane + 1) for lane in range(15)]
    assert all("nan" in x for x in first_warp[16:])


def test_missing_barrier_depends_on_the_order(programs):
    runs = [
        execute(programs["harness"], "missing_barrier", order=order)
        for order in ("ascending", "descending")
    ]
    assert [run.returncode for run in runs] == [0, 0]
    assert runs[0].stdout != runs[1].stdout


@pytest.mark.parametrize("kernel", ["sum_of_a_warp", "neighbour"])
def test_ordered_by_barriers(watched, kernel):
    done = execute(watched["harness"], kernel)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ["ascending", pytest.param("descending", marks=slow)])
@pytest.mark.parametrize(
    "kernel",
    ["missing_barrier", "missing_warp_barrier", "shuffle_for_barrier", "copy_before_barrier"],
)
def test_race(watched, kernel, order):
    done = execute(watched["harness"], kernel, order=order)
    assert done.returncode == RACE
    assert "ThreadSanitizer: data race" in done.stderr
    assert kernel in done.stderr


def test_race_of_two_blocks(watched):
    """Right within a block, but every block writes the same places."""
    done = execute(watched["harness"], "neighbour", CTXOPS_BLOCKS="unordered")
    assert done.returncode == RACE
    assert "ThreadSanitizer: data race" in done.stderr


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("early_return", "threads returned before a barrier of their block"),
        ("absent_lanes", "deadlock"),
        ("unnamed_lane", "a lane waits for a mask that does not name it"),
        ("barriers_of_two_kinds", "deadlock"),
        ("two_barriers", "threads of a block wait at different barriers"),
    ],
)
def test_misused_barrier(programs, kernel, message, order):
    done = execute(programs["harness"], kernel, order=order)
    assert done.returncode == MISUSE
    assert message in done.stderr


@pytest.mark.parametrize("kernel", ["out_of_bounds", "static_out_of_bounds", "device_memory"])
def test_address_out_of_bounds(programs, kernel):
    done = execute(programs["harness"], kernel)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert kernel in done.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="swapcontext makes ASan forget stacks")
def test_local_out_of_bounds_after_a_barrier(programs):
    done = execute(programs["harness"], "local_out_of_bounds")
    assert done.returncode != 0
    assert "AddressSanitizer: stack-buffer-overflow" in done.stderr


@pytest.mark.parametrize("kernel", ["undefined", "misaligned"])
def test_undefined_behaviour(programs, kernel):
    done = execute(programs["harness"], kernel)
    assert done.returncode != 0
    assert "AddressSanitizer: ILL" in done.stderr
    assert f"in {kernel}" in done.stderr


def test_launch_error(programs):
    done = execute(programs["harness"], "empty_grid")
    assert done.returncode == 1
    assert "invalid configuration argument" in done.stderr


@product(
    layout=["contiguous", "channels_last", "wide_rows", "wide_pixels", "odd_rows", "odd_pixels"],
    mode=["avg", "max"],
    dtype=["float32", "float64", "float16", "bfloat16"],
)
def test_pyramid_pool(programs, layout, mode, dtype):
    done = execute(programs["pyramid_pool"], dtype, mode, layout, "small")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(x, marks=slow) for x in ("float64", "float16", "bfloat16"))]
)
@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize(
    "layout",
    [
        "contiguous",
        "channels_last",
        *(
            pytest.param(x, marks=slow)
            for x in ("wide_rows", "wide_pixels", "odd_rows", "odd_pixels")
        ),
    ],
)
def test_pyramid_pool_of_many_boundaries(programs, layout, mode, dtype):
    done = execute(programs["pyramid_pool"], dtype, mode, layout, "boundaries")
    assert done.returncode == 0, done.stdout + done.stderr


@slow
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_pyramid_pool_of_a_large_batch(programs, mode):
    done = execute(programs["pyramid_pool"], "float32", mode, "contiguous", "batch")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("contiguous", "float32"),
        pytest.param("channels_last", "float16", marks=slow),
        pytest.param("odd_pixels", "bfloat16", marks=slow),
        pytest.param("odd_rows", "bfloat16", marks=slow),
        pytest.param("odd_pixels", "float32", marks=slow),
        pytest.param("contiguous", "float16", marks=slow),
        pytest.param("contiguous", "bfloat16", marks=slow),
        pytest.param("channels_last", "float32", marks=slow),
        pytest.param("channels_last", "bfloat16", marks=slow),
        pytest.param("odd_rows", "float32", marks=slow),
        pytest.param("odd_rows", "float16", marks=slow),
        pytest.param("odd_pixels", "float16", marks=slow),
    ],
)
def test_pyramid_pool_adds_many_values(programs, layout, dtype):
    done = execute(programs["pyramid_pool"], dtype, "avg", layout, "large")
    assert done.returncode == 0, done.stdout + done.stderr


# These two programs take the longest to compile, so that the quick suite leaves them out.
@slow
@pytest.mark.parametrize(
    ("dtype", "border"),
    [
        ("float32", "zeros"),
        ("float32", "mask"),
        ("float32", "shift"),
        ("float16", "zeros"),
        ("bfloat16", "mask"),
        ("bfloat16", "shift"),
    ],
)
def test_neighborhood_attention_in_tiles(programs, dtype, border):
    done = execute(programs["neighborhood_attention"], dtype, border, "tiled")
    assert done.returncode == 0, done.stdout + done.stderr


@slow
@pytest.mark.parametrize(
    ("dtype", "border"),
    [
        ("float32", "zeros"),
        ("float32", "shift"),
        ("float64", "zeros"),
        ("float16", "mask"),
        ("bfloat16", "shift"),
    ],
)
def test_neighborhood_attention(programs, dtype, border):
    done = execute(programs["neighborhood_attention"], dtype, border, "general")
    assert done.returncode == 0, done.stdout + done.stderr


@slow
@pytest.mark.parametrize("border", ["zeros", "mask", "shift"])
@pytest.mark.parametrize("cases", ["numbers", "device"])
def test_neighborhood_attention_of(programs, cases, border):
    done = execute(programs["neighborhood_attention"], "float32", border, cases)
    assert done.returncode == 0, done.stdout + done.stderr


@slow
@pytest.mark.parametrize(("dtype", "cases"), [("float16", "batch"), ("float64", "large")])
def test_neighborhood_attention_of_many(programs, dtype, cases):
    done = execute(programs["neighborhood_attention"], dtype, "zeros", cases)
    assert done.returncode == 0, done.stdout + done.stderr


# Computed gates hold nearly all that given ones do.
@slow
@pytest.mark.parametrize(
    ("dtype", "gates", "cases"),
    [
        ("float32", "given", "one_size"),
        ("float32", "given", "sizes"),
        ("float32", "computed", "one_size"),
        ("float32", "computed", "sizes"),
        ("float64", "computed", "one_size"),
        ("float64", "computed", "sizes"),
        ("float16", "computed", "one_size"),
        ("float16", "computed", "sizes"),
        ("bfloat16", "computed", "one_size"),
        ("bfloat16", "computed", "sizes"),
    ],
)
def test_gated_fusion(programs, cases, gates, dtype):
    done = execute(programs["gated_fusion"], dtype, cases, gates)
    assert done.returncode == 0, done.stdout + done.stderr


@slow
@pytest.mark.parametrize(
    ("cases", "gates"),
    [
        ("many", "given"),
        ("drawn", "computed"),
        ("device", "given"),
        ("device", "computed"),
    ],
)
def test_gated_fusion_of(programs, cases, gates):
    done = execute(programs["gated_fusion"], "float32", cases, gates)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("weights", ["plain", "weighted"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_category_statistics(programs, dtype, weights):
    done = execute(programs["category_statistics"], dtype, weights, "small")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("cases", "weights"),
    [
        ("labels", "plain"),
        pytest.param("labels", "weighted", marks=slow),
        pytest.param("numbers", "plain", marks=slow),
        ("numbers", "weighted"),
        pytest.param("many", "plain", marks=slow),
        pytest.param("many", "weighted", marks=slow),
        pytest.param("drawn", "plain", marks=slow),
        pytest.param("drawn", "weighted", marks=slow),
        ("device", "plain"),
        ("device", "weighted"),
    ],
)
def test_category_statistics_of(programs, cases, weights):
    done = execute(programs["category_statistics"], "float32", weights, cases)
    assert done.returncode == 0, done.stdout + done.stderr


def test_category_statistics_where_neighbours_cancel(programs):
    """In double: no rounding to the accumulator hides what the length of a vector loses."""
    done = execute(programs["category_statistics"], "float64", "weighted", "numbers")
    assert done.returncode == 0, done.stdout + done.stderr


# The fewest that come to every barrier.
WATCHED = {
    "pyramid_pool": [
        ("float32", mode, layout, "small")
        for mode in ("avg", "max")
        for layout in ("contiguous", "channels_last")
    ],
    "neighborhood_attention": [
        ("float32", "zeros", "tiled"),
        ("float32", "zeros", "general"),
        ("float32", "shift", "tiled"),
    ],
    "gated_fusion": [("float32", cases, "computed") for cases in ("one_size", "sizes")],
    "category_statistics": [("float32", "weighted", "small")],
}


@slow
@pytest.mark.parametrize("program", WATCHED)
def test_no_race(watched, program):
    for arguments in WATCHED[program]:
        done = execute(watched[program], *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


@slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("program", WATCHED)
def test_programs_for_a_gpu_compile(program, tmp_path):
    """Also run where there is one: on_gpu.py says how."""
    from cuda_on_cpu.on_gpu import build

    assert build(program, tmp_path, "sm_90").exists()
