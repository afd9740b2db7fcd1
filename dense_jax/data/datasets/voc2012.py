"""PASCAL VOC 2012 segmentation: photographs, 20 classes, background and void.

M. Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 88(2), 2010;
http://host.robots.ox.ac.uk/pascal/VOC/voc2012/. The extra training labels are the Semantic
Boundaries Dataset (SBD): B. Hariharan et al., "Semantic Contours from Inverse Detectors",
ICCV 2011.
"""

import dataclasses
import pathlib

import numpy as np

from dense_jax.data import files as files_lib
from dense_jax.data import prepared
from dense_jax.data.classes import IGNORE_LABEL, ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.files import Files, Pair, Sample, find_folder
from dense_jax.data.sbd import read_class_map
from dense_jax.errors import UserError

SBD_URL = (
    "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
    "benchmark.tgz"
)
_ABSENT = {"test": "its labels are not public; evaluate on val, or label its images by predict"}

CLASSES = ClassTable(
    names=(
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    )
)


def find(
    data_dir: pathlib.Path | None = None, *, sbd: bool = False, objects: bool = False
) -> Files:
    """Finds the pairs of the train and val lists.

    Args:
      data_dir: a folder with ``VOCdevkit/VOC2012``, or one of these two.
      sbd: adds to train all images of SBD that are in neither list of VOC, read from
        ``benchmark_RELEASE/dataset`` (``img``, ``cls``, ``train.txt``, ``val.txt``) in the same
        folder. With the full data, train has the 10,582 images of many papers: SBD has 11,355, of
        which 1,103 are in VOC's val; 330 images of VOC's train are not in SBD.
      objects: reads the number of the object of each pixel too, from ``SegmentationObject`` of VOC
        and ``inst`` of SBD. Images without such a file are left out, which a warning counts.

    Raises:
      UserError: the folder is not given or has no such dataset, or a list is missing or empty. A
        missing val list also stops training: SBD would add val images to train.
    """
    if data_dir is None:
        raise UserError(
            "voc2012 has no automatic download; get VOCtrainval_11-May-2012.tar from"
            " http://host.robots.ox.ac.uk/pascal/VOC/voc2012/ and give its folder with --data-dir"
        )
    voc = find_folder(
        *(data_dir / inner for inner in ("", "VOC2012", "VOCdevkit/VOC2012")),
        holding=("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"),
        dataset="PASCAL VOC",
    )
    pairs = []
    for split in ("train", "val"):
        for name in _read_list(voc / "ImageSets/Segmentation" / f"{split}.txt"):
            image = voc / "JPEGImages" / f"{name}.jpg"
            pairs.append(Pair(split, name, image, voc / "SegmentationClass" / f"{name}.png"))
    name, description = "voc2012", "PASCAL VOC 2012 segmentation, train and val"
    if sbd:
        pairs += _pairs_of_sbd(data_dir, {pair.name for pair in pairs})
        number = sum(pair.split == "train" for pair in pairs)
        name = "voc2012_sbd"
        description = f"PASCAL VOC 2012 with SBD, {number:,} of 10,582 training images"
    if not objects:
        return Files(name, CLASSES, pairs, description, absent=_ABSENT)
    everything = [dataclasses.replace(p, objects=_objects_file(p.label)) for p in pairs]
    numbered = [pair for pair in everything if pair.objects and pair.objects.is_file()]
    if not numbered:
        raise UserError(
            f"{voc}: no object has a mask of its own here (looked for "
            f"{_objects_file(pairs[0].label)}); unpack the dataset again"
        )
    missing = len(pairs) - len(numbered)
    note = f"{missing} images without object numbers (SegmentationObject or inst) are left out"
    return Files(
        f"{name}_objects",
        CLASSES,
        numbered,
        f"{description}, objects",
        _read_with_objects,
        has_instances=True,
        notes=[note] if missing else [],
        absent=_ABSENT,
    )


def _objects_file(label: pathlib.Path) -> pathlib.Path:
    """Returns the file of the object numbers that belongs to a label."""
    folder = "inst" if label.suffix == ".mat" else "SegmentationObject"
    return label.parent.with_name(folder) / label.name


def _read_with_objects(pair: Pair, classes: ClassTable) -> Sample:
    sample, path = files_lib.read_pair(pair, classes), pair.objects
    assert path
    if path.suffix == ".mat":
        numbers = read_class_map(path.read_bytes(), path, b"GTinst")
    else:
        numbers = files_lib.read_instances(path, void=IGNORE_LABEL)
    if numbers.shape != sample.label.shape:
        raise UserError(f"{path}: another size than {pair.label}; restore both")
    return dataclasses.replace(sample, instances=numbers.astype(np.uint16))


def _pairs_of_sbd(data_dir: pathlib.Path, taken: set[str]) -> list[Pair]:
    """Returns the pairs of both lists of SBD, all for train, without the names in `taken`."""
    root = find_folder(
        *(data_dir / inner for inner in ("benchmark_RELEASE/dataset", "sbd", "")),
        holding=("img", "cls"),
        dataset="SBD",
        remedy=f"unpack {SBD_URL} in the folder of VOC, or use --dataset=voc2012",
    )
    names = [*_read_list(root / "train.txt"), *_read_list(root / "val.txt")]
    return [
        Pair("train", name, root / "img" / f"{name}.jpg", root / "cls" / f"{name}.mat")
        for name in dict.fromkeys(names)
        if name not in taken
    ]


def _read_list(path: pathlib.Path) -> list[str]:
    names = path.read_text().split() if path.is_file() else []
    if not names:
        state = "empty" if path.is_file() else "missing"
        raise UserError(f"{path}: the list of images is {state}; unpack the dataset again")
    return names


def load(
    data_dir: pathlib.Path | None = None, *, sbd: bool = False, objects: bool = False
) -> Dataset:
    """Opens PASCAL VOC 2012; see `find`."""
    return prepared.open_files(find(data_dir, sbd=sbd, objects=objects))
