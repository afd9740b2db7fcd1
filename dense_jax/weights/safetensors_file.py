"""Reads safetensors files: eight bytes of length, a JSON header, then the arrays in sequence.

Nothing in this format can run. Arrays have the same bytes in the file as in memory, so the reader
maps them. The safetensors package copies each array for NumPy; a map needs no memory.

Reference: huggingface/safetensors:README.md, section "Format".
"""

import json
import mmap
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dense_jax.weights.tensors import damaged, map_file, said, view

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
_METADATA = "__metadata__"

_KINDS: dict[object, np.dtype] = {
    "BOOL": np.dtype("?"),
    **{f"{kind}{8 * n}": np.dtype(f"<{kind.lower()}{n}") for kind in "IU" for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"<f{n}") for n in (2, 4, 8)},
    "C64": np.dtype("<c8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def read_tensors(path: pathlib.Path) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    """Returns the mapped arrays of a safetensors file by name, and its metadata.

    Raises:
      UserError: the file is damaged or has a dtype that NumPy lacks.
    """
    data = map_file(path)
    try:
        length = int.from_bytes(data[:_LENGTH_BYTES], "little")
        first = _LENGTH_BYTES + length
        if length > _MOST_HEADER_BYTES or first > len(data):
            raise ValueError(f"the header has {length} bytes and the file {len(data)}")
        header = json.loads(data[_LENGTH_BYTES:first].decode(), object_pairs_hook=_unique)
        info = header.pop(_METADATA, {})
        if not all(type(text) is str for text in info.values()):
            raise ValueError("the metadata are not text")
        tensors = {name: _array(data, first, name, item) for name, item in header.items()}
        _check(sorted(item["data_offsets"] for item in header.values()), len(data) - first)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(path, error) from error
    return tensors, said(info)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name stands twice in the header")
    return names


def _array(data: mmap.mmap, first: int, name: str, item: dict[str, Any]) -> np.ndarray:
    dtype, (begin, end) = _KINDS.get(item["dtype"]), item["data_offsets"]
    if dtype is None:
        raise ValueError(f"{name!r} has the unknown dtype {item['dtype']!r}")
    array = view(data, first + begin, dtype, item["shape"])
    if array.nbytes != end - begin:
        raise ValueError(f"the shape of {name!r} does not match its bytes")
    return array


def _check(places: list[list[int]], num_bytes: int) -> None:
    """Arrays must follow each other to the end: then no bytes hide and no arrays overlap."""
    begins, ends = [place[0] for place in places], [place[1] for place in places]
    if [*begins, num_bytes] != [0, *ends]:
        raise ValueError("the arrays leave a gap, overlap, or do not end with the file")
