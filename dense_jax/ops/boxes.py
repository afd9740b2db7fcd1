"""Arithmetic of boxes, for NumPy arrays on the host and for traced JAX arrays alike.

A box is (x0, y0, x1, y1) in pixels, float32: its left, upper, right and lower edge. The pixel in
row 0 and column 0 fills (0, 0, 1, 1), so x1 - x0 is the width. Boxes are arrays [..., 4], and each
function works in the library that its array comes from.
"""

from typing import Any, TypeVar

import jax
import numpy as np

ArrayT = TypeVar("ArrayT", np.ndarray, jax.Array)


def sides(boxes: ArrayT) -> ArrayT:
    """Returns width and height, [..., 2]."""
    corners: Any = boxes
    return corners[..., 2:] - corners[..., :2]


def area(boxes: ArrayT) -> ArrayT:
    """Returns width times height, [...]."""
    lengths: Any = sides(boxes)
    return lengths[..., 0] * lengths[..., 1]


def min_side(boxes: ArrayT) -> ArrayT:
    """Returns the shorter side, [...]."""
    return sides(boxes).min(axis=-1)


def iou(boxes: ArrayT, others: ArrayT) -> ArrayT:
    """Returns the intersection over union of each pair: [..., N, 4], [..., M, 4] to [..., N, M].

    Two empty boxes have IoU 0.
    """
    xp = _library(boxes)
    ones: Any = boxes[..., :, None, :]
    twos: Any = others[..., None, :, :]
    low, high = xp.maximum(ones[..., :2], twos[..., :2]), xp.minimum(ones[..., 2:], twos[..., 2:])
    lengths = xp.maximum(high - low, 0)
    shared = lengths[..., 0] * lengths[..., 1]
    union = area(ones) + area(twos) - shared
    return shared / xp.where(union > 0, union, 1)


def clip(boxes: ArrayT, size: tuple[Any, Any]) -> ArrayT:
    """Returns the part of each box inside an image of `size` (height, width)."""
    xp, (height, width) = _library(boxes), size
    limits = [xp.asarray(limit, boxes.dtype) for limit in (width, height, width, height)]
    return xp.stack([xp.clip(boxes[..., i], 0, limits[i]) for i in range(4)], axis=-1)


def scale(boxes: ArrayT, factors: tuple[Any, Any]) -> ArrayT:
    """Returns the boxes in an image that was resized by `factors` (of its height, of its width)."""
    xp, (rows, columns) = _library(boxes), factors
    each = [boxes[..., i] * factor for i, factor in enumerate((columns, rows, columns, rows))]
    return xp.stack(each, axis=-1).astype(boxes.dtype)


def of_mask(mask: np.ndarray) -> np.ndarray:
    """Returns the tight box of a mask, bool [H, W] to float32 [4]; zeros for an empty mask."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return np.zeros(4, np.float32)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def _library(array: Any) -> Any:
    """Returns numpy or jax.numpy."""
    return array.__array_namespace__()
