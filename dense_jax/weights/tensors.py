"""What readers of weight files share: mapped files, arrays made on demand, one kind of complaint.

A header may say anything, so readers compare what it declares with the size of the file before
they make an array of it. Arrays on a mapped file cost address space only: the system reads a page
when a value on it is used, and may drop it again. The file must not be cut while they live.
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
_LARGEST = 2**48  # of any size, in values or bytes: far above files, far below int64
# Packed weights unpack to this many times their bytes; only a few zeros unpack to more.
_MOST_EXPANSION, _FEW = 64, 2**24

# Keys under which readers say what they did; a file may not say it for them.
REMARKS = ("container", "prefix", "left out")


class Lazy(Mapping[str, np.ndarray]):
    """Names to arrays, where each is made when it is asked for, and not kept.

    Attributes:
      makers: name to a function that makes the array; raises UserError where it cannot.
      outlines: the same for what `outline` returns, where that takes less.
    """

    def __init__(
        self,
        makers: Mapping[str, Callable[[], np.ndarray]],
        outlines: Mapping[str, Callable[[], np.ndarray]] | None = None,
    ):
        self.makers, self.outlines = makers, outlines or {}

    def outline(self, name: str) -> np.ndarray:
        """Returns an array of the same shape and dtype, without the values."""
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
    """Returns what a file says of itself, without what only its reader may say."""
    return {str(key): str(info[key])[:_LONGEST_VALUE] for key in info if key not in REMARKS}


def damaged(path: pathlib.Path, reason: object) -> UserError:
    """Returns the error for a file that does not hold what its format promises."""
    line = " ".join(str(reason).split())[:_LONGEST_REASON]
    return UserError(f"{path} is damaged ({line}): download or save it again")


def most_unpacked(packed: int) -> int:
    """Returns the most bytes that so many packed ones may become."""
    return max(_FEW, _MOST_EXPANSION * packed)


def map_file(path: pathlib.Path) -> mmap.mmap:
    """Returns the bytes of a file, read-only and not yet read.

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
    """Returns a read-only array on mapped bytes, without reading them.

    Args:
      data: a file, as of `map_file`.
      start: byte of the file at which the first value lies.
      dtype: kind of the values, with their byte order.
      shape: the array's shape.
      strides: values from one entry to the next along each axis; None for rows one after another.

    Raises:
      ValueError: the array does not lie in the file, or repeats values so often that a copy of it
        would be larger than the file.
    """
    if len(shape) > _MOST_AXES or (strides is not None and len(strides) != len(shape)):
        raise ValueError("a shape of too many axes, or with other steps")
    if not all(type(n) is int and 0 <= n < _LARGEST for n in (start, *shape, *(strides or ()))):
        raise ValueError("a size that is no whole number of 0 or more")
    num_bytes = math.prod(shape) * dtype.itemsize
    if start + num_bytes > len(data) and (strides is None or num_bytes > len(data)):
        raise ValueError(f"an array of {num_bytes} bytes in a file of {len(data)}")
    if not num_bytes:
        return np.zeros(shape, dtype)
    steps = None if strides is None else [step * dtype.itemsize for step in strides]
    return np.ndarray(shape, dtype, buffer=data, offset=start, strides=steps)
