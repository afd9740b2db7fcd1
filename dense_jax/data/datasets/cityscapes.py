"""Cityscapes with fine annotations: street scenes of 50 cities, 2048x1024, 19 classes and void.

M. Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016,
arXiv:1604.01685; 2,975 images to train, 500 to validate, 1,525 to test. The folders are those of
leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip:
  leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png
  gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png   or, where that is missing, _labelTrainIds.png
Class ids here are the 19 train ids. The label files count all annotated classes, and Cityscapes'
scripts can write files of train ids beside them (mcordts/cityscapesScripts, helpers/labels.py);
either gives the same labels, so that nothing has to be converted beforehand.
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
"""Of ``_labelIds.png``. Licence plates, id -1, are never drawn: their pixels are the car's."""

TRAIN_ID_CLASSES = dataclasses.replace(CLASSES, values=(), void_values=(IGNORE_LABEL,))
"""The same classes by the values of ``_labelTrainIds.png``."""

_IMAGE = "_leftImg8bit.png"
_LABEL = "_gtFine_labelIds.png"
_TRAIN_ID_LABEL = "_gtFine_labelTrainIds.png"


def find(data_dir: pathlib.Path | None = None) -> Files:
    """Finds the pairs of the splits that are there and have labels.

    A split without images or labels is left out, and said to be when it is asked for. So is the
    public ``gtFine/test``, whose files mark nothing but void.

    Args:
      data_dir: the folder that holds ``leftImg8bit`` and ``gtFine``, or its parent.

    Raises:
      UserError: the folder is not given or does not hold the dataset, or no split has labels.
    """
    if data_dir is None:
        raise UserError(
            "cityscapes is not downloaded by itself; register at https://www.cityscapes-dataset.com,"
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
    """Pairs by city and name; a partner that is missing shows when the pair is read.

    Raises:
      UserError: the split has no images or no labels.
    """
    images = _files_by_name(root / "leftImg8bit" / split, _IMAGE)
    # Train ids, which a user may have made in more than one way, only where there is nothing else.
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
            f"{root / 'gtFine' / split}: its labels are not public, the files mark void only;"
            " score val, or label the images of test by predict"
        )
    return pairs


def _files_by_name(folder: pathlib.Path, suffix: str) -> dict[str, pathlib.Path]:
    """Returns the files CITY/NAME with the suffix by "CITY/NAME"."""
    paths = folder.glob(f"*/*{suffix}")
    return {f"{path.parent.name}/{path.name.removesuffix(suffix)}": path for path in paths}


def _is_void(pair: Pair) -> bool:
    with contextlib.suppress(UserError):  # a wrong file is reported when all are read
        return bool((read_label(pair.label, _table_of(pair)) == IGNORE_LABEL).all())
    return False


def _table_of(pair: Pair) -> ClassTable:
    return TRAIN_ID_CLASSES if pair.label.name.endswith(_TRAIN_ID_LABEL) else CLASSES


def _read(pair: Pair, classes: ClassTable) -> Sample:
    del classes  # the file's name tells which values it has
    return read_pair(pair, _table_of(pair))


def load(data_dir: pathlib.Path | None = None) -> Dataset:
    """Opens Cityscapes; see `find`."""
    return prepared.open_files(find(data_dir))
