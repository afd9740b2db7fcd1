"""Max pooling, pooling with the indices of its maxima (switches), and unpooling.

A place is the index of a maximum in its window, row * width + column, which fits into one byte for
common windows. The gradient needs nothing else. Callers get switches, the indices in the image. On
CPUs XLA's gradient of `reduce_window` and its scatters are slow. This module therefore reads a
window as a few strided slices (`_taps`). To write values (`_place`), it compares the place of each
pixel in the few windows that contain it with the places of their maxima. The gradient of pooling is
unpooling.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pair = tuple[int, int]


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def pooled_size(size: int, window: int, stride: int, padding: int = 0, ceil: bool = False) -> int:
    """Returns the number of windows along one axis of `size` pixels.

    The number is floor((size + 2 padding - window) / stride) + 1. With `ceil` it is rounded up, as
    in Caffe, and reduced by one if padding makes the last window start beyond the input.

    Raises:
      ValueError: no window fits, or the padding could fill a window.
    """
    if not 0 <= padding < window:
        raise ValueError(f"Padding {padding} must be at least 0 and below the window {window}.")
    spare = size + 2 * padding - window
    if spare < 0:
        raise ValueError(f"A window of {window} does not fit {size} pixels padded by {padding}.")
    count = (-(-spare // stride) if ceil else spare // stride) + 1
    # torch also applies this rule without padding, which matters only if the window is smaller
    # than the stride.
    if ceil and padding and (count - 1) * stride >= size + padding:
        count -= 1
    return count


class _Windows(NamedTuple):
    """Geometry of the windows over an image; every field is (vertical, horizontal)."""

    image: Pair
    counts: Pair
    window: Pair
    strides: Pair
    padding: Pair

    @classmethod
    def over(
        cls, image: Pair, window: int | Pair, strides: int | Pair | None, padding, ceil: bool
    ) -> "_Windows":
        window, padding = _pair(window), _pair(padding)
        strides = window if strides is None else _pair(strides)
        axes = list(zip(image, window, strides, padding, strict=True))
        counts = [pooled_size(*axis, ceil) for axis in axes]
        for count, (size, _, stride, pad) in zip(counts, axes, strict=True):
            if (count - 1) * stride >= size + pad:
                raise ValueError(f"The last window of stride {stride} on {size} pixels is empty.")
        return cls(image, (counts[0], counts[1]), window, strides, padding)

    @property
    def area(self) -> int:
        """The number of pixels in a window."""
        return self.window[0] * self.window[1]

    @property
    def dtype(self) -> jax.typing.DTypeLike:
        """The type of places. It also holds `area` and `area` + 1, which mark no place."""
        return jnp.uint8 if self.area < 255 else jnp.int32

    def corners(self) -> tuple[jax.Array, jax.Array]:
        """Returns row [1, H', 1, 1] and column [1, 1, W', 1] of each window's first pixel."""
        rows, columns = (
            jnp.arange(n, dtype=jnp.int32) * s - p
            for n, s, p in zip(self.counts, self.strides, self.padding, strict=True)
        )
        return rows.reshape(1, -1, 1, 1), columns.reshape(1, 1, -1, 1)

    def switches(self, places: jax.Array) -> jax.Array:
        """Converts places in windows to switches, row * W + column in the image."""
        (rows, columns), places = self.corners(), places.astype(jnp.int32)
        rows = rows + places // self.window[1]
        return rows * self.image[1] + columns + places % self.window[1]

    def places(self, switches: jax.Array) -> jax.Array:
        """Inverts `switches`; a switch outside its window becomes `area`, which marks no place."""
        (rows, columns), width = self.corners(), self.image[1]
        row = switches // width - rows
        column = switches % width - columns
        is_inside = (row >= 0) & (row < self.window[0]) & (column >= 0) & (column < self.window[1])
        places = row * self.window[1] + column
        return jnp.where(is_inside, places, self.area).astype(self.dtype)


