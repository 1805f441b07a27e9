# SPDX-License-Identifier: Apache-2.0
"""``ctxops fit``, ``ctxops resume`` and ``ctxops validate``, on Lightning's command line."""

import difflib
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import ActionConfigFile
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ctxops._checks import check_known
from ctxops.models.inference import Inference
from ctxops.models.training.checkpoint import AtomicCheckpointIO
from ctxops.models.training.datamodule import SegmentationData
from ctxops.models.training.metrics import table
from ctxops.models.training.task import SegmentationTask

RECIPES = Path(__file__).parents[1] / "recipes"
_CONFIG, _LAST = "config.yaml", "last.ckpt"
_TRAINER = {
    "max_epochs": 10,
    "use_distributed_sampler": False,  # the samplers share the samples out themselves
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "log_every_n_steps": 10,
}


class _Parser(LightningArgumentParser):
    """Says what is wrong in one line, with the closest name where one is unknown."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        command = re.search(r"\b(fit|validate)\b", f"{self.prog} {message}")
        unknown = re.search(r"(?:unrecognized arguments: --|not accept option ')([\w.]+)", message)
        if unknown is None:
            text = " ".join(message.split())
        else:
            close = difflib.get_close_matches(unknown[1], _keys(self), n=1)
            text = f"unknown key {unknown[1]!r}"
            text += f", the closest is {close[0]!r}" if close else ""
        sys.exit(f"ctxops {command[1] if command else 'fit'}: {text}")


def _keys(parser: LightningArgumentParser) -> set[str]:
    """The keys of a parser, and of the commands that it has."""
    keys = {action.dest for action in parser._actions}
    for action in parser._actions:
        if isinstance(action.choices, dict):
            keys = keys.union(*map(_keys, action.choices.values()))
    return keys


class _RunConfig(SaveConfigCallback):
    """Keeps what the run was told, in its folder and in its checkpoints."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _CONFIG).write_text(self._text())

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["config"] = self._text()

    def _text(self) -> str:
        return self.parser.dump(self.config)


