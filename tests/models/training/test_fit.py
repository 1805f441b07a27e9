# SPDX-License-Identifier: Apache-2.0
"""Training by command: what it writes, how it resumes, and what it says of bad input."""

import inspect
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason='needs pip install "ctxops[train]"')

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import runs
import trees
from ctxops.__main__ import main
from ctxops.models import create_model, load_model, model_options, segment
from ctxops.models.data import scene
from ctxops.models.training.callbacks import FiniteLoss
from ctxops.models.training.checkpoint import AtomicCheckpointIO
from ctxops.models.training.cli import RECIPES, _Plan, _stages
from ctxops.models.training.datamodule import SegmentationData
from runs import Stop, assert_same_end, fit, load, losses, slow, stop_in_epoch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert fit(folder) == 0
    return folder


def test_a_run_leaves_what_it_needs(run):
    assert {"best.ckpt", "last.ckpt", "config.yaml", "logs"} == {p.name for p in run.iterdir()}
    assert len(losses(run)) == 9
    (events,) = run.glob("logs/version_0/events*")
    written = EventAccumulator(str(events)).Reload().Tags()
    assert {"loss", "mIoU", "accuracy", "iou/sky"} <= set(written["scalars"])
    assert written["images"] == [f"validation/{k}" for k in range(4)]


def test_a_checkpoint_is_a_network(run, tmp_path, capsys):
    """For load_model and for predict, which know nothing of training."""
    image, _, _ = scene(0, split="val")
    expected = segment(load_model(run / "best.ckpt"), image[None])[0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    out = str(tmp_path / "out")
    assert main(["predict", str(run / "best.ckpt"), str(tmp_path / "a.png"), "-o", out]) == 0
    labels = Image.open(tmp_path / "out/a.png")
    assert torch.equal(torch.from_numpy(np.array(labels)), expected)
    assert tuple(labels.getpalette()[:3]) == (70, 130, 180)  # sky


def test_validate_needs_the_checkpoint_alone(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["validate", str(run / "best.ckpt")]) == 0
    printed = capsys.readouterr().out
    states = load(run / "best.ckpt")["callbacks"]
    (best,) = (s["best_model_score"] for name, s in states.items() if "mIoU" in name)
    assert f"mean IoU        {best:.4f}" in printed
    assert main(["validate", str(run / "best.ckpt"), "--inference.scales", "[0.5]"]) == 0
    assert capsys.readouterr().out != printed
    assert not list(tmp_path.iterdir())


def test_test_scores_the_test_split(run, capsys):
    assert main(["validate", str(run / "best.ckpt"), "--data.val_split", "test"]) == 0
    expected = capsys.readouterr().out
    assert main(["test", str(run / "best.ckpt")]) == 0
    assert capsys.readouterr().out == expected
    assert "mean IoU" in expected


def test_boundaries_are_scored_where_asked_for(run, capsys):
    assert main(["validate", str(run / "best.ckpt"), "--metrics.boundaries", "true"]) == 0
    printed = capsys.readouterr().out
    for line in ("at boundaries  ", "away from them  ", "boundary F at  ", "mean boundary F  "):
        assert f"\n{line}" in printed


@pytest.mark.parametrize("network", ["ann", *slow(*sorted(runs.NETWORKS.keys() - {"ann"}))])
def test_a_resumed_run_continues_bitwise(network, tmp_path, monkeypatch):
    """Whichever process loads its samples."""
    options = {"data__crop": "[48, 48]", "data__brightness": "0.3", "trainer__max_epochs": "2"}
    options |= runs.network(network)
    if network == "mcibi":
        options["model__optimization__ema"] = "0.5"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fit(whole, **options) == 0
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 1)
        with pytest.raises(Stop):
            fit(broken, data__workers="2", **options)
    assert load(broken / "last.ckpt")["epoch"] == 0
    torch.manual_seed(999)  # what random numbers other code drew does not matter
    assert main(["resume", str(broken)]) == 0
    assert losses(broken) == losses(whole)
    assert_same_end(whole, broken)
    if network == "mcibi":
        state = load(whole / "last.ckpt")["state_dict"]
        assert state["bank.step"] == 6
        assert state["bank.memory"].any()


