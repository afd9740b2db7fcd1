"""Runs with keypoints: presets, losses, and what they leave, on a network with a small trunk."""

import dataclasses
import functools
import json
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dense_jax.commands import export
from dense_jax.data import dataset
from dense_jax.data.keypoints import to_coco
from dense_jax.errors import UserError
from dense_jax.infer import predictor
from dense_jax.infer.keypoints import decode
from dense_jax.models.rcnn import faster_rcnn as models
from dense_jax.tasks import trained, training
from dense_jax.tasks.detection import truth_of
from experiments import mask_rcnn as script
from tests.test_detection_task import NUM_CLASSES, SHAPES, Trunk, batch_of, data, steps

STAR = 4  # the class that has keypoints


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(models.FasterRCNN, "_trunk", lambda self: Trunk(name="backbone"))
    with jax.numpy_dtype_promotion("standard"):  # AdamW raises a float to an integer power
        yield


def config(**changes: Any) -> script.Config:
    flags: dict[str, Any] = {
        "shapes": SHAPES, "short_side": (48,), "max_side": 64, "trained_stages": 5,
        "keypoint_branch": "on", "mask_branch": "off", "num_keypoints": 5,
    }  # fmt: skip
    return dataclasses.replace(script.PRESETS["smoke"], **{**flags, **changes})


def task(**changes: Any):
    built = script.build(config(**changes), NUM_CLASSES)
    return dataclasses.replace(built, groups=())  # the small trunk has no parts to freeze


def test_the_preset_is_that_of_the_paper():
    config = script.PRESETS["keypoints"]
    own: Any = script.build(config, 2)
    assert (own.model.num_keypoints, own.model.draws_masks) == (17, False)
    assert (own.kinds, own.headline) == (("keypoint", "box"), "keypoint_ap")
    steps = (config.num_steps, *(round(config.num_steps * x) for x in config.step_at))
    assert steps == (90_000, 60_000, 80_000)
    assert (config.learning_rate, config.batch_size) == (0.02, 16)
    assert (config.short_side[0], config.short_side[-1], config.max_side) == (640, 800, 1333)
    assert own.input_size((600, 600)) == (800, 800)
    assert config.data_options["val_json"] == "annotations/person_keypoints_val2017.json"
    both: Any = script.build(dataclasses.replace(config, mask_branch="on"), 2)  # Table 5, last row
    assert both.kinds == ("keypoint", "mask", "box")
    assert both.model.draws_masks


