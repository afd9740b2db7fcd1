"""Reads Caffe's .caffemodel files, which are protobuf messages, without protobuf and copies.

A message is a sequence of fields. A field is a number, a wire type and a value. Weights need four
wire types and a few field numbers; the reader skips all other fields. Floats have the same bytes in
the file as in memory, so the reader maps arrays. Blobs keep Caffe's layout: kernels of convolutions
are [out, in / groups, kh, kw] and kernels of inner products [out, in].

References: protobuf.dev/programming-guides/encoding; BVLC/caffe:src/caffe/proto/caffe.proto,
messages NetParameter, LayerParameter, V1LayerParameter, BlobProto, BlobShape.
"""

import functools
import json
import math
import mmap
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dense_jax.weights.tensors import Lazy, damaged, map_file, view

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}

# Field numbers. A network has `layer` or, in older files, `layers`.
_NET_NAME, _NET_LAYERS, _NET_LAYER = 1, 2, 100
_V0_LAYER = 1
_BLOB_NUM, _BLOB_WIDTH, _BLOB_SHAPE = 1, 4, 7
_BLOB_VALUES = {5: np.dtype("<f4"), 8: np.dtype("<f8")}  # data, double_data
_SHAPE_DIM = 1
_MOST_AXES = 32  # Caffe's own limit

# Types of V1LayerParameter.LayerType that have weights, by the names that V2 gives them.
_V1_TYPES = {4: "Convolution", 14: "InnerProduct", 39: "Deconvolution"}


class _Field(NamedTuple):
    """A field of a message; its value is bytes start..end of the file.

    Consecutive fields of one number and a fixed size are one `_Field`. Its values alternate with
    tags of one byte, and the first tag is in front of `start`.
    """

    number: int
    wire: int
    start: int
    end: int
    value: int = 0  # if the wire type is varint


class _Layer(NamedTuple):
    """Field numbers of a layer."""

    name: int
    type: int
    blobs: int


_LAYER_FIELDS = {_NET_LAYER: _Layer(1, 2, 7), _NET_LAYERS: _Layer(4, 5, 6)}


def read_tensors(path: pathlib.Path) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    """Reads the blobs of a network.

    Args:
      path: a .caffemodel file with `layer` (V2) or `layers` (V1) messages.

    Returns:
      Read-only arrays by ``LAYER.INDEX``, with the shapes of the file; old files have four axes, so
      that a bias is [1, 1, 1, C]. Index 0 is the weights and 1 the bias of a convolution or inner
      product. A BatchNorm has its mean at 0 and its variance at 1 (`batch_norm_statistics`), and
      nothing at 2. An array is mapped if its values are contiguous, as Caffe writes them.
      And other facts: ``layers``, a JSON object from the name of each layer, with or without blobs,
      to its type; ``net``, the name of the network.

    Raises:
      UserError: the file is truncated or damaged, has no weights, or has another format.
    """
    data = map_file(path)
    try:
        return _read_net(data)
    except ValueError as error:
        raise damaged(path, error) from error


