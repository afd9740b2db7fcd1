"""Image, labels and masks move together; labels are never blended."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.normalise import Normalise
from dense_jax.data.transforms import (
    ColourJitter,
    ElasticDeformation,
    GreyJitter,
    RandomCrop,
    RandomFlip,
    RandomRotate90,
    RandomScale,
    RandomTranslate,
    Resize,
    displacement_field,
    mirrored,
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


@pytest.mark.parametrize(("mode", "name"), [("reflect", "reflect"), ("symmetric", "symmetric")])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_mirrored_is_numpys_padding(size, mode, name):
    padded = np.pad(np.arange(size), 12, mode=name)
    np.testing.assert_array_equal(mirrored(np.arange(-12, size + 12), size, mode), padded)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 12), st.integers(0, 6))
def test_crop_with_context_mirrors_what_is_missing(height, width, side, context):
    example = _normalised(height, width)
    cropped = RandomCrop(side, context)(example, np.random.default_rng(0))
    assert cropped["label"].shape == cropped["instances"].shape == (side, side)
    assert cropped["image"].shape == (side + 2 * context, side + 2 * context, 3)
    inner = cropped["image"][context : context + side, context : context + side, 0]
    inside = cropped["label"] != IGNORE_LABEL
    np.testing.assert_array_equal(inner[inside], cropped["label"][inside])
    assert (cropped["image"][..., 2] == 9).all()  # no padding anywhere


def test_context_holds_the_real_neighbours_where_there_are_any():
    big = np.pad(_normalised(9, 9)["image"], ((6, 6), (6, 6), (0, 0)), mode="reflect")
    example = _normalised(9, 9)
    for seed in range(5):
        cropped = RandomCrop(3, context=6)(example, np.random.default_rng(seed))
        top, left = divmod(int(cropped["label"][0, 0]) - 1, 9)
        np.testing.assert_array_equal(cropped["image"], big[top : top + 15, left : left + 15])


def test_rotation_turns_all_maps_together():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        turned = RandomRotate90()(_example(3, 3), rng)
        _assert_together(turned)
        seen.add(int(turned["label"][0, 0]))
        wide = RandomRotate90()(_example(2, 3), rng)
        assert wide["label"].shape == (2, 3)
        assert int(wide["label"][0, 0]) in (1, 6)
    assert seen == {1, 3, 7, 9}


def test_grey_jitter_is_affine():
    example = _normalised(4, 5)
    image = GreyJitter(0.5, 0.25)(example, np.random.default_rng(0))["image"]
    assert image.dtype == np.float32
    (factor, shift), *_ = np.linalg.lstsq(
        np.stack([example["image"].ravel(), np.ones(image.size)], 1), image.ravel()
    )
    assert 0.5 <= factor <= 1.5
    assert -0.25 <= shift <= 0.25
    still = GreyJitter(0, 0)(example, np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(still, example["image"])


@pytest.mark.parametrize("order", [1, 3])
def test_elastic_field_without_displacement_is_the_identity(order):
    example = _normalised(7, 6) | {"weights": np.ones((7, 6), np.float32)}
    bent = ElasticDeformation(std=0.0, order=order)(example, np.random.default_rng(0))
    for key in ("image", "label", "instances", "weights"):
        np.testing.assert_allclose(bent[key], example[key], atol=1e-4)
        assert bent[key].dtype == example[key].dtype


def test_elastic_field_at_its_nodes_is_drawn_with_the_given_deviation():
    rng = np.random.default_rng(0)
    fields = [displacement_field(rng.normal(0, 10, (2, 3, 3)), (21, 31)) for _ in range(2000)]
    at_nodes = np.stack(fields)[:, :, ::10, ::15]
    assert at_nodes.shape == (2000, 2, 3, 3)
    np.testing.assert_allclose(at_nodes.std(0), 10, rtol=0.08)
    np.testing.assert_allclose(at_nodes.mean(0), 0, atol=1)


def test_elastic_field_is_smooth_and_exact_for_a_slope():
    nodes = np.broadcast_to(np.arange(5.0)[:, None], (2, 5, 5))  # rises with the row
    field = displacement_field(nodes, (41, 9))
    inner = slice(10, 31)  # two nodes from the edge, where the outermost is repeated
    np.testing.assert_allclose(
        field[0, inner], np.broadcast_to(np.linspace(1, 3, 21)[:, None], (21, 9)), atol=1e-12
    )
    noise = np.random.default_rng(0).normal(size=(2, 3, 3))
    steps = np.abs(np.diff(displacement_field(noise, (101, 101)), axis=1))
    assert steps.max() < 0.1
    assert displacement_field(noise, (1, 1)).shape == (2, 1, 1)


def test_elastic_deformation_by_one_pixel_is_a_mirrored_shift(monkeypatch):
    example = _normalised(5, 4) | {"weights": np.arange(20, dtype=np.float32).reshape(5, 4)}
    monkeypatch.setattr(
        "dense_jax.data.transforms.displacement_field",
        lambda nodes, size: np.array([1.0, 0]).reshape(2, 1, 1) * np.ones((2, *size)),
    )
    bent = ElasticDeformation()(example, np.random.default_rng(0))
    for key in ("image", "label", "instances", "weights"):
        expected = np.concatenate([example[key][1:], example[key][3:4]])
        np.testing.assert_allclose(bent[key], expected, atol=1e-4)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_elastic_deformation_never_blends_labels(height, width, seed):
    example = _normalised(height, width)
    bent = ElasticDeformation(std=4)(example, np.random.default_rng(seed))
    assert set(np.unique(bent["label"])) <= set(np.unique(example["label"]))
    np.testing.assert_array_equal(bent["label"], bent["instances"].astype(np.uint8))
    assert bent["image"].min() >= 0
    assert bent["image"].shape == example["image"].shape


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
    with pytest.raises(ValueError, match="needs a float image"):
        ElasticDeformation()(_example(4, 4), rng)
    with pytest.raises(ValueError, match="of its label's size"):
        ElasticDeformation()(RandomCrop(2, context=1)(_normalised(4, 4), rng), rng)