@pytest.mark.slow  # losses by hand are in test_keypoints
def test_one_device_equals_four_and_padding_has_no_effect():
    own = task(optimizer="sgd", momentum=0.0, mask_branch="on")
    batch = batch_of(own)
    points, valid = batch["objects"]["keypoints"], batch["objects"]["valid"]
    assert points.shape == (4, own.config.max_objects, 5, 3)
    assert points[..., 2].any()
    assert not points[~valid].any()
    hidden, junk = points.copy(), points.copy()
    hidden[..., 2], junk[~valid] = 0, (5, 5, 2)  # junk is in slots that hold no object
    others = [dict(batch, objects={**batch["objects"], "keypoints": x}) for x in (hidden, junk)]
    (one, none, padded), four = steps(own, (batch, *others), 1), next(steps(own, (batch,), 4))
    names = {"loss", "rpn_class", "rpn_box", "class", "box", "mask", "keypoint"}
    assert set(one[1]) == names
    chex.assert_trees_all_close(one, four, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(one, padded, rtol=1e-6)
    assert one[1]["keypoint"] > 0
    assert none[1]["keypoint"] == 0  # objects without keypoints train their boxes alone
    assert none[1]["box"] == pytest.approx(one[1]["box"], rel=1e-6)


def test_without_the_branch_batches_have_no_keypoints():
    assert "keypoints" not in batch_of(task(keypoint_branch="off", num_keypoints=None))["objects"]


def test_truth_has_the_keypoints_of_the_dataset():
    source = data().split("val")
    truths: list[Any] = [truth_of(source[i], keypoints=True) for i in range(len(source))]
    stars = [(t.keypoints[t.classes == 4], t.keypoints[t.classes != 4]) for t in truths]
    assert any(own[..., 2].any() for own, _ in stars)
    assert not any(others.any() for _, others in stars)
    assert truth_of(source[0]).keypoints is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished smoke run with masks and keypoints, on the small trunk."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(models.FasterRCNN, "_trunk", lambda self: Trunk(name="backbone"))
        workdir = tmp_path_factory.mktemp("keypoints") / "run"
        training.train(task(mask_branch="on", workdir=str(workdir)))
    return workdir


@pytest.fixture
def opened(run):
    return trained.load(run, task=task(mask_branch="on"))


@pytest.mark.slow
def test_a_run_leaves_scores_of_keypoints_masks_and_boxes(run):
    record = json.loads((run / "evaluation.json").read_text())
    assert record["headline"] == "keypoint_ap"
    scores = record["scores"]
    assert {"keypoint_ap", "keypoint_ap75", "keypoint_ar_20", "mask_ap", "box_ap"} <= set(scores)
    assert not {"keypoint_ap_small", "keypoint_ar_100", "box_ar_20"} & set(scores)
    assert 0 <= scores["keypoint_ap"] <= scores["keypoint_ap50"] <= 1
    assert "OKS" in record["protocol"]["keypoints"]
    page = (run / "report.html").read_text()
    assert "Keypoint AP" in page
    rows = json.loads((run / "results_keypoint.json").read_text())
    assert all({"image_id", "category_id", "score", "keypoints"} == set(row) for row in rows)
    assert {row["category_id"] for row in rows} <= {STAR}
    assert all(len(row["keypoints"]) == 15 and row["keypoints"][2] == 1 for row in rows)
    assert {re.sub(".*_", "", p.stem) for p in run.glob("results_*.json")} == {
        "keypoint", "mask", "box"
    }  # fmt: skip


@pytest.mark.slow
def test_evaluation_and_prediction_see_the_same_keypoints(run, opened, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    image = data().split("val")[0]["image"]
    Image.fromarray(image).save(images / "a.png")
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(images / "b.png")
    summary = predictor.predict_folder(opened.predictor, opened.classes, images, out)
    assert not summary.failures
    found = dataclasses.replace(opened.predict(image), shown_score=0.0)
    assert len(found) > 3
    assert found.keypoints.shape == (len(found), 5, 3)
    assert found.classes.keypoints == data().classes.keypoints
    rows = [x for x in json.loads((out / "results.json").read_text()) if x["file_name"] == "a.png"]
    scored = json.loads((run / "results_keypoint.json").read_text())
    scored = [row for row in scored if row["image_id"] == 0]
    stars = np.flatnonzero(found.class_ids == STAR)
    assert [("keypoints" in row) for row in rows] == (found.class_ids == STAR).tolist()
    for i, other in zip(stars, scored, strict=True):
        row = rows[i]
        assert row["keypoints"] == to_coco(found.keypoints[i])
        np.testing.assert_allclose(row["keypoints"], other["keypoints"], atol=2e-3)
        assert len(row["keypoint_scores"]) == 5
        assert "segmentation" in row
    found = dataclasses.replace(found, class_ids=np.full(len(found), STAR))
    plain = dataclasses.replace(found, keypoints=None)
    assert (found.overlay() != plain.overlay()).any()


def test_keypoints_move_with_their_boxes_into_the_image():
    """A network that finds what it is told, in an image that was enlarged."""
    own = task()
    size, inputs = (24, 20), own.input_size((24, 20))
    factor = inputs[1] / 20
    boxes = np.zeros((2, 4), np.float32)
    boxes[0] = np.array([4, 6, 16, 20]) * factor
    logits = np.zeros((2, 56, 56, 5), np.float32)
    for k in range(5):
        logits[0, 28, 10 * k, k] = 9
    answers = {
        "boxes": boxes, "classes": np.array([2, 0]), "scores": np.array([0.9, 0.0], np.float32),
        "valid": np.array([True, False]), "keypoint_logits": logits,
    }  # fmt: skip
    image = np.zeros((*size, 3), np.uint8)
    found: Any = own.read(answers, image, data().classes)
    assert found.keypoints.shape == (1, 5, 3)
    cell = 12 / 56
    np.testing.assert_allclose(
        found.keypoints[0, :, 0], 4 + cell * (10 * np.arange(5) + 0.5), atol=0.3
    )
    np.testing.assert_allclose(found.keypoints[0, :, 1], 6 + 14 * 28.5 / 56, atol=0.3)
    exact = decode(logits[0], boxes[0])
    scale = np.array([20 / inputs[1], 24 / inputs[0], 1])
    np.testing.assert_allclose(found.keypoints[0], exact * scale, rtol=1e-5)
    nothing = {**answers, "valid": np.zeros(2, bool)}
    empty: Any = own.read(nothing, image, data().classes)
    assert empty.keypoints.shape == (0, 5, 3)
    empty.overlay()


@pytest.mark.slow
def test_logits_of_detections_are_those_of_their_boxes(opened):
    own = opened.task
    model: Any = own.model.clone(axis_name=None)
    images, sizes = jnp.ones((1, 64, 64, 3)), jnp.array([[64, 64]])

    @jax.jit
    def run(variables):
        found = own.forward(variables, images, sizes)
        apply = functools.partial(model.apply, variables)
        levels = apply(images, train=False, method="features")
        return found, apply(levels, found["boxes"], method="locate")

    found, logits = jax.device_get(run(opened.variables))
    valid = found["valid"][0]
    assert valid.sum() > 3
    assert not found["keypoint_logits"][0][~valid].any()
    np.testing.assert_allclose(
        found["keypoint_logits"][0][valid], logits[0][valid], rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow  # test_detection_task exports boxes
def test_an_exported_program_finds_what_the_run_finds(run, opened, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "load", lambda *_: opened)
    file = tmp_path / "x.stablehlo"
    export.run(run=run, to="stablehlo", out=file)
    record = json.loads((tmp_path / "x.stablehlo.json").read_text())
    assert record["outputs"]["keypoint_logits"]["shape"] == [1, 100, 56, 56, 5]
    assert "softmax over the cells" in record["outputs"]["keypoint_logits"]["values"]
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    found = jax.device_get(program.call(image[None]))
    expected, valid = opened.predict(image), found["valid"][0]
    boxes, logits = found["boxes"][0][valid], found["keypoint_logits"][0][valid]
    points = np.array([decode(*own) for own in zip(logits, boxes, strict=True)])
    np.testing.assert_allclose(points[..., 2], expected.keypoints[..., 2], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"keypoint_branch": "off"}, "--num-keypoints=5 does not go with --keypoint-branch=off"),
        ({"mask_head": "mlp"}, "--mask-branch=off: leave out"),
    ],
)
def test_flags_that_do_not_go_together(flags, words):
    with pytest.raises(UserError, match=words):
        config(**flags)


def test_datasets_without_keypoints_are_refused():
    named = dataset.load("shapes", num_train=2)
    without = dataclasses.replace(
        named, name="nuclei", classes=dataclasses.replace(named.classes, keypoints=None)
    )
    own, other = task(), task(num_keypoints=17)
    for refused in (own.training_data, lambda data: own.evaluator(data, "val")):
        with pytest.raises(UserError, match="'nuclei' has no keypoints: leave out --keypoint-br"):
            refused(without)
    with pytest.raises(UserError, match=r"'shapes' has 5 keypoints: give --num-keypoints=5"):
        other.training_data(named)


def test_proposals_alone_learn_without_keypoints():
    own = script.build(config(learn=("trunk", "rpn")), NUM_CLASSES)
    assert own.headline == "box_ap"
    assert any(group.pattern.startswith("^(box|mask|keypoint)_") for group in own.groups)
