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
        _points, bins=bins, samples=samples, max_samples=max_samples, widen=not aligned
    )
    rows, row_weights, has_row = along(corners[:, 1], corners[:, 3], table.height)
    columns, column_weights, has_column = along(corners[:, 0], corners[:, 2], table.width)
    # [boxes, bins, bins, points, points, 2, 2], with y before x each time.
    y, x = np.s_[:, :, None, :, None, :, None], np.s_[:, None, :, None, :, None, :]
    first, width = (a.reshape(-1, *[1] * 6) for a in (table.first, table.width))
    num = rows.shape[2] ** 2
    index = (first + rows[y] * width + columns[x]).reshape(-1, num, 4)
    weights = (row_weights[y] * column_weights[x]).reshape(-1, num, 4)
    has_point = (has_row[y[:-2]] & has_column[x[:-2]]).reshape(-1, num, 1)
    # Without the barrier, XLA computes all this again for each channel.
    index, weights, has_point = lax.optimization_barrier((index, weights, has_point))
    if reduce == "mean":
        index, weights = index.reshape(-1, num * 4), weights.reshape(-1, num * 4)
        pooled = _weighted_sum(table.cells, index, weights)
        pooled = pooled / jnp.maximum(has_point.sum(axis=1), 1).astype(pooled.dtype)
    else:
        pooled = jnp.full((len(index), table.cells.shape[1]), -jnp.inf, table.cells.dtype)
        for point in range(num):
            value = _weighted_sum(table.cells, index[:, point], weights[:, point])
            pooled = jnp.where(has_point[:, point] & (value > pooled), value, pooled)
        pooled = jnp.where(has_point.any(axis=1), pooled, 0)
    return pooled.reshape(*boxes.shape[:2], bins, bins, -1)


def _points(
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


@jax.custom_vjp
def _weighted_sum(cells: jax.Array, index: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the sum over k of weights[n, k] cells[index[n, k]], [N, C].

    The gradient with respect to the weights is left out.
    """
    # XLA fuses these reads and sums into one loop, so that the cells are not copied first.
    y = jnp.zeros((), jnp.float32)
    for k in range(index.shape[1]):
        y = y + weights[:, k, None] * _read(cells, index[:, k]).astype(jnp.float32)
    return y.astype(cells.dtype)


def _read(cells: jax.Array, index: jax.Array) -> jax.Array:
    return cells.at[index].get(mode="promise_in_bounds")


def _weighted_sum_fwd(cells, index, weights):
    return _weighted_sum(cells, index, weights), (cells, index, weights)


_GROUP = 2**17  # Products that are added to the cells at a time; larger groups leave the cache.


def _weighted_sum_bwd(residuals, grad):
    cells, index, weights = residuals
    zeros = jnp.zeros(cells.shape, jnp.float32)

    def add(total, index, weights, grad):
        products = weights[..., None] * grad[:, None]
        return total.at[index].add(products, mode="promise_in_bounds")

    def in_groups(index, weights, grad):
        num, taps = index.shape
        group = min(num, max(1, _GROUP // (taps * cells.shape[1])))

        def grouped(x):
            return jnp.pad(x, ((0, -num % group), (0, 0))).reshape(-1, group, x.shape[1])

        def step(total, group):
            return add(total, *group), None

        return lax.scan(step, zeros, (grouped(index), grouped(weights), grouped(grad)))[0]

    at_once = functools.partial(add, zeros)
    args = index, weights, grad.astype(jnp.float32)
    total = lax.platform_dependent(*args, cpu=in_groups, default=at_once)
    return total.astype(cells.dtype), None, None


_weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd)


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
        corner = bins.first[:, None, None] + bins.low[:, None, :, 0]
        corner = corner + bins.low[:, :, None, 1] * bins.width[:, None, None]

        def step(number, state):
            best, place = state
            row, column = number // most_columns, number % most_columns
            is_inside = (row < rows) & (column < columns)
            index = jnp.where(is_inside, corner + row * bins.width[:, None, None] + column, 0)
            value = _read(cells, index)
            is_better = is_inside[..., None] & (value > best)
            if with_places:
                place = jnp.where(is_better, index[..., None], place)
            return jnp.where(is_better, value, best), place

        shape = (*corner.shape, cells.shape[1])
        best = jnp.full(shape, -jnp.inf, cells.dtype)
        place = jnp.full(shape, -1, jnp.int32) if with_places else None
        best, place = lax.fori_loop(0, rows.max() * most_columns, step, (best, place))
        return jnp.where(((rows > 0) & (columns > 0))[..., None], best, 0), place

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
