# SPDX-License-Identifier: Apache-2.0
"""timm, which has the backbones."""

import types


def require_timm() -> types.ModuleType:
    try:
        import timm
    except ImportError:
        raise ImportError(
            'the networks need timm, which is not installed: pip install "ctxops[models]"'
        ) from None
    return timm
