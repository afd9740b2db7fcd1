"""PASCAL VOC 2012 segmentation: photographs, 20 classes, background and void.

M. Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 88(2), 2010;
http://host.robots.ox.ac.uk/pascal/VOC/voc2012/. The extra training labels are the Semantic
Boundaries Dataset (SBD): B. Hariharan et al., "Semantic Contours from Inverse Detectors",
ICCV 2011.
"""

import pathlib

from dense_jax.data import prepared
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.files import Files, Pair, find_folder
from dense_jax.errors import UserError

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


def find(data_dir: pathlib.Path | None = None, *, sbd: bool = False) -> Files:
    """Finds the pairs of the train and val lists.

    Args:
      data_dir: a folder that holds ``VOCdevkit/VOC2012``, or one of these two.
      sbd: adds to train all images of SBD that are in neither list of VOC, read from
        ``benchmark_RELEASE/dataset`` (``img``, ``cls``, ``train.txt``, ``val.txt``) in the same
        folder. With the full data this gives the 10,582 training images of many papers.

    Raises:
      UserError: the folder is not given, or does not hold the dataset.
    """
    if data_dir is None:
        raise UserError(
            "voc2012 has no download that may be automated; get VOCtrainval_11-May-2012.tar from"
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
    if not sbd:
        return Files("voc2012", CLASSES, pairs, "PASCAL VOC 2012 segmentation, train and val")
    root = find_folder(
        *(data_dir / inner for inner in ("benchmark_RELEASE/dataset", "sbd", "")),
        holding=("img", "cls", "train.txt", "val.txt"),
        dataset="SBD",
    )
    taken = {pair.name for pair in pairs}
    names = [*_read_list(root / "train.txt"), *_read_list(root / "val.txt")]
    pairs += [
        Pair("train", name, root / "img" / f"{name}.jpg", root / "cls" / f"{name}.mat")
        for name in names
        if name not in taken
    ]
    return Files("voc2012_sbd", CLASSES, pairs, "PASCAL VOC 2012 with the training labels of SBD")


def _read_list(path: pathlib.Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: the list of images is missing; unpack the dataset again")
    return path.read_text().split()


def load(data_dir: pathlib.Path | None = None, *, sbd: bool = False) -> Dataset:
    """Opens PASCAL VOC 2012; see `find`."""
    return prepared.open_files(find(data_dir, sbd=sbd))
