# SPDX-License-Identifier: Apache-2.0
"""Lets mmsegmentation be imported where mmcv's operators are not built, as in mmcv-lite.

All are there, and none can be called.
"""

import importlib.util
import sys
import types


class NoOperators(types.ModuleType):
    def __getattr__(self, name):
        return None


if importlib.util.find_spec("mmcv") and importlib.util.find_spec("mmcv._ext") is None:
    sys.modules["mmcv._ext"] = NoOperators("mmcv._ext")
