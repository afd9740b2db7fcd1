"""VOC's average precision, against values worked by hand and a slow twin of the authors' loops."""

import math
from typing import Any

import numpy as np
import pytest

from dense_jax.data import rle
from dense_jax.metrics import voc
from dense_jax.metrics.detections import Detections, Truth

BOXES, MASKS = ("python", "devkit"), ("sds", "hyper", "mnc")


# True detections by rank, number of objects, area, mean of 11 points.
@pytest.mark.parametrize(
    ("flags", "number", "area", "points"),
    [
        ((1, 0, 1), 2, 0.833333, 0.848485),
        ((1, 1, 0, 1), 4, 0.6875, 0.681818),
        ((0, 1), 1, 0.5, 0.5),
        ((1,), 3, 0.333333, 0.363636),
        ((1, 1, 1), 10, 0.3, 0.272727),  # recall 3/10 lies below the point 0.30000000000000004
        ((0, 0), 2, 0, 0),
        ((), 2, 0, 0),
    ],
)
def test_averages_of_a_curve(flags, number, area, points):
    hits = np.array(flags, bool)
    assert voc.area_under(hits, number) == pytest.approx(area, abs=1e-6)
    assert voc.eleven_points(hits, number) == pytest.approx(points, abs=1e-6)


@pytest.mark.parametrize("tenths", range(11))
def test_three_recalls_lie_below_their_points(tenths):
    points = voc.eleven_points(np.ones(tenths, bool), 10)
    reached = tenths + (tenths not in (3, 6, 7))
    assert points == pytest.approx((reached if tenths else 0) / 11)


def slow_iou(one, other):
    """With one more pixel in widths, of boxes that name their first and last pixel."""
    width = min(one[2], other[2]) - max(one[0], other[0]) + 1
    height = min(one[3], other[3]) - max(one[1], other[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    sizes = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (one, other)]
    return width * height / (sum(sizes) - width * height)


def edges(pixels):
    """The edges of boxes that name their first and last pixel, counted from 1."""
    return np.array(pixels, float).reshape(-1, 4) - [1, 1, 0, 0]


def test_widths_have_one_more_than_differences_of_pixels():
    one, other = (1, 1, 11, 11), (6, 1, 16, 11)
    assert slow_iou(one, other) == 66 / 176 == 0.375
    truth, found = Truth.build(edges([one]), [1]), Detections.build(edges([other]), [1], [0.9])
    scores = voc.average_precision([truth], [found], 2, "devkit", [0.375, 0.376])
    np.testing.assert_array_equal(scores.area, [1, 0])


def slow(images, class_id, protocol, threshold):
    """The authors' loop over all detections of a class. Images are dictionaries of lists."""
    rows = [
        (score, number, shape)
        for number, image in enumerate(images)
        for score, label, shape in image["found"]
        if label == class_id
    ]
    rows.sort(key=lambda row: -row[0])  # stable
    objects = [[o for o in image["true"] if o["class"] == class_id] for image in images]
    covered, true_positives, false_positives = set(), [], []
    for _, number, shape in rows:
        best, at = -math.inf, -1
        for i, item in enumerate(objects[number]):
            if protocol == "sds" and (number, i) in covered:
                continue
            if protocol in MASKS:
                overlap = (shape & item["shape"]).sum() / (shape | item["shape"]).sum()
            else:
                overlap = slow_iou(shape, item["shape"])
            if overlap > best:
                best, at = overlap, i
        is_match = best > threshold if protocol in ("python", "sds") else best >= threshold
        if is_match and objects[number][at]["difficult"]:
            true_positives.append(0)
            false_positives.append(0)
            continue
        is_true = is_match and (number, at) not in covered
        true_positives.append(int(is_true))
        false_positives.append(int(not is_true))
        if is_true:
            covered.add((number, at))
    positives = sum(not item["difficult"] for items in objects for item in items)
    if not positives:
        return math.nan, math.nan
    recall, precision = [0.0], [0.0]
    for k in range(1, 1 + len(rows)):
        tp, fp = sum(true_positives[:k]), sum(false_positives[:k])
        recall.append(tp / positives)
        precision.append(tp / max(tp + fp, 1e-9))
    recall.append(1.0)
    precision.append(0.0)
    grid, points = np.arange(0.0, 1.1, 0.1), 0.0
    for point in grid:
        points += max([p for p, r in zip(precision, recall, strict=True) if r >= point]) / 11
    area = 0.0
    for i in range(1, len(recall)):
        area += (recall[i] - recall[i - 1]) * max(precision[i:])
    return area, points


def random_images(rng, of_masks, num_images=12, num_classes=4, side=24):
    """Equal scores and IoUs, IoUs at thresholds, difficult objects, several detections of one."""
    for _ in range(num_images):
        corners = rng.integers(1, 12, (rng.integers(0, 5), 2))
        boxes = np.concatenate([corners, corners + rng.integers(2, 10, corners.shape)], axis=1)
        near = np.repeat(boxes, 2, axis=0) + rng.integers(-1, 2, (2 * len(boxes), 4))
        near = np.clip(np.concatenate([near, [[2, 2, 12, 12], [14, 3, 20, 8]]]), 1, side)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2])
        labels = rng.integers(1, num_classes, len(boxes))
        guesses = np.concatenate([np.repeat(labels, 2), rng.integers(1, num_classes, 2)])
        yield {
            "true": [
                {"class": label, "difficult": not of_masks and rng.random() < 0.3, "shape": shape}
                for label, shape in zip(labels, shapes_of(boxes, of_masks, side), strict=True)
            ],
            "found": [
                (rng.integers(0, 6) / 8, label, shape)
                for label, shape in zip(guesses, shapes_of(near, of_masks, side), strict=True)
            ],
        }


