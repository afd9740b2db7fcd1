"""Keypoints: in datasets and transforms, as targets, losses and predictions, and their scores."""

import contextlib
import copy
import dataclasses
import io
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax import viz
from dense_jax.data import check, dataset, transforms
from dense_jax.data import objects as object_lib
from dense_jax.data.classes import ClassTable
from dense_jax.data.datasets import coco as coco_files
from dense_jax.data.datasets import shapes
from dense_jax.data.detection import PadObjects, ReadObjects
from dense_jax.data.keypoints import Keypoints, KeypointTable, from_coco, to_coco
from dense_jax.data.objects import Objects
from dense_jax.errors import UserError
from dense_jax.infer.keypoints import decode
from dense_jax.metrics import coco
from dense_jax.metrics.detections import Detections, Truth
from dense_jax.objectives.keypoints import KeypointTargets, keypoint_losses, keypoint_targets
from dense_jax.objectives.rcnn import RoiRule, head_objective
from tests.test_data_coco import CONTENT, write

RNG = np.random.default_rng
PEOPLE = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder"),
    *("right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip"),
    *("right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle"),
)
# pycocotools/cocoeval.py: Params.setKpParams.
SIGMAS = 0.1 * np.array([
    *(0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07),
    *(0.87, 0.87, 0.89, 0.89),
])  # fmt: skip


# Names.


def test_names_give_the_mirror_and_the_tolerance():
    table = KeypointTable(PEOPLE)
    assert table.mirror.tolist() == [0, *(i + 1 if i % 2 else i - 1 for i in range(1, 17))]
    np.testing.assert_allclose(table.sigmas, SIGMAS)
    other = KeypointTable(("L_Eye", "R_Eye", "tail", "leftPaw", "rightPaw", "left wing", "collar"))
    assert other.mirror.tolist() == [1, 0, 2, 4, 3, 5, 6]  # the other wing has no name
    assert other.sigmas.tolist() == [0.025, 0.025, 0.05, 0.05, 0.05, 0.05, 0.05]


@pytest.mark.parametrize(
    ("names", "edges", "words"),
    [
        (("a", "a"), (), "must differ"),
        ((), (), "must differ, got none"),
        ("ab", (), "a list of text"),
        (("a", "b"), ((0, 2),), "a line from keypoint 1 to 3 of 2"),
    ],
)
def test_wrong_tables_are_refused(names, edges, words):
    with pytest.raises(ValueError, match=words):
        KeypointTable(names, edges)


def test_a_class_table_keeps_its_keypoints():
    table = ClassTable(("background", "star"), keypoints=KeypointTable(("a", "b"), ((0, 1),)))
    again = ClassTable.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
    assert again.keypoints == table.keypoints
    assert "keypoints" not in ClassTable(("a",)).to_json()  # older records stay as they are
    assert "keypoints" not in json.loads(table.as_file())
    with pytest.raises(ValueError, match="part of annotations"):
        ClassTable(("a",), keypoints={"names": ["b"]})  # pyrefly: ignore


# Objects.


def people(points) -> Objects:
    points = np.array(points, np.float32)
    n = len(points)
    boxes = np.tile(np.array([0, 0, 10, 8], np.float32), (n, 1))
    ones = np.ones(n)
    mirror = np.array([0, 2, 1])
    return Objects(
        boxes, ones.astype(np.int32), ones.astype(np.int64), ones > 1, np.float32(80) * ones,
        None, Keypoints(points, mirror),
    )  # fmt: skip


# A nose, a left and a right eye, of two objects; the second one has no keypoints.
POINTS = [[[5, 1, 2], [2.5, 3, 1], [0, 0, 0]], [[0, 0, 0]] * 3]


def points_of(objects: Objects) -> list[Any]:
    assert objects.keypoints is not None
    return objects.keypoints.points.tolist()


