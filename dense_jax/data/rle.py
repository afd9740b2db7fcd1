"""Masks as COCO's run lengths: {"size": [height, width], "counts": text}.

Runs go down the columns. The first run is of zeros and may be empty. The text holds each run as a
number in base 32, lowest digit first; from the fourth run on, the number is the difference from the
run two before. Every function also takes counts as bytes, as pycocotools has them, and as a list of
numbers, as annotation files have them for crowds.

Reference: cocodataset/cocoapi, common/maskApi.c; computed by hotcoco, which gives the same runs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hotcoco import mask as coco_mask

Rle = Mapping[str, Any]


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Returns a mask, bool [H, W], as run lengths."""
    return _with_text(coco_mask.encode(np.asfortranarray(mask, bool)))


def decode(rle: Rle) -> np.ndarray:
    """Returns the mask, bool [H, W], of run lengths; pixels after the last run are zero.

    Raises:
      ValueError: the runs do not fit the mask.
    """
    return coco_mask.decode(dict(rle)).astype(bool)


def area(rle: Rle) -> int:
    """Returns the number of pixels of a mask.

    Raises:
      ValueError: the runs do not fit the mask.
    """
    return int(coco_mask.area(dict(rle)))


def to_box(rle: Rle) -> np.ndarray:
    """Returns the tight box of a mask, float32 [4]; zeros for an empty mask.

    Raises:
      ValueError: the runs do not fit the mask.
    """
    x, y, width, height = coco_mask.to_bbox(dict(rle))
    return np.array([x, y, x + width, y + height], np.float32)


def union(rles: Sequence[Rle]) -> dict[str, Any]:
    """Returns the pixels that are in any of some masks of equal size.

    Raises:
      ValueError: the sizes differ, or runs do not fit their mask.
    """
    return _with_text(coco_mask.merge([dict(rle) for rle in rles]))


def from_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> dict[str, Any]:
    """Returns the mask of an object that is drawn as polygons.

    The pixels are those of COCO's tools: corners are rounded to a fifth of a pixel, and the outline
    decides which pixels of a column are inside. Pixels of a scan-line fill differ at the outline.

    Args:
      polygons: the parts of the object; each has corners x0, y0, x1, y1, ... in pixels, where the
        first pixel fills (0, 0, 1, 1). Corners may lie outside the image.
      height: height of the image.
      width: width of the image.

    Raises:
      ValueError: a polygon has fewer than three corners, half a corner, or no finite number.
    """
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon has x and y of three corners or more, got {polygon}")
        if not all(map(math.isfinite, polygon)):
            raise ValueError(f"a polygon has finite corners, got {polygon}")
    parts = [coco_mask.fr_poly(list(polygon), height, width) for polygon in polygons]
    return union(parts) if parts else encode(np.zeros((height, width), bool))


def from_segmentation(
    segmentation: Rle | Sequence[Sequence[float]], height: int, width: int
) -> dict[str, Any]:
    """Returns the mask of the "segmentation" of a COCO annotation: polygons or run lengths.

    Raises:
      ValueError: it does not fit an image of this size; see also `from_polygons`.
    """
    if not isinstance(segmentation, Mapping):
        return from_polygons(segmentation, height, width)
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(
            f"a mask of {segmentation['size']} is not of the image [{height}, {width}]"
        )
    return union([segmentation])


def _with_text(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}
