"""Normalisation layers."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dense_jax.errors import refuse
from dense_jax.ops.precision import at_least_float32


class BatchNorm(nn.BatchNorm):
    """Flax's batch normalisation of [..., C], computed in float32 or wider, with a frozen mode.

    The result has the dtype of x. The running variance averages the biased variance; that of torch
    averages the unbiased one. Momentum is the decay of the averages, which torch calls
    1 - momentum.

    Attributes:
      frozen: use the running averages in training too, and keep averages, scale and bias constant.
        No gradient reaches these parameters.

    Reference: Ioffe, Szegedy, ICML 2015, arXiv:1502.03167, Algorithms 1 and 2.
    """

    frozen: bool = False

    def __post_init__(self) -> None:
        """Makes frozen layers always use the running averages."""
        self.use_running_average = self.frozen or self.use_running_average
        super().__post_init__()

    def param(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the parameter; if the layer is frozen, no gradient reaches it."""
        value = super().param(*args, **kwargs)
        return lax.stop_gradient(value) if self.frozen else value

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        """Maps [..., C] to [..., C].

        Raises:
          UserError: in training, a channel has a single value, whose variance is zero: the running
            variance would then suit no image.
        """
        is_still = options.get("use_running_average", self.use_running_average)
        if not (is_still or self.is_initializing()):
            devices = lax.psum(1, self.axis_name) if self.axis_name else 1
            refuse(
                math.prod(x.shape[:-1]) * devices == 1,
                f"batch normalisation {self.name} sees one value per channel in training: give a "
                "--batch-size of 2 or more for each micro-batch, or larger images",
            )
        # The mantissa of bfloat16 is too short for a variance.
        return super().__call__(at_least_float32(x), **options).astype(x.dtype)


class LocalResponseNorm(nn.Module):
    """Divides each value by a power of the mean square of the neighbouring channels.

    y_c = x_c / (k + alpha / size * sum_j x_j^2)^beta with j over the `size` channels around c.
    `alpha` is divided by `size` as in Caffe and torch, but not in Krizhevsky et al. (NIPS 2012,
    Section 3.3).

    Attributes:
      size: number of channels in the sum, odd.
      alpha: weight of the mean square.
      beta: the exponent.
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


class LocalResponseNormInChannel(nn.Module):
    """Divides each value by a power of the mean square of its neighbours in the same channel.

    y_ij = x_ij / (1 + alpha / size^2 * sum_uv x_uv^2)^beta with u, v over the size x size window
    around i, j; values outside of the map are zero. This is Caffe's LRN with
    ``norm_region: WITHIN_CHANNEL``.

    Attributes:
      size: side of the window, odd.
      alpha: weight of the mean square.
      beta: the exponent.

    Reference: rbgirshick/py-faster-rcnn: models/pascal_voc/ZF (the values).
    """

    size: int = 3
    alpha: float = 5e-5
    beta: float = 0.75

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H, W, C]."""
        if self.size % 2 == 0:
            raise ValueError(f"The side of the window must be odd; received {self.size}.")
        half = self.size // 2
        squares = jnp.pad(x * x, [(0, 0), (half, half), (half, half), (0, 0)])
        height, width = x.shape[1:3]
        total = sum(
            squares[:, i : i + height, j : j + width]
            for i in range(self.size)
            for j in range(self.size)
        )
        return x * (1.0 + self.alpha / self.size**2 * total) ** -self.beta
