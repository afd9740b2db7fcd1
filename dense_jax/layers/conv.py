"""Convolution and up-convolution (fractional stride), each one call to `lax`.

Images are [B, H, W, C] and kernels [kh, kw, C_in / groups, C_out], and "convolution" is
cross-correlation, as usual in deep learning. Both operations index the kernel in the same way:

    conv:     y[o] = sum_k  x[s o + d k - p] kernel[k]        each output reads a window
    up_conv:  y[s i + d k - p] += x[i] kernel[k]              each input places a copy of the kernel

with stride s, dilation d and padding p. An up-convolution is thus the transpose (the adjoint) of
the convolution with the same s, p and d and with the last two axes of the kernel swapped. Reverse
mode gradients of any order work (`jax.grad`); `jax.jvp` is not supported.

Conversion from kernels of other libraries (o = C_out, i = C_in of one group):
  torch Conv2d              [o, i, h, w]    transpose(2, 3, 1, 0)
  torch ConvTranspose2d     [i, o, h, w]    transpose(2, 3, 0, 1), no flip
  flax ConvTranspose        [h, w, i, o]    flip h and w; with transpose_kernel=True, swap i and o
  TensorFlow conv2d_transpose [h, w, o, i]  swap the last two axes, no flip

Reference: Dumoulin, Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax

from dense_jax.layers import init
from dense_jax.ops import depthwise, im2col, taps
from dense_jax.ops.im2col import Windows

Pair = tuple[int, int]
Padding = int | Pair | tuple[Pair, Pair] | Literal["same"]

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_MOSTLY_INSIDE = 0.85  # Share of reads inside the image above which `taps` is not faster.
_WHOLE = ((0, 0, 0), (0, 0, 0))  # Leaves two axes unchanged.


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
      padding: number of zeros around the input: one number, (vertical, horizontal), or
        ((top, bottom), (left, right)). Negative numbers crop. "same" is d (k - 1) / 2 on each side.
      dilation: distance between kernel taps, in input pixels.
      groups: number of groups into which the channels are split.

    Raises:
      ValueError: the shapes do not match, or padding is "same" and the kernel has no centre.
    """
    _check(x, kernel, groups)
    (dh, dw), (kh, kw) = _pair(dilation), kernel.shape[:2]
    pads = _pads(padding, (dh * (kh - 1), dw * (kw - 1)))
    return _conv(x, kernel, Windows((kh, kw), _pair(strides), (dh, dw), pads), groups)


def _lax_conv(x: jax.Array, kernel: jax.Array, w: Windows, groups: int) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=w.strides,
        padding=w.padding,
        rhs_dilation=w.dilation,
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )


# Accelerators use the single call above and its standard gradients. On CPUs XLA is slow for layers
# that are almost fully connected (fc6: 3 to 300 times slower than the same matrix product), for
# kernel gradients (4 to 8 times on large maps, hundreds of times with 32 groups), for depthwise
# layers (4 to 40 times), and for dilated layers that mostly read padding (4 to 100 times). It runs
# layers without padding at a third of its speed, so they get one column of padding. The tests
# compare all implementations.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
@functools.partial(jax.jit, static_argnums=(2, 3))  # layers of one shape are traced once
def _conv(x: jax.Array, kernel: jax.Array, w: Windows, groups: int) -> jax.Array:
    def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if _is_depthwise(x, kernel, w, groups):
            return depthwise.convolve(x, kernel, w)
        if _reads_padding(x, kernel, w, groups):
            return taps.convolve(x, kernel, w)
        if _is_almost_full(x, kernel, w, groups):
            return im2col.convolve(x, kernel, w)
        top_bottom, (left, right) = w.padding
        if max(*top_bottom, left, right) > 0:
            return _lax_conv(x, kernel, w, groups)
        wider = w._replace(padding=(top_bottom, (left, right + w.strides[1])))
        return _lax_conv(x, kernel, wider, groups)[:, :, :-1]

    stock = functools.partial(_lax_conv, w=w, groups=groups)
    if any(map(jax.export.is_symbolic_dim, x.shape)):  # symbolic size: the best one is unknown
        return stock(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=stock)


def _is_almost_full(x: jax.Array, kernel: jax.Array, w: Windows, groups: int) -> bool:
    """Whether there are at most as many output pixels as features, or the kernel is 1x1.

    In the first case most of the work is reading the kernel. In the second, no window is copied.
    """
    counts = w.counts((x.shape[1], x.shape[2]))
    few = len(x) * counts[0] * counts[1] <= kernel.shape[3]
    some = min(len(x), *counts) > 0
    return groups == 1 and some and (few or w.kernel_size == w.strides == (1, 1))


