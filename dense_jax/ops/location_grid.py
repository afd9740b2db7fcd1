"""A K x K grid of classifiers, one for each cell of an image or box, and their mixture.

Classifier (k, l) belongs to the centre of cell (k, l). The probability of a pixel is the bilinear
mean of the four classifiers around it: p = sum_kl b_kl p_kl with b >= 0 and sum_kl b_kl = 1. Since
only four weights of a pixel are nonzero, only these four classifiers are evaluated there.

Reference: Hariharan, Arbelaez, Girshick, Malik, "Hypercolumns for object segmentation and
fine-grained localization", CVPR 2015, arXiv:1411.5752, Section 4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Neighbours(NamedTuple):
    """The J = min(2, K) classifiers next to each pixel along one axis.

    Attributes:
      picks: [..., n, J, K], one at the grid index of neighbour j, zero elsewhere.
      weights: nonnegative [..., n, J] with sum 1 over J.
    """

    picks: jax.Array
    weights: jax.Array


def neighbours(
    size: int, cells: int, *, extent: jax.Array | None = None, hard: bool = False
) -> Neighbours:
    """Returns the neighbours of `size` pixels on a grid of `cells`.

    Pixel y lies at Y = (y + 1/2) K / size - 1/2 on the grid. Its neighbours are floor(Y) and
    floor(Y) + 1, with weights floor(Y) + 1 - Y and Y - floor(Y). Indices beyond the grid are then
    clamped to it.

    Args:
      size: number of pixels.
      cells: number of cells, K.
      extent: [...] number of pixels that the grid spans; the remainder is padding. None: all.
      hard: whether each pixel uses only the classifier of its own cell.
    """
    span = jnp.asarray(size if extent is None else extent, jnp.float32)[..., None]
    pixels = jnp.arange(1, 2 * size, 2, dtype=jnp.float32).reshape((1,) * (span.ndim - 1) + (size,))
    at = pixels * cells / (2 * span) - 0.5
    lower = jnp.floor(at)
    if cells == 1:
        return Neighbours(jnp.ones((*at.shape, 1, 1)), jnp.ones((*at.shape, 1)))
    index = jnp.clip(jnp.stack([lower, lower + 1], axis=-1), 0, cells - 1)
    weights = jnp.stack([lower + 1 - at, at - lower], axis=-1)
    if hard:
        is_upper = weights[..., 1] >= 0.5
        weights = jnp.stack([~is_upper, is_upper], axis=-1).astype(jnp.float32)
    return Neighbours(jax.nn.one_hot(index.astype(jnp.int32), cells), weights)


def evaluate(
    scores: jax.Array, rows: jax.Array, columns: jax.Array, high: Neighbours, wide: Neighbours
) -> jax.Array:
    """Resizes the scores of all classifiers and returns those of each pixel's neighbours.

    Args:
      scores: [..., h, w, K, K, C], C scores of each classifier on a coarse map.
      rows: [..., H, h], matrices of vertical interpolation.
      columns: [..., W, w], matrices of horizontal interpolation.
      high: vertical neighbours of the H pixels.
      wide: horizontal neighbours of the W pixels.

    Returns:
      [..., H, W, J, J, C].
    """
    rows = jnp.einsum("...yh,...yjk->...yjhk", rows, high.picks)
    columns = jnp.einsum("...xw,...xil->...xiwl", columns, wide.picks)
    # Vertical first: this drops rows of other classifiers while the map is still narrow.
    part = jnp.einsum("...yjhk,...hwklc->...yjwlc", rows, scores, precision="highest")
    return jnp.einsum("...xiwl,...yjwlc->...yxjic", columns, part, precision="highest")


def _weights(scores: jax.Array, high: Neighbours, wide: Neighbours) -> jax.Array:
    """Returns the weights of the neighbours with the axes of scores [..., H, W, J, J, C]."""
    weights = jnp.einsum("...yj,...xi->...yxji", high.weights, wide.weights)[..., None]
    return weights.reshape((1,) * (scores.ndim - weights.ndim) + weights.shape)


def mix_scores(scores: jax.Array, high: Neighbours, wide: Neighbours) -> jax.Array:
    """Averages scores [..., H, W, J, J, C] over the neighbours: [..., H, W, C]."""
    return jnp.sum(scores * _weights(scores, high, wide), axis=(-3, -2))


def mix_probabilities(
    log_probabilities: jax.Array, high: Neighbours, wide: Neighbours
) -> jax.Array:
    """Averages probabilities over the neighbours: log p = log sum_kl b_kl p_kl.

    Args:
      log_probabilities: [..., H, W, J, J, C].
      high: vertical neighbours.
      wide: horizontal neighbours.

    Returns:
      [..., H, W, C] logarithms, computed in log space so that no probability underflows to 0.
    """
    weights = _weights(log_probabilities, high, wide)
    return jax.nn.logsumexp(log_probabilities, axis=(-3, -2), b=weights)
