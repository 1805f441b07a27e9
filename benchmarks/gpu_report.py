# SPDX-License-Identifier: Apache-2.0
"""Everything that a machine with a GPU can tell of this package, in one command and on one page.

    python benchmarks/gpu_report.py                        # goes on where it was cut
    python benchmarks/gpu_report.py --minutes 9
    python benchmarks/gpu_report.py --device cpu --dry-run

It needs no network: torch, triton, pytest, rich, pybind11, cmake and ninja are there already. What
matters most comes first. A part that fails or takes too long is reported, and the next one runs.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = ("bfloat16", "float32", "float16")
CUDA_TOOLS = "/usr/local/cuda/bin"  # which often is not on PATH


class Benchmark(NamedTuple):
    """A program, or some of its cases: what takes long is cut into parts. ``compiled``: has it
    rivals that torch may tune when it compiles them?"""

    name: str
    program: str
    options: Sequence[str]
    cases: str = ""
    compiled: bool = True


def _operator(name: str, *options: str, cases: str = "", compiled: bool = True) -> Benchmark:
    options = (name, "--seconds", "4", *options)
    return Benchmark(name, "operators.py", options, cases, compiled)


# In the order of their worth.
BENCHMARKS = (
    Benchmark("nonlocal_vs_apnb", "nonlocal_vs_apnb.py", ("--budget", "40")),
    _operator("asymmetric_attention"),
    _operator("neighborhood_attention", "--window", "5x6", cases="5x6"),
    _operator("criss_cross_attention"),
    _operator("self_gated_fusion"),
    # Its 19 classes alone.
    _operator("category_statistics", "--quick", "--shape", "2x512x64x128", cases="19 classes"),
    _operator("pyramid_pool"),
    _operator("neighborhood_attention", "--window", "3x1", cases="3x1", compiled=False),
    _operator("neighborhood_attention", "--window", "7x3", cases="7x3", compiled=False),
)
CUT = "cut by the end of the time"
LINES = 30  # that are kept of what a part prints


class Part(NamedTuple):
    """A command. It is stopped after ``seconds``, and passed over where the machine has no
    ``tool``. ``dry``: what --dry-run runs in its stead, by default the same program with --help.
    ``measures``: benchmark and dtype of what it writes into ``file``."""

    name: str
    command: Sequence[str]
    seconds: float
    tool: str = ""
    dry: Sequence[str] = ()
    measures: tuple[str, str] = ("", "")
    file: Path | None = None


class Aim(NamedTuple):
    """What the forward of a benchmark shall reach in its worst case: so many times as fast as the
    fastest of ``rivals``, by default of all, or the share ``roofline`` of what the GPU can do."""

    benchmark: str
    case: str  # part of the titles
    times: float = 0
    roofline: float = 0
    rivals: Sequence[str] = ()
    dtypes: Sequence[str] = DTYPES

    @property
    def text(self) -> str:
        if self.roofline:
            return f"{self.roofline:.0%} of the roofline"
        return f"{self.times:g} x {' or '.join(self.rivals) or 'the fastest rival'}"


NONLOCAL = ("nonlocal_vs_apnb", "256 x 128")
NB_ON_SDPA = ("NB on SDPA", "NB on SDPA, Flash", "NB on SDPA, cuDNN")
AIMS = (
    Aim(*NONLOCAL, 25, rivals=["NB as released"], dtypes=["bfloat16"]),
    Aim(*NONLOCAL, 5, rivals=NB_ON_SDPA, dtypes=["bfloat16"]),
    Aim(*NONLOCAL, roofline=0.5, dtypes=["bfloat16"]),
    Aim("neighborhood_attention", "", 1, dtypes=["float32", "bfloat16"]),
    Aim("neighborhood_attention", "", roofline=0.6, dtypes=["float32", "bfloat16"]),
    Aim("criss_cross_attention", "", 2, dtypes=["float32", "bfloat16"]),
    Aim("pyramid_pool", "avg", 2),
    Aim("self_gated_fusion", "", roofline=0.7, dtypes=["float32", "bfloat16"]),
    Aim("category_statistics", "19 classes, labels 512 x 1024", 300, rivals=["as released"]),
    Aim(
        "category_statistics",
        "19 classes, labels 512 x 1024",
        4,
        rivals=["factorised", "factorised compiled"],
    ),
)


def list_parts(folder: Path, device: str) -> list[Part]:
    """In the order of their worth: a cut loses the last ones."""
    python = sys.executable
    info = [python, "-m", "ctxops", "info"]
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda"]
    # Each tensor has an allocation of its own, whose bounds memcheck knows.
    sanitizer = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer"]
    sanitizer += ["--error-exitcode", "1", "--tool"]

    def tests(name: str, seconds: float, *paths: str) -> Part:
        return Part(name, [*pytest, *paths], seconds, dry=[*pytest, "--help"])

    def measure(
        benchmark: Benchmark, dtype: str, seconds: float = 150, tuned: bool = False
    ) -> Part:
        variant = "max-autotune" if tuned else ""
        name = " ".join(filter(None, (benchmark.name, benchmark.cases, dtype, variant)))
        file = folder / f"{name.replace(' ', '_').replace('-', '_')}.json"
        command = [python, f"benchmarks/{benchmark.program}", *benchmark.options]
        command += ["--device", device, "--dtype", dtype]
        small = ["env", "TORCH_COMPILE_DISABLE=1", *command, "--quick", "--shape", "1x8x17x17"]
        shown = name == "criss_cross_attention float32"
        dry = [*small, "--json", str(file)] if shown else [*command, "--help"]
        tune = ["env", "TORCHINDUCTOR_MAX_AUTOTUNE=1"] if tuned else []
        command = [*tune, *command, "--json", str(file)]
        return Part(name, command, seconds, "", dry, (benchmark.name, dtype), file)

    on_gpu = [python, "tests/cuda_on_cpu/on_gpu.py"]
    alone = Part("kernels alone", on_gpu, 120, tool="nvcc", dry=[*on_gpu, "--help"])
    watched = Part(
        "kernels alone, watched",
        [*on_gpu, "memcheck", "racecheck", "synccheck"],
        300,
        tool="compute-sanitizer",
        dry=[*on_gpu, "--help"],
    )
    watched_tests = [
        Part(
            f"compute-sanitizer {tool}",
            [*sanitizer, tool, *pytest, "tests/ops/test_pyramid_pool.py"],
            120,
            tool="compute-sanitizer",
        )
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    ]
    all_classes = _operator("category_statistics", cases="all")
    heads = Benchmark("whole_networks", "papers/whole_networks.py", ("--heads",), "heads")
    overhead = [python, "benchmarks/overhead.py"]
    operators = {each.options[0] for each in BENCHMARKS if each.program == "operators.py"}
    ncu = ["ncu", "--kernel-name-base", "demangled", "--kernel-name", "regex:ctxops::"]
    ncu += [
        "--launch-count",
        "20",
        python,
        "benchmarks/operators.py",
        "--quick",
        *sorted(operators),
    ]
    return [
        Part("driver", ["nvidia-smi"], 30, tool="nvidia-smi"),
        Part(
            "build", ["env", "CTXOPS_CUDA=ON", *install, "-e", "."], 400, dry=[*install, "--help"]
        ),
        Part("what serves", info, 60, dry=info),
        alone,  # without torch: what fails here is a kernel's fault
        # A benchmark compares its results as well before it takes a time.
        *(measure(benchmark, "bfloat16") for benchmark in BENCHMARKS),
        tests("tests of the operators", 300, "tests/ops"),
        *(measure(benchmark, "float32") for benchmark in BENCHMARKS),
        watched,
        *watched_tests,
        *(measure(each, "bfloat16", 300, tuned=True) for each in BENCHMARKS if each.compiled),
        *(measure(benchmark, "float16") for benchmark in BENCHMARKS),
        *(measure(all_classes, dtype, 300) for dtype in DTYPES),
        tests("all other tests", 600, "tests", "--ignore=tests/ops"),
        measure(heads, "bfloat16", 120),
        Part("overhead", overhead, 120),
        Part("ncu", ncu, 180, tool="ncu"),
    ]


def run_part(command: Sequence[str], seconds: float) -> dict[str, object]:
    """Runs a command with all that it starts; its status, seconds, and the end of its output."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return {"status": "failed", "seconds": 0.0, "output": str(error)}
        try:
            code = process.wait(seconds)
            status = "ok" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = output.read().splitlines()[-LINES:]
    took = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": took, "output": "\n".join(lines)}


