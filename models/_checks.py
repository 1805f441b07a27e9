# SPDX-License-Identifier: Apache-2.0
"""What the networks check, and what they need beyond torch."""

import difflib
import types
from collections.abc import Iterable


def require_timm() -> types.ModuleType:
    try:
        import timm
    except ImportError:
        raise ImportError(
            'the networks need timm, which is not installed: pip install "ctxops[models]"'
        ) from None
    return timm


def check_flags(**flags: bool) -> None:
    """Raises unless each is a bool: the word "false", given by a command, would count as true."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def check_known(what: str, name: str, choices: Iterable[str], listed: str | None = None) -> None:
    """Raises unless ``name`` is one of the choices: it names the closest, and all or where to look.

    ``listed``: the call that lists them, for more than one would read.
    """
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a string, got {name!r}")
    choices = sorted(choices)
    if name in choices:
        return
    close = difflib.get_close_matches(name, choices, n=1)
    closest = f", the closest is {close[0]!r}" if close else ""
    known = f"{listed} names all" if listed else f"choose from {', '.join(choices) or 'none'}"
    raise ValueError(f"unknown {what} {name!r}{closest}; {known}")
