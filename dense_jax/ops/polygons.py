"""Polygons of objects, drawn in the bins of boxes as COCO's tools draw them in pixels.

The outline is walked in steps of a fifth of a bin. Where it passes the middle of a column of bins,
the column's bins from there on change sides, so that any polygon is filled by the even-odd rule.

References: cocodataset/cocoapi: common/maskApi.c (`rleFrPoly`); facebookresearch/detectron2:
detectron2/structures/masks.py (`rasterize_polygons_within_box`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_FINE = 5  # steps of a bin
_FAR = 2**13  # steps; products of two such differences are below 2^31


def crop_polygons(
    corners: jax.Array, parts: jax.Array, boxes: jax.Array, index: jax.Array, *, bins: int
) -> jax.Array:
    """Returns whether each bin of a box is in its object, float32 [R, bins, bins], 0 or 1.

    The bins are those of pycocotools, but for corners at the border of two steps, which float32
    may round to the other one. A bin is in an object if it is in any of its parts.

    Args:
      corners: float [G, P, 2], x and y of the corners of each object, in pixels. Each part is
        closed: its last corner is its first.
      parts: int32 [G, P], the part of its object to which each corner belongs, in rising order; -1
        after the last one.
      boxes: float [R, 4], in pixels; objects are at most 50 times as long.
      index: int32 [R], the object of each box.
      bins: number of bins along each side, at most 31.

    Raises:
      ValueError: there are more bins.
    """
    if bins > 31:
        raise ValueError(f"a column of {bins} bins does not fit 31 bits")
    boxes = lax.stop_gradient(boxes)
    scale = bins / jnp.maximum(boxes[:, 2:] - boxes[:, :2], 0.1)
    inside = (corners[index] - boxes[:, None, :2]) * scale[:, None]
    # Truncated as in C, which rounds numbers below zero up.
    fine = jnp.clip(_FINE * inside + 0.5, -_FAR, _FAR).astype(jnp.int32)
    part = parts[index]
    goes_on = (part == jnp.roll(part, -1, axis=1)) & (part >= 0)
    rows = _changes(fine, jnp.roll(fine, -1, axis=1), bins)
    rows = jnp.where(goes_on[..., None], rows, bins)
    # The bits of a word are the bins of a column; an edge changes those from a row on.
    ones = jnp.uint32(2**bins - 1)
    words = (ones << rows.astype(jnp.uint32)) & ones

    def add(number: jax.Array, columns: jax.Array) -> jax.Array:
        own = jnp.where((part == number)[..., None], words, jnp.uint32(0))
        return columns | lax.reduce(own, np.uint32(0), lax.bitwise_xor, (1,))

    columns = jnp.zeros((len(boxes), bins), jnp.uint32)
    columns = lax.fori_loop(0, jnp.max(part, initial=-1) + 1, add, columns)
    bits = (columns[:, None] >> jnp.arange(bins, dtype=jnp.uint32)[None, :, None]) & 1
    return bits.astype(jnp.float32)


def _changes(one: jax.Array, other: jax.Array, bins: int) -> jax.Array:
    """Returns the first row after an edge in each column, int32 [R, P, bins]; `bins`: none.

    Args:
      one: int32 [R, P, 2], first ends of edges, in steps.
      other: int32 [R, P, 2], their second ends.
      bins: number of columns and rows.
    """
    is_flat = abs(other - one)[..., :1] >= abs(other - one)[..., 1:]
    # Walked so that the coordinate rises of which each step is one more.
    first, last = one[..., :1], other[..., :1]
    is_back = jnp.where(is_flat, first > last, one[..., 1:] > other[..., 1:])
    start, end = jnp.where(is_back, other, one), jnp.where(is_back, one, other)
    dx, dy = jnp.split(end - start, 2, axis=-1)
    # An edge passes the middle of a column between a step, its third, and the next.
    step = (_FINE * jnp.arange(bins, dtype=jnp.int32) + _FINE // 2)[None, None]
    passes = (jnp.minimum(first, last) <= step) & (step < jnp.maximum(first, last))
    # The higher of the two points there: 2 |dx| times its y, from the start of the edge.
    gone = step - start[..., :1]
    flat = 2 * dy * jnp.where(dy < 0, gone + 1, gone) + abs(dx)
    steep = dy * (2 * gone + 1)
    steep = jnp.where(dx > 0, steep - 1, -steep)
    y = start[..., 1:] + jnp.where(is_flat, flat, steep) // jnp.maximum(2 * abs(dx), 1)
    row = jnp.clip((y + _FINE // 2) // _FINE, 0, bins)
    return jnp.where(passes, row, bins)
