"""Mean field inference in a fully connected CRF with two Gaussian kernels.

The energy of a labelling x is sum_i -log P_i(x_i) + sum_ij [x_i != x_j] k_ij with

    k_ij = w1 exp(-|p_i - p_j|^2 / (2 sxy^2) - |I_i - I_j|^2 / (2 srgb^2))
         + w2 exp(-|p_i - p_j|^2 / (2 sg^2)),

p being places in pixels and I colours, 0 to 255. Mean field repeats, for all pixels at once,

    Q_i(l) = softmax_l(log P_i(l) + sum_j k_ij Q_j(l)).

What k_ij is divided by (`CrfParams.norm`) and whether j = i is in the sum (`CrfParams.self_term`)
differ between public codes, and the weights that suit one do not suit another.

Reference: Kraehenbuehl, Koltun, "Efficient inference in fully connected CRFs with Gaussian edge
potentials", NeurIPS 2011, arXiv:1210.5644; Chen et al., "DeepLab", arXiv:1606.00915, Section 3.3.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dense_jax.ops import permutohedral

_TINY = 1e-20  # Pixels without neighbours have a sum of zero, which must not divide.


@dataclasses.dataclass(frozen=True)
class CrfParams:
    """A CRF with two kernels; the weights may be traced, to differentiate or to search.

    They may also be matrices [C, C], which messages of C labels are multiplied by from the right.
    """

    w1: float = 4.0
    """Weight of the bilateral kernel, over place and colour."""
    sxy: float = 67.0
    """Standard deviation of the bilateral kernel in pixels."""
    srgb: float = 3.0
    """Standard deviation of the bilateral kernel in colour, of 255."""
    w2: float = 3.0
    """Weight of the spatial kernel."""
    sg: float = 3.0
    """Standard deviation of the spatial kernel in pixels."""
    iterations: int = 10
    """Steps of mean field."""
    norm: Literal["after", "symmetric", "none"] = "symmetric"
    """Divide each kernel K by its row sums D: D^-1 K (DeepLab's code), D^-1/2 K D^-1/2
    (pydensecrf's default) or not at all."""
    self_term: Literal["include", "exclude"] = "include"
    """Whether a pixel sends a message to itself: all public codes do, the paper does not."""


class _Kernel(NamedTuple):
    """One kernel before it is normalised."""

    weight: float | jax.Array
    filter: Callable[[jax.Array], jax.Array]  # [..., N, C] to K times it.
    self_weight: float | jax.Array  # The diagonal of K, one number or [..., N, 1].


def exact_mean_field(logits: jax.Array, image: jax.Array, params: CrfParams) -> jax.Array:
    """Returns the log-probabilities of each pixel's labels, from sums over all pairs of pixels.

    Memory and time grow with the square of the number of pixels: for tests and crops.

    Args:
      logits: [H, W, C], log-probabilities up to a constant per pixel.
      image: [H, W, 3] RGB, 0 to 255.
      params: the CRF.

    Returns:
      [H, W, C] float32 log-probabilities.

    Raises:
      ValueError: the shapes do not belong together.
    """
    if logits.ndim != 3 or image.shape != (*logits.shape[:2], 3):
        raise ValueError(
            "Expected logits [H, W, C] and image [H, W, 3], received "
            f"{logits.shape}, {image.shape}."
        )
    height, width, channels = logits.shape
    places, colours = _features(height, width, image)
    kernels = []
    for weight, features in (
        (params.w1, (places / params.sxy, colours / params.srgb)),
        (params.w2, (places / params.sg,)),
    ):
        matrix = _gaussian(jnp.concatenate(features, axis=-1).reshape(height * width, -1))
        kernels.append(_Kernel(weight, lambda q, k=matrix: jnp.dot(k, q, precision="highest"), 1.0))
    flat = logits.astype(jnp.float32).reshape(height * width, channels)
    return _iterate(flat, jnp.ones_like(flat[:, :1]), kernels, params).reshape(logits.shape)


def mean_field(
    logits: jax.Array, images: jax.Array, params: CrfParams, sizes: jax.Array | None = None
) -> jax.Array:
    """Returns the log-probabilities of each pixel's labels, [B, H, W, C].

    Args:
      logits: [B, H, W, C], log-probabilities up to a constant per pixel.
      images: [B, H, W, 3] RGB, 0 to 255.
      params: the CRF.
      sizes: int [B, 2], height and width of each image, which lies in the upper left corner; what
        is beyond has no influence on it. None: the images fill their arrays.

    Returns:
      [B, H, W, C] float32 log-probabilities; beyond `sizes` they mean nothing.

    Raises:
      ValueError: the shapes do not belong together.
    """
    if logits.ndim != 4 or images.shape != (*logits.shape[:3], 3):
        raise ValueError(
            "Expected logits [B, H, W, C] and images [B, H, W, 3], received "
            f"{logits.shape}, {images.shape}."
        )
    batch, height, width, channels = logits.shape
    if sizes is None:
        sizes = jnp.tile(jnp.array([[height, width]]), (batch, 1))
    if sizes.shape != (batch, 2):
        raise ValueError(f"Expected sizes {(batch, 2)}, received {sizes.shape}.")

    def one(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        logits, image, size = inputs
        is_inside = (jnp.arange(height)[:, None] < size[0]) & (jnp.arange(width) < size[1])[None]
        is_inside = is_inside.reshape(height * width, 1)
        places, colours = _features(height, width, image)
        # Places last: the lattice keeps together in memory what is close in the last features.
        features = jnp.concatenate([colours / params.srgb, places / params.sxy], axis=-1)
        features = features.reshape(height * width, -1)
        # What is beyond is put onto the first pixel: corners of its own would carry others' values.
        features = jnp.where(is_inside, features, features[:1])
        blur = functools.partial(_blur, size=(height, width), sigma=params.sg)
        spatial = _Kernel(params.w2, functools.partial(_apart, blur), 1.0)

        def run(filter_: permutohedral.Filter) -> jax.Array:
            own = permutohedral.self_weights(features)
            kernels = [_Kernel(params.w1, functools.partial(_apart, filter_), own), spatial]
            flat = logits.astype(jnp.float32).reshape(height * width, channels)
            return _iterate(flat, is_inside.astype(jnp.float32), kernels, params)

        return permutohedral.with_filter(features, run).reshape(logits.shape)

    return lax.map(one, (logits, images, sizes))


def _apart(function: Callable[[jax.Array], jax.Array], values: jax.Array) -> jax.Array:
    """Returns function(values), with values and result stored.

    XLA on CPUs would merge the filters with what is around them, barriers or not, and so work out
    exponentials once for each tap, and each filter three times for one softmax. It leaves branches
    alone; this one asks whether the values are numbers, for otherwise the result is none either.
    """
    is_number = values[0, 0] == values[0, 0]
    return lax.cond(is_number, function, lambda v: jnp.full_like(v, jnp.nan), values)


def _blur(values: jax.Array, size: tuple[int, int], sigma: float) -> jax.Array:
    """Sums over all pixels, times exp(-|p_i - p_j|^2 / (2 sigma^2)); [H W, C] to [H W, C].

    Left out is what is farther than 4 sigma along an axis.
    """
    (height, width), channels = size, values.shape[1]
    radius = math.ceil(4 * sigma)
    taps = [math.exp(-((i / sigma) ** 2) / 2) for i in range(-radius, radius + 1)]
    # As a matrix of rows, for XLA makes the best code where what it runs along is long. The
    # barriers keep it from testing for the padding at every tap.
    length = width * channels
    values = values.reshape(height, length)
    padded = lax.optimization_barrier(jnp.pad(values, ((0, 0), (radius * channels,) * 2)))
    along = (tap * padded[:, i * channels :][:, :length] for i, tap in enumerate(taps))
    values = functools.reduce(jnp.add, along)
    padded = lax.optimization_barrier(jnp.pad(values, ((radius, radius), (0, 0))))
    across = (tap * padded[i : i + height] for i, tap in enumerate(taps))
    return functools.reduce(jnp.add, across).reshape(height * width, channels)


def _features(height: int, width: int, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the places [H, W, 2] in pixels and the colours [H, W, 3]."""
    rows, columns = jnp.arange(height, dtype=jnp.float32), jnp.arange(width, dtype=jnp.float32)
    places = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1)
    return places, image.astype(jnp.float32)


def _gaussian(features: jax.Array) -> jax.Array:
    """Returns exp(-|f_i - f_j|^2 / 2) of all pairs, [N, D] to [N, N]."""
    # Axis by axis: |a|^2 + |b|^2 - 2 a b would lose the small distances to rounding.
    columns = jnp.moveaxis(features, -1, 0)
    distances = sum((f[:, None] - f[None, :]) ** 2 for f in columns)
    return jnp.exp(-distances / 2)


def _iterate(
    logits: jax.Array, mask: jax.Array, kernels: Sequence[_Kernel], params: CrfParams
) -> jax.Array:
    """Runs mean field on [..., N, C] logits, where mask [..., N, 1] is 1 and not 0."""
    normalised = [_normalise(kernel, mask, params) for kernel in kernels]

    def step(scores: jax.Array, _: None) -> tuple[jax.Array, None]:
        q = jax.nn.softmax(scores) * mask
        messages = (_weigh(kernel.filter(q), kernel.weight) for kernel in normalised)
        return functools.reduce(jnp.add, messages, logits), None

    return jax.nn.log_softmax(lax.scan(step, logits, length=params.iterations)[0])


def _weigh(messages: jax.Array, weight: float | jax.Array) -> jax.Array:
    """Multiplies messages [..., N, C] by a number, or by a matrix [C, C] from the right."""
    if jnp.ndim(weight) == 2:
        return jnp.dot(messages, weight, precision="highest")
    return weight * messages


def _normalise(kernel: _Kernel, mask: jax.Array, params: CrfParams) -> _Kernel:
    """Returns the kernel without its diagonal if so wanted, and divided by its sums."""

    def pairs(q: jax.Array) -> jax.Array:
        messages = kernel.filter(q)
        return messages - kernel.self_weight * q if params.self_term == "exclude" else messages

    sums = jnp.maximum(pairs(mask), _TINY)
    if params.norm == "after":
        return kernel._replace(filter=lambda q: pairs(q) / sums)
    if params.norm == "symmetric":
        root = lax.rsqrt(sums)
        return kernel._replace(filter=lambda q: root * pairs(root * q))
    return kernel._replace(filter=pairs)
