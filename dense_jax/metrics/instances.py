"""Scores of objects without classes, from two maps of object numbers, on the host.

Maps are integers [H, W]. 0 is background, and pixels with equal numbers are one object, which may
have several parts.

Reference: average precision of the 2018 Data Science Bowl: J. C. Caicedo et al., Nature Methods 16,
2019. Symmetric best Dice of the leaf segmentation challenge: H. Scharr et al., Machine Vision and
Applications 27(4), 2016. Average best overlap: J. Uijlings et al., "Selective Search for Object
Recognition", IJCV 104(2), 2013.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import ndimage, sparse

THRESHOLDS = tuple(k / 20 for k in range(10, 20))
"""IoU 0.5, 0.55, ..., 0.95."""


def from_semantic(
    prediction: np.ndarray,
    *,
    object_class: int = 1,
    border_class: int | None = None,
    connectivity: Literal[4, 8] = 4,
    min_size: int = 0,
) -> np.ndarray:
    """Numbers the connected components of one class.

    Args:
      prediction: [H, W] integer class ids.
      object_class: the class whose components are objects.
      border_class: a class that separates touching objects. Its pixels are assigned to the nearest
        object after the components are found, if they are connected to an object.
      connectivity: 8 if a diagonal contact joins pixels, else 4.
      min_size: smaller components (in pixels) are removed before border pixels are assigned.

    Returns:
      int32 [H, W]: 0 for background, and object numbers 1, 2, ... in row-major order of their first
      pixels.
    """
    structure = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    numbers = ndimage.label(prediction == object_class, structure)[0].astype(np.int32)
    sizes = np.bincount(numbers.ravel())
    keep = sizes >= min_size
    keep[0] = False
    numbers = np.where(keep, np.cumsum(keep), 0).astype(np.int32)[numbers]
    if border_class is not None and numbers.any():
        border = prediction == border_class
        reachable = ndimage.binary_propagation(numbers > 0, structure, (numbers > 0) | border)
        nearest: Any = ndimage.distance_transform_edt(
            numbers == 0, return_distances=False, return_indices=True
        )
        given = reachable & border
        numbers[given] = numbers[tuple(nearest)][given]
    return numbers


def overlaps(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the number of pixels that true and predicted objects share, and their sizes.

    Returns:
      int64 shared pixels [T, P], sizes of the T true objects and sizes of the P predicted objects,
      in ascending order of object numbers.

    Raises:
      ValueError: the maps are not [H, W] of equal size, or have negative numbers.
    """
    if truth.shape != predicted.shape or truth.ndim != 2:
        raise ValueError(f"maps {truth.shape} and {predicted.shape} are not two of equal [H, W]")
    if truth.min(initial=0) < 0 or predicted.min(initial=0) < 0:
        raise ValueError("object numbers are 0 or above")
    (names_t, rows), (names_p, columns) = (
        np.unique(numbers, return_inverse=True) for numbers in (truth, predicted)
    )
    ones = np.ones(truth.size, np.int64)
    shape = len(names_t), len(names_p)
    table = sparse.coo_array((ones, (rows.ravel(), columns.ravel())), shape).toarray()
    is_t, is_p = names_t > 0, names_p > 0
    return table[is_t][:, is_p], table.sum(1)[is_t], table.sum(0)[is_p]


def hits(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Returns how many objects match at each of `THRESHOLDS`.

    A true and a predicted object match if their IoU is *above* the threshold. For thresholds from
    0.5, every object has at most one match.

    Returns:
      The number of matches, int64 [10], of true objects, and of predicted objects.
    """
    shared, of_truth, of_prediction = overlaps(truth, predicted)
    union = of_truth[:, None] + of_prediction - shared
    # Integer arithmetic, so that an IoU of exactly 11/20 is not above 0.55.
    pairs = [int((20 * shared > k * union).sum()) for k in range(10, 20)]
    return np.array(pairs), len(of_truth), len(of_prediction)


def average_precision(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Returns TP / (TP + FP + FN) of one image at each of `THRESHOLDS`, float64 [10].

    This is not the area under a curve, because predictions have no scores here. All values are NaN
    if neither map has an object.
    """
    true_positives, num_true, num_predicted = hits(truth, predicted)
    if not num_true + num_predicted:
        return np.full(len(THRESHOLDS), np.nan)
    return true_positives / (num_true + num_predicted - true_positives)


def f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Returns 2 TP / (2 TP + FP + FN) of one image at IoU 0.5, or NaN without any objects."""
    true_positives, num_true, num_predicted = hits(truth, predicted)
    total = num_true + num_predicted
    return float(2 * true_positives[0] / total) if total else float("nan")


def symmetric_best_dice(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Returns the mean over true objects of the best Dice with a predicted object, or vice versa.

    The lower of the two means counts. Dice is 2 |A and B| / (|A| + |B|). The result is 0 if only
    one map has objects, and NaN if neither has.
    """
    shared, of_truth, of_prediction = overlaps(truth, predicted)
    if not len(of_truth) + len(of_prediction):
        return float("nan")
    if not (len(of_truth) and len(of_prediction)):
        return 0.0
    dice = 2 * shared / (of_truth[:, None] + of_prediction)
    return float(min(dice.max(1).mean(), dice.max(0).mean()))


def best_overlaps(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Returns the highest IoU of each true object with a predicted one, float64 [T], at least 0."""
    shared, of_truth, of_prediction = overlaps(truth, predicted)
    union = of_truth[:, None] + of_prediction - shared
    return (shared / union).max(1, initial=0)


def scores(truths: Sequence[np.ndarray], predictions: Sequence[np.ndarray]) -> dict[str, float]:
    """Returns all scores of a set of images.

    Args:
      truths: [H, W] object numbers of each image, such as the "instances" of an example.
      predictions: object numbers of the same sizes, such as from `from_semantic`.

    Returns:
      Means over the images that have an object in either map: ``average_precision`` (mean over
      `THRESHOLDS`), ``average_precision_50``, ``average_precision_75``, ``f1_50`` and
      ``symmetric_best_dice``. Mean over all true objects: ``average_best_overlap``. Counts:
      ``num_objects`` and ``num_predicted``. A mean of no values is NaN.
    """
    pairs = list(zip(truths, predictions, strict=True))
    precision = np.array([average_precision(*pair) for pair in pairs]).reshape(-1, len(THRESHOLDS))
    counts = [hits(*pair)[1:] for pair in pairs]
    return {
        "average_precision": _mean(precision.mean(1)),
        "average_precision_50": _mean(precision[:, 0]),
        "average_precision_75": _mean(precision[:, 5]),
        "f1_50": _mean([f1(*pair) for pair in pairs]),
        "symmetric_best_dice": _mean([symmetric_best_dice(*pair) for pair in pairs]),
        "average_best_overlap": _mean(np.concatenate([best_overlaps(*p) for p in pairs] or [[]])),
        "num_objects": sum(true for true, _ in counts),
        "num_predicted": sum(predicted for _, predicted in counts),
    }


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Returns the mean of all values that are not NaN, or NaN if there are none."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else float("nan")
