"""Cityscapes with fine annotations: street scenes of 50 cities, 2048x1024, 19 classes and void.

M. Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016,
arXiv:1604.01685; 2,975 training, 500 validation and 1,525 test images. The folders are those of
leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip:
  leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png
  gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png   or, where it is missing, _labelTrainIds.png
Class ids are the 19 train ids. The files of label ids have all annotated classes. Cityscapes'
scripts can write files of train ids (mcordts/cityscapesScripts, helpers/labels.py). Both give the
same labels, so no conversion is necessary.
"""

import contextlib
import dataclasses
import pathlib

from dense_jax.data import prepared
from dense_jax.data.classes import IGNORE_LABEL, ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.files import Files, Pair, Sample, find_folder, read_label, read_pair
from dense_jax.errors import UserError

_VALUES = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)

CLASSES = ClassTable(
    names=(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    colours=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ),
    values=_VALUES,
    void_values=tuple(value for value in range(34) if value not in _VALUES),
)
"""Classes of ``_labelIds.png``. Licence plates, id -1, are not drawn: their pixels are car."""

TRAIN_ID_CLASSES = dataclasses.replace(CLASSES, values=(), void_values=(IGNORE_LABEL,))
"""The same classes with the values of ``_labelTrainIds.png``."""

_IMAGE = "_leftImg8bit.png"
_LABEL = "_gtFine_labelIds.png"
_TRAIN_ID_LABEL = "_gtFine_labelTrainIds.png"


def find(data_dir: pathlib.Path | None = None) -> Files:
    """Finds the pairs of the splits that have images and labels.

    Other splits are absent, with a reason. So is the public ``gtFine/test``, whose files have void
    pixels only.

    Args:
      data_dir: the folder with ``leftImg8bit`` and ``gtFine``, or its parent.

    Raises:
      UserError: the folder is not given or has no such dataset, or no split has labels.
    """
    if data_dir is None:
        raise UserError(
            "cityscapes has no automatic download; register at https://www.cityscapes-dataset.com,"
            " unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip in one folder and"
            " give it with --data-dir"
        )
    root = find_folder(
        *(data_dir / inner for inner in ("", "cityscapes", "Cityscapes")),
        holding=("leftImg8bit", "gtFine"),
        dataset="Cityscapes",
    )
    pairs, absent = [], {}
    for split in ("train", "val", "test"):
        try:
            pairs += _pairs_of(root, split)
        except UserError as reason:
            absent[split] = str(reason)
    if not pairs:
        raise UserError(absent["train"])
    description = "Cityscapes, fine annotations, 19 classes"
    return Files("cityscapes", CLASSES, pairs, description, _read, absent=absent)


def _pairs_of(root: pathlib.Path, split: str) -> list[Pair]:
    """Pairs by city and name; reading a pair reports a missing partner.

    Raises:
      UserError: the split has no images or no labels.
    """
    images = _files_by_name(root / "leftImg8bit" / split, _IMAGE)
    # Train ids only where label ids are missing: users may have made them in several ways.
    labels = _files_by_name(root / "gtFine" / split, _TRAIN_ID_LABEL)
    labels |= _files_by_name(root / "gtFine" / split, _LABEL)
    for folder, suffix, found in (("leftImg8bit", _IMAGE, images), ("gtFine", _LABEL, labels)):
        if not found:
            raise UserError(
                f"{root / folder / split}: no file CITY/*{suffix}; unpack {folder}_trainvaltest.zip"
            )
    pairs = []
    for name in sorted({*images, *labels}):
        image = root / "leftImg8bit" / split / f"{name}{_IMAGE}"
        label = root / "gtFine" / split / f"{name}{_LABEL}"
        base = pathlib.PurePath(name).name
        pairs.append(Pair(split, base, images.get(name, image), labels.get(name, label)))
    if split == "test" and _is_void(pairs[0]):
        raise UserError(
            f"{root / 'gtFine' / split}: its labels are not public, the files are all void;"
            " evaluate on val, or label the images of test with predict"
        )
    return pairs


def _files_by_name(folder: pathlib.Path, suffix: str) -> dict[str, pathlib.Path]:
    """Returns the files CITY/NAME of a suffix, by "CITY/NAME"."""
    paths = folder.glob(f"*/*{suffix}")
    return {f"{path.parent.name}/{path.name.removesuffix(suffix)}": path for path in paths}


def _is_void(pair: Pair) -> bool:
    with contextlib.suppress(UserError):  # reading all files reports a wrong one
        return bool((read_label(pair.label, _table_of(pair)) == IGNORE_LABEL).all())
    return False


def _table_of(pair: Pair) -> ClassTable:
    return TRAIN_ID_CLASSES if pair.label.name.endswith(_TRAIN_ID_LABEL) else CLASSES


def _read(pair: Pair, classes: ClassTable) -> Sample:
    del classes  # the file name decides
    return read_pair(pair, _table_of(pair))


def load(data_dir: pathlib.Path | None = None) -> Dataset:
    """Opens Cityscapes; see `find`."""
    return prepared.open_files(find(data_dir))
