"""Convolution and up-convolution (fractional stride), each one call to `lax`.

Images are [B, H, W, C] and kernels [kh, kw, C_in / groups, C_out], and "convolution" is
cross-correlation, as everywhere in deep learning. Both operations use one picture of a kernel:

    conv:     y[o] = sum_k  x[s o + d k - p] kernel[k]        each output reads a window
    up_conv:  y[s i + d k - p] += x[i] kernel[k]              each input places a copy of the kernel

with stride s, dilation d and padding p. An up-convolution is thus the transpose (the adjoint) of
the convolution of the same s, p, d whose kernel has its last two axes swapped.

Kernels of other libraries (o = C_out, i = C_in, of one group):
  torch Conv2d              [o, i, h, w]    transpose(2, 3, 1, 0)
  torch ConvTranspose2d     [i, o, h, w]    transpose(2, 3, 0, 1), no flip
  flax ConvTranspose        [h, w, i, o]    flip h and w; with transpose_kernel=True, swap i and o
  TensorFlow conv2d_transpose [h, w, o, i]  swap the last two axes, no flip

Reference: Dumoulin, Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax

from dense_jax.layers import init

Pair = tuple[int, int]
Padding = int | Pair | tuple[Pair, Pair] | Literal["same"]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _pads(padding: Padding, extent: Pair) -> tuple[Pair, Pair]:
    """Returns ((top, bottom), (left, right)); `extent` is dilation * (kernel size - 1)."""
    if padding == "same":
        if extent[0] % 2 or extent[1] % 2:
            raise ValueError(
                f"Padding 'same' is (k - 1) * dilation / 2 per side, which is not whole for a "
                f"kernel that spans {extent[0] + 1} x {extent[1] + 1}; give the padding."
            )
        padding = (extent[0] // 2, extent[1] // 2)
    vertical, horizontal = (padding, padding) if isinstance(padding, int) else padding
    return _pair(vertical), _pair(horizontal)


def _check(x: jax.Array, kernel: jax.Array, groups: int) -> None:
    if x.ndim != 4 or kernel.ndim != 4:
        raise ValueError(
            f"Expected [B, H, W, C] and [kh, kw, C / groups, C_out], received {x.shape} and "
            f"{kernel.shape}."
        )
    if x.shape[3] != kernel.shape[2] * groups or kernel.shape[3] % groups:
        raise ValueError(
            f"A kernel {kernel.shape} in {groups} groups does not fit an input {x.shape}."
        )


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | Pair = 1,
    padding: Padding = "same",
    dilation: int | Pair = 1,
    groups: int = 1,
) -> jax.Array:
    """Convolves [B, H, W, C] to [B, (H + lo + hi - d (kh - 1) - 1) // s + 1, ..., C_out].

    Args:
      x: [B, H, W, C].
      kernel: [kh, kw, C / groups, C_out], of the dtype of x.
      strides: step between windows, in input pixels.
      padding: zeros around the input: one number, (vertical, horizontal), or
        ((top, bottom), (left, right)); negative crops. "same" means d (k - 1) / 2 on each side.
      dilation: distance between kernel taps, in input pixels.
      groups: number of blocks into which the channels are split.

    Raises:
      ValueError: shapes do not fit, or "same" is asked of a kernel that has no centre.
    """
    _check(x, kernel, groups)
    (sh, sw), (dh, dw), (kh, kw) = _pair(strides), _pair(dilation), kernel.shape[:2]
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(sh, sw),
        padding=_pads(padding, (dh * (kh - 1), dw * (kw - 1))),
        rhs_dilation=(dh, dw),
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )


def _crop_pad(x: jax.Array, edges: Sequence[Pair]) -> jax.Array:
    """Adds zeros around [B, H, W, C], or crops where an edge is negative."""
    config = [(0, 0, 0), *((lo, hi, 0) for lo, hi in edges), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), config)


# XLA's own fractional stride (`lhs_dilation`) multiplies the inserted zeros on CPUs, and its kernel
# gradient takes a slow path there: seconds where this form takes milliseconds. With the kernel cut
# into tiles of one stride, an up-convolution is a convolution of stride 1 that yields, for each
# input pixel, a block of strides x strides output pixels, then a reordering. The tests compare
# both forms.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _up_conv(x: jax.Array, kernel: jax.Array, strides: Pair, crop: tuple[Pair, Pair]) -> jax.Array:
    tiles, (rows, columns), edges = _blocks(x, kernel, strides, crop)
    th, tw = tiles.shape[:2]
    y = lax.conv_general_dilated(
        x,
        jnp.flip(tiles, (0, 1)),
        window_strides=(1, 1),
        padding=[(th - 1, th - 1), (tw - 1, tw - 1)],
        dimension_numbers=_LAYOUT,
    )
    (sh, sw), features = strides, kernel.shape[3]
    y = y.reshape(len(x), rows, columns, sh, sw * features).transpose(0, 1, 3, 2, 4)
    y = y.reshape(len(x), rows * sh, columns * sw, features)
    return _crop_pad(y, [(-lo, -hi) for lo, hi in edges])


def _blocks(x: jax.Array, kernel: jax.Array, strides: Pair, crop: tuple[Pair, Pair]):
    """Returns the kernel's tiles [th, tw, C, sh * sw * C_out], the number of blocks, their crop."""
    (sh, sw), (kh, kw, channels, features) = strides, kernel.shape
    th, tw = -(-kh // sh), -(-kw // sw)
    tail = (th * sh - kh, tw * sw - kw)
    tiles = _crop_pad(kernel.reshape(1, kh, kw, -1), [(0, t) for t in tail])
    tiles = tiles.reshape(th, sh, tw, sw, channels, features).transpose(0, 2, 4, 1, 3, 5)
    edges = [(lo, hi + t) for (lo, hi), t in zip(crop, tail, strict=True)]
    blocks = (x.shape[1] + th - 1, x.shape[2] + tw - 1)
    return tiles.reshape(th, tw, channels, -1), blocks, edges


def _up_conv_fwd(x, kernel, strides, crop):
    return _up_conv(x, kernel, strides, crop), (x, kernel)


def _up_conv_bwd(strides, crop, residuals, grad):
    x, kernel = residuals
    (sh, sw), (kh, kw, channels, features) = strides, kernel.shape
    tiles, (rows, columns), edges = _blocks(x, kernel, strides, crop)
    (th, tw), (batch, height, width, _) = tiles.shape[:2], x.shape
    # Axes that stay together are one axis: XLA moves long rows ten times faster than short ones.
    grad = _crop_pad(grad, edges).reshape(batch, rows, sh, columns, sw * features)
    grad = grad.transpose(0, 1, 3, 2, 4).reshape(batch, rows, columns, -1)
    # Tile (a, b) took input pixel (i, j) to block (i + a, j + b). So both gradients are one matrix
    # product over all tiles and a shift for each tile.
    shifts = list(itertools.product(range(th), range(tw)))
    pulled = jnp.einsum("bhwo,yxio->bhwyxi", grad, tiles)
    x_grad = functools.reduce(
        jnp.add, (pulled[:, a : a + height, b : b + width, a, b] for a, b in shifts)
    )
    shifted = [_crop_pad(x, [(a, th - 1 - a), (b, tw - 1 - b)]) for a, b in shifts]
    tiles_grad = jnp.einsum("bhwi,bhwo->io", jnp.concatenate(shifted, axis=-1), grad)
    tiles_grad = tiles_grad.reshape(th, tw, channels, sh, sw, features).transpose(0, 3, 1, 4, 2, 5)
    return x_grad, tiles_grad.reshape(th * sh, tw * sw, channels, features)[:kh, :kw]


_up_conv.defvjp(_up_conv_fwd, _up_conv_bwd)


def up_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | Pair,
    padding: Padding = 0,
    output_padding: int | Pair = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
) -> jax.Array:
    """Up-convolves [B, H, W, C] to [B, (H - 1) s - lo - hi + d (kh - 1) + 1 + op, ..., C_out].

    Args:
      x: [B, H, W, C].
      kernel: [kh, kw, C / groups, C_out], of the dtype of x, stored as it is placed in the output.
      strides: distance between placed copies, in output pixels.
      padding: rows and columns cut from the output, in the forms that `conv` takes: the padding
        of the convolution whose transpose this is.
      output_padding: rows added at the bottom and columns at the right (torch's name): the
        remainder that the floor in the convolution's output size lost.
      dilation: distance between kernel taps, in output pixels.
      groups: number of blocks into which the channels are split.

    Raises:
      ValueError: shapes do not fit, or "same" is asked of a kernel that has no centre.
    """
    _check(x, kernel, groups)
    (dh, dw), (kh, kw, per_group, features) = _pair(dilation), kernel.shape
    extra, extent = _pair(output_padding), (dh * (kh - 1), dw * (kw - 1))
    pads = _pads(padding, extent)
    if groups > 1:
        # One matrix product with a block-diagonal kernel is faster than many thin ones.
        kernel = kernel.reshape(kh, kw, 1, per_group, groups, features // groups)
        kernel = kernel * jnp.eye(groups, dtype=x.dtype).reshape(1, 1, groups, 1, groups, 1)
        kernel = kernel.reshape(kh, kw, groups * per_group, features)
    if (dh, dw) != (1, 1):
        holes = [(0, 0, dh - 1), (0, 0, dw - 1), (0, 0, 0), (0, 0, 0)]
        kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), holes)
    crop = tuple((lo, hi - op) for (lo, hi), op in zip(pads, extra, strict=True))
    return _up_conv(x, kernel, _pair(strides), crop)


