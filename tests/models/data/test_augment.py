# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

pytest.importorskip("torchvision")

from ctxops.models.data import IGNORE, Augmentation, Augmented, mirrored_classes
from ctxops.models.data.human_parsing import CIHP
from ctxops.models.data.order import generator


def sample(height=20, width=30):
    """Every pixel is different, and its labels are what the image shows."""
    labels = torch.arange(height * width).view(height, width) % 251
    return labels.to(torch.uint8).expand(3, -1, -1), labels.to(torch.uint8)


def test_nothing_is_asked_for_nothing_happens():
    image, labels = sample()
    changed = Augmentation()(image, labels, generator(0))
    assert torch.equal(changed[0], image)
    assert torch.equal(changed[1], labels)


def test_crop_and_flip_move_labels_with_the_image():
    image, labels = sample()
    augmentation = Augmentation(crop=(8, 12), flip=0.5)
    seen = set()
    for key in range(50):
        x, y = augmentation(image, labels, generator(key))
        assert x.shape == (3, 8, 12)
        assert torch.equal(x[0], y)
        seen.add((y[0, 0].item(), bool(y[0, 1] < y[0, 0])))
    assert len(seen) > 40  # places and both directions
    assert {flipped for _, flipped in seen} == {True, False}


def test_left_and_right_change_places_in_a_mirror_image():
    names = ["left arm", "face", "right arm", "left leg", "the left one", "right leg", "left shoe"]
    assert mirrored_classes(names) == [(0, 2), (3, 5)]
    assert mirrored_classes(CIHP.classes) == [(14, 15), (16, 17), (18, 19)]
    labels = torch.arange(7, dtype=torch.uint8).expand(2, 7)
    image = torch.zeros(3, 2, 7, dtype=torch.uint8)
    augmentation = Augmentation(flip=1, mirrored=mirrored_classes(names))
    _, mirrored = augmentation(image, labels, torch.Generator())
    assert mirrored[0].tolist() == [6, 3, 4, 5, 0, 1, 2]
    assert labels[0].tolist() == list(range(7))


def test_a_crop_larger_than_the_image_is_padded():
    image, labels = sample()
    x, y = Augmentation(crop=(25, 12))(image + 1, labels, generator(1))
    assert x.shape[1:] == y.shape == (25, 12)
    assert not x[:, 20:].any()
    assert (y[20:] == IGNORE).all()
    assert (y[:20] != IGNORE).all()


def test_scale_changes_both_sides_and_invents_no_class():
    image, labels = sample()
    labels = labels // 125 * 7  # 0, 7 and 14
    sizes = set()
    for key in range(30):
        x, y = Augmentation(scale=(0.5, 2.0))(image, labels, generator(key))
        assert x.shape[1:] == y.shape
        assert set(y.unique().tolist()) <= {0, 7, 14}
        sizes.add(y.shape)
        assert abs(y.shape[0] / 20 - y.shape[1] / 30) < 0.05
    assert min(sizes)[0] < 15
    assert max(sizes)[0] > 30


def test_most_of_one_class_draws_the_crop_again():
    labels = torch.zeros(40, 40, dtype=torch.uint8)
    labels[:, 30:] = 1
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)

    def share(limit):
        augmentation = Augmentation(crop=(10, 10), most_of_one_class=limit)
        crops = [augmentation(image, labels, generator(key))[1] for key in range(60)]
        return sum(0 < crop.float().mean() < 1 for crop in crops) / len(crops)

    assert share(0.95) > 0.85 > 0.5 > share(1.0)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_photometric_changes_are_of_the_image_alone(name):
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    _, labels = sample()
    changed = [Augmentation(**{name: 0.4})(image, labels, generator(key)) for key in range(3)]
    assert all(torch.equal(y, labels) for _, y in changed)
    assert not any(torch.equal(x, image) for x, _ in changed)
    assert not torch.equal(changed[0][0], changed[1][0])


def test_a_function_of_seed_and_position():
    augmented = Augmented([sample()], Augmentation(crop=(5, 5), scale=(0.5, 2.0)), seed=3)
    torch.manual_seed(0)
    first = augmented[0, 7]
    torch.manual_seed(1)
    again, later = augmented[0, 7], augmented[0, 8]
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], later[0])
    assert first[2] == 0
    assert len(augmented) == 1


def test_the_next_sample_takes_the_place_of_one_that_is_passed_over():
    images = [None, None, sample(6, 8), sample(10, 10), None]
    augmented = Augmented(images, Augmentation(crop=(5, 5)), seed=3)
    for index, taken in ((0, 2), (1, 2), (2, 2), (3, 3), (4, 2)):
        image, _, number = augmented[index, 7]
        assert number == taken
        expected = Augmented(images, Augmentation(crop=(5, 5)), seed=3)[taken, 7]
        assert torch.equal(image, expected[0])
    with pytest.raises(ValueError, match="all 2 samples were passed over"):
        Augmented([None, None], Augmentation())[1, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (2.0, 0.5)}, r"scale must be two numbers 0 < low <= high, got \(2\.0, 0\.5\)"),
        ({"crop": (0, 5)}, r"crop must be a height and a width, got \(0, 5\)"),
        ({"flip": 1.5}, r"flip must be in \[0, 1\], got 1\.5"),
        ({"hue": 0.7}, r"hue must be in \[0, 0\.5\], got 0\.7"),
        ({"contrast": 2}, r"contrast must be in \[0, 1\], got 2"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)