def _is_deep(x: jax.Array, kernel: jax.Array, groups: int) -> bool:
    """Whether a map is small and has many features, so that copying windows is cheap."""
    return groups == 1 and x.size <= 2**20 and min(kernel.shape[2:]) >= 256


def _reads_padding(x: jax.Array, kernel: jax.Array, w: Windows, groups: int) -> bool:
    """Whether windows read so much padding that skipping it is faster."""
    size = (x.shape[1], x.shape[2])
    rows, columns = w.counts(size)
    least = min(len(x) * max(0, rows) * columns, *kernel.shape[2:])  # least side of a tap's product
    return groups == 1 and least >= 128 and taps.share_inside(size, w) < _MOSTLY_INSIDE


def _is_depthwise(x: jax.Array, kernel: jax.Array, w: Windows, groups: int) -> bool:
    some = min(len(x), *w.counts((x.shape[1], x.shape[2]))) > 0
    return 1 < groups == x.shape[3] == kernel.shape[3] and some


def _conv_fwd(x, kernel, w, groups):
    return _conv(x, kernel, w, groups), (x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1))  # else each call outside of jit compiles
def _conv_bwd(w, groups, residuals, grad):
    def stock(x, kernel, grad):
        return jax.vjp(lambda x, kernel: _lax_conv(x, kernel, w, groups), x, kernel)[1](grad)

    def on_cpu(x, kernel, grad):
        if _is_depthwise(x, kernel, w, groups):
            x_grad = depthwise.input_gradient(grad, kernel, (x.shape[1], x.shape[2]), w)
            return x_grad, depthwise.kernel_gradient(x, grad, w)
        if _reads_padding(x, kernel, w, groups):
            x_grad = taps.input_gradient(grad, kernel, (x.shape[1], x.shape[2]), w)
            return x_grad, taps.kernel_gradient(x, grad, w)
        x_grad, kernel_grad = stock(x, kernel, grad)
        if grad.size == 0:
            return x_grad, kernel_grad
        is_deep = _is_deep(x, kernel, groups)
        if is_deep or _is_almost_full(x, kernel, w, groups):
            x_grad = im2col.input_gradient(grad, kernel, (x.shape[1], x.shape[2]), w)
        if is_deep or (groups == 1 and w.kernel_size == (1, 1)):
            kernel_grad = taps.kernel_gradient(x, grad, w)
        else:
            kernel_grad = im2col.kernel_gradient(x, grad, w, groups)
        return x_grad, kernel_grad  # unused results of `stock` are never computed

    return lax.platform_dependent(*residuals, grad, cpu=on_cpu, default=stock)


_conv.defvjp(_conv_fwd, _conv_bwd)


def _lax_up_conv(x: jax.Array, kernel: jax.Array, w: Windows, groups: int) -> jax.Array:
    """Returns the transpose of the convolution with windows `w`, whose padding crops the output."""
    extent = [d * (k - 1) for d, k in zip(w.dilation, w.kernel_size, strict=True)]
    return lax.conv_general_dilated(
        x,
        jnp.flip(kernel, (0, 1)),  # an output pixel sees the placed kernel flipped
        window_strides=(1, 1),
        padding=[(e - lo, e - hi) for e, (lo, hi) in zip(extent, w.padding, strict=True)],
        lhs_dilation=w.strides,
        rhs_dilation=w.dilation,
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )


# Accelerators use the single call above and its standard gradients. On CPUs XLA multiplies the
# zeros that a fractional stride inserts, and its kernel gradient takes seconds instead of
# milliseconds. There the kernel is divided into tiles of one stride. For each tile, an input pixel
# produces a block of strides x strides output pixels, by a convolution with stride 1 or, if the
# layer is depthwise, by elementwise products.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _up_conv(x: jax.Array, kernel: jax.Array, w: Windows, groups: int) -> jax.Array:
    stock = functools.partial(_lax_up_conv, w=w, groups=groups)
    if jax.eval_shape(stock, x, kernel).size == 0:  # no images, or everything is cropped
        return stock(x, kernel)
    tiled = functools.partial(_tiled_up_conv, w=w, groups=groups)
    return lax.platform_dependent(x, kernel, cpu=tiled, default=stock)


