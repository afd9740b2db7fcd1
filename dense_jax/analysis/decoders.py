"""Training and measurement of small decoders that enlarge pictures (`checkerboard.Decoder`)."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dense_jax.analysis import checkerboard
from dense_jax.analysis.checkerboard import Decoder

FACTOR = 4  # A decoder doubles the size twice.


class Trained(NamedTuple):
    """A decoder with its variables before and after training."""

    model: Decoder
    before: Any
    after: Any


class Outputs(NamedTuple):
    """Outputs of a decoder, [B, H, W, 3].

    Attributes:
      before: for constant inputs, before training.
      after: for constant inputs, after training.
      picture: for a picture, after training.
    """

    before: jax.Array
    after: jax.Array
    picture: jax.Array


def pictures(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns images with values between -0.5 and 0.5, at reduced and at full size.

    Args:
      images: uint8 [H, W, 3] each. All have the same size, a multiple of FACTOR.

    Returns:
      float32 [N, H / FACTOR, W / FACTOR, 3] (means over FACTOR x FACTOR pixels) and [N, H, W, 3].
    """
    large = np.stack(images).astype(np.float32) / 255 - 0.5
    num, height, width, channels = large.shape
    blocks = (num, height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels)
    return large.reshape(blocks).mean((2, 4)), large


# These functions are compiled once for each model, not for each seed.
@functools.partial(jax.jit, static_argnums=0)
def _init(model: Decoder, key: jax.Array, x: jax.Array) -> Any:
    return model.init(key, x)


@functools.partial(jax.jit, static_argnums=0)
def _decode(model: Decoder, variables: Any, x: jax.Array) -> Any:
    return model.apply(variables, x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    optimizer: optax.GradientTransformation, model: Decoder, variables, state, small, large
) -> tuple[Any, Any]:
    """Takes one step on the mean squared error; returns the new variables and optimiser state."""

    def loss(variables):
        return jnp.mean(jnp.square(model.apply(variables, small) - large))

    updates, state = optimizer.update(jax.grad(loss)(variables), state)
    return optax.apply_updates(variables, updates), state


def train(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    small: np.ndarray,
    large: np.ndarray,
    *,
    seed: int,
    num_steps: int,
    batch_size: int,
) -> Trained:
    """Trains a decoder to enlarge pictures.

    Args:
      model: the decoder.
      optimizer: the optimiser. A new object compiles the step again, so share one between seeds.
      small: pictures [N, h, w, 3].
      large: the same pictures [N, FACTOR h, FACTOR w, 3].
      seed: seed of the initial variables and of the order of the pictures.
      num_steps: number of training steps.
      batch_size: number of pictures in a step.
    """
    first = _init(model, jax.random.key(seed), small[:1])
    rng, variables, state = np.random.default_rng(seed), first, optimizer.init(first)
    for _ in range(num_steps):
        chosen = rng.integers(len(small), size=batch_size)
        variables, state = _step(optimizer, model, variables, state, small[chosen], large[chosen])
    return Trained(model, first, variables)


def measure(decoder: Trained, small: np.ndarray, large: np.ndarray) -> dict[str, float]:
    """Measures a decoder on `checkerboard.probes` and on validation pictures.

    Args:
      decoder: the decoder.
      small: pictures [N, h, w, 3] that were not used for training.
      large: the same pictures [N, FACTOR h, FACTOR w, 3].

    Returns:
      "parameters" is the number of parameters. "untrained_NAME" and "trained_NAME" are the values
      NAME of `checkerboard.measure`. "psnr" is that of the enlarged pictures, in decibels.
    """
    model, before, after = decoder
    row: dict[str, float] = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(before))}
    for state, variables in (("untrained", before), ("trained", after)):
        levels = checkerboard.measure(functools.partial(_decode, model, variables), FACTOR)
        row |= {f"{state}_{name}": level for name, level in levels.items()}
    error = np.mean(np.square(_decode(model, after, small) - large))
    return row | {"psnr": float(-10 * np.log10(error))}


def outputs(decoder: Trained, small: np.ndarray) -> Outputs:
    """Returns the outputs of a decoder for constant inputs and for pictures [N, h, w, 3]."""
    model, before, after = decoder
    constant = checkerboard.probes()["constant"]
    return Outputs(
        _decode(model, before, constant),
        _decode(model, after, constant),
        _decode(model, after, small),
    )
