"""The user's own images: a folder with ``images``, ``labels`` and a small class table.

Names pair images and labels (``images/x.jpg`` and ``labels/x.png``). The splits are the first of:
``images/train`` and ``labels/train``; ``train/images`` and ``train/labels``; the names in
``train.txt`` and ``val.txt``, here or in ``ImageSets/Segmentation``; every fifth image, chosen by a
hash of its name, as val. Folders and lists of splits do not go together.

Folders and lists may have the usual other names, in any capitals: training, valid, validation, dev,
testing.

The class table is one of
  classes.txt, classes.csv   one class per line, in the order of the ids: ``name`` or ``name,r,g,b``
  classes.json               {"names": [...], "colours": [...], "values": [...], "void_values":
                             [...]}; only names is needed. "values" are the numbers in the files.
"""

import csv
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence

from dense_jax.data import prepared
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.files import Files, Pair, pairs_in, pictures, read_text, split_by_hash
from dense_jax.data.pictures import SUFFIXES
from dense_jax.errors import UserError

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_HEADINGS = {
    *("category", "categories", "class", "classes", "id", "index", "label", "labels", "name"),
    *("names", "classname", "classnames", "labelname", "labelnames", "categoryname"),
    *("klasse", "klassen", "klassenname", "bezeichnung", "kategorie", "classe", "nom", "nome"),
    *("clase", "clases", "nombre", "categoria", "categoría", "catégorie", "klasa", "класс", "类别"),
}
_COLOUR = r"\d{1,3}[;\s]+\d{1,3}[;\s]+\d{1,3}"  # without commas
_BESIDE_COLOUR = re.compile(rf"{_COLOUR}[;,\s].*|.*[;,\s]{_COLOUR}")
_NUMBERED = re.compile(r"(\d+)(?:\s*[:;.)]|\s)\s*\S.*")


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
                    return ClassTable(**json.loads(read_text(path)))
                return _parse_classes(read_text(path))
            except (ValueError, TypeError, RecursionError, csv.Error) as error:
                remedy = (
                    'write {"names": ["sky", ...]}, see docs/data.md'
                    if path.suffix == ".json"
                    else "write one class per line: name or name,r,g,b"
                )
                raise UserError(f"{path}: not a class table ({error}); {remedy}") from None
    raise UserError(f"{folder}: no class table; write classes.txt with one class name per line")


def _parse_classes(text: str) -> ClassTable:
    """Reads a class from each line, and refuses lines that would be read as other classes.

    Raises:
      ValueError: with the line and what to do.
    """
    lines = {i: line.strip() for i, line in enumerate(text.splitlines(), 1) if line.strip()}
    rows = [[cell.strip() for cell in next(csv.reader([line]))] for line in lines.values()]
    is_numbered = _is_numbered(list(lines.values()), rows)
    first = min(lines, default=0)
    for (i, line), row in zip(lines.items(), rows, strict=True):
        if wrong := _what_is_wrong(line, row, i == first, is_numbered):
            raise ValueError(f"line {i}, {line!r}, {wrong}")
    colours = [(int(r), int(g), int(b)) for _, r, g, b in (row for row in rows if len(row) > 1)]
    return ClassTable([row[0] for row in rows], colours)


def _what_is_wrong(line: str, row: Sequence[str], is_first: bool, is_numbered: bool) -> str | None:
    """Says why a line is no class, and what to do; None if it may be one."""
    if line.startswith(("#", "//", "%")):
        return "is a comment and would be the name of a class: remove it"
    heading = re.split("[,;\t]", line)[0].strip("\"' :").lower()
    if is_first and re.sub("[ _-]", "", heading) in _HEADINGS:
        return "is a heading and would be the name of class 0: remove it"
    if _BESIDE_COLOUR.fullmatch(line):
        return "has a colour without commas: write name,r,g,b"
    if not row[0]:
        return "has no name: write name or name,r,g,b"
    if is_numbered:
        return (
            "begins with a number, as all lines do: remove the numbers where they are 0, 1, 2, ...,"
            " otherwise write them as values in classes.json"
        )
    return None if len(row) in (1, 4) else f"has {len(row)} parts between commas"


