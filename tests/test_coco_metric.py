"""COCO's average precision, against values worked by hand and against pycocotools."""

import contextlib
import io
import itertools
from typing import Any

import numpy as np
import pytest

from dense_jax.data import rle
from dense_jax.errors import UserError
from dense_jax.metrics import coco
from dense_jax.metrics.detections import Detections, Truth

SCORES = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)


def truth(*boxes, classes=None, **columns):
    return Truth.build(boxes, [1] * len(boxes) if classes is None else classes, **columns)


def found(*boxes, scores=None, classes=None):
    """Detections of falling score, unless scores are given."""
    scores = np.linspace(0.9, 0.1, len(boxes)) if scores is None else scores
    return Detections.build(boxes, [1] * len(boxes) if classes is None else classes, scores)


def score(*images, num_classes=3, kind: coco.Kind = "box"):
    truths, detections = ([image[i] for image in images] for i in (0, 1))
    return coco.average_precision(truths, detections, num_classes, kind)


def box(x, y=0, width=10, height=10):
    return [x, y, x + width, y + height]


def flags_of(flags, number):
    """An image with `number` objects and detections that hit one each, or none, by rank."""
    objects = [box(20 * i) for i in range(number)]
    free = iter(objects)
    hits = [next(free) if flag else box(20 * i, 50) for i, flag in enumerate(flags)]
    return truth(*objects), found(*hits)


@pytest.mark.parametrize(
    ("flags", "number", "expected"),
    [
        ((1, 0, 1), 2, 0.834983),
        ((1, 1, 0, 1), 4, 0.690594),
        ((0, 1), 1, 0.5),
        ((1,), 3, 0.336634),
        ((1, 1, 1), 10, 0.306931),
    ],
)
def test_precision_is_averaged_over_101_recalls(flags, number, expected):
    scores = score(flags_of(flags, number))
    assert scores.ap == pytest.approx(expected, abs=1e-6)
    assert scores.ap50 == pytest.approx(scores.ap)
    assert scores.ar_100 == pytest.approx(sum(flags) / number)
    assert scores.class_ap[1] == pytest.approx(scores.ap)
    assert np.isnan(scores.class_ap[[0, 2]]).all()
    assert scores.precision[:, 1].mean(1) == pytest.approx([scores.ap50, scores.ap75])
    np.testing.assert_array_equal(scores.mean_precision, scores.precision[:, 1])


# k of 100 objects: the grid of recalls lies above k/100 for these k, so that a recall is missed.
MISSED = (35, 41, 47, 57, 69, 70, 82, 83, 94, 95)


@pytest.mark.parametrize("number", sorted({k + i for k in MISSED for i in (0, 1)}))
def test_recalls_are_those_of_the_reference(number):
    scores = score(flags_of([1] * number, 100))
    assert scores.ap == pytest.approx((number + 1 - (number in MISSED)) / 101)


def test_the_iou_of_a_match_may_equal_the_threshold():
    half = score((truth(box(0)), found(box(0, height=5))))
    assert (half.ap50, half.ap75) == pytest.approx((1, 0))
    assert half.ap == pytest.approx(0.1)
    # The threshold 0.9 is 0.8999999999999999.
    assert score((truth(box(0)), found(box(0, height=9)))).ap == pytest.approx(0.9)
    # Boxes have no width of one pixel more: 1/3, not 0.375.
    third = coco.average_precision([truth(box(0))], [found(box(5))], 2)
    assert third.ap == 0


def test_the_second_detection_of_an_object_is_false_even_if_it_fits_better():
    both = score((truth(box(0), box(50)), found(box(0, height=8), box(0))))
    assert both.ap50 == pytest.approx(51 / 101)
    assert both.ap75 == pytest.approx(51 / 101)
    # At IoU 0.85 and above, the first is no match, and the second is: precision 1/2.
    assert both.ap == pytest.approx((7 + 3 / 2) / 10 * 51 / 101)


