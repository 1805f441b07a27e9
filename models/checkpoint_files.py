# SPDX-License-Identifier: Apache-2.0
"""Files of tensors that any code wrote. Nothing in a file runs."""

import os
import pickle
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import IO, Any

import torch
from torch.serialization import safe_globals

# torch loads no name of these modules, whatever stands in for it.
_REFUSED = ("nt", "os", "posix", "sys")

# What is read as a plain dictionary: torch fills no other.
_MAPPINGS: dict[str, Callable] = {"collections.defaultdict": lambda *arguments: {}}

# A file of torch before 1.6 begins with so many pickles; the last one holds the objects.
_LEGACY_PICKLES = 4

# Of pickle, which torch reads without running anything: that of torch.save, and the next.
_PROTOCOLS = (2, 3)

_STARTS = (
    (b"<", "is a web page and no checkpoint: the download failed"),
    (b"version https://git-lfs", "is a pointer of Git LFS: `git lfs pull` gets the file itself"),
)


class _ProtocolError(Exception):
    """Objects pickled by a protocol that torch does not read."""


class StandIn:
    """In the place of an object that is neither tensor nor plain value. It takes all, and is empty.

    A subclass stands for each name. Loading calls it in the place of the class or function that
    the file names.
    """

    def __new__(cls, *args: object, **named: object) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *args: object, **named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read(path: str | os.PathLike) -> Any:
    """What is in a file of ``torch.save`` or, by its ending, of safetensors.

    Objects that are neither tensors nor plain values, such as an optimizer or a log, are read as
    :class:`StandIn`: neither their code nor a function that the file names is looked up.

    Raises:
        OSError: no such file.
        ValueError: a file of another kind, a damaged one, or one whose tensors need an object.
    """
    name = os.fspath(path)
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
        file.seek(0)
        if not start:
            raise ValueError(f"{name!r} is empty")
        try:
            if name.endswith(".safetensors"):
                return _read_safetensors(file)
            names = _names(file)
        except _ProtocolError as error:
            raise ValueError(f"{name!r} {error}") from None
        # Bytes can be wrong in many ways, and the libraries have an error for each.
        except Exception as error:
            raise ValueError(f"{name!r} {_kind(start)}") from error
        stand_ins: list[Callable | tuple[Callable, str]] = [
            (_MAPPINGS.get(each) or type(each, (StandIn,), {}), each) for each in names
        ]
        file.seek(0)
        try:
            with safe_globals(stand_ins):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            refused = [each for each in names if each.partition(".")[0] in _REFUSED]
            kind = _kind(start)
            if refused:
                kind = f"names {', '.join(refused)}, which could run commands: it is not read"
            elif isinstance(error, pickle.UnpicklingError):
                others = (each for each in names if not each.startswith(("torch.", "collections.")))
                kind = (
                    f"holds objects that cannot be left out, among {', '.join(others)}: save its "
                    f"tensors alone"
                )
            raise ValueError(f"{name!r} {kind}") from error


def _read_safetensors(file: IO[bytes]) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load
    except ImportError:
        raise ImportError(
            "a .safetensors file needs safetensors: pip install safetensors"
        ) from None
    return load(file.read())


def _names(file: IO[bytes]) -> list[str]:
    """The classes and functions that a file's pickles name, as ``module.name``."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            (record,) = (each for each in archive.namelist() if each.endswith("/data.pkl"))
            with archive.open(record) as pickled:
                return _globals(pickled)
    file.seek(0)
    pickles = [_globals(file) for _ in range(_LEGACY_PICKLES)]
    return pickles[-1]


def _globals(pickled: IO[bytes]) -> list[str]:
    opcodes = [(opcode.name, arg) for opcode, arg, _ in pickletools.genops(pickled)]
    if opcodes[0] not in [("PROTO", protocol) for protocol in _PROTOCOLS]:
        raise _ProtocolError(
            "is pickled by another protocol than torch.save's own: save it without pickle_protocol"
        )
    names = {tuple(arg.split(" ")) for opcode, arg in opcodes if opcode == "GLOBAL"}
    # As unpickling does: these pickles have the names of Python 2.
    names = {NAME_MAPPING.get((m, n), (IMPORT_MAPPING.get(m, m), n)) for m, n in names}
    return sorted(".".join(name) for name in names)


def _kind(start: bytes) -> str:
    """What a file that cannot be read is, by its first bytes."""
    for beginning, kind in _STARTS:
        if start.startswith(beginning):
            return kind
    return "is damaged, or neither torch.save nor safetensors wrote it"
