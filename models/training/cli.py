# SPDX-License-Identifier: Apache-2.0
"""``ctxops fit``, ``resume``, ``validate`` and ``test``, on Lightning's command line."""

import contextlib
import difflib
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ctxops._checks import check_known
from ctxops.models.inference import Inference
from ctxops.models.training.callbacks import FiniteLoss, Pictures
from ctxops.models.training.checkpoint import AtomicCheckpointIO
from ctxops.models.training.datamodule import SegmentationData
from ctxops.models.training.metrics import Metrics, table
from ctxops.models.training.stages import (
    CONFIG,
    LAST,
    continuing,
    is_stage,
    read_stages,
    stage_folders,
    starts,
    write_config,
)
from ctxops.models.training.task import SegmentationTask

RECIPES = Path(__file__).parents[1] / "recipes"
# What has keys of its own, and in it again.
_SECTIONS: dict[str, dict] = {
    "trainer": {},
    "data": {},
    "model": {"loss": {}, "optimization": {}},
    "inference": {},
    "metrics": {},
}
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
        command = re.search(r"\b(fit|validate|test)\b", f"{self.prog} {message}")
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
        # A run that goes on was told less: it needs no weights to start from.
        if stage == "fit" and self.config.ckpt_path is None:
            write_config(Path(trainer.default_root_dir), self._text())

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint |= {"config": self._text(), "finished": trainer.fit_loop.done}

    def _text(self) -> str:
        return self.parser.dump(self.config)


