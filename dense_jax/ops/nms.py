"""Greedy non-maximum suppression with static shapes: boxes in order of their scores to a mask.

Two forms give the same mask. A loop over the boxes, each with its row of overlaps, was fastest on
CPUs (`benchmarks/ops.py`), for boxes in clusters and in a chain in which each box overlaps only the
next one. It has as many dependent steps as there are boxes, and an accelerator waits in each one.
There, tiles of boxes are suppressed one after another. Inside a tile the mask is iterated until it
no longer changes, which takes as many steps as the longest chain in the tile.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

_TILE = 256  # Boxes.


class _Boxes(NamedTuple):
    """Columns of the boxes, all of the same shape."""

    x0: jax.Array
    y0: jax.Array
    x1: jax.Array
    y1: jax.Array
    area: jax.Array
    groups: jax.Array | None


def nms(
    boxes: jax.Array,
    valid: jax.Array,
    threshold: float,
    *,
    groups: jax.Array | None = None,
    plus_one: bool = False,
) -> jax.Array:
    """Returns which boxes are kept, bool [N].

    A box is kept if it is valid and no kept box before it has an IoU with it above the threshold.
    The comparison is intersection > threshold * union, so that empty boxes suppress nothing. At
    equality both boxes stay, as in torchvision and detectron2; the Cython kernels of py-faster-rcnn
    and Detectron drop the second one. Use `jax.vmap` for a batch.

    Args:
      boxes: float [N, 4], in order of falling score.
      valid: bool [N]; False marks padding, which is not kept and suppresses nothing.
      threshold: IoU in [0, 1].
      groups: integers [N], such as classes or pyramid levels. Only boxes of the same group suppress
        each other. None: all boxes are of one group.
      plus_one: whether x1 and y1 are inside the box.
    """
    chex.assert_shape(boxes, (None, 4))
    chex.assert_shape([valid] if groups is None else [valid, groups], boxes.shape[:1])
    if not len(boxes):
        return valid
    columns = _columns(boxes, groups, plus_one)
    cpu, default = (functools.partial(form, threshold=threshold) for form in (_loop, _tiles))
    return lax.platform_dependent(columns, valid, cpu=cpu, default=default)


def _columns(boxes: jax.Array, groups: jax.Array | None, plus_one: bool) -> _Boxes:
    x0, y0, x1, y1 = boxes.T
    if plus_one:
        x1, y1 = x1 + 1, y1 + 1
    return _Boxes(x0, y0, x1, y1, (x1 - x0) * (y1 - y0), groups)


def _overlap(some: _Boxes, others: _Boxes, threshold: float) -> jax.Array:
    width = jnp.minimum(some.x1, others.x1) - jnp.maximum(some.x0, others.x0)
    height = jnp.minimum(some.y1, others.y1) - jnp.maximum(some.y0, others.y0)
    shared = jnp.maximum(width, 0) * jnp.maximum(height, 0)
    is_over = shared > threshold * (some.area + others.area - shared)
    if some.groups is None or others.groups is None:
        return is_over
    return is_over & (some.groups == others.groups)


def _loop(boxes: _Boxes, valid: jax.Array, threshold: float) -> jax.Array:
    order = jnp.arange(len(valid))

    def suppress(i, keep):
        box = jax.tree.map(lambda column: lax.dynamic_slice(column, (i,), (1,)), boxes)
        hits = _overlap(box, boxes, threshold) & (order > i)
        return keep & ~(hits & keep[i])

    end = jnp.max(jnp.where(valid, order + 1, 0))  # padding, mostly at the end, costs nothing
    return lax.fori_loop(0, end, suppress, valid)


def _tiles(boxes: _Boxes, valid: jax.Array, threshold: float, tile: int = _TILE) -> jax.Array:
    num, tile = len(valid), min(tile, len(valid))
    boxes, keep = jax.tree.map(lambda column: jnp.pad(column, (0, -num % tile)), (boxes, valid))
    order = jnp.arange(len(keep))
    is_later = order[:tile, None] < order[None, :tile]

    def suppress(number, keep):
        start = number * tile

        def of_tile(column):
            return lax.dynamic_slice(column, (start,), (tile,))

        some = jax.tree.map(lambda column: of_tile(column)[:, None], boxes)
        hits = _overlap(some, jax.tree.map(lambda column: column[None], boxes), threshold)
        inside = lax.dynamic_slice(hits, (0, start), (tile, tile)) & is_later
        alive = of_tile(keep)

        def again(state):
            old, _ = state
            new = alive & ~(old[:, None] & inside).any(axis=0)
            return new, (new != old).any()

        kept, _ = lax.while_loop(lambda state: state[1], again, (alive, jnp.array(True)))
        keep = keep & ~((kept[:, None] & hits).any(axis=0) & (order >= start + tile))
        return lax.dynamic_update_slice(keep, kept, (start,))

    return lax.fori_loop(0, len(keep) // tile, suppress, keep)[:num]
