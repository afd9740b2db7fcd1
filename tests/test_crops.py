import json
import pickle
from typing import Any

import numpy as np
import pytest

from dense_jax.data import crops, proposals
from dense_jax.data.datasets.shapes import ShapesSpec, load
from dense_jax.errors import UserError
from dense_jax.ops.boxes import iou

# Two objects of class 1, one of which touches one of class 2; V is not labelled.
V = 255
LABEL = np.array(
    [
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0, 1],
        [0, V, 2, 2, 0, 1],
        [0, 0, 2, 2, 0, 0],
    ],
    np.uint8,
)


class Memory:
    """A source of given examples."""

    def __init__(self, *examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    def size(self, index):
        return self.examples[index]["label"].shape


def example(label=LABEL, name="a", **more) -> dict[str, Any]:
    image = np.arange(label.size * 3).reshape(*label.shape, 3).astype(np.uint8)
    return {"image": image, "label": label, "name": name, **more}


def slow_cut(array, box, fill):
    x0, y0, x1, y1 = box
    rows = []
    for y in range(y0, y1):
        row = []
        for x in range(x0, x1):
            inside = 0 <= y < array.shape[0] and 0 <= x < array.shape[1]
            row.append(array[y, x] if inside else np.broadcast_to(fill, array.shape[2:]))
        rows.append(row)
    return np.array(rows, array.dtype)


@pytest.mark.parametrize(
    "box", [(1, 1, 4, 3), (-2, -1, 8, 6), (4, 2, 9, 5), (-5, -5, -1, -2), (0, 0, 6, 4)]
)
def test_cut_fills_what_lies_outside(box):
    image = example()["image"]
    np.testing.assert_array_equal(crops.cut(image, box, (7, 8, 9)), slow_cut(image, box, (7, 8, 9)))
    np.testing.assert_array_equal(crops.cut(LABEL, box, V), slow_cut(LABEL, box, V))


def test_instances_are_objects_where_there_are_some():
    instances = np.where(LABEL == 2, 9, 0).astype(np.int32)
    (found,) = crops.find_objects(Memory(example(instances=instances)), 0, min_side=1)
    assert (found.object_id, found.label, found.box) == (9, 2, (2, 2, 4, 4))


def test_tight_boxes_with_the_class_of_the_object():
    found = crops.find_objects(Memory(example(), example(name="b")), 0, min_side=1)
    boxes = {(w.label, w.box) for w in found if w.index == 0}
    assert boxes == {(1, (1, 0, 3, 2)), (1, (5, 1, 6, 3)), (2, (2, 2, 4, 4))}
    assert [w.name for w in found] == ["a"] * 3 + ["b"] * 3
    assert len(crops.find_objects(Memory(example()), 0, min_side=2)) == 2
    with pytest.raises(UserError, match="--stages=whole"):
        crops.find_objects(Memory(example()), 0, min_side=3)


def test_an_object_without_labelled_pixels_is_none():
    instances = np.where(LABEL == V, 1, 0).astype(np.int32)
    with pytest.raises(UserError, match="no image shows"):
        crops.find_objects(Memory(example(instances=instances)), 0, min_side=1)


def test_stage_1_shows_one_object_alone():
    source = Memory(example())
    (one,) = (w for w in crops.find_objects(source, 0, 1) if w.label == 2)
    windows = crops.enlarged([one], 3.0)
    alone = crops.Crops(source, windows, fill=(1, 2, 3), background=0)
    crop = alone[0]
    assert windows[0].box == (0, 0, 6, 6)
    assert alone.size(0) == (6, 6) == crop["label"].shape
    expected = np.where(np.isin(LABEL, [2, V]), LABEL, 0)
    np.testing.assert_array_equal(crop["label"][:4], expected)
    assert np.all(crop["label"][4:] == V)
    np.testing.assert_array_equal(crop["image"][:4], source[0]["image"])
    assert np.all(crop["image"][4:] == [1, 2, 3])
    every = crops.Crops(source, windows, fill=(1, 2, 3))[0]
    np.testing.assert_array_equal(every["label"][:4], LABEL)
    assert len(pickle.loads(pickle.dumps(alone))) == 1  # worker processes get a copy


def test_enlarging_keeps_the_centre():
    assert crops.enlarge((10, 20, 30, 60), 1.2) == (8, 16, 32, 64)
    assert crops.enlarge((10, 20, 30, 60), 1.0) == (10, 20, 30, 60)


def test_sliding_windows_are_even_and_large_first():
    windows = crops.sliding_windows((60, 120))
    assert windows.shape == (39, 4)
    assert tuple(windows[0]) == (0, 0, 120, 60)
    areas = np.prod(windows[:, 2:] - windows[:, :2], axis=1)
    assert np.all(np.diff(areas) <= 0)
    assert set(areas) == {7200, 3200, 1800, 800}
    for area in set(areas):  # each size covers the image
        covered = np.zeros((60, 120), bool)
        for x0, y0, x1, y1 in windows[areas == area]:
            covered[y0:y1, x0:x1] = True
        assert covered.all()


@pytest.fixture(scope="module")
def shapes():
    spec = ShapesSpec(size=(48, 64), num_train=6, num_val=1, num_test=1)
    return load(**vars(spec)).splits["train"]


def test_proposals_overlap_an_object_of_their_class(shapes):
    objects = crops.find_objects(shapes, 0)
    windows = crops.propose(shapes, objects, seed=1)
    assert {w.index for w in windows} == {w.index for w in objects}
    for w in windows:
        same = [o for o in objects if o.index == w.index]
        overlaps = iou(np.array([w.box]), np.array([o.box for o in same]))[0]
        assert overlaps.max() >= 0.5
        assert same[overlaps.argmax()].label == w.label
    assert {(o.index, o.box) for o in objects} <= {(w.index, w.box) for w in windows}
    assert crops.propose(shapes, objects, seed=1) == windows
    assert crops.propose(shapes, objects, seed=2) != windows
    strict = crops.propose(shapes, objects, seed=1, min_iou=0.8)
    assert len(strict) < len(windows)


def test_proposals_of_a_file_are_filtered(shapes):
    objects = crops.find_objects(shapes, 0)
    first = objects[0]
    far = (1000, 1000, 1010, 1010)
    boxes = {shapes[i]["name"]: [far] for i in range(len(shapes))}
    boxes[first.name] = [far, first.box]
    (kept,) = crops.propose(shapes, objects, boxes=boxes)
    assert kept == first
    with pytest.raises(UserError, match="--min-iou"):
        crops.propose(shapes, objects[:1], boxes={first.name: [far]})
    with pytest.raises(UserError, match=first.name):
        crops.propose(shapes, objects[:1], boxes={})


def test_rare_classes_are_repeated_up_to_the_median():
    windows = [
        crops.Window(i, "a", (0, 0, 1, 1), label, 1)
        for i, label in enumerate([1] * 9 + [2] * 6 + [3] * 2)
    ]
    balanced = crops.balance(windows)
    assert [sum(w.label == c for w in balanced) for c in (1, 2, 3)] == [9, 6, 6]
    assert set(balanced) == set(windows)


def test_file_of_proposals(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"a": [[0.4, 1, 5.6, 9], [-3, 0, 4, 4]], "b": []}))
    boxes = crops.read_proposals(path)
    assert boxes == {"a": [(0, 1, 6, 9), (-3, 0, 4, 4)], "b": []}
    assert proposals.of_image(boxes, "b") == []
    for text, message in [
        ('{"a": [[1, 2, 3]]}', "box of 'a'"),
        ('{"a": [[5, 0, 4, 9]]}', "box of 'a'"),
        ('{"a": "boxes"}', "box of 'a'"),
        ("[]", "no object"),
        ("{", "not JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            crops.read_proposals(path)
    with pytest.raises(UserError, match="cannot be read"):
        crops.read_proposals(tmp_path / "none.json")
