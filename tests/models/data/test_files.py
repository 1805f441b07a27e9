# SPDX-License-Identifier: Apache-2.0
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

import trees

pytest.importorskip("torchvision")

from ctxops.__main__ import main
from ctxops.models.data import IGNORE, SPECS, Files, Spec, find_spec, folder_spec, open_split
from ctxops.models.data.files import map_image, read_image, read_numbers
from ctxops.models.data.spec import colours

# Of each data set: its tree, how many pairs, the classes of the first labels' first columns, and
# the least number that it does not know.
TREES = {
    "ade20k": (trees.ade20k, 2, (IGNORE, 0, 149), 151),
    "camvid": (trees.camvid, 2, (0, 10, IGNORE), 12),
    "cihp": (trees.cihp, 2, (0, 19), 20),
    "cityscapes": (trees.cityscapes, 3, (0, IGNORE, 18, IGNORE), 34),
    "cityscapes_coarse": (lambda root: trees.cityscapes(root, "gtCoarse"), 3, (0, IGNORE, 18), 34),
    "coco_stuff10k": (trees.coco_stuff10k, 2, (IGNORE, 0, 11, 170), 12),
    "coco_stuff164k": (trees.coco_stuff164k, 2, (0, 11, 170, IGNORE), 11),
    "folder": (trees.folder, 2, (0, 2, IGNORE), 3),
    "lip": (trees.lip, 2, (0, 19), 20),
    "nyudv2": (trees.nyudv2, 2, (IGNORE, 0, 39), 41),
    "pascal_context_59": (trees.pascal_context, 2, (IGNORE, 0, 58), 60),
    "pascal_context_60": (trees.pascal_context, 2, (0, 1, 59), 60),
    "sbd": (trees.sbd, 2, (0, 20), 21),
    "voc2012": (trees.voc2012, 2, (0, 20, IGNORE), 21),
}


def test_every_data_set_has_a_tree():
    assert TREES.keys() == SPECS.keys() | {"folder"}


@pytest.fixture(params=TREES)
def name(request):
    """Of a data set whose files can be read here."""
    if request.param in SPECS and SPECS[request.param].variable:
        pytest.importorskip("scipy", reason="labels in .mat files need scipy")
    return request.param


def test_a_tree_in_the_true_layout(name, tmp_path):
    make, count, classes, _ = TREES[name]
    make(tmp_path)
    files = open_split(name, "train", tmp_path)
    assert len(files) == count
    assert len({files.name(i) for i in range(count)}) == count
    for image, labels in files:
        assert image.shape == (3, *trees.SIZE)
        assert labels.shape == trees.SIZE
        assert image.dtype == labels.dtype == torch.uint8
        assert tuple(labels[0, : len(classes)].tolist()) == classes


def test_check_is_content_with_a_whole_tree(name, tmp_path, capsys):
    make, count, _, _ = TREES[name]
    make(tmp_path)
    assert main(["data", "check", name, str(tmp_path), "--split", "train"]) == 0
    assert f"train: {count} pairs" in capsys.readouterr().out


def spoil(labels, fault, unknown):
    """Makes labels wrong in one way: a .mat file or an image."""
    if fault == "missing":
        labels.unlink()
    elif fault == "empty":
        labels.write_bytes(b"")
    elif fault == "truncated":
        labels.write_bytes(labels.read_bytes()[:-30])
    elif fault == "another size":
        trees.labels(labels, size=(6, 9))
    elif fault == "an unknown number":
        trees.labels(labels, (0, unknown))
    elif labels.suffix == ".mat":
        trees.matlab(labels, np.zeros((6, 8, 3), np.uint8))
    else:
        trees.image(labels)


@pytest.mark.parametrize(
    "fault", ["missing", "empty", "truncated", "another size", "an unknown number", "colours"]
)
def test_check_finds_what_is_wrong_with_labels(name, fault, tmp_path, capsys):
    make, count, _, unknown = TREES[name]
    make(tmp_path)
    spoilt = find_spec(name, tmp_path).pairs(tmp_path, "train")[-1].labels
    spoil(spoilt, fault, unknown)
    assert main(["data", "check", name, str(tmp_path), "--split", "train"]) == 1
    report = capsys.readouterr().out
    problems = [line for line in report.splitlines() if line.startswith("  ")]
    assert len(problems) == 1
    assert str(spoilt) in problems[0]
    if fault == "an unknown number":
        assert f"numbers of no class: [{unknown}]" in problems[0]
    if fault == "missing":
        with pytest.raises(FileNotFoundError, match=spoilt.name):
            open_split(name, "train", tmp_path)
    else:
        files = open_split(name, "train", tmp_path)
        files[0]
        with pytest.raises(ValueError, match=spoilt.name):
            files[count - 1]


