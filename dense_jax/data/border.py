"""Separation of touching cells: background between them, and a larger loss weight there.

Reference: Ronneberger, Fischer, Brox, "U-Net: convolutional networks for biomedical image
segmentation", MICCAI 2015, arXiv:1505.04597, Section 3, Equation 2 and Figure 3. The background is
class 0 here; for electron microscopy that is the membrane.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import scipy.ndimage

from dense_jax.data import objects as object_lib
from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.dataset import Example

_BACKGROUND = 0
_REACH = 6  # In sigmas; larger distances add less than 2e-8 of w0.


def touching_ridge(instances: np.ndarray, width: int = 1) -> np.ndarray:
    """Returns the object pixels that must become background so that no two objects touch.

    If two objects are closer than ``width`` pixels, the one with the higher number loses pixels.
    Then at least ``width`` pixels separate them, in rows, columns and diagonals.

    Args:
      instances: [H, W] integer object numbers, 0 = none, below 2^31.
      width: of the ridge, in pixels.

    Returns:
      bool [H, W].
    """
    window, nothing = 2 * width + 1, np.iinfo(np.int32).max
    numbers = instances.astype(np.int32)  # uint8 and uint16 do not hold `nothing`
    numbers[numbers <= 0] = nothing
    lowest = scipy.ndimage.minimum_filter(numbers, window, mode="constant", cval=nothing)
    return (instances > 0) & (lowest < instances)


def border_term(
    d1: np.ndarray, d2: np.ndarray, *, w0: float = 10.0, sigma: float = 5.0
) -> np.ndarray:
    """w0 exp(-(d1 + d2)^2 / (2 sigma^2)), the second term of Equation 2; distances in pixels."""
    return w0 * np.exp(-((d1 + d2) ** 2) / (2 * sigma**2))


def two_nearest(instances: np.ndarray, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns each pixel's distances to the nearest and to the second nearest object.

    Euclidean distances between pixel centres, exact up to ``reach`` pixels and infinite beyond. An
    object may consist of several parts.

    Args:
      instances: [H, W] integer object numbers, 0 = none.
      reach: in pixels. Only this much around each object is computed.

    Returns:
      float64 [H, W] twice.
    """
    margin, (height, width) = math.ceil(reach), instances.shape
    d1, d2 = np.full((2, height, width), np.inf)
    for number, box in enumerate(scipy.ndimage.find_objects(instances), start=1):
        if box is None:
            continue
        near = tuple(slice(max(side.start - margin, 0), side.stop + margin) for side in box)
        d: Any = scipy.ndimage.distance_transform_edt(instances[near] != number)
        d[d > reach] = np.inf
        d2[near] = np.minimum(d2[near], np.maximum(d1[near], d))
        d1[near] = np.minimum(d1[near], d)
    return d1, d2


def class_balance(label: np.ndarray) -> np.ndarray:
    """Returns w_c: the inverse frequency of each pixel's class, scaled to mean 1 over the image.

    The paper gives no formula. Ignored pixels have weight 0 and do not count.

    Args:
      label: [H, W] class ids.

    Returns:
      float32 [H, W].
    """
    counts = np.bincount(label.ravel(), minlength=IGNORE_LABEL + 1)
    scored = np.arange(len(counts)) != IGNORE_LABEL
    present = (counts > 0) & scored
    weights = np.zeros(len(counts))
    weights[present] = counts[scored].sum() / (present.sum() * counts[present])
    return weights[label].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class SeparateTouching:
    """Labels a thin ridge between touching objects as background; see `touching_ridge`.

    Attributes:
      width: of the ridge, in pixels.
    """

    width: int = 1

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """Returns the example with new "label" and "instances"."""
        instances = _instances(example)
        ridge = touching_ridge(instances, self.width)
        return {
            **example,
            "label": np.where(ridge, np.uint8(_BACKGROUND), example["label"]),
            "instances": np.where(ridge, 0, instances),
        }


@dataclasses.dataclass(frozen=True)
class BorderWeights:
    """Adds "weights", float32 [H, W]: w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2)), Equation 2.

    The second term is for background pixels only: inside a cell d1 is 0, but there is no border. It
    is 0 where fewer than two objects are near.

    Attributes:
      w0: weight of the borders; 0 leaves `class_balance` alone.
      sigma: width of the borders, in pixels.
    """

    w0: float = 10.0
    sigma: float = 5.0

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """Returns the example with weights."""
        label, weights = example["label"], class_balance(example["label"])
        if self.w0 != 0:
            distances = two_nearest(_instances(example), _REACH * self.sigma)
            term = border_term(*distances, w0=self.w0, sigma=self.sigma)
            weights += np.where(label == _BACKGROUND, term, 0).astype(np.float32)
        return {**example, "weights": weights}


def _instances(example: Example) -> np.ndarray:
    """Returns the object numbers [H, W]; touching cells of two classes are one object."""
    return object_lib.number(example, _BACKGROUND, by_class=False)
