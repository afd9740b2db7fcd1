"""Arithmetic of boxes, for NumPy arrays on the host and for traced JAX arrays alike.

A box is (x0, y0, x1, y1) in pixels, float32: its left, upper, right and lower edge. The pixel in
row 0 and column 0 fills (0, 0, 1, 1), so x1 - x0 is the width. Boxes are arrays [..., 4]. Each
function works in JAX if one of its arrays does, else in NumPy.

With `plus_one`, x1 and y1 are the last column and row inside the box, as in Caffe's detectors, and
x1 - x0 + 1 is the width. `last_inside` makes such boxes of those with edges, and `with_edges` is
its inverse.
"""

import math
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray | jax.Array
ArrayT = TypeVar("ArrayT", bound=Array)
Weights = tuple[float, float, float, float]

# Decoded boxes are at most 62.5 times as wide or high as their anchors (facebookresearch/Detectron:
# detectron/core/config.py, BBOX_XFORM_CLIP).
MAX_LOG_SCALE = math.log(1000 / 16)
_ENDS: Weights = (0, 0, 1, 1)


def sides(boxes: ArrayT, *, plus_one: bool = False) -> ArrayT:
    """Returns width and height, [..., 2]."""
    chex.assert_axis_dimension(boxes, -1, 4)
    corners: Any = boxes
    lengths = corners[..., 2:] - corners[..., :2]
    return lengths + 1 if plus_one else lengths


def area(boxes: ArrayT, *, plus_one: bool = False) -> ArrayT:
    """Returns width times height, [...]."""
    lengths: Any = sides(boxes, plus_one=plus_one)
    return lengths[..., 0] * lengths[..., 1]


def min_side(boxes: ArrayT, *, plus_one: bool = False) -> ArrayT:
    """Returns the shorter side, [...]."""
    lengths: Any = sides(boxes, plus_one=plus_one)
    return lengths.min(axis=-1)


def last_inside(boxes: ArrayT) -> ArrayT:
    """Returns boxes whose x1 and y1 are the last column and row inside, not the edges behind."""
    xp = _library(boxes)
    return boxes - _row(xp, _ENDS, boxes)


def with_edges(boxes: ArrayT) -> ArrayT:
    """Returns boxes whose x1 and y1 are edges, of boxes where these are inside."""
    xp = _library(boxes)
    return boxes + _row(xp, _ENDS, boxes)


def iou(boxes: ArrayT, others: Array, *, plus_one: bool = False) -> ArrayT:
    """Returns the intersection over union of each pair: [..., N, 4], [..., M, 4] to [..., N, M].

    Two empty boxes have IoU 0.
    """
    xp = _library(boxes, others)
    ones: Any = boxes[..., :, None, :]
    twos: Any = others[..., None, :, :]
    low, high = xp.maximum(ones[..., :2], twos[..., :2]), xp.minimum(ones[..., 2:], twos[..., 2:])
    lengths = xp.maximum(high - low + 1 if plus_one else high - low, 0)
    shared = lengths[..., 0] * lengths[..., 1]
    union = area(ones, plus_one=plus_one) + area(twos, plus_one=plus_one) - shared
    return shared / xp.where(union > 0, union, 1)


def encode(
    boxes: ArrayT, anchors: Array, *, weights: Weights = (1, 1, 1, 1), plus_one: bool = False
) -> ArrayT:
    """Returns what a network predicts to move anchors onto boxes, [..., 4].

    dx = wx (x - xa) / a, dy = wy (y - ya) / b, dw = ww log(w / a), dh = wh log(h / b), where (x, y)
    is the centre and (w, h) the size of a box, and (xa, ya) and (a, b) those of its anchor. Sides
    below 1e-6 count as 1e-6, so that rows of padding give finite numbers.

    Args:
      boxes: float [..., 4].
      anchors: float [..., 4], of the same rank; shapes are broadcast.
      weights: (wx, wy, ww, wh). Box heads use (10, 10, 5, 5), region proposals ones.
      plus_one: whether x1 and y1 are inside the box.

    Reference: Ren et al., NIPS 2015, arXiv:1506.01497, Eq. 2.
    """
    chex.assert_equal_rank((boxes, anchors))
    xp = _library(boxes, anchors)
    size: Any = xp.maximum(sides(boxes, plus_one=plus_one), 1e-6)
    anchor_size: Any = xp.maximum(sides(anchors, plus_one=plus_one), 1e-6)
    shift: Any = (boxes[..., :2] + size / 2) - (anchors[..., :2] + anchor_size / 2)
    deltas = xp.concatenate([shift / anchor_size, xp.log(size / anchor_size)], axis=-1)
    return deltas * _row(xp, weights, deltas)


