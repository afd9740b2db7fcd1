"""COCO's layout: which objects an image gets, what is counted, what is refused."""

import copy
import json
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dense_jax.data import check, dataset
from dense_jax.data.datasets import coco
from dense_jax.errors import UserError

# An image of 8 x 10 pixels, and its file in a folder below.
CONTENT: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.png", "height": 8, "width": 10},
        {"id": 3, "file_name": "inner/b.png", "height": 8, "width": 10},
    ],
    "categories": [{"id": 90, "name": "brush"}, {"id": 2, "name": "bicycle"}],
    "annotations": [
        # A rectangle of 4 x 3 pixels, a smaller one inside of it, and a crowd.
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [1, 2, 4, 3], "area": 12.0,
         "segmentation": [[1, 2, 5, 2, 5, 5, 1, 5]], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [2, 3, 1, 1], "area": 1.0,
         "segmentation": [[2, 3, 3, 3, 3, 4, 2, 4]], "iscrowd": 0},
        {"id": 5, "image_id": 7, "category_id": 2, "bbox": [8, 0, 2, 8], "area": 16,
         "segmentation": {"size": [8, 10], "counts": [64, 16]}, "iscrowd": 1},
    ],
}  # fmt: skip


def write(root, content, images=None, name="train.json"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(content))
    for entry in content["images"] if images is None else images:
        path = root / "images" / entry["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (entry["width"], entry["height"])).save(path)


@pytest.fixture
def content():
    return copy.deepcopy(CONTENT)


def opened(root, content, val=None):
    write(root, content)
    write(root, val or content, name="val.json")
    return dataset.load("coco", root)


def test_objects_boxes_and_labels_by_hand(tmp_path, content):
    data = opened(tmp_path, content)
    assert data.classes.names == ("background", "bicycle", "brush")  # in the order of the ids
    assert data.category_ids == (0, 2, 90)
    assert data.num_objects == {"train": [3, 0], "val": [3, 0]}
    first, second = data.split("train")[0], data.split("train")[1]
    assert (first["name"], first["image_id"]) == ("a", 7)
    assert (second["name"], second["image_id"]) == ("inner/b", 3)
    found = first["annotations"]
    np.testing.assert_array_equal(found.boxes, [[1, 2, 5, 5], [2, 3, 3, 4], [8, 0, 10, 8]])
    assert found.classes.tolist() == [2, 1, 1]
    assert found.crowd.tolist() == [False, False, True]
    assert found.areas.tolist() == [12, 1, 16]
    assert found.ids.tolist() == [1, 2, 5]
    expected = np.zeros((8, 10), np.uint8)
    expected[2:5, 1:5], expected[3, 2], expected[:, 8:] = 2, 1, 1
    np.testing.assert_array_equal(first["label"], expected)  # the smaller object is on top
    np.testing.assert_array_equal(found.mask(0), _rectangle(2, 5, 1, 5))
    np.testing.assert_array_equal(found.mask(2), _rectangle(0, 8, 8, 10))
    assert len(second["annotations"]) == 0
    assert not second["label"].any()


def _rectangle(top, bottom, left, right):
    mask = np.zeros((8, 10), bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 99}, "1 annotations of images that it does not list, left out"),
        ({"category_id": 1}, "1 annotations of categories that it does not list, left out"),
        ({"id": 1}, "1 annotations with the id of another one"),
        ({"bbox": [2, 3, 0, 1]}, "1 boxes without an area inside of their image, left out"),
        ({"bbox": [20, 3, 4, 1]}, "1 boxes without an area inside of their image, left out"),
        ({"bbox": [2, 3, float("nan"), 1]}, "1 boxes without an area inside"),
        ({"bbox": [2, 3, 30, 1]}, "1 boxes that leave their image, cut at its edges"),
        ({"segmentation": [[2, 3, 3, 3]]}, "1 objects without a polygon of three points"),
        ({"segmentation": []}, "1 objects without a polygon of three points"),
    ],
)
def test_flaws_are_counted_and_told(tmp_path, content, change, words):
    content["annotations"][1] |= change
    write(tmp_path, content)
    write(tmp_path, CONTENT, name="val.json")
    report = str(check.check_dataset("coco", tmp_path))
    assert f"train: {words}" in report
    assert f"val: {words.split(' ', 1)[1]}" not in report
    data = dataset.load("coco", tmp_path)
    assert any(words in line for line in data.warnings)
    is_left_out = "left out" in words or "without an area" in words
    assert data.num_objects["train"] == [3 - is_left_out, 0]


def test_parts_that_may_be_missing(tmp_path, content):
    for annotation in content["annotations"]:
        for key in ("id", "area", "iscrowd"):
            annotation.pop(key, None)
    del content["annotations"][0]["bbox"]
    found = opened(tmp_path, content).split("train")[0]["annotations"]
    np.testing.assert_array_equal(found.boxes[0], [1, 2, 5, 5])  # of its mask
    assert found.areas.tolist() == [12, 1, 16]
    assert not found.crowd.any()


@pytest.mark.parametrize("annotations", ["missing", []])
def test_images_without_annotations(tmp_path, content, annotations):
    if annotations == "missing":
        del content["annotations"]
    else:
        content["annotations"] = annotations
    data = opened(tmp_path, CONTENT, content)
    assert data.num_objects["val"] == [0, 0]
    words = "no list of annotations" if annotations == "missing" else "2 images without objects"
    assert any(words in line for line in data.warnings)