def test_of_two_equal_ious_the_later_object_is_matched():
    # The detection between both takes the later one; the exact one then finds the first one.
    image = truth(box(0), box(10)), found(box(5, width=10), box(0), scores=[0.9, 0.8])
    assert score(image).ap50 == pytest.approx(51 / 101 / 2)  # 1/3 is no match: (0, 1)
    wide = truth(box(0), box(4)), found(box(2), box(0), scores=[0.9, 0.8])
    assert score(wide).ap50 == pytest.approx(1)  # 2/3 with both, the later is taken
    wide = truth(box(4), box(0)), found(box(2), box(0), scores=[0.9, 0.8])
    assert score(wide).ap50 == pytest.approx(51 / 101)


def test_equal_scores_rank_in_order_of_images():
    hit, miss = (truth(box(0)), found(box(0))), (truth(box(0)), found(box(50)))
    assert score(hit, miss).ap == pytest.approx(51 / 101)
    assert score(miss, hit).ap == pytest.approx(51 / 101 / 2)


def test_a_crowd_takes_any_number_of_detections():
    inside = [box(10 * i) for i in range(8)]
    scores = [0.9] * 8 + [0.1]
    image = truth(box(0, width=100, height=100), box(300), crowd=[True, False])
    assert score((image, found(*inside, box(300), scores=scores))).ap == pytest.approx(1)
    # Half of the detection lies inside: 0.5 of its own area, not of the union.
    border = score((image, found(box(95), box(300))))
    assert (border.ap50, border.ap75) == pytest.approx((1, 0.5))
    # A crowd alone is nothing to find.
    alone = score((truth(box(0), crowd=[True]), found(box(50))))
    assert np.isnan(alone.ap)


def test_areas_at_a_limit_are_in_both_ranges():
    of_32 = score((truth(box(0, 0, 32, 32)), found(box(0, 0, 32, 32))))
    assert (of_32.ap_small, of_32.ap_medium) == pytest.approx((1, 1))
    assert np.isnan(of_32.ap_large)
    of_96 = score((truth(box(0, 0, 96, 96)), found(box(0, 0, 96, 96))))
    assert (of_96.ap_medium, of_96.ap_large) == pytest.approx((1, 1))
    assert np.isnan(of_96.ap_small)
    # The area of the annotation decides, not that of the box.
    of_mask = score((truth(box(0, 0, 96, 96), area=[1000]), found(box(0, 0, 96, 96))))
    assert of_mask.ap_small == pytest.approx(1)
    assert np.isnan(of_mask.ap_medium)


def test_misses_count_only_in_the_range_of_their_area():
    small, large = box(0), box(200, 200, 100, 100)
    scores = score((truth(small), found(large, small)))
    assert scores.ap_small == pytest.approx(1)  # the large one is left out
    assert scores.ap == pytest.approx(0.5)
    # A larger detection that matches counts.
    scores = score((truth(box(0, 0, 32, 32)), found(box(0, 0, 32, 33))))
    assert scores.ap_small == pytest.approx(1)


def test_100_detections_of_an_image_and_class_count():
    misses = [box(200)] * 100
    image = truth(box(0), box(50), classes=[1, 2])
    hits = found(*misses, box(0), box(50), scores=[0.9] * 100 + [0.1] * 2, classes=[1] * 101 + [2])
    scores = score((image, hits))
    np.testing.assert_allclose(scores.class_ap[1:], [0, 1])
    hits = found(*misses[1:], box(0), scores=[0.9] * 99 + [0.1])
    assert score((image, hits)).class_ap[1] == pytest.approx(0.01)
    pair = truth(box(0), box(50)), found(box(0), box(50))
    scores = score(pair)
    assert (scores.ar_1, scores.ar_10) == (0.5, 1)