@pytest.mark.parametrize("fault", ["missing", "empty", "truncated"])
def test_check_finds_what_is_wrong_with_images(name, fault, tmp_path, capsys):
    """A missing one where its labels or a list tell of it."""
    make, _, _, unknown = TREES[name]
    make(tmp_path)
    image, labels = find_spec(name, tmp_path).pairs(tmp_path, "train")[-1]
    spoil(image, fault, unknown)
    assert main(["data", "check", name, str(tmp_path), "--split", "train"]) == 1
    report = capsys.readouterr().out
    (problem,) = (line for line in report.splitlines() if line.startswith("  "))
    assert str(image) in problem or problem == f"  no image for: {labels}"


def test_check_without_a_folder_says_what_it_should_have(capsys):
    for name, spec in SPECS.items():
        assert main(["data", "check", name]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"{name}: {len(spec.classes)} classes; {spec.source}\n")
        for split, where in spec.splits.items():
            assert f"  {split}: images {where.images}" in printed
            assert f"labels {where.labels}\n" in printed
    assert main(["data", "check", "folder"]) == 1
    assert "expected classes.yaml, images/train/" in capsys.readouterr().err


def test_voc_with_the_labels_of_sbd(tmp_path):
    trees.voc2012_augmented(tmp_path)
    files = open_split("voc2012", "train+aug", tmp_path)
    assert [tuple(labels[0, :2].tolist()) for _, labels in files] == [(0, 20), (0, 20), (20, 0)]


def test_variables_of_matlab(tmp_path):
    io = pytest.importorskip("scipy.io")
    file = tmp_path / "a.mat"
    values = np.array([[0, 20], [255, 3]])
    io.savemat(file, {"S": values.astype(float), "x": "text", "n": np.zeros((0, 0))})
    assert (read_numbers(file, "S") == values).all()
    for variable, message in (
        ("T", "must have the variable T"),
        ("S.a", "must have the variable S.a"),
        ("x", "must have one channel of numbers from 0 to 65535, got <U4 of shape"),
        ("n", r"must have one channel of numbers .* got .* of shape \(0, 0\)"),
    ):
        with pytest.raises(ValueError, match=f"a.mat {message}"):
            read_numbers(file, variable)


def test_labels_of_matlab_need_scipy(tmp_path, monkeypatch):
    trees.names(tmp_path / "train.txt", "2008_000002")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"labels in \.mat files need scipy"):
        open_split("sbd", "train", tmp_path)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_specs(spec):
    assert len(set(spec.classes)) == len(spec.classes) == len(spec.palette)
    assert spec.source
    if spec.ids is not None:
        assert {*spec.ids.values()} - {IGNORE} == {*range(len(spec.classes))}


def test_several_splits(tmp_path):
    trees.folder(tmp_path)
    files = open_split("folder", "train+val", tmp_path)
    assert [files.name(i).split("/")[-2] for i in range(4)] == ["train", "train", "val", "val"]


def test_colours_of_voc():
    assert colours(4) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert len(set(colours(255))) == 255


def test_classes_with_colours(tmp_path):
    trees.folder(tmp_path, "sky: [1, 2, 3]\nground:\ntree: [0, 255, 0]\n")
    spec = folder_spec(tmp_path)
    assert spec.classes == ("sky", "ground", "tree")
    assert spec.palette == ((1, 2, 3), (128, 0, 0), (0, 255, 0))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA"])
def test_modes_of_images(mode, tmp_path):
    trees.image(tmp_path / "a.png", mode=mode)
    image = read_image(tmp_path / "a.png")
    assert image.shape == (3, *trees.SIZE)
    if mode in ("L", "LA"):
        assert torch.equal(image[0], image[2])


