"""Reads Keras weights from HDF5 files, through h5py and without Keras.

The reader takes weights and whole models of Keras 1 and 2, and the oldest form with numbered
layers. A file holds one group of arrays for each layer, and attributes give their order. The reader
takes numbers and names alone: it unpickles nothing, keeps the code of Lambda layers as text, and
follows no link out of the file.

Kernels keep the layout of the file: [kh, kw, in, out] for Conv2D and [kh, kw, out, in] for
Conv2DTranspose in Keras 2; [out, in, kh, kw] in Keras 1 with the order "th". Theano trains kernels
of true convolution, and a file of weights alone does not say whether Theano trained it.

References: tensorflow/tensorflow:tensorflow/python/keras/saving/hdf5_format.py for Keras 2,
keras-team/keras:keras/models.py before version 1.0 for the numbered form.
"""

import functools
import itertools
import json
import math
import mmap
import pathlib
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dense_jax.errors import UserError
from dense_jax.weights.tensors import Lazy, damaged, map_file, most_unpacked, view

try:
    import h5py
except ImportError as error:
    raise UserError("weights of Keras (HDF5) need the package h5py: pip install h5py") from error

_MODEL_WEIGHTS, _NUM_LAYERS = "model_weights", "nb_layers"
_FILTERS = {
    h5py.h5z.FILTER_DEFLATE,
    h5py.h5z.FILTER_SHUFFLE,
    h5py.h5z.FILTER_FLETCHER32,
    h5py.h5z.FILTER_LZF,
}
_HEAP, _HEAP_HEADER = b"GCOL\1\0\0\0", 16


