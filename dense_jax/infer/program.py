"""A trained network as one function of images, for other programs.

The function includes what `dense_jax.infer.predictor` does to each image of a folder: normalise,
predict. It can be traced with symbolic sizes (`jax.export`).
"""

from collections.abc import Callable

import jax

from dense_jax.data.normalise import normalise_batch
from dense_jax.data.padded import run_padded


def program(
    answer: Callable[..., dict[str, jax.Array]], normalisation: str, multiple: int = 1
) -> Callable[..., dict[str, jax.Array]]:
    """Returns a function of RGB images [B, H, W, 3] with values from 0 to 255, any H, W >= 1.

    Args:
      answer: (normalised images, sizes before padding, *further inputs) -> arrays by name.
      normalisation: of the images that the network expects.
      multiple: images are padded at the bottom and on the right with the mean colour, to multiples
        of this many pixels; answers of the padded size are cut to the size of the images. 1 does
        not pad.
    """

    def run(images: jax.Array, *inputs: jax.Array) -> dict[str, jax.Array]:
        def padded(images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
            return answer(images, sizes, *inputs)

        return run_padded(padded, normalise_batch(images, normalisation), multiple)

    return run