def decode(
    deltas: ArrayT,
    anchors: Array,
    *,
    weights: Weights = (1, 1, 1, 1),
    max_log_scale: float | None = MAX_LOG_SCALE,
    plus_one: bool = False,
    subtract_one: bool = True,
) -> ArrayT:
    """Returns the boxes to which deltas move their anchors, [..., 4]; the inverse of `encode`.

    Args:
      deltas: float [..., 4].
      anchors: float [..., 4], of the same rank; shapes are broadcast. Pass `boxes[:, None]` for
        deltas of several classes, [N, K, 4].
      weights: those of `encode`.
      max_log_scale: upper limit of dw and dh after division by the weights. None: no limit, as in
        py-faster-rcnn.
      plus_one: whether x1 and y1 are inside the box.
      subtract_one: with `plus_one`, False leaves x1 and y1 one larger, as py-faster-rcnn does
        (rbgirshick/py-faster-rcnn: lib/fast_rcnn/bbox_transform.py); Detectron subtracts 1.
    """
    chex.assert_equal_rank((deltas, anchors))
    chex.assert_axis_dimension(deltas, -1, 4)
    xp = _library(deltas, anchors)
    size: Any = sides(anchors, plus_one=plus_one)
    deltas = deltas / _row(xp, weights, deltas)
    log_scale = deltas[..., 2:]
    if max_log_scale is not None:
        log_scale = xp.minimum(log_scale, max_log_scale)
    centre: Any = anchors[..., :2] + size / 2 + deltas[..., :2] * size
    half = xp.exp(log_scale) * size / 2
    end = centre + half - 1 if plus_one and subtract_one else centre + half
    return xp.concatenate([centre - half, end], axis=-1)


def inside(boxes: ArrayT, size: tuple[Any, Any], *, plus_one: bool = False) -> ArrayT:
    """Returns whether no edge leaves an image of `size` (height, width), bool [...]."""
    corners, (height, width) = boxes, size
    x0, y0, x1, y1 = (corners[..., i] for i in range(4))
    ends = (x1 < width) & (y1 < height) if plus_one else (x1 <= width) & (y1 <= height)
    return (x0 >= 0) & (y0 >= 0) & ends


def decode_inside(
    deltas: ArrayT, anchors: Array, size: tuple[Any, Any], *, weights: Weights, plus_one: bool
) -> ArrayT:
    """Returns the parts of decoded boxes inside an image of `size` (height, width).

    With `plus_one`, all is as in py-faster-rcnn: nothing limits dw and dh, and 1 is not subtracted.
    """
    limit = None if plus_one else MAX_LOG_SCALE
    moved = decode(
        deltas, anchors, weights=weights, max_log_scale=limit, plus_one=plus_one, subtract_one=False
    )
    return clip(moved, size, plus_one=plus_one)


def clip(boxes: ArrayT, size: tuple[Any, Any], *, plus_one: bool = False) -> ArrayT:
    """Returns the part of each box inside an image of `size` (height, width)."""
    xp, (height, width) = _library(boxes), size
    limits = [xp.asarray(limit, boxes.dtype) for limit in (width, height, width, height)]
    limits = [limit - 1 for limit in limits] if plus_one else limits
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


def _library(*arrays: Any) -> Any:
    """Returns jax.numpy if one of the arrays is JAX's, else numpy."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def _row(xp: Any, weights: Weights, like: Any) -> Any:
    """Returns the weights with the rank of `like`."""
    return xp.asarray(weights, like.dtype).reshape((1,) * (like.ndim - 1) + (4,))
