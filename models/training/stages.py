# SPDX-License-Identifier: Apache-2.0
"""Recipes of several stages: runs of which each starts from the weights of the one before."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

CONFIG, LAST = "config.yaml", "last.ckpt"


def is_stage(folder: Path) -> bool:
    return re.fullmatch(r"\d+_\w+", folder.name) is not None


def read_stages(recipe: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A recipe without its stages, and what each replaces in it, by the stage's folder.

    Folders are ``1_coarse``, ``2_fine``; a recipe without ``stages`` gives none.

    Raises:
        OSError: no such file.
        ValueError: stages that are no list of options with a name each, all different.
    """
    try:
        told = yaml.safe_load(recipe.read_text())
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{recipe} is no YAML: {text}") from error
    if not isinstance(told, dict) or "stages" not in told:
        return {}, {}
    stages = told.pop("stages")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"stages of {recipe} must be a list of options, got {stages!r}")
    names = [stage.pop("name", None) for stage in stages]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
            raise ValueError(f"each of the stages of {recipe} must have a name, got {name!r}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"stages of {recipe} must be at least one, each with its name: {names}")
    pairs = zip(names, stages, strict=True)
    return told, {f"{k}_{name}": x for k, (name, x) in enumerate(pairs, 1)}


def write_config(folder: Path, text: str) -> None:
    """Writes what a run is told, whole or not at all: several processes may write the same."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{CONFIG}.{os.getpid()}"
    part.write_text(text)
    os.replace(part, folder / CONFIG)


def stage_folders(run: Path) -> list[Path]:
    """The stages of a run in their order; the run itself, where it has none.

    Raises:
        FileNotFoundError: no run is there.
    """
    found = [folder for folder in run.glob("*") if is_stage(folder) and (folder / CONFIG).is_file()]
    if found:
        return sorted(found, key=lambda folder: int(folder.name.partition("_")[0]))
    for file in (run / CONFIG, run / LAST):
        if not file.is_file():
            raise FileNotFoundError(f"{run} holds no run to resume: there is no {file}")
    return [run]


def starts(stages: Sequence[Path]) -> Iterator[list[str]]:
    """The arguments of ``fit`` for each of :func:`stage_folders` that is not at its end.

    A stage that has begun goes on; the next one starts from the weights of the one before it.
    """
    before: Path | None = None
    for folder in stages:
        checkpoint, weights = folder / LAST, before
        before = checkpoint
        told = ["fit", "--config", str(folder / CONFIG), "--run_folder", str(folder)]
        if checkpoint.is_file():
            if _is_finished(checkpoint):
                print(f"{folder} is at its end")
                continue
            yield [*told, *continuing(checkpoint)]
        elif weights is None:
            yield told
        else:
            yield [*told, "--model.init_from", str(weights)]


def continuing(checkpoint: Path) -> list[str]:
    """The arguments for a run whose weights are all in a checkpoint."""
    # Weights to start from would be read in vain, and may be gone.
    unused = ["--model.init_from=null", "--model.pretrained=false"]
    return ["--ckpt_path", str(checkpoint), *unused]


def _is_finished(checkpoint: Path) -> bool:
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return saved.get("finished", False)
