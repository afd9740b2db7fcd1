"""Reads Caffe's .caffemodel files, a protobuf message, without protobuf and without copying.

A message is a row of fields, each a number and wire type followed by a value, so four wire types
and the numbers of a few fields are all that weights need; other fields are stepped over. Arrays of
floats lie in the file as they are in memory and are mapped. Blobs keep Caffe's own layout: kernels
of convolutions are [out, in / groups, kh, kw], of inner products [out, in].

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

# The types of V1LayerParameter.LayerType that have weights, as they are called today.
_V1_TYPES = {4: "Convolution", 14: "InnerProduct", 39: "Deconvolution"}


class _Field(NamedTuple):
    """A field of a message; its value lies in bytes start..end of the file.

    Neighbours of one number and a fixed size come as one field: values then alternate with tags
    of a byte, the first of them before `start`.
    """

    number: int
    wire: int
    start: int
    end: int
    value: int = 0  # of a varint


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
      Arrays by ``LAYER.INDEX``, where 0 are the weights and 1 is the bias of a convolution or inner
      product; read-only and mapped where the file holds them in one piece, which is as Caffe writes
      them. Shapes are the file's: old ones have four axes, a bias then is [1, 1, 1, C]. Of a
      BatchNorm, 0 and 1 are the mean and the variance (`batch_norm_statistics`), and there is no 2.
      And what else the file says: ``layers``, a JSON object from the name of each layer, those
      without blobs too, to its type; ``net``, its name.

    Raises:
      UserError: the file is truncated, damaged, without weights, or no caffemodel of these kinds.
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

    Caffe stores sums that decay and, as the third blob, the weight that they have gathered: the
    statistics are the sums divided by it, or zero if it is zero
    (BVLC/caffe:src/caffe/layers/batch_norm_layer.cpp). Scale and shift are the blobs of the Scale
    layer that follows.

    Args:
      mean: blob 0, [C].
      variance: blob 1, [C].
      factor: blob 2, one number of any shape.
    """
    weight = float(np.asarray(factor).reshape(()))
    with np.errstate(all="ignore"):  # of damaged files
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
        raise ValueError(f"{len(types)} layers and no weights")
    return Lazy(tensors), info | {"layers": json.dumps(types)}


def _makers(name: str, kind: str, blobs: Sequence[np.ndarray]) -> list[Callable[[], np.ndarray]]:
    """Returns what makes the arrays of a layer when they are asked for."""
    if kind != "BatchNorm" or len(blobs) != 3:  # others of this type keep no factor
        return [functools.partial(np.asarray, blob) for blob in blobs]
    if blobs[2].size != 1:
        raise ValueError(f"the BatchNorm {name!r} is divided by {blobs[2].size} numbers")
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
            raise ValueError("layers of 2013, which Caffe's upgrade_net_proto_binary converts")
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
    if legacy:  # has precedence in Caffe too
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
    """Returns a view of packed numbers, or of a run of single ones."""
    size = field.end - field.start
    if field.wire == _BYTES:
        if size % dtype.itemsize:
            raise ValueError(f"{size} bytes at byte {field.start} are not whole numbers")
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
                f"{stop - at} bytes announced at byte {start}, but {end - at} are left"
            )
        if wire in _FIXED_SIZES and at == start + 1:
            stop = _end_of_run(data, start, end, stop - start)
        yield _Field(number, wire, at, stop, value)
        start = stop


def _end_of_run(data: mmap.mmap, start: int, end: int, size: int) -> int:
    """Returns where fields of `size` bytes that begin with the byte at `start` end."""
    tags = np.frombuffer(data, np.uint8, end - start, start)[::size][: (end - start) // size]
    seen = 64  # doubles, so that what is looked at in vain is bounded by the run
    while True:
        others = np.flatnonzero(tags[:seen] != tags[0])
        if len(others):
            return start + int(others[0]) * size
        if seen >= len(tags):
            return start + len(tags) * size
        seen *= 2


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """Returns a number in groups of seven bits, lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"a number that does not end at byte {at}")