def shapes_of(boxes, of_masks, side):
    masks = np.zeros((len(boxes), side, side), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0 - 1 : y1, x0 - 1 : x1] = True
    return masks if of_masks else boxes


def as_ours(images, of_masks):
    truths, detections = [], []
    for image in images:
        true = [item["shape"] for item in image["true"]]
        found = [shape for _, _, shape in image["found"]]
        classes = [item["class"] for item in image["true"]]
        scores, guesses = [row[0] for row in image["found"]], [row[1] for row in image["found"]]
        if of_masks:
            zeros = np.zeros((len(true), 4)), np.zeros((len(found), 4))
            truths.append(Truth.build(zeros[0], classes, masks=[rle.encode(m) for m in true]))
            masks = [rle.encode(m) for m in found]
            detections.append(Detections.build(zeros[1], guesses, scores, masks))
        else:
            difficult = [item["difficult"] for item in image["true"]]
            truths.append(Truth.build(edges(true), classes, difficult=difficult))
            detections.append(Detections.build(edges(found), guesses, scores))
    return truths, detections


@pytest.mark.parametrize("protocol", [*BOXES, *MASKS])
@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_authors_loops(protocol: Any, seed):
    rng, of_masks = np.random.default_rng(seed), protocol in MASKS
    images = list(random_images(rng, of_masks))
    thresholds = [0.5, 0.6, 0.7]
    scores = voc.average_precision(*as_ours(images, of_masks), 5, protocol, thresholds)
    expected = np.array([[slow(images, c, protocol, t) for c in range(5)] for t in thresholds])
    np.testing.assert_allclose(scores.class_area, expected[..., 0], rtol=1e-12)
    np.testing.assert_allclose(scores.class_points, expected[..., 1], rtol=1e-12)
    np.testing.assert_array_equal(np.isnan(scores.class_area).any(0), [True, 0, 0, 0, True])
    assert scores.area == pytest.approx(expected[:, 1:4, 0].mean(1))
    assert scores.points == pytest.approx(expected[:, 1:4, 1].mean(1))
    assert (scores.area > 0).all()
    assert (scores.area < 1).all()


