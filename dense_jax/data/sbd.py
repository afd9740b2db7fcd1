"""Reads the files of the Semantic Boundaries Dataset, MATLAB files of version 5.

A file in ``cls`` holds the 1x1 struct ``GTcls``, whose field ``Segmentation`` is a uint8 matrix of
class ids; a file in ``inst`` holds ``GTinst``, whose field of this name has object numbers. Only
this field is read, and every length in the file is checked against the bytes that are there:
SciPy's reader trusts them, and a damaged file can end the process by a segmentation fault.
"""

import math
import pathlib
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from dense_jax.errors import UserError

# Type codes of elements, and classes of matrices.
_INT8, _UINT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 2, 5, 6, 14, 15
_STRUCT, _UINT8_MATRIX = 2, 9

_HEADER = 128  # bytes
_VERSION = 0x0100
_LARGEST = 2**26  # bytes of an unpacked variable; those of SBD have below 2**20


def read_class_map(data: bytes, path: pathlib.Path, name: bytes = b"GTcls") -> np.ndarray:
    """Returns the class ids of a file of SBD, uint8 [H, W]; ``path`` is for messages.

    ``name`` is that of the struct; b"GTinst" returns object numbers.

    Raises:
      UserError: the bytes are no such file, or damaged.
    """
    try:
        return _segmentation(data, name)
    except (ValueError, struct.error, zlib.error):
        kind = "a class" if name == b"GTcls" else "an object"
        raise UserError(f"{path}: not {kind} file of SBD, or damaged; restore it") from None


def _segmentation(data: bytes, wanted: bytes) -> np.ndarray:
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128], "")
    if not order or struct.unpack_from(f"{order}H", data, 124) != (_VERSION,):
        raise ValueError("another format or version")
    # All variables are unpacked first, so that a file that was cut off is damaged, wherever.
    for body in list(_variables(data[_HEADER:], order)):
        matrix_class, _, name, parts = _matrix(body, order)
        if (matrix_class, name) == (_STRUCT, wanted):
            return _field(parts, b"Segmentation", order)
    raise ValueError(f"no {wanted!r}")


def _variables(data: bytes, order: str) -> Iterator[bytes]:
    """Yields the content of each variable, compressed or not."""
    for kind, body in _elements(data, order):
        if kind == _COMPRESSED:
            unpack = zlib.decompressobj()
            unpacked = unpack.decompress(body, _LARGEST)
            if not unpack.eof:
                raise ValueError("truncated or too large")
            yield _next(_elements(unpacked, order), _MATRIX)
        elif kind == _MATRIX:
            yield body


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yields the type and the content of each element."""
    start = 0
    while start < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, start)
        begin = start + 8
        if kind >> 16:  # up to four bytes share the tag with their number and type
            kind, size, begin = kind & 0xFFFF, kind >> 16, start + 4
        body = data[begin : begin + size]
        if len(body) < size or (begin == start + 4 and size > 4):
            raise ValueError("truncated")
        yield kind, body
        start = begin + size + (0 if kind == _COMPRESSED else -(begin + size - start) % 8)


def _matrix(
    body: bytes, order: str
) -> tuple[int, tuple[int, ...], bytes, Iterator[tuple[int, bytes]]]:
    """Returns the class, the shape and the name of a matrix, and its remaining elements."""
    parts = _elements(body, order)
    flags = _next(parts, _UINT32)
    dimensions = _next(parts, _INT32)
    name = _next(parts, _INT8)
    shape = struct.unpack(f"{order}{len(dimensions) // 4}i", dimensions)
    return struct.unpack(f"{order}II", flags)[0] & 0xFF, shape, name, parts


def _next(parts: Iterator[tuple[int, bytes]], kind: int) -> bytes:
    found, body = next(parts, (None, b""))
    if found != kind:
        raise ValueError(f"an element of type {found} in place of {kind}")
    return body


def _field(parts: Iterator[tuple[int, bytes]], wanted: bytes, order: str) -> np.ndarray:
    """Returns a field of a 1x1 struct that is a uint8 matrix [H, W]."""
    (width,) = struct.unpack(f"{order}i", _next(parts, _INT32))
    text = _next(parts, _INT8)
    if width < 1:
        raise ValueError("names without letters")
    names = [text[i : i + width].split(b"\0")[0] for i in range(0, len(text), width)]
    for name in names:
        body = _next(parts, _MATRIX)
        if name == wanted:
            matrix_class, shape, _, inner = _matrix(body, order)
            pixels = _next(inner, _UINT8)
            if matrix_class != _UINT8_MATRIX or len(shape) != 2 or min(shape) < 1:
                raise ValueError("not a matrix of uint8")
            if len(pixels) != math.prod(shape):
                raise ValueError("a matrix of another size")
            return np.frombuffer(pixels, np.uint8).reshape(shape, order="F").copy()
    raise ValueError(f"no field {wanted!r}")