def test_sixteen_bits_and_rotation(tmp_path):
    values = np.arange(48, dtype=np.uint16).reshape(6, 8) << 8
    Image.fromarray(values).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png")[1], torch.arange(48).view(6, 8).byte())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (8, 6)).save(tmp_path / "b.jpg", exif=exif)
    assert read_image(tmp_path / "b.jpg").shape == (3, 8, 6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(
    "stored",
    [{"rowsperstrip": 16}, {"tile": (32, 16)}, {"tile": (16, 32), "compression": "zlib"}, "planes"],
    ids=str,
)
def test_a_tiff_is_mapped(stored, channels, dtype, tmp_path, monkeypatch):
    """Whatever it is made of, and by no other reader."""
    monkeypatch.setattr("ctxops.models.data.files.read_image", None)
    tifffile = pytest.importorskip("tifffile", reason="needs pip install tifffile")
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (70, 90, channels), dtype)
    kind = {"photometric": "minisblack" if channels == 1 else "rgb"}
    if channels == 4:
        kind["extrasamples"] = ["unassalpha"]
    image = values[:, :, 0] if channels == 1 else values
    if stored == "planes":
        if channels == 1:
            pytest.skip("one plane is no case of its own")
        stored, image = {"planarconfig": "separate"}, np.moveaxis(values, 2, 0)
    tifffile.imwrite(tmp_path / "a.tif", image, **kind, **stored)
    expected = (values >> 8 * (values.itemsize - 1)).astype(np.uint8)[:, :, :3]
    expected = torch.from_numpy(np.moveaxis(expected, 2, 0)).expand(3, -1, -1)
    assert torch.equal(map_image(tmp_path / "a.tif"), expected)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_mapped_tiff_is_never_in_memory(compression, tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="needs pip install tifffile")
    image = np.zeros((3072, 3072, 3), np.uint8)
    layout = {"photometric": "rgb", "tile": (256, 256), "compression": compression}
    tifffile.imwrite(tmp_path / "a.tif", image, **layout)
    tracemalloc.start()
    try:
        map_image(tmp_path / "a.tif")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < image.nbytes / 4


@pytest.mark.parametrize("mode", ["P", "CMYK", "1", "turned"])
def test_other_tiffs_are_read_as_before(mode, tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="needs pip install tifffile")
    file = tmp_path / "a.tif"
    trees.image(file, mode="RGB" if mode == "turned" else mode)
    if mode == "turned":
        tifffile.imwrite(file, np.asarray(Image.open(file)), extratags=[(274, "H", 1, 6)])
    assert torch.equal(map_image(file), read_image(file))
    tifffile.imwrite(file, np.zeros((*trees.SIZE, 3), np.uint8), photometric="rgb")
    truncate(file)
    with pytest.raises(ValueError, match=r"a\.tif is no image that can be read"):
        map_image(file)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