def read_tensors(path: pathlib.Path) -> tuple[Mapping[str, np.ndarray], dict[str, str]]:
    """Maps the weights; compressed ones are read on access.

    Args:
      path: an HDF5 file.

    Returns:
      Arrays by ``LAYER.WEIGHT`` in the order of the layers; mapped ones are read-only. Keras
      repeats the layer in the name of a weight and ends it with ``:0``; both are removed:
      "conv2d_1/kernel:0" of layer "conv2d_1" becomes "conv2d_1.kernel", "convolution2d_1_W" becomes
      "convolution2d_1.W", and a model in a model has weights such as "vgg16.block1_conv1.kernel".
      And other facts: ``layers``, a JSON object from the name of each layer to its class, which is
      empty in a file of weights alone; ``keras_version`` and ``backend``.

    Raises:
      UserError: the file is damaged or of another format, or its values are in another file.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            size, mapped = path.stat().st_size, map_file(path)
            if file.id.get_create_plist().get_sizes() != (8, 8):
                raise ValueError("addresses or sizes do not have 64 bits")
            _check_heaps(mapped)
            is_model = file.get(_MODEL_WEIGHTS, getlink=True) is not None
            top = _member(file, _MODEL_WEIGHTS) if is_model else file
            layers, root = list(_layers(top, size)), top.name.rstrip("/")
            makers = {}
            for layer, weight in [(layer, weight) for layer, all_ in layers for weight in all_]:
                name, place = _tensor_name(layer, weight), f"{root}/{layer}/{weight}"
                if name in makers:
                    raise ValueError(f"two arrays are named {name!r}")
                data = _member(file, place)
                _check(data, size)
                makers[name] = functools.partial(_read, path, place, _mapped(data, mapped))
            return Lazy(makers), _info(file, top, [layer for layer, _ in layers], size)
    except UserError:
        raise
    except Exception as error:  # the HDF5 library has many errors for damaged bytes
        raise damaged(path, error) from error


def _check_heaps(file: mmap.mmap) -> None:
    """Rejects a heap of texts with an unused piece of zero bytes: HDF5 2.0.0 loops on it forever.

    Reference: HDF5 File Format Specification Version 3.0, Section III.E.
    """
    at = file.find(_HEAP)
    while at >= 0:
        end = min(at + int.from_bytes(file[at + 8 : at + 16], "little"), len(file))
        piece = at + _HEAP_HEADER
        while piece + _HEAP_HEADER <= end:
            index, size = struct.unpack_from("<H6xQ", file, piece)
            if not index and not size:
                raise ValueError(f"the heap at byte {at} does not end")
            piece += size if not index else _HEAP_HEADER + -(-size // 8) * 8
        at = file.find(_HEAP, at + 1)


def _mapped(data: h5py.Dataset, file: mmap.mmap) -> np.ndarray | None:
    """Returns a view of the values if they are contiguous and in a format of NumPy."""
    start = data.id.get_offset()
    if start is None or not data.id.get_type().equal(h5py.h5t.py_create(data.dtype)):
        return None
    return view(file, start, data.dtype, data.shape)


def _read(path: pathlib.Path, place: str, values: np.ndarray | None) -> np.ndarray:
    """Returns `values`, or reads the dataset at `place` if there are none."""
    if values is None:
        try:
            with h5py.File(path, "r", locking=False) as file:
                values = np.asarray(_member(file, place)[()])
        except Exception as error:
            raise damaged(path, error) from error
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _layers(top: h5py.Group, size: int) -> Iterator[tuple[str, list[str]]]:
    """Yields the name of each layer and the names of its weights."""
    if _NUM_LAYERS in top.attrs:
        for layer in (f"layer_{i}" for i in range(top.attrs[_NUM_LAYERS])):
            yield layer, [f"param_{i}" for i in range(len(_member(top, layer)))]
        return
    layers = _texts(top, "layer_names", size)
    if layers is None:
        raise UserError(
            f"{top.file.filename} has no layer_names: save a Keras 3 model by "
            "model.save('NAME.h5'), and give weights of another program in its own format"
        )
    for layer in layers:
        yield layer, _texts(_member(top, layer), "weight_names", size) or []


def _tensor_name(layer: str, weight: str) -> str:
    name = re.sub(r":\d+$", "", weight).removeprefix(f"{layer}/")
    if "/" not in name:  # in layer "conv", the name "conv_1/kernel" belongs to another scope
        name = name.removeprefix(f"{layer}_")
    return f"{layer}.{name}".replace("/", ".")


def _info(file: h5py.File, top: h5py.Group, layers: list[str], size: int) -> dict[str, str]:
    config = json.loads((_texts(file, "model_config", size) or ["{}"])[0])
    classes = _classes(config)
    info = {"layers": json.dumps({layer: classes.get(layer, "") for layer in layers})}
    for name in ("keras_version", "backend"):
        if texts := _texts(top, name, size):
            info[name] = texts[0]
    return info


def _classes(config: Any) -> dict[str, str]:
    """Returns the class of each layer of a model, by name."""
    try:
        inner = config["config"]
        layers = inner["layers"] if isinstance(inner, dict) else inner
        return {layer["config"]["name"]: str(layer["class_name"]) for layer in layers}
    except (KeyError, TypeError):  # an unknown form; loading does not depend on it
        return {}


def _member(group: h5py.Group, path: str) -> Any:
    """Returns a group or dataset; links to other places are errors."""
    for part in filter(None, path.split("/")):
        link = group.get(part, getlink=True)
        if link is None:
            raise ValueError(f"{path} is missing")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{path} is a link, and links are not followed")
        group = group[part]
    return group


def _texts(group: h5py.Group, name: str, size: int) -> list[str] | None:
    """Returns a list of names.

    An attribute holds 64 KB at most, so a long list continues in attributes name0, name1, ...
    """
    parts = (f"{name}{i}" for i in itertools.count())
    names = (
        [name]
        if name in group.attrs
        else list(itertools.takewhile(group.attrs.__contains__, parts))
    )
    texts = []
    for part in names:
        attribute = group.attrs.get_id(part)
        if math.prod(attribute.shape or ()) * attribute.dtype.itemsize > size:
            raise ValueError(f"{part} is larger than the file")
        is_text = isinstance(attribute.get_type(), h5py.h5t.TypeStringID)
        if not is_text and attribute.dtype.kind == "O":  # h5py may read memory that is not its own
            raise ValueError(f"{part} holds lists")
        for text in np.ravel(group.attrs[part]):
            if not isinstance(text, str | bytes):
                raise ValueError(f"{part} is not text")
            texts.append(text.decode() if isinstance(text, bytes) else str(text))
    return texts if names else None


def _check(data: h5py.Dataset, size: int) -> None:
    """Rejects values that are not numbers, are in another file, or exceed what the file holds."""
    if not isinstance(data, h5py.Dataset) or data.shape is None or data.dtype.kind not in "biuf":
        raise ValueError(f"{data.name} holds no numbers")
    creation = data.id.get_create_plist()
    if data.is_virtual or creation.get_external_count():
        raise ValueError(
            f"the values of {data.name} are in another file, and such references are not followed"
        )
    filters = {creation.get_filter(i)[0] for i in range(creation.get_nfilters())}
    if not filters <= _FILTERS:
        raise ValueError(f"{data.name} is compressed by an unknown filter")
    stored = data.id.get_storage_size()
    most = most_unpacked(stored) if stored and data.chunks else stored
    values = max(math.prod(data.shape), math.prod(data.chunks or (0,)))
    needed = values * data.id.get_type().get_size()
    if stored > size or needed > most:
        raise ValueError(f"{data.name} needs {needed} bytes, and the file holds {stored}")
