"""Cityscapes: ids, the two kinds of label files, and splits that are not there."""

import shutil

import numpy as np
import pytest
from PIL import Image

from dense_jax.data import check, dataset
from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.datasets import cityscapes
from dense_jax.errors import UserError

# Label id and train id of each class, from helpers/labels.py of the authors' scripts.
TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
    26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
# All label ids there are, and their train ids.
IDS = np.arange(34, dtype=np.uint8).reshape(2, 17)
AS_TRAIN_IDS = np.array([TRAIN_IDS.get(i, 255) for i in range(34)], np.uint8).reshape(2, 17)


def _write(root, split, city, number, label=IDS, kinds=("labelIds",), folder="gtFine"):
    name = f"{city}_{number:06d}_000019"
    image = root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", label.shape[::-1], (number, len(city), len(split))).save(image)
    for kind in kinds:
        path = root / folder / split / city / f"{name}_gtFine_{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label).save(path)
    return name


@pytest.fixture
def cities(tmp_path):
    """Three training images, two to validate, one to test with a label that marks only void."""
    for city, number in (("ulm", 1), ("ulm", 0), ("aachen", 0)):
        _write(tmp_path, "train", city, number)
    for number in range(2):
        _write(tmp_path, "val", "lindau", number)
    _write(tmp_path, "test", "bonn", 0, label=np.full((2, 17), 3, np.uint8))
    return tmp_path


def _names(source):
    return [source[i]["name"] for i in range(len(source))]


def test_label_ids_become_train_ids(cities):
    data = dataset.load("cityscapes", cities)
    train = data.split("train")
    assert _names(train) == ["aachen_000000_000019", "ulm_000000_000019", "ulm_000001_000019"]
    assert _names(data.split("val")) == ["lindau_000000_000019", "lindau_000001_000019"]
    for i in range(3):
        np.testing.assert_array_equal(train[i]["label"], AS_TRAIN_IDS)
    names = cityscapes.CLASSES.names
    assert (names[0], names[13], names[18]) == ("road", "car", "bicycle")
    assert cityscapes.CLASSES.colours[0] == (128, 64, 128)
    assert len(names) == len(set(cityscapes.CLASSES.colours)) == 19


def test_files_of_train_ids_do_where_there_is_nothing_else(cities):
    """Whoever converted the labels, fully or in part, gets the same; the originals win."""
    expected = dataset.load("cityscapes", cities)
    for path in (cities / "gtFine/train").glob("*/*labelIds.png"):
        path.unlink()
    for city, number in (("ulm", 1), ("ulm", 0), ("aachen", 0)):
        _write(cities, "train", city, number, label=AS_TRAIN_IDS, kinds=("labelTrainIds",))
    _write(cities, "val", "lindau", 0, label=AS_TRAIN_IDS[::-1], kinds=("labelTrainIds",))
    data = dataset.load("cityscapes", cities)
    assert data.fingerprint == expected.fingerprint


def test_other_files_of_the_release_are_not_taken(cities):
    before = cityscapes.find(cities).pairs
    folder = cities / "gtFine/train/ulm"
    for kind in ("color", "instanceIds"):
        Image.new("RGB", (17, 2)).save(folder / f"ulm_000000_000019_gtFine_{kind}.png")
    (folder / "ulm_000000_000019_gtFine_polygons.json").write_text("{}")
    assert cityscapes.find(cities).pairs == before
    for parent in ("cityscapes", "Cityscapes"):
        (cities / "data").mkdir(exist_ok=True)
        shutil.copytree(cities / "leftImg8bit", cities / "data" / parent / "leftImg8bit")
        shutil.copytree(cities / "gtFine", cities / "data" / parent / "gtFine")
        found = cityscapes.find(cities / "data")
        assert [pair.name for pair in found.pairs] == [pair.name for pair in before]
        shutil.rmtree(cities / "data")


def test_test_has_no_labels_unless_its_files_have_classes(cities):
    data = dataset.load("cityscapes", cities)
    assert list(data.splits) == ["train", "val"]
    with pytest.raises(UserError, match=r"no split 'test': .*gtFine/test: its labels are not publ"):
        data.split("test")
    _write(cities, "test", "bonn", 0)
    assert _names(dataset.load("cityscapes", cities).split("test")) == ["bonn_000000_000019"]


@pytest.mark.parametrize("folder", ["leftImg8bit", "gtFine"])
def test_a_missing_split_stops_who_asks_for_it_and_nobody_else(cities, folder):
    shutil.rmtree(cities / folder / "train")
    shutil.rmtree(cities / folder / "test")
    data = dataset.load("cityscapes", cities)
    assert len(data.split("val")) == 2
    for split in ("train", "test"):
        message = rf"'{split}': .*/{folder}/{split}: no file CITY/\*_.*; unpack {folder}_trainvalt"
        with pytest.raises(UserError, match=message):
            data.split(split)
    with pytest.raises(UserError, match=r"no split 'train_extra'; it has val"):
        data.split("train_extra")


def test_nothing_there(cities, tmp_path):
    with pytest.raises(UserError, match="register at https"):
        dataset.load("cityscapes")
    with pytest.raises(UserError, match=r"no Cityscapes dataset here \(looked for leftImg8bit, gt"):
        dataset.load("cityscapes", cities / "gtFine")
    shutil.rmtree(cities / "gtFine")
    (cities / "gtFine").mkdir()
    with pytest.raises(UserError, match=r"gtFine/train: no file CITY/\*_gtFine_labelIds\.png"):
        dataset.load("cityscapes", cities)


WRONG = {
    "train ids in a file of label ids": (
        lambda root: _write(root, "train", "ulm", 0, label=AS_TRAIN_IDS),
        r"ulm_000000_000019_gtFine_labelIds\.png: label value 255 .* neither a class",
    ),
    "label ids in a file of train ids": (
        lambda root: _write(root, "train", "ulm", 7, kinds=("labelTrainIds",)),
        r"ulm_000007_000019_gtFine_labelTrainIds\.png: label value 19, 20, .* class \(0\.\.18\)",
    ),
    "missing label": (
        lambda root: _write(root, "train", "ulm", 7, kinds=()),
        r"gtFine/train/ulm/ulm_000007_000019_gtFine_labelIds\.png: the file is missing",
    ),
    "missing image": (
        lambda root: next((root / "leftImg8bit/train/aachen").iterdir()).unlink(),
        r"leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit\.png: the file is missing",
    ),
}


@pytest.mark.parametrize("damage", WRONG)
def test_wrong_files_are_named(cities, damage):
    act, message = WRONG[damage]
    act(cities)
    with pytest.raises(UserError, match=message) as caught:
        dataset.load("cityscapes", cities)
    assert "\n" not in str(caught.value)
    assert len(check.check_dataset("cityscapes", cities).errors) == 1


def test_a_damaged_test_label_is_reported_like_any_other(cities):
    label = next((cities / "gtFine/test/bonn").iterdir())
    label.write_bytes(b"")
    with pytest.raises(UserError, match=r"gtFine_labelIds\.png: the file is empty"):
        dataset.load("cityscapes", cities)


def test_the_ignored_ids_are_void(cities):
    assert IGNORE_LABEL not in cityscapes.CLASSES.void_values
    values = {*cityscapes.CLASSES.values, *cityscapes.CLASSES.void_values}
    assert values == set(range(34))
    assert cityscapes.TRAIN_ID_CLASSES.values == tuple(range(19))
    assert cityscapes.TRAIN_ID_CLASSES.void_values == (IGNORE_LABEL,)
