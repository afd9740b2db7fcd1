"""A trained network as one function of images, for other programs.

The function includes what `dense_jax.infer.predictor` does to each image of a folder: normalise,
pad, predict, cut. It can be traced with symbolic sizes (`jax.export`).
"""

from collections.abc import Callable

import jax

from dense_jax.data.normalise import normalise_batch
from dense_jax.data.padded import run_padded


def program(
    answer: Callable[..., dict[str, jax.Array]], normalisation: str
) -> Callable[..., dict[str, jax.Array]]:
    """Returns a function of RGB images [B, H, W, 3] with values from 0 to 255, any H, W >= 1.

    Images are padded at the bottom and on the right with the mean colour, to multiples of 32
    pixels. Answers of the size of the padded images are cut to the size of the images.

    Args:
      answer: (normalised images, sizes before padding, *further inputs) -> arrays by name.
      normalisation: of the images that the network expects.
    """

    def run(images: jax.Array, *inputs: jax.Array) -> dict[str, jax.Array]:
        def padded(images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
            return answer(images, sizes, *inputs)

        return run_padded(padded, normalise_batch(images, normalisation))

    return run
