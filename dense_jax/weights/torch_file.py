"""Reads the files of `torch.save`: today's form, and the form before version 1.6.

In both, a pickle describes the tensors, and their numbers are outside the pickle. Today's form is a
zip file with the uncompressed members ``archive/data.pkl`` and ``archive/data/0``, ... The older
form is four pickles (a magic number, a version, the machine, the object), a fifth pickle with the
names of the storages, and then the storages, each behind its length. The reader maps the numbers of
both forms.

`dense_jax.weights.pickles` interprets the pickles and runs nothing: they can make tensors, NumPy
arrays, plain values and containers.

Reference: pytorch/pytorch:torch/serialization.py, functions `_save` and `_legacy_save`;
torch/_utils.py; torch/_tensor.py, `__setstate__`, for parameters in files of 2017.
"""

import collections
import dataclasses
import mmap
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dense_jax.errors import UserError
from dense_jax.weights import zips
from dense_jax.weights.numpy_pickles import NUMPY, NumpyArray
from dense_jax.weights.pickles import (
    Built,
    Name,
    RefusedError,
    Stream,
    UnsupportedError,
    follow,
    put,
)
from dense_jax.weights.tensors import damaged, map_file, said, view

_PICKLE = "data.pkl"
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_COUNT_BYTES = 8
# The first of these keys that a checkpoint has holds the weights. Other keys hold averages of the
# weights, states of optimisers and the like.
_CONTAINERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module"),
    "blobs",  # of Detectron
)
_MOST_NAMED = 10
# Bounds for hostile files: depth of containers, number of entries, letters of a name.
_DEEPEST, _MOST_ENTRIES, _LONGEST_NAME = 32, 2**18, 1000

_BIG_ENDIAN = "big-endian numbers: load it in torch and save it on a little-endian machine"

_PLAIN = (str, int, float, bool)

