# SPDX-License-Identifier: Apache-2.0
"""Images and labels of files, and the data set that they are."""

import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, multiprocessing
from torch.utils.data import Dataset

from ctxops.models.data.spec import Pair, Spec

# How many files or numbers an error spells out.
_SPELLED = 3
# Bytes of a TIFF.
_READ_AT_ONCE = 1 << 20


def _open(path: Path) -> Image.Image:
    """The image, decoded; raises ValueError with the file's name where that fails."""
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image that can be read: {error}") from error
    return image


def read_image(path: str | Path) -> Tensor:
    """``(3, H, W)``, uint8: grey images three times the same, without transparency, upright.

    Of 16 bits the upper 8 are kept.
    """
    image = ImageOps.exif_transpose(_open(Path(path)))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def map_image(path: str | Path) -> Tensor:
    """As :func:`read_image`, but a TIFF need not fit into memory if tifffile is installed.

    Its strips or tiles are decoded one after the other into a temporary file that is mapped. What
    tifffile cannot do, such as compressions without imagecodecs, :func:`read_image` does.
    """
    if Path(path).suffix.lower() in (".tif", ".tiff"):
        try:
            import tifffile

            with tifffile.TiffFile(path) as file:
                return _map_tiff(file.pages[0])
        except Exception:  # tifffile has one for each way in which bytes can be wrong
            pass
    return read_image(path)


def _map_tiff(page: Any) -> Tensor:
    """A page of tifffile; raises ValueError where its numbers are not plain colours."""
    turned = "Orientation" in page.tags and page.tags["Orientation"].value != 1
    premultiplied = 1 in page.extrasamples
    if (
        page.photometric.name not in ("MINISBLACK", "RGB")
        or page.dtype not in (np.uint8, np.uint16)
        or page.bitspersample != 8 * page.dtype.itemsize
        or turned
        or premultiplied
    ):
        raise ValueError("not plain colours")
    height, width = page.imagelength, page.imagewidth
    colours = 3 if page.photometric.name == "RGB" else 1
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, np.uint8, "w+", shape=(3, height, width))
    # Bands that are stored one after the other come as planes, others side by side.
    for part, (plane, _, top, left, _), _ in page.segments(maxworkers=1, buffersize=_READ_AT_ONCE):
        if part is not None and plane < colours:
            part = part[0, : height - top, : width - left, :colours]
            part = (part >> 8 * (part.itemsize - 1)).astype(np.uint8)
            channels = slice(plane, plane + 1) if part.shape[2] < colours else slice(None)
            below, right = top + part.shape[0], left + part.shape[1]
            mapped[channels, top:below, left:right] = np.moveaxis(part, 2, 0)
    return torch.from_numpy(mapped)


def read_numbers(path: str | Path, variable: str = "") -> np.ndarray:
    """The numbers in a labels file, ``(H, W)``: one channel of up to 16 bits, or a palette's.

    A .mat file holds them in ``variable``, as in :class:`Spec`. That needs scipy.
    """
    path = Path(path)
    if path.suffix == ".mat":
        numbers = _read_variable(path, variable)
        kind = f"{numbers.dtype} of shape {numbers.shape}"
    else:
        image = _open(path)
        numbers, kind = np.asarray(image), f"mode {image.mode!r}"
    is_map = numbers.ndim == 2 and numbers.size > 0 and numbers.dtype.kind in "buif"
    if not is_map or not 0 <= numbers.min() <= numbers.max() < 1 << 16:
        raise ValueError(f"{path} must have one channel of numbers from 0 to 65535, got {kind}")
    return numbers.astype(np.uint16)


def _require_scipy() -> types.ModuleType:
    try:
        import scipy.io
    except ImportError:
        raise ImportError(
            "labels in .mat files need scipy, which is not installed: pip install scipy"
        ) from None
    return scipy.io


def _read_variable(path: Path, variable: str) -> np.ndarray:
    """A variable of a .mat file, or a field of it after a dot."""
    io = _require_scipy()
    try:
        value = io.loadmat(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # scipy has one for each way in which bytes can be wrong
        raise ValueError(f"{path} is no .mat file that can be read: {error}") from error
    try:
        for name in variable.split("."):
            value = value[name]
            if value.dtype == object:  # the field of a struct that stands alone
                value = value.item()
    except (AttributeError, IndexError, KeyError, ValueError):
        raise ValueError(f"{path} must have the variable {variable}") from None
    return value


class Files(Dataset):
    """The pairs of a split: ``files[i]`` is an image ``(3, H, W)`` and labels ``(H, W)``, uint8.

    Args:
        spec: the data set.
        root: its folder.
        split: such as ``"train"`` or ``"train+val"``.
        skip_bad: what is wrong with a pair is no error: ``files[i]`` is None, and the first time
            the file and the reason are printed, whichever process reads it.

    Raises:
        FileNotFoundError: no images, or one without labels.
        ImportError: labels in .mat files, and no scipy.
        ValueError: an unknown split; in reading: a file that is no image, an image and labels that
            differ in size, a number that the data set does not know. The file is named.
    """

    def __init__(self, spec: Spec, root: str | Path, split: str, *, skip_bad: bool = False) -> None:
        self.spec, self.pairs, self.skip_bad = spec, spec.pairs(root, split), skip_bad
        if spec.variable:
            _require_scipy()
        if skip_bad:  # what the processes that load know of each other
            self._bad = torch.zeros(len(self.pairs), dtype=torch.bool).share_memory_()
            self._lock = multiprocessing.Lock()
            return
        missing = [str(path) for pair in self.pairs for path in pair if not path.is_file()]
        if missing:
            spelled = ", ".join(missing[:_SPELLED])
            raise FileNotFoundError(
                f"{len(missing)} files of {spec.name} are missing: {spelled}; all of them: "
                f"ctxops data check {spec.name} {root}"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return str(self.pairs[index].image)

    @property
    def skipped(self) -> int:
        """How many pairs were found to be bad so far, by all processes that load them."""
        return int(self._bad.sum()) if self.skip_bad else 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | None:
        if not self.skip_bad:
            return self._read(self.pairs[index])
        try:
            return self._read(self.pairs[index])
        except (FileNotFoundError, ValueError) as error:
            # Reported before another process knows, and in whole lines: print may write in parts.
            with self._lock:
                if not self._bad[index]:
                    self._bad[index] = True
                    print(f"passed over: {error}", file=sys.stderr, flush=True)
            return None

    def _read(self, pair: Pair) -> tuple[Tensor, Tensor]:
        image = read_image(pair.image)
        numbers = read_numbers(pair.labels, self.spec.variable)
        if image.shape[1:] != numbers.shape:
            raise ValueError(
                f"{pair.labels} must have the size of its image, {tuple(image.shape[1:])}, "
                f"got {numbers.shape}"
            )
        labels, unknown = self.spec.to_classes(numbers)
        if unknown:
            raise ValueError(
                f"{pair.labels} has {unknown[:_SPELLED]}, no numbers of {self.spec.name}"
            )
        return image, torch.from_numpy(labels)