def run_parts(parts: Sequence[Part], folder: Path, minutes: float, dry: bool) -> dict:
    """Runs what has not yet succeeded at this commit, and writes the page after every part.

    What failed before comes last, unless it is the build, on which all others rest: it may do so
    again, and take the time of what has not been tried."""
    file = folder / "gpu_report.json"
    head = run_part(["git", "rev-parse", "--short=12", "HEAD"], 60)
    commit = head["output"] if head["status"] == "ok" else "unknown"
    state = json.loads(file.read_text()) if file.exists() else {}
    if (state.get("commit"), state.get("dry")) != (commit, dry):
        state = {"commit": commit, "dry": dry, "parts": {}}
    end = time.monotonic() + 60 * minutes
    untried = ("not run", CUT)
    failed = {p.name for p in parts if _status(state, p.name) not in untried} - {"build"}
    for part in sorted(parts, key=lambda part: part.name in failed):
        if _status(state, part.name) == "ok":
            continue
        left = end - time.monotonic()
        if left < 1:
            break
        if part.tool and shutil.which(part.tool) is None:
            result = {"status": f"no {part.tool} here", "seconds": 0.0, "output": ""}
        else:
            print(f"{part.name}: at most {min(part.seconds, left):.0f} s", flush=True)
            program = [part.tool] if part.tool else part.command[:2]
            command = part.command if not dry else part.dry or [*program, "--help"]
            result = run_part(command, min(part.seconds, left))
            if left < part.seconds and result["status"].startswith("stopped"):
                result["status"] = CUT
            print(f"  {result['status']}, {result['seconds']} s", flush=True)
        state["parts"][part.name] = result
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(json.dumps(state, indent=1) + "\n")
        partial.replace(file)
        (folder / "gpu_report.md").write_text(page(parts, state, folder))
    return state


