"""The weight map against its formula and against a slow twin; carving between touching cells."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from dense_jax.data.border import (
    BorderWeights,
    SeparateTouching,
    border_term,
    class_balance,
    touching_ridge,
    two_nearest,
)

maps = st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(0, 5), st.integers(0, 99))


def blobs(height, width, num, seed):
    """Random boxes of numbers 1..num (some hidden by later ones) on 0."""
    rng, instances = np.random.default_rng(seed), np.zeros((height, width), np.int32)
    for number in range(1, num + 1):
        top, left = rng.integers(height), rng.integers(width)
        instances[top : top + rng.integers(1, 5), left : left + rng.integers(1, 5)] = number
    return instances


def slow_distances(instances):
    """Each pixel's distances to all objects, in order, by comparing all pairs of pixels."""
    rows, columns = np.indices(instances.shape)
    result = []
    for number in np.unique(instances[instances > 0]):
        at = np.argwhere(instances == number)
        gaps = np.hypot(rows[..., None] - at[:, 0], columns[..., None] - at[:, 1])
        result.append(gaps.min(-1))
    result += [np.full(instances.shape, np.inf)] * 2
    return np.sort(result, axis=0)


def slow_weights(label, instances, w0, sigma):
    d1, d2, *_ = slow_distances(instances)
    weights = np.zeros(label.shape)
    classes = [c for c in np.unique(label) if c != 255]
    for y, x in itertools.product(*map(range, label.shape)):
        if label[y, x] != 255:
            share = (label == label[y, x]).sum() / (label != 255).sum()
            weights[y, x] = 1 / share / len(classes)
        if label[y, x] == 0:
            weights[y, x] += w0 * np.exp(-((d1[y, x] + d2[y, x]) ** 2) / (2 * sigma**2))
    return weights


@given(maps)
def test_two_nearest_objects_by_brute_force(spec):
    instances = blobs(*spec)
    expected = slow_distances(instances)[:2]
    np.testing.assert_allclose(two_nearest(instances, 30), expected)
    near = two_nearest(instances, 2.5)
    np.testing.assert_allclose(near, np.where(expected <= 2.5, expected, np.inf))


@given(maps, st.sampled_from([(10.0, 5.0), (3.0, 1.0), (0.0, 5.0)]))
def test_weights_by_brute_force(spec, options):
    instances = blobs(*spec)
    label = np.where(instances > 0, 1 + instances % 2, 0).astype(np.uint8)
    label[0, 0] = 255
    example = {"label": label, "instances": instances}
    weights = BorderWeights(*options)(example)["weights"]
    assert weights.dtype == np.float32
    np.testing.assert_allclose(
        weights, slow_weights(label, instances, *options), rtol=1e-5, atol=1e-5
    )


def straight_borders(gap):
    """Two cells of 6 columns each; borders are ``gap`` pixel steps apart."""
    instances = np.zeros((9, 11 + gap), np.int32)
    instances[:, :6], instances[:, 5 + gap :] = 1, 2
    return {"label": (instances > 0).astype(np.uint8), "instances": instances}


def test_fact_5_midway_between_borders_4_pixels_apart():
    example = straight_borders(4)
    weights, w_c = BorderWeights()(example)["weights"], class_balance(example["label"])
    np.testing.assert_allclose(weights[:, 7] - w_c[:, 7], 10 * np.exp(-16 / 50), rtol=1e-6)
    np.testing.assert_allclose(weights[4, 7] - w_c[4, 7], 7.26, atol=0.005)
    np.testing.assert_array_equal(weights[:, :6], w_c[:, :6])  # inside cells there is no border


def test_fact_6_where_distances_vanish_and_where_they_are_15():
    np.testing.assert_allclose(border_term(np.array(0.0), np.array(0.0)), 10)
    np.testing.assert_allclose(border_term(np.array(5.0), np.array(10.0)), 0.111, atol=5e-4)
    example = straight_borders(15)
    border = BorderWeights()(example)["weights"] - class_balance(example["label"])
    np.testing.assert_allclose(border[:, 6:20], 0.111, atol=5e-4)