def test_classes_without_objects_do_not_count():
    nothing = score((truth(), found()))
    assert np.isnan([getattr(nothing, name) for name in SCORES]).all()
    assert np.isnan(nothing.mean_precision).all()
    assert np.isnan(coco.average_precision([], [], 3).ap)
    assert score((truth(box(0)), found())).ap == 0
    assert score((truth(box(0)), found(box(0), classes=[2]))).ap == 0
    both = score((truth(box(0)), found(box(0), box(0), classes=[1, 2])))
    assert both.ap == pytest.approx(1)
    missed = score((truth(box(0), box(50), classes=[1, 2]), found(box(0))))
    assert missed.ap == pytest.approx(0.5)


def test_detections_in_images_without_objects_are_false():
    image, empty = (truth(box(0)), found(box(0), scores=[0.5])), (truth(), found(box(0)))
    assert score(image, empty).ap == pytest.approx(0.5)


def test_boxes_without_area_match_nothing():
    image = truth(box(0), box(20, 20, 0, 0)), found(box(0, 0, 0, 0), box(20, 20, 0, 0))
    assert score(image).ap == 0


def mask(*boxes, size=(40, 40)):
    result = np.zeros(size, bool)
    for x0, y0, x1, y1 in boxes:
        result[y0:y1, x0:x1] = True
    return rle.encode(result)


def with_masks(true, predicted):
    image = Truth.build([rle.to_box(m) for m in true], [1] * len(true), masks=true)
    scores = np.linspace(0.9, 0.1, len(predicted))
    boxes = [rle.to_box(m) for m in predicted]
    return image, Detections.build(boxes, [1] * len(predicted), scores, predicted)


def test_masks_are_compared_by_their_pixels():
    # Two diagonal quarters in the same box: IoU 1 of boxes, 0 of masks.
    one, other = mask((0, 0, 5, 5), (5, 5, 10, 10)), mask((5, 0, 10, 5), (0, 5, 5, 10))
    image = with_masks([one], [other])
    assert score(image).ap == pytest.approx(1)
    assert score(image, kind="mask").ap == 0
    exact = with_masks([one], [one])
    assert score(exact, kind="mask").ap == pytest.approx(1)
    empty = with_masks([mask(), one], [mask(), one])  # two empty masks do not match
    assert score(empty, kind="mask").ap50 == pytest.approx(51 / 101 / 2)
    other_size = with_masks([one], [mask((0, 0, 5, 5), size=(50, 50))])
    assert score(other_size, kind="mask").ap == 0


def test_the_area_of_a_mask_decides_its_range():
    frame = mask((0, 0, 40, 1), (0, 39, 40, 40), (0, 0, 1, 40), (39, 0, 40, 40))  # 156 of 1600
    other = mask((10, 10, 20, 20))
    scores = score(with_masks([other], [frame, other]), kind="mask")
    assert scores.ap_small == pytest.approx(0.5)  # the missed frame is small, though its box is not
    assert score(with_masks([other], [frame, other])).ap_small == pytest.approx(1)
    assert with_masks([frame], [])[0].area == [156]


def test_wrong_input_is_refused():
    with pytest.raises(UserError, match="score is not finite"):
        found(box(0), scores=[np.nan])
    with pytest.raises(UserError, match="box is not finite"):
        found([0, 0, np.inf, 1])
    with pytest.raises(ValueError, match="'boxes': 1, 'classes': 2"):
        truth(box(0), classes=[1, 2])
    with pytest.raises(ValueError, match="1 to 2, got"):
        score((truth(box(0)), found(box(0), classes=[0])))
    with pytest.raises(ValueError, match="1 to 2, got"):
        score((truth(box(0), classes=[3]), found(box(0))))
    with pytest.raises(ValueError, match="no masks"):
        score((truth(box(0)), found(box(0))), kind="mask")
    with pytest.raises(ValueError, match="1 images"):
        coco.average_precision([truth()], [], 3)


