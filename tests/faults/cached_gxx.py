# SPDX-License-Identifier: Apache-2.0
"""g++ that compiles no source a second time: cached_gxx.py GXX CACHE ARGUMENTS.

A source that includes the same text, compiled with the same options, has the same object.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main(gxx: str, cache: Path, arguments: list[str]) -> None:
    if "-c" not in arguments:
        os.execv(gxx, [gxx, *arguments])
    at = arguments.index("-o")
    output, options = arguments[at + 1], arguments[:at] + arguments[at + 2 :]
    text = subprocess.run([gxx, *options, "-E"], capture_output=True, check=True).stdout
    kept = cache / f"{hashlib.sha256(repr(options).encode() + text).hexdigest()}.o"
    if not kept.exists():
        subprocess.run([gxx, *arguments], check=True)
        shutil.copy(output, kept)
    shutil.copy(kept, output)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