def test_an_average_of_the_weights_is_validated_and_saved(tmp_path, monkeypatch, capsys):
    """By its formula; buffers, a memory of features among them, are those of the last step."""
    after_steps, hook = [], FiniteLoss.on_train_batch_end

    def record(self, trainer, task, *others):
        hook(self, trainer, task, *others)
        after_steps.append({name: x.clone() for name, x in task.network.state_dict().items()})

    monkeypatch.setattr(FiniteLoss, "on_train_batch_end", record)
    options = {"model__optimization__ema": "0.75", "trainer__max_epochs": "1"}
    assert fit(tmp_path, **options, **runs.network("mcibi")) == 0
    saved = load(tmp_path / "last.ckpt")
    network = load_model(tmp_path / "last.ckpt")
    parameters = {name for name, _ in network.named_parameters()}
    for name, x in saved["state_dict"].items():
        expected = after_steps[0][name]
        for later in after_steps[1:]:
            if name in parameters:
                expected = 0.75 * expected + 0.25 * later[name]
            else:
                expected = later[name]
        torch.testing.assert_close(x, expected)
        assert torch.equal(saved["current_model_state"][f"network.{name}"], after_steps[-1][name])
    assert saved["state_dict"]["bank.memory"].any()
    printed = capsys.readouterr().out
    assert main(["validate", str(tmp_path / "last.ckpt")]) == 0
    assert capsys.readouterr().out in printed


def test_a_run_of_so_many_steps(tmp_path):
    fit(tmp_path, trainer__max_epochs="-1", trainer__max_steps="4")
    saved = load(tmp_path / "last.ckpt")
    assert saved["global_step"] == 4
    assert saved["finished"]
    assert saved["lr_schedulers"][0]["_last_lr"] == [0.0, 0.0]
    assert len(losses(tmp_path)) == 4


@pytest.mark.parametrize("network", ["mcibi", *slow(*sorted(runs.NETWORKS.keys() - {"mcibi"}))])
def test_twenty_steps_lower_the_loss(network, tmp_path):
    """Not counting the first: then a memory is empty and its rows cost nothing."""
    options = runs.network(network) | {"data__steps_per_epoch": "20"}
    options |= {"data__options": "{length: 2, size: [64, 64]}"}
    options |= {"trainer__max_epochs": "1", "data__flip": "0", "model__optimization__lr": "0.01"}
    assert fit(tmp_path, **options) == 0
    values = losses(tmp_path)[1:]
    assert len(values) == 19
    assert sum(values[-5:]) < 0.9 * sum(values[:5])


@pytest.mark.slow
def test_a_compiled_step_is_the_same(tmp_path):
    options = {"trainer__max_epochs": "1", "model__network": "fcn", "data__crop": "[64, 64]"}
    compiled = torch._dynamo.utils.counters["frames"]
    before = compiled["ok"]
    assert fit(tmp_path / "a", **options) == 0
    assert fit(tmp_path / "b", model__compile="eager", **options) == 0
    assert compiled["ok"] > before
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    names = (load(tmp_path / f"{run}/last.ckpt")["state_dict"].keys() for run in "ab")
    assert next(names) == next(names)


