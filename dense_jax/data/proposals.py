"""Proposals from a file: boxes that may hold objects, such as those of selective search.

The file is JSON, ``{"image name": [[x0, y0, x1, y1], ...], ...}``, the best boxes first. Names are
those of the dataset (usually the file name without its suffix); numbers are pixels, as in
`dense_jax.ops.boxes`.
"""

import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from dense_jax.errors import UserError

_Boxes = TypeVar("_Boxes")
_FORM = '{"image name": [[x0, y0, x1, y1], ...], ...}'


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the boxes of each image, float64 [N, 4].

    Raises:
      UserError: the file cannot be read, or a box is not valid.
    """
    try:
        entries = json.loads(pathlib.Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): the file of proposals must be there"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): write {_FORM}") from error
    if not isinstance(entries, dict):
        raise UserError(f"{path} has no object: write {_FORM}")
    return {name: _parse(name, boxes, path) for name, boxes in entries.items()}


@functools.lru_cache(maxsize=2)
def read_once(path: str) -> dict[str, np.ndarray]:
    """Returns the result of `read`, which stays in memory."""
    return read(path)


def of_image(table: Mapping[str, _Boxes], name: str) -> _Boxes:
    """Returns the boxes of an image.

    Raises:
      UserError: there is no list with its name.
    """
    if name not in table:
        raise UserError(f"--proposals: no boxes for image {name!r}; add its list to the file")
    return table[name]


def _parse(name: str, boxes: Any, path: str | os.PathLike[str]) -> np.ndarray:
    try:
        array = np.array(boxes, float).reshape(-1, 4)
        if not (array[:, :2] < array[:, 2:]).all() or not np.isfinite(array).all():
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path}: a box of {name!r} is not [x0, y0, x1, y1] with x0 < x1, y0 < y1; correct it"
        ) from error
    return array