def _up_conv_fwd(x, kernel, w, groups):
    return _up_conv(x, kernel, w, groups), (x, kernel)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _up_conv_bwd(w, groups, residuals, grad):
    def stock(x, kernel, grad):
        return jax.vjp(lambda x, kernel: _lax_up_conv(x, kernel, w, groups), x, kernel)[1](grad)

    x, kernel = residuals
    if grad.size == 0:
        return stock(x, kernel, grad)

    def on_cpu(x, kernel, grad):
        if groups == x.shape[3] == kernel.shape[3]:
            return _depthwise_up_conv_gradients(x, kernel, grad, w)
        dense, back = jax.vjp(functools.partial(_without_groups, groups=groups), kernel)
        x_grad, kernel_grad = im2col.transposed_gradients(x, dense, grad, w)
        return x_grad, back(kernel_grad)[0]

    return lax.platform_dependent(x, kernel, grad, cpu=on_cpu, default=stock)


_up_conv.defvjp(_up_conv_fwd, _up_conv_bwd)


class _Tiles(NamedTuple):
    """A kernel divided into tiles of one stride; every field is (vertical, horizontal)."""

    counts: Pair  # Number of tiles in a kernel.
    blocks: Pair  # Number of blocks of one stride in the output, before cropping.
    edges: tuple[Pair, Pair]  # Number of pixels to crop from the blocks on each side.

    @classmethod
    def of(cls, x: jax.Array, kernel_size: Sequence[int], w: Windows) -> "_Tiles":
        axes = list(zip(x.shape[1:3], kernel_size, w.strides, w.padding, strict=True))
        counts = [-(-k // s) for _, k, s, _ in axes]
        blocks = [n + t - 1 for (n, *_), t in zip(axes, counts, strict=True)]
        edges = [(lo, hi + t * s - k) for (_, k, s, (lo, hi)), t in zip(axes, counts, strict=True)]
        return cls((counts[0], counts[1]), (blocks[0], blocks[1]), (edges[0], edges[1]))

    def shifts(self) -> Iterator[tuple[Pair, tuple[Pair, Pair]]]:
        """Yields each tile and the padding that moves input pixels to the blocks of the tile."""
        (high, wide), _, _ = self
        for a, b in itertools.product(range(high), range(wide)):
            yield (a, b), ((a, high - 1 - a), (b, wide - 1 - b))


def _without_dilation(kernel: jax.Array, w: Windows) -> jax.Array:
    holes = [(0, 0, w.dilation[0] - 1), (0, 0, w.dilation[1] - 1), (0, 0, 0), (0, 0, 0)]
    return lax.pad(kernel, jnp.zeros((), kernel.dtype), holes)


def _without_groups(kernel: jax.Array, groups: int) -> jax.Array:
    """Returns the equivalent block-diagonal kernel with one group, [kh, kw, C, C_out]."""
    kh, kw, per_group, features = kernel.shape
    kernel = kernel.reshape(kh, kw, 1, per_group, groups, features // groups)
    kernel = kernel * jnp.eye(groups, dtype=kernel.dtype).reshape(1, 1, groups, 1, groups, 1)
    return kernel.reshape(kh, kw, groups * per_group, features)


def _tiled_up_conv(x: jax.Array, kernel: jax.Array, w: Windows, groups: int) -> jax.Array:
    kernel = _without_dilation(kernel, w)
    is_depthwise = groups == x.shape[3] == kernel.shape[3]
    if not is_depthwise:
        kernel = _without_groups(kernel, groups)
    (sh, sw), (kh, kw, channels, features), batch = w.strides, kernel.shape, x.shape[0]
    tiles = _Tiles.of(x, (kh, kw), w)
    (th, tw), (rows, columns), edges = tiles
    kernel = lax.pad(
        kernel, jnp.zeros((), x.dtype), [(0, th * sh - kh, 0), (0, tw * sw - kw, 0), *_WHOLE]
    )
    kernel = kernel.reshape(th, sh, tw, sw, channels, features)
    if is_depthwise:
        y = jnp.zeros((), x.dtype)
        for (a, b), shift in tiles.shifts():
            moved = im2col.pad(x, shift)[:, :, None, :, None]
            y = y + moved * kernel[a, :, b, :, 0].reshape(1, 1, sh, 1, sw, features)
    else:
        # [th, tw, C, (sh, sw, C_out)]: a convolution to sh sw C_out channels.
        kernel = kernel.transpose(0, 2, 4, 1, 3, 5).reshape(th, tw, channels, -1)
        y = lax.conv_general_dilated(
            x,
            jnp.flip(kernel, (0, 1)),
            window_strides=(1, 1),
            padding=[(th - 1, th - 1), (tw - 1, tw - 1)],
            dimension_numbers=_LAYOUT,
        )
        y = y.reshape(batch, rows, columns, sh, sw, features).transpose(0, 1, 3, 2, 4, 5)
    y = y.reshape(batch, rows * sh, columns * sw, features)
    return im2col.pad(y, ((-edges[0][0], -edges[0][1]), (-edges[1][0], -edges[1][1])))


def _depthwise_up_conv_gradients(
    x: jax.Array, kernel: jax.Array, grad: jax.Array, w: Windows
) -> tuple[jax.Array, jax.Array]:
    """Returns both gradients, each as one matrix product per channel with blocks of `grad`."""
    (sh, sw), channels = w.strides, x.shape[3]
    full, back = jax.vjp(functools.partial(_without_dilation, w=w), kernel)
    kh, kw = full.shape[:2]
    tiles = _Tiles.of(x, (kh, kw), w)
    (th, tw), (rows, columns), edges = tiles
    blocks = im2col.pad(grad, edges).reshape(-1, rows, sh, columns, sw, channels)
    blocks = blocks.transpose(5, 0, 1, 3, 2, 4).reshape(channels, -1, sh * sw)
    reach = jnp.stack([im2col.pad(x, shift) for _, shift in tiles.shifts()], axis=-1)
    reach = reach.transpose(3, 0, 1, 2, 4).reshape(channels, -1, th * tw)
    kernel_grad = jnp.einsum("cni,cno->cio", reach, blocks)
    kernel_grad = kernel_grad.reshape(channels, th, tw, sh, sw).transpose(1, 3, 2, 4, 0)
    kernel_grad = kernel_grad.reshape(th * sh, tw * sw, 1, channels)

    full = lax.pad(
        full, jnp.zeros((), x.dtype), [(0, th * sh - kh, 0), (0, tw * sw - kw, 0), *_WHOLE]
    )
    full = full.reshape(th, sh, tw, sw, channels).transpose(4, 1, 3, 0, 2)
    parts = jnp.einsum("cno,coi->cni", blocks, full.reshape(channels, sh * sw, -1))
    parts = parts.reshape(channels, -1, rows, columns, th * tw).transpose(4, 1, 2, 3, 0)
    x_grad = jnp.zeros((), x.dtype)
    for part, (_, ((top, bottom), (left, right))) in zip(parts, tiles.shifts(), strict=True):
        x_grad = x_grad + im2col.pad(part, ((-top, -bottom), (-left, -right)))
    return x_grad, back(kernel_grad[:kh, :kw])[0]


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
      kernel: [kh, kw, C / groups, C_out], of the dtype of x, oriented as its copies in the output.
      strides: distance between placed copies, in output pixels.
      padding: number of rows and columns to crop from the output, which is the padding of the
        convolution whose transpose this is. It has the same forms as for `conv`.
      output_padding: number of rows added at the bottom and columns at the right (torch's name).
        They replace the remainder that the convolution's output size rounds off.
      dilation: distance between kernel taps, in output pixels.
      groups: number of groups into which the channels are split.

    Raises:
      ValueError: the shapes do not match, or padding is "same" and the kernel has no centre.
    """
    _check(x, kernel, groups)
    (dh, dw), (kh, kw), extra = _pair(dilation), kernel.shape[:2], _pair(output_padding)
    (top, bottom), (left, right) = _pads(padding, (dh * (kh - 1), dw * (kw - 1)))
    crop = ((top, bottom - extra[0]), (left, right - extra[1]))
    return _up_conv(x, kernel, Windows((kh, kw), _pair(strides), (dh, dw), crop), groups)


class Conv(nn.Module):
    """Convolution with bias; parameters "kernel" [kh, kw, C / groups, features] and "bias".

    Attributes:
      features: number of output channels.
      kernel_size: one number or (height, width).
      strides, padding, dilation, groups: see `conv`.
      use_bias: whether to add a bias.
      dtype: computation dtype. None: that of the input and the parameters.
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
      use_bias: whether to add a bias.
      trainable: whether the kernel is a parameter. If not, it always has the values of
        `kernel_init`, which must not be random (fixed bilinear upsampling of FCN).
      dtype: computation dtype. None: that of the input and the parameters.
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