def batch_norm_statistics(
    mean: np.ndarray, variance: np.ndarray, factor: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and variance, each [C], from the three blobs of a BatchNorm layer.

    Caffe stores decaying sums and, in the third blob, the sum of their weights. It divides the sums
    by this weight; a weight of zero gives statistics of zero
    (BVLC/caffe:src/caffe/layers/batch_norm_layer.cpp). The Scale layer that follows has the scale
    and the shift.

    Args:
      mean: blob 0, [C].
      variance: blob 1, [C].
      factor: blob 2, one number of any shape.
    """
    weight = float(np.asarray(factor).reshape(()))
    with np.errstate(all="ignore"):  # damaged files overflow
        inverse = mean.dtype.type(0 if weight == 0 else np.divide(1, weight))
        return mean * inverse, variance * inverse


def _read_net(data: mmap.mmap) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    types: dict[str, str] = {}
    info = {}
    for field in _fields(data, 0, len(data)):
        if field.number == _NET_NAME:
            info["net"] = _text(data, field)
        elif numbers := _LAYER_FIELDS.get(field.number):
            name, kind, blobs = _read_layer(data, field, numbers)
            if f"{name}.0" in tensors and blobs:
                raise ValueError(f"two layers are named {name!r}")
            types[name] = kind
            tensors |= {f"{name}.{i}": make for i, make in enumerate(_makers(name, kind, blobs))}
    if not tensors:
        raise ValueError(f"{len(types)} layers without weights")
    return Lazy(tensors), info | {"layers": json.dumps(types)}


def _makers(name: str, kind: str, blobs: Sequence[np.ndarray]) -> list[Callable[[], np.ndarray]]:
    """Returns functions that make the arrays of a layer on access."""
    if kind != "BatchNorm" or len(blobs) != 3:  # other implementations have no factor
        return [functools.partial(np.asarray, blob) for blob in blobs]
    if blobs[2].size != 1:
        raise ValueError(f"the BatchNorm {name!r} has {blobs[2].size} factors")
    return [lambda i=i: batch_norm_statistics(blobs[0], blobs[1], blobs[2])[i] for i in (0, 1)]


def _read_layer(
    data: mmap.mmap, layer: _Field, numbers: _Layer
) -> tuple[str, str, list[np.ndarray]]:
    """Returns the name, the type and the blobs of a layer."""
    name, kind, blobs = "", "", []
    for field in _inside(data, layer):
        if field.number == numbers.name:
            name = _text(data, field)
        elif field.number == numbers.type:
            kind = _v1_type(field) if layer.number == _NET_LAYERS else _text(data, field)
        elif field.number == numbers.blobs:
            blobs.append(_read_blob(data, field))
        elif layer.number == _NET_LAYERS and field.number == _V0_LAYER:
            raise ValueError("layers of 2013; convert them by Caffe's upgrade_net_proto_binary")
    return name, kind, blobs


def _v1_type(field: _Field) -> str:
    _expect(field, _VARINT)
    return _V1_TYPES.get(field.value, f"V1 type {field.value}")


def _read_blob(data: mmap.mmap, blob: _Field) -> np.ndarray:
    legacy, shape, pieces = {}, [], {5: [], 8: []}
    for field in _inside(data, blob):
        if _BLOB_NUM <= field.number <= _BLOB_WIDTH:
            _expect(field, _VARINT)
            legacy[field.number] = field.value
        elif field.number == _BLOB_SHAPE:
            shape += _read_shape(data, field)
        elif field.number in _BLOB_VALUES:
            pieces[field.number].append(_values(data, field, _BLOB_VALUES[field.number]))
    if legacy:  # it takes precedence in Caffe too
        shape = [legacy.get(axis, 0) for axis in range(_BLOB_NUM, _BLOB_WIDTH + 1)]
    parts = pieces[8] or pieces[5] or [np.zeros(0, np.float32)]
    values = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if len(shape) > _MOST_AXES or math.prod(shape) != len(values) or not len(values):
        shown = "x".join(map(str, shape[:_MOST_AXES])) or "one number"
        raise ValueError(f"a blob of {shown} holds {len(values)} values")
    return values.reshape(shape)


def _read_shape(data: mmap.mmap, shape: _Field) -> Iterator[int]:
    for field in _inside(data, shape):
        if field.number == _SHAPE_DIM and field.wire == _BYTES:  # packed
            at = field.start
            while at < field.end:
                size, at = _varint(data, at, field.end)
                yield size
        elif field.number == _SHAPE_DIM:
            _expect(field, _VARINT)
            yield field.value


def _values(data: mmap.mmap, field: _Field, dtype: np.dtype) -> np.ndarray:
    """Returns a view of packed numbers, or of consecutive single ones."""
    size = field.end - field.start
    if field.wire == _BYTES:
        if size % dtype.itemsize:
            raise ValueError(f"{size} bytes at byte {field.start} end inside a number")
        return view(data, field.start, dtype, [size // dtype.itemsize])
    _expect(field, _FIXED32 if dtype.itemsize == 4 else _FIXED64)
    row = np.dtype([("tag", "u1"), ("value", dtype)])
    return view(data, field.start - 1, row, [(size + 1) // row.itemsize])["value"]


def _text(data: mmap.mmap, field: _Field) -> str:
    _expect(field, _BYTES)
    return data[field.start : field.end].decode()


def _expect(field: _Field, wire: int) -> None:
    if field.wire != wire:
        raise ValueError(
            f"field {field.number} at byte {field.start} has wire type {field.wire}, not {wire}"
        )


def _inside(data: mmap.mmap, field: _Field) -> Iterator[_Field]:
    """Yields the fields of a message within a message."""
    _expect(field, _BYTES)
    return _fields(data, field.start, field.end)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    while start < end:
        tag, at = _varint(data, start, end)
        number, wire = tag >> 3, tag & 7
        value, stop = 0, at
        if wire == _VARINT:
            value, stop = _varint(data, at, end)
        elif wire == _BYTES:
            size, at = _varint(data, at, end)
            stop = at + size
        elif wire in _FIXED_SIZES:
            stop = at + _FIXED_SIZES[wire]
        else:
            raise ValueError(f"wire type {wire} at byte {start}")
        if not number:
            raise ValueError(f"field 0 at byte {start}")
        if stop > end:
            raise ValueError(
                f"the field at byte {start} has {stop - at} bytes, and {end - at} are left"
            )
        if wire in _FIXED_SIZES and at == start + 1:
            stop = _end_of_run(data, start, end, stop - start)
        yield _Field(number, wire, at, stop, value)
        start = stop


def _end_of_run(data: mmap.mmap, start: int, end: int, size: int) -> int:
    """Returns the end of consecutive fields of `size` bytes with the tag at `start`."""
    tags = np.frombuffer(data, np.uint8, end - start, start)[::size][: (end - start) // size]
    seen = 64  # doubles, so that the work in vain stays below the length of the run
    while True:
        others = np.flatnonzero(tags[:seen] != tags[0])
        if len(others):
            return start + int(others[0]) * size
        if seen >= len(tags):
            return start + len(tags) * size
        seen *= 2


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """Returns a number that is stored in groups of seven bits, lowest first, and its end."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"the number at byte {at} does not end")
