"""Checkerboard artefacts: where copies of a kernel overlap, and how strongly an image shows it.

`overlap_map` counts the copies. `energy_share` measures the pattern in any image by its spectrum.
An s-fold upsampling leaves a pattern that repeats every s pixels. Its energy lies near the
multiples of 1/s cycles per pixel, where smooth images have almost none. The same measure applies
to the input gradients of strided convolutions and of max pooling, which have such patterns too.

Reference: Odena, Dumoulin, Olah, "Deconvolution and checkerboard artifacts", Distill 2016,
doi:10.23915/distill.00003.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.analysis import arithmetic
from dense_jax.layers.conv import Conv, conv
from dense_jax.layers.upsample import Kind, Upsample2x
from dense_jax.ops.pool import max_pool

FLOOR = -100.0  # In decibels. Lower values would measure the rounding of float32.


def overlap_map(kernel: int, stride: int, size: int) -> np.ndarray:
    """Returns int [o, o], o = stride (size - 1) + kernel: copies of a kernel on each output pixel.

    The library's up-convolution maps an image of ones with a kernel of ones.
    """
    layer = arithmetic.Layer(size=size, kernel=kernel, stride=stride, kind="up_conv")
    return arithmetic.overlap(layer)


def inner_counts(kernel: int, stride: int) -> np.ndarray:
    """Returns int [stride, stride]: one period of the overlap map, away from the edges."""
    reach = -(-kernel // stride)
    start = (reach - 1) * stride
    return overlap_map(kernel, stride, 2 * reach)[start : start + stride, start : start + stride]


def energy_share(images: np.ndarray, period: int = 2, band: float = 1 / 16) -> np.ndarray:
    """Returns [B]: share of each image's energy that repeats with `period`, between 0 and 1.

    The numerator is the energy |F|^2 within `band` of the frequencies (a, b) / period cycles per
    pixel, where a and b are not both multiples of the period. The denominator is the energy at all
    frequencies, including the mean. Both sum over channels. A Hann window suppresses the jump
    between opposite edges, which is not part of the image.

    Args:
      images: [B, H, W, C]. Height and width are at least 2 / band pixels, to resolve the bands.
      period: period of the pattern in pixels, which is the stride of the upsampling.
      band: half width in cycles per pixel, for patterns whose strength varies over the image.
    """
    images = np.asarray(images, np.float64)
    near = []
    for axis, length in ((1, images.shape[1]), (2, images.shape[2])):
        window = np.sin(np.pi * (np.arange(length) + 0.5) / length) ** 2
        images = images * np.expand_dims(window, [a for a in range(4) if a != axis])
        frequency = np.fft.fftfreq(length) * period  # whole numbers for a pattern of this period
        near.append(np.abs(frequency - np.rint(frequency)) <= band * period)
        near[-1] = np.where(near[-1], np.rint(frequency) % period, -1)
    energy = np.sum(np.abs(np.fft.fft2(images, axes=(1, 2))) ** 2, axis=3)
    rows, columns = near[0][:, None], near[1][None, :]
    chosen = (rows >= 0) & (columns >= 0) & ((rows > 0) | (columns > 0))
    return np.sum(energy * chosen, (1, 2)) / np.maximum(np.sum(energy, (1, 2)), 1e-300)


def decibels(share: np.ndarray | float) -> np.ndarray:
    """Returns 10 log10 of a share, at least FLOOR."""
    return np.maximum(10 * np.log10(np.maximum(share, 1e-300)), FLOOR)


class Decoder(nn.Module):
    """A small decoder: 3x3 convolution, `num_doublings` x (upsample, ReLU), 3x3 convolution.

    Attributes:
      upsample: the layer that doubles the size in each step.
      width: channels between the layers.
      num_doublings: number of upsampling steps.
      features: output channels.
    """

    upsample: Kind
    width: int = 16
    num_doublings: int = 2
    features: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, 2^n H, 2^n W, features]."""
        x = nn.relu(Conv(self.width, 3, name="conv_in")(x))
        for step in range(1, self.num_doublings + 1):
            x = nn.relu(Upsample2x(self.width, self.upsample, name=f"up{step}")(x))
        return Conv(self.features, 3, name="conv_out")(x)


