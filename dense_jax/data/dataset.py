"""A dataset: named splits of examples that can be read in any order, and a class table.

Each module in `dense_jax.data.datasets` defines ``load(data_dir, **options)``. The name of the
module is the name of the dataset. A new dataset needs no other edit.
"""

import dataclasses
import importlib
import pathlib
import pkgutil
import types
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dense_jax.data import datasets
from dense_jax.data.classes import ClassTable
from dense_jax.errors import UserError

Example = dict[str, Any]
"""``image`` uint8 [H, W, 3] RGB, ``label`` uint8 [H, W], ``name`` str, and in some datasets
``instances`` int32 [H, W] (0 = no object), perhaps with ``keypoints``, the `Keypoints` of each of
these numbers, 0 included, or ``annotations``, the `Objects` of the image with masks as run-length
codes and perhaps polygons, and ``image_id`` int. Transforms map an example to another."""


class Source(Protocol):
    """The examples of one split, readable in any order and from many threads."""

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Returns one example."""
        ...

    def size(self, index: int) -> tuple[int, int]:
        """Returns the height and width of an image, without decoding it."""
        ...


@dataclasses.dataclass(frozen=True)
class Part:
    """Some examples of a split, as a split."""

    source: Source
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.indices[index]]

    def size(self, index: int) -> tuple[int, int]:
        """Returns the height and width of an image."""
        return self.source.size(self.indices[index])


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The splits of a dataset and the meaning of their labels.

    Attributes:
      name: the argument of `load`.
      classes: names and colours of the classes, and void.
      splits: the examples of "train", "val", ...
      fingerprint: a hash of everything that the examples depend on, for the record of a run.
      description: one line for reports.
      warnings: what `dense_jax.data.check` found unusual, one line each.
      category_ids: the id of each class in the files of a dataset whose objects have annotations,
        for results in its form; empty: class ids.
      num_objects: the number of objects of each image of a split, where it is known.
      absent: for each missing split that a user may ask for, why it is missing and what to do.
    """

    name: str
    classes: ClassTable
    splits: Mapping[str, Source]
    fingerprint: str
    description: str
    warnings: tuple[str, ...] = ()
    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    category_ids: Sequence[int] = ()
    num_objects: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)

    def split(self, name: str) -> Source:
        """Returns one split.

        Raises:
          UserError: there is no such split, or it is empty.
        """
        if name in self.absent:
            raise UserError(f"dataset {self.name!r} has no split {name!r}: {self.absent[name]}")
        if name not in self.splits:
            raise UserError(
                f"dataset {self.name!r} has no split {name!r}; it has {', '.join(self.splits)}; "
                "training needs train and val (see docs/data.md)"
            )
        if not len(self.splits[name]):
            raise UserError(f"split {name!r} of dataset {self.name!r} has no images; add some")
        return self.splits[name]


def names() -> list[str]:
    """Returns the names of all datasets."""
    return [module.name for module in pkgutil.iter_modules(datasets.__path__)]


def module(name: str) -> types.ModuleType:
    """Returns the module of a dataset.

    Raises:
      UserError: the name is unknown.
    """
    if name not in names():
        raise UserError(f"unknown dataset {name!r}; the known ones are {', '.join(names())}")
    return importlib.import_module(f"{datasets.__name__}.{name}")


def folder(data_dir: str | pathlib.Path | None) -> pathlib.Path | None:
    """Returns the folder that a user gave, with "~" expanded.

    Raises:
      UserError: the folder does not exist.
    """
    if data_dir is None:
        return None
    path = pathlib.Path(data_dir).expanduser()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of the dataset with --data-dir")
    return path


def load(name: str, data_dir: str | pathlib.Path | None = None, **options: Any) -> Dataset:
    """Opens a dataset by name; files are prepared once and cached.

    Args:
      name: one of `names()`.
      data_dir: the folder with the files, for datasets of files.
      **options: arguments of the dataset's own ``load``, such as ``size`` of "shapes".

    Raises:
      UserError: the name is unknown, the folder is missing, or a file is wrong.
    """
    return module(name).load(folder(data_dir), **options)
