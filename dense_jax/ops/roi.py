"""Features of regions: RoIPool, RoIWarp and RoIAlign.

Each operator divides a box into bins x bins parts and takes one feature vector of each. Boxes are
those of `dense_jax.ops.boxes`, in pixels of the image, [B, R, 4]. All boxes of all images are read
at once. Boxes are constants: gradients reach features only. Rows of padding may hold any values.

References: Girshick, ICCV 2015, arXiv:1504.08083 (RoIPool); Dai et al., CVPR 2016, arXiv:1512.04412
(RoIWarp); He et al., ICCV 2017, arXiv:1703.06870 (RoIAlign); Lin et al., CVPR 2017,
arXiv:1612.03144 (levels).
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dense_jax.ops import boxes as box_ops

RoiOp = Literal["pool", "warp", "align"]
Reduce = Literal["mean", "max"]


class _Maps(NamedTuple):
    """Feature maps as one table of cells, and for each of N boxes where its map is in the table."""

    cells: jax.Array  # [M, C], the cells of all maps.
    first: jax.Array  # int32 [N], the first cell of the box's map.
    height: jax.Array  # int32 [N], cells.
    width: jax.Array  # int32 [N], cells.
    scale: jax.Array  # float32 [N], cells / pixels.

    @classmethod
    def of(cls, maps: Sequence[jax.Array], strides: Sequence[float], boxes: jax.Array) -> "_Maps":
        batch, _, _, channels = maps[0].shape
        chex.assert_shape(maps, (batch, None, None, channels))
        chex.assert_shape(boxes, (batch, None, 4))
        which = jnp.zeros(boxes.shape[:2], jnp.int32)
        if len(maps) > 1:
            finest = round(math.log2(strides[0]))
            which = assign_levels(boxes, finest, finest + len(maps) - 1) - finest
        heights, widths = (np.array([x.shape[axis] for x in maps], np.int32) for axis in (1, 2))
        starts = np.cumsum([0, *(batch * heights * widths)[:-1]], dtype=np.int32)
        scales = (1 / np.array(strides)).astype(np.float32)
        start, height, width, scale = (
            jnp.asarray(of_level)[which] for of_level in (starts, heights, widths, scales)
        )
        first = start + jnp.arange(batch, dtype=jnp.int32)[:, None] * height * width
        cells = jnp.concatenate([x.reshape(-1, channels) for x in maps])
        return cls(cells, *(x.reshape(-1) for x in (first, height, width, scale)))


def assign_levels(boxes: jax.Array, finest: int = 2, coarsest: int = 5) -> jax.Array:
    """Returns the pyramid level on which each box is read, int32 [...]; level k has stride 2^k.

    A box of 224 x 224 pixels is on level 4, a box of half that side on level 3, an empty box on the
    finest level. The level is floor(4 + log2(sqrt(area) / 224) + 1e-6). The last term is
    torchvision's; detectron2's is another one, which matters for areas within 1e-6 of a border.

    Reference: Lin et al., CVPR 2017, arXiv:1612.03144, Eq. 1.
    """
    side = jnp.sqrt(jnp.maximum(box_ops.area(boxes), 1e-12))
    level = jnp.floor(4 + jnp.log2(side / 224) + 1e-6)
    return jnp.clip(level, finest, coarsest).astype(jnp.int32)


def roi_align(
    maps: Sequence[jax.Array],
    boxes: jax.Array,
    *,
    bins: int,
    strides: Sequence[float] = (4, 8, 16, 32),
    samples: int | None = 2,
    max_samples: int = 4,
    aligned: bool = False,
    reduce: Reduce = "mean",
) -> jax.Array:
    """Samples features in each bin by bilinear interpolation, [B, R, bins, bins, C].

    A bin has samples x samples points, at the centres of its equal parts. A point up to one cell
    outside the map takes the nearest features, and a point further away zeros.

    Args:
      maps: feature maps [B, H, W, C], finest first. If there are several, each box reads the one of
        its level (`assign_levels`).
      boxes: float [B, R, 4], pixels of the image.
      bins: number of bins along each side.
      strides: pixels / cells of each map. Those of several maps are consecutive powers of 2.
      samples: number of points along each side of a bin. None: the side of the bin in cells,
        rounded up, but at most `max_samples`.
      max_samples: limit that keeps shapes static.
      aligned: True places features in the centres of cells, at coordinates x / stride - 0.5
        (detectron2). False uses x / stride, and widens boxes to at least one cell (Detectron,
        torchvision).
      reduce: "mean" or "max" of the points of a bin.

    Raises:
      ValueError: the numbers of maps and strides differ.
    """
    if len(maps) != len(strides):
        raise ValueError(f"There are {len(maps)} maps, but {len(strides)} strides.")
    boxes = lax.stop_gradient(boxes)
    table = _Maps.of(maps, strides, boxes)
    corners = boxes.reshape(-1, 4) * table.scale[:, None] - (0.5 if aligned else 0.0)
    along = functools.partial(
        axis_points, bins=bins, samples=samples, max_samples=max_samples, widen=not aligned
    )
    rows, row_weights, has_row = along(corners[:, 1], corners[:, 3], table.height)
    columns, column_weights, has_column = along(corners[:, 0], corners[:, 2], table.width)
    # [boxes, bins, bins, points, points, 2, 2], with y before x each time.
    y, x = np.s_[:, :, None, :, None, :, None], np.s_[:, None, :, None, :, None, :]
    first, width = (a.reshape(-1, *[1] * 6) for a in (table.first, table.width))
    num = rows.shape[2] ** 2
    index = (first + rows[y] * width + columns[x]).reshape(-1, bins, bins, num, 4)
    weights = (row_weights[y] * column_weights[x]).reshape(-1, bins, bins, num, 4)
    exists = (has_row[y[:-2]] & has_column[x[:-2]]).reshape(-1, bins, bins, num)
    pooled = _pool_points(reduce, table.cells, _Points(index, weights, exists))
    return pooled.reshape(*boxes.shape[:2], bins, bins, -1)


class _Points(NamedTuple):
    """Points of bins; each lies between four cells."""

    index: jax.Array  # int32 [..., points, 4], of cells in a table.
    weights: jax.Array  # float32 [..., points, 4].
    exists: jax.Array  # bool [..., points]; the others are left out.


def axis_points(
    start: jax.Array,
    end: jax.Array,
    size: jax.Array,
    *,
    bins: int,
    samples: int | None,
    max_samples: int,
    widen: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Places the points of bins along one axis, of which a map has `size` cells.

    Returns the two cells that each point reads, int32 [N, bins, points, 2], their weights, float32,
    and whether the point exists, bool [N, bins, points].
    """
    length = jnp.maximum(end - start, 1) if widen else end - start
    start, step, size = (a[:, None, None] for a in (start, length / bins, size))
    num = max_samples if samples is None else samples
    count = jnp.clip(jnp.ceil(step), 0, num) if samples is None else jnp.full_like(step, num)
    bin_ = jnp.arange(bins, dtype=jnp.float32)[None, :, None]
    point = jnp.arange(num, dtype=jnp.float32)[None, None]
    place = start + bin_ * step + (point + 0.5) * step / jnp.maximum(count, 1)
    is_near = (place >= -1) & (place <= size.astype(jnp.float32))
    place = jnp.maximum(jnp.where(is_near, place, 0), 0)
    low = jnp.minimum(jnp.floor(place).astype(jnp.int32), size - 1)
    share = jnp.where(low < size - 1, place - low.astype(jnp.float32), 0)
    exists = jnp.broadcast_to(point < count, place.shape)
    weights = jnp.stack([1 - share, share], axis=-1)
    weights = jnp.where((is_near & exists)[..., None], weights, 0)
    return jnp.stack([low, jnp.minimum(low + 1, size - 1)], axis=-1), weights, exists


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool_points(reduce: Reduce, cells: jax.Array, points: _Points) -> jax.Array:
    """Returns the mean or maximum of the points of each bin, [boxes, bins, bins, C]."""
    return _pool_points_fwd(reduce, cells, points)[0]


