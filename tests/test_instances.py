"""Scores of objects: worked values, slow twins, empty sides, components of a semantic map."""

import itertools

import numpy as np
import pytest

from dense_jax.data.datasets import nuclei, nuclei_border
from dense_jax.metrics import instances


def _iou(one, other):
    return (one & other).sum() / (one | other).sum()


def _masks(numbers):
    return [numbers == k for k in np.unique(numbers) if k]


def _slow_hits(truth, predicted, threshold):
    """The largest number of disjoint pairs above the threshold, by trying all matchings."""
    true, found = _masks(truth), _masks(predicted)
    short, long = sorted((true, found), key=len)
    return max(
        sum(_iou(a, b) > threshold for a, b in zip(short, chosen, strict=True))
        for chosen in itertools.permutations(long, len(short))
    )


def _scene(seed):
    """Squares of object numbers with gaps, and the same after a disturbance."""
    rng = np.random.default_rng(seed)
    truth, predicted = np.zeros((2, 24, 24), int)
    for k, (y, x) in enumerate(itertools.product((1, 9, 17), (1, 9)), 1):
        size = rng.integers(3, 7)
        truth[y : y + size, x : x + size] = 5 * k
        dy, dx, change = rng.integers(0, 3, 3)
        if k != 2:
            predicted[y + dy : y + dy + size - change + 1, x + dx : x + dx + size] = 40 - k
    return truth, predicted


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_their_slow_twins(seed):
    truth, predicted = _scene(seed)
    true, found = _masks(truth), _masks(predicted)
    true_positives = [_slow_hits(truth, predicted, t) for t in instances.THRESHOLDS]
    np.testing.assert_array_equal(instances.hits(truth, predicted)[0], true_positives)
    expected = [tp / (len(true) + len(found) - tp) for tp in true_positives]
    np.testing.assert_allclose(instances.average_precision(truth, predicted), expected)
    tp = true_positives[0]
    f1 = 2 * tp / (2 * tp + (len(found) - tp) + (len(true) - tp))
    np.testing.assert_allclose(instances.f1(truth, predicted), f1)
    overlaps = [max(_iou(a, b) for b in found) for a in true]
    np.testing.assert_allclose(instances.best_overlaps(truth, predicted), overlaps)

    def best_dice(ones, others):
        return np.mean([max(2 * (a & b).sum() / (a.sum() + b.sum()) for b in others) for a in ones])

    dice = min(best_dice(true, found), best_dice(found, true))
    np.testing.assert_allclose(instances.symmetric_best_dice(truth, predicted), dice)


def test_worked_values():
    truth = np.array([[1] * 10 + [2] * 10 + [3] * 10])
    predicted = np.array([[7] * 8 + [0] * 2 + [8] * 10 + [9] * 5 + [0] * 5])
    # IoU 0.8, 1 and 0.5: the last is not above 0.5.
    precision = instances.average_precision(truth, predicted)
    np.testing.assert_allclose(precision, [2 / 4] * 6 + [1 / 5] * 4)
    np.testing.assert_allclose(instances.f1(truth, predicted), 2 / 3)
    np.testing.assert_allclose(instances.best_overlaps(truth, predicted), [0.8, 1, 0.5])
    dice = (16 / 18 + 1 + 10 / 15) / 3
    np.testing.assert_allclose(instances.symmetric_best_dice(truth, predicted), dice)
    scores = instances.scores([truth, truth], [predicted, truth])
    np.testing.assert_allclose(scores["average_precision"], (0.38 + 1) / 2)
    np.testing.assert_allclose(scores["average_precision_50"], 0.75)
    np.testing.assert_allclose(scores["average_precision_75"], 0.75)
    np.testing.assert_allclose(scores["average_best_overlap"], (2.3 + 3) / 6)
    assert (scores["num_objects"], scores["num_predicted"]) == (6, 6)


@pytest.mark.parametrize("k", range(10, 20))
def test_an_iou_at_a_threshold_is_not_above_it(k):
    truth = np.ones((1, 20), int)
    predicted = (np.arange(20)[None] < k).astype(int)
    np.testing.assert_array_equal(instances.hits(truth, predicted)[0], np.arange(10, 20) < k)


