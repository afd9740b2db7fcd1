"""Image, labels and masks move together; labels are never blended."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.transforms import (
    NORMALISATIONS,
    ColourJitter,
    Normalise,
    RandomCrop,
    RandomFlip,
    RandomScale,
    RandomTranslate,
    Resize,
    to_uint8,
    window,
)

sides = st.integers(1, 9)


def _example(height, width):
    """Each pixel says where it came from: label = 1 + its number, red = label, so they match."""
    label = (1 + np.arange(height * width, dtype=np.uint8)).reshape(height, width)
    image = np.stack([label, label * 0, label * 0 + 9], axis=-1)
    return {"image": image, "label": label, "instances": label.astype(np.int32), "name": "x"}


def _normalised(height, width):
    return Normalise("none")(_example(height, width))


def _assert_together(example):
    """Image and masks agree with the labels, and padding is zero, ignore and no object."""
    inside = example["label"] != IGNORE_LABEL
    red = example["image"][..., 0]
    np.testing.assert_array_equal(red[inside], example["label"][inside])
    np.testing.assert_array_equal(example["instances"][inside], example["label"][inside])
    assert not example["image"][~inside].any()
    assert not example["instances"][~inside].any()


@given(sides, sides, sides, sides, st.integers(0, 99))
def test_crop_moves_all_maps_together(height, width, rows, columns, seed):
    cropped = RandomCrop((rows, columns))(_normalised(height, width), np.random.default_rng(seed))
    assert cropped["label"].shape == cropped["image"].shape[:2] == (rows, columns)
    _assert_together(cropped)
    # The window never misses a pixel that it could hold.
    assert (cropped["label"] != IGNORE_LABEL).sum() == min(height, rows) * min(width, columns)


def test_crop_reaches_every_place():
    rng = np.random.default_rng(0)
    corners = {int(RandomCrop(2)(_normalised(3, 4), rng)["label"][0, 0]) for _ in range(100)}
    assert corners == {1, 2, 3, 5, 6, 7}


@given(sides, sides, st.integers(0, 99))
def test_translation_and_flip_move_all_maps_together(height, width, seed):
    rng = np.random.default_rng(seed)
    shifted = RandomTranslate(12)(_normalised(height, width), rng)
    assert shifted["label"].shape == (height, width)
    _assert_together(shifted)
    flipped = RandomFlip(1.0)(_example(height, width), rng)
    _assert_together(flipped)
    np.testing.assert_array_equal(flipped["label"][:, ::-1], _example(height, width)["label"])


def test_flip_is_drawn():
    rng = np.random.default_rng(0)
    example = _example(1, 2)
    flips = [RandomFlip()(example, rng)["label"][0, 0] == 2 for _ in range(200)]
    assert 70 < sum(flips) < 130


def test_window_by_hand():
    shifted = window(_normalised(2, 2), -1, 1, (3, 2))
    void = IGNORE_LABEL
    np.testing.assert_array_equal(shifted["label"], [[void, void], [2, void], [4, void]])


@given(sides, sides, st.floats(0.1, 3), st.integers(0, 99))
def test_scale_keeps_label_values(height, width, factor, seed):
    example = _example(height, width)
    scaled = RandomScale(factor, factor)(example, np.random.default_rng(seed))
    expected = (max(1, round(height * factor)), max(1, round(width * factor)))
    assert scaled["label"].shape == scaled["image"].shape[:2] == expected
    assert set(np.unique(scaled["label"])) <= set(np.unique(example["label"]))
    np.testing.assert_array_equal(scaled["instances"], scaled["label"])
    assert scaled["instances"].dtype == np.int32


def test_resize_doubles_each_label():
    resized = Resize((4, 6))(_example(2, 3))
    np.testing.assert_array_equal(
        resized["label"], np.kron(_example(2, 3)["label"], np.ones((2, 2), np.uint8))
    )


def test_originals_are_not_changed():
    example = _example(4, 4)
    kept = {key: np.copy(example[key]) for key in ("image", "label", "instances")}
    rng = np.random.default_rng(0)
    pipeline = (RandomScale(1.0, 1.0), ColourJitter(), Normalise(), RandomCrop(4), RandomFlip(1.0))
    result = example
    for transform in pipeline:
        result = transform(result, rng)
    for key, array in kept.items():
        np.testing.assert_array_equal(example[key], array)


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalise_is_inverted_for_pictures(name):
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    example = Normalise(name)({"image": image, "label": image[..., 0]})
    assert example["image"].dtype == np.float32
    np.testing.assert_array_equal(to_uint8(example["image"], name), image)


def test_normalisations_are_the_published_ones_in_rgb():
    mean, std = NORMALISATIONS["torchvision"]
    np.testing.assert_allclose(np.array(mean) / 255, [0.485, 0.456, 0.406])
    np.testing.assert_allclose(np.array(std) / 255, [0.229, 0.224, 0.225])
    assert NORMALISATIONS["caffe"][0][0] > NORMALISATIONS["caffe"][0][2]  # red first
    with pytest.raises(ValueError, match="unknown normalisation 'vgg'"):
        Normalise("vgg")


def test_colour_jitter():
    rng = np.random.default_rng(0)
    example = _example(5, 6)
    assert (ColourJitter(0, 0, 0)(example, rng)["image"] == example["image"]).all()
    grey = {**example, "image": np.full((5, 6, 3), 100, np.uint8)}
    jittered = ColourJitter(0.5, 0.5, 0.5)(grey, rng)["image"]
    assert jittered.dtype == np.uint8
    assert len(np.unique(jittered)) == 1  # only the brightness of plain grey can change
    assert 50 <= jittered[0, 0, 0] <= 150


def test_the_wrong_order_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="put Normalise first"):
        RandomCrop(4)(_example(4, 4), rng)
    with pytest.raises(ValueError, match="put Normalise after"):
        RandomScale(2.0, 2.0)(_normalised(4, 4), rng)