def _taps(x: jax.Array, fill: float, w: _Windows) -> Iterator[jax.Array]:
    """Yields the values at each place in the window, [B, H', W', C], in row-major order."""
    after = [
        (n - 1) * s + k - size - p
        for size, n, k, s, p in zip(w.image, w.counts, w.window, w.strides, w.padding, strict=True)
    ]
    edges = [(0, 0, 0), (w.padding[0], after[0], 0), (w.padding[1], after[1], 0), (0, 0, 0)]
    x = lax.pad(x, jnp.array(fill, x.dtype), edges)
    for i, j in itertools.product(range(w.window[0]), range(w.window[1])):
        stop = (i + (w.counts[0] - 1) * w.strides[0] + 1, j + (w.counts[1] - 1) * w.strides[1] + 1)
        yield lax.slice(x, (0, i, j, 0), (x.shape[0], *stop, x.shape[3]), (1, *w.strides, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _place(x: jax.Array, places: jax.Array, w: _Windows) -> jax.Array:
    """Adds the value of each window at its place, [B, H', W', C] to [B, H, W, C].

    The padded image is divided into blocks of one stride. Row r of block n is row a * stride + r of
    window n - a, for each a below the number of overlapping windows.
    """
    (sh, sw), channels = w.strides, x.shape[3]
    overlaps = [-(-k // s) for k, s in zip(w.window, w.strides, strict=True)]
    rows, columns = (n + o - 1 for n, o in zip(w.counts, overlaps, strict=True))
    # A border of windows without a place. The barrier keeps XLA from testing for the border at
    # every pixel.
    ring = [(0, 0, 0), *((o - 1, o - 1, 0) for o in overlaps), (0, 0, 0)]
    if overlaps != [1, 1]:
        x = lax.pad(x, jnp.zeros((), x.dtype), ring)
        places = lax.pad(places, jnp.array(w.area, places.dtype), ring)
        x, places = lax.optimization_barrier((x, places))
    blocks = jnp.zeros((), x.dtype)
    for a, b in itertools.product(range(overlaps[0]), range(overlaps[1])):
        top, left = (o - 1 - i for o, i in zip(overlaps, (a, b), strict=True))
        window = (slice(None), slice(top, top + rows), None, slice(left, left + columns), None)
        row, column = np.mgrid[a * sh : (a + 1) * sh, b * sw : (b + 1) * sw]
        is_inside = (row < w.window[0]) & (column < w.window[1])
        here = np.where(is_inside, row * w.window[1] + column, w.area + 1).astype(w.dtype)
        here = here.reshape(1, 1, sh, 1, sw, 1)
        blocks = blocks + jnp.where(places[window] == here, x[window], 0)
    image = blocks.reshape(x.shape[0], rows * sh, columns * sw, channels)
    edges = [
        (-p, p + size - have, 0)
        for size, p, have in zip(w.image, w.padding, image.shape[1:3], strict=True)
    ]
    return lax.pad(image, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])


def _place_fwd(x, places, w):
    return _place(x, places, w), places


def _place_bwd(w, places, grad):
    taps = enumerate(_taps(grad, 0.0, w))
    terms = (jnp.where(places == jnp.array(i, w.dtype), tap, 0) for i, tap in taps)
    return functools.reduce(jnp.add, terms), None


_place.defvjp(_place_fwd, _place_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _pool(x: jax.Array, w: _Windows) -> tuple[jax.Array, jax.Array]:
    """Returns the maxima and their places."""
    first, *taps = _taps(x, -jnp.inf, w)
    # Strictly greater: of equal values the first is the maximum, as in torch and in
    # select-and-scatter. Padding never is, even if all values of a window are minus infinity.
    rows, columns = (jnp.maximum(-corner, 0) for corner in w.corners())
    places = (rows * w.window[1] + columns).astype(w.dtype)
    places, best = jnp.broadcast_to(places, first.shape), first
    for i, values in enumerate(taps, start=1):
        places = jnp.where(values > best, jnp.array(i, w.dtype), places)
        best = jnp.maximum(best, values)
    return best, places


def _pool_fwd(x, w):
    pooled, places = _pool(x, w)
    return (pooled, places), places


def _pool_bwd(w, places, grads):
    return (_place(grads[0], places, w),)


_pool.defvjp(_pool_fwd, _pool_bwd)


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
      window: size of the window in pixels, one number or (height, width).
      strides: step between windows. None: the window size, so that windows do not overlap.
      padding: number of rows and columns of minus infinity on each side.
      ceil: whether the last window may extend past the edge.

    Raises:
      ValueError: x is not [B, H, W, C], or no window fits.
    """
    return _pool(x, _over(x, window, strides, padding, ceil))[0]


def max_pool_with_switches(
    x: jax.Array,
    window: int | Pair,
    strides: int | Pair | None = None,
    padding: int | Pair = 0,
    ceil: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the result of `max_pool` and the switches of the maxima, int32 [B, H', W', C].

    A switch is row * W + column in the unpadded input (torch's `return_indices`), of the first
    maximum in row-major order. The arguments are those of `max_pool`.
    """
    w = _over(x, window, strides, padding, ceil)
    pooled, places = _pool(x, w)
    return pooled, w.switches(places)


def _over(x: jax.Array, *geometry) -> _Windows:
    if x.ndim != 4:
        raise ValueError(f"Expected [B, H, W, C], received {x.shape}.")
    return _Windows.over((x.shape[1], x.shape[2]), *geometry)


def max_unpool(
    x: jax.Array,
    switches: jax.Array,
    output_size: Pair,
    window: int | Pair | None = None,
    strides: int | Pair | None = None,
    padding: int | Pair = 0,
) -> jax.Array:
    """Puts each value at its switch and zero elsewhere, [B, H', W', C] to [B, H, W, C].

    Overlapping windows may share a switch. Their values are summed, so that unpooling is the
    transpose of reading the image at the switches. (torch keeps one of the values.)

    Args:
      x: [B, H', W', C].
      switches: int32 [B, H', W', C] from `max_pool_with_switches`.
      output_size: (H, W) of the pooled image, which does not follow from the size of x.
      window: window of the pooling. None: use a scatter, which is slow on CPUs.
      strides: strides of the pooling. None: the window size.
      padding: padding of the pooling.

    Raises:
      ValueError: the sizes do not match.
    """
    if x.shape != switches.shape or x.ndim != 4:
        raise ValueError(f"Expected [B, H, W, C] twice, received {x.shape} and {switches.shape}.")
    (height, width), (batch, rows, columns, channels) = output_size, x.shape
    if window is None:
        b, c = jnp.arange(batch).reshape(-1, 1, 1, 1), jnp.arange(channels).reshape(1, 1, 1, -1)
        image = jnp.zeros((batch, height * width, channels), x.dtype).at[b, switches, c].add(x)
        return image.reshape(batch, height, width, channels)
    for ceil in (False, True):
        w = _Windows.over((height, width), window, strides, padding, ceil)
        if w.counts == (rows, columns):
            return _place(x, w.places(switches), w)
    raise ValueError(f"Pooling {output_size} by {window} does not give {(rows, columns)}.")
