"""The objects of an example: which pixels they have, their tight boxes and their classes.

Objects are those of "instances" where the example has this map; else they are the connected parts
of its label. Pixels connect over edges, not over corners.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.dataset import Example


class Objects(NamedTuple):
    """The N objects of one image.

    Attributes:
      boxes: float32 [N, 4], tight; see `dense_jax.ops.boxes`.
      classes: int32 [N], class ids as in the label.
      numbers: int32 [N], the number of each object in `map`.
      map: [H, W] integers, the number of the object of each pixel, 0 = no object. Objects that are
        left out of the lists above keep their numbers here.
    """

    boxes: np.ndarray
    classes: np.ndarray
    numbers: np.ndarray
    map: np.ndarray

    def mask(self, index: int) -> np.ndarray:
        """Returns the pixels of an object, labelled or not, bool [H, W]."""
        return self.map == self.numbers[index]


def number(example: Example, background: int | None, *, by_class: bool = True) -> np.ndarray:
    """Returns the number of the object of each pixel, integers [H, W], 0 = no object.

    Args:
      example: its "instances" are returned as they are.
      background: class whose pixels belong to no object; None: each labelled pixel has an object.
      by_class: pixels connect only within a class; else neighbours of two classes are one object.
    """
    if "instances" in example:
        return example["instances"]
    label = example["label"]
    is_object = label != IGNORE_LABEL
    if background is not None:
        is_object &= label != background
    if not by_class:
        return ndimage.label(is_object)[0]
    result = np.zeros(label.shape, np.int32)
    for value in np.unique(label[is_object]):
        parts, _ = ndimage.label(label == value)
        np.add(result, parts + result.max(), out=result, where=parts > 0)
    return result


def find(
    example: Example, background: int | None, *, min_side: int, background_votes: bool = False
) -> Objects:
    """Returns the objects of an example, in the order of their numbers.

    The class of an object is that of most of its pixels. An object without a vote is left out.

    Args:
      example: with "label" and perhaps "instances".
      background: class that is not an object; None: every class has objects.
      min_side: objects with a shorter side than this, in pixels, are left out.
      background_votes: whether background pixels of an object vote too. An object whose majority is
        background is left out.
    """
    numbered, label = number(example, background), example["label"]
    boxes, classes, numbers = [], [], []
    for index, slices in enumerate(ndimage.find_objects(numbered), 1):
        if slices is None or min(s.stop - s.start for s in slices) < min_side:
            continue
        votes = np.bincount(label[slices][numbered[slices] == index], minlength=IGNORE_LABEL + 1)
        votes[IGNORE_LABEL] = 0
        if background is not None and not background_votes:
            votes[background] = 0
        if not votes.any() or votes.argmax() == background:
            continue
        rows, columns = slices
        boxes.append((columns.start, rows.start, columns.stop, rows.stop))
        classes.append(votes.argmax())
        numbers.append(index)
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(classes, np.int32),
        np.array(numbers, np.int32),
        numbered,
    )
