"""Dropout that does not depend on the distribution of a batch over devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class Dropout(nn.Module):
    """Zeroes each value with probability `rate` in training; scales others by 1 / (1 - rate).

    The mask of an example depends only on the "dropout" key and on the example's index in the whole
    batch. N devices with the same key thus drop the same values as one device.

    Attributes:
      rate: probability of zero, in [0, 1).
      axis_name: the mapped axis over which the batch is split. None: outside of `pmap`.

    Reference: Srivastava et al., JMLR 15, 2014.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, ...] to [B, ...]; it is the identity unless `train`."""
        if not 0 <= self.rate < 1:
            raise ValueError(f"The dropout rate lies in [0, 1); received {self.rate}.")
        if not train or self.rate == 0 or self.is_initializing():
            return x
        first = 0 if self.axis_name is None else lax.axis_index(self.axis_name) * x.shape[0]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            self.make_rng("dropout"), first + jnp.arange(x.shape[0])
        )
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0)