def without(content, part, key):
    for entry in content[part]:
        del entry[key]
    return content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c | {"images": []},
            r"train\.json: not annotations in COCO's format \(no images",
        ),
        (lambda c: [], r"train\.json: not annotations"),
        (lambda c: c | {"categories": []}, r"train\.json: no categories"),
        (lambda c: c | {"images": c["images"] * 2}, r"two images have the id 7"),
        (lambda c: c | {"categories": c["categories"] * 2}, "two category entries have the id 90"),
        (lambda c: without(c, "categories", "name"), r"train\.json: .*an entry has no 'name'"),
        (lambda c: without(c, "images", "height"), r"train\.json: .*an entry has no 'height'"),
        (
            lambda c: c | {"categories": [{"id": i, "name": f"c{i}"} for i in range(300)]},
            "1 to 255",
        ),
        (
            lambda c: c | {"images": [c["images"][0] | {"file_name": "../a.png"}]},
            "leaves the folder",
        ),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, content, change, words):
    changed = change(content)
    for name in ("train.json", "val.json"):
        write(tmp_path, changed, CONTENT["images"], name)
    with pytest.raises(UserError, match=words):
        coco.find(tmp_path)


def test_wrong_images_and_masks_are_named(tmp_path, content):
    content["images"][0]["height"] = 9
    content["annotations"] = []
    write(tmp_path, content)
    write(tmp_path, CONTENT, name="val.json")
    Image.new("RGB", (10, 8)).save(tmp_path / "images" / "a.png")
    report = check.check_dataset("coco", tmp_path)
    assert "10x8 pixels, but train.json says 10x9" in report.errors[0]
    content = copy.deepcopy(CONTENT)
    content["annotations"][2]["segmentation"]["size"] = [4, 20]
    write(tmp_path, content)
    with pytest.raises(UserError, match=r"segmentation of annotation 5 \(a\) cannot be read"):
        dataset.load("coco", tmp_path)


def test_runs_that_do_not_fill_the_image_are_refused(tmp_path, content):
    content["annotations"][2]["segmentation"]["counts"] = [64, 8]
    write(tmp_path, content)
    write(tmp_path, CONTENT, name="val.json")
    with pytest.raises(UserError, match="runs of 72 pixels on an image of 80"):
        dataset.load("coco", tmp_path)


def test_other_categories_in_val_and_missing_files(tmp_path, content):
    with pytest.raises(UserError, match="no annotations of train here"):
        coco.find(tmp_path)
    write(tmp_path, content)
    with pytest.raises(UserError, match="no annotations of val here"):
        coco.find(tmp_path)
    content["categories"][0]["name"] = "comb"
    write(tmp_path, content, name="val.json")
    with pytest.raises(UserError, match=r"val\.json: other categories than in .*train\.json"):
        coco.find(tmp_path)
    with pytest.raises(UserError, match=r"--val-json=x\.json: .* is missing"):
        coco.find(tmp_path, val_json="x.json")
    with pytest.raises(UserError, match="no automatic download"):
        coco.find(None)


@pytest.mark.parametrize(
    ("json_file", "folder"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2014.json", "train2014"),
        ("train/_annotations.coco.json", "train"),
        ("annotations/train.json", "images/train"),
    ],
)
def test_usual_layouts(tmp_path, content, json_file, folder):
    write(tmp_path, content, name=json_file)
    write(tmp_path, content, name="val.json")
    target = tmp_path / folder
    target.parent.mkdir(exist_ok=True)
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    target.mkdir(parents=True, exist_ok=True)
    for path in moved.iterdir():
        path.rename(target / path.name)
    (tmp_path / "images").mkdir(exist_ok=True)
    pairs = [p for p in coco._find_files(tmp_path, {}).items() if p[0] == "train"]
    part = coco._Part.read("train", pairs[0][1], tmp_path)
    assert part.pairs[0].image == target / "a.png"


def test_annotations_anywhere(tmp_path, content):
    write(tmp_path / "data", content, name="labels/own.json")
    path = str(tmp_path / "data" / "labels" / "own.json")
    own = coco.find(tmp_path / "data", train_json="labels/own.json", val_json=path)
    assert [pair.split for pair in own.pairs] == ["train", "train", "val", "val"]


@pytest.mark.slow
def test_real_images(data_root, tmp_path):
    data = dataset.load("coco", data_root / "coco_subset")
    assert {split: len(source) for split, source in data.splits.items()} == {
        "train": 112,
        "val": 100,
    }
    assert data.classes.num_classes == 81
    assert data.category_ids[1:4] == (1, 2, 3)
    assert data.category_ids[-1] == 90
    assert sum(data.num_objects["train"]) == 952
    assert sum(data.num_objects["val"]) == 958
    folder = pathlib.Path(data_root) / "coco_subset" / "annotations"
    truth = json.loads((folder / "instances_val2017.json").read_text())
    by_image: dict[int, list] = {}
    for annotation in truth["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    for index in (0, 3, 17):
        example = data.split("val")[index]
        own, objects = by_image[example["image_id"]], example["annotations"]
        assert objects.ids.tolist() == [a["id"] for a in own]
        expected = np.array([a["bbox"] for a in own], np.float32)
        expected[:, 2:] += expected[:, :2]
        np.testing.assert_allclose(objects.boxes, expected, atol=1e-3)
        for i, annotation in enumerate(own):
            assert data.category_ids[objects.classes[i]] == annotation["category_id"]
            count = np.count_nonzero(objects.mask(i))
            assert abs(count - annotation["area"]) <= 2 + 0.1 * annotation["area"]
