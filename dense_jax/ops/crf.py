"""Mean field inference in a fully connected CRF with two Gaussian kernels.

The energy of a labelling x is sum_i -log P_i(x_i) + sum_ij [x_i != x_j] k_ij with

    k_ij = w1 exp(-|p_i - p_j|^2 / (2 sxy^2) - |I_i - I_j|^2 / (2 srgb^2))
         + w2 exp(-|p_i - p_j|^2 / (2 sg^2)),

where p are positions in pixels and I are colours from 0 to 255. Mean field repeats, for all pixels
at once,

    Q_i(l) = softmax_l(log P_i(l) + sum_j k_ij Q_j(l)).

Public implementations differ in the normalisation of k_ij (`CrfParams.norm`) and in whether the sum
includes j = i (`CrfParams.self_term`). Weights tuned for one do not suit another.

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

_TINY = 1e-20  # Avoids division by zero for pixels without neighbours.


@dataclasses.dataclass(frozen=True)
class CrfParams:
    """Options of a CRF with two kernels.

    The weights may be traced values, for differentiation or search. They may also be matrices
    [C, C], which multiply messages of C labels from the right.
    """

    w1: float = 4.0
    """Weight of the bilateral kernel, over position and colour."""
    sxy: float = 67.0
    """Standard deviation of the bilateral kernel in pixels."""
    srgb: float = 3.0
    """Standard deviation of the bilateral kernel in colour, from 0 to 255."""
    w2: float = 3.0
    """Weight of the spatial kernel."""
    sg: float = 3.0
    """Standard deviation of the spatial kernel in pixels."""
    iterations: int = 10
    """Number of mean field steps."""
    norm: Literal["after", "symmetric", "none"] = "symmetric"
    """Division of each kernel K by its row sums D: D^-1 K ("after", DeepLab's code), D^-1/2 K
    D^-1/2 ("symmetric", pydensecrf's default) or none."""
    self_term: Literal["include", "exclude"] = "include"
    """Whether a pixel sends a message to itself: yes in all public code, no in the paper. Behind a
    network it must: the fast sums are too inexact without."""


class _Kernel(NamedTuple):
    """One kernel before normalisation."""

    weight: float | jax.Array
    filter: Callable[[jax.Array], jax.Array]  # Multiplies [..., N, C] by K.
    self_weight: float | jax.Array  # The diagonal of K, one number or [..., N, 1].


def exact_mean_field(logits: jax.Array, image: jax.Array, params: CrfParams) -> jax.Array:
    """Returns the log-probabilities of each pixel's labels, from sums over all pairs of pixels.

    Memory and time grow with the square of the number of pixels. Use it for tests and small crops.

    Args:
      logits: [H, W, C], log-probabilities up to a constant per pixel.
      image: [H, W, 3] RGB, 0 to 255.
      params: the CRF.

    Returns:
      [H, W, C] float32 log-probabilities.

    Raises:
      ValueError: the shapes do not match.
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
      sizes: int [B, 2], height and width of each image, which lies in the upper left corner. Pixels
        beyond it do not affect it. None: the images fill their arrays.

    Returns:
      [B, H, W, C] float32 log-probabilities; values beyond `sizes` are meaningless.

    Raises:
      ValueError: the shapes do not match.
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
        # Positions last: points that are close in the last features are close in memory.
        features = jnp.concatenate([colours / params.srgb, places / params.sxy], axis=-1)
        features = features.reshape(height * width, -1)
        # Padding gets the features of the first pixel, so that it adds no corners to the lattice.
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
    """Returns function(values) without fusing it with the operations around it.

    On CPUs, XLA fuses the filters with their surroundings, in spite of barriers. It then computes
    the exponentials again for each tap, and each filter three times for one softmax. It does not
    fuse across branches. This branch tests whether the values are NaN, in which case the result is
    NaN too.
    """
    is_number = values[0, 0] == values[0, 0]
    return lax.cond(is_number, function, lambda v: jnp.full_like(v, jnp.nan), values)


def _blur(values: jax.Array, size: tuple[int, int], sigma: float) -> jax.Array:
    """Returns sum_j exp(-|p_i - p_j|^2 / (2 sigma^2)) v_j for values v; [H W, C] to [H W, C].

    The sum omits pixels farther than 4 sigma along an axis.
    """
    (height, width), channels = size, values.shape[1]
    radius = math.ceil(4 * sigma)
    taps = [math.exp(-((i / sigma) ** 2) / 2) for i in range(-radius, radius + 1)]
    # As a matrix of rows, since XLA generates the fastest code for long inner loops. The barriers
    # keep it from testing for padding at every tap.
    length = width * channels
    values = values.reshape(height, length)
    padded = lax.optimization_barrier(jnp.pad(values, ((0, 0), (radius * channels,) * 2)))
    along = (tap * padded[:, i * channels :][:, :length] for i, tap in enumerate(taps))
    values = functools.reduce(jnp.add, along)
    padded = lax.optimization_barrier(jnp.pad(values, ((radius, radius), (0, 0))))
    across = (tap * padded[i : i + height] for i, tap in enumerate(taps))
    return functools.reduce(jnp.add, across).reshape(height * width, channels)


def _features(height: int, width: int, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the positions [H, W, 2] in pixels and the colours [H, W, 3]."""
    rows, columns = jnp.arange(height, dtype=jnp.float32), jnp.arange(width, dtype=jnp.float32)
    places = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1)
    return places, image.astype(jnp.float32)


def _gaussian(features: jax.Array) -> jax.Array:
    """Returns exp(-|f_i - f_j|^2 / 2) for all pairs, [N, D] to [N, N]."""
    # Axis by axis, since |a|^2 + |b|^2 - 2 a b would lose small distances to rounding.
    columns = jnp.moveaxis(features, -1, 0)
    distances = sum((f[:, None] - f[None, :]) ** 2 for f in columns)
    return jnp.exp(-distances / 2)


def _iterate(
    logits: jax.Array, mask: jax.Array, kernels: Sequence[_Kernel], params: CrfParams
) -> jax.Array:
    """Runs mean field on [..., N, C] logits; pixels whose mask [..., N, 1] is 0 do not count."""
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
    """Returns the kernel as `self_term` and `norm` define it."""

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
