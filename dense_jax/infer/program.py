"""A trained network as one function of images, for other programs.

The function includes what `dense_jax.infer.predictor` does to each image of a folder: normalise,
pad, predict, take the labels. It can be traced with symbolic sizes (`jax.export`).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dense_jax.data.normalise import normalise_batch
from dense_jax.data.padded import run_padded
from dense_jax.infer.tiles import PredictFn

Scores = Literal["probabilities", "logits"]


def label_fn(
    predict: PredictFn, variables: Any, normalisation: str, scores: Scores = "probabilities"
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """Returns a function of RGB images [B, H, W, 3] with values from 0 to 255, any H, W >= 1.

    Its result has "labels", uint8 [B, H, W], and `scores`, float32 [B, H, W, classes], under its
    name. Images are padded at the bottom and on the right with the mean colour, to multiples of 32
    pixels.

    Args:
      predict: (variables, images, sizes) -> logits.
      variables: of the network.
      normalisation: of the images that the network expects.
      scores: the logits or their softmax.
    """

    def label(images: jax.Array) -> dict[str, jax.Array]:
        normalised = normalise_batch(images, normalisation)
        logits = run_padded(functools.partial(predict, variables), normalised).astype(jnp.float32)
        values = logits if scores == "logits" else jax.nn.softmax(logits)
        return {"labels": jnp.argmax(logits, axis=-1).astype(jnp.uint8), scores: values}

    return label
