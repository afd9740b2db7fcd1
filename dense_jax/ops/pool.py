"""Max pooling, pooling that remembers where its maxima were, and unpooling.

XLA's own gradient of max pooling (`reduce_window`) is slow on CPUs, and so are scatters. Here a
window is a handful of strided slices. The backward passes look at the input as blocks of one
stride: the pixel at row r of block n is tap a * stride + r of window n - a.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def pooled_size(size: int, window: int, stride: int, padding: int = 0, ceil: bool = False) -> int:
    """Returns the number of windows along one axis of `size` pixels.

    floor((size + 2 padding - window) / stride) + 1; with `ceil`, as in Caffe, rounded up, less one
    if the last window would then start in the padding.

    Raises:
      ValueError: no window fits, or the padding could fill a window.
    """
    if not 0 <= padding < window:
        raise ValueError(f"Padding {padding} must be from 0 to below the window {window}.")
    spare = size + 2 * padding - window
    if spare < 0:
        raise ValueError(f"A window of {window} does not fit {size} pixels padded by {padding}.")
    count = (-(-spare // stride) if ceil else spare // stride) + 1
    # torch applies this rule without padding too; they differ only for windows below the stride.
    if ceil and padding and (count - 1) * stride >= size + padding:
        count -= 1
    return count


def _taps(x: jax.Array, window: Pair, strides: Pair, padding: Pair, ceil: bool):
    """Yields (row, column, slice [B, H', W', C]) for each place in the window."""
    batch, height, width, channels = x.shape
    rows = pooled_size(height, window[0], strides[0], padding[0], ceil)
    columns = pooled_size(width, window[1], strides[1], padding[1], ceil)
    after = [
        (n - 1) * s + k - size - p
        for n, s, k, size, p in zip(
            (rows, columns), strides, window, (height, width), padding, strict=True
        )
    ]
    lowest = jnp.array(-jnp.inf, x.dtype)
    x = lax.pad(
        x, lowest, [(0, 0, 0), (padding[0], after[0], 0), (padding[1], after[1], 0), (0, 0, 0)]
    )
    for row, column in itertools.product(range(window[0]), range(window[1])):
        last = (row + (rows - 1) * strides[0] + 1, column + (columns - 1) * strides[1] + 1)
        yield (
            row,
            column,
            lax.slice(x, (0, row, column, 0), (batch, *last, channels), (1, *strides, 1)),
        )


def max_pool(
    x: jax.Array,
    window: int | Pair,
    strides: int | Pair | None = None,
    padding: int | Pair = 0,
    ceil: bool = False,
) -> jax.Array:
    """Returns the maximum of each window, [B, H', W', C] (see `pooled_size`).

    Args:
      x: [B, H, W, C], floating point.
      window: size of the window, one number or (height, width).
      strides: step between windows; None: the window, so that windows do not overlap.
      padding: rows and columns of minus infinity on each side.
      ceil: whether a last window may reach over the edge.
    """
    return max_pool_with_switches(x, window, strides, padding, ceil)[0]


def max_pool_with_switches(
    x: jax.Array,
    window: int | Pair,
    strides: int | Pair | None = None,
    padding: int | Pair = 0,
    ceil: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns `max_pool` and the place of each maximum, int32 [B, H', W', C].

    A switch is row * W + column in the unpadded input (torch's `return_indices`).
    """
    window, padding = _pair(window), _pair(padding)
    strides = window if strides is None else _pair(strides)
    best = place = None
    for row, column, values in _taps(x, window, strides, padding, ceil):
        rows = jnp.arange(values.shape[1], dtype=jnp.int32) * strides[0] + (row - padding[0])
        columns = jnp.arange(values.shape[2], dtype=jnp.int32) * strides[1] + (column - padding[1])
        here = rows.reshape(1, -1, 1, 1) * x.shape[2] + columns.reshape(1, 1, -1, 1)
        here = jnp.broadcast_to(here, values.shape)
        if best is None:
            best, place = values, here
        else:
            place = jnp.where(values > best, here, place)
            best = jnp.maximum(best, values)
    return best, place


def max_unpool(x: jax.Array, switches: jax.Array, output_size: Pair) -> jax.Array:
    """Puts each value where its maximum was, zero elsewhere: [B, H', W', C] to [B, H, W, C]."""
    batch, channels = x.shape[0], x.shape[3]
    height, width = output_size
    b = jnp.arange(batch).reshape(-1, 1, 1, 1)
    c = jnp.arange(channels).reshape(1, 1, 1, -1)
    flat = jnp.zeros((batch, height * width, channels), x.dtype)
    return flat.at[b, switches, c].add(x).reshape(batch, height, width, channels)
