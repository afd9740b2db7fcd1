"""Normalisation layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp


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
