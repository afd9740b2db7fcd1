"""How far the variance of a Monte-Carlo prediction tells right pixels from wrong ones.

Pixels are sorted by variance and cut into ten equal bands, the most confident first.

Reference: Kendall, Badrinarayanan, Cipolla, "Bayesian SegNet", BMVC 2017, arXiv:1511.02680,
Section 5 (accuracy at percentiles of confidence).
"""

import dataclasses
import pathlib

import numpy as np
from PIL import Image

from dense_jax import runs, viz
from dense_jax.data.classes import IGNORE_LABEL, ClassTable
from dense_jax.data.dataset import Source
from dense_jax.infer.monte_carlo import MonteCarlo
from dense_jax.tasks import prediction
from dense_jax.train.config import RunConfig

NUM_BANDS = 10
_NUM_PICTURES = 4
_ENOUGH = 64  # rows that the numbers of a colour scale need


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """What the variance of a split's pixels says about their labels.

    Attributes:
      scores: "accuracy_confident_half" and "accuracy_doubtful_tenth" of the pixels,
        "variance_right" and "variance_wrong", the mean over rightly and wrongly labelled ones.
      bands: [10] accuracies, see `band_accuracies`.
      num_pixels: number of scored pixels.
      pictures: prediction [H, W] and variance [H, W] of a few images, by index.
    """

    scores: dict[str, float]
    bands: np.ndarray
    num_pixels: int
    pictures: dict[int, tuple[np.ndarray, np.ndarray]]

    def write(self, folder: pathlib.Path, source: Source, classes: ClassTable) -> None:
        """Writes ``uncertainty.json``, ``uncertainty.md`` and ``pictures/uncertainty_*.png``.

        Pictures show image, label, prediction, errors and variance, all in one scale of colours.
        """
        bands = [None if np.isnan(band) else float(band) for band in self.bands]
        record = {"scores": self.scores, "band_accuracies": bands, "pixels": self.num_pixels}
        runs.write_json(folder / "uncertainty.json", record)
        (folder / "uncertainty.md").write_text(table(self.bands))
        (folder / "pictures").mkdir(exist_ok=True)
        # A few outstanding pixels may leave the scale.
        high = max(float(np.quantile(variance, 0.995)) for _, variance in self.pictures.values())
        for rank, (index, (labels, variance)) in enumerate(sorted(self.pictures.items()), 1):
            example = source[index]
            row = viz.comparison(example["image"], example["label"], labels, classes.palette())
            parts = [row, viz.heat(variance, high), viz.heat_scale(high, max(len(row), _ENOUGH))]
            path = folder / "pictures" / f"uncertainty_{rank}.png"
            Image.fromarray(_beside(parts)).save(path)


def measure(
    predict: MonteCarlo, variables: prediction.Variables, source: Source, config: RunConfig
) -> Uncertainty:
    """Predicts a split and sorts its pixels; keeps 5 bytes for each of them."""
    chosen = set(np.linspace(0, len(source) - 1, _NUM_PICTURES).round().astype(int).tolist())
    variances, rights, pictures = [], [], {}
    for index, values in prediction.predict_split(predict.with_variance, variables, source, config):
        label = source[index]["label"]
        labels, of_pixels = values[..., :-1].argmax(-1).astype(np.uint8), values[..., -1]
        scored = label != IGNORE_LABEL
        variances.append(of_pixels[scored])
        rights.append(labels[scored] == label[scored])
        if index in chosen:
            pictures[index] = (labels, of_pixels)
    variance, right = np.concatenate(variances), np.concatenate(rights)
    bands = band_accuracies(variance, right)
    scores = {
        "accuracy_confident_half": float(np.mean(bands[: NUM_BANDS // 2])),
        "accuracy_doubtful_tenth": float(bands[-1]),
        "variance_right": _mean(variance[right]),
        "variance_wrong": _mean(variance[~right]),
    }
    return Uncertainty(scores, bands, len(right), pictures)


def band_accuracies(variance: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The share of right pixels in each band of variance.

    Args:
      variance: [N] of the pixels.
      right: bool [N], whether they are labelled rightly.

    Returns:
      [10] float64, the band of least variance first; NaN for bands without pixels (N < 10).
    """
    order = np.argsort(variance, kind="stable")
    return np.array([_mean(part) for part in np.array_split(right[order], NUM_BANDS)])


def table(bands: np.ndarray) -> str:
    """The accuracies of `band_accuracies` in Markdown, each band alone and with those before."""
    lines = ["| pixels by confidence | accuracy in the band | accuracy so far |", "|---|---|---|"]
    for i, accuracy in enumerate(bands):
        band = f"{100 * i // NUM_BANDS}-{100 * (i + 1) // NUM_BANDS} %"
        lines.append(f"| {band} | {100 * accuracy:.2f} | {100 * bands[: i + 1].mean():.2f} |")
    return "\n".join(lines) + "\n"


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")


def _beside(parts: list[np.ndarray], gap: int = 4) -> np.ndarray:
    """Pictures side by side on white, their tops aligned."""
    height = max(len(part) for part in parts)
    width = sum(part.shape[1] + gap for part in parts) - gap
    sheet, left = np.full((height, width, 3), 255, np.uint8), 0
    for part in parts:
        sheet[: len(part), left : left + part.shape[1]] = part
        left += part.shape[1] + gap
    return sheet
