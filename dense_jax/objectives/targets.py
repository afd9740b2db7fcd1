"""Training targets of detectors: which boxes stand for which object, and which of them train.

All arrays have fixed sizes. Objects that are padding are marked by ``valid``. Random numbers are
arguments, so every function here has one exact result.

Reference: Ren, He, Girshick, Sun, "Faster R-CNN", NIPS 2015, arXiv:1506.01497, Section 3.1.2;
Girshick, "Fast R-CNN", ICCV 2015, arXiv:1504.08083, Section 2.3.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

FOREGROUND, BACKGROUND, IGNORED = 1, 0, -1


class Matches(NamedTuple):
    """The object of each of N boxes.

    Attributes:
      index: int32 [N], the object with the largest IoU, the first of equal ones.
      label: int32 [N], `FOREGROUND`, `BACKGROUND` or `IGNORED`.
      iou: float32 [N], the largest IoU; -1 without objects.
    """

    index: jax.Array
    label: jax.Array
    iou: jax.Array


def match(
    iou: jax.Array,
    valid: jax.Array,
    *,
    foreground: float,
    background: float | tuple[float, float],
    force: bool = False,
    candidates: jax.Array | None = None,
) -> Matches:
    """Matches boxes with objects.

    Args:
      iou: [N, G], intersection over union of each box with each object.
      valid: bool [G], False for padding.
      foreground: boxes of at least this IoU are foreground.
      background: boxes below this IoU are background; or of an IoU in [low, high). Others are
        ignored.
      force: for each object, the boxes of the largest IoU with it, ties included, are foreground
        too. They keep their own best object as target. An object that meets no box forces none:
        with an IoU of 0 it would force all boxes that it does not meet.
      candidates: bool [N], boxes that may train; others are ignored and force nothing.

    Returns:
      The matches. Without objects every candidate is background.
    """
    chex.assert_rank([iou, valid], [2, 1])
    chex.assert_shape(valid, (iou.shape[1],))
    low, high = background if isinstance(background, tuple) else (0.0, background)
    iou = jnp.where(valid[None, :], iou, -1.0)
    if candidates is not None:
        iou = jnp.where(candidates[:, None], iou, -1.0)
    best = jnp.max(iou, axis=1)
    index = jnp.argmax(iou, axis=1).astype(jnp.int32)
    none = ~jnp.any(valid)
    is_background = ((best >= low) & (best < high)) | none
    label = jnp.where(is_background, BACKGROUND, IGNORED)
    is_foreground = best >= foreground
    if force:
        largest = jnp.max(iou, axis=0, keepdims=True)
        is_foreground |= jnp.any((iou == largest) & (largest > 0), axis=1)
    label = jnp.where(is_foreground, FOREGROUND, label)
    if candidates is not None:
        label = jnp.where(candidates, label, IGNORED)
    return Matches(index, label.astype(jnp.int32), best)


class Sample(NamedTuple):
    """A sample of boxes: foreground first, then background, then empty slots.

    Attributes:
      index: int32 [S], the boxes; of empty slots any.
      foreground: bool [S].
      filled: bool [S].
    """

    index: jax.Array
    foreground: jax.Array
    filled: jax.Array


def sample(labels: jax.Array, uniform: jax.Array, size: int, max_foreground: int) -> Sample:
    """Draws a sample of a fixed size.

    The foreground boxes of the smallest random numbers are taken, at most ``max_foreground``, and
    the background boxes of the smallest random numbers fill the sample as far as they last.

    Args:
      labels: int [N]; see `Matches`.
      uniform: float [N], independent random numbers in [0, 1).
      size: S.
      max_foreground: the largest number of foreground boxes.
    """
    chex.assert_rank([labels, uniform], 1)
    chex.assert_equal_shape([labels, uniform])
    count = labels.shape[0]
    taken, is_taken = _smallest(labels == FOREGROUND, uniform, min(max_foreground, size, count))
    rest, is_rest = _smallest(labels == BACKGROUND, uniform, min(size, count))
    # Where a background box goes: behind the foreground boxes and those before it.
    num_foreground = jnp.sum(is_taken)
    slots = jnp.arange(size)
    behind = jnp.clip(slots - num_foreground, 0, rest.shape[0] - 1)
    foreground = slots < num_foreground
    index = jnp.where(foreground, taken[jnp.minimum(slots, taken.shape[0] - 1)], rest[behind])
    filled = foreground | (slots - num_foreground < jnp.sum(is_rest))
    return Sample(index.astype(jnp.int32), foreground, filled)


def _smallest(wanted: jax.Array, uniform: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the indices of the smallest numbers where wanted, in rising order, and which are."""
    keys, index = lax.top_k(jnp.where(wanted, -uniform, -jnp.inf), count)
    return index, keys > -jnp.inf
