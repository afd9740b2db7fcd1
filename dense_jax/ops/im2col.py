"""Convolution as a matrix product: windows as rows of a matrix, and their sum as an image.

With ``columns = im2col(x)``, [B, H', W', kh kw C], and the kernel as a matrix [kh kw C, C_out],

    convolution        columns @ kernel
    kernel gradient    columns^T @ output gradient
    input gradient     col2im(output gradient @ kernel^T)

`col2im` is the transpose of `im2col`: it places weighted copies of the kernel and sums overlaps.
Kernels are [kh, kw, C, C_out], paddings ((top, bottom), (left, right)).

Reference: Chellapilla, Puri, Simard, "High performance convolutional neural networks for document
processing", IWFHR 2006; Dumoulin, Visin, arXiv:1603.07285, Section 4.1.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Pair = tuple[int, int]

# Number of values in a block of windows. With one or two products it fits into a core's caches.
_BLOCK, _SHARED_BLOCK = 2**20, 2**19


class Windows(NamedTuple):
    """Geometry of windows on an image; every field is (vertical, horizontal)."""

    kernel_size: Pair
    strides: Pair
    dilation: Pair
    padding: tuple[Pair, Pair]

    def counts(self, image_size: Pair) -> Pair:
        """Returns the number of windows on an image (H, W)."""
        high, wide = (
            (size + lo + hi - d * (k - 1) - 1) // s + 1
            for size, (lo, hi), d, k, s in zip(
                image_size,
                self.padding,
                self.dilation,
                self.kernel_size,
                self.strides,
                strict=True,
            )
        )
        return high, wide

    def taps(self) -> Iterator[Pair]:
        """Yields the pixel of the padded image that each kernel tap of window (0, 0) reads."""
        for row, column in itertools.product(*map(range, self.kernel_size)):
            yield row * self.dilation[0], column * self.dilation[1]


def pad(x: jax.Array, edges: tuple[Pair, Pair]) -> jax.Array:
    """Pads [B, H, W, C] with zeros, or crops it where an edge is negative."""
    config = [(0, 0, 0), *((lo, hi, 0) for lo, hi in edges), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


def tap(x: jax.Array, corner: Pair, counts: Pair, strides: Pair) -> jax.Array:
    """Returns the pixels of the padded image that one kernel tap reads, [B, H', W', C]."""
    stop = [c + (n - 1) * s + 1 for c, n, s in zip(corner, counts, strides, strict=True)]
    return lax.slice(x, (0, *corner, 0), (x.shape[0], *stop, x.shape[3]), (1, *strides, 1))


def im2col(x: jax.Array, w: Windows) -> jax.Array:
    """Returns the window for each output pixel, [B, H, W, C] to [B, H', W', kh kw C]."""
    counts = w.counts((x.shape[1], x.shape[2]))
    x = pad(x, w.padding)
    return jnp.concatenate([tap(x, corner, counts, w.strides) for corner in w.taps()], axis=-1)


def col2im(columns: jax.Array, image_size: Pair, w: Windows) -> jax.Array:
    """Sums windows [B, H', W', kh kw C] to the image [B, H, W, C]; the transpose of `im2col`."""
    channels = columns.shape[3] // (w.kernel_size[0] * w.kernel_size[1])
    padded = [size + lo + hi for size, (lo, hi) in zip(image_size, w.padding, strict=True)]
    zero, image = jnp.zeros((), columns.dtype), jnp.zeros((), columns.dtype)
    for i, corner in enumerate(w.taps()):
        values = lax.slice_in_dim(columns, i * channels, (i + 1) * channels, axis=3)
        edges = [
            (at, size - at - (n - 1) * s - 1, s - 1)
            for at, size, n, s in zip(corner, padded, columns.shape[1:3], w.strides, strict=True)
        ]
        image = image + lax.pad(values, zero, [(0, 0, 0), *edges, (0, 0, 0)])
    (top, bottom), (left, right) = w.padding
    return pad(image, ((-top, -bottom), (-left, -right)))


def convolve(x: jax.Array, kernel: jax.Array, w: Windows) -> jax.Array:
    """Returns the convolution [B, H', W', C_out] of [B, H, W, C]."""
    columns = im2col(x, w)
    matrix = kernel.reshape(-1, kernel.shape[3])
    return (columns.reshape(-1, len(matrix)) @ matrix).reshape(*columns.shape[:3], -1)


def input_gradient(grad: jax.Array, kernel: jax.Array, image_size: Pair, w: Windows) -> jax.Array:
    """Returns the gradient [B, H, W, C] of a convolution whose output gradient is `grad`."""
    columns = grad.reshape(-1, grad.shape[3]) @ kernel.reshape(-1, kernel.shape[3]).T
    return col2im(columns.reshape(*grad.shape[:3], -1), image_size, w)


class _Blocks(NamedTuple):
    """Blocks of rows: the windows of an image, and the pixels of the smaller map they belong to.

    The windows of a whole image need kh kw times its memory. Blocks bound this memory and keep all
    operands of a product in the cache.
    """

    number: int
    height: int  # Rows of the smaller map in a block; the last block may extend past the image.
    # Index of a block to (its corner (image, row), its pixels [n, C'], its windows [n, kh kw C]).
    read: Callable[[jax.Array], tuple[Pair, jax.Array, jax.Array]]

    @classmethod
    def of(cls, small: jax.Array, image: jax.Array, w: Windows, block: int) -> "_Blocks":
        batch, rows, columns, features = small.shape
        size = w.kernel_size[0] * w.kernel_size[1] * image.shape[3]
        height = min(rows, max(1, block // (columns * size)))
        blocks = -(-rows // height)
        small = pad(small, ((0, blocks * height - rows), (0, 0)))
        span = (height - 1) * w.strides[0] + w.dilation[0] * (w.kernel_size[0] - 1) + 1
        reach = ((blocks - 1) * height) * w.strides[0] + span
        image = pad(image, w.padding)
        image = pad(image, ((0, reach - image.shape[1]), (0, 0)))
        inside = w._replace(padding=((0, 0), (0, 0)))

        def read(i):
            at, row = i // blocks, (i % blocks) * height
            pixels = lax.dynamic_slice(small, (at, row, 0, 0), (1, height, columns, features))
            start = (at, row * w.strides[0], 0, 0)
            windows = im2col(lax.dynamic_slice(image, start, (1, span, *image.shape[2:])), inside)
            return (at, row), pixels.reshape(-1, features), windows.reshape(-1, size)

        return cls(batch * blocks, height, read)


def _accumulator(rows: int, columns: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    is_short = jnp.dtype(dtype).itemsize < 4  # bfloat16 loses small terms of a long sum
    return jnp.zeros((rows, columns), jnp.float32 if is_short else dtype)


def kernel_gradient(x: jax.Array, grad: jax.Array, w: Windows, groups: int = 1) -> jax.Array:
    """Returns the kernel gradient [kh, kw, C / groups, C_out], computed in blocks of rows."""
    if groups > 1:

        def split(values: jax.Array) -> jax.Array:
            return jnp.moveaxis(values.reshape(*values.shape[:3], groups, -1), 3, 0)

        parts = lax.map(lambda part: kernel_gradient(part[0], part[1], w), (split(x), split(grad)))
        return jnp.moveaxis(parts, 0, 3).reshape(*parts.shape[1:4], grad.shape[3])
    blocks = _Blocks.of(grad, x, w, _BLOCK)

    def add_block(i: jax.Array, total: jax.Array) -> jax.Array:
        _, pixels, windows = blocks.read(i)
        return total + (pixels.T @ windows).astype(total.dtype)

    features, size = grad.shape[3], w.kernel_size[0] * w.kernel_size[1] * x.shape[3]
    total = lax.fori_loop(0, blocks.number, add_block, _accumulator(features, size, grad.dtype))
    return total.T.reshape(*w.kernel_size, x.shape[3], features).astype(grad.dtype)


def transposed_gradients(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, w: Windows
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of the transpose of a convolution, from one pass over its windows.

    The input gradient is a convolution of `grad`. The kernel gradient is a product of the same
    windows with the input.

    Args:
      x: input of the transpose, [B, H', W', C].
      kernel: [kh, kw, C, C_out].
      grad: output gradient of the transpose, [B, H, W, C_out].
      w: the windows on the output.

    Returns:
      Gradients in the shapes of `x` and `kernel`.
    """
    rows, channels, features = x.shape[1], x.shape[3], grad.shape[3]
    size = w.kernel_size[0] * w.kernel_size[1] * features
    matrix = kernel.swapaxes(2, 3).reshape(size, channels)
    blocks = _Blocks.of(x, grad, w, _SHARED_BLOCK)

    def add_block(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_grad, total = sums
        corner, pixels, windows = blocks.read(i)
        total += (pixels.T @ windows).astype(total.dtype)
        part = (windows @ matrix).reshape(1, blocks.height, *x.shape[2:])
        return lax.dynamic_update_slice(x_grad, part, (*corner, 0, 0)), total

    high = -(-rows // blocks.height) * blocks.height
    start = jnp.zeros((len(x), high, *x.shape[2:]), x.dtype)
    start = (start, _accumulator(channels, size, x.dtype))
    x_grad, total = lax.fori_loop(0, blocks.number, add_block, start)
    kernel_grad = total.reshape(channels, *w.kernel_size, features).transpose(1, 2, 0, 3)
    return x_grad[:, :rows], kernel_grad.astype(kernel.dtype)
