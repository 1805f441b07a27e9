# SPDX-License-Identifier: Apache-2.0
"""From image files to label files: ``ctxops predict``."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ctxops.models.convert import load_model
from ctxops.models.data.files import map_image
from ctxops.models.data.spec import colours
from ctxops.models.inference import Inference, segment

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}
_OVERLAY_SHARE = 0.5


def find_images(names: Sequence[str]) -> list[Path]:
    """The files that these files, folders and patterns name, each once.

    Raises:
        FileNotFoundError: a name that stands for no image.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            paths = [p for p in sorted(path.iterdir()) if p.suffix.lower() in _SUFFIXES]
        else:
            paths = [path] if path.is_file() else sorted(map(Path, glob.glob(name)))
        if not paths:
            raise FileNotFoundError(f"{name!r} is no image, no folder of images and no pattern")
        found |= dict.fromkeys(paths)
    return list(found)


def predict_files(
    checkpoint: str | Path,
    images: Sequence[str],
    out: str | Path,
    *,
    overlay: bool = False,
    probabilities: bool = False,
    device: str | None = None,
    **inference,
) -> Iterator[Path]:
    """Writes a PNG with the classes of each image, and its palette; yields its path.

    An image that cannot be read or segmented does not stop the others.

    Args:
        checkpoint: of ``ctxops fit`` or ``ctxops convert``.
        images: files, folders, patterns such as ``"street/*.png"``.
        out: a folder, made if needed.
        overlay: beside each ``NAME.png`` the image under its colours, ``NAME_overlay.png``.
        probabilities: beside it those of the classes, ``NAME_probabilities.npy``, ``(K, H, W)``,
            float16.
        device: None: a GPU if there is one.
        inference: options of :func:`segment`.

    Raises:
        OSError: no checkpoint, no images.
        TypeError, ValueError: two images that would be written to one file, a checkpoint of another
            kind, options as :class:`ctxops.models.Inference`; at the end: images that failed, with
            what each lacks.
    """
    Inference(**inference)  # says what is wrong with the options before anything is read
    paths, out = find_images(images), Path(out)
    targets: dict[Path, Path] = {}
    for path in paths:
        other = targets.setdefault(out / f"{path.stem}.png", path)
        if other != path:
            raise ValueError(f"{other} and {path} would both be written to {path.stem}.png")
        if any(file.resolve() == path.resolve() for file in _outputs(out, path)):
            raise ValueError(f"{path} would be written over: choose another out than {out}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_model(checkpoint).to(device)
    palette = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get(
        "palette", colours(network.num_classes)
    )
    out.mkdir(parents=True, exist_ok=True)
    failures = []
    for target, path in targets.items():
        scores = None
        try:
            image = map_image(path)
            if probabilities:
                scores = _open_probabilities(path, image, network, out)
            labels = segment(network, image[None], probabilities=scores, **inference)[0].cpu()
        except (OSError, ValueError) as error:
            failures.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            if scores is not None:
                _outputs(out, path)[2].unlink()
            continue
        save_labels(labels, palette, target)
        if overlay:
            save_overlay(image, labels, palette, _outputs(out, path)[1])
        yield target
    if failures:
        raise ValueError(f"{len(failures)} of {len(paths)} images failed: {'; '.join(failures)}")


def _outputs(out: Path, image: Path) -> tuple[Path, Path, Path]:
    names = (".png", "_overlay.png", "_probabilities.npy")
    return tuple(out / f"{image.stem}{name}" for name in names)  # type: ignore[return-value]


def _open_probabilities(path: Path, image: Tensor, network: nn.Module, out: Path) -> Tensor:
    """``(1, K, H, W)``, in a file that need not fit into memory."""
    shape = (network.num_classes, *image.shape[1:])
    file = _outputs(out, path)[2]
    return torch.from_numpy(np.lib.format.open_memmap(file, "w+", np.float16, shape))[None]


def save_labels(labels: Tensor, palette: Sequence[Sequence[int]], path: Path) -> None:
    """A PNG of class numbers ``(H, W)`` that viewers show in colours."""
    image = Image.fromarray(labels.numpy().astype(np.uint8))
    image.putpalette([channel for colour in palette for channel in colour])
    image.save(path)


def save_overlay(
    image: Tensor, labels: Tensor, palette: Sequence[Sequence[int]], path: Path
) -> None:
    """The image ``(3, H, W)``, uint8, half covered by the colours of its classes."""
    Image.fromarray(overlay(image, labels, palette).permute(1, 2, 0).numpy()).save(path)


def overlay(image: Tensor, labels: Tensor, palette: Sequence[Sequence[int]]) -> Tensor:
    """``(3, H, W)``, uint8. Labels beyond the palette leave the image as it is."""
    table = torch.tensor(palette, dtype=torch.float32)
    known = labels < len(table)
    covered = table[labels.long().where(known, 0)].permute(2, 0, 1)
    mixed = image * (1 - _OVERLAY_SHARE) + covered * _OVERLAY_SHARE
    return torch.where(known, mixed, image).to(torch.uint8)