def measured(aim: Aim, files: Sequence[Path]) -> float | None:
    """The figure of an aim in its worst case; None where it was not measured."""
    figures = []
    for case in (case for file in files for case in json.loads(file.read_text())["cases"]):
        if case["backward"] or aim.case not in case["title"]:
            continue
        rows = [row for row in case["rows"] if row.get("median_ms")]
        ours = min((row for row in rows if row["ours"]), key=_time, default=None)
        rivals = [r for r in rows if not r["ours"] and (not aim.rivals or r["name"] in aim.rivals)]
        if ours and aim.roofline:
            figures.append(ours["roofline_share"])
        elif ours and rivals:
            figures.append(min(map(_time, rivals)) / _time(ours))
    return min((x for x in figures if x is not None), default=None)


def _status(state: dict, name: str) -> str:
    return state["parts"].get(name, {}).get("status", "not run")


def _time(row: dict) -> float:
    return row["median_ms"]


def page(parts: Sequence[Part], state: dict, folder: Path) -> str:
    """The verdict, every aim beside what was measured, and what became of every part."""
    lines, reached, missed = [], 0, 0
    for aim in AIMS:
        for dtype in aim.dtypes:
            every = [part for part in parts if part.measures == (aim.benchmark, dtype)]
            # A file of a part that did not succeed is of another commit.
            done = [p for p in every if _status(state, p.name) == "ok" and p.file.exists()]
            figure = measured(aim, [part.file for part in done])
            text, verdict = "not measured", ""
            if figure is not None:
                good = figure >= (aim.roofline or aim.times)
                reached, missed = reached + good, missed + (not good)
                text = f"{figure:.0%}" if aim.roofline else f"{figure:.2f} x"
                text += f" in {len(done)} of {len(every)} parts"
                verdict = "reached" if good else "missed"
            what = f"{aim.benchmark} {aim.case}".strip()
            lines.append((what, dtype, aim.text, text, verdict))
    succeeded = sum(_status(state, part.name) == "ok" for part in parts)
    verdict = (
        f"{reached} aims are reached, {missed} are missed, {len(lines) - reached - missed} were "
        f"not measured. {succeeded} of {len(parts)} parts succeeded, at commit {state['commit']}."
    )
    if state["dry"]:
        verdict += " This was a dry run: its figures mean nothing."
    results = {part.name: state["parts"].get(part.name, {}) for part in parts}
    status = [(n, _status(state, n), str(r.get("seconds", ""))) for n, r in results.items()]
    sections = [
        f"# ctxops on {folder.name}",
        verdict,
        "## Aims",
        "Of the forward, each side in its faster memory format, in the worst of the cases.",
        _table(("benchmark", "dtype", "aim", "measured", "verdict"), lines),
        "## Parts",
        _table(("part", "status", "seconds"), status),
    ]
    for name, result in results.items():
        if result.get("output"):
            sections += [f"### {name}", f"```\n{result['output']}\n```"]
    return "\n\n".join(sections) + "\n"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every part succeeded that this machine has the tools for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=120, help="stop after so many; default: %(default)g"
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<the GPU's name>")
    parser.add_argument("--dry-run", action="store_true", help="start every part, measure little")
    chosen = parser.parse_args(arguments)
    os.environ["PATH"] += os.pathsep + CUDA_TOOLS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the part that runs ends too
    folder = chosen.output
    if folder is None:
        folder = ROOT / "runs" / "gpu_report" if chosen.dry_run else RESULTS / _gpu(chosen.device)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parts = list_parts(folder, chosen.device)
    state = run_parts(parts, folder, chosen.minutes, chosen.dry_run)
    print(f"wrote {folder / 'gpu_report.md'}")
    statuses = [_status(state, part.name) for part in parts]
    return 0 if all(s == "ok" or s.startswith("no ") for s in statuses) else 1


def _gpu(device: str) -> str:
    import torch  # here, so that --help needs none

    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: torch sees no GPU; --dry-run needs none")
    return torch.cuda.get_device_name(device).lower().replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
