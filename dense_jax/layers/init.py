"""Initialisers under the names that papers use; each is `(key, shape, dtype) -> array`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Initializer = Callable[..., jax.Array]

zero = jax.nn.initializers.zeros
he = jax.nn.initializers.he_normal()  # Variance 2 / fan-in (He et al., arXiv:1502.01852, Eq. 10).
# Variance 2 / fan-out: torchvision's initialisation of residual networks.
he_fan_out = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
xavier = jax.nn.initializers.xavier_uniform()  # Variance 2 / (fan-in + fan-out) (Glorot, Bengio).
xavier_fan_in = jax.nn.initializers.lecun_uniform()  # Variance 1 / fan-in: Caffe's filler "xavier".
normal = jax.nn.initializers.normal  # normal(standard_deviation)


def bilinear_taps(size: int) -> np.ndarray:
    """Returns the 1-D bilinear filter of `size` taps, float64, for a stride of ceil(size / 2).

    a[x] = 1 - |x - c| / f with f = ceil(size / 2) and c = f - 1/2 (even size) or f - 1 (odd size),
    so that the taps that reach each output sum to 1. Early versions of Caffe's bilinear filler used
    a wrong centre for some sizes (such as 7 and 63). This is the corrected formula.
    """
    factor = (size + 1) // 2
    centre = factor - 1 if size % 2 else factor - 0.5
    return 1 - np.abs(np.arange(size) - centre) / factor


def bilinear() -> Initializer:
    """Returns an initialiser of up-convolution kernels that interpolate bilinearly.

    Kernels are [kh, kw, 1, C], depthwise (groups = C), or [kh, kw, C, C], dense with the filter on
    the diagonal. Any other shape raises `ValueError`.

    Reference: Long, Shelhamer, Darrell, CVPR 2015, arXiv:1411.4038, Section 3.3.
    """

    def init(key: jax.Array | None, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        del key  # Nothing is random.
        if len(shape) != 4 or shape[2] not in (1, shape[3]):
            raise ValueError(f"A bilinear kernel is [kh, kw, 1, C] or [kh, kw, C, C], not {shape}.")
        taps = np.multiply.outer(bilinear_taps(shape[0]), bilinear_taps(shape[1]))
        mixing = np.ones(shape[2:]) if shape[2] == 1 else np.eye(shape[3])
        return jnp.asarray(np.multiply.outer(taps, mixing), dtype)

    return init


def identity(num_classes: int, noise: float = 0.0) -> Initializer:
    """Returns an initialiser of kernels that pass on the scores of each class.

    Input channel a of A belongs to class floor(a C / A) of C, and output channel b of B to class
    floor(b C / B). Centre taps between channels of the same class are C / B. All other weights are
    zero, or noise with standard deviation `noise` C / B. A layer with B > C channels thus passes on
    B / C copies of C / B times each score, and the last layer, with C channels, adds the copies.
    Together they are the identity for scores that no ReLU sets to zero.

    Without noise the copies of a class remain equal, because their gradients are equal.

    Reference: Yu, Koltun, ICLR 2016, arXiv:1511.07122, Equations 4 and 5. The standard deviation
    follows the authors' release (fyu/dilation: network.py), which divides 0.01 by the number of
    copies.

    Args:
      num_classes: C.
      noise: standard deviation of the other weights, as a share of the centre taps.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        height, width, *channels = shape
        if len(channels) != 2 or any(n % num_classes for n in channels):
            raise ValueError(
                f"Kernels {shape} are not [kh, kw, A, B] with multiples A and B of {num_classes}."
            )
        if height % 2 == 0 or width % 2 == 0:
            raise ValueError(f"A kernel of {height} x {width} has no centre.")
        classes = [np.arange(n) * num_classes // n for n in channels]
        taps = np.zeros(shape, bool)
        taps[height // 2, width // 2] = classes[0][:, None] == classes[1]
        share = num_classes / channels[1]
        others = noise * share * jax.random.normal(key, shape, dtype) if noise else 0
        return jnp.where(taps, jnp.asarray(share, dtype), jnp.asarray(others, dtype))

    return init
