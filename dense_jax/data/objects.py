"""The objects of an image: their boxes, classes, masks or polygons, and keypoints.

Datasets give them in one of three forms: as ``annotations`` (COCO, where objects overlap), as
``instances``, a map with the number of an object for each pixel, or as a label alone, whose
connected parts are then the objects. Pixels connect over edges, not over corners.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from PIL import Image
from scipy import ndimage

from dense_jax.data import rle
from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.dataset import Example
from dense_jax.data.keypoints import Keypoints
from dense_jax.data.polygons import Polygons
from dense_jax.ops import boxes as box_ops

_LEAST_SIDE = 1.0  # Pixels; what a crop leaves of an object is dropped if a side is shorter.


@dataclasses.dataclass(frozen=True)
class Objects:
    """The N objects of one image.

    Attributes:
      boxes: float32 [N, 4]; see `dense_jax.ops.boxes`.
      classes: int32 [N], class ids as in the label.
      ids: int64 [N], the number of each object in its map, or the id of its annotation.
      crowd: bool [N], whether the "object" is a region of many objects that nobody separated.
      areas: float32 [N], pixels of each object, as annotated.
      masks: bool [N, H, W], or N run-length codes (see `dense_jax.data.rle`), or None.
      keypoints: of the N objects, or None.
      polygons: of the N objects, or None; crowds have no part.
    """

    boxes: np.ndarray
    classes: np.ndarray
    ids: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: np.ndarray | Sequence[Mapping[str, Any]] | None = None
    keypoints: Keypoints | None = None
    polygons: Polygons | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, index: np.ndarray) -> Self:
        """Returns the objects at some indices, or where a bool [N] is True."""
        places = np.flatnonzero(index) if index.dtype == bool else index
        masks: Any = self.masks
        if masks is not None:
            is_array = isinstance(masks, np.ndarray)
            masks = masks[places] if is_array else [masks[i] for i in places]
        fields: dict[str, Any] = {name: getattr(self, name)[places] for name in _DTYPES}
        keypoints = self.keypoints and self.keypoints.select(places)
        polygons = self.polygons and self.polygons.select(places)
        return type(self)(**fields, masks=masks, keypoints=keypoints, polygons=polygons)

    def mask(self, index: int) -> np.ndarray:
        """Returns the pixels of an object, labelled or not, bool [H, W]."""
        assert self.masks is not None
        mask = self.masks[index]
        return mask if isinstance(mask, np.ndarray) else rle.decode(mask)

    def decoded(self, size: tuple[int, int]) -> Self:
        """Returns the objects with masks as bool [N, H, W], for an image of `size`."""
        if isinstance(self.masks, np.ndarray):
            return self
        masks = [self.mask(i) for i in range(len(self))]
        return dataclasses.replace(
            self, masks=np.stack(masks) if masks else np.zeros((0, *size), bool)
        )

    def flip(self, width: int) -> Self:
        """Returns the objects of an image of `width` that was flipped left and right."""
        boxes = np.stack([width - self.boxes[:, 2], self.boxes[:, 1],
                          width - self.boxes[:, 0], self.boxes[:, 3]], axis=1)  # fmt: skip
        masks = self._bitmaps()
        return dataclasses.replace(
            self,
            boxes=boxes,
            masks=None if masks is None else masks[:, :, ::-1],
            keypoints=self.keypoints and self.keypoints.flip(width),
            polygons=self.polygons and self.polygons.flip(width),
        )

    def resize(self, old: tuple[int, int], new: tuple[int, int]) -> Self:
        """Returns the objects of an image that was resized from one (height, width) to another.

        Masks take the nearest pixel. Areas scale with the image.
        """
        factors = new[0] / old[0], new[1] / old[1]
        masks = self._bitmaps()
        if masks is not None:
            # Pillow's own True is the byte 255, which XLA takes for -1: masks go as numbers.
            resized = [
                Image.fromarray(m.view(np.uint8)).resize(new[::-1], Image.Resampling.NEAREST)
                for m in masks
            ]
            masks = np.array([np.asarray(m) for m in resized], bool).reshape(-1, *new)
        areas = (self.areas * (factors[0] * factors[1])).astype(np.float32)
        return dataclasses.replace(
            self,
            boxes=box_ops.scale(self.boxes, factors),
            areas=areas,
            masks=masks,
            keypoints=self.keypoints and self.keypoints.scale(factors),
            polygons=self.polygons and self.polygons.scale(factors),
        )

    def window(self, top: int, left: int, size: tuple[int, int]) -> Self:
        """Returns the objects in a window of an image, cut at its edges.

        Objects of which less than a pixel is left are dropped. Areas shrink as the masks do, or
        else as the boxes.
        """
        shift = np.array([left, top, left, top], np.float32)
        boxes = box_ops.clip(self.boxes - shift, size)
        before, after = box_ops.area(self.boxes), box_ops.area(boxes)
        areas, masks = self.areas * after / np.maximum(before, 1e-9), self._bitmaps()
        inside = box_ops.min_side(boxes) >= _LEAST_SIDE
        if masks is not None:
            cut = np.zeros((len(masks), *size), bool)
            y, x = max(top, 0), max(left, 0)
            part = masks[:, y : max(top + size[0], 0), x : max(left + size[1], 0)]
            cut[:, y - top : y - top + part.shape[1], x - left : x - left + part.shape[2]] = part
            masks, areas = cut, np.count_nonzero(cut, axis=(1, 2))
            inside &= areas > 0
        moved = dataclasses.replace(
            self,
            boxes=boxes,
            areas=areas.astype(np.float32),
            masks=masks,
            keypoints=self.keypoints and self.keypoints.window(top, left, size),
            polygons=self.polygons and self.polygons.shift(top, left),
        )
        return moved.select(inside)

    def _bitmaps(self) -> np.ndarray | None:
        if self.masks is not None and not isinstance(self.masks, np.ndarray):
            raise ValueError("masks are run-length codes: read objects with ReadObjects first")
        return self.masks

    def to_json(self) -> str:
        """Returns text that `from_json` reads; masks as run-length codes."""
        masks = self.masks
        if isinstance(masks, np.ndarray):
            masks = [rle.encode(mask) for mask in masks]
        fields = {name: getattr(self, name).tolist() for name in _DTYPES} | {"masks": masks}
        for name in ("keypoints", "polygons"):  # texts without any stay as they were
            if (own := getattr(self, name)) is not None:
                fields[name] = own.to_json()
        return json.dumps(fields, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads the result of `to_json`."""
        fields = json.loads(text)
        arrays = {name: np.array(fields[name], dtype) for name, dtype in _DTYPES.items()}
        arrays["boxes"] = arrays["boxes"].reshape(-1, 4)
        keypoints, polygons = fields.get("keypoints"), fields.get("polygons")
        return cls(
            **arrays,
            masks=fields["masks"],
            keypoints=keypoints and Keypoints.from_json(keypoints),
            polygons=None if polygons is None else Polygons.from_json(polygons),
        )


