"""Scores of semantic segmentation from one integer confusion matrix.

Counts are exact integers. They are added over the whole set before ratios are computed, so that the
scores do not depend on the batch size or on the number of devices and processes.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

_NO_COUNT = -(2**24)  # Sums over up to 127 images or devices stay negative and within int32.


def confusion_counts(
    labels: jax.Array | np.ndarray,
    predictions: jax.Array | np.ndarray,
    num_classes: int,
    *,
    ignore_label: int = 255,
) -> jax.Array:
    """Returns the number of pixels of each (label, prediction) pair; works under jit and pmap.

    Pixels whose label is `ignore_label` or outside [0, C) are not counted. If the prediction of a
    scored pixel is outside [0, C), there are no counts. Outside of jit this raises ValueError.
    Inside, where nothing can be raised, all counts are negative; `add` and `summarise` refuse them.

    Args:
      labels: integer class ids of any shape.
      predictions: integer class ids of the same shape, each in [0, C).
      num_classes: C.
      ignore_label: id of pixels without a label.

    Returns:
      [C, C] int32, row = label, column = prediction, exact for up to 2**31 - 1 pixels per call.

    Raises:
      ValueError: the shapes differ, or the prediction of a scored pixel is outside [0, C).
    """
    if labels.shape != predictions.shape:
        raise ValueError(f"labels {labels.shape} do not match predictions {predictions.shape}")
    labels = jnp.asarray(labels).astype(jnp.int32)
    predictions = jnp.asarray(predictions).astype(jnp.int32)
    is_scored = (labels != ignore_label) & (labels >= 0) & (labels < num_classes)
    is_wrong = is_scored & ((predictions < 0) | (predictions >= num_classes))
    if not isinstance(is_wrong, jax.core.Tracer) and jnp.any(is_wrong):
        raise ValueError(f"prediction {predictions[is_wrong][0]} is outside [0, {num_classes})")
    # An integer bincount takes 0.3 ms on a CPU for 360x480 pixels of 11 classes. The product of
    # one-hot matrices takes 1 ms in int8 and 9 ms in float32. Bincount drops indices past `length`.
    pairs = jnp.where(is_scored, labels * num_classes + predictions, num_classes**2)
    counts = jnp.bincount(pairs.reshape(-1), length=num_classes**2)
    counts = counts.reshape(num_classes, num_classes).astype(jnp.int32)
    return jnp.where(jnp.any(is_wrong), jnp.int32(_NO_COUNT), counts)


def add(total: np.ndarray | None, counts: jax.Array | np.ndarray) -> np.ndarray:
    """Returns the sum of a total (None at the start) and new counts, on the host in int64.

    Raises:
      ValueError: counts are negative: a prediction was outside [0, C).
    """
    counts = np.asarray(counts, np.int64)
    if counts.min() < 0:
        raise ValueError(f"a prediction is outside [0, {len(counts)}), so nothing was counted")
    return counts if total is None else total + counts


def summarise(
    confusion: np.ndarray,
    class_names: Sequence[str] | None = None,
    *,
    absent: Literal["skip", "zero"] = "skip",
) -> dict[str, Any]:
    """Returns the scores of a confusion matrix n_ij (true class i, predicted class j).

    With t_i = sum_j n_ij, ``pixel_accuracy`` is sum_i n_ii / sum_i t_i, ``mean_accuracy`` is
    mean_i n_ii / t_i, and ``mean_iou`` is mean_i n_ii / (t_i + sum_j n_ji - n_ii).
    ``frequency_weighted_iou`` is the mean IoU weighted by t_i (Long et al., CVPR 2015,
    arXiv:1411.4038, Section 5).

    Args:
      confusion: [C, C] integers, row = label.
      class_names: C names for the table. None: the class ids.
      absent: "skip" omits a class from a mean if its ratio is 0/0 (the FCN release). A class that
        is neither labelled nor predicted has no IoU. A class that is only predicted has an IoU of 0
        but no accuracy. "zero" counts a ratio 0/0 as 0 and divides by C (the SegNet release).

    Returns:
      The four scores and ``num_pixels``. Scores are NaN if no pixel is scored. ``per_class`` is a
      list of dicts ``name, iou, accuracy, pixels, predicted``, in which a ratio 0/0 is None.

    Raises:
      ValueError: the matrix is not square, not of integers, or has negative counts.
    """
    confusion = np.asarray(confusion)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"a confusion matrix is [C, C], received {confusion.shape}")
    if not np.issubdtype(confusion.dtype, np.integer) or confusion.min() < 0:
        raise ValueError("a confusion matrix holds counts: integers, none negative")
    names = class_names or [str(i) for i in range(len(confusion))]
    counts = confusion.astype(np.int64)
    correct, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    accuracy = _ratio(correct, true)
    iou = _ratio(correct, true + predicted - correct)
    num_pixels = int(true.sum())

    def mean(ratios: np.ndarray) -> float:
        values = np.nan_to_num(ratios) if absent == "zero" else ratios[~np.isnan(ratios)]
        return float(values.mean()) if num_pixels else float("nan")

    return {
        "pixel_accuracy": float(_ratio(correct.sum(), true.sum())),
        "mean_accuracy": mean(accuracy),
        "mean_iou": mean(iou),
        "frequency_weighted_iou": float(_ratio(true @ np.nan_to_num(iou), true.sum())),
        "num_pixels": num_pixels,
        "per_class": [
            {
                "name": name,
                "iou": None if np.isnan(iou[i]) else float(iou[i]),
                "accuracy": None if np.isnan(accuracy[i]) else float(accuracy[i]),
                "pixels": int(true[i]),
                "predicted": int(predicted[i]),
            }
            for i, name in enumerate(names)
        ],
    }


def _ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """Returns the elementwise quotient in float64, NaN for 0/0."""
    with np.errstate(invalid="ignore"):
        return np.true_divide(numerator, denominator)
