"""Measures how well the variance of Monte-Carlo predictions separates right from wrong pixels.

Pixels are sorted by variance and divided into ten equal bands, the most confident first.

Reference: Kendall, Badrinarayanan, Cipolla, "Bayesian SegNet", BMVC 2017, arXiv:1511.02680,
Section 5 (accuracy at percentiles of confidence).
"""

import functools
import json
from typing import Any

import numpy as np

from dense_jax import viz
from dense_jax.data.classes import IGNORE_LABEL, ClassTable
from dense_jax.data.dataset import Dataset, Source
from dense_jax.errors import UserError
from dense_jax.evaluation.batches import Predicts, predict_split
from dense_jax.evaluation.record import Column, Findings, Picture, Score, Table

NUM_BANDS = 10
_NUM_PICTURES = 4
_MIN_SCALE_HEIGHT = 64  # rows that the numbers of a colour scale need


def measure(task: Predicts, variables: Any, dataset: Dataset, split: str) -> Findings:
    """Predicts a split, sorts its pixels, and draws the variance; needs 5 bytes for each pixel.

    Metrics are "accuracy_confident_half" and "accuracy_doubtful_tenth" of the pixels, and
    "variance_right" and "variance_wrong", the mean variance of right and of wrong pixels. The
    table of bands is also written to ``uncertainty.md`` and ``uncertainty.json``.

    Raises:
      UserError: the split has no images.
    """
    source = dataset.split(split)
    if not len(source):
        raise UserError(f"the {split} split has no images: give another --split")
    indices = set(np.linspace(0, len(source) - 1, _NUM_PICTURES).round().astype(int).tolist())
    variances, rights, drawings = [], [], {}
    for index, outputs in predict_split(task, variables, source):
        label, variance_map = source[index]["label"], outputs["variance"]
        labels = outputs["logits"].argmax(-1).astype(np.uint8)
        scored = label != IGNORE_LABEL
        variances.append(variance_map[scored])
        rights.append(labels[scored] == label[scored])
        if index in indices:
            drawings[index] = (labels, variance_map)
    variance, right = np.concatenate(variances), np.concatenate(rights)
    bands = band_accuracies(variance, right)
    scores = [
        Score("accuracy_confident_half", float(np.mean(bands[: NUM_BANDS // 2]))),
        Score("accuracy_doubtful_tenth", float(bands[-1])),
        Score("variance_right", _mean(variance[right]), unit=""),
        Score("variance_wrong", _mean(variance[~right]), unit=""),
    ]
    numbers = {score.name: score.value for score in scores}
    accuracies = [None if np.isnan(band) else float(band) for band in bands]
    summary = {"scores": numbers, "band_accuracies": accuracies, "pixels": len(right)}
    # The brightest 0.5 % of an image may exceed the scale.
    high = max(float(np.quantile(variance, 0.995)) for _, variance in drawings.values())
    pictures = [
        Picture(
            f"uncertainty_{rank}.png",
            functools.partial(_picture, source, index, maps, high, dataset.classes),
            "Uncertainty",
            source[index]["name"],
            ("image", "label", "prediction", "errors", "variance"),
        )
        for rank, (index, maps) in enumerate(sorted(drawings.items()), 1)
    ]
    table = Table(
        "Accuracy by confidence",
        [Column("Pixels, most confident first"), Column("Accuracy", "%")],
        [[_band(i), accuracy] for i, accuracy in enumerate(accuracies)],
    )
    files = {
        "uncertainty.json": f"{json.dumps(summary, indent=2)}\n",
        "uncertainty.md": markdown(bands),
    }
    return Findings(scores, [table], pictures, files)


def _picture(
    source: Source,
    index: int,
    maps: tuple[np.ndarray, np.ndarray],
    high: float,
    classes: ClassTable,
) -> np.ndarray:
    example, (labels, variance) = source[index], maps
    row = viz.comparison(example["image"], example["label"], labels, classes.palette())
    scale = viz.heat_scale(high, max(len(row), _MIN_SCALE_HEIGHT))
    return _beside([row, viz.heat(variance, high), scale])


def band_accuracies(variance: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns the share of right pixels in each band of variance.

    Args:
      variance: [N] variance of the pixels.
      right: bool [N], whether the label of each pixel is right.

    Returns:
      [10] float64, the band of least variance first; NaN for bands without pixels (N < 10).
    """
    order = np.argsort(variance, kind="stable")
    return np.array([_mean(part) for part in np.array_split(right[order], NUM_BANDS)])


def markdown(bands: np.ndarray) -> str:
    """Returns a Markdown table of `band_accuracies`: each band, and the mean up to this band."""
    lines = ["| pixels by confidence | accuracy in the band | accuracy so far |", "|---|---|---|"]
    for i, accuracy in enumerate(bands):
        lines.append(f"| {_band(i)} | {100 * accuracy:.2f} | {100 * bands[: i + 1].mean():.2f} |")
    return "\n".join(lines) + "\n"


def _band(i: int) -> str:
    return f"{100 * i // NUM_BANDS}-{100 * (i + 1) // NUM_BANDS} %"


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")


def _beside(parts: list[np.ndarray], gap: int = 4) -> np.ndarray:
    """Joins pictures side by side on white, with their tops aligned."""
    height = max(len(part) for part in parts)
    width = sum(part.shape[1] + gap for part in parts) - gap
    sheet, left = np.full((height, width, 3), 255, np.uint8), 0
    for part in parts:
        sheet[: len(part), left : left + part.shape[1]] = part
        left += part.shape[1] + gap
    return sheet
