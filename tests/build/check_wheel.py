# SPDX-License-Identifier: Apache-2.0
"""``check_wheel.py WHEEL``: the libraries that a wheel's extension needs, and how new.

Fails if one is newer than BOUNDS: then the wheel runs on fewer systems than README.md says; and if
a module or a recipe of this tree is not in the wheel.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

# RHEL 9, Ubuntu 22.04, Debian 12 and later have these. Threads became part of glibc itself in 2.34:
# what is linked on such a system needs it.
BOUNDS = {"GLIBC": "2.34", "GLIBCXX": "3.4.29", "CXXABI": "1.3.13"}
# Not the CUDA runtime, which is linked statically, nor torch, whose versions would bind the wheel.
LIBRARIES = {"libc.so.6", "libgcc_s.so.1", "libgomp.so.1", "libm.so.6", "libstdc++.so.6"}
LIBRARIES |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
# Before 2.34 these were libraries of their own.
LIBRARIES |= {"libdl.so.2", "libpthread.so.0", "librt.so.1"}


def parts(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def needs(extension: Path) -> tuple[set[str], dict[str, str]]:
    """The libraries that a file asks for, and the newest version of each of BOUNDS' names."""
    text = subprocess.run(
        ["objdump", "-p", extension], capture_output=True, text=True, check=True
    ).stdout
    libraries = set(re.findall(r"^\s*NEEDED\s+(\S+)$", text, flags=re.M))
    versions = re.findall(rf"\b({'|'.join(BOUNDS)})_([0-9.]+)$", text, flags=re.M)
    return libraries, {
        name: max((version for other, version in versions if other == name), key=parts, default="0")
        for name in BOUNDS
    }


def left_out(wheel: Path) -> list[str]:
    """The modules and recipes of this tree that the wheel has not."""
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    files = [path for part in ("ctxops", "models") for path in (ROOT / part).rglob("*.*")]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.suffix in (".py", ".yaml")}
    # models/ is installed as a package of ctxops.
    wanted = {f"ctxops/{name.removeprefix('ctxops/')}" for name in names}
    return sorted(wanted - shipped)


def check(wheel: Path) -> list[str]:
    """Prints what each extension of the wheel needs; what of it is too new."""
    problems = []
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        if not names:
            problems.append(f"{wheel.name} has no extension")
        for name in names:
            libraries, versions = needs(Path(archive.extract(name, folder)))
            print(f"{name} needs {', '.join(f'{key} {value}' for key, value in versions.items())}")
            problems += [f"{name} needs {other}" for other in sorted(libraries - LIBRARIES)]
            problems += [
                f"{name} needs {key} {versions[key]}, newer than {bound}"
                for key, bound in BOUNDS.items()
                if parts(versions[key]) > parts(bound)
            ]
    return problems


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("check_wheel.py WHEEL")
    problems = check(Path(sys.argv[1]))
    problems += [f"the wheel lacks {name}" for name in left_out(Path(sys.argv[1]))]
    raise SystemExit("\n".join(problems) or None)
