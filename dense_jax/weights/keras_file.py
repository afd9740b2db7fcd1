"""Reads Keras weights from HDF5 files, through h5py and without Keras.

Covered are files of weights and of whole models of Keras 1 and 2, and the oldest form with numbered
layers. They hold a group for each layer with its arrays, and their order in attributes. Numbers and
names are all that is read: nothing is unpickled, code of Lambda layers stays text, and no link
leads out of the file.

Kernels stay as stored: [kh, kw, in, out] of Conv2D and [kh, kw, out, in] of Conv2DTranspose in
Keras 2; [out, in, kh, kw] in Keras 1 with the order "th". Kernels that were trained with Theano are
for true convolution, and a file of weights alone does not say so.

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
    """Maps the weights; reads when they are asked for those that are compressed.

    Args:
      path: an HDF5 file.

    Returns:
      Arrays by ``LAYER.WEIGHT`` in the order of the layers, mapped ones read-only. A weight's name
      begins without the layer's, which Keras repeats, and ends without ``:0``: "conv2d_1/kernel:0"
      of layer "conv2d_1" is "conv2d_1.kernel", "convolution2d_1_W" is "convolution2d_1.W", and a
      weight of a model within a model is "vgg16.block1_conv1.kernel".
      And what else the file says: ``layers``, a JSON object from the name of each layer to its
      class, which is empty in a file of weights alone; ``keras_version`` and ``backend``.

    Raises:
      UserError: the file is damaged, of another kind, or keeps its values elsewhere.
    """
    try:
        with h5py.File(path, "r", locking=False) as file:
            size, mapped = path.stat().st_size, map_file(path)
            if file.id.get_create_plist().get_sizes() != (8, 8):
                raise ValueError("addresses or sizes that are not of 64 bits")
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
    except Exception as error:  # damaged bytes make the HDF5 library fail in any way
        raise damaged(path, error) from error


def _check_heaps(file: mmap.mmap) -> None:
    """Refuses a heap of texts with an unused piece of no bytes, on which HDF5 2.0.0 never ends.

    Reference: HDF5 File Format Specification Version 3.0, Section III.E.
    """
    at = file.find(_HEAP)
    while at >= 0:
        end = min(at + int.from_bytes(file[at + 8 : at + 16], "little"), len(file))
        piece = at + _HEAP_HEADER
        while piece + _HEAP_HEADER <= end:
            index, size = struct.unpack_from("<H6xQ", file, piece)
            if not index and not size:
                raise ValueError(f"a heap at byte {at} that does not end")
            piece += size if not index else _HEAP_HEADER + -(-size // 8) * 8
        at = file.find(_HEAP, at + 1)


def _mapped(data: h5py.Dataset, file: mmap.mmap) -> np.ndarray | None:
    """Returns a view of the values if they lie in one piece and as NumPy has them."""
    start = data.id.get_offset()
    if start is None or not data.id.get_type().equal(h5py.h5t.py_create(data.dtype)):
        return None
    return view(file, start, data.dtype, data.shape)


def _read(path: pathlib.Path, place: str, values: np.ndarray | None) -> np.ndarray:
    """Returns the values as given, or else of the dataset at `place`."""
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
            f"{top.file.filename} has no layer_names: of a Keras 3 model give what "
            "model.save('NAME.h5') writes, and of another program its own format"
        )
    for layer in layers:
        yield layer, _texts(_member(top, layer), "weight_names", size) or []


def _tensor_name(layer: str, weight: str) -> str:
    name = re.sub(r":\d+$", "", weight).removeprefix(f"{layer}/")
    if "/" not in name:  # otherwise it may be "conv_1/kernel" of another scope than layer "conv"
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
    except (KeyError, TypeError):  # an unknown form; the weights do not depend on it
        return {}


def _member(group: h5py.Group, path: str) -> Any:
    """Returns a group or dataset of the file itself."""
    for part in filter(None, path.split("/")):
        link = group.get(part, getlink=True)
        if link is None:
            raise ValueError(f"{path} is missing")
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"{path} is a link to another place, which is not followed")
        group = group[part]
    return group


def _texts(group: h5py.Group, name: str, size: int) -> list[str] | None:
    """Returns a list of names, which may be spread over attributes name0, name1, ...

    An attribute may not hold more than 64 KB.
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
        if not is_text and attribute.dtype.kind == "O":  # h5py may go astray in memory
            raise ValueError(f"{part} holds lists")
        for text in np.ravel(group.attrs[part]):
            if not isinstance(text, str | bytes):
                raise ValueError(f"{part} is no text")
            texts.append(text.decode() if isinstance(text, bytes) else str(text))
    return texts if names else None


def _check(data: h5py.Dataset, size: int) -> None:
    """Refuses values that are no numbers, not in the file or far more than it holds."""
    if not isinstance(data, h5py.Dataset) or data.shape is None or data.dtype.kind not in "biuf":
        raise ValueError(f"{data.name} holds no numbers")
    creation = data.id.get_create_plist()
    if data.is_virtual or creation.get_external_count():
        raise ValueError(f"{data.name} has its values in another file, which is not followed")
    filters = {creation.get_filter(i)[0] for i in range(creation.get_nfilters())}
    if not filters <= _FILTERS:
        raise ValueError(f"{data.name} is compressed by a filter that is not known here")
    stored = data.id.get_storage_size()
    most = most_unpacked(stored) if stored and data.chunks else stored
    values = max(math.prod(data.shape), math.prod(data.chunks or (0,)))
    needed = values * data.id.get_type().get_size()
    if stored > size or needed > most:
        raise ValueError(f"{data.name} of {needed} bytes, of which the file holds {stored}")