class _CLI(LightningCLI):
    def __init__(self, arguments: list[str]) -> None:
        self.command = arguments[0]
        super().__init__(
            SegmentationTask,
            SegmentationData,
            args=arguments,
            seed_everything_default=0,
            trainer_defaults=_TRAINER,
            save_config_callback=_RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

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
        parser.add_class_arguments(Metrics, "metrics")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        for name in ("classes", "palette"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def subcommands(self) -> dict[str, set[str]]:
        # The parser of each takes a third of a second to make.
        return {self.command: LightningCLI.subcommands()[self.command]}

    def instantiate_classes(self) -> None:
        """Opens the data as well, so that all that is wrong is known before the run begins."""
        try:
            super().instantiate_classes()
            scored = (self._get(self.config_init, name) for name in ("inference", "metrics"))
            self.model.evaluate_by(*scored)
            self.datamodule.setup(self.subcommand)
        except (ImportError, OSError, TypeError, ValueError) as error:
            sys.exit(f"ctxops {self.subcommand}: {error}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        data, model, trainer = (
            self._get(self.config_init, name) for name in ("data", "model", "trainer")
        )
        folder = Path(self._get(self.config, "run_folder") or f"runs/{data.name}_{model.model}")
        resumed = self._get(self.config, "ckpt_path")
        if self.subcommand == "fit" and resumed is None and (folder / LAST).exists():
            raise ValueError(
                f"{folder} holds a run: ctxops resume {folder}, or another --run_folder"
            )
        kwargs |= {"default_root_dir": folder, "callbacks": list(trainer.callbacks or ())}
        kwargs["plugins"] = [*(trainer.plugins or ()), AtomicCheckpointIO()]
        if self.subcommand != "fit":
            kwargs |= {"logger": False, "enable_checkpointing": False}
            return super().instantiate_trainer(**kwargs)
        if trainer.logger is None:
            csv = CSVLogger(folder, name="logs")
            kwargs["logger"] = [csv, TensorBoardLogger(folder, "logs", csv.version)]
        always = {"save_on_train_epoch_end": True, "enable_version_counter": False}
        kwargs["callbacks"] += [FiniteLoss(), Pictures()]
        if model.optimization.ema:
            # Counts and a memory of features are no averages: they stay those of the last step.
            ema = EMAWeightAveraging(decay=model.optimization.ema, use_buffers=False)
            kwargs["callbacks"].append(ema)
        best = ModelCheckpoint(folder, "best", "mIoU", mode="max", **always)
        # That of Lightning, save_last, is not written after every epoch.
        kwargs["callbacks"] += [best, ModelCheckpoint(folder, "last", **always)]
        made = super().instantiate_trainer(**kwargs)
        environment = getattr(made.strategy, "cluster_environment", None)
        starts_others = environment is not None and not environment.creates_processes_externally
        if is_stage(folder) and made.world_size > 1 and starts_others:
            # Lightning's own would begin with the first stage again.
            raise ValueError("stages in several processes must be started by torchrun")
        return made

    def after_fit(self) -> None:
        folder = self.trainer.default_root_dir
        print(f"after the last epoch:\n{_scores(self.model)}")
        best = self.trainer.checkpoint_callback.best_model_score
        if best is not None:
            print(f"best mean IoU {best:.4f}: ctxops predict {folder}/best.ckpt IMAGE")

    def after_validate(self) -> None:
        print(_scores(self.model))

    after_test = after_validate


class _Plan(_CLI):
    """Reads what a run is told and opens its data, but does not run."""

    def instantiate_classes(self) -> None:
        try:
            SegmentationData(**self._get(self.config, "data").as_dict()).setup("fit")
        except (OSError, TypeError, ValueError) as error:
            sys.exit(f"ctxops fit: {error}")

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    @property
    def run_folder(self) -> str | None:
        return self._get(self.config, "run_folder")

    def text(self, folder: Path) -> str:
        config = self.config[self.subcommand].clone()
        config.run_folder = str(folder)
        return self._parser(self.subcommand).dump(config)


def _scores(task: SegmentationTask) -> str:
    if task.result is None:
        return "nothing was scored: no pixel has a label, which ctxops predict does not need"
    return table(task.result)


def recipe(name: str) -> Path:
    """The file of a recipe: one of the package by its name, or any by its path."""
    if not name.endswith((".yaml", ".yml")):
        known = [path.stem for path in RECIPES.glob("*.yaml")]
        check_known("recipe", name, known, "docs/training.md")
        return RECIPES / f"{name}.yaml"
    file = Path(name)
    with contextlib.suppress(OSError, yaml.YAMLError):  # of which jsonargparse speaks
        told = yaml.safe_load(file.read_text())
        _check_sections(told, _SECTIONS, f"{file}: ")
        stages = told.get("stages") if isinstance(told, dict) else None
        for stage in stages if isinstance(stages, list) else ():
            _check_sections(stage, _SECTIONS, f"{file}: stages: ")
    return file


def _check_sections(told: Any, sections: dict[str, dict], where: str) -> None:
    """Raises where a recipe has a value instead of keys; jsonargparse would pass over it."""
    for name, inner in sections.items():
        value = told.get(name) if isinstance(told, dict) else None
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{where}{name} must have keys of its own, got {value!r}")
        _check_sections(value, inner, f"{where}{name}.")


def main(arguments: Sequence[str]) -> int:
    """``fit [--config RECIPE] [--KEY VALUE]...``, ``resume RUN``, ``validate CHECKPOINT ...`` and
    ``test CHECKPOINT ...``."""
    command, *rest = arguments
    _keep_quiet()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            runs = _runs(command, rest, Path(scratch))
        except (OSError, ValueError) as error:
            sys.exit(f"ctxops {command}: {error}")
        for told in runs:
            _CLI(told)
    return 0


def _keep_quiet() -> None:
    """Leaves out what Lightning says of itself on every run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    of_no_use = ("LightningCLI's args", "Checkpoint directory", "Be aware that when using")
    for message in (*of_no_use, ".*LeafSpec", ".*does not have many workers", r"\s*.*sonargparse"):
        warnings.filterwarnings("ignore", message)


def _runs(command: str, rest: list[str], scratch: Path) -> Iterable[list[str]]:
    """Lightning's arguments for ours, of one run after the other; ``scratch`` is to write into."""
    asks = {"-h", "--help", "--print_config"} & set(rest)
    given = {argument.partition("=")[0] for argument in rest}
    if "--ckpt_path" in given:
        raise ValueError("--ckpt_path is not taken: ctxops resume RUN goes on with a run")
    if command == "resume":
        if len(rest) != 1 or asks:
            raise ValueError("give the folder of a run, and nothing else: it goes on as it was")
        return starts(stage_folders(Path(rest[0])))
    if command != "fit" and not asks:
        if not rest or rest[0].startswith("-"):
            raise ValueError(
                f"give a checkpoint first: ctxops {command} CHECKPOINT [--KEY VALUE]..."
            )
        checkpoint, *rest = rest
        config = scratch / CONFIG
        config.write_text(_stored_config(checkpoint))
        told = [command, "--config", str(config), *continuing(Path(checkpoint))]
        return [[*told, "--verbose=false", *rest]]  # Lightning would print the scores as well
    if not given & {"--config", "-c"} and not asks & {"-h", "--help"}:
        rest = ["--config", "scenes", *rest]
    told = [command, *_with_paths(rest)]
    stages = _stages(told, scratch)
    if not stages:
        return [told]
    return starts(_plan(stages, told, printed="--print_config" in asks))


def _with_paths(arguments: list[str]) -> Iterator[str]:
    """The arguments with the file of a recipe in the place of its name."""
    left = iter(arguments)
    for argument in left:
        key, equals, name = argument.partition("=")
        if key in ("--config", "-c"):
            yield from ("--config", str(recipe(name if equals else next(left, ""))))
        else:
            yield argument


def _stages(told: list[str], scratch: Path) -> dict[str, list[str]]:
    """The arguments of each stage of a recipe, by its folder; none where it has no stages."""
    for at in range(1, len(told)):
        if told[at - 1] == "--config":
            shared, stages = read_stages(Path(told[at]))
            for folder, own in stages.items():
                for name, options in (("shared", shared), (folder, own)):
                    (scratch / f"{name}.yaml").write_text(yaml.safe_dump(options))
            files = {folder: str(scratch / f"{folder}.yaml") for folder in stages}
            if stages:
                before = [*told[:at], str(scratch / "shared.yaml"), "--config"]
                return {folder: [*before, file, *told[at + 1 :]] for folder, file in files.items()}
    return {}


def _plan(stages: dict[str, list[str]], told: list[str], printed: bool) -> list[Path]:
    """Reads all stages before the first one begins, and writes what each is told; their folders."""
    if printed:
        for folder, arguments in stages.items():
            print(f"# {folder}")
            with contextlib.suppress(SystemExit):
                _Plan(arguments)
        sys.exit(0)
    plans = {folder: _Plan(arguments) for folder, arguments in stages.items()}
    named = Path(told[told.index("--config") + 1]).stem
    run = Path(next(iter(plans.values())).run_folder or f"runs/{named}")
    others = [folder for folder in run.glob("*") if is_stage(folder) and folder.name not in plans]
    if others or any(run.glob(f"*/{LAST}")):
        raise ValueError(f"{run} holds a run: ctxops resume {run}, or another --run_folder")
    for folder, plan in plans.items():
        write_config(run / folder, plan.text(run / folder))
    return stage_folders(run)


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