def test_splits_and_mergers_are_not_found():
    two = np.array([[1, 1, 1, 2, 2, 2]])
    one = np.ones((1, 6), int)
    for truth, predicted in ((two, one), (one, two)):
        assert not instances.average_precision(truth, predicted).any()
        np.testing.assert_allclose(instances.symmetric_best_dice(truth, predicted), 2 / 3)


def test_empty_sides():
    nothing, something = np.zeros((4, 4), int), np.eye(4, dtype=int)
    assert not instances.average_precision(nothing, something).any()
    assert not instances.average_precision(something, nothing).any()
    assert instances.f1(something, nothing) == 0
    assert instances.symmetric_best_dice(something, nothing) == 0
    assert instances.best_overlaps(something, nothing).tolist() == [0]
    assert instances.best_overlaps(nothing, something).size == 0
    assert np.isnan(instances.average_precision(nothing, nothing)).all()
    # An image without any object is left out.
    scores = instances.scores([nothing, something], [nothing, something])
    assert scores["average_precision"] == scores["f1_50"] == 1
    assert np.isnan(instances.scores([nothing], [nothing])["average_precision"])


def test_an_object_may_be_of_two_pieces_and_numbers_do_not_matter():
    truth = np.array([[300, 0, 300, 65000]])
    assert instances.average_precision(truth, np.array([[2, 0, 2, 1]])).all()
    parted = instances.average_precision(truth, np.array([[1, 0, 2, 3]]))
    assert (parted == 1 / 4).all()


def test_wrong_maps_are_refused():
    with pytest.raises(ValueError, match="not two of equal"):
        instances.hits(np.zeros((2, 3), int), np.zeros((3, 2), int))
    with pytest.raises(ValueError, match="0 or above"):
        instances.hits(np.zeros((2, 3), int), np.full((2, 3), -1))


SEMANTIC = np.array(
    [
        [1, 1, 0, 0, 0, 1],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 0],
        [2, 0, 0, 0, 1, 1],
    ]
)


def test_components_of_a_semantic_map():
    four = instances.from_semantic(SEMANTIC)
    assert four.dtype == np.int32
    np.testing.assert_array_equal(
        four,
        [[1, 1, 0, 0, 0, 2], [1, 1, 0, 0, 3, 0], [0, 0, 4, 0, 0, 0], [0, 0, 0, 0, 5, 5]],
    )
    np.testing.assert_array_equal(
        instances.from_semantic(SEMANTIC, connectivity=8),
        [[1, 1, 0, 0, 0, 2], [1, 1, 0, 0, 2, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 3, 3]],
    )
    np.testing.assert_array_equal(
        instances.from_semantic(SEMANTIC, min_size=2),
        [[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 2, 2]],
    )
    assert instances.from_semantic(SEMANTIC, object_class=2).sum() == 1
    assert not instances.from_semantic(np.zeros((3, 3), int)).any()


def test_border_pixels_go_back_to_the_nearest_object():
    prediction = np.array([[1, 1, 2, 2, 1, 1, 0, 2]])
    assert instances.from_semantic(prediction).tolist() == [[1, 1, 0, 0, 2, 2, 0, 0]]
    # The last pixel touches no object.
    given = instances.from_semantic(prediction, border_class=2)
    assert given.tolist() == [[1, 1, 1, 2, 2, 2, 0, 0]]
    assert not instances.from_semantic(np.full((2, 2), 2), border_class=2).any()


def test_real_nuclei_come_apart_by_their_borders(data_root):
    """Components of the true "nucleus" class: an upper bound of what a network can score."""
    scores = {}
    for name, module in (("plain", nuclei), ("border", nuclei_border)):
        found = module.find(data_root)
        samples = [found.read(pair, found.classes) for pair in found.pairs[:12]]
        border = 2 if name == "border" else None
        scores[name] = instances.scores(
            [sample.instances for sample in samples if sample.instances is not None],
            [instances.from_semantic(sample.label, border_class=border) for sample in samples],
        )
    assert scores["plain"]["average_precision"] < scores["border"]["average_precision"]
    assert scores["border"]["average_precision_50"] > 0.9