_STORAGES = {
    f"torch.{kind}Storage": np.dtype(dtype)
    for kind, dtype in {
        "Float": "<f4",
        "Double": "<f8",
        "Half": "<f2",
        "BFloat16": ml_dtypes.bfloat16,
        "Long": "<i8",
        "Int": "<i4",
        "Short": "<i2",
        "Char": "i1",
        "Byte": "u1",
        "Bool": "?",
        "ComplexFloat": "<c8",
        "ComplexDouble": "<c16",
    }.items()
}
FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64")


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Values that tensors share; `offset` is the first value of a view on the storage."""

    key: str
    dtype: np.dtype
    offset: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor as its pickle describes it; offset and strides count values."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_Places = Mapping[str, tuple[int, int]]  # key of a storage: first byte, number of bytes


class _Parameter(Built):
    """A parameter in a file of 2017; its state is (tensor, gradient, hooks, ...)."""

    content: Any = None

    def set_state(self, state: Any) -> None:
        self.content = state[0]


_CONTAINER_TYPES = (dict, list, tuple)
_KINDS = (*_CONTAINER_TYPES, _Tensor, _Parameter, NumpyArray)  # all but plain values


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    """Stands for `_rebuild_tensor` and `_rebuild_tensor_v2`."""
    if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("a tensor has no storage, no shape or no strides")
    if len(rest) > 2 and rest[2]:
        raise UnsupportedError(
            "a conjugate or negative view: save its resolve_conj().resolve_neg()"
        )
    return _Tensor(storage, offset, shape, strides)


def _first(value: Any, *_: Any) -> Any:
    """Stands for a function that wraps its first argument."""
    return value


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for key, value in items:
        put(made, key, value)
    return made


_BUILTINS = "builtins", "__builtin__"  # the name in Python 2, which protocol 2 writes
_FACTORIES = "bool", "dict", "float", "int", "list", "str"  # types that a defaultdict fills in

_ADMITTED: dict[str, Callable[..., Any] | None] = {
    **NUMPY,
    **dict.fromkeys(_STORAGES),
    **dict.fromkeys(f"torch.{name}" for name in (*FLOATS, *INTEGERS)),
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _first,  # learning rate schedules have one
    "collections.defaultdict": lambda *_: {},
    **{f"{builtins}.{kind}": None for builtins in _BUILTINS for kind in _FACTORIES},
    **{f"{builtins}.set": _first for builtins in _BUILTINS},
    "torch.Size": tuple,
    "torch.device": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch.nn.parameter.Parameter": _Parameter,
}


def read_tensors(path: pathlib.Path) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    """Returns the mapped tensors of a PyTorch file by name, and the plain values beside them.

    Raises:
      UserError: the file is damaged, or holds anything but tensors and plain values.
    """

    def parse(data: mmap.mmap) -> tuple[Any, _Places]:
        return _read_zip(path, data) if data[:2] == b"PK" else _read_old(data)

    return _tensors_of(path, parse)


def read_arrays(path: pathlib.Path) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    """Does the same for a pickle without tensors, whose arrays are inside."""
    return _tensors_of(path, lambda data: (follow(Stream(data), _ADMITTED), {}))


def _tensors_of(
    path: pathlib.Path, parse: Callable[[mmap.mmap], tuple[Any, _Places]]
) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    data = map_file(path)
    try:
        content, places = parse(data)
        tensors = {
            name: leaf if isinstance(leaf, np.ndarray) else _array(data, leaf, places)
            for name, leaf in _leaves(content)
        }
        return _unwrap(content, tensors)
    except UnsupportedError as error:
        raise UserError(f"{path} holds {error}") from error
    except RefusedError as error:
        raise UserError(
            f"{path}: refused to load {error}, which could run a program: save the state_dict() "
            "alone and give that file"
        ) from error
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise damaged(path, error) from error


def _read_zip(path: pathlib.Path, data: mmap.mmap) -> tuple[Any, _Places]:
    found = zips.members(path, data)
    pickles = [name for name in found if name.endswith(_PICKLE)]
    if len(pickles) != 1:
        raise ValueError(f"{len(pickles)} members have the name {_PICKLE}")
    root = pickles[0].removesuffix(_PICKLE)
    order = found.get(f"{root}byteorder")
    if order and order.unpack(data) != b"little":
        raise UnsupportedError(_BIG_ENDIAN)
    if found[pickles[0]].is_packed:  # torch compresses nothing
        raise UserError(f"{path} was compressed later: unzip it, and zip it without compression")
    content = follow(Stream(bytes(found[pickles[0]].unpack(data))), _ADMITTED, _storage)
    places = {
        name.removeprefix(f"{root}data/"): (member.start, member.size)
        for name, member in found.items()
        if not member.is_packed
    }
    return content, places


def _read_old(data: mmap.mmap) -> tuple[Any, _Places]:
    stream = Stream(data)
    if follow(stream, {}) != _MAGIC or follow(stream, {}) != _VERSION:
        raise ValueError("an unknown version of PyTorch's older form")
    if follow(stream, {})["little_endian"] is not True:
        raise UnsupportedError(_BIG_ENDIAN)
    dtypes: dict[str, np.dtype] = {}

    def persistent(description: Any) -> _Storage:
        storage = _storage(description)
        dtypes[storage.key] = storage.dtype
        return storage

    content = follow(stream, _ADMITTED, persistent)
    keys, start, places = follow(stream, {}), stream.position, {}
    for key in keys:
        if key not in dtypes:
            raise ValueError(f"storage {key!r} belongs to no tensor")
        count = int.from_bytes(data[start : start + _COUNT_BYTES], "little", signed=True)
        num_bytes = count * dtypes[key].itemsize
        start += _COUNT_BYTES
        if not 0 <= num_bytes <= len(data) - start:
            raise ValueError(f"storage {key!r} is cut off")
        places[key] = start, num_bytes
        start += num_bytes
    return content, places


def _storage(description: Any) -> _Storage:
    """Stands for ("storage", kind, key, device, size) and, in old files, a view or None."""
    kind, name, key, _, _, *rest = description
    if kind != "storage" or type(name) is not Name or type(key) is not str:
        raise ValueError("an object outside the pickle is not a storage")
    offset = rest[0][1] if rest and rest[0] else 0  # (key of the view, offset, size)
    return _Storage(key, _STORAGES[name.text], offset)


def _array(data: mmap.mmap, tensor: _Tensor, places: _Places) -> np.ndarray:
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    if storage.key not in places:
        raise ValueError(f"storage {storage.key!r} is missing or compressed")
    start, num_bytes = places[storage.key]
    itemsize = storage.dtype.itemsize
    first = storage.offset + tensor.offset
    reach = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
    if first < 0 or (0 not in shape and (first + reach) * itemsize > num_bytes):
        raise ValueError(f"a tensor reaches beyond its storage {storage.key!r}")
    return view(data, start + first * itemsize, storage.dtype, shape, strides)


def _leaves(content: Any) -> Iterator[tuple[str, np.ndarray | _Tensor]]:
    """Yields names and tensors; two tensors of one name are an error."""
    names: set[str] = set()
    for number, (name, value) in enumerate(_walk(content, "", 0, {})):
        if number == _MOST_ENTRIES or len(name) > _LONGEST_NAME:
            raise UnsupportedError("too many tensors, or names too long: save the weights alone")
        if isinstance(value, np.ndarray | _Tensor):
            if name in names:
                raise ValueError(f"two tensors have the name {name!r}")
            names.add(name)
            yield name, value


def _walk(
    value: Any, name: str, depth: int, known: dict[int, list[tuple[Any, Any]]]
) -> Iterator[tuple[str, Any]]:
    """Yields containers and tensors; `known` has the content of containers by identity."""
    if isinstance(value, _Parameter | NumpyArray):
        value = value.content
        if not isinstance(value, _Tensor | np.ndarray):
            raise ValueError(f"{name!r} has no values")
    yield name, value
    if type(value) not in _CONTAINER_TYPES:
        return
    if id(value) not in known:  # many containers may share one list
        entries = value.items() if type(value) is dict else enumerate(value)
        known[id(value)] = [(key, entry) for key, entry in entries if type(entry) in _KINDS]
    for key, entry in known[id(value)]:
        if depth == _DEEPEST:
            raise ValueError("containers are nested without end")
        yield from _walk(entry, f"{name}.{key}" if name else str(key), depth + 1, known)


def _unwrap(
    content: Any, tensors: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the weights of a checkpoint, and records what it leaves out."""
    info: dict[str, str] = {}
    containers: list[str] = []
    others: collections.Counter[str] = collections.Counter()
    while type(content) is dict:
        info |= said({key: value for key, value in content.items() if type(value) in _PLAIN})
        outer = [
            key
            for key in _CONTAINERS
            if type(content.get(key)) is dict and any(n.startswith(f"{key}.") for n in tensors)
        ]
        if not outer:
            break
        content, prefix = content[outer[0]], f"{outer[0]}."
        others.update(name.split(".")[0] for name in tensors if not name.startswith(prefix))
        tensors = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        containers.append(outer[0])
    if containers:
        info["container"] = ".".join(containers)
    if others:
        shown = [f"{key} ({count})" for key, count in others.most_common(_MOST_NAMED)]
        more = ["..."] if len(others) > _MOST_NAMED else []
        info["left out"] = ", ".join(shown + more)
    return tensors, info