def one_image(true, found, protocol: Any, **columns):
    """Areas of class 1 at IoU 0.5; boxes are edges, detections have falling scores."""
    of_masks = protocol in MASKS

    def masks(boxes):
        shifted = np.add(np.reshape(boxes, (-1, 4)), [1, 1, 0, 0])
        return [rle.encode(m) for m in shapes_of(shifted, True, 40)] if of_masks else None

    truth = Truth.build(true, [1] * len(true), masks=masks(true), **columns)
    scores = np.linspace(0.9, 0.1, len(found))
    detections = Detections.build(found, [1] * len(found), scores, masks(found))
    return voc.average_precision([truth], [detections], 2, protocol).class_area[0, 1]


@pytest.mark.parametrize("protocol", [*BOXES, *MASKS])
def test_an_iou_of_exactly_the_threshold(protocol):
    area = one_image([[0, 0, 10, 10]], [[0, 0, 10, 5]], protocol)
    assert area == (0 if protocol in ("python", "sds") else 1)


@pytest.mark.parametrize("protocol", [*BOXES, *MASKS])
def test_a_detection_of_a_found_object_is_false_unless_another_object_is_free(protocol):
    # Both detections fit the first object best. The second one has IoU 7/13 with the other.
    true, found = [[0, 0, 10, 10], [0, 4, 10, 14]], [[0, 0, 10, 10], [0, 1, 10, 11]]
    assert one_image(true, found, protocol) == (1 if protocol == "sds" else 0.5)


@pytest.mark.parametrize("protocol", [*BOXES, *MASKS])
def test_of_two_detections_the_one_with_the_higher_score_is_true(protocol):
    assert one_image([[0, 0, 10, 10]], [[0, 0, 10, 8], [0, 0, 10, 10]], protocol) == 1
    both = one_image([[0, 0, 10, 10], [20, 0, 30, 10]], [[0, 0, 10, 8], [0, 0, 10, 10]], protocol)
    assert both == 0.5


@pytest.mark.parametrize("protocol", BOXES)
def test_difficult_objects_count_neither_way(protocol):
    true, found = (
        [[0, 0, 10, 10], [20, 0, 30, 10]],
        [[0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10]],
    )
    assert one_image(true, found, protocol, difficult=[True, False]) == 1
    assert one_image(true, found, protocol, difficult=[False, False]) == pytest.approx(
        1 / 2 + 1 / 3
    )
    assert one_image(true, found[:2], protocol, difficult=[True, False]) == 0
    assert np.isnan(one_image(true, found, protocol, difficult=[True, True]))


def test_equal_scores_rank_in_order_of_images():
    truth = Truth.build([[0, 0, 10, 10]], [1])
    hit, miss = (Detections.build([[x, 0, x + 10, 10]], [1], [0.5]) for x in (0, 50))
    first = voc.average_precision([truth] * 2, [hit, miss], 2, "devkit")
    last = voc.average_precision([truth] * 2, [miss, hit], 2, "devkit")
    assert (first.area, last.area) == (0.5, 0.25)


def test_the_volume_is_the_mean_over_nine_thresholds():
    truth = Truth.build([[0, 0, 10, 10]], [1])
    found = Detections.build([[0, 0, 10, 6.5]], [1], [0.5])
    scores = voc.average_precision([truth], [found], 2, "devkit", voc.VOLUME)
    assert scores.area.mean() == pytest.approx(6 / 9)


@pytest.mark.parametrize("protocol", [*BOXES, *MASKS])
def test_nothing_to_find_is_no_score(protocol):
    masks = [rle.encode(np.ones((1, 1), bool))]
    truth, found = Truth.build([], []), Detections.build([[0, 0, 1, 1]], [1], [0.5], masks)
    scores = voc.average_precision([truth], [found], 2, protocol)
    assert np.isnan(scores.area).all()
    assert np.isnan(scores.points).all()


def test_masks_must_be_given():
    truth, found = Truth.build([[0, 0, 1, 1]], [1]), Detections.build([[0, 0, 1, 1]], [1], [0.5])
    with pytest.raises(ValueError, match="no masks"):
        voc.average_precision([truth], [found], 2, "mnc")
