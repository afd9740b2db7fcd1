"""Resizing with the corner convention in the argument's name."""

import fractions
from typing import Any, TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

Pair = tuple[int, int]
Array = np.ndarray | jax.Array
ArrayT = TypeVar("ArrayT", bound=Array)

_WEIGHT_BITS = 22  # of Pillow's weights, so that 255 of them fit in 32 bits with a sign


def _weights(size: int, out: int, align_corners: bool) -> np.ndarray | jax.Array:
    """Returns the matrix [out, size] of linear interpolation along one axis."""
    # An exported program computes with symbolic sizes itself. All numbers are whole before the last
    # division, so that float32 is precise enough.
    is_open = jax.export.is_symbolic_dim(size) or jax.export.is_symbolic_dim(out)
    xp: Any = jnp if is_open else np
    pixels, at = xp.arange(size)[None], xp.arange(out)[:, None]
    if align_corners:
        at, unit = at * (size - 1), max(out - 1, 1)
    else:
        at, unit = xp.clip((2 * at + 1) * size - out, 0, 2 * out * (size - 1)), 2 * out
    # Hat function: 1 - distance for the two nearest pixels, 0 for all others.
    return xp.maximum(1 - abs(at - unit * pixels) / unit, 0)


def rescaled(length: int, scale: float) -> int:
    """Returns length * scale, rounded to the nearest whole number, with halves rounded up.

    It uses whole numbers only, because symbolic lengths of exported programs support no others.
    """
    ratio = fractions.Fraction(scale).limit_denominator(1000)
    return (2 * length * ratio.numerator + ratio.denominator) // (2 * ratio.denominator)


def resize_bilinear(x: jax.Array, size: Pair, *, align_corners: bool) -> jax.Array:
    """Resizes [B, H, W, C] to [B, *size, C] by linear interpolation along each axis.

    Output pixel j lies at j (n - 1) / (m - 1) of the input with `align_corners` (DeepLab) and at
    (j + 1/2) n / m - 1/2 without (FCN, torchvision). There is no smoothing when an image shrinks.
    This equals torch's `interpolate(mode="bilinear", antialias=False)`.

    Raises:
      ValueError: x is not [B, H, W, C].
    """
    _check(x)
    # A product with a small matrix: its gradient is one too, but that of indexing is a scatter.
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    rows, columns = (
        jnp.asarray(_weights(n, m, align_corners), dtype)
        for n, m in zip(x.shape[1:3], size, strict=True)
    )
    y = jnp.einsum("uh,bhwc->buwc", rows, x.astype(dtype), precision="highest")
    return jnp.einsum("vw,buwc->buvc", columns, y, precision="highest").astype(x.dtype)


def resize_nearest(x: jax.Array, size: Pair) -> jax.Array:
    """Resizes [B, H, W, C] of any dtype to [B, *size, C]; output pixel j copies floor(j n / m).

    This is torch's mode "nearest". Enlargement by a whole factor repeats pixels.

    Raises:
      ValueError: x is not [B, H, W, C].
    """
    _check(x)
    for axis, out in enumerate(size, 1):
        length = x.shape[axis]
        if out % length == 0:  # The gradient of repeat is a sum, that of take a scatter.
            x = jnp.repeat(x, out // length, axis)
        else:
            x = jnp.take(x, np.arange(out) * length // out, axis)
    return x


def resize_uint8(
    x: ArrayT, size: Pair, *, antialias: bool = True, height_first: bool = False
) -> ArrayT:
    """Resizes uint8 [B, H, W, C], of NumPy or JAX, to [B, *size, C] by linear interpolation.

    With ``antialias``, it is Pillow's `Image.resize` with BILINEAR: where an image shrinks, the hat
    function is as wide as two output pixels, so that each input pixel counts. Without, the hat is
    always as wide as two input pixels, as in torch's `interpolate`, but for rounding.

    Each axis is rounded to uint8, with weights of 22 bits, as in Pillow: a program that resizes
    images itself sees the same pixels as one that gets them from files. Which axis is first changes
    some pixels by 1; Pillow's choice depends on the sizes and on its version.

    Reference: python-pillow/Pillow: src/libImaging/Resample.c.

    Raises:
      ValueError: x is not uint8 [B, H, W, C].
    """
    _check(x)
    if x.dtype != np.uint8:
        raise ValueError(f"Expected uint8, received {x.dtype}.")
    xp: Any = jnp if isinstance(x, jax.Array) else np
    pixels: Any = x
    for axis in (1, 2) if height_first else (2, 1):
        index, weights = _taps(pixels.shape[axis], size[axis - 1], antialias)
        weights = weights.reshape(*[1] * axis, *weights.shape, *[1] * (3 - axis))
        if antialias:
            taps = xp.take(pixels, index, axis=axis).astype(np.int32)
            total = xp.sum(taps * weights, axis=axis + 1, dtype=np.int32)
        else:  # one or two of them: no need to write them side by side
            each = (xp.take(pixels, own, axis=axis).astype(np.int32) for own in index.T)
            total = sum(own * xp.take(weights, i, axis=axis + 1) for i, own in enumerate(each))
        pixels = xp.clip((total + (1 << _WEIGHT_BITS - 1)) >> _WEIGHT_BITS, 0, 255)
        pixels = pixels.astype(np.uint8)
    return pixels


def _taps(size: int, out: int, antialias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns which pixels make each output pixel, and their weights, both int32 [out, taps]."""
    scale = size / out
    reach = max(scale, 1.0) if antialias else 1.0
    centres = (np.arange(out) + 0.5)[:, None] * scale
    first = np.maximum((centres - reach + 0.5).astype(int), 0)
    last = np.minimum((centres + reach + 0.5).astype(int), size)
    pixels = first + np.arange(np.max(last - first))
    weights = np.maximum(1 - abs(pixels - centres + 0.5) / reach, 0) * (pixels < last)
    weights /= weights.sum(axis=1, keepdims=True)
    whole = np.floor(weights * (1 << _WEIGHT_BITS) + 0.5)
    return np.minimum(pixels, size - 1).astype(np.int32), whole.astype(np.int32)


def _check(x: Array) -> None:
    if x.ndim != 4:
        raise ValueError(f"Expected [B, H, W, C], received {x.shape}.")
