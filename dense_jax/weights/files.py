"""Reads trained weights from the files that others publish, without running anything in them.

    file = files.read("fcn_resnet50_coco.pth")
    file.tensors["backbone.conv1.weight"].shape  # (64, 3, 7, 7): as stored, never transposed

Which reader a file goes to is told by its first bytes, not by its name; only Caffe's files have
no mark of their own and are known by ``.caffemodel``. What the names and layouts mean for a network
of this library is said by rules, not here.
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
_TORCH = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # its magic number, pickled
# What torch.nn.DataParallel and torch.compile put before each name.
_PREFIXES = ("module.", "_orig_mod.")


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """The arrays of a weight file, by name.

    Attributes:
      path: the file.
      format: "safetensors", "npz", "torch", "caffe" or "keras".
      tensors: name to array, in the order and the layout of the file. Reading an item maps or
        reads that array only, each time anew; arrays may be read-only and unaligned.
      info: what else the file says: versions, what was taken off the names, what was left out.
    """

    path: str
    format: str
    tensors: Mapping[str, np.ndarray]
    info: Mapping[str, str]

    def without(self, prefix: str) -> "WeightFile":
        """Returns the same with a prefix of all names taken off, which `info` then tells."""
        names = {name.removeprefix(prefix): name for name in self.tensors}
        if isinstance(self.tensors, Lazy):
            tensors: Mapping[str, np.ndarray] = self.tensors.renamed(names)
        else:
            tensors = {new: self.tensors[old] for new, old in names.items()}
        info = {**self.info, "prefix": self.info.get("prefix", "") + prefix}
        return WeightFile(self.path, self.format, tensors, info)


def read(path: str | os.PathLike[str]) -> WeightFile:
    """Reads the names, shapes and kinds of a weight file; its values when they are asked for.

    Names of nested containers are joined by dots. A prefix of all names that is no name but torch's
    wrapper of networks ("module.") is taken off.

    Raises:
      UserError: the file is missing, of no known format, damaged, would run a program, or needs a
        package that is not installed.
    """
    path = pathlib.Path(path)
    kind = _kind(path)
    # Imported here, since a reader may need a package that readers of other files do without.
    reader = importlib.import_module(f"dense_jax.weights.{kind}_file")
    tensors, info = reader.read_tensors(path)
    if not tensors:
        raise UserError(f"{path} holds no arrays: give a file of weights")
    if not all(name.isprintable() for name in tensors):
        raise damaged(path, "a name that cannot be printed")
    file = WeightFile(str(path), kind, tensors, info)
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in file.tensors)), ""):
        file = file.without(prefix)
    return file


def _kind(path: pathlib.Path) -> str:
    try:
        if not path.is_file():
            raise UserError(f"{path} is no file: give a file of weights")
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
    length = int.from_bytes(head[:8], "little")  # of the header of safetensors
    if head[8:9] == b"{" and (length < size or path.suffix != ".caffemodel"):
        return "safetensors"
    if path.suffix == ".caffemodel":
        return "caffe"
    raise UserError(
        f"{path} is no weight file known here: give safetensors, NumPy .npz, PyTorch .pth, "
        "Caffe .caffemodel or Keras .h5"
    )


def _has_pickle(path: pathlib.Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise damaged(path, error) from error