def test_one_cell_or_none_has_no_border():
    for number in (0, 1):
        instances = np.zeros((8, 8), np.int32)
        instances[2:4, 3:6] = number
        example = {"label": (instances > 0).astype(np.uint8), "instances": instances}
        weights = BorderWeights()(example)["weights"]
        np.testing.assert_allclose(weights, class_balance(example["label"]))


@given(maps)
def test_class_balance_gives_classes_equal_sums_and_mean_1(spec):
    label = (blobs(*spec) % 3).astype(np.uint8)
    label[-1, -1] = 255
    weights, scored = class_balance(label), label != 255
    assert weights[-1, -1] == 0
    if scored.any():
        np.testing.assert_allclose(weights[scored].mean(), 1, rtol=1e-5)
        sums = [weights[label == c].sum() for c in np.unique(label[scored])]
        np.testing.assert_allclose(sums, sums[0], rtol=1e-5)


def test_ridge_by_hand():
    instances = np.array([[1, 1, 2, 2, 0, 3], [1, 1, 0, 2, 0, 0], [0, 0, 0, 0, 3, 3]])
    np.testing.assert_array_equal(
        touching_ridge(instances),
        np.array([[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]], bool),
    )
    # Two pixels wide, all that is two columns or rows from a cell of lower number goes.
    np.testing.assert_array_equal(touching_ridge(instances, 2), instances > 1)


@given(maps, st.integers(1, 3))
def test_separated_cells_do_not_touch_and_nothing_else_changes(spec, width):
    instances = blobs(*spec)
    label = np.where(instances > 0, 1 + instances % 2, 0).astype(np.uint8)
    separated = SeparateTouching(width)({"label": label, "instances": instances, "name": "x"})
    ids = separated["instances"]
    for number in np.unique(ids[ids > 0]):
        grown = ndimage.binary_dilation(ids == number, np.ones((3, 3)), iterations=width)
        assert set(np.unique(ids[grown])) <= {0, number}
    carved = ids != instances
    assert not ids[carved].any()
    assert not separated["label"][carved].any()
    np.testing.assert_array_equal(separated["label"][~carved], label[~carved])
    lowest = instances == np.min(instances[instances > 0], initial=99)
    np.testing.assert_array_equal(ids[lowest], instances[lowest])
    again = SeparateTouching(width)(separated)
    np.testing.assert_array_equal(again["instances"], ids)


def test_components_of_all_classes_take_the_place_of_missing_instances():
    label = np.array([[1, 0, 2], [0, 1, 2], [255, 1, 2]], np.uint8)
    separated = SeparateTouching()({"label": label})
    # Pixels of classes 1 and 2 are one object; the corner of the other one is next to it.
    np.testing.assert_array_equal(separated["instances"], [[1, 0, 2], [0, 0, 2], [0, 2, 2]])
    np.testing.assert_array_equal(separated["label"], [[1, 0, 2], [0, 0, 2], [255, 1, 2]])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_any_integers_number_objects(dtype):
    reference = blobs(12, 12, 4, 0)
    label = (reference > 0).astype(np.uint8)
    instances = reference.astype(dtype)
    np.testing.assert_array_equal(touching_ridge(instances), touching_ridge(reference))
    np.testing.assert_array_equal(two_nearest(instances, 9), two_nearest(reference, 9))
    np.testing.assert_array_equal(class_balance(label.astype(dtype)), class_balance(label))
    separated, expected = (
        SeparateTouching()({"label": label, "instances": numbers})
        for numbers in (instances, reference)
    )
    assert separated["instances"].dtype == dtype
    np.testing.assert_array_equal(separated["instances"], expected["instances"])
    np.testing.assert_array_equal(separated["label"], expected["label"])
    np.testing.assert_array_equal(
        BorderWeights()(separated)["weights"], BorderWeights()(expected)["weights"]
    )