def test_weights_of_other_classes_are_taken_in_part_where_asked_for(run, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    trees.folder(tmp_path / "data")
    options = {"data__name": "folder", "data__root": str(tmp_path / "data"), "data__options": "{}"}
    options |= {"model__init_from": str(run / "last.ckpt"), "trainer__max_epochs": "1"}
    options |= {"model__freeze_norm": "true", "model__optimization__lr": "0"}
    with pytest.raises(SystemExit) as raised:
        fit(tmp_path / "strict", **options)
    text = str(raised.value.code)
    expected = "shapes classifier.1.weight (12, 16, 1, 1) instead of (3, 16, 1, 1)"
    assert f"init_from {run}/last.ckpt: the weights do not fit the network: " in text
    assert expected in text
    assert fit(tmp_path / "part", model__init_strict="false", **options) == 0
    assert f"init_from {run}/last.ckpt, not taken: {expected[:6]}" in capsys.readouterr().out
    theirs, ours = (load(folder / "last.ckpt")["state_dict"] for folder in (run, tmp_path / "part"))
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert {name.partition(".")[0] for name in ours.keys() - same} <= {"classifier", "auxiliary"}
    assert "encoder" in {name.partition(".")[0] for name in same}


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ohem", "cross_entropy"])
def test_ohem_and_options_reach_their_parts(loss, tmp_path):
    """Frozen norms, weights to start from, memory format and accumulation in one run."""
    first, second = tmp_path / "a", tmp_path / "b"
    assert fit(first, model__loss__kind=loss, trainer__max_epochs="1") == 0
    more = {"model__init_from": str(first / "last.ckpt"), "model__freeze_norm": "true"}
    more |= {"model__channels_last": "true", "trainer__accumulate_grad_batches": "3"}
    assert fit(second, trainer__max_epochs="1", **more) == 0
    a, b = (load(folder / "last.ckpt")["state_dict"] for folder in (first, second))
    same = {name for name in a if torch.equal(a[name], b[name])}
    norms = {n for n in a if re.sub("[^.]*$", "running_mean", n) in a}
    assert norms <= same
    assert same < a.keys()
    assert load(second / "last.ckpt")["global_step"] == 1


def test_a_missing_label_costs_nothing_and_an_absent_class_is_named(tmp_path, capsys):
    trees.folder(tmp_path / "data", "- sky\n- ground\n- tree\n- moon\n")
    data = {"data__name": "folder", "data__root": str(tmp_path / "data"), "data__options": "{}"}
    assert fit(tmp_path / "run", trainer__max_epochs="1", **data) == 0
    printed = capsys.readouterr().out
    assert "in no label, not in the mean: ground, moon" in printed
    assert "nan" not in printed


def spoilt(folder):
    """Data of which two pairs for training and one for validation cannot be used."""
    trees.folder(folder)
    for k in range(4):
        trees.image(folder / f"images/train/{k}.png")
        trees.labels(folder / f"labels/train/{k}.png", (0, k % 3))
    (folder / "labels/train/1.png").unlink()
    image = folder / "images/train/2.png"
    image.write_bytes(image.read_bytes()[:-30])
    trees.labels(folder / "labels/val/c.png", (0, 77))
    return {"data__name": "folder", "data__root": str(folder), "data__options": "{}"}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_bad_pair_is_an_error_that_names_it(workers, tmp_path):
    data = spoilt(tmp_path / "data")
    with pytest.raises(SystemExit, match=r"1 files of folder are missing: .*labels/train/1\.png"):
        fit(tmp_path / "run", data__workers=workers, **data)
    (tmp_path / "data/images/train/1.png").unlink()
    with pytest.raises(ValueError, match=r"images/train/2\.png is no image that can be read"):
        fit(tmp_path / "run", data__workers=workers, **data)


def test_skip_bad_trains_and_validates_on_the_rest(tmp_path, capfd, monkeypatch):
    """With the same samples whoever loads them, also in a run that is resumed."""
    data = spoilt(tmp_path / "data") | {"data__skip_bad": "true", "data__crop": "[32, 32]"}
    data |= {"trainer__max_epochs": "2"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fit(whole, data__workers="2", **data) == 0
    printed = capfd.readouterr()
    for name in ("labels/train/1", "images/train/2", "labels/val/c"):
        (line,) = (line for line in printed.err.splitlines() if f"{name}.png" in line)
        assert line.startswith("passed over: ")
    assert "2 of the 6 pairs of train were passed over" in printed.out
    assert "1 of the 2 pairs of val were passed over" in printed.out

    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 1)
        with pytest.raises(Stop):
            fit(broken, **data)
    assert main(["resume", str(broken)]) == 0
    assert losses(broken) == losses(whole)
    printed = capfd.readouterr()
    assert printed.err.count("labels/val/c.png") == 2  # once in each start
    assert "1 of the 2 pairs of val were passed over" in printed.out
    assert main(["validate", str(whole / "last.ckpt"), "--data.skip_bad", "true"]) == 0
    assert "1 of the 2 pairs of val were passed over" in capfd.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"the loss of step \d is not finite; its images: scene "):
        fit(tmp_path, model__optimization="{optimizer: sgd, lr: 1.0e+30}")
    assert not (tmp_path / "last.ckpt").exists()


