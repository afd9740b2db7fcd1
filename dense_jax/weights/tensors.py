"""What the readers of weight files share: mapped files, arrays on access, one form of error.

A header can declare anything, so readers compare its sizes with the size of the file before they
make an array. Arrays on a mapped file take address space only: the system reads a page when a value
on it is used, and may drop the page again. Nobody may truncate the file while arrays use it.
"""

import math
import mmap
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dense_jax.errors import UserError

_LONGEST_REASON = 200
_LONGEST_VALUE = 1000
_MOST_AXES = 32
_LARGEST = 2**48  # bound on any size, in values or bytes: far above files, far below int64
# Compressed weights grow at most by this factor; only files of zeros grow more, up to `_FEW` bytes.
_MOST_EXPANSION, _FEW = 64, 2**24

# Readers record what they did under these keys; the metadata of a file may not use them.
REMARKS = ("container", "prefix", "left out")


class Lazy(Mapping[str, np.ndarray]):
    """Names to arrays; each access makes the array anew.

    Attributes:
      makers: name to a function that makes the array, or raises UserError.
      outlines: name to a cheaper function for `outline`, where there is one.
    """

    def __init__(
        self,
        makers: Mapping[str, Callable[[], np.ndarray]],
        outlines: Mapping[str, Callable[[], np.ndarray]] | None = None,
    ):
        self.makers, self.outlines = makers, outlines or {}

    def outline(self, name: str) -> np.ndarray:
        """Returns an array of zeros with the shape and the dtype of an array."""
        array = self.outlines.get(name, self.makers[name])()
        return empty(array.shape, array.dtype)

    def renamed(self, old_names: Mapping[str, str]) -> "Lazy":
        """Returns some of these arrays under new names: {new: old}."""
        return Lazy(
            {new: self.makers[old] for new, old in old_names.items()},
            {new: self.outlines[old] for new, old in old_names.items() if old in self.outlines},
        )

    def __getitem__(self, name: str) -> np.ndarray:
        return self.makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self.makers

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array of zeros that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def said(info: Mapping[Any, Any]) -> dict[str, str]:
    """Returns the metadata of a file without the keys that only its reader may set."""
    return {str(key): str(info[key])[:_LONGEST_VALUE] for key in info if key not in REMARKS}


def damaged(path: pathlib.Path, reason: object) -> UserError:
    """Returns the error for a file that breaks the rules of its format."""
    line = " ".join(str(reason).split())[:_LONGEST_REASON]
    return UserError(f"{path} is damaged ({line}): download or save it again")


def most_unpacked(packed: int) -> int:
    """Returns the largest size that `packed` compressed bytes may have after decompression."""
    return max(_FEW, _MOST_EXPANSION * packed)


def map_file(path: pathlib.Path) -> mmap.mmap:
    """Maps a file: returns its bytes, read-only, and reads them on access.

    Raises:
      UserError: the file is empty or cannot be opened.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give another file") from error


def view(
    data: mmap.mmap,
    start: int,
    dtype: np.dtype,
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
) -> np.ndarray:
    """Returns a read-only array on mapped bytes, and does not read them.

    Args:
      data: a file that `map_file` maps.
      start: byte of the first value.
      dtype: dtype of the values, with their byte order.
      shape: shape of the array.
      strides: number of values from one entry to the next along each axis; None for an array in
        row-major order.

    Raises:
      ValueError: the array reaches beyond the file, or it repeats values and would be larger than
        the file as a copy.
    """
    if len(shape) > _MOST_AXES or (strides is not None and len(strides) != len(shape)):
        raise ValueError("a shape has too many axes, or another number of strides")
    if not all(type(n) is int and 0 <= n < _LARGEST for n in (start, *shape, *(strides or ()))):
        raise ValueError("a size is not a whole number of 0 or more")
    num_bytes = math.prod(shape) * dtype.itemsize
    if start + num_bytes > len(data) and (strides is None or num_bytes > len(data)):
        raise ValueError(f"an array has {num_bytes} bytes and the file {len(data)}")
    if not num_bytes:
        return np.zeros(shape, dtype)
    steps = None if strides is None else [step * dtype.itemsize for step in strides]
    return np.ndarray(shape, dtype, buffer=data, offset=start, strides=steps)
