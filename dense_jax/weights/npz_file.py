"""Reads NumPy's .npz files, which are zip files of arrays, and rejects anything that could run.

`numpy.savez` stores arrays uncompressed, and the reader maps them. `numpy.savez_compressed`
compresses them, and the reader decompresses each one on access.

Reference: NumPy Enhancement Proposal 1, "A simple file format for NumPy arrays".
"""

import functools
import io
import math
import mmap
import pathlib
import tokenize
import zlib
from collections.abc import Mapping

import numpy as np

from dense_jax.errors import UserError
from dense_jax.weights import zips
from dense_jax.weights.tensors import Lazy, damaged, empty, map_file, view

_SUFFIX = ".npy"
_MOST_HEADER_BYTES = 1 << 16
_NUMBERS = "biufc"  # kinds of dtypes; others are text, dates, records, and objects, which run code


def read_tensors(path: pathlib.Path) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    """Returns the arrays of an .npz file by name; reads their headers, and values on access.

    Raises:
      UserError: the file is damaged, or holds anything but arrays of numbers.
    """
    data = map_file(path)
    found = zips.members(path, data)
    others = [name for name in found if not name.endswith(_SUFFIX)]
    if others:
        raise UserError(
            f"{path} holds {others[0]!r}, which is not an array: give an .npz of arrays"
        )
    makers, outlines = (
        {
            name.removesuffix(_SUFFIX): functools.partial(read, path, data, name, member)
            for name, member in found.items()
        }
        for read in (_read, functools.partial(_read, outline=True))
    )
    return Lazy(makers, outlines), {}


def _read(
    path: pathlib.Path, data: mmap.mmap, name: str, member: zips.Member, outline: bool = False
) -> np.ndarray:
    try:
        content = io.BytesIO(_head(data, member))
        shape, is_fortran, dtype = _header(content)
        if dtype.kind not in _NUMBERS:
            raise UserError(
                f"{path}: {name!r} has no numbers but {dtype}: save it as float32 or integers"
            )
        start = content.tell()
        num_bytes = member.size - start
        if dtype.itemsize * math.prod(shape) != num_bytes:
            raise ValueError(f"the shape {shape} does not match {num_bytes} bytes")
        if outline:
            return empty(shape, dtype)
        if member.is_packed:
            order = "F" if is_fortran else "C"
            array = np.ndarray(shape, dtype, member.unpack(data), start, order=order)
            array.flags.writeable = False
            return array
        array = view(data, member.start + start, dtype, shape[::-1] if is_fortran else shape)
        return array.T if is_fortran else array
    except (ValueError, TypeError, OverflowError) as error:
        raise damaged(path, f"{name!r}: {error}") from error


def _head(data: mmap.mmap, member: zips.Member) -> bytes:
    """Returns the first bytes of a member, decompressed: as many as a header may have."""
    start, size = member.start, min(member.packed, _MOST_HEADER_BYTES)
    head = data[start : start + size]
    if not member.is_packed:
        return head
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(head, _MOST_HEADER_BYTES)
    except zlib.error as error:
        raise ValueError(str(error)) from error


def _header(content: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(content)
    try:
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(content)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(content)
    except (SyntaxError, tokenize.TokenError, KeyError, RecursionError, MemoryError) as error:
        raise ValueError("the header does not describe an array") from error
    raise ValueError(f"unknown version {version} of the array format")
