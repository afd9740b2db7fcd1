"""Normalisation layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dense_jax.layers import init


class BatchNorm(nn.Module):
    """Batch normalisation of [..., C], channel by channel; parameters "scale" and "bias" [C].

    y = scale (x - mean) / sqrt(var + epsilon) + bias, computed in float32 or wider and returned in
    the dtype of x. In training mean and variance are those of the batch, over all devices, and
    their running averages are kept as "mean" and "var" in "batch_stats"; otherwise these are used.
    The variance is the biased one, also in the running average, where torch takes the unbiased.

    Attributes:
      frozen: always use the running averages and leave them, scale and bias as they are: no
        gradient reaches these parameters.
      momentum: decay of the running averages; 0.9 here is 0.1 in torch.
      epsilon: added to the variance.
      axis_name: the mapped axis over which the batch is split; None outside of `pmap`.
      scale_init: initialiser of the scale.

    Reference: Ioffe, Szegedy, ICML 2015, arXiv:1502.03167, Algorithms 1 and 2.
    """

    frozen: bool = False
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    scale_init: init.Initializer = jax.nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [..., C] to [..., C]."""
        shape = (x.shape[-1],)
        # 8-bit mantissas make no variance.
        dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        scale = self.param("scale", self.scale_init, shape).astype(dtype)
        bias = self.param("bias", init.zero, shape).astype(dtype)
        running = (
            self.variable("batch_stats", "mean", jnp.zeros, shape),
            self.variable("batch_stats", "var", jnp.ones, shape),
        )
        if self.frozen:
            scale, bias = lax.stop_gradient((scale, bias))
        y = x.astype(dtype)
        if train and not self.frozen and not self.is_initializing():
            statistics = _statistics(y, self.axis_name)
            for average, new in zip(running, statistics, strict=True):
                new = new.astype(average.value.dtype)
                average.value = self.momentum * average.value + (1 - self.momentum) * new
        else:
            statistics = tuple(average.value.astype(dtype) for average in running)
        mean, var = statistics
        channels = (1,) * (x.ndim - 1) + shape
        factor = (scale * lax.rsqrt(var + self.epsilon)).reshape(channels)
        y = (y - mean.reshape(channels)) * factor + bias.reshape(channels)
        return y.astype(x.dtype)


def _statistics(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Returns mean and biased variance of each channel over all devices."""
    axes = tuple(range(x.ndim - 1))
    moments = jnp.stack([jnp.mean(x, axes), jnp.mean(x * x, axes)])
    mean, square = moments if axis_name is None else lax.pmean(moments, axis_name)
    return mean, jnp.maximum(square - mean * mean, 0)  # rounding may leave less than nothing


class LocalResponseNorm(nn.Module):
    """Divides each value by a power of the mean square of the neighbouring channels.

    y_c = x_c / (k + alpha / size * sum_j x_j^2)^beta with j over the `size` channels around c.
    `alpha` is divided by `size` as in Caffe and torch, not as in Krizhevsky et al. (NIPS 2012,
    Section 3.3).

    Attributes:
      size: number of channels in the sum; odd.
      alpha: weight of the mean square.
      beta: exponent.
      k: the constant term.
    """

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., C] to [..., C]."""
        if self.size % 2 == 0:
            raise ValueError(f"The window of channels must be odd; received {self.size}.")
        half, channels = self.size // 2, x.shape[-1]
        squares = jnp.pad(x * x, [(0, 0)] * (x.ndim - 1) + [(half, half)])
        total = sum(squares[..., j : j + channels] for j in range(self.size))
        return x * (self.k + self.alpha / self.size * total) ** -self.beta