def _pool_points_fwd(reduce, cells, points):
    of_boxes = functools.partial(_combine, reduce, cells)

    # In a loop over boxes XLA keeps the sums together. Outside one, it may move them into each
    # operation that uses them, and then makes copies of all cells that are read.
    def by_box(points):
        return lax.map(of_boxes, points)

    pooled, which = lax.platform_dependent(points, cpu=by_box, default=of_boxes)
    return pooled, (cells, points, which)


def _combine(
    reduce: Reduce, cells: jax.Array, points: _Points
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the mean, or the maximum and the number of the first point that has it, [..., C]."""
    total, best, which = jnp.zeros((), jnp.float32), jnp.full((), -jnp.inf), jnp.int8(-1)
    for i in range(points.index.shape[-2]):
        # Written out, so that XLA fuses reads and sums into one loop.
        value = jnp.zeros((), jnp.float32)
        for k in range(4):
            tap = _read(cells, points.index[..., i, k]).astype(jnp.float32)
            value = value + points.weights[..., i, k, None] * tap
        total = total + value  # a point that does not exist has no weights
        is_best = points.exists[..., i, None] & (value > best)
        best, which = jnp.where(is_best, value, best), jnp.where(is_best, jnp.int8(i), which)
    if reduce == "mean":
        return (total / _num(points)[..., None]).astype(cells.dtype), None
    best = jnp.where(points.exists.any(-1, keepdims=True), best, 0)
    return best.astype(cells.dtype), which


def _num(points: _Points) -> jax.Array:
    """Returns the number of points of each bin, at least 1, float32 [...]."""
    return jnp.maximum(points.exists.sum(-1), 1).astype(jnp.float32)


def _read(cells: jax.Array, index: jax.Array) -> jax.Array:
    return cells.at[index].get(mode="promise_in_bounds")


def _pool_points_bwd(reduce, residuals, grad):
    cells, points, which = residuals
    zeros = jnp.zeros(cells.shape, jnp.float32)
    if which is None:
        weights = points.weights / _num(points)[..., None, None]
        points = points._replace(weights=weights)

    def add(total, points, which, grad):
        grad = grad.astype(jnp.float32)[..., None, :]  # [..., points, C]
        if which is not None:
            shape = (*[1] * (grad.ndim - 2), -1, 1)
            number = jnp.arange(points.index.shape[-2], dtype=which.dtype).reshape(shape)
            grad = jnp.where(which[..., None, :] == number, grad, 0)
        parts = points.weights[..., None] * grad[..., None, :]  # [..., points, 4, C]
        return total.at[points.index].add(parts, mode="promise_in_bounds")

    def by_row(*args):  # what is added for a row of bins stays in the cache
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), args)
        return lax.scan(lambda total, row: (add(total, *row), None), zeros, rows)[0]

    at_once = functools.partial(add, zeros)
    total = lax.platform_dependent(points, which, grad, cpu=by_row, default=at_once)
    return total.astype(cells.dtype), None


_pool_points.defvjp(_pool_points_fwd, _pool_points_bwd)


def roi_warp(
    features: jax.Array,
    boxes: jax.Array,
    *,
    bins: int,
    stride: float,
    samples: int = 2,
    reduce: Reduce = "max",
) -> jax.Array:
    """Rounds boxes to cells as RoIPool does, and samples them as RoIAlign, [B, R, bins, bins, C].

    This is our reading of the "RoIWarp" to which Table 2c of Mask R-CNN compares; its code was not
    released.

    Args:
      features: [B, H, W, C].
      boxes: float [B, R, 4], pixels of the image.
      bins: number of bins along each side.
      stride: pixels / cells.
      samples: number of points along each side of a bin.
      reduce: "mean" or "max" of the points of a bin.
    """
    rounded = lax.round(boxes * (1 / stride))  # halves away from zero
    return roi_align([features], rounded, bins=bins, strides=[1], samples=samples, reduce=reduce)


def roi_pool(features: jax.Array, boxes: jax.Array, *, bins: int, stride: float) -> jax.Array:
    """Takes the maximum over the cells of each bin, [B, R, bins, bins, C].

    Corners are rounded to cells, halves away from zero, and the last cell is inside the box. Bins
    are extended to whole cells, so neighbours may share some. Cells outside the map are left out,
    and a bin without cells is 0. The gradient reaches the first of equal maxima. Bins are computed
    in integers; with 7 bins, Caffe's float32 reads a cell more of boxes 57, 114 or 121 cells wide.

    Args:
      features: [B, H, W, C].
      boxes: float [B, R, 4], pixels of the image.
      bins: number of bins along each side.
      stride: pixels / cells.

    Reference: rbgirshick/caffe-fast-rcnn: src/caffe/layers/roi_pooling_layer.cpp.
    """
    table = _Maps.of([features], [stride], boxes)
    corners = lax.round(lax.stop_gradient(boxes).reshape(-1, 4) * (1 / stride)).astype(jnp.int32)

    first, last = corners[:, :2], corners[:, 2:]
    length = jnp.maximum(last - first + 1, 1)[:, None]
    number = jnp.arange(bins, dtype=jnp.int32)[None, :, None]
    low = first[:, None] + number * length // bins  # [boxes, bins, (x, y)]
    high = first[:, None] - (-(number + 1) * length // bins)
    size = jnp.stack([table.width, table.height], axis=-1)[:, None]
    low, high = jnp.clip(low, 0, size), jnp.clip(high, 0, size)
    pooled = _max_in_bins(table.cells, _Bins(table.first, table.width, low, high))
    return pooled.reshape(*boxes.shape[:2], bins, bins, -1)


class _Bins(NamedTuple):
    """Rows and columns of N boxes that are divided into bins."""

    first: jax.Array  # int32 [N], as in _Maps.
    width: jax.Array  # int32 [N], as in _Maps.
    low: jax.Array  # int32 [N, bins, 2], the first (column, row) of each bin.
    high: jax.Array  # int32 [N, bins, 2], those after the last.


@jax.custom_vjp
def _max_in_bins(cells: jax.Array, bins: _Bins) -> jax.Array:
    """Returns the maxima in the bins of N boxes, [N, bins, bins, C]."""
    return _find_max(cells, bins, with_places=False)[0]


def _find_max(cells, bins, with_places):
    """Returns the maxima, and their places among the cells or -1 where a bin is empty."""

    def of_boxes(bins):
        size = bins.high - bins.low
        columns, rows = size[:, None, :, 0], size[:, :, None, 1]
        most_columns = columns.max()

        def step(number, state):
            best, place = state
            # A bin with fewer rows or columns reads its last ones again.
            row = bins.low[:, :, None, 1] + jnp.minimum(number // most_columns, rows - 1)
            column = bins.low[:, None, :, 0] + jnp.minimum(number % most_columns, columns - 1)
            index = bins.first[:, None, None] + row * bins.width[:, None, None] + column
            index = lax.optimization_barrier(jnp.maximum(index, 0))  # -1 only in empty bins
            value = _read(cells, index)
            if with_places:
                place = jnp.where(value > best, index[..., None], place)
            return jnp.maximum(best, value), place

        shape = (len(size), columns.shape[2], columns.shape[2], cells.shape[1])
        best = jnp.full(shape, -jnp.inf, cells.dtype)
        place = jnp.full(shape, -1, jnp.int32) if with_places else None
        best, place = lax.fori_loop(0, rows.max() * most_columns, step, (best, place))
        has_cells = ((rows > 0) & (columns > 0))[..., None]
        if with_places:
            place = jnp.where(has_cells, place, -1)
        return jnp.where(has_cells, best, 0), place

    def one_by_one(bins):  # reads no more cells of each box than its own largest bin has
        best = lax.map(lambda box: of_boxes(jax.tree.map(lambda x: x[None], box)), bins)
        return jax.tree.map(lambda x: x[:, 0], best)

    return lax.platform_dependent(bins, cpu=one_by_one, default=of_boxes)


def _max_in_bins_fwd(cells, bins):
    best, places = _find_max(cells, bins, with_places=True)
    return best, (cells, places)


def _max_in_bins_bwd(residuals, grad):
    cells, places = residuals
    places = jnp.where(places < 0, len(cells), places)  # out of bounds: dropped
    channels = jnp.arange(cells.shape[1], dtype=jnp.int32)
    channels = jnp.broadcast_to(channels, places.shape)
    total = jnp.zeros(cells.shape, jnp.float32)
    total = total.at[places, channels].add(grad.astype(jnp.float32), mode="drop")
    return total.astype(cells.dtype), None


_max_in_bins.defvjp(_max_in_bins_fwd, _max_in_bins_bwd)