def interior(images: jax.typing.ArrayLike, margin: int) -> np.ndarray:
    """Returns [B, H, W, C] without the `margin` pixels on each side that zero padding affects."""
    return np.asarray(images)[:, margin:-margin, margin:-margin]


def probes(size: int = 24) -> dict[str, np.ndarray]:
    """Returns inputs without detail, float32 [8, size, size, 3] between -1 and 1.

    "constant" has eight images of one colour each. "smooth" has sums of waves whose wavelengths are
    at least 8 pixels.
    """
    rng = np.random.default_rng(0)
    constant = np.broadcast_to(rng.uniform(-0.5, 0.5, (8, 1, 1, 3)), (8, size, size, 3))
    rows, columns = np.mgrid[:size, :size][..., None]
    smooth = np.zeros((8, size, size, 3))
    for _ in range(4):
        angle, phase = rng.uniform(0, 2 * np.pi, (2, 8, 1, 1, 3))
        length = rng.uniform(8, 24, (8, 1, 1, 3))
        along = rows * np.cos(angle) + columns * np.sin(angle)
        smooth += rng.uniform(0, 0.2, (8, 1, 1, 3)) * np.cos(2 * np.pi * along / length + phase)
    return {"constant": constant.astype(np.float32), "smooth": smooth.astype(np.float32)}


def measure(decode: Callable[[np.ndarray], jax.Array], factor: int = 4) -> dict[str, float]:
    """Measures the pattern in the outputs of a decoder for `probes`.

    Args:
      decode: maps [B, H, W, 3] to [B, factor H, factor W, C]. Its padding may affect up to 16
        pixels along the edges.
      factor: enlargement factor, which is the longest period of the pattern.

    Returns:
      "constant" and "smooth": level in decibels, from the mean `energy_share` over the probes.
      "ripple": standard deviation of the output for constant inputs, in levels of 255.
    """
    outputs = {name: interior(decode(x), 16) for name, x in probes().items()}
    result = {n: float(decibels(energy_share(y, factor).mean())) for n, y in outputs.items()}
    variance = np.var(outputs["constant"].astype(np.float64), axis=(1, 2))
    return result | {"ripple": float(255 * np.sqrt(np.mean(variance)))}


def gradient_map(
    kind: Literal["conv", "max_pool"], kernel: int, stride: int, size: int, seed: int | None
) -> np.ndarray:
    """Returns [1, i, i, 1]: the gradient of the sum of a layer's outputs with respect to its input.

    Args:
      kind: a convolution of one channel, or max pooling of a random image.
      kernel: taps along an axis.
      stride: stride of the layer, which has no padding.
      size: input pixels along an axis.
      seed: seed of a normally distributed kernel or image. None: a kernel of ones.
    """
    rng = np.random.default_rng(seed)
    taps = np.ones((kernel, kernel)) if seed is None else rng.normal(size=(kernel, kernel))
    weights = jnp.asarray(taps[:, :, None, None], jnp.float32)
    x = jnp.asarray(rng.normal(size=(1, size, size, 1)), jnp.float32)

    def total(x: jax.Array) -> jax.Array:
        if kind == "max_pool":
            return jnp.sum(max_pool(x, kernel, stride))
        return jnp.sum(conv(x, weights, strides=stride, padding=0))

    return np.asarray(jax.grad(total)(x))


def gradient_levels(num_seeds: int) -> dict[str, tuple[float, float | None]]:
    """Measures the pattern in input gradients of layers with stride 2.

    Returns:
      For each layer two levels in decibels. The first is the level of the mean share over
      `num_seeds` random kernels, or random images for pooling. The second is the level for a kernel
      of ones, or None for pooling.
    """

    def level(kind: Literal["conv", "max_pool"], kernel: int, seeds: Sequence[int | None]) -> float:
        maps = [gradient_map(kind, kernel, 2, 65, seed) for seed in seeds]
        return float(decibels(energy_share(interior(np.concatenate(maps), 4)).mean()))

    seeds = range(num_seeds)
    result: dict[str, tuple[float, float | None]] = {
        f"conv k{k} s2": (level("conv", k, seeds), level("conv", k, [None])) for k in (2, 3, 4, 5)
    }
    return result | {f"max pool k{k} s2": (level("max_pool", k, seeds), None) for k in (2, 3)}
