"""What is too delicate for narrow floats: scores, sums, statistics."""

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns x of the same shape in float32, or in float64 if that is what it is."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)
