"""PASCAL VOC's average precision, of boxes and of masks (AP^r).

All protocols rank the detections of a class over the whole set, and compare each with the objects
of its image and class. They differ in which IoU is a match, in whether an object that is already
found hides others, and in how precision is averaged:

  protocol  of     IoU   compared with                          usual average
  python    boxes  > t   the best object; found: false          area, for VOC 2007 11 points
  devkit    boxes  >= t  the best object; found: false          area, for VOC 2007 11 points
  sds       masks  > t   the best object that is not yet found  area
  hyper     masks  >= t  the best object; found: false          area
  mnc       masks  >= t  the best object; found: false          11 points

VOC's boxes name their first and last pixel, counted from 1, and its code adds one to the widths.
As edges (xmin - 1, ymin - 1, xmax, ymax) they have the same widths, and so the same IoU.

Reference: M. Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 88(2),
2010, Section 4.2; npinto/VOCdevkit: VOCcode/VOCevaldet.m (devkit);
rbgirshick/py-faster-rcnn: lib/datasets/voc_eval.py (python). AP^r: B. Hariharan et al.,
"Simultaneous detection and segmentation", ECCV 2014, arXiv:1407.1808, Section 4;
bharath272/sds_eccv2014: evaluation (sds); bharath272/sds: evaluation.py (hyper);
daijifeng001/MNC: lib/utils/voc_eval.py (mnc, also of msracver/FCIS).
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from hotcoco import mask as coco_mask

from dense_jax.metrics.detections import Detections, Truth
from dense_jax.ops import boxes as box_ops

BoxProtocol = Literal["python", "devkit"]
MaskProtocol = Literal["sds", "hyper", "mnc"]

VOLUME = tuple(k / 10 for k in range(1, 10))
"""The IoUs of AP^r_vol, which is the mean of AP^r over them."""

# From 0.3 on, three of these numbers lie above tenths: a recall of 3/10, 6/10 or 7/10 is below its
# point. This is the grid of all authors' code in Python.
_POINTS = np.arange(0.0, 1.1, 0.1)


class _Rule(NamedTuple):
    of_masks: bool
    matches: Callable[[Any, float], Any]  # (IoU, threshold)
    passes_over_found: bool


_RULES = {
    "python": _Rule(False, operator.gt, False),
    "devkit": _Rule(False, operator.ge, False),
    "sds": _Rule(True, operator.gt, True),
    "hyper": _Rule(True, operator.ge, False),
    "mnc": _Rule(True, operator.ge, False),
}


@dataclasses.dataclass(frozen=True, eq=False)
class VocScores:
    """Average precision of each class; NaN where there is no object to find.

    Attributes:
      class_area: [T, C], area under the curve of precision over recall, at T thresholds, of each
        class id.
      class_points: [T, C], the mean of precision at 11 recalls.
    """

    class_area: np.ndarray
    class_points: np.ndarray

    @property
    def area(self) -> np.ndarray:
        """The mean of `class_area` over classes with objects, [T]."""
        return _mean(self.class_area)

    @property
    def points(self) -> np.ndarray:
        """The mean of `class_points` over classes with objects, [T]."""
        return _mean(self.class_points)


def average_precision(
    truths: Sequence[Truth],
    detections: Sequence[Detections],
    num_classes: int,
    protocol: BoxProtocol | MaskProtocol,
    thresholds: Sequence[float] = (0.5,),
) -> VocScores:
    """Returns the average precision of each class.

    A detection of a difficult object is neither true nor false, however many there are.

    Args:
      truths: the true objects of each image.
      detections: the predicted objects of each image, in the same order. Of equal scores, those of
        earlier images come first.
      num_classes: the number of classes C with the background, class 0.
      protocol: the rules; see above.
      thresholds: T IoUs that a match needs; AP^r is reported at 0.5 and 0.7, and over `VOLUME`.
    """
    rule, counts = _RULES[protocol], np.zeros(num_classes, int)
    classes, scores = [np.zeros(0, int)], [np.zeros(0)]
    verdicts = [np.zeros((len(thresholds), 0), np.int8)]
    for truth, found in zip(truths, detections, strict=True):
        order = np.argsort(-found.scores, kind="stable")
        classes.append(found.classes[order])
        scores.append(found.scores[order])
        # Objects of other classes are out of reach.
        ious = np.where(classes[-1][:, None] == truth.classes, _ious(truth, found, rule)[order], -1)
        judged = [_judge(ious, truth.difficult, threshold, rule) for threshold in thresholds]
        verdicts.append(np.stack(judged))
        counts += np.bincount(truth.classes[~truth.difficult], minlength=num_classes)
    ranking = np.argsort(-np.concatenate(scores), kind="stable")
    ranked_classes = np.concatenate(classes)[ranking]
    ranked_verdicts = np.concatenate(verdicts, axis=1)[:, ranking]
    area = np.full((len(thresholds), num_classes), np.nan)
    points = area.copy()
    for class_id in np.flatnonzero(counts):
        for i, row in enumerate(ranked_verdicts[:, ranked_classes == class_id]):
            hits = row[row != _LEFT_OUT] == _TRUE
            area[i, class_id] = area_under(hits, counts[class_id])
            points[i, class_id] = eleven_points(hits, counts[class_id])
    return VocScores(area, points)


def area_under(hits: np.ndarray, num_objects: int) -> float:
    """Returns the area under precision over recall, where precision is the best at higher recall.

    Args:
      hits: bool [N], whether each detection is true, the highest score first.
      num_objects: the number of objects to find.
    """
    recall, precision = _curve(hits, num_objects)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * best))


def eleven_points(hits: np.ndarray, num_objects: int) -> float:
    """Returns the mean over 11 recalls of the best precision at this recall or a higher one.

    Args:
      hits: bool [N], whether each detection is true, the highest score first.
      num_objects: the number of objects to find.
    """
    recall, precision = _curve(hits, num_objects)
    return float(np.mean([precision[recall >= point].max(initial=0) for point in _POINTS]))


def _curve(hits: np.ndarray, num_objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns recall and precision of the first detections, for each number of them."""
    found = np.cumsum(hits)
    return found / num_objects, found / np.arange(1, 1 + len(hits))


