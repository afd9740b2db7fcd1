"""A finished network as one function of pictures, as other programs want it.

What `dense_jax.infer.predictor` does to the images of a folder is inside: normalisation, padding,
class map. All of it can be traced with sizes left open (`jax.export`).
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dense_jax.data.transforms import NORMALISATIONS
from dense_jax.infer.tiles import PredictFn

Scores = Literal["probabilities", "logits"]

SIZE_MULTIPLE = 32  # As `predictor.predict_folder` pads to.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def normalise(images: jax.Array, name: str) -> jax.Array:
    """Does to a batch what `dense_jax.data.transforms.Normalise` does to an image.

    Args:
      images: RGB [B, H, W, 3] of values from 0 to 255, integers or not.
      name: a name of `NORMALISATIONS`.

    Returns:
      Float32 [B, H, W, 3 or 1].
    """
    images = images.astype(jnp.float32)
    mean, std = (
        np.array(values, np.float32).reshape(1, 1, 1, -1) for values in NORMALISATIONS[name]
    )
    if mean.size == 1:
        images = jnp.sum(images * _LUMA.reshape(1, 1, 1, 3), axis=-1, keepdims=True)
    if name == "grey_image":
        mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
        std = jnp.maximum(jnp.std(images, axis=(1, 2, 3), keepdims=True), 1)
    return (images - mean) / std


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
        batch, height, width, _ = images.shape
        # As whole multiples, from which sizes further on follow even where a side is left open.
        rows, columns = (
            -(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE - side for side in (height, width)
        )
        padded = _extend(normalise(images, normalisation), rows, columns)
        size = jnp.array([height, width], jnp.int32)
        sizes = jnp.broadcast_to(size.reshape(1, 2), (batch, 2))
        logits = _extend(predict(variables, padded, sizes), -rows, -columns).astype(jnp.float32)
        values = logits if scores == "logits" else jax.nn.softmax(logits)
        return {"labels": jnp.argmax(logits, axis=-1).astype(jnp.uint8), scores: values}

    return label


def _extend(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Adds zeros at the bottom and right of [B, H, W, C], or cuts there."""
    edges = [(0, 0, 0), (0, rows, 0), (0, columns, 0), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), edges)