def test_keypoints_move_with_their_objects():
    """A flip swaps left and right by their names; points without a label stay zero."""
    given = people(POINTS)
    assert points_of(given.flip(10))[0] == [[5, 1, 2], [0, 0, 0], [7.5, 3, 1]]
    assert points_of(given.flip(10).flip(10)) == POINTS
    assert points_of(given.resize((8, 10), (16, 5)))[0] == [[2.5, 2, 2], [1.25, 6, 1], [0, 0, 0]]
    # Two columns to the right and two rows down: the nose is above the window.
    assert points_of(given.window(2, 2, (6, 8)))[0] == [[0, 0, 0], [0.5, 1, 1], [0, 0, 0]]
    assert points_of(given.window(0, 0, (8, 4)))[0] == [[0, 0, 0], [2.5, 3, 1], [0, 0, 0]]
    assert points_of(given.select(np.array([1]))) == [POINTS[1]]
    read: Any = Objects.from_json(given.to_json())
    assert points_of(read) == POINTS
    assert read.keypoints.mirror.tolist() == [0, 2, 1]
    assert read.keypoints.points.dtype == np.float32
    none: Any = Objects.from_json(given.select(np.zeros(2, bool)).to_json())
    assert none.keypoints.points.shape == (0, 3, 3)
    without = dataclasses.replace(given, keypoints=None)
    assert "keypoints" not in json.loads(without.to_json())  # fingerprints of before stay
    assert without.flip(10).keypoints is None


def test_training_gets_keypoints_in_slots_if_it_wants_them():
    example = {"image": np.zeros((8, 10, 3), np.uint8), "label": np.zeros((8, 10), np.uint8),
               "annotations": dataclasses.replace(people(POINTS), masks=[])}  # fmt: skip
    plain = ReadObjects()(example)
    assert plain["objects"].keypoints is None
    read = ReadObjects(keypoints=True)(example)
    flipped = transforms.RandomFlip(1.0)(read, RNG(0))
    slots = PadObjects(3)(flipped)["objects"]
    assert slots["keypoints"].shape == (3, 3, 3)
    assert slots["keypoints"].dtype == np.float32
    assert slots["keypoints"][0].tolist() == [[5, 1, 2], [0, 0, 0], [7.5, 3, 1]]
    assert not slots["keypoints"][1:].any()


