"""Convolution tap by tap: for each kernel tap a product with the image pixels that it reads.

It serves for gradients of kernels that are larger than the image, and for large dilations. If the
dilation is close to the size of the map (DeepLab's 6 to 36 on maps of 17 to 65 pixels), other
implementations mostly multiply padding. On two cores, 3x3 with dilation 24 on 17 x 17 x 2048 takes
1.5 ms here and 91 ms in XLA. Kernels are [kh, kw, C, C_out].
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dense_jax.ops import im2col
from dense_jax.ops.im2col import Pair, Windows


class _Reads(NamedTuple):
    """The windows [first, stop) in which a kernel tap reads image pixels along one axis."""

    first: int
    stop: int
    at: int  # Index of the pixel that window `first` reads.


def _reads(size: int, count: int, axis: tuple[int, int, int, Pair]) -> list[_Reads]:
    kernel_size, stride, dilation, (before, _) = axis
    reads = []
    for tap in range(kernel_size):
        offset = tap * dilation - before
        first = min(max(0, -(offset // stride)), count)
        stop = max(first, min(count, (size - 1 - offset) // stride + 1))
        reads.append(_Reads(first, stop, first * stride + offset))
    return reads


def _axes(image_size: Pair, w: Windows) -> list[list[_Reads]]:
    axes = zip(image_size, w.counts(image_size), zip(*w, strict=True), strict=True)
    return [_reads(size, count, axis) for size, count, axis in axes]


def share_inside(image_size: Pair, w: Windows) -> float:
    """Returns the share of reads that fall on image pixels and not on padding."""
    counts = zip(_axes(image_size, w), w.counts(image_size), strict=True)
    return math.prod(sum(r.stop - r.first for r in axis) / len(axis) / n for axis, n in counts)


def _inside(image_size: Pair, w: Windows) -> Iterator[tuple[Pair, tuple[_Reads, _Reads]]]:
    """Yields each tap that reads image pixels, with its windows."""
    vertical, horizontal = _axes(image_size, w)
    taps = itertools.product(enumerate(vertical), enumerate(horizontal))
    for (row, down), (column, across) in taps:
        if down.first < down.stop and across.first < across.stop:
            yield (row, column), (down, across)


def _windows(y: jax.Array, reads: tuple[_Reads, _Reads]) -> jax.Array:
    down, across = reads
    return y[:, down.first : down.stop, across.first : across.stop]


def _pixels(x: jax.Array, reads: tuple[_Reads, _Reads], strides: Pair) -> jax.Array:
    counts = (reads[0].stop - reads[0].first, reads[1].stop - reads[1].first)
    return im2col.tap(x, (reads[0].at, reads[1].at), counts, strides)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # In 16-bit types, a sum of products is rounded only once.
    dtype = jnp.float32 if a.dtype.itemsize < 4 else a.dtype
    return jnp.matmul(a.reshape(-1, a.shape[-1]), b, preferred_element_type=dtype)


def convolve(x: jax.Array, kernel: jax.Array, w: Windows) -> jax.Array:
    """Returns the convolution [B, H', W', C_out] of [B, H, W, C]."""
    size = (x.shape[1], x.shape[2])
    rows, columns = w.counts(size)
    y = jnp.zeros((), _product(x[:0], kernel[0, 0]).dtype)
    for tap, reads in _inside(size, w):
        part = _pixels(x, reads, w.strides)
        part = _product(part, kernel[tap]).reshape(*part.shape[:3], kernel.shape[3])
        down, across = reads
        edges = ((down.first, rows - down.stop), (across.first, columns - across.stop))
        y = y + im2col.pad(part, edges)
    return jnp.broadcast_to(y, (len(x), rows, columns, kernel.shape[3])).astype(x.dtype)


def input_gradient(grad: jax.Array, kernel: jax.Array, image_size: Pair, w: Windows) -> jax.Array:
    """Returns the gradient [B, H, W, C] of a convolution whose output gradient is `grad`."""
    image = jnp.zeros((), _product(grad[:0], kernel[0, 0].T).dtype)
    for tap, reads in _inside(image_size, w):
        part = _windows(grad, reads)
        part = _product(part, kernel[tap].T).reshape(*part.shape[:3], kernel.shape[2])
        edges = [
            (r.at, size - r.at - (r.stop - r.first - 1) * s - 1, s - 1)
            for r, size, s in zip(reads, image_size, w.strides, strict=True)
        ]
        image = image + lax.pad(part, jnp.zeros((), part.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    shape = (len(grad), *image_size, kernel.shape[2])
    return jnp.broadcast_to(image, shape).astype(grad.dtype)


def kernel_gradient(x: jax.Array, grad: jax.Array, w: Windows) -> jax.Array:
    """Returns the kernel gradient [kh, kw, C, C_out] for the output gradient `grad`."""
    channels, features = x.shape[3], grad.shape[3]
    kh, kw = w.kernel_size
    parts = [jnp.zeros((channels, features), grad.dtype)] * (kh * kw)
    for (row, column), reads in _inside((x.shape[1], x.shape[2]), w):
        pixels = _pixels(x, reads, w.strides).reshape(-1, channels)
        grads = _windows(grad, reads).reshape(-1, features)
        if features < channels:  # a product transposes its first factor, so make it the smaller
            part = lax.optimization_barrier(grads.T @ pixels).T
        else:
            part = pixels.T @ grads
        parts[row * kw + column] = part
    return jnp.stack(parts).reshape(kh, kw, channels, features)