def _ious(truth: Truth, found: Detections, rule: _Rule) -> np.ndarray:
    """Returns the IoU of each detection with each object, [D, G]."""
    if not rule.of_masks:
        return box_ops.iou(found.boxes, truth.boxes)
    if not len(truth) or not len(found):
        return np.zeros((len(found), len(truth)))
    if truth.masks is None or found.masks is None:
        raise ValueError("an image has no masks to compare")
    predicted, true = ([dict(mask) for mask in masks] for masks in (found.masks, truth.masks))
    return coco_mask.iou(predicted, true, [False] * len(true))


_FALSE, _LEFT_OUT, _TRUE = -1, 0, 1


def _judge(ious: np.ndarray, difficult: np.ndarray, threshold: float, rule: _Rule) -> np.ndarray:
    """Judges the detections of an image, the highest score first; IoUs [D, G] to int8 [D]."""
    verdicts = np.full(len(ious), _FALSE, np.int8)
    is_found = np.zeros(len(difficult), bool)
    for i in np.flatnonzero(rule.matches(ious, threshold).any(axis=1)):
        candidates = np.where(is_found, -1, ious[i]) if rule.passes_over_found else ious[i]
        best = candidates.argmax()
        if not rule.matches(candidates[best], threshold):
            continue
        if difficult[best]:
            verdicts[i] = _LEFT_OUT
        elif not is_found[best]:
            verdicts[i], is_found[best] = _TRUE, True
    return verdicts


def _mean(values: np.ndarray) -> np.ndarray:
    scored = ~np.isnan(values).any(axis=0)
    if not scored.any():
        return np.full(len(values), np.nan)
    return values[:, scored].mean(axis=1)
