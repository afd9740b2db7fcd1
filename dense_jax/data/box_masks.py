"""Boxes around objects and the mask of the object in each: the targets of box networks.

Boxes are those of `dense_jax.ops.boxes`. A heat map is a grid of equal cells over a box. Class 0 is
background; a network's category c, counted from 0, is class c + 1.

Reference: Hariharan, Arbelaez, Girshick, Malik, CVPR 2015, arXiv:1411.5752; target size, IoU of the
training boxes, ignored pixels and area weights follow bharath272/sds.
"""

import dataclasses

import numpy as np

from dense_jax.data import objects as object_lib
from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.dataset import Example
from dense_jax.data.objects import Objects
from dense_jax.ops import boxes as box_ops

_MIN_SIDE = 4  # Objects with a side shorter than this (pixels) are mostly occluded; skip them.
_NUM_TRIES = 20  # Random boxes for each object; the first with enough overlap is taken.
_AREA = 224**2  # Boxes of at least this area (pixels) have weight 1.


def find_objects(example: Example) -> Objects:
    """Returns the objects whose masks a box network learns; class 0 is background."""
    return object_lib.find(example, 0, min_side=_MIN_SIDE)


def jitter(boxes: np.ndarray, min_iou: float, rng: np.random.Generator) -> np.ndarray:
    """Moves all four edges of each box at random; the IoU with the box stays at least `min_iou`.

    The results stand for proposals and detections.

    Args:
      boxes: [N, 4].
      min_iou: least intersection over union; 1 keeps the boxes.
      rng: source of randomness.

    Returns:
      float32 [N, 4].
    """
    reach = (1 - min_iou) / 2  # IoU is `min_iou` if two opposite edges move inwards by this.
    sides = np.tile(box_ops.sides(boxes), 2)
    shifts = rng.uniform(-reach, reach, (_NUM_TRIES, *boxes.shape))
    result = boxes.astype(np.float32)
    for box, tries in zip(result, (boxes + shifts * sides).swapaxes(0, 1), strict=True):
        good = box_ops.iou(tries, box[None])[:, 0] >= min_iou
        if good.any():
            box[:] = tries[good.argmax()]
    return result


def targets(mask: np.ndarray, label: np.ndarray, box: np.ndarray, size: int) -> np.ndarray:
    """Returns the target of a heat map over a box, int32 [size, size].

    Each cell takes the pixel at its centre: 1 inside the object, 0 outside, -1 where the pixel is
    not labelled or is outside the image.

    Args:
      mask: bool [H, W], the object.
      label: [H, W], class ids.
      box: [4].
      size: number of cells along each side.
    """
    truth = np.where(label == IGNORE_LABEL, -1, mask.astype(np.int32))
    truth = np.pad(truth, 1, constant_values=-1)
    steps = np.arange(0.5, size) / size
    columns, rows = (
        np.clip(np.floor(low + steps * (high - low)).astype(int) + 1, 0, length - 1)
        for low, high, length in zip(box[:2], box[2:], truth.shape[::-1], strict=True)
    )
    return truth[np.ix_(rows, columns)]


def paste(heatmap: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns an array of `size` with a heat map [S, S] in its box and 0 outside.

    Each pixel takes the cell that contains its centre.
    """
    result = np.zeros(size, heatmap.dtype)
    inside, cells = [], []
    for low, high, length in zip(box[:2], box[2:], size[::-1], strict=True):
        at = np.floor((np.arange(0.5, length) - low) / (high - low) * len(heatmap)).astype(int)
        inside.append(np.flatnonzero((at >= 0) & (at < len(heatmap))))
        cells.append(at[inside[-1]])
    result[np.ix_(inside[1], inside[0])] = heatmap[np.ix_(cells[1], cells[0])]
    return result


@dataclasses.dataclass(frozen=True)
class SampleBoxes:
    """Draws boxes around the objects of an example; the last transform.

    Adds "boxes" float32 [N, 4], "categories" int32 [N], "targets" int32 [N, S, S] (see `targets`),
    "box_weights" float32 [N] and "box_valid" bool [N]. An image without objects has N invalid
    boxes.

    Attributes:
      num_boxes: N; objects are drawn with replacement.
      heatmap: S.
      min_iou: least IoU of a box with the tight box of its object.
      weigh: the weight of a box is min(area / 224^2, 1), else 1.
    """

    num_boxes: int
    heatmap: int
    min_iou: float
    weigh: bool

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with its boxes."""
        found, shape = find_objects(example), (self.num_boxes, self.heatmap, self.heatmap)
        if not len(found.boxes):
            height, width = example["label"].shape
            return {
                **example,
                "boxes": np.tile(np.array([0, 0, width, height], np.float32), (self.num_boxes, 1)),
                "categories": np.zeros(self.num_boxes, np.int32),
                "targets": np.full(shape, -1, np.int32),
                "box_weights": np.zeros(self.num_boxes, np.float32),
                "box_valid": np.zeros(self.num_boxes, bool),
            }
        chosen = rng.integers(len(found.boxes), size=self.num_boxes)
        boxes = jitter(found.boxes[chosen], self.min_iou, rng)
        areas = box_ops.area(boxes)
        return {
            **example,
            "boxes": boxes,
            "categories": found.classes[chosen] - 1,
            "targets": np.stack(
                [
                    targets(found.mask(i), example["label"], box, self.heatmap)
                    for i, box in zip(chosen, boxes, strict=True)
                ]
            ),
            "box_weights": np.minimum(areas / _AREA, 1) if self.weigh else np.ones_like(areas),
            "box_valid": np.ones(self.num_boxes, bool),
        }
