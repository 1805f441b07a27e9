# SPDX-License-Identifier: Apache-2.0
"""What a scene shows, and that only the landmark tells which of each pair of classes it is."""

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")

from ctxops.models.data import IGNORE, Scenes, right_places, scene, scenes
from ctxops.models.data.scenes import CLASSES, PAIRED

LANDMARK, FIRST_PAIRED = CLASSES.index("landmark"), CLASSES.index("road")


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_pure_function_of_its_arguments():
    torch.manual_seed(1)
    np.random.seed(1)
    one = scene(3, seed=5)
    torch.manual_seed(2)
    assert equal(one, scene(3, seed=5))
    for other in (scene(4, seed=5), scene(3, seed=6), scene(3, seed=5, split="val")):
        assert not torch.equal(one.image, other.image)


@pytest.mark.parametrize("zones", [1, 2])
def test_shapes_and_types(zones):
    image, labels, distance = scene(0, size=(96, 192), zones=zones)
    assert image.shape == (3, 96, 192)
    assert image.dtype == labels.dtype == torch.uint8
    assert labels.shape == distance.shape == (96, 192)
    assert set(labels.unique().tolist()) <= {*range(len(CLASSES)), IGNORE}


@pytest.mark.parametrize("zones", [1, 2])
def test_nothing_but_the_landmark_tells_the_place(zones, monkeypatch):
    """In the other place every pixel looks the same, except the landmark's."""

    class Elsewhere(scenes._Canvas):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.places = 1 - self.places

    for index in range(20):
        here = scene(index, zones=zones)
        with monkeypatch.context() as patch:
            patch.setattr(scenes, "_Canvas", Elsewhere)
            there = scene(index, zones=zones)
        landmark = (here.labels == LANDMARK) | (there.labels == LANDMARK)
        assert landmark.float().mean() < 0.05 * zones
        assert torch.equal(here.image[:, ~landmark], there.image[:, ~landmark])
        a, b = here.labels[~landmark].int(), there.labels[~landmark].int()
        paired = (a >= FIRST_PAIRED) & (a != IGNORE)
        assert torch.equal(a[~paired], b[~paired])
        assert ((a[paired] ^ 1) == b[paired]).all()
        assert paired.float().mean() > 0.3


def test_one_place_for_each_landmark():
    """One zone has one kind of all pairs; among scenes of two zones some have both."""

    def kinds(zones, index):
        labels = scene(index, zones=zones).labels
        paired = labels[(labels >= FIRST_PAIRED) & (labels != IGNORE)]
        return set((paired % 2).tolist())

    one = [kinds(1, index) for index in range(12)]
    assert {frozenset(k) for k in one} == {frozenset({0}), frozenset({1})}
    assert {0, 1} in [kinds(2, index) for index in range(12)]


def test_all_classes_occur_in_about_as_many_pixels_of_both_places():
    counts = torch.zeros(len(CLASSES))
    for index in range(60):
        labels = scene(index, split="val").labels
        counts += torch.bincount(labels[labels != IGNORE].long(), minlength=len(CLASSES))
    assert counts.min() > 0
    pairs = counts[FIRST_PAIRED:].view(-1, 2)
    assert len(pairs) == len(PAIRED) // 2
    assert (pairs.min(1).values > 0.4 * pairs.max(1).values).all()


def test_distance_is_that_of_the_zone_s_landmark():
    _, labels, distance = scene(1, zones=2)
    for half in (slice(0, 70), slice(122, 192)):  # the wall is between them
        nearest = labels[:, half].flatten()[distance[:, half].argmin()]
        assert nearest == LANDMARK or distance[:, half].min() > 5
    assert (distance[:, 70:].diff(dim=1).abs() > 5).any()  # it jumps at the wall


def test_right_places_by_distance():
    """A wrong place is an error, a wrong pair does not count, nor does what is ignored."""
    sky, road, water, house, warehouse = map(
        CLASSES.index, ("sky", "road", "water", "house", "warehouse")
    )
    labels = torch.tensor([[road, road, house, road, sky, IGNORE, water]], dtype=torch.uint8)
    predicted = torch.tensor([[road, water, warehouse, house, sky, IGNORE, water]])
    distance = torch.tensor([[0.0, 9.9, 10.0, 11.0, 12.0, 13.0, 20.0]])
    result = right_places(labels, predicted.byte(), distance, step=10, bins=2)
    assert result.tolist() == [[1, 0], [2, 1]]
    assert right_places(labels, predicted, distance, step=10, bins=3)[:, 2].tolist() == [1, 1]


@pytest.mark.parametrize("zones", [1, 2])
def test_a_guess_is_right_half_of_the_time(zones):
    """Who takes every place for a town; and the truth is always right."""
    count = torch.zeros(2, 4)
    for index in range(40):
        _, labels, distance = scene(index, zones=zones)
        paired = (labels >= FIRST_PAIRED) & (labels != IGNORE)
        guess = torch.where(paired, labels & 0xFE, labels)
        count += right_places(labels, guess, distance, bins=4)
        hits, counts = right_places(labels, labels, distance)
        assert torch.equal(hits, counts)
        assert counts.sum() == (paired & (distance < 6 * 32)).sum()
    share = count[0] / count[1]
    assert ((share > 0.3) & (share < 0.7)).all()


def test_the_data_set():
    val = Scenes("val", length=3, seed=1, size=(64, 128))
    assert len(val) == 3
    image, labels = val[2]
    expected = scene(2, split="val", seed=1, size=(64, 128))
    assert equal((image, labels), expected[:2])
    assert len(list(val)) == 3
    assert val.name(2) == "scene 2 of val"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scene(0, split="vla"), "unknown split of scenes 'vla', the closest is 'val'"),
        (lambda: scene(0, size=(32, 64)), r"size must be at least \(64, 64\), got \(32, 64\)"),
        (lambda: scene(0, zones=0), "zones must be at least 1, got 0"),
        (lambda: scene(0, size=(96, 100), zones=2), r"size must be at least \(64, 128\)"),
        (lambda: Scenes(length=0), "length must be at least 1, got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
