"""Reads trained weights from the files that others publish, without running anything in them.

    file = files.read("fcn_resnet50_coco.pth")
    file.tensors["backbone.conv1.weight"].shape  # (64, 3, 7, 7): as stored, never transposed

The first bytes of a file choose its reader; its name does not matter. Only Caffe's files have no
signature, and the ending ``.caffemodel`` marks them. `dense_jax.weights.rules` says which parameter
each tensor is; the readers know nothing of networks.
"""

import dataclasses
import importlib
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping

import numpy as np

from dense_jax.errors import UserError
from dense_jax.weights import shards
from dense_jax.weights.tensors import Lazy, damaged

_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP = b"PK\x03\x04"
_PICKLES = tuple(b"\x80%c" % protocol for protocol in range(2, 6))
_TORCH = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the pickled magic number
# Torch's wrappers put these in front of all names of what they wrap. Those with an underscore are
# wrappers wherever they stand; a network can have a part "module".
_PREFIX = re.compile(r"module\.")
_HIDDEN = re.compile(
    r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_MOST_WRAPPERS = 8  # a bound for hostile files
# What else stands in front of names beside others without it, and a wrapper of a part alone.
_OTHERS = (
    re.compile(r"^(module|model|net|network|state_dict)\."),
    re.compile(r"(?<=\.)module\."),
)


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """The arrays of a weight file, by name.

    Attributes:
      path: the file.
      format: "safetensors", "npz", "torch", "pickle", "caffe" or "keras".
      tensors: name to array, in the order and the layout of the file. Each access maps or reads
        one array anew. Arrays may be read-only and unaligned.
      info: other facts: versions, the prefix that the reader removed from the names, and what it
        left out.
    """

    path: str
    format: str
    tensors: Mapping[str, np.ndarray]
    info: Mapping[str, str]

    def unwrapped(self) -> Iterator["WeightFile"]:
        """Yields the file, and the file with one more wrapper taken off its names each time.

        A word is a wrapper if all names begin with it, or if it is the usual name of one. Only
        rules tell how many of these words belong to the network.
        """
        file: WeightFile | None = self
        for _ in range(_MOST_WRAPPERS + 1):
            if file is None:
                return
            yield file
            word = next(iter(file.tensors)).partition(".")[0]
            patterns = (re.compile(f"^{re.escape(word)}\\."), *_OTHERS)
            if not all(map(patterns[0].match, file.tensors)):
                patterns = _OTHERS
            file = next(filter(None, map(file.without, patterns)), None)

    def without(self, wrapper: re.Pattern[str]) -> "WeightFile | None":
        """Returns the file without a wrapper in its names, which `info` then records.

        None if no name has it, or if two names would become one.
        """
        found = [match[0] for name in self.tensors if (match := wrapper.search(name))]
        names = {wrapper.sub("", name, count=1): name for name in self.tensors}
        if not found or len(names) < len(self.tensors) or "" in names:
            return None
        if isinstance(self.tensors, Lazy):
            tensors: Mapping[str, np.ndarray] = self.tensors.renamed(names)
        else:
            tensors = {new: self.tensors[old] for new, old in names.items()}
        info = {**self.info, "prefix": self.info.get("prefix", "") + found[0]}
        return WeightFile(self.path, self.format, tensors, info)


def read(path: str | os.PathLike[str]) -> WeightFile:
    """Reads the names, shapes and dtypes of a weight file; values are read on access.

    Weights in several files are read by their index ("model.safetensors.index.json"), or by the
    folder that holds it.

    Dots join the names of nested containers. Wrappers of torch put words in front of names
    ("module.", "_orig_mod."); these are removed.

    Raises:
      UserError: the file is missing, damaged or of an unknown format, it would run a program, or
        its reader needs a package that is not installed.
    """
    path = pathlib.Path(path)
    if os.path.isdir(path):  # unlike pathlib, for any name
        path = shards.index_in(path)
    if path.name.endswith(shards.INDEX) and os.path.isfile(path):
        file = _read_all(path)
    else:
        file = _read_one(path)
        shards.refuse_part(path)
    bare: WeightFile | None = file
    while bare is not None:
        file = bare
        is_module = all(map(_PREFIX.match, file.tensors))
        bare = file.without(_PREFIX if is_module else _HIDDEN)
    return file


def _read_one(path: pathlib.Path) -> WeightFile:
    kind = _kind(path)
    # Import it late: a reader may need a package that the other readers do without.
    reader = importlib.import_module(f"dense_jax.weights.{kind}_file")
    tensors, info = reader.read_tensors(path)
    if not tensors:
        raise UserError(f"{path} holds no arrays: give a file of weights")
    if not all(name.isprintable() for name in tensors):
        raise damaged(path, "a name has unprintable characters")
    return WeightFile(str(path), kind, tensors, info)


def _read_all(index: pathlib.Path) -> WeightFile:
    """Reads all files that an index names; they must hold what it says, and nothing else."""
    tensors: dict[str, np.ndarray] = {}
    info: dict[str, str] = {}
    kind = ""
    for name, wanted in shards.read_index(index).items():
        file = _read_one(shards.file_beside(index, name))
        if file.format not in ("safetensors", "torch"):  # others would be read at once
            raise UserError(f"{file.path} is {file.format}: give parts of safetensors or PyTorch")
        for faulty, words in (
            (set(wanted) - set(file.tensors), "lacks"),
            (set(file.tensors) - set(wanted), "also holds"),
        ):
            if faulty:
                raise UserError(
                    f"{file.path} {words} {min(faulty)}, against {index.name}: download both again"
                )
        tensors |= {tensor: file.tensors[tensor] for tensor in wanted}
        info, kind = info | dict(file.info), file.format
    return WeightFile(str(index), kind, tensors, info)


def _kind(path: pathlib.Path) -> str:
    try:
        if not path.is_file():
            raise UserError(f"{path} is not a file: give a file of weights")
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another file") from error
    if head.startswith(_HDF5):
        return "keras"
    if head.startswith(_ZIP):
        return "torch" if _has_pickle(path) else "npz"
    if _TORCH in head:
        return "torch"
    if head.startswith(_PICKLES):
        return "pickle"
    length = int.from_bytes(head[:8], "little")  # bytes of a safetensors header
    if head[8:9] == b"{" and (length < size or path.suffix != ".caffemodel"):
        return "safetensors"
    if path.suffix == ".caffemodel":
        return "caffe"
    raise UserError(
        f"{path} is not a weight file of a known format: give safetensors, NumPy .npz, "
        "PyTorch .pth, detectron2 .pkl, Caffe .caffemodel or Keras .h5"
    )


def _has_pickle(path: pathlib.Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise damaged(path, error) from error
