import json

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.metrics import boundary, semantic


def slow_confusion(labels, predictions, num_classes):
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for label, prediction in zip(labels.ravel(), predictions.ravel(), strict=True):
        if 0 <= label < num_classes:
            confusion[label, prediction] += 1
    return confusion


def slow_ious(labels, predictions, num_classes):
    """By sets of pixels, without a confusion matrix."""
    scored = labels < num_classes
    ious = []
    for c in range(num_classes):
        true, predicted = scored & (labels == c), scored & (predictions == c)
        union = (true | predicted).sum()
        ious.append((true & predicted).sum() / union if union else None)
    return ious


shape = (3, 5)  # one shape: jit compiles once
maps = st.tuples(
    hnp.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 2, 3, 255])),
    hnp.arrays(np.int32, shape, elements=st.integers(0, 3)),
)


@hypothesis.given(maps)
def test_counts_and_ious_equal_brute_force(pair):
    labels, predictions = pair
    counts = semantic.confusion_counts(labels, predictions, 4)
    assert counts.dtype == jnp.int32
    np.testing.assert_array_equal(counts, slow_confusion(labels, predictions, 4))
    table = semantic.summarise(np.asarray(counts))["per_class"]
    assert [row["iou"] for row in table] == slow_ious(labels, predictions, 4)


def test_worked_example():
    summary = semantic.summarise(np.array([[3, 1], [2, 4]]), ["sky", "road"])
    table = summary.pop("per_class")
    assert summary == pytest.approx(
        {
            "pixel_accuracy": 0.7,
            "mean_accuracy": 0.7083333,
            "mean_iou": 0.5357143,
            "frequency_weighted_iou": 0.5428571,
            "num_pixels": 10,
        }
    )
    assert [row["name"] for row in table] == ["sky", "road"]
    assert [row["iou"] for row in table] == pytest.approx([0.5, 4 / 7])
    assert [row["pixels"] for row in table] == [4, 6]
    assert [row["predicted"] for row in table] == [5, 5]


def test_absent_classes():
    # class 1 is only predicted (IoU 0, no accuracy), class 2 is nowhere
    confusion = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 0]])
    skip = semantic.summarise(confusion)
    assert [row["iou"] for row in skip["per_class"]] == [0.75, 0.0, None]
    assert [row["accuracy"] for row in skip["per_class"]] == [0.75, None, None]
    assert skip["mean_iou"] == pytest.approx(0.375)
    assert skip["mean_accuracy"] == 0.75
    zero = semantic.summarise(confusion, absent="zero")
    assert zero["mean_iou"] == zero["mean_accuracy"] == pytest.approx(0.25)
    json.dumps(skip, allow_nan=False)


def test_void_never_counts_even_where_void_is_predicted():
    labels = np.array([[0, 255, 1, 255]])
    counts = semantic.confusion_counts(labels, np.array([[0, 255, 1, 0]]), 2)
    np.testing.assert_array_equal(counts, [[1, 0], [0, 1]])
    nothing = semantic.confusion_counts(np.full((2, 2), 255), np.zeros((2, 2), int), 2)
    assert not nothing.any()
    assert np.isnan(semantic.summarise(np.asarray(nothing))["mean_iou"])


@pytest.mark.parametrize("wrong", [2, 255, -1])
def test_prediction_out_of_range_raises(wrong):
    with pytest.raises(ValueError, match=f"prediction {wrong} "):
        semantic.confusion_counts(np.array([0, 1]), np.array([0, wrong]), 2)


def test_bad_matrices_raise():
    for confusion in (np.zeros((2, 3), int), np.zeros((2, 2)), np.array([[-1]])):
        with pytest.raises(ValueError, match="confusion matrix"):
            semantic.summarise(confusion)
    with pytest.raises(ValueError, match="do not match"):
        semantic.confusion_counts(np.zeros((2, 2), int), np.zeros((2, 3), int), 2)


def test_scores_are_of_the_set_and_not_means_over_images():
    # a wrong 1x1 image and a right 1x100 one: pixel accuracy 100/101, not 1/2
    total = semantic.add(None, semantic.confusion_counts(np.array([[0]]), np.array([[1]]), 2))
    many = np.zeros((1, 100), np.int32)
    total = semantic.add(total, semantic.confusion_counts(many, many, 2))
    assert total.dtype == np.int64
    assert semantic.summarise(total)["pixel_accuracy"] == pytest.approx(100 / 101)


