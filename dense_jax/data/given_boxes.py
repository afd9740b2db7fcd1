"""Boxes for images, such as a detector's: a JSON file in COCO's format.

The file holds a list of results, [{"file_name": "a.jpg", "category_id": 3, "bbox": [x, y, width,
height]}], such as `predict` writes, or annotations: {"images": [{"id", "file_name"}],
"annotations": [{"image_id", "category_id", "bbox"}]}. Categories are class ids. Boxes are in
pixels; x and y are the distances of the top left corner from the top left of the image.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dense_jax.errors import UserError

_FAR = 1e6  # pixels; no image is as large
_ARRAYS = "give boxes [N, 4], x0 y0 x1 y1 with x0 < x1 and y0 < y1, and classes [N]"
_FORM = '[{"file_name": "a.jpg", "category_id": 1, "bbox": [x, y, width, height]}, ...]'


def read(path: pathlib.Path, num_classes: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns boxes [N, 4], x0 y0 x1 y1, and class ids [N] by the file name of the image.

    Args:
      path: the JSON file.
      num_classes: number of classes; ids are from 1 to below this, and 0 is the background.

    Raises:
      UserError: the file cannot be read, or an entry is no box.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): this run needs a box for each object; "
            f"write the boxes to this file, {_FORM}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}): write {_FORM}") from error
    try:
        names = None
        if isinstance(entries, Mapping):
            names = {image["id"]: image["file_name"] for image in entries["images"]}
            entries = entries["annotations"]
        boxes_by_name: dict[str, list[tuple[list[float], int]]] = {
            name: [] for name in (names or {}).values()
        }
        for name in boxes_by_name:
            _check_name(name, path)
        for entry in entries:
            name = entry["file_name"] if names is None else names[entry["image_id"]]
            _check_name(name, path)
            boxes_by_name.setdefault(name, []).append(_box(entry, num_classes, path))
    except KeyError as error:
        raise UserError(f"{path}: an entry has no {error}: write {_FORM}") from error
    except TypeError as error:
        raise UserError(f"{path} is no list of boxes ({error}): write {_FORM}") from error
    result: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, boxes in boxes_by_name.items():
        file = pathlib.PurePath(name).name
        if file in result:
            raise UserError(
                f"{path}: {name} and another entry have the file name {file}: give each image a "
                "name of its own"
            )
        result[file] = (
            np.array([box for box, _ in boxes], np.float32).reshape(-1, 4),
            np.array([class_id for _, class_id in boxes], np.int32),
        )
    return result


def as_arrays(boxes: Any, classes: Any, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns boxes and classes that a user gave in Python as float32 [N, 4] and int32 [N].

    Args:
      boxes: x0 y0 x1 y1 of each object.
      classes: class ids, one for each box.
      num_classes: number of classes; ids are from 1 to below this, and 0 stands for no object.

    Raises:
      UserError: they are no boxes and classes of the same number of objects.
    """
    try:
        sides, ids = np.asarray(boxes, np.float64), np.asarray(classes)
    except (TypeError, ValueError) as error:  # ragged, or no numbers
        raise UserError(f"boxes and classes are no arrays ({error}): {_ARRAYS}") from error
    sides = sides.reshape(-1, 4) if sides.size == 0 else sides
    ids = ids.astype(np.int32) if ids.size == 0 else ids
    if sides.ndim != 2 or sides.shape[1] != 4 or ids.shape != sides.shape[:1]:
        raise UserError(f"boxes are {list(sides.shape)} and classes {list(ids.shape)}: {_ARRAYS}")
    bad = ~(np.abs(sides) < _FAR).all(1) | (sides[:, 2:] <= sides[:, :2]).any(1)
    if (bad := bad & (ids != 0)).any():
        raise UserError(f"box {sides[bad][0].tolist()} has no area: {_ARRAYS}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"classes are {ids.dtype}: give class ids as integers")
    if (wrong := (ids < 0) | (ids >= num_classes)).any():
        raise UserError(f"class {ids[wrong][0]} is none of this run: give 1 to {num_classes - 1}")
    return sides.astype(np.float32), ids.astype(np.int32)


def _check_name(name: object, path: pathlib.Path) -> None:
    if not isinstance(name, str):
        raise UserError(f"{path}: file_name {name!r} is no text: write {_FORM}")


def _box(entry: Mapping[str, Any], num_classes: int, path: pathlib.Path) -> tuple[list[float], int]:
    class_id, bbox = entry["category_id"], entry["bbox"]
    is_box = isinstance(bbox, list) and len(bbox) == 4
    is_box = is_box and all(type(x) in (int, float) and abs(x) < _FAR for x in bbox)
    if not is_box or min(bbox[2:]) <= 0:
        raise UserError(f"{path}: bbox {bbox}: give [x, y, width, height] with sides above 0")
    if type(class_id) is not int or not 1 <= class_id < num_classes:
        raise UserError(
            f"{path}: category_id {class_id!r} is no class of this run: give 1 to {num_classes - 1}"
        )
    x, y, width, height = bbox
    return [x, y, x + width, y + height], class_id