# What can be wrong with a pair: how it comes about, and what is said of it.
FAULTS = {
    "other size": (lambda f: trees.labels(f, size=(6, 9)), r"c\.png must have the size of its ima"),
    "unknown number": (lambda f: trees.labels(f, (0, 9)), r"c\.png has \[9\], no numbers of folde"),
    "16 bits": (lambda f: trees.labels(f, (0, 300)), r"c\.png has \[300\], no numbers of folder"),
    "colours": (trees.image, r"c\.png must have one channel of numbers .* got mode 'RGB'"),
    "truncated": (truncate, r"c\.png is no image that can be read"),
    "empty": (lambda f: f.write_bytes(b""), r"c\.png is no image that can be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_pairs(fault, tmp_path, capsys):
    trees.folder(tmp_path)
    spoil, message = FAULTS[fault]
    spoil(tmp_path / "labels/train/c.png")
    files = open_split("folder", "train", tmp_path)
    files[0]
    with pytest.raises(ValueError, match=message):
        files[1]
    assert main(["data", "check", "folder", str(tmp_path)]) == 1
    assert "c.png" in capsys.readouterr().out


def test_missing_labels(tmp_path):
    trees.folder(tmp_path)
    (tmp_path / "labels/train/c.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files of folder are missing: .*c\.png; all of"):
        open_split("folder", "train", tmp_path)


def test_skip_bad_reports_each_bad_pair_once(tmp_path, capsys):
    trees.folder(tmp_path)
    for fault, (spoil, _) in FAULTS.items():
        trees.image(tmp_path / f"images/train/{fault}.png")
        trees.labels(tmp_path / f"labels/train/{fault}.png")
        spoil(tmp_path / f"labels/train/{fault}.png")
    (tmp_path / "labels/train/c.png").unlink()
    files = open_split("folder", "train", tmp_path, skip_bad=True)
    assert files.skipped == 0
    for _ in range(2):
        assert sum(files[i] is not None for i in range(len(files))) == 1
    assert files.skipped == len(FAULTS) + 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(FAULTS) + 1
    for fault in (*FAULTS, "c"):
        assert sum(f"/{fault}.png" in line for line in lines) == 1, fault
    assert all(line.startswith("passed over: ") for line in lines)


@pytest.mark.parametrize("name", TREES)
def test_an_empty_folder_says_what_to_put_where(name, tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        open_split(name, "train", tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "expected" in str(raised.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_spec("citiscapes"), "unknown data set 'citiscapes', the closest is 'citys"),
        (lambda: find_spec("folder"), "root must be the folder of your data, got None"),
        (lambda: open_split("camvid", "train"), "root must be the folder of camvid .* got None"),
        (lambda: open_split("camvid", "train", ".", zones=2), r"options are for scenes, .*\['zone"),
        (lambda: Files(SPECS["camvid"], ".", "vla"), "unknown split of camvid 'vla', the closest"),
        (lambda: Spec("a", ("b",), {}), "classes must be 2 to 255, got 1"),
        (lambda: Spec("a", ("b", "b"), {}), r"classes must have different names, got \[.b., .b.\]"),
        (lambda: Spec("a", ("b", "c"), {}, palette=((1, 2, 3),)), "a colour for each of 2 classes"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("3", "must be a list of names, or names with colours, got 3"),
        ("sky: [1, 2]\nground:", r"must have colours of three numbers up to 255, got \[1, 2\]"),
        ("sky: 7\nground:", "must have colours of three numbers up to 255, got 7"),
        ("- sky: [1, 2, 3]\n- ground", "must be a list of names, or names with colours, got "),
        ("- [", "is no YAML"),
    ],
)
def test_bad_classes(classes, message, tmp_path):
    (tmp_path / "classes.yaml").write_text(classes)
    with pytest.raises(ValueError, match=f"classes.yaml {message}"):
        folder_spec(tmp_path)


def test_check_finds_everything_at_once(tmp_path, capsys):
    trees.folder(tmp_path)
    for name, (spoil, _) in FAULTS.items():
        trees.image(tmp_path / f"images/train/{name}.png")
        trees.labels(tmp_path / f"labels/train/{name}.png")
        spoil(tmp_path / f"labels/train/{name}.png")
    trees.image(tmp_path / "images/train/alone.png")
    truncate(tmp_path / "images/val/c.png")
    assert main(["data", "check", "folder", str(tmp_path)]) == 1
    report = capsys.readouterr().out
    problems = [line for line in report.splitlines() if line.startswith("  ")]
    assert len(problems) == len(FAULTS) + 2
    for name in (*FAULTS, "alone"):
        assert sum(f"/{name}.png" in line for line in problems) == 1, name
    assert "train: 9 pairs" in report
    assert "val: 2 pairs" in report
    assert "not there: no 'test' images" in report


def test_check_counts_the_classes(tmp_path, capsys):
    trees.folder(tmp_path)
    assert main(["data", "check", "folder", str(tmp_path), "--split", "train"]) == 0
    report = capsys.readouterr().out
    assert "train: 2 pairs; sizes 6 x 8 (2)" in report
    rows = {line.split()[0]: line.split()[1:] for line in report.splitlines()[2:]}
    # of 8 columns 3 are sky, 3 tree and 2 ignored
    assert rows["sky"] == ["37.5000%", "2"]
    assert rows["ground"] == ["0.0000%", "0"]
    assert rows["tree"] == ["37.5000%", "2"]
    assert rows["(ignored)"] == ["25.0000%", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["citiscapes", "."], "unknown data set 'citiscapes', the closest is 'cityscapes'"),
        (["camvid", "nowhere", "--split", "vla"], "unknown split of camvid 'vla', the closest is"),
        (["folder", "nowhere"], "no nowhere/classes.yaml: expected classes.yaml, images/train/"),
    ],
)
def test_check_fails(arguments, message, capsys):
    assert main(["data", "check", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_check_of_an_empty_root(tmp_path, capsys):
    assert main(["data", "check", "cityscapes", str(tmp_path)]) == 1
    assert "expected" in capsys.readouterr().out
