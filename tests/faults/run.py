# SPDX-License-Identifier: Apache-2.0
"""Injects the faults of faults.py one at a time, and says which suite notices them.

    python tests/faults/run.py [NAME ...] [--list] [--baseline] [--json FILE]

Everything happens in a copy of the tree. Each fault's own tests run, first those of the quick
suite, then with --all: "quick", "slow", or "unnoticed", which makes the exit code 1.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # to be set before OpenMP starts, with torch

import hypothesis  # noqa: F401
import pytest
import torch  # noqa: F401

# tests/ in the place of this folder, as pytest has it.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faults.fault import Fault
from faults.faults import FAULTS

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 900  # seconds of a run of tests; what hangs is noticed
# Exit codes of pytest; the second where conftest.py refuses the extension.
FAILED, STALE, NO_TESTS = 1, 3, 5


class Copy:
    """A copy of the tree that runs as it stands, with its extension built for the CPU."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.build, self.built = (folder / name for name in ("tree", "build", "built"))
        self.folder = folder
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.split("\0")  # fmt: skip
        for name in filter(None, names):
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.tree / name, follow_symlinks=False)
        self.environment = os.environ | {
            "PATH": f"{self._cached_gxx()}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.tree),
        }
        self._configure()
        self._compile()
        shutil.copytree(self.build, self.built)
        self.hash = self._source_hash()
        self._install(self.hash)

    def _cached_gxx(self) -> Path:
        """The folder of a g++ that the tests find first, if there is one at all."""
        folder, cache = self.folder / "bin", self.folder / "objects"
        folder.mkdir()
        cache.mkdir()
        if gxx := shutil.which("g++"):
            command = [sys.executable, str(ROOT / "tests/faults/cached_gxx.py"), gxx, str(cache)]
            (folder / "g++").write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
            (folder / "g++").chmod(0o755)
        return folder

    def _configure(self) -> None:
        tools = self.folder / "tools"
        if importlib.util.find_spec("pybind11") is None:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", tools]
            subprocess.run([*pip, "pybind11>=3"], check=True)
            sys.path.append(str(tools))
        import pybind11

        options = {
            # The values are judged by float64: how fast they come is no matter.
            "CMAKE_BUILD_TYPE": "Fault",
            "CMAKE_CXX_FLAGS_FAULT": "-O1 -DNDEBUG",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": self.build,
            "CTXOPS_CUDA": "OFF",
            "PYBIND11_FINDPYTHON": "NEW",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        defined = [f"-D{name}={value}" for name, value in options.items()]
        command = ["cmake", "-S", self.tree, "-B", self.build, "-G", "Ninja", *defined]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def _compile(self) -> None:
        done = subprocess.run(["ninja", "-C", self.build, "-j1"], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(done.stdout + done.stderr)

    def _source_hash(self) -> str:
        """The hash with which the extension would be configured now."""
        subprocess.run(["cmake", self.build], check=True, stdout=subprocess.DEVNULL)
        commands = (self.build / "build.ninja").read_text()
        return re.search(r"CTXOPS_SOURCE_HASH=\W*(\w{64})", commands)[1]

    def _install(self, source_hash: str) -> None:
        """The extension with the hash put into it: spares the compilation that all would need."""
        (built,) = self.build.glob("_C*.so")
        code = built.read_bytes().replace(self.hash.encode(), source_hash.encode())
        (self.tree / "ctxops" / built.name).write_bytes(code)

    @contextlib.contextmanager
    def with_fault(self, fault: Fault) -> Iterator[None]:
        path = self.tree / fault.file
        text, times = path.read_text(), path.stat()
        if text.count(fault.old) != 1:
            raise SystemExit(f"{fault.name}: its old text is not once in {fault.file}")
        native = fault.file.startswith("csrc/")
        path.write_text(text.replace(fault.old, fault.new))
        try:
            if native:
                self._compile()
                self._install(self._source_hash())
            yield
        finally:
            path.write_text(text)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            if native:  # ninja goes by the times: those of before spare the objects of before
                shutil.rmtree(self.build)
                shutil.copytree(self.built, self.build)
                self._install(self.hash)

    def notices(self, tests: Sequence[str], *options: str) -> str:
        """What the tests have against the tree: the first that failed, or nothing."""
        output = self.folder / "output"
        # A fork has imported torch already.
        process = multiprocessing.get_context("fork").Process(
            target=self._run_pytest, args=(output, [*options, *tests])
        )
        process.start()
        try:
            process.join(TIMEOUT)
            hangs = process.is_alive()
        finally:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
                process.join()
        text = output.read_text(errors="replace")
        if process.exitcode == STALE:
            raise SystemExit(text)
        if hangs or process.exitcode in (0, NO_TESTS):
            return "hangs" if hangs else ""
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
        if process.exitcode == FAILED and failed is None:
            raise SystemExit(text)
        return failed[1] if failed else f"pytest ends with {process.exitcode}"

    def _run_pytest(self, output: Path, arguments: list[str]) -> None:
        os.setsid()
        with open(output, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(self.tree)
        os.environ.update(self.environment)
        sys.path[0] = str(self.tree)
        common = ["-x", "-q", "-n0", "-p", "no:cacheprovider"]
        sys.exit(int(pytest.main([*common, *arguments])))


def cpu_seconds() -> float:
    """Of all that was run so far; others may have the machine as well."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def inject(copy: Copy, fault: Fault) -> dict[str, object]:
    start = cpu_seconds()
    with copy.with_fault(fault):
        noticed = {"quick": copy.notices(fault.tests)}
        if not noticed["quick"]:
            noticed["slow"] = copy.notices(fault.tests, "--all")
    suite = next((suite for suite, by in noticed.items() if by), "unnoticed")
    seconds = round(cpu_seconds() - start, 1)
    return {"name": fault.name, "result": suite, "by": noticed.get(suite, ""), "seconds": seconds}


def run_baseline(copy: Copy, faults: Sequence[Fault]) -> int:
    failures = 0
    for tests in dict.fromkeys(fault.tests for fault in faults):
        start = cpu_seconds()
        failed = copy.notices(tests)
        failures += bool(failed)
        print(f"{cpu_seconds() - start:6.1f} s  {shlex.join(tests)}  {failed or 'passes'}")
        sys.stdout.flush()
    return min(failures, 1)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends as well
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults; without any, all")
    parser.add_argument("--list", action="store_true", help="list the faults and inject none")
    parser.add_argument(
        "--baseline", action="store_true", help="run the quick tests of the faults without any"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {fault.name for fault in FAULTS}:
        parser.error(f"no fault has the name {', '.join(sorted(unknown))}; --list names all")
    faults = [f for f in FAULTS if not arguments.names or f.name in arguments.names]
    if arguments.list:
        for fault in faults:
            print(f"{fault.name:34}{fault.file}: {fault.effect}")
        return 0

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copy = Copy(Path(folder))
        if arguments.baseline:
            return run_baseline(copy, faults)
        results = []
        for fault in faults:
            result = inject(copy, fault)
            results.append(result)
            print("{name:34}{result:10}{seconds:6.1f} s  {by}".format(**result), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    suites = [result["result"] for result in results]
    quick, unnoticed = suites.count("quick"), suites.count("unnoticed")
    complete = len(suites) - unnoticed
    print(f"{len(suites)} faults: quick suite {quick}, complete suite {complete}")
    return min(unnoticed, 1)


if __name__ == "__main__":
    sys.exit(main())
