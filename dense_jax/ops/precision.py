"""Precision for values that need more than 16 bits: scores, sums, statistics."""

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns x in float32, or unchanged if it is float64."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)
