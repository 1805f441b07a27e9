# SPDX-License-Identifier: Apache-2.0
"""``python -m ctxops.models.train``: the same as ``ctxops``, and ``fit`` where nothing follows."""

import sys

from ctxops.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:] or ["fit"]))
