# SPDX-License-Identifier: Apache-2.0
"""Small runs of ``ctxops fit`` on a few scenes, and what they leave."""

import csv

import pytest
import torch

from ctxops.__main__ import main

SMALL = {
    "--data.options": "{length: 6, size: [64, 64]}",
    "--data.batch_size": "2",
    "--data.steps_per_epoch": "3",
    "--trainer.max_epochs": "3",
    "--trainer.enable_progress_bar": "false",
    "--trainer.log_every_n_steps": "1",
    "--trainer.accelerator": "cpu",
    "--model.options": "{channels: 16}",
}
# The networks of the papers and their smallest options, by name.
NETWORKS = {
    "ann": ("ann", "channels: 16"),
    "ccnet": ("ccnet", "channels: 16, reduction: 4"),
    "gald": ("gald", "channels: 16"),
    "gald_ldv2": ("gald", "channels: 16, local_distribution: ldv2"),
    "gcn": ("gcn", "kernel_size: 5"),
    "gff": ("gff", "channels: 16"),
    "mcibi": ("mcibi", "channels: 16"),
}


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def network(name, more=""):
    """The options that choose one of NETWORKS."""
    model, options = NETWORKS[name]
    return {"model__network": model, "model__options": f"{{{options}{more}}}"}


def arguments(run, *more, **options):
    """Of ``ctxops fit`` for a small run; options with __ for dots."""
    given = SMALL | {f"--{name.replace('__', '.')}": value for name, value in options.items()}
    return ["fit", "--run_folder", str(run), *(x for pair in given.items() for x in pair), *more]


def fit(run, *more, **options):
    return main(arguments(run, *more, **options))


def load(path):
    return torch.load(path, weights_only=True)


def losses(run):
    """The loss of every step, of all starts of the run."""
    values = []
    for file in sorted(run.glob("logs/version_*/metrics.csv")):
        with open(file) as lines:
            values += [float(row["loss"]) for row in csv.DictReader(lines) if row["loss"]]
    return values


class Stop(Exception):  # noqa: N818
    pass


def stop_in_epoch(patch, epoch, folder=""):
    """A run ends as this epoch begins, if its folder has such a name."""

    def stop(task):
        if task.current_epoch == epoch and task.trainer.default_root_dir.endswith(folder):
            raise Stop

    patch.setattr("ctxops.models.training.task.SegmentationTask.on_train_epoch_start", stop)


def assert_same_end(one, other):
    """Two runs ended in the same state, to the bit."""
    a, b = load(one / "last.ckpt"), load(other / "last.ckpt")
    parts = {"state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"}
    for part in parts | (a.keys() & {"current_model_state", "averaging_state"}):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
