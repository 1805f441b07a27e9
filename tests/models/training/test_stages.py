# SPDX-License-Identifier: Apache-2.0
"""Recipes of several stages: each starts where the one before ended, and goes on when stopped."""

import pytest
import torch
import yaml

pytest.importorskip("lightning", reason='needs pip install "ctxops[train]"')

from ctxops.__main__ import main
from ctxops.models.training.stages import read_stages
from runs import Stop, assert_same_end, load, losses, stop_in_epoch

RECIPE = """
seed_everything: 3
trainer: {max_epochs: 2, enable_progress_bar: false, log_every_n_steps: 1, accelerator: cpu}
data: {options: {length: 4, size: [64, 64]}, batch_size: 2, steps_per_epoch: 2}
model: {backbone: test_resnet, options: {channels: 16}, optimization: {ema: 0.5}}
stages:
- name: coarse
- name: fine
  data: {batch_size: 4}
  model: {network: fcn, init_strict: false}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "small.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recipe):
    run = tmp_path_factory.mktemp("whole")
    assert main(["fit", "--config", str(recipe), "--run_folder", str(run)]) == 0
    return run


def test_each_stage_is_a_run_that_knows_its_options(whole):
    assert sorted(p.name for p in whole.iterdir()) == ["1_coarse", "2_fine"]
    told = {}
    for folder in whole.iterdir():
        names = {p.name for p in folder.iterdir()}
        assert names == {"best.ckpt", "last.ckpt", "config.yaml", "logs"}
        assert len(losses(folder)) == 4
        told[folder.name] = yaml.safe_load((folder / "config.yaml").read_text())
    assert told["1_coarse"]["model"]["network"] == "ann"
    assert told["1_coarse"]["model"].get("init_from") is None
    assert told["2_fine"]["model"]["network"] == "fcn"
    assert told["2_fine"]["model"]["init_from"] == str(whole / "1_coarse/last.ckpt")
    assert [told[name]["data"]["batch_size"] for name in sorted(told)] == [2, 4]


def test_a_stage_starts_from_the_weights_of_the_one_before(recipe, tmp_path, capsys):
    still = "{network: ann, freeze_norm: true, optimization: {lr: 0}}"
    again = yaml.safe_load(recipe.read_text())
    again["stages"][1]["model"] = yaml.safe_load(still)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(again))
    run = tmp_path / "run"
    assert main(["fit", "--config", str(tmp_path / "a.yaml"), "--run_folder", str(run)]) == 0
    first, second = (load(run / f"{name}/last.ckpt") for name in ("1_coarse", "2_fine"))
    torch.testing.assert_close(first["state_dict"], second["state_dict"], rtol=0, atol=0)
    assert "not taken" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "epoch"),
    [
        pytest.param("1_coarse", 1, marks=pytest.mark.slow),
        pytest.param("2_fine", 0, marks=pytest.mark.slow),
        ("2_fine", 1),
    ],
)
def test_a_run_goes_on_in_any_stage(stage, epoch, whole, recipe, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, epoch, stage)
        with pytest.raises(Stop):
            main(["fit", "--config", str(recipe), "--run_folder", str(tmp_path)])
    torch.manual_seed(999)
    assert main(["resume", str(tmp_path)]) == 0
    for folder in ("1_coarse", "2_fine"):
        assert losses(tmp_path / folder) == losses(whole / folder)
        assert_same_end(tmp_path / folder, whole / folder)
    config = (tmp_path / "2_fine/config.yaml").read_text()
    assert f"init_from: {tmp_path}/1_coarse/last.ckpt" in config
    # Nothing is left to do.
    before = (tmp_path / "2_fine/last.ckpt").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["resume", str(tmp_path)]) == 0
    assert f"{tmp_path}/2_fine is at its end" in capsys.readouterr().out
    assert (tmp_path / "2_fine/last.ckpt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("stages: 3", "must be a list of options, got 3"),
        ("stages: []", "must be at least one"),
        ("stages: [{trainer: {max_epochs: 1}}]", "must have a name, got None"),
        ("stages: [{name: a}, {name: a}]", "each with its name: ['a', 'a']"),
        ("stages: [{name: a}, {name: b, data: {batchsize: 2}}]", "closest is 'data.batch_size'"),
        ("stages: [{name: a}, {name: b, data: {name: camvid}}]", "root must be the folder of"),
        ("stages: [{name: a}, {name: b, data: {train_split: tran}}]", "the closest is 'train'"),
        ("a: [", "is no YAML"),
    ],
)
def test_mistakes_in_any_stage_are_named_before_the_first_begins(stages, message, tmp_path):
    (tmp_path / "a.yaml").write_text(stages)
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", str(tmp_path / "a.yaml"), "--run_folder", str(tmp_path / "run")])
    text = str(raised.value.code)
    assert text.startswith("ctxops fit: ")
    assert message in text
    assert "\n" not in text
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_another_run(whole, recipe):
    with pytest.raises(SystemExit) as raised:
        main(["fit", f"--config={recipe}", "--run_folder", str(whole)])
    assert f"{whole} holds a run: ctxops resume {whole}" in str(raised.value.code)


def test_stages_in_processes_that_lightning_starts(recipe, tmp_path):
    with pytest.raises(SystemExit) as raised:
        main(["fit", f"--config={recipe}", f"--run_folder={tmp_path}", "--trainer.devices=2"])
    assert "stages in several processes must be started by torchrun" in str(raised.value.code)


def test_a_recipe_without_stages(tmp_path):
    (tmp_path / "a.yaml").write_text("trainer: {max_epochs: 1}")
    assert read_stages(tmp_path / "a.yaml") == ({}, {})


def test_all_stages_are_printed(recipe, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", str(recipe), "--print_config"])
    assert not raised.value.code
    printed = capsys.readouterr().out
    assert printed.index("# 1_coarse") < printed.index("batch_size: 2")
    assert printed.index("# 2_fine") < printed.index("batch_size: 4")