def test_any_split_of_the_set_gives_the_same_bits():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 255], (8, 5, 7)).astype(np.int32)
    predictions = rng.integers(0, 3, labels.shape).astype(np.int32)
    whole = semantic.summarise(np.asarray(semantic.confusion_counts(labels, predictions, 3)))
    count = jax.pmap(  # noqa: TID251
        lambda a, b: jax.lax.psum(semantic.confusion_counts(a, b, 3), "i"), "i", out_axes=None
    )
    split = count(labels.reshape(4, 2, 5, 7), predictions.reshape(4, 2, 5, 7))
    assert semantic.summarise(np.asarray(split)) == whole
    total = np.zeros((3, 3), np.int64)
    for one in zip(labels, predictions, strict=True):
        total = semantic.add(total, semantic.confusion_counts(*one, 3))
    assert semantic.summarise(total) == whole


def test_totals_beyond_int32():
    total = semantic.add(np.array([[2**31 - 1]]), np.array([[2**31 - 1]], np.int32))
    assert total[0, 0] == 2**32 - 2


def slow_boundary_f1(labels, predictions, num_classes, radius, match, classes):
    """Straight from the definitions: loops over pixels, Kuhn's augmenting paths."""

    def edge(mask):
        height, width = mask.shape
        points = []
        for i, j in np.ndindex(height, width):
            pairs = []
            if i + 1 < height:
                pairs.append((mask[i, j], mask[i + 1, j]))
            if j + 1 < width:
                pairs.append((mask[i, j], mask[i, j + 1]))
            if i + 1 < height and j + 1 < width:
                pairs.append((mask[i, j + 1], mask[i + 1, j + 1]))
                pairs.append((mask[i + 1, j], mask[i + 1, j + 1]))
            if any(a != b for a, b in pairs):
                points.append((i, j))
        return points

    scores = []
    for c in range(num_classes):
        true, predicted = edge(labels == c), edge(predictions == c)
        if not true and (classes == "gt" or not predicted):
            continue
        near = [[np.hypot(a - x, b - y) <= radius for x, y in predicted] for a, b in true]
        if match == "distance":
            hit_true = sum(any(row) for row in near)
            hit_predicted = sum(any(row[k] for row in near) for k in range(len(predicted)))
        else:
            partner = {}

            def augment(i, seen, near=near, partner=partner):
                for k, reachable in enumerate(near[i]):
                    if reachable and k not in seen:
                        seen.add(k)
                        if k not in partner or augment(partner[k], seen):
                            partner[k] = i
                            return True
                return False

            hit_true = hit_predicted = sum(augment(i, set()) for i in range(len(true)))
        if not hit_true:
            scores.append(0.0)
            continue
        precision, recall = hit_predicted / len(predicted), hit_true / len(true)
        scores.append(2 * precision * recall / (precision + recall))
    return np.mean(scores) if scores else np.nan


@pytest.mark.parametrize("match", ["distance", "assignment"])
@pytest.mark.parametrize("classes", ["union", "gt"])
def test_boundary_f1_equals_slow_twin(match, classes):
    rng = np.random.default_rng(0)
    for _ in range(10):
        labels = np.kron(rng.choice([0, 1, 2, 255], (3, 4)), np.ones((4, 4), int))
        predictions = np.kron(rng.choice([0, 1, 2], (3, 4)), np.ones((4, 4), int))
        for tolerance in (0.0, 0.1, 0.15):
            ours = boundary.image_boundary_f1(
                labels, predictions, 4, tolerance=tolerance, match=match, classes=classes
            )
            radius = tolerance * np.hypot(12, 16)
            slow = slow_boundary_f1(labels, predictions, 4, radius, match, classes)
            assert ours == pytest.approx(slow, nan_ok=True)


@pytest.mark.parametrize("match", ["distance", "assignment"])
def test_boundary_shift_of_four_pixels_is_within_tolerance_and_of_five_is_not(match):
    labels = np.zeros((360, 480), np.uint8)
    labels[100:200, 100:300] = 1
    score = [
        boundary.image_boundary_f1(labels, np.roll(labels, shift, 1), 2, match=match)
        for shift in (0, 4, 5)
    ]
    assert score[:2] == [1, 1]
    assert score[2] < 1


def test_boundary_f1_without_boundaries():
    flat, half = np.zeros((4, 6), int), np.repeat([[0] * 3 + [1] * 3], 4, 0)
    assert np.isnan(boundary.image_boundary_f1(flat, flat, 3))  # no boundary at all
    assert boundary.image_boundary_f1(half, flat, 3) == 0
    assert boundary.image_boundary_f1(flat, half, 3) == 0
    assert np.isnan(boundary.image_boundary_f1(flat, half, 3, classes="gt"))
    assert boundary.image_boundary_f1(np.array([[0, 1]]), np.array([[0, 1]]), 3) == 1
    with pytest.raises(ValueError, match=r"\(4, 6\)"):
        boundary.image_boundary_f1(flat, flat[:2], 3)


def test_boundary_map_by_hand():
    region = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 1]], bool)
    expected = [[1, 1, 0], [1, 1, 1], [0, 1, 0]]
    np.testing.assert_array_equal(boundary.boundary_map(region), np.array(expected, bool))
