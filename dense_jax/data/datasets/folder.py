"""The user's own images: a folder with ``images``, ``labels`` and a small class table.

Names pair images and labels (``images/x.jpg`` and ``labels/x.png``). The splits are the first of:
``images/train`` and ``labels/train``; ``train/images`` and ``train/labels``; the names in
``train.txt`` and ``val.txt``; every fifth image, chosen by a hash of its name, as val.

The class table is one of
  classes.txt, classes.csv   one class per line, in the order of the ids: ``name`` or ``name,r,g,b``
  classes.json               {"names": [...], "colours": [...], "values": [...], "void_values":
                             [...]}; only names is needed. "values" are the numbers in the files.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from dense_jax.data import prepared
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.files import Files, Pair, pairs_in, split_by_hash
from dense_jax.errors import UserError

_SPLITS = ("train", "val", "test")


def find(data_dir: pathlib.Path | None = None) -> Files:
    """Finds the class table and the pairs.

    Raises:
      UserError: the folder is not given or has no images, the class table is missing or wrong, or a
        list has a name without an image.
    """
    if data_dir is None:
        raise UserError("dataset 'folder' needs --data-dir, a folder with images/ and labels/")
    pairs = _find_pairs(data_dir)
    if not pairs:
        raise UserError(f"{data_dir}: no images here; put them in {data_dir / 'images'}")
    return Files("folder", read_classes(data_dir), pairs, f"images of {data_dir.name}")


def read_classes(folder: pathlib.Path) -> ClassTable:
    """Reads ``classes.json``, ``classes.txt`` or ``classes.csv``.

    Raises:
      UserError: the file is missing or not a class table.
    """
    for path in (folder / f"classes.{suffix}" for suffix in ("json", "txt", "csv")):
        if path.is_file():
            try:
                if path.suffix == ".json":
                    return ClassTable.from_json(json.loads(path.read_text()))
                return _parse_classes(path.read_text())
            except (ValueError, TypeError) as error:
                remedy = (
                    'write {"names": ["sky", ...]}, see docs/data.md'
                    if path.suffix == ".json"
                    else "write one class per line: name or name,r,g,b"
                )
                raise UserError(f"{path}: not a class table ({error}); {remedy}") from None
    raise UserError(f"{folder}: no class table; write classes.txt with one class name per line")


def _parse_classes(text: str) -> ClassTable:
    rows = [line.split(",") for line in text.splitlines() if line.strip()]
    colours = [(int(r), int(g), int(b)) for _, r, g, b in (row for row in rows if len(row) > 1)]
    return ClassTable([row[0].strip() for row in rows], colours)


def _find_pairs(root: pathlib.Path) -> list[Pair]:
    pairs = []
    for split in _SPLITS:
        pairs += pairs_in(split, root / "images" / split, root / "labels" / split)
        pairs += pairs_in(split, root / split / "images", root / split / "labels")
    if pairs:
        return pairs
    everything = pairs_in("train", root / "images", root / "labels")
    lists = [root / f"{split}.txt" for split in _SPLITS]
    if any(path.is_file() for path in lists):
        return [pair for path in lists if path.is_file() for pair in _listed(path, everything)]
    return split_by_hash(everything)


def _listed(path: pathlib.Path, pairs: Sequence[Pair]) -> list[Pair]:
    by_name = {pair.name: pair for pair in pairs}
    listed = []
    for line in filter(None, map(str.strip, path.read_text().splitlines())):
        pair = by_name.get(line) or by_name.get(pathlib.PurePath(line).stem)
        if pair is None:
            raise UserError(f"{path}: {line!r} is not among the images; add it or correct the list")
        listed.append(dataclasses.replace(pair, split=path.stem))
    return listed


def load(data_dir: pathlib.Path | None = None) -> Dataset:
    """Opens the images of a folder; see the docstring of this module."""
    return prepared.open_files(find(data_dir))
