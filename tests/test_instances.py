"""What is written of the objects of an image."""

import dataclasses
import types
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dense_jax.commands.object_flags import ObjectFlags, reading
from dense_jax.data import rle
from dense_jax.data.classes import ClassTable
from dense_jax.errors import UserError
from dense_jax.infer.instances import Instances
from dense_jax.infer.predictor import Predictor, predict_folder
from dense_jax.tasks.detection import Detection
from dense_jax.tasks.segmentation import InstanceSegmentation
from dense_jax.tasks.semantic import Semantic

CLASSES = ClassTable(("background", "a/b", "cup"))
IMAGE = np.arange(8 * 10 * 3, dtype=np.uint8).reshape(8, 10, 3)
# A box of 4 x 2 pixels whose left half is in the object, and a box of 2 x 2 that is.
FOUND = Instances(
    IMAGE,
    np.array([[2, 1, 6, 3], [5, 2, 7, 4], [0, 0, 9, 9]], np.float32),
    np.array([2, 1, 1], np.int32),
    np.array([0.9, 0.5, 0.2], np.float32),
    CLASSES,
    np.array([[[0.9, 0.3]] * 2, [[0.8] * 2] * 2, [[0.7] * 2] * 2], np.float32),
    shown_score=0.5,
)


def test_pictures_show_the_likely_objects_and_results_list_all(tmp_path):
    results = FOUND.save(tmp_path, "x", probabilities=True)
    assert [row["score"] for row in results] == [0.9, 0.5, 0.2]
    numbers = np.asarray(Image.open(tmp_path / "masks/x.png"))
    expected = np.zeros((8, 10), int)
    expected[2:4, 5:7] = 2
    expected[1:3, 2:4] = 1
    np.testing.assert_array_equal(numbers, expected)
    np.testing.assert_array_equal(rle.decode(results[0]["segmentation"]), numbers == 1)
    assert len(np.load(tmp_path / "probabilities/x.npz")["heatmaps"]) == 3
    two = dataclasses.replace(FOUND.above(0.5), shown_score=0.0)
    np.testing.assert_array_equal(FOUND.overlay(), two.overlay())
    every = dataclasses.replace(FOUND, shown_score=0.0)
    assert not np.array_equal(FOUND.overlay(), every.overlay())
    assert not (tmp_path / "cutouts").exists()


def test_cut_outs_are_transparent_around_masks(tmp_path):
    own = dataclasses.replace(FOUND, cutouts=True)
    (tmp_path / "cutouts" / "x").mkdir(parents=True)
    (tmp_path / "cutouts" / "x" / "7_old.png").write_bytes(b"")
    own.save(tmp_path, "x", probabilities=False)
    names = sorted(path.name for path in (tmp_path / "cutouts/x").iterdir())
    assert names == ["1_cup.png", "2_a-b.png"]
    picture = np.asarray(Image.open(tmp_path / "cutouts/x/1_cup.png"))
    np.testing.assert_array_equal(picture[..., :3], IMAGE[1:3, 2:4])
    assert (picture[..., 3] == 255).all()
    # The box of the third: all of it, but for what lies outside of the image.
    boxes = dataclasses.replace(own, heatmaps=None, shown_score=0.0)
    boxes.save(tmp_path, "y", probabilities=False)
    picture = np.asarray(Image.open(tmp_path / "cutouts/y/3_a-b.png"))
    np.testing.assert_array_equal(picture[..., :3], IMAGE[:8, :9])
    uneven = np.array([[[0.9, 0.3], [0.9, 0.9]]], np.float32)
    part = dataclasses.replace(own.above(0.9), heatmaps=uneven)
    part.save(tmp_path, "z", probabilities=False)
    picture = np.asarray(Image.open(tmp_path / "cutouts/z/1_cup.png"))
    np.testing.assert_array_equal(picture[..., 3], [[255, 255, 0, 0], [255] * 4])
    link = tmp_path / "cutouts" / "w"
    link.symlink_to(tmp_path)
    with pytest.raises(UserError, match="is a link"):
        own.save(tmp_path, "w", probabilities=False)


def test_one_is_told_of_images_whose_objects_are_all_unlikely(tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    assert FOUND.remark == FOUND.above(1.0).remark == ""
    none = FOUND.above(1.0)
    assert len(none) == 0
    assert none.results() == []
    unlikely = dataclasses.replace(FOUND, shown_score=0.95)
    predictor = Predictor(lambda images, sizes: {}, lambda answers, image: unlikely, "torchvision")
    notes = predict_folder(predictor, CLASSES, tmp_path, tmp_path / "out").notes
    (note,) = notes
    assert note.startswith("a.png: all objects have scores below 0.95, so that results.json alone")


def of_kind(kind):
    """A run's task, as far as flags look at it."""
    config = types.SimpleNamespace(test_score=0.05)
    return types.SimpleNamespace(finds_objects=kind.finds_objects, reads=kind.reads, config=config)


@pytest.mark.parametrize(
    ("task", "flags", "words"),
    [
        (Semantic, {"min_score": 0.5}, "--min-score is for runs that find objects"),
        (Semantic, {"cutouts": True}, "--cutouts is for runs that find objects"),
        (Detection, {"mask_threshold": 0.5}, "--mask-threshold is for runs that find masks"),
        (Detection, {"shown_score": 1.5}, "--shown-score 1.5: give a value from 0 to 1"),
        (Detection, {"min_score": float("nan")}, "--min-score nan: give"),
        (Detection, {"min_score": 0.01}, "above 0.05 alone; add --change test-score=0.01"),
    ],
)
def test_flags_of_objects_that_a_run_cannot_use(task, flags, words):
    predictor = Predictor(lambda images, sizes: {}, lambda answers, image: FOUND, "torchvision")
    own: Any = of_kind(task)
    with pytest.raises(UserError, match=words):
        reading(predictor, own, ObjectFlags(**flags))
    assert reading(predictor, own, ObjectFlags()) is predictor


def test_flags_of_objects():
    task: Any = of_kind(InstanceSegmentation)
    predictor = Predictor(lambda images, sizes: {}, lambda answers, image: FOUND, "torchvision")
    flags = ObjectFlags(min_score=0.5, shown_score=0.9, mask_threshold=0.85, cutouts=True)
    own = reading(predictor, task, flags).read({}, IMAGE)
    assert isinstance(own, Instances)
    assert own.scores.tolist() == [np.float32(0.9), 0.5]
    assert (own.shown_score, own.threshold, own.cutouts) == (0.9, 0.85, True)
    assert own.mask(0).sum() == 4
    assert own.mask(1).sum() == 0
    every = reading(predictor, task, ObjectFlags(shown_score=0.0)).read({}, IMAGE)
    assert isinstance(every, Instances)
    assert (every.shown_score, len(every), every.threshold) == (0, 3, 0.5)
