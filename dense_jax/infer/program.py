"""A finished network as one function of pictures, as other programs want it.

What `dense_jax.infer.predictor` does to the images of a folder is inside: normalisation, padding
and cutting. All of it can be traced with sizes left open (`jax.export`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dense_jax.data.transforms import NORMALISATIONS

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


def program(
    answer: Callable[..., dict[str, jax.Array]], normalisation: str
) -> Callable[..., dict[str, jax.Array]]:
    """Returns a function of pictures, RGB [B, H, W, 3] of values from 0 to 255, any H, W >= 1.

    Pictures are padded at the bottom and right with the mean colour to multiples of 32 pixels, and
    answers of the size of the padded pictures are cut to the pictures'.

    Args:
      answer: (normalised images, sizes before padding, and what else there is) -> arrays by name.
      normalisation: what the images are brought to.
    """

    def run(images: jax.Array, *inputs: jax.Array) -> dict[str, jax.Array]:
        batch, height, width, _ = images.shape
        # As whole multiples, from which sizes further on follow even where a side is left open.
        rows, columns = (
            -(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE - side for side in (height, width)
        )
        padded = _extend(normalise(images, normalisation), rows, columns)
        size = jnp.array([height, width], jnp.int32)
        sizes = jnp.broadcast_to(size.reshape(1, 2), (batch, 2))
        answers = answer(padded, sizes, *inputs)
        return {
            name: _extend(x, -rows, -columns) if x.shape[1:3] == padded.shape[1:3] else x
            for name, x in answers.items()
        }

    return run


def _extend(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Adds zeros at the bottom and right of [B, H, W, ...], or cuts there."""
    edges = [(0, 0, 0), (0, rows, 0), (0, columns, 0)] + [(0, 0, 0)] * (x.ndim - 3)
    return lax.pad(x, jnp.zeros((), x.dtype), edges)