_DTYPES = {
    "boxes": np.float32, "classes": np.int32, "ids": np.int64, "crowd": bool, "areas": np.float32,
}  # fmt: skip


def without_classes(boxes: np.ndarray) -> Objects:
    """Returns boxes [N, 4] of class 0, without masks."""
    zeros: dict[str, Any] = {name: np.zeros(len(boxes), dtype) for name, dtype in _DTYPES.items()}
    zeros["boxes"] = boxes.astype(np.float32)
    return Objects(**zeros)


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
    example: Example,
    background: int | None,
    *,
    min_side: int = 1,
    background_votes: bool = False,
    masks: bool = True,
    keypoints: bool = False,
    polygons: bool = False,
) -> Objects:
    """Returns the objects of an example, in the order of their numbers.

    The class of an object is that of most of its pixels. An object without a vote is left out.

    Args:
      example: with "label", and perhaps "annotations", or "instances" and "keypoints".
      background: class that is not an object; None: every class has objects.
      min_side: objects with a shorter side than this, in pixels, are left out.
      background_votes: whether background pixels of an object vote too. An object whose majority is
        background is left out.
      masks: whether to return masks, bool [N, H, W].
      keypoints: whether to return keypoints, if the example has them.
      polygons: whether to return polygons in place of masks, if the example has them.
    """
    label = example["label"]
    if (given := example.get("annotations")) is not None:
        has_polygons = polygons and given.polygons is not None
        masks = masks and not has_polygons
        objects = given.decoded(label.shape) if masks else dataclasses.replace(given, masks=None)
        objects = objects if keypoints else dataclasses.replace(objects, keypoints=None)
        objects = objects if has_polygons else dataclasses.replace(objects, polygons=None)
        return objects.select(box_ops.min_side(objects.boxes) >= min_side)
    numbered = number(example, background)
    boxes, classes, numbers, areas = [], [], [], []
    for index, slices in enumerate(ndimage.find_objects(numbered), 1):
        if slices is None or min(s.stop - s.start for s in slices) < min_side:
            continue
        own = numbered[slices] == index
        votes = np.bincount(label[slices][own], minlength=IGNORE_LABEL + 1)
        votes[IGNORE_LABEL] = 0
        if background is not None and not background_votes:
            votes[background] = 0
        if not votes.any() or votes.argmax() == background:
            continue
        rows, columns = slices
        boxes.append((columns.start, rows.start, columns.stop, rows.stop))
        classes.append(votes.argmax())
        numbers.append(index)
        areas.append(np.count_nonzero(own))
    ids = np.array(numbers, np.int64)
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(classes, np.int32),
        ids,
        np.zeros(len(ids), bool),
        np.array(areas, np.float32),
        numbered == ids[:, None, None] if masks else None,
        example["keypoints"].select(ids) if keypoints and "keypoints" in example else None,
    )
