"""Stand-ins for NumPy's arrays, scalars and dtypes in pickles, for numbers only.

An array of objects would hold addresses that the file chooses, so dtypes are checked before use.

Reference: numpy/numpy:numpy/_core/src/multiarray/methods.c, `array_reduce`, and descriptor.c,
`arraydescr_reduce`; numpy/_core/multiarray.py, `scalar` and `_reconstruct`.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from dense_jax.weights.pickles import Built, Piece

_NUMBER = re.compile(r"[biufc]\d{1,2}")


class NumpyArray(Built):
    """An array; `content` is None until the pickle sets its state."""

    content: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        """Takes (version, shape, dtype, is in Fortran order, bytes)."""
        _, shape, dtype, is_fortran, content = state
        raw, made = _bytes(content), _dtype(dtype)
        if made.itemsize * math.prod(shape) != len(raw):
            raise ValueError("the shape of an array does not match its bytes")
        self.content = np.ndarray(shape, made, raw, order="F" if is_fortran else "C")


class _Dtype(Built):
    """A dtype; its state gives the byte order."""

    def __init__(self, code: str, *_: Any):
        if not _NUMBER.fullmatch(code):
            raise ValueError(f"NumPy's type {code!r} has no numbers")
        self.code, self.order = code, "="

    def set_state(self, state: Any) -> None:
        self.order = state[1]


def _dtype(stand_in: Any) -> np.dtype:
    if type(stand_in) is not _Dtype or stand_in.order not in ("<", ">", "=", "|"):
        raise ValueError("an array has no dtype")
    return np.dtype(stand_in.order + stand_in.code)


def _bytes(content: Any) -> bytes | Piece:
    if isinstance(content, Piece):
        return content
    return content.encode("latin-1") if type(content) is str else bytes(memoryview(content))


def _reconstruct(*_: Any) -> NumpyArray:
    return NumpyArray()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> NumpyArray:
    """Stands for the function that protocol 5 calls."""
    array = NumpyArray()
    array.set_state((1, shape, dtype, order == "F", content))
    return array


def _scalar(dtype: Any, content: Any) -> Any:
    return np.frombuffer(_bytes(content), _dtype(dtype), 1)[0].item()


def _encode(text: Any, *_: Any) -> bytes | Piece:
    """Stands for `_codecs.encode`; old pickles hold bytes as text and call it."""
    return _bytes(text)


NUMPY: dict[str, Callable[..., Any] | None] = {
    "_codecs.encode": _encode,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": None,
    **{
        f"numpy.{core}.{name}": stand_in
        for core in ("core", "_core")
        for name, stand_in in (
            ("multiarray.scalar", _scalar),
            ("multiarray._reconstruct", _reconstruct),
            ("numeric._frombuffer", _from_buffer),
        )
    },
}
