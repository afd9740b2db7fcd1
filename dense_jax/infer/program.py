"""A finished network as one function of pictures, as other programs want it.

What `dense_jax.infer.predictor` does to the images of a folder is inside: normalisation, padding,
class map. All of it can be traced with sizes left open (`jax.export`).
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
    """Returns what labels pictures: RGB [B, H, W, 3] of values from 0 to 255, any H, W >= 1.

    Its result has "labels", uint8 [B, H, W], and `scores`, float32 [B, H, W, classes], by its name.
    Pictures are padded at the bottom and right with the mean colour to multiples of 32 pixels.

    Args:
      predict: how the network is used, with (variables, images, sizes).
      variables: of the network.
      normalisation: what it expects of images.
      scores: its logits or their softmax.
    """

    def label(images: jax.Array) -> dict[str, jax.Array]:
        normalised = normalise_batch(images, normalisation)
        logits = run_padded(functools.partial(predict, variables), normalised).astype(jnp.float32)
        values = logits if scores == "logits" else jax.nn.softmax(logits)
        return {"labels": jnp.argmax(logits, axis=-1).astype(jnp.uint8), scores: values}

    return label