def test_stars_have_their_tips_as_keypoints():
    """Names go clockwise from the top; tips behind later objects are hidden."""
    source = shapes.load(num_train=40, occlusion=0.9).split("train")
    counts = np.zeros(3, int)
    for i in range(len(source)):
        found = object_lib.find(source[i], 0, keypoints=True)
        assert found.keypoints is not None
        assert isinstance(found.masks, np.ndarray)
        points, is_star = found.keypoints.points, found.classes == 4
        assert not points[~is_star].any()
        for mask, own in zip(found.masks, points, strict=True):
            counts += np.bincount(own[:, 2].astype(int), minlength=3)
            for x, y, v in own.astype(int).tolist():
                near = mask[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
                assert v < 2 or near.any()  # the line around an object is void
        for own in points[(points[..., 2] > 0).all(1)]:
            right, down = (own[:, :2] - own[:, :2].mean(0)).T
            turns = np.arctan2(right, -down) / (2 * np.pi) * 5
            assert abs(turns[0]) <= 0.51
            np.testing.assert_allclose(np.diff(turns) % 5, 1, atol=0.02)
    assert counts[2] > counts[1] > 0


# COCO's files.


def with_keypoints(**changes: Any) -> dict[str, Any]:
    content = copy.deepcopy(CONTENT)
    for category in content["categories"]:
        if category["name"] == "brush":
            category |= {
                "keypoints": ["tip", "left_end", "right_end"],
                "skeleton": [[1, 2], [1, 3]],
            }
    content["annotations"][0] |= {
        "keypoints": [2, 3, 2, 4, 4, 1, 0, 0, 0], "num_keypoints": 2, **changes
    }  # fmt: skip
    return content


def opened(root, content):
    write(root, content)
    write(root, with_keypoints(), name="val.json")
    return dataset.load("coco", root)


def test_keypoints_of_annotations_are_read(tmp_path):
    """Numbers of pixels become places; other objects have no keypoint."""
    data = opened(tmp_path, with_keypoints())
    names = data.classes.names
    has_them = [i for i, name in enumerate(names) if name == "brush"]
    table = KeypointTable(("tip", "left_end", "right_end"), ((0, 1), (0, 2)), has_them)
    assert data.classes.keypoints == table
    assert table.have(np.arange(len(names))).tolist() == [name == "brush" for name in names]
    assert "3 keypoints" in data.description
    found = data.split("train")[0]["annotations"]
    assert found.keypoints.points.tolist() == [
        [[2.5, 3.5, 2], [4.5, 4.5, 1], [0, 0, 0]], *[[[0, 0, 0]] * 3] * 2
    ]  # fmt: skip
    assert found.keypoints.mirror.tolist() == [0, 2, 1]
    assert data.split("train")[1]["annotations"].keypoints.points.shape == (0, 3, 3)
    assert not any("keypoint" in line for line in data.warnings)
    assert to_coco(found.keypoints.points[0][:2]) == [2, 3, 1, 4, 4, 1]
    assert dataset.load("coco", tmp_path).fingerprint == data.fingerprint
    plain = tmp_path / "plain"
    write(plain, CONTENT)
    write(plain, CONTENT, name="val.json")
    without = dataset.load("coco", plain)
    assert without.classes.keypoints is None
    assert without.split("train")[0]["annotations"].keypoints is None
    assert without.fingerprint != data.fingerprint


def test_cocos_own_files_of_people_lie_beside_their_images(tmp_path):
    for split in ("train", "val"):
        name = f"annotations/person_keypoints_{split}2017.json"
        write(tmp_path, with_keypoints(), images=[], name=name)
        write(tmp_path / f"{split}2017", {"images": []}, images=[], name="unused.json")
        for entry in CONTENT["images"]:
            path = tmp_path / f"{split}2017" / entry["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            viz.Image.new("RGB", (10, 8)).save(path)
    names = {f"{s}_json": f"annotations/person_keypoints_{s}2017.json" for s in ("train", "val")}
    found = coco_files.find(tmp_path, **names)
    assert all(pair.image.is_file() for pair in found.pairs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"keypoints": [2, 3, 2, 4, 4, 1]},
            r"annotation 1 \(a\) cannot be read \(6 numbers, not 9",
        ),
        ({"keypoints": [2, 3, 2, 4]}, "4 numbers, not 9 for 3 keypoints"),
        ({"keypoints": [2, 3, 3, 0, 0, 0, 0, 0, 0]}, "a visibility of 3, not 0, 1 or 2"),
        ({"keypoints": [float("nan"), 3, 2, 0, 0, 0, 0, 0, 0]}, "not finite"),
        ({"keypoints": ["x"] * 9}, "cannot be read"),
    ],
)
def test_wrong_keypoints_stop_a_run(tmp_path, change, words):
    write(tmp_path, with_keypoints(**change))
    write(tmp_path, with_keypoints(), name="val.json")
    with pytest.raises(UserError, match=words) as error:
        dataset.load("coco", tmp_path)
    assert "\n" not in str(error.value)
    assert "the keypoints of annotation" in str(check.check_dataset("coco", tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keypoints": [20, 3, 2, 4, 4, 1, 0, 0, 0]}, "1 objects with keypoints outside of their"),
        ({"num_keypoints": 3}, "1 objects whose num_keypoints is not the number of labelled"),
    ],
)
def test_unusual_keypoints_are_told(tmp_path, change, words):
    data = opened(tmp_path, with_keypoints(**change))
    assert any(f"train: {words}" in line for line in data.warnings)
    assert not any(f"val: {words}" in line for line in data.warnings)


def test_files_and_categories_have_the_same_keypoints(tmp_path):
    content = with_keypoints()
    for category in content["categories"]:
        category["keypoints"] = [category["name"], "end"]
        category.pop("skeleton", None)
    write(tmp_path, content)
    write(tmp_path, content, name="val.json")
    with pytest.raises(UserError, match="differ from those of other categories: give a file for"):
        dataset.load("coco", tmp_path)
    other = with_keypoints()
    for category in other["categories"]:
        category.pop("skeleton", None)
    write(tmp_path, with_keypoints())
    write(tmp_path, other, name="val.json")
    with pytest.raises(UserError, match="other keypoints than in"):
        dataset.load("coco", tmp_path)
    broken = with_keypoints()
    broken["categories"][0]["skeleton"] = [[1, 9]]
    write(tmp_path, broken)
    with pytest.raises(UserError, match="not in COCO's format"):
        dataset.load("coco", tmp_path)


# Targets and losses.


