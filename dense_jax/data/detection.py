"""Images and objects as detectors are trained on them: read, resized, in a fixed number of slots.

    [ReadObjects(), ResizeShortSide((800,), 1333), Normalise(...), RandomFlip(), PadObjects(100)]

Pipelines pad images of a batch to one shape afterwards.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from dense_jax.data import objects as object_lib
from dense_jax.data import proposals as proposal_file
from dense_jax.data.dataset import Example
from dense_jax.data.padded import Size
from dense_jax.data.transforms import resize_example
from dense_jax.ops import boxes as box_ops
from dense_jax.ops.masks import cells_of

Rounding = Literal["nearest", "down"]
_CORNERS = 512  # of the polygons of an object


@dataclasses.dataclass(frozen=True)
class ReadObjects:
    """Finds the objects of an example; the first transform.

    Attributes:
      background: class that is not an object.
      masks: whether objects have masks.
      keypoints: whether they have keypoints.
      polygons: whether they have polygons in place of masks, where the dataset has them.
      min_side: objects with a shorter side than this, in pixels, are left out.
    """

    background: int | None = 0
    masks: bool = False
    keypoints: bool = False
    polygons: bool = False
    min_side: int = 1

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """Returns the example with "objects", and without the form in which they came."""
        objects = object_lib.find(
            example,
            self.background,
            min_side=self.min_side,
            masks=self.masks,
            keypoints=self.keypoints,
            polygons=self.polygons,
        )
        forms = ("instances", "keypoints", "annotations")
        rest = {k: x for k, x in example.items() if k not in forms}
        return {**rest, "objects": objects}


def short_side_size(size: Size, short: int, longest: int, rounding: Rounding = "nearest") -> Size:
    """Returns the size of an image whose shorter side becomes ``short``, the longer <= ``longest``.

    Args:
      size: height and width.
      short: pixels of the shorter side.
      longest: limit of the longer side, in pixels.
      rounding: of both sides. "nearest" as in detectron2 (half up); "down" as in torchvision, in
        double precision, which makes 799 of some sides that should become 800.
    """
    scale = min(short / min(size), longest / max(size))
    add = 0.5 if rounding == "nearest" else 0.0
    height, width = (max(1, int(side * scale + add)) for side in size)
    return height, width


@dataclasses.dataclass(frozen=True)
class ResizeShortSide:
    """Resizes a uint8 image so that its shorter side has one of some lengths, drawn at random.

    Attributes:
      short: possible lengths of the shorter side, in pixels.
      longest: limit of the longer side, in pixels.
      rounding: see `short_side_size`.
      antialias: see `dense_jax.data.transforms.resize_image`.
    """

    short: Sequence[int]
    longest: int
    rounding: Rounding = "nearest"
    antialias: bool = True

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the resized example."""
        short = (
            self.short[int(rng.integers(len(self.short)))] if len(self.short) > 1 else self.short[0]
        )
        size = short_side_size(example["image"].shape[:2], short, self.longest, self.rounding)
        return resize_example(example, size, antialias=self.antialias)

    def largest(self, size: Size) -> Size:
        """Returns the largest size that an image of ``size`` can get."""
        return short_side_size(size, max(self.short), self.longest, self.rounding)


@dataclasses.dataclass(frozen=True)
class LargeScaleJitter:
    """Resizes a uint8 image by a random factor, relative to the largest that fits a size.

    `RandomCrop` to the same size comes after `Normalise`.

    Attributes:
      size: height and width of training images.
      low: least factor.
      high: largest factor.
      antialias: see `dense_jax.data.transforms.resize_image`.

    Reference: Ghiasi et al., "Simple copy-paste is a strong data augmentation method for instance
    segmentation", CVPR 2021, arXiv:2012.07177, Section 3 (0.1 to 2).
    """

    size: Size
    low: float = 0.1
    high: float = 2.0
    antialias: bool = True

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the resized example."""
        height, width = example["image"].shape[:2]
        factor = rng.uniform(self.low, self.high)
        factor *= min(self.size[0] / height, self.size[1] / width)
        size = max(1, round(height * factor)), max(1, round(width * factor))
        return resize_example(example, size, antialias=self.antialias)


@dataclasses.dataclass(frozen=True)
class GiveProposals:
    """Adds the proposals of an image as "proposals", which move with it; comes first.

    Attributes:
      path: the file with the boxes of each image; see `dense_jax.data.proposals`.
      count: of more boxes, the first ones are kept.
    """

    path: str
    count: int

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """Returns the example with its proposals.

        Raises:
          UserError: the file cannot be read, or lacks the image.
        """
        table = proposal_file.read_once(self.path)
        boxes = proposal_file.of_image(table, example["name"])[: self.count]
        return {**example, "proposals": object_lib.without_classes(boxes)}


@dataclasses.dataclass(frozen=True)
class PadProposals:
    """Turns proposals into arrays of a fixed number of slots; one of the last transforms.

    "proposals" becomes a dict of "boxes" float32 [R, 4], cut at the edges of the image, and "valid"
    bool [R]; boxes outside of the image are not valid.

    Attributes:
      slots: R.
    """

    slots: int

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """Returns the example with arrays in place of proposals."""
        boxes = example["proposals"].boxes[: self.slots]
        boxes = box_ops.clip(boxes, example["image"].shape[:2])
        free = self.slots - len(boxes)
        padded = {
            "boxes": np.pad(boxes, [(0, free), (0, 0)]),
            "valid": np.pad(box_ops.min_side(boxes) > 0, (0, free)),
        }
        return {**example, "proposals": padded}


@dataclasses.dataclass(frozen=True)
class PadObjects:
    """Turns objects into arrays of a fixed number of slots; the last transform.

    "objects" becomes a dict of "boxes" float32 [G, 4], "classes" int32 [G] and "valid" bool [G], if
    there are masks also "masks" bool [G, H, W] or "cells" uint8 [G, S, S], of polygons "corners"
    float32 [G, 512, 2] and "parts" int32 [G, 512] (see `Polygons.slots`), and of keypoints
    "keypoints" float32 [G, K, 3], which are not labelled in free slots. Crowds are left out, since
    nobody knows where their objects end. Of more objects than slots, the largest are kept.

    Attributes:
      slots: G.
      cells: S, cells along each side of an object's box, which take the place of its mask; see
        `dense_jax.ops.masks.cells_of`. None keeps whole masks.
    """

    slots: int
    cells: int | None = None

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """Returns the example with arrays in place of objects."""
        objects = example["objects"]
        objects = objects.select(~objects.crowd)
        if len(objects) > self.slots:
            largest = np.argsort(-objects.areas, kind="stable")[: self.slots]
            objects = objects.select(np.sort(largest))
        free = self.slots - len(objects)
        arrays = {"boxes": objects.boxes, "classes": objects.classes}
        side = self.cells
        if objects.masks is not None and side is None:
            arrays["masks"] = objects.masks
        elif objects.masks is not None and side is not None:
            each = zip(objects.masks, objects.boxes, strict=True)
            cells = [cells_of(mask, box, side) for mask, box in each]
            arrays["cells"] = np.array(cells, np.uint8).reshape(-1, side, side)
        if objects.polygons is not None:
            arrays["corners"], arrays["parts"] = objects.polygons.slots(_CORNERS)
        if objects.keypoints is not None:
            arrays["keypoints"] = objects.keypoints.points
        padded = {
            key: np.pad(array, [(0, free)] + [(0, 0)] * (array.ndim - 1))
            for key, array in arrays.items()
        }
        padded["valid"] = np.arange(self.slots) < len(objects)
        return {**example, "objects": padded}