def random_images(rng, num_images, num_classes, side=120):
    """Objects and detections on a coarse grid: equal scores, equal IoUs, IoUs at thresholds."""
    for _ in range(num_images):
        number = rng.integers(0, 6)
        corners = rng.integers(0, side // 2, (number, 2))
        objects = np.concatenate([corners, corners + rng.integers(0, side // 2, (number, 2))], 1)
        near = np.repeat(objects, 2, axis=0) + rng.integers(-2, 3, (2 * number, 4)) * rng.integers(
            0, 2, (2 * number, 1)
        )
        boxes = np.clip(np.concatenate([near, np.array([box(5), box(50)])]), 0, side)
        boxes[:, 2:] = np.maximum(boxes[:, :2], boxes[:, 2:])
        classes = rng.integers(1, num_classes, number)
        guesses = np.concatenate([np.repeat(classes, 2), rng.integers(1, num_classes, 2)])
        kept = rng.permutation(len(boxes))[: rng.integers(0, len(boxes) + 1)]
        yield (
            Truth.build(
                objects,
                classes,
                crowd=rng.random(number) < 0.2,
                area=rng.choice([100, 1024, 9216, 20000], number),
                masks=[speckled(rng, b, side) for b in objects],
            ),
            Detections.build(
                boxes[kept],
                guesses[kept],
                rng.integers(0, 8, len(kept)) / 8,
                [speckled(rng, b, side) for b in boxes[kept]],
            ),
        )


def speckled(rng, corners, side):
    x0, y0, x1, y1 = corners
    result = np.zeros((side, side), bool)
    result[y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < 0.95
    return rle.encode(result)


def reference(images, num_classes, kind):
    """pycocotools, from its dictionaries; image ids unsorted, category ids sparse."""
    theirs = pytest.importorskip("pycocotools.cocoeval", reason="pycocotools is not installed")
    from pycocotools.coco import COCO

    ids, key = itertools.count(1), "bbox" if kind == "box" else "segmentation"

    def rows(objects, image, *names):
        values = [getattr(objects, name) for name in names]
        for i, (x0, y0, x1, y1) in enumerate(objects.boxes.tolist()):
            shape = {"bbox": [x0, y0, x1 - x0, y1 - y0]}
            if kind == "mask":
                shape["segmentation"] = objects.masks[i]
            common = {"image_id": image, "category_id": 7 * int(objects.classes[i])}
            yield shape, common, [v[i].item() for v in values]

    order = range(len(images))[::-1]
    truths: Any = COCO()
    truths.dataset = {
        "images": [{"id": 10 + 3 * i, "height": 120, "width": 120} for i in order],
        "categories": [{"id": 7 * c} for c in range(1, num_classes)][::-1],
        "annotations": [
            {"id": next(ids), "area": area, "iscrowd": int(crowd), **shape, **common}
            for i in range(len(images))
            for shape, common, (area, crowd) in rows(images[i][0], 10 + 3 * i, "area", "crowd")
        ],
    }
    results = [
        {"score": value, key: shape[key], **common}
        for i in range(len(images))
        for shape, common, (value,) in rows(images[i][1], 10 + 3 * i, "scores")
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truths.createIndex()
        name = "bbox" if kind == "box" else "segm"
        evaluation = theirs.COCOeval(truths, truths.loadRes(results), name)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_the_reference_to_the_bit(kind, seed):
    num_classes = 4
    images = list(random_images(np.random.default_rng(seed), 12, num_classes))
    scores = score(*images, num_classes=num_classes, kind=kind)
    theirs = reference(images, num_classes, kind)
    ours = np.array([getattr(scores, name) for name in SCORES])
    np.testing.assert_array_equal(np.where(np.isnan(ours), -1, ours), theirs.stats)
    assert 0 < scores.ap < 1
    curves = theirs.eval["precision"][[0, 5], :, :, 0, 2].transpose(0, 2, 1)
    assert (curves >= 0).all()
    np.testing.assert_array_equal(scores.precision[:, 1:], curves)


def test_nothing_is_printed(capfd):
    score((truth(box(0)), found(box(0))))
    assert capfd.readouterr() == ("", "")