def slow_targets(keypoints, boxes, index, bins):
    """torchvision's `keypoints_to_heatmap`, point by point."""
    cells = np.zeros((*boxes.shape[:2], keypoints.shape[2]), int)
    valid = np.zeros(cells.shape, bool)
    for b, f, k in np.ndindex(cells.shape):
        x, y, v = keypoints[b, index[b, f], k]
        x0, y0, x1, y1 = boxes[b, f]
        column = bins - 1 if x == x1 else math.floor((x - x0) * (bins / (x1 - x0)))
        row = bins - 1 if y == y1 else math.floor((y - y0) * (bins / (y1 - y0)))
        valid[b, f, k] = v > 0 and 0 <= row < bins and 0 <= column < bins
        cells[b, f, k] = row * bins + column if valid[b, f, k] else 0
    return cells, valid


def slow_loss(logits, cells, valid, classes):
    """Cross entropies, point by point."""
    losses = []
    for b, f, k in np.ndindex(cells.shape):
        if classes[b, f] > 0 and valid[b, f, k]:
            own = logits[b, f, ..., k].ravel().astype(float)
            losses.append(np.log(np.exp(own - own.max()).sum()) + own.max() - own[cells[b, f, k]])
    return sum(losses), len(losses)


def test_targets_and_losses_equal_the_slow_twins():
    rng = RNG(0)
    keypoints = rng.uniform(0, 40, (2, 3, 4, 3)).astype(np.float32)
    keypoints[..., 2] = rng.integers(0, 3, keypoints.shape[:3])
    corner = rng.uniform(0, 15, (2, 6, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(3, 30, (2, 6, 2))], -1).astype(np.float32)
    index, classes = rng.integers(0, 3, (2, 6)).astype(np.int32), rng.integers(0, 3, (2, 6))
    # On the four edges of the first box.
    keypoints[0, index[0, 0], 0], keypoints[0, index[0, 0], 1] = [*boxes[0, 0, :2], 2], [
        *boxes[0, 0, 2:], 1
    ]  # fmt: skip
    logits = rng.normal(0, 3, (2, 6, 8, 8, 4)).astype(np.float32)
    cells, valid = slow_targets(keypoints, boxes, index, 8)
    assert (cells[0, 0, 0], cells[0, 0, 1]) == (0, 63)
    assert 0 < valid.sum() < valid.size
    found = jax.jit(keypoint_targets, static_argnums=3)(keypoints, boxes, index, 8)
    np.testing.assert_array_equal(found.cells, cells)
    np.testing.assert_array_equal(found.valid, valid)
    total, count = jax.jit(keypoint_losses)(logits, found, jnp.asarray(classes))["keypoint"]
    expected, number = slow_loss(logits, cells, valid, classes)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert int(count) == number > 2


def test_targets_and_losses_by_hand():
    """In a box of 14 pixels with 56 cells, a cell is a quarter of a pixel."""
    points = np.array(
        [[[[10.5, 20.0, 2], [24.0, 34.0, 1], [24.5, 25, 2], [12, 22, 0]]]], np.float32
    )
    box = jnp.array([[[10.0, 20, 24, 34]]])
    found = keypoint_targets(jnp.asarray(points), box, jnp.zeros((1, 1), jnp.int32), 56)
    assert found.cells.tolist() == [[[2, 56 * 56 - 1, 0, 0]]]
    assert found.valid.tolist() == [[[True, True, False, False]]]
    logits = jnp.zeros((1, 1, 56, 56, 4))
    total, count = keypoint_losses(logits, found, jnp.ones((1, 1), jnp.int32))["keypoint"]
    assert math.isclose(float(total) / int(count), math.log(56 * 56), rel_tol=1e-6)
    none = keypoint_losses(logits, found, jnp.zeros((1, 1), jnp.int32))["keypoint"]
    assert [float(x) for x in none] == [0, 0]


def test_boxes_without_an_area_and_empty_slots_have_finite_gradients():
    points, boxes = jnp.zeros((1, 2, 3, 3)), jnp.zeros((1, 4, 4))
    targets = keypoint_targets(points, boxes, jnp.zeros((1, 4), jnp.int32), 8)
    assert not targets.valid.any()

    def loss(logits):
        return keypoint_losses(logits, targets, jnp.ones((1, 4), jnp.int32))["keypoint"][0]

    value, grad = jax.value_and_grad(loss)(jnp.ones((1, 4, 8, 8, 3)))
    assert float(value) == 0
    assert not grad.any()