# What is asked for, and the one line that is said.
MISTAKES = [
    (["--modle.network", "ann"], "unknown key 'modle.network', the closest is 'model.network'"),
    (
        ["--model.loss.kepe", "0.5"],
        "unknown key 'model.loss.kepe', the closest is 'model.loss.keep'",
    ),
    (["--data.batchsize", "2"], "unknown key 'data.batchsize', the closest is 'data.batch_size'"),
    (
        ["--inference.windw", "2"],
        "unknown key 'inference.windw', the closest is 'inference.window'",
    ),
    (["--model.network", "anm"], "unknown model 'anm', the closest is 'ann'"),
    (["--model.options", "{chanels: 3}"], "'chanels', the closest is 'channels'"),
    (["--data.name", "citiscapes"], "unknown data set 'citiscapes', the closest is 'cityscapes'"),
    (["--data.name", "camvid", "--data.options", "{}"], "root must be the folder of camvid"),
    (["--data.batch_size", "two"], "data.batch_size"),
    (["--model.loss.keep", "2"], "keep must be above 0 and at most 1, got 2"),
    (
        ["--config", "ann_citiscapes"],
        "unknown recipe 'ann_citiscapes', the closest is 'ann_cityscap",
    ),
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--ckpt_path", "x"], "--ckpt_path is not taken: ctxops resume RUN goes on with a run"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_named_in_one_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--run_folder", str(tmp_path), *arguments])
    text = str(raised.value.code)
    assert message in text
    assert text.startswith("ctxops fit: ")
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("modle: {network: ann}", "key 'modle.network', the closest is 'model.network'"),
        ("model: {netwrk: ann}", "key 'model.netwrk', the closest is 'model.network'"),
        ("model: {loss: {kepe: 0.5}}", "key 'model.loss.kepe', the closest is 'model.loss.keep'"),
        ("trainer: {max_epoch: 3}", "the closest is 'trainer.max_epochs'"),
        ("inference: {scale: [1.0]}", "the closest is 'inference.scales'"),
    ],
)
def test_a_recipe_with_a_misspelt_key(recipe, message, tmp_path):
    (tmp_path / "a.yaml").write_text(recipe)
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", str(tmp_path / "a.yaml")])
    text = str(raised.value.code)
    assert "unknown key" in text
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("model: 3", "model must have keys of its own, got 3"),
        ("data: [cityscapes]", r"data must have keys of its own, got ['cityscapes']"),
        ("model: {loss: ohem}", "model.loss must have keys of its own, got 'ohem'"),
        ("trainer: fast", "trainer must have keys of its own, got 'fast'"),
        ("data: {batch_size: two}", "data.batch_size"),
        ("model: [", "is no YAML"),
    ],
)
def test_a_recipe_with_a_wrong_value(recipe, message, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(recipe)
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", str(file)])
    text = str(raised.value.code)
    assert text.startswith("ctxops fit: ")
    assert message in text
    assert "\n" not in text


def test_other_mistakes(run, tmp_path):
    for arguments, message in (
        (["fit", "--run_folder", str(run)], f"{run} holds a run: ctxops resume {run}, or another"),
        (["resume", str(tmp_path)], "holds no run to resume"),
        (["resume", str(run), "--model.network", "ann"], "and nothing else: it goes on as it was"),
        (["validate"], "give a checkpoint first: ctxops validate CHECKPOINT"),
        (["test", "--data.root", "x"], "give a checkpoint first: ctxops test CHECKPOINT"),
        (["validate", "nowhere"], "No such file"),
        (["validate", __file__], "is no checkpoint"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert str(raised.value.code).startswith(f"ctxops {arguments[0]}: ")
        assert message in str(raised.value.code)


def test_a_checkpoint_of_another_network_or_other_classes(run, tmp_path):
    changed = load(run / "last.ckpt")
    for part, value, message in (
        ("model", "fcn", "the checkpoint is of another model: fcn, not ann"),
        ("classes", ["a"], r"the checkpoint is of another classes: \['a'\], not \['sky', "),
    ):
        torch.save(changed | {part: value}, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=message):
            main(["validate", str(tmp_path / "a.ckpt")])


def test_all_options_of_a_recipe_are_printed(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", "ann_cityscapes", "--print_config"])
    assert not raised.value.code
    printed = capsys.readouterr().out
    assert "max_epochs: 60" in printed
    assert "accumulate_grad_batches: 1" in printed


@pytest.fixture(scope="module")
def parse():
    return _Plan(["fit", "--config", str(RECIPES / "scenes.yaml")]).parser.parse_args


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_recipes_are_understood(name, parse, tmp_path):
    told = ["fit", "--config", str(RECIPES / f"{name}.yaml")]
    for arguments in (_stages(told, tmp_path) or {"": told}).values():
        config = parse(arguments).fit
        assert config.trainer.max_epochs > 0
        options = model_options(config.model.network).keys()
        options |= inspect.signature(create_model).parameters.keys()
        assert (config.model.options or {}).keys() <= options


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*_*.yaml")))
def test_each_value_of_a_paper_s_recipe_has_its_source(name):
    """Other than what the recipe is about: the data set, the network, and the names of stages."""
    comment = False
    for line in (RECIPES / f"{name}.yaml").read_text().splitlines():
        key, _, value = line.strip().partition(":")
        if value.strip() and not line.startswith("#") and key not in ("name", "network", "- name"):
            assert "  # " in line or comment, line
        comment = line.strip().startswith("#")


class _Kill:
    """What kills the process while it is written."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_while_writing_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"epoch": 1, "x": torch.ones(1000)}, path)
    child = os.fork()
    if child == 0:
        try:
            io.save_checkpoint({"epoch": 2, "x": torch.ones(1000), "y": _Kill()}, path)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert load(path)["epoch"] == 1
    io.save_checkpoint({"epoch": 3}, path)
    assert load(path)["epoch"] == 3
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_the_checkpoint_before(tmp_path):
    """Killed while it wrote the second epoch's: the first one's is intact."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"trainer__max_epochs": "2"}
    assert fit(whole, **options) == 0
    code = f"""
import os, signal, torch
from ctxops.__main__ import main
save = torch.save
def half(checkpoint, file):
    save(checkpoint, file)
    if checkpoint["epoch"] == 1 and file.name.endswith("last.ckpt.part"):
        file.truncate(file.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
main({runs.arguments(killed, **options)})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert (killed / "last.ckpt.part").exists()
    assert load(killed / "last.ckpt")["epoch"] == 0
    assert main(["resume", str(killed)]) == 0
    assert losses(killed)[-3:] == losses(whole)[-3:]
    assert_same_end(whole, killed)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """On images without ignored pixels, with frozen norms and without dropout; all networks in one
    start of the processes, as the stages of a recipe are."""
    for split, count in (("train", 8), ("val", 2)):
        for k in range(count):
            trees.image(tmp_path / f"data/images/{split}/{k}.png", (64, 64))
            trees.labels(tmp_path / f"data/labels/{split}/{k}.png", (0, k % 3, 1), (64, 64))
    (tmp_path / "data/classes.yaml").write_text("[a, b, c]")
    data = {"data__name": "folder", "data__root": str(tmp_path / "data"), "data__options": "{}"}
    data |= {"data__batch_size": "4", "model__freeze_norm": "true"}
    # Not AdamW, which divides by gradients that are hardly more than rounding.
    data |= {"model__optimization": "{optimizer: sgd, lr: 0.01}", "trainer__max_epochs": "1"}
    for processes in "12":
        each = [
            runs.arguments(
                tmp_path / processes / network,
                trainer__devices=processes,
                **data,
                **runs.network(network, ", dropout: 0.0" * (network != "gcn")),
            )
            for network in runs.NETWORKS
        ]
        program = tmp_path / f"{processes}.py"
        program.write_text(f"from ctxops.__main__ import main\nlist(map(main, {each}))\n")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        subprocess.run(
            [sys.executable, *launch, str(program)],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=300,
            cwd=tmp_path,  # not the tree, whose ctxops may not be the installed one
        )
    for network in runs.NETWORKS:
        one, two = (tmp_path / processes / network for processes in "12")
        assert losses(one) == pytest.approx(losses(two), rel=1e-4)
        one, two = (load(folder / "last.ckpt")["state_dict"] for folder in (one, two))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_validation_sees_each_image_once_in_any_number_of_processes():
    """Lightning's own sampler would see some twice."""
    data = SegmentationData(options={"length": 7, "size": [32, 32]})
    data.setup("validate")
    seen = []
    for rank in range(3):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=3)
        seen += data.val_dataloader().dataset.indices
    assert sorted(seen) == list(range(7))


def test_prediction_and_data_never_import_lightning(run, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    code = (
        "import sys; from ctxops.__main__ import main\n"
        f"main(['predict', {str(run / 'best.ckpt')!r}, {str(tmp_path / 'a.png')!r}, '-o', "
        f"{str(tmp_path / 'out')!r}])\n"
        "main(['data', 'check', 'folder', 'nowhere'])\n"
        "print('lightning' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "False"
