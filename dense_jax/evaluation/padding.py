"""What the padding of images to a few shapes changes in the detections of a network.

Zeros below and beside an image are no longer zeros behind the first layers, so detections near
these two edges depend on how far an image is padded; see `dense_jax.data.padded`.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dense_jax.data.padded import Size
from dense_jax.metrics.detections import Detections

SCORE = 0.5  # Detections above it are compared.
MIN_IOU = 0.9  # A detection stays if one of its class has at least this IoU with it.
EDGE = 32  # Pixels of the network's input, between a box and the lower or right edge.
_NUM_SHAPES, _NUM_IMAGES = 8, 100  # on which it is measured: each shape is compiled

RULE = "zeros pad images below and on the right (eval_shapes=buckets)"


def sample(shapes: Sequence[Size]) -> list[int]:
    """Returns the indices of images on which padding is measured, by the shape of each image.

    They are the first hundred of the eight most frequent shapes.
    """
    frequent = {shape for shape, _ in Counter(shapes).most_common(_NUM_SHAPES)}
    return [i for i, shape in enumerate(shapes) if shape in frequent][:_NUM_IMAGES]


def changes(exact: Detections, padded: Detections, size: Size, input_size: Size) -> np.ndarray:
    """Counts the detections of an image that padding changes.

    Those that score above `SCORE` without more padding are counted. One changes if with it no
    detection above `SCORE` has the same class and an IoU of `MIN_IOU` or more.

    Args:
      exact: the detections of the image, padded no more than the network needs.
      padded: those of the image in a larger shape.
      size: height and width of the image.
      input_size: height and width to which it was resized for the network.

    Returns:
      int [2, 2]: rows for detections near the lower or right edge (see `EDGE`) and for others;
      columns for those that change and for all.
    """
    likely = exact.select(exact.scores > SCORE)
    changed = ~likely.found_in(padded.select(padded.scores > SCORE), MIN_IOU)
    scale = np.divide(input_size, size)[None, ::-1]  # of x and y
    rest = scale * (np.array(size)[None, ::-1] - likely.boxes[:, 2:])
    is_near = (rest < EDGE).any(axis=1)
    groups = (is_near, ~is_near)
    return np.array([[np.sum(changed & own), np.sum(own)] for own in groups], int)


def in_words(counts: np.ndarray, num_images: int) -> str:
    """Returns the counts of `changes`, summed over images, as a sentence."""

    def share(changed: int, number: int) -> str:
        return f"{100 * changed / max(number, 1):.2f} % of {number}"

    near, others = (share(*row) for row in counts.tolist())
    return (
        f"of the detections with a score above {SCORE} this changes {near} within {EDGE} pixels of "
        f"the lower and right edges and {others} elsewhere (IoU below {MIN_IOU}, another class or "
        f"a lower score), in {num_images} images"
    )