@pytest.mark.parametrize("plus_one", [False, True])
def test_each_box_learns_the_keypoints_of_its_own_object(plus_one):
    """A network that finds each keypoint where it is has no loss."""
    boxes = jnp.array([[[0.0, 0, 16, 16], [16, 16, 32, 32]]])
    # In the centres of the cells (1, 0) and (2, 3) of 4 x 4: rows and columns.
    points = jnp.array([[[[2.0, 6.0, 2.0]], [[30.0, 26.0, 1.0]]]])
    rule = RoiRule(sample=8, max_foreground=4, plus_one=plus_one)

    def apply(_, boxes: Any = None, *, method):
        if method == "features":
            return [jnp.zeros((1, 8, 8, 1))]
        if method == "classify":
            shape = (1, boxes.shape[1], 3)
            return jnp.zeros(shape), jnp.zeros((*shape, 4))
        assert method == "locate"
        cell = jnp.where(boxes[..., 0] == 0, 4, 11)
        return 30.0 * jax.nn.one_hot(cell, 16).reshape(1, -1, 4, 4, 1)

    def loss(points):
        batch = {
            "images": jnp.zeros((1, 32, 32, 3)),
            "index": jnp.zeros(1, jnp.int32),
            "objects": {
                "boxes": boxes, "classes": jnp.array([[1, 2]]), "keypoints": points,
                "valid": jnp.ones((1, 2), bool),
            },
            "proposals": {  # background comes first
                "boxes": jnp.concatenate([jnp.array([[[0.0, 20, 10, 30]]]), boxes], axis=1),
                "valid": jnp.ones((1, 3), bool),
            },
        }  # fmt: skip
        losses = head_objective(rule, keypoints=True)
        found = jax.jit(lambda key: losses(apply, batch, key))(jax.random.key(0))
        assert set(found) == {"class", "box", "keypoint"}
        return [float(x) for x in found["keypoint"]]

    total, count = loss(points)
    assert count == 4  # two objects, and a proposal like each
    assert total < 1e-3
    assert loss(points[:, ::-1])[1] == 0  # those of the other one are outside
    assert loss(points.at[0, 0, 0, 0].set(14.0))[0] > 50
    assert loss(points.at[0, 0, 0, 2].set(0.0))[1] == 2  # not labelled


# Predictions.


def slow_decode(logits, box):
    """torchvision's `heatmaps_to_keypoints`, pixel by pixel, in double precision."""

    def weight(t):
        t = abs(t)
        if t <= 1:
            return 1.25 * t**3 - 2.25 * t**2 + 1
        return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    cells, num = len(logits), logits.shape[2]
    sides = [max(float(box[2] - box[0]), 1.0), max(float(box[3] - box[1]), 1.0)]
    width, height = math.ceil(sides[0]), math.ceil(sides[1])
    found = []
    for k in range(num):
        best = (-math.inf, 0, 0)
        for i, j in np.ndindex(height, width):
            y, x = (i + 0.5) * cells / height - 0.5, (j + 0.5) * cells / width - 0.5
            value = 0.0
            for p in range(math.floor(y) - 1, math.floor(y) + 3):
                for q in range(math.floor(x) - 1, math.floor(x) + 3):
                    cell = logits[min(max(p, 0), cells - 1), min(max(q, 0), cells - 1), k]
                    value += weight(y - p) * weight(x - q) * float(cell)
            if value > best[0]:
                best = (value, i, j)
        value, i, j = best
        x = box[0] + (j + 0.5) * sides[0] / width
        found.append([x, box[1] + (i + 0.5) * sides[1] / height, value])
    return np.array(found)


def test_decoded_keypoints_equal_the_slow_twin():
    rng = RNG(0)
    for sides in ([9.3, 14.0], [0.4, 7.7], [30.2, 5.5], [8, 8]):
        logits = rng.normal(0, 2, (8, 8, 2)).astype(np.float32)
        corner = rng.uniform(-3, 20, 2)
        box = np.concatenate([corner, corner + sides]).astype(np.float32)
        found = decode(logits, box)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, slow_decode(logits, box), rtol=1e-4, atol=1e-4)