class Conv(nn.Module):
    """Convolution with bias; parameters "kernel" [kh, kw, C / groups, features] and "bias".

    Attributes:
      features: number of output channels.
      kernel_size: one number or (height, width).
      strides, padding, dilation, groups: see `conv`.
      use_bias: whether a bias is added.
      dtype: computation dtype; None: that of the input and the parameters.
      param_dtype: dtype of the parameters.
      kernel_init, bias_init: initialisers.
    """

    features: int
    kernel_size: int | Pair
    strides: int | Pair = 1
    padding: Padding = "same"
    dilation: int | Pair = 1
    groups: int = 1
    use_bias: bool = True
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: init.Initializer = init.he
    bias_init: init.Initializer = init.zero

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H', W', features]."""
        shape = (*_pair(self.kernel_size), x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = conv(
            x,
            kernel,
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return y if bias is None else y + bias.reshape(1, 1, 1, -1)


class UpConv(nn.Module):
    """Up-convolution with bias; parameters "kernel" [kh, kw, C / groups, features] and "bias".

    Attributes:
      features: number of output channels.
      kernel_size: one number or (height, width).
      strides, padding, output_padding, dilation, groups: see `up_conv`.
      use_bias: whether a bias is added.
      trainable: False keeps the kernel out of the parameters: it is always what `kernel_init`,
        which then must not be random, returns (the fixed bilinear upsampling of FCN).
      dtype: computation dtype; None: that of the input and the parameters.
      param_dtype: dtype of the parameters.
      kernel_init, bias_init: initialisers.
    """

    features: int
    kernel_size: int | Pair
    strides: int | Pair
    padding: Padding = 0
    output_padding: int | Pair = 0
    dilation: int | Pair = 1
    groups: int = 1
    use_bias: bool = True
    trainable: bool = True
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: init.Initializer = init.he
    bias_init: init.Initializer = init.zero

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H', W', features]."""
        shape = (*_pair(self.kernel_size), x.shape[-1] // self.groups, self.features)
        if self.trainable:
            kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        else:
            kernel = self.kernel_init(None, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        y = up_conv(
            x,
            kernel,
            strides=self.strides,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return y if bias is None else y + bias.reshape(1, 1, 1, -1)
