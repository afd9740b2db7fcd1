"""Weights in several files: an index beside them says which tensor lies in which file.

    {"weight_map": {"conv1.weight": "model-00001-of-00002.safetensors", ...}}

Reference: huggingface.co/docs/safetensors, "Sharded models"; huggingface_hub writes these names.
"""

import json
import os
import pathlib
import re
from typing import Any

from dense_jax.errors import UserError, stays_inside
from dense_jax.weights.tensors import damaged

INDEX = ".index.json"
_PART = re.compile(r"(?P<name>.+)-(?P<part>\d{1,9})-of-(?P<total>\d{1,9})(?P<suffix>\.\w+)")
_MOST_BYTES, _MOST_FILES = 100_000_000, 1000


def index_in(folder: pathlib.Path) -> pathlib.Path:
    """Returns the index in a folder; of two forms of the same weights, that of safetensors.

    Raises:
      UserError: there is no index, or more than one.
    """
    found = sorted(folder.glob(f"*{INDEX}"))
    found = [path for path in found if path.name.endswith(f".safetensors{INDEX}")] or found
    if not found:
        raise UserError(f"{folder} is not a file: give a file of weights")
    if len(found) > 1:
        raise UserError(f"{folder} holds {found[0].name} and {found[1].name}: give one of them")
    return found[0]


def read_index(index: pathlib.Path) -> dict[str, list[str]]:
    """Returns the names of the files beside an index, each with the names of its tensors.

    Raises:
      UserError: the index cannot be read, is damaged, or names files elsewhere.
    """
    try:
        if index.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES // 10**6} MB")
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not places:
            raise ValueError("it has no weight_map")
        files: dict[str, list[str]] = {}
        for name, file in places.items():
            if not isinstance(file, str) or not stays_inside(file) or "/" in file:
                raise ValueError(f"{name!r} lies in {file!r}, which is no file beside the index")
            files.setdefault(file, []).append(name)
        if len(files) > _MOST_FILES:
            raise ValueError(f"it names more than {_MOST_FILES} files")
    except OSError as error:
        raise UserError(f"{index} cannot be read ({error.strerror}): give another file") from error
    except (ValueError, RecursionError) as error:
        raise damaged(index, error) from error
    return files


def file_beside(index: pathlib.Path, name: str) -> pathlib.Path:
    """Returns a file that an index names.

    Raises:
      UserError: it is missing, or a link leads to another folder. In the cache of the Hub's tools
        both the index and the file are links into one folder.
    """
    path = index.parent / name
    if not os.path.isfile(path):  # unlike pathlib, for any name
        raise UserError(f"{path} is missing, and {index.name} names it: download all of its files")
    if path.resolve().parent not in (index.parent.resolve(), index.resolve().parent):
        raise UserError(f"{path} is a link to another folder: put the file itself there")
    return path


def refuse_part(path: pathlib.Path) -> None:
    """Raises a UserError if a file is by its name one of several, and thus not all of the weights.

    Raises:
      UserError: it is; the message says what to give.
    """
    found = _PART.fullmatch(path.name)
    if found and int(found["total"]) > 1:
        index = path.with_name(f"{found['name']}{found['suffix']}{INDEX}")
        remedy = f"give {index}" if index.is_file() else f"download {index.name} and all parts too"
        raise UserError(f"{path} is part {int(found['part'])} of {int(found['total'])}: {remedy}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name stands twice")
    return names
