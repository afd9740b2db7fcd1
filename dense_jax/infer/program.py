"""A trained network as one function of images, for other programs.

The function includes what `dense_jax.infer.predictor` does to each image of a folder: resize,
normalise, pad, predict. It can be traced with symbolic sizes (`jax.export`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.data.normalise import normalise_batch
from dense_jax.data.padded import Size, run_padded
from dense_jax.data.transforms import resize_image
from dense_jax.ops.resize import resize_uint8

Arrays = dict[str, jax.Array]


def program(
    answer: Callable[..., Arrays],
    normalisation: str,
    *,
    padded_side: Callable[[int], int] = lambda side: side,
    input_size: Callable[[Size], Size] = lambda size: size,
    antialias: bool = True,
    in_pixels: Callable[[Arrays, Size], Arrays] = lambda answers, size: answers,
) -> Callable[..., Arrays]:
    """Returns a function of RGB images [B, H, W, 3] with values from 0 to 255, any H, W >= 1.

    Args:
      answer: (normalised images, sizes before padding, *further inputs) -> arrays by name.
      normalisation: of the images that the network expects.
      padded_side: images are padded at the bottom and on the right with the mean colour, to these
        sides; answers of the padded size are cut to the size of the images.
      input_size: the size to which images of a size are resized before.
      antialias: how they are resized; see `dense_jax.data.transforms.resize_image`.
      in_pixels: (answers, size of the images) -> answers in pixels of the images as they came.
    """

    def run(images: jax.Array, *inputs: jax.Array) -> Arrays:
        def padded(images: jax.Array, sizes: jax.Array) -> Arrays:
            return answer(images, sizes, *inputs)

        size = (images.shape[1], images.shape[2])
        resized = _resized(images, input_size(size), antialias)
        answers = run_padded(padded, normalise_batch(resized, normalisation), padded_side)
        return in_pixels(answers, size)

    return run


def _resized(images: jax.Array, size: Size, antialias: bool) -> jax.Array:
    """Resizes as files are: as uint8, to which floats are rounded."""
    if (images.shape[1], images.shape[2]) == size:
        return images
    whole = jnp.clip(jnp.round(images), 0, 255) if images.dtype != jnp.uint8 else images
    first = antialias and _height_is_first((images.shape[1], images.shape[2]), size)
    return resize_uint8(whole.astype(jnp.uint8), size, antialias=antialias, height_first=first)


def _height_is_first(old: Size, new: Size) -> bool:
    """Whether files are resized along their height first, as Pillow does for some sizes.

    The rule is of Pillow's version, so noise decides: whether the width first gives other pixels.
    """
    noise = np.random.default_rng(0).integers(0, 256, (*old, 3), np.uint8)
    width_first = resize_image(resize_image(noise, (old[0], new[1])), new)
    return not np.array_equal(resize_image(noise, new), width_first)
