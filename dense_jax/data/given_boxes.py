"""Boxes for images, such as a detector's: a JSON file in COCO's format.

The file holds a list of results, [{"file_name": "a.jpg", "category_id": 3, "bbox": [x, y, width,
height]}], such as `predict` writes, or annotations: {"images": [{"id", "file_name"}],
"annotations": [{"image_id", "category_id", "bbox"}]}. Categories are class ids. Boxes are in
pixels; x and y are the distances of the top left corner from the top left of the image.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dense_jax.errors import UserError

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
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): write {_FORM}") from error
    try:
        names = None
        if isinstance(entries, Mapping):
            names = {image["id"]: image["file_name"] for image in entries["images"]}
            entries = entries["annotations"]
        boxes_by_name: dict[str, list[tuple[list[float], int]]] = {
            name: [] for name in (names or {}).values()
        }
        for entry in entries:
            name = entry["file_name"] if names is None else names[entry["image_id"]]
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


def _box(entry: Mapping[str, Any], num_classes: int, path: pathlib.Path) -> tuple[list[float], int]:
    class_id, bbox = entry["category_id"], entry["bbox"]
    is_box = isinstance(bbox, list) and len(bbox) == 4
    is_box = is_box and all(isinstance(x, int | float) and math.isfinite(x) for x in bbox)
    if not is_box or min(bbox[2:]) <= 0:
        raise UserError(f"{path}: bbox {bbox}: give [x, y, width, height] with sides above 0")
    if type(class_id) is not int or not 1 <= class_id < num_classes:
        raise UserError(
            f"{path}: category_id {class_id!r} is no class of this run: give 1 to {num_classes - 1}"
        )
    x, y, width, height = bbox
    return [x, y, x + width, y + height], class_id