def _is_numbered(lines: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Whether all lines begin with another number; a name such as "2 wheeler" may do so too."""
    found = [
        row[0] if len(row) == 2 and row[0].isdecimal() else match and match[1]
        for row, match in zip(rows, map(_NUMBERED.fullmatch, lines), strict=True)
    ]
    return len(lines) > 1 and None not in found and len(set(found)) == len(lines)


def _find_pairs(root: pathlib.Path) -> list[Pair]:
    pairs, lists = _in_folders(root), _lists(root)
    if pairs and lists:
        path = next(iter(lists.values()))
        raise UserError(
            f"{path}: a list beside {pairs[0].image.parent.relative_to(root)}, which is a split as"
            " well; remove or rename one"
        )
    if pairs:
        if flat := [*pictures(root / "images"), *pictures(root / "labels")]:
            raise UserError(
                f"{flat[0]}: beside {pairs[0].image.parent.relative_to(root)}, and in no split"
                f" ({len(flat)} such files); move it to one, or remove it"
            )
        return pairs
    everything = pairs_in("train", root / "images", root / "labels")
    if not lists:
        return split_by_hash(everything)
    return [pair for split, path in lists.items() for pair in _listed(path, split, everything)]


def _in_folders(root: pathlib.Path) -> list[Pair]:
    """Returns the pairs of the folders that are splits; none if there are none.

    Raises:
      UserError: two folders are one split.
    """
    images, labels, outer = map(_under_splits, (root / "images", root / "labels", root))
    pairs = []
    for split, names in _SPLITS.items():
        found = {}
        for name in names:
            folder = outer.get(name, root / name)
            inner = (
                images.get(name, root / "images" / name),
                labels.get(name, root / "labels" / name),
            )
            for candidate in (inner, (folder / "images", folder / "labels")):
                if own := pairs_in(split, *candidate):
                    found[candidate[0]] = own
        if len(found) > 1:
            folders = " and ".join(str(folder.relative_to(root)) for folder in found)
            raise UserError(f"{root}: {folders} are both {split}; remove or rename one")
        pairs += [pair for own in found.values() for pair in own]
    return pairs


def _lists(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the list of each split that has one.

    Raises:
      UserError: two lists are of one split, or in two places.
    """
    inner = root / "ImageSets" / "Segmentation"
    here, there = _under_splits(root, ".txt"), _under_splits(inner, ".txt")
    if here and there:
        one, other = (next(iter(found.values())) for found in (here, there))
        raise UserError(f"{root}: lists in two places, {one.name} and {other}; remove those of one")
    lists = {}
    for split, names in _SPLITS.items():
        paths = [path for name in names if (path := (here or there).get(name)) and path.is_file()]
        if len(paths) > 1:
            both = f"{paths[0].name} and {paths[1].name}"
            raise UserError(f"{root}: {both} both list {split}; remove one")
        if paths:
            lists[split] = paths[0]
    return lists


def _under_splits(folder: pathlib.Path, suffix: str = "") -> dict[str, pathlib.Path]:
    """Returns what a folder has under the names of splits, in any capitals, by name.

    Raises:
      UserError: two names differ only in capitals.
    """
    usual = {f"{name}{suffix}": name for names in _SPLITS.values() for name in names}
    found: dict[str, pathlib.Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = usual.get(path.name.lower())
        if name and (other := found.setdefault(name, path)) != path:
            raise UserError(f"{folder}: {other.name} and {path.name} are one split; remove one")
    return found


def _listed(path: pathlib.Path, split: str, pairs: Sequence[Pair]) -> list[Pair]:
    """Returns the pairs that the lines of a list name."""
    by_name = {pair.name: pair for pair in pairs}
    lines: dict[str, str] = {}
    for line in filter(None, map(str.strip, read_text(path).splitlines())):
        found = _named(_one_file(line, by_name, path), by_name)
        if not found:
            raise UserError(f"{path}: {line!r} is not among the images; add it or correct the list")
        if len(found) > 1:
            both = " and ".join(by_name[name].image.name for name in found)
            raise UserError(f"{path}: {line!r} may be {both}; write the whole name of the file")
        name = found[0]
        if name in lines:
            raise UserError(
                f"{path}: {line!r} and {lines[name]!r} both name the image {name}; remove one"
            )
        lines[name] = line
    return [dataclasses.replace(by_name[name], split=split) for name in lines]


def _one_file(line: str, by_name: Mapping[str, Pair], path: pathlib.Path) -> str:
    """Returns the image of a line, which may also name its label: ``images/x.jpg labels/x.png``.

    Raises:
      UserError: the files have different names, and names pair images and labels.
    """
    files = [file for file in re.split(r"[\s,;]+", line) if file]
    last = pathlib.PurePath(line).name
    has_gap = len(re.split(r"[\s,;]+", last)) > 1  # in the name, not in a folder
    is_file = _stem(files[0]) != pathlib.PurePath(files[0]).name or _named(files[0], by_name)
    if len(files) < 2 or not is_file or (has_gap and _named(line, by_name)):
        return line
    if len({*map(_stem, files)}) > 1:
        raise UserError(
            f"{path}: {line!r} names files of different names, and names pair images with labels;"
            " rename the label, and write one name in each line"
        )
    return files[0]


def _named(file: str, by_name: Mapping[str, Pair]) -> list[str]:
    """Returns the images that a name or a file may be: the one of exactly this name, or all."""
    name = pathlib.PurePath(file).name
    found = [known for known in dict.fromkeys((_stem(file), name)) if known in by_name]
    exact = [known for known in found if by_name[known].image.name == name]
    return exact or found


def _stem(file: str) -> str:
    """Returns the name of a file without folder, and without the suffix of a picture."""
    path = pathlib.PurePath(file)
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def load(data_dir: pathlib.Path | None = None) -> Dataset:
    """Opens the images of a folder; see the docstring of this module."""
    return prepared.open_files(find(data_dir))