def test_decoded_keypoints_by_hand():
    """One pixel a cell: the centre of the highest; and back into the cell of its target."""
    logits = np.zeros((56, 56, 2), np.float32)
    logits[3, 50, 0], logits[55, 0, 1] = 4, 2
    found = decode(logits, np.array([10, 20, 66, 76], np.float32))
    np.testing.assert_allclose(found, [[60.5, 23.5, 4], [10.5, 75.5, 2]], rtol=1e-6)
    for box in ([3.0, 5, 91, 49], [0, 0, 400, 300]):
        at = decode(logits, np.array(box, np.float32))[None, None]
        cells = keypoint_targets(
            jnp.asarray(at), jnp.array([[box]], jnp.float32), jnp.zeros((1, 1), jnp.int32), 56
        )
        assert isinstance(cells, KeypointTargets)
        assert cells.cells.tolist() == [[[3 * 56 + 50, 55 * 56]]]


def test_keypoints_are_drawn_with_their_lines():
    image = np.zeros((40, 40, 3), np.uint8)
    points = np.array([[[10.5, 10.5, 1], [30.5, 10.5, 1], [10.5, 30.5, 0]]])
    picture = viz.objects(
        image, np.array([[0, 0, 40, 40]]), np.array([0]), ["x"], np.array([[0, 0, 250]], np.uint8),
        keypoints=points, edges=((0, 1), (0, 2)),
    )  # fmt: skip
    assert picture[10, 20].tolist() == [0, 0, 250]  # on the line
    assert picture[10, 10].tolist() == [0, 0, 250]
    assert not picture[25:35, 5:15].any()  # one that is not known, and its line


# Scores.


def slow_oks(truth, found, box, area, sigmas):
    """pycocotools' `computeOks` of one pair."""
    distances = []
    labelled = truth[:, 2] > 0
    for (x, y, v), (u, w, _), sigma in zip(truth, found, sigmas, strict=True):
        dx, dy = u - x, w - y
        if not labelled.any():
            width, height = box[2] - box[0], box[3] - box[1]
            dx = max(0, box[0] - width - u) + max(0, u - box[2] - width)
            dy = max(0, box[1] - height - w) + max(0, w - box[3] - height)
        if v > 0 or not labelled.any():
            distances.append((dx**2 + dy**2) / (2 * (area + np.spacing(1)) * (2 * sigma) ** 2))
    return np.mean(np.exp(-np.array(distances)))


def test_similarity_by_hand():
    """One of two keypoints is sqrt(2 area) 2 sigma away: OKS (1 + 1/e) / 2 = 0.684."""
    truth = Truth.build(
        [[0, 0, 100, 100]], [1], area=[5000], keypoints=[[[10, 10, 2], [50, 50, 1], [0, 0, 0]]]
    )
    found = Detections.build(
        [[0, 0, 100, 100]], [1], [0.9], keypoints=[[[12, 10, 1], [50, 50, 1], [90, 5, 1]]]
    )
    scores = coco.average_precision([truth], [found], 2, "keypoint", np.array([0.01, 0.1, 0.1]))
    assert scores.ap == pytest.approx(0.4)  # 0.5, 0.55, 0.6 and 0.65 of ten
    assert (scores.ap50, scores.ap75) == pytest.approx((1, 0))
    assert scores.ap_medium == pytest.approx(0.4)
    assert scores.ar_20 == pytest.approx(0.4)
    assert np.isnan([scores.ap_large, scores.ap_small, scores.ar_100]).all()
    points = truth.keypoints, found.keypoints
    assert points[0] is not None
    assert points[1] is not None
    oks = slow_oks(points[0][0], points[1][0], truth.boxes[0], 5000, [0.01, 0.1, 0.1])
    assert oks == pytest.approx((1 + math.exp(-1)) / 2)


