# SPDX-License-Identifier: Apache-2.0
"""Looks through a data set before anyone trains on it: ``ctxops data check SPEC ROOT``."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ctxops.models.data.files import read_image, read_numbers
from ctxops.models.data.spec import IGNORE, Spec

_LISTED = 5


@dataclasses.dataclass
class SplitReport:
    """What is in a split, and what is wrong with it.

    Attributes:
        pairs: how many images it has.
        problems: what was found, a line for each file.
        sizes: how many pairs have each size (H, W).
        pixels: ``(classes + 1,)``: how many pixels each class has, the ignored ones last.
        images: ``(classes + 1,)``: in how many images each occurs.
    """

    pairs: int
    problems: list[str]
    sizes: Counter
    pixels: np.ndarray
    images: np.ndarray


def check_split(spec: Spec, root: str | Path, split: str) -> SplitReport:
    """Reads every pair of a split.

    Raises:
        ValueError, FileNotFoundError: as :meth:`Spec.pairs`.
    """
    classes = len(spec.classes)
    pairs = spec.pairs(root, split)
    report = SplitReport(len(pairs), [], Counter(), *np.zeros((2, classes + 1), np.int64))
    report.problems += [f"no image for: {path}" for path in spec.unpaired(root, split)]
    for pair in pairs:
        missing = [path for path in pair if not path.is_file()]
        report.problems += [f"missing: {path}" for path in missing]
        if missing:
            continue
        try:
            size = tuple(read_image(pair.image).shape[1:])
            numbers = read_numbers(pair.labels, spec.variable)
        except ValueError as error:
            report.problems.append(str(error))
            continue
        if size != numbers.shape:
            report.problems.append(f"{pair.labels} has size {numbers.shape}, its image {size}")
        labels, unknown = spec.to_classes(numbers)
        if unknown:
            report.problems.append(f"{pair.labels} has numbers of no class: {unknown[:_LISTED]}")
        report.sizes[size] += 1
        counts = np.bincount(labels.ravel(), minlength=IGNORE + 1)[[*range(classes), IGNORE]]
        report.pixels += counts
        report.images += counts > 0
    return report


def expected(spec: Spec) -> str:
    """Which files a data set has below its root, and where they come from."""
    lines = [f"{spec.name}: {len(spec.classes)} classes; {spec.source}"]
    lines += [f"  {split}: {spec.layout(split)}" for split in spec.splits]
    return "\n".join(lines)


def check_data(spec: Spec, root: str | Path, splits: Sequence[str] = ()) -> tuple[str, bool]:
    """A report on these splits, or on all that are there, and whether all is well."""
    found, absent = {}, []
    for split in splits or spec.splits:
        try:
            found[split] = check_split(spec, root, split)
        except FileNotFoundError as error:
            absent.append(str(error))
    lines = [f"{spec.name} in {root}: {len(spec.classes)} classes"]
    lines += [line for split, report in found.items() for line in _summary(split, report)]
    if found:
        lines += _histogram(spec, found)
    # One's own data may have no test split, but no data set lacks all or the one asked for.
    lines += absent if splits or not found else [f"not there: {line}" for line in absent]
    lacking = bool(absent) if splits else not found
    return "\n".join(lines), not lacking and not any(r.problems for r in found.values())


def _summary(split: str, report: SplitReport) -> list[str]:
    common = report.sizes.most_common(_LISTED)
    sizes = ", ".join(f"{height} x {width} ({count})" for (height, width), count in common)
    if len(report.sizes) > _LISTED:
        sizes += f" and {len(report.sizes) - _LISTED} more"
    lines = [f"{split}: {report.pairs} pairs; sizes {sizes or 'none'}"]
    return lines + [f"  {problem}" for problem in report.problems]


def _histogram(spec: Spec, found: dict[str, SplitReport]) -> list[str]:
    """The share of the pixels and the number of images of each class, in every split."""
    width = max(map(len, spec.classes)) + 2
    heads = "".join(f"{split + ', share':>20}{'images':>8}" for split in found)
    lines = [f"{'class':{width}}{heads}"]
    for k, name in enumerate((*spec.classes, "(ignored)")):
        cells = (
            f"{report.pixels[k] / max(report.pixels.sum(), 1):20.4%}{report.images[k]:8}"
            for report in found.values()
        )
        lines.append(f"{name:{width}}{''.join(cells)}")
    return lines
