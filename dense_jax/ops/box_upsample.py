"""Crops of feature maps under boxes, resized to one size: BoxUpsample of the Hypercolumns release.

Reference: Hariharan, Arbelaez, Girshick, Malik, "Hypercolumns for object segmentation and
fine-grained localization", CVPR 2015, arXiv:1411.5752. The sampling follows the authors' later code
(bharath272/sds, caffe-sds: box_upsample).
"""

import jax
import jax.numpy as jnp

Pair = tuple[int, int]


def interpolation(at: jax.Array, length: int) -> jax.Array:
    """Returns matrices [..., n, length] that interpolate `length` values at positions [..., n].

    The interpolation is linear between values and constant beyond the first and the last. The
    release clamps the indices and keeps the weights, which gives the same result because the
    weights sum to 1.
    """
    at = jnp.clip(at.astype(jnp.float32), 0, length - 1)[..., None]
    index = jnp.arange(length, dtype=jnp.float32).reshape((1,) * (at.ndim - 1) + (length,))
    return jnp.maximum(1 - jnp.abs(at - index), 0)


def box_interpolation(low: jax.Array, high: jax.Array, size: int, length: int) -> jax.Array:
    """Returns matrices [..., size, length] that interpolate values over the span [low, high].

    Sample y lies at position ((y + 1/2) (high - low) / size + low) length - 1/2.

    Args:
      low: [...] start of the span; 0 is the outer edge of the first value.
      high: [...] end of the span; 1 is the outer edge of the last value.
      size: number of samples.
      length: number of values.
    """
    steps = jnp.arange(0.5, size, dtype=jnp.float32).reshape((1,) * low.ndim + (size,)) / size
    at = (steps * (high - low)[..., None] + low[..., None]) * length - 0.5
    return interpolation(at, length)


def box_upsample(maps: jax.Array, boxes: jax.Array, size: Pair) -> jax.Array:
    """Resizes the part of a map under each box: [B, H, W, C] and [B, N, 4] to [B, N, *size, C].

    Args:
      maps: [B, H, W, C].
      boxes: [B, N, 4], (x0, y0, x1, y1) as shares of the map's width and height. A box may extend
        beyond the map, whose border values are then repeated.
      size: height and width of each crop.

    Raises:
      ValueError: the shapes do not match.
    """
    if maps.ndim != 4 or boxes.shape != (maps.shape[0], *boxes.shape[1:2], 4):
        raise ValueError(
            f"Expected maps [B, H, W, C] and boxes [B, N, 4], received {maps.shape}, {boxes.shape}."
        )
    x0, y0, x1, y1 = jnp.moveaxis(boxes, -1, 0)
    rows = box_interpolation(y0, y1, size[0], maps.shape[1])
    columns = box_interpolation(x0, x1, size[1], maps.shape[2])
    # Products with small matrices, because the gradient of indexing would be a scatter.
    crops = jnp.einsum("bnyh,bhwc->bnywc", rows, maps.astype(jnp.float32), precision="highest")
    crops = jnp.einsum("bnxw,bnywc->bnyxc", columns, crops, precision="highest")
    return crops.astype(maps.dtype)
