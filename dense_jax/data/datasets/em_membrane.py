"""Membranes of nerve cells under the electron microscope: the labelled stack of ISBI 2012.

Slices of 512x512 pixels through the ventral nerve cord of a Drosophila larva, the data of U-Net's
first experiment (A. Cardona et al., PLoS Biology 8(10), 2010; I. Arganda-Carreras et al., Frontiers
in Neuroanatomy 9, 2015). Label files are 255 inside a cell and 0 on a membrane. Neighbouring slices
are similar, so val is one block at the end of the stack.
"""

import dataclasses
import pathlib

from dense_jax.data import objects, prepared
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.files import Files, Pair, Sample, pairs_in, read_pair
from dense_jax.errors import UserError

CLASSES = ClassTable(
    names=("membrane", "cell"),
    colours=((0, 0, 0), (160, 200, 240)),
    values=(0, 255),
    void_values=(),
)


def find(data_dir: pathlib.Path | None = None, *, val_slices: int = 4) -> Files:
    """Finds the slices and splits the stack.

    Args:
      data_dir: the folder with ``images/NN.png`` and ``labels/NN.png``, or the layout of
        zhixuhao/unet, ``data/membrane/train`` with ``image/N.png`` and ``label/N.png``, or a
        parent of either.
      val_slices: number of slices at the end of the stack for val.

    Raises:
      UserError: the folder is not given, has no such dataset, or has too few slices.
    """
    if data_dir is None:
        raise UserError(
            "em_membrane has no automatic download; get data/membrane/train of"
            " https://github.com/zhixuhao/unet and give its folder with --data-dir"
        )
    images, labels = _find_folders(data_dir)
    pairs = sorted(pairs_in("train", images, labels), key=_slice_number)
    if not 0 <= val_slices <= len(pairs):
        raise UserError(f"{images}: {len(pairs)} slices cannot give {val_slices} to val")
    pairs = [
        dataclasses.replace(
            pair,
            name=f"{_slice_number(pair):02d}",
            split="val" if i >= len(pairs) - val_slices else "train",
        )
        for i, pair in enumerate(pairs)
    ]
    description = f"EM membranes (ISBI 2012), the last {val_slices} slices for validation"
    return Files("em_membrane", CLASSES, pairs, description, read_slice, has_instances=True)


def read_slice(pair: Pair, classes: ClassTable) -> Sample:
    """Reads one slice; its instances are the 4-connected components of class "cell"."""
    sample = read_pair(pair, classes)
    instances = objects.number({"label": sample.label}, classes.names.index("membrane"))
    if (count := instances.max()) >= 2**16:
        raise UserError(f"{pair.label}: {count} separate cells; give a label without such noise")
    return dataclasses.replace(sample, instances=instances)


def _find_folders(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    for inner in ("", "em_membrane", "train", "membrane/train", "data/membrane/train"):
        for images, labels in (("images", "labels"), ("image", "label")):
            if (root / inner / images).is_dir() and (root / inner / labels).is_dir():
                return root / inner / images, root / inner / labels
    raise UserError(
        f"{root}: no em_membrane dataset here (looked for images and labels, image and label);"
        " give the folder that holds it with --data-dir"
    )


def _slice_number(pair: Pair) -> int:
    if not pair.name.isdecimal():
        raise UserError(
            f"{pair.image}: the name is not a slice number; name the files 00.png, 01.png, ... in"
            " the order of the stack"
        )
    return int(pair.name)


def load(data_dir: pathlib.Path | None = None, *, val_slices: int = 4) -> Dataset:
    """Opens the stack; see `find`."""
    return prepared.open_files(find(data_dir, val_slices=val_slices))
