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
import zipfile
from collections.abc import Mapping

import numpy as np

from dense_jax.errors import UserError
from dense_jax.weights.tensors import Lazy, damaged

_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP = b"PK\x03\x04"
_TORCH = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the pickled magic number
# torch.nn.DataParallel and torch.compile put these in front of each name.
_PREFIXES = ("module.", "_orig_mod.")


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """The arrays of a weight file, by name.

    Attributes:
      path: the file.
      format: "safetensors", "npz", "torch", "caffe" or "keras".
      tensors: name to array, in the order and the layout of the file. Each access maps or reads
        one array anew. Arrays may be read-only and unaligned.
      info: other facts: versions, the prefix that the reader removed from the names, and what it
        left out.
    """

    path: str
    format: str
    tensors: Mapping[str, np.ndarray]
    info: Mapping[str, str]

    def without(self, prefix: str) -> "WeightFile":
        """Returns the file without a prefix that all names share; `info` records the prefix."""
        names = {name.removeprefix(prefix): name for name in self.tensors}
        if isinstance(self.tensors, Lazy):
            tensors: Mapping[str, np.ndarray] = self.tensors.renamed(names)
        else:
            tensors = {new: self.tensors[old] for new, old in names.items()}
        info = {**self.info, "prefix": self.info.get("prefix", "") + prefix}
        return WeightFile(self.path, self.format, tensors, info)


def read(path: str | os.PathLike[str]) -> WeightFile:
    """Reads the names, shapes and dtypes of a weight file; values are read on access.

    Dots join the names of nested containers. Wrappers of torch put a prefix in front of all names
    ("module."); the prefix is removed.

    Raises:
      UserError: the file is missing, damaged or of an unknown format, it would run a program, or
        its reader needs a package that is not installed.
    """
    path = pathlib.Path(path)
    kind = _kind(path)
    # Import it late: a reader may need a package that the other readers do without.
    reader = importlib.import_module(f"dense_jax.weights.{kind}_file")
    tensors, info = reader.read_tensors(path)
    if not tensors:
        raise UserError(f"{path} holds no arrays: give a file of weights")
    if not all(name.isprintable() for name in tensors):
        raise damaged(path, "a name has unprintable characters")
    file = WeightFile(str(path), kind, tensors, info)
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in file.tensors)), ""):
        file = file.without(prefix)
    return file


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
    length = int.from_bytes(head[:8], "little")  # bytes of a safetensors header
    if head[8:9] == b"{" and (length < size or path.suffix != ".caffemodel"):
        return "safetensors"
    if path.suffix == ".caffemodel":
        return "caffe"
    raise UserError(
        f"{path} is not a weight file of a known format: give safetensors, NumPy .npz, "
        "PyTorch .pth, Caffe .caffemodel or Keras .h5"
    )


def _has_pickle(path: pathlib.Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise damaged(path, error) from error