def random_people(number, rng):
    """Images of people, some of them without keypoints or crowds, and noisy detections."""
    truths, found = [], []
    for _ in range(number):
        n, m = rng.integers(1, 5), rng.integers(0, 30)
        corner = rng.uniform(0, 100, (n, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(20, 200, (n, 2))], axis=1)
        sides = boxes[:, None, 2:] - boxes[:, None, :2]
        points = np.concatenate(
            [boxes[:, None, :2] + rng.random((n, 17, 2)) * sides, rng.integers(0, 3, (n, 17, 1))],
            -1,
        )
        points[rng.random(n) < 0.3, :, 2] = 0
        points[points[..., 2] == 0] = 0
        area = 0.5 * sides.prod(-1)[:, 0]
        truths.append(
            Truth.build(boxes, rng.integers(1, 3, n), crowd=rng.random(n) < 0.1, area=area,
                        keypoints=points)
        )  # fmt: skip
        own = rng.integers(0, n, m)
        noise = rng.normal(0, 1, (m, 17, 2)) * rng.uniform(0, 25, (m, 1, 1))
        guess = np.concatenate([points[own, :, :2] + noise, np.ones((m, 17, 1))], -1)
        scores = rng.integers(1, 100, m) / 100
        found.append(Detections.build(boxes[own], rng.integers(1, 3, m), scores, keypoints=guess))
    return truths, found


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_reference(seed):
    coco_reference = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    truths, found = random_people(12, RNG(seed))
    content: dict[str, Any] = {
        "info": {}, "images": [{"id": i} for i in range(1, 13)],
        "categories": [{"id": 1, "name": "1"}, {"id": 2, "name": "2"}], "annotations": [],
    }  # fmt: skip
    results = []
    for image, (truth, guess) in enumerate(zip(truths, found, strict=True), 1):
        assert truth.keypoints is not None
        assert guess.keypoints is not None
        for i, (x0, y0, x1, y1) in enumerate(truth.boxes.tolist()):
            # COCO's numbers are those of pixels.
            points = truth.keypoints[i] - [0.5, 0.5, 0]
            content["annotations"].append({
                "id": len(content["annotations"]) + 1, "image_id": image,
                "category_id": int(truth.classes[i]), "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": truth.area[i], "iscrowd": int(truth.crowd[i]),
                "keypoints": points.ravel().tolist(),
                "num_keypoints": int((points[:, 2] > 0).sum()),
            })  # fmt: skip
        for i in range(len(guess)):
            points = guess.keypoints[i] - [0.5, 0.5, 0]
            results.append({
                "image_id": image, "category_id": int(guess.classes[i]),
                "score": float(guess.scores[i]), "keypoints": points.ravel().tolist(),
            })  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        reference = coco_reference.COCO()
        reference.dataset = content
        reference.createIndex()
        evaluation = cocoeval.COCOeval(reference, reference.loadRes(results), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    scores = coco.average_precision(truths, found, 3, "keypoint", KeypointTable(PEOPLE).sigmas)
    names = ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar_20")
    np.testing.assert_allclose(
        [getattr(scores, n) for n in names], evaluation.stats[:6], rtol=1e-12
    )
    assert 0.01 < scores.ap < 0.95
    # The similarity that counted, of each pair.
    truth, guess = truths[0], found[0]
    for class_id in (1, 2):
        table = evaluation.ious.get((1, class_id))
        if not len(table):
            continue
        rows = np.flatnonzero(guess.classes == class_id)
        ranked = rows[np.argsort(-guess.scores[rows], kind="mergesort")][:20]
        for a, i in enumerate(ranked):
            for b, j in enumerate(np.flatnonzero(truth.classes == class_id)):
                args = truth.keypoints[j], guess.keypoints[i], truth.boxes[j], truth.area[j]
                if args[0][:, 2].any():
                    assert table[a, b] == pytest.approx(slow_oks(*args, SIGMAS), abs=1e-12)


def test_what_cannot_be_compared_is_refused():
    truth, found = Truth.build([[0, 0, 1, 1]], [1]), Detections.build([], [], [])
    with pytest.raises(ValueError, match="an image has no keypoints to compare"):
        coco.average_precision([truth], [found], 2, "keypoint")
    with pytest.raises(UserError, match="a predicted keypoint is not finite"):
        Detections.build([[0, 0, 1, 1]], [1], [0.5], keypoints=np.full((1, 2, 3), np.nan))
    with pytest.raises(ValueError, match="lengths of an image's objects differ"):
        Truth.build([[0, 0, 1, 1]], [1], keypoints=np.zeros((2, 3, 3)))
    some = Detections.build([[0, 0, 1, 1]] * 2, [1, 1], [0.5, 0.2], keypoints=np.ones((2, 3, 3)))
    second: Any = some.select(np.array([False, True]))
    assert second.keypoints.shape == (1, 3, 3)


def test_numbers_of_coco_come_back():
    numbers = [3.0, 4.0, 1.0, 7.0, 9.0, 1.0]
    assert to_coco(from_coco(numbers, 2)) == numbers