class _CLI(LightningCLI):
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = _Parser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="a recipe, by name or file"
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # torchrun would take "--run" for an option of its own.
        parser.add_argument("--run_folder", type=str | None, default=None, help="to write to")
        parser.add_class_arguments(Inference, "inference")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        for name in ("classes", "palette"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        known = LightningCLI.subcommands()
        return {name: known[name] for name in ("fit", "validate")}

    def instantiate_classes(self) -> None:
        """Opens the data as well, so that all that is wrong is known before the run begins."""
        try:
            super().instantiate_classes()
            self.model.inference = self._get(self.config_init, "inference")
            self.datamodule.setup(self.subcommand)
        except (ImportError, OSError, TypeError, ValueError) as error:
            sys.exit(f"ctxops {self.subcommand}: {error}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        data, model, trainer = (
            self._get(self.config_init, name) for name in ("data", "model", "trainer")
        )
        folder = Path(self._get(self.config, "run_folder") or f"runs/{data.name}_{model.model}")
        resumed = self._get(self.config, "ckpt_path")
        if self.subcommand == "fit" and resumed is None and (folder / _LAST).exists():
            raise ValueError(
                f"{folder} holds a run: ctxops resume {folder}, or another --run_folder"
            )
        kwargs |= {"default_root_dir": folder, "callbacks": list(trainer.callbacks or ())}
        kwargs["plugins"] = [*(trainer.plugins or ()), AtomicCheckpointIO()]
        if self.subcommand == "validate":
            kwargs |= {"logger": False, "enable_checkpointing": False}
        else:
            if trainer.logger is None:
                csv = CSVLogger(folder, name="logs")
                kwargs["logger"] = [csv, TensorBoardLogger(folder, "logs", csv.version)]
            always = {"save_on_train_epoch_end": True, "enable_version_counter": False}
            best = ModelCheckpoint(folder, "best", "mIoU", mode="max", **always)
            # That of Lightning, save_last, is not written after every epoch.
            kwargs["callbacks"] += [best, ModelCheckpoint(folder, "last", **always)]
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        folder = self.trainer.default_root_dir
        print(f"after the last epoch:\n{_scores(self.model)}")
        best = self.trainer.checkpoint_callback.best_model_score
        if best is not None:
            print(f"best mean IoU {best:.4f}: ctxops predict {folder}/best.ckpt IMAGE")

    def after_validate(self) -> None:
        print(_scores(self.model))


def _scores(task: SegmentationTask) -> str:
    return "nothing was scored" if task.result is None else table(task.result)


def recipe(name: str) -> Path:
    """The file of a recipe: one of the package by its name, or any by its path."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    check_known("recipe", name, [path.stem for path in RECIPES.glob("*.yaml")])
    return RECIPES / f"{name}.yaml"


def main(arguments: Sequence[str]) -> int:
    """``fit [--config RECIPE] [--KEY VALUE]...``, ``resume RUN``, ``validate CHECKPOINT ...``."""
    command, *rest = arguments
    with tempfile.TemporaryDirectory() as folder:
        try:
            translated = _translate(command, rest, Path(folder) / _CONFIG)
        except (OSError, ValueError) as error:
            sys.exit(f"ctxops {command}: {error}")
        _keep_quiet()
        _CLI(
            SegmentationTask,
            SegmentationData,
            args=translated,
            seed_everything_default=0,
            trainer_defaults=_TRAINER,
            save_config_callback=_RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    return 0


def _keep_quiet() -> None:
    """Leaves out what Lightning says of itself on every run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    of_no_use = ("LightningCLI's args", "Checkpoint directory", "Be aware that when using")
    for message in (*of_no_use, ".*LeafSpec", ".*does not have many workers", r"\s*.*sonargparse"):
        warnings.filterwarnings("ignore", message)


def _translate(command: str, rest: list[str], config: Path) -> list[str]:
    """Lightning's arguments for ours; ``config`` is a file to write a checkpoint's into."""
    asks = {"-h", "--help", "--print_config"} & set(rest)
    given = {argument.partition("=")[0] for argument in rest}
    if "--ckpt_path" in given:
        raise ValueError("--ckpt_path is not taken: ctxops resume RUN goes on with a run")
    if command == "resume":
        if len(rest) != 1 or asks:
            raise ValueError("give the folder of a run, and nothing else: it goes on as it was")
        run = Path(rest[0])
        for file in (run / _CONFIG, run / _LAST):
            if not file.is_file():
                raise FileNotFoundError(f"{run} holds no run to resume: there is no {file}")
        files = ["--config", str(run / _CONFIG), "--ckpt_path", str(run / _LAST)]
        return ["fit", *files, "--run_folder", str(run)]
    if command == "validate" and not asks:
        if not rest or rest[0].startswith("-"):
            raise ValueError("give a checkpoint first: ctxops validate CHECKPOINT [--KEY VALUE]...")
        checkpoint, *rest = rest
        config.write_text(_stored_config(checkpoint))
        return ["validate", "--config", str(config), "--ckpt_path", checkpoint, *rest]
    if not given & {"--config", "-c"} and not asks & {"-h", "--help"}:
        rest = ["--config", "scenes", *rest]
    return [command, *_with_paths(rest)]


def _with_paths(arguments: list[str]) -> list[str]:
    """The arguments with the file of a recipe in the place of its name."""
    named = ["", *arguments]
    return [
        f"--config={recipe(argument.partition('=')[2])}"
        if argument.startswith("--config=")
        else str(recipe(argument))
        if before in ("--config", "-c")
        else argument
        for before, argument in zip(named, arguments, strict=False)
    ]


def _stored_config(checkpoint: str) -> str:
    """What the run of a checkpoint was told."""
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch has one for each way in which bytes can be wrong
        raise ValueError(f"{checkpoint} is no checkpoint: {error}") from error
    if not isinstance(saved, dict) or "config" not in saved:
        raise ValueError(f"{checkpoint} is no checkpoint of ctxops fit: it has no config")
    return saved["config"]
