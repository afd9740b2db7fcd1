"""The script of Mask R-CNN: presets, losses, and what a run with masks leaves."""

import dataclasses
import functools
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dense_jax.commands import evaluate, export
from dense_jax.commands.object_flags import ObjectFlags, reading
from dense_jax.data import rle
from dense_jax.errors import UserError
from dense_jax.infer import predictor
from dense_jax.infer.pasting import paste
from dense_jax.models.rcnn import faster_rcnn as models
from dense_jax.tasks import trained, training
from dense_jax.tasks.detection import truth_of
from experiments import faster_rcnn
from experiments import mask_rcnn as script
from tests import contract, members
from tests.test_detection_task import NUM_CLASSES, SHAPES, Trunk, batch_of, data, steps
from tests.test_faster_rcnn import OTHER, REFUSED, VIEWS

OTHER = {**OTHER, "mask_target": "bitmap"}  # what test_flags tries of this script too
# Another number than the dataset's is refused; used in test_keypoint_task.
REFUSED = {**REFUSED, "num_keypoints": "--num-keypoints=17 does not go with"}
NEEDED = {"backbone": {"neck": "c5", "anchor_sizes": (16, 32)}, **VIEWS}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(models.FasterRCNN, "_trunk", lambda self: Trunk(name="backbone"))
    with jax.numpy_dtype_promotion("standard"):  # AdamW raises a float to an integer power
        yield


def config(**changes: Any) -> script.Config:
    base = dataclasses.replace(
        script.PRESETS["smoke"], shapes=SHAPES, short_side=(48,), max_side=64, trained_stages=5
    )
    return dataclasses.replace(base, **changes)


def task(**changes: Any):
    built = script.build(config(**changes), NUM_CLASSES)
    return dataclasses.replace(built, groups=())  # the small trunk has no parts to freeze


@functools.cache
def built(preset):
    return script.build(script.PRESETS[preset], 81)


def test_presets_are_the_rows_of_the_papers_table():
    rows = {
        name: (model.backbone, model.neck, built(name).config.batch_size)
        for name in script.PRESETS
        if name.startswith("paper") and (model := built(name).model)
    }
    assert rows == {
        "paper": ("resnet50", "fpn", 16),
        "paper_r101_fpn": ("resnet101", "fpn", 16),
        "paper_r101_c4": ("resnet101", "c4", 16),
        "paper_x101_fpn": ("resnext101_64x4d", "fpn", 8),
    }
    for name in rows:
        config = built(name).config
        steps = (config.num_steps, *(round(config.num_steps * x) for x in config.step_at))
        assert steps == (160_000, 120_000)
        assert config.learning_rate == (0.01 if "x101" in name else 0.02)


def test_recipes_make_and_paste_masks_as_their_codes():
    made: dict[str, Any] = {
        name: task(recipe=name) for name in ("torchvision", "detectron2", "paper")
    }
    conventions = {name: own.convention for name, own in made.items()}
    assert conventions == {
        "torchvision": "torchvision", "detectron2": "detectron2", "paper": "torchvision"
    }  # fmt: skip
    targets = {name: own.config.differences.mask_target for name, own in made.items()}
    assert targets == {"torchvision": "soft", "detectron2": "polygon", "paper": "polygon"}
    assert made["paper"].model.objectness == "sigmoid"  # of Detectron, not of Faster R-CNN


def test_without_masks_it_is_faster_rcnn():
    own = task(mask_branch="off")
    flags = {f.name: getattr(own.config, f.name) for f in dataclasses.fields(faster_rcnn.Config)}
    other = faster_rcnn.build(faster_rcnn.Config(**flags), NUM_CLASSES)
    names = [list(contract.shapes_of(x.model, (1, 64, 64, 3))[1]["params"]) for x in (own, other)]
    assert names[0] == names[1]
    assert own.headline == "box_ap"
    assert "masks" not in batch_of(own)["objects"]


@pytest.mark.slow  # test_detection_task has the same of boxes; losses by hand are in test_masks
def test_one_device_equals_four_and_padding_has_no_effect():
    """More slots for objects, which would need more memory for their masks, change no loss."""
    own = task(optimizer="sgd", momentum=0.0)
    batch = batch_of(own)
    assert batch["objects"]["masks"].shape == (4, own.config.max_objects, 64, 64)
    none = dict(batch, objects={key: np.zeros_like(x) for key, x in batch["objects"].items()})
    (one, empty), four = steps(own, (batch, none), 1), next(steps(own, (batch,), 4))
    assert empty[1]["mask"] == empty[1]["box"] == 0  # no objects, no loss of masks
    assert empty[1]["class"] > 0
    assert set(one[1]) == {"loss", "rpn_class", "rpn_box", "class", "box", "mask"}
    chex.assert_trees_all_close(one, four, rtol=1e-4, atol=1e-6)
    more = dict(batch, objects={
        key: np.pad(value, [(0, 0), (0, 5)] + [(0, 0)] * (value.ndim - 2), constant_values=bad)
        for (key, value), bad in zip(sorted(batch["objects"].items()),
                                     (9.0, 3, True, False), strict=True)
    })  # fmt: skip
    # The random numbers of proposals are as many as proposals and objects together, so that only
    # losses of anchors can be compared; masks of no boxes are finite.
    found = next(steps(own, (more,), 1))
    chex.assert_trees_all_close(found[1]["rpn_class"], one[1]["rpn_class"], rtol=1e-5)
    assert np.isfinite(found[1]["mask"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished smoke run on the small trunk."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(models.FasterRCNN, "_trunk", lambda self: Trunk(name="backbone"))
        workdir = tmp_path_factory.mktemp("masks") / "run"
        training.train(task(workdir=str(workdir)))
    return workdir


def test_a_run_leaves_scores_and_the_masks_that_predict_draws(run, tmp_path):
    check_scores_of_masks_and_of_boxes(run)
    check_evaluation_and_prediction_see_the_same_masks(run, tmp_path)
    check_a_run_is_evaluated_with_other_settings(run, tmp_path)


def check_scores_of_masks_and_of_boxes(run):
    record = json.loads((run / "evaluation.json").read_text())
    assert record["headline"] == "mask_ap"
    scores = record["scores"]
    assert 0 <= scores["mask_ap"] <= scores["mask_ap50"] <= 1
    assert 0 <= scores["box_ap"] <= scores["box_ap50"] <= 1
    assert record["protocol"]["masks"] == "pasted as by torchvision, from 0.5 on"
    files = {picture["file"] for picture in record["pictures"]}
    assert {"precision_mask_val.png", "precision_box_val.png"} <= {x.split("/")[-1] for x in files}
    results = json.loads((run / "results_mask.json").read_text())
    assert rle.decode(results[0]["segmentation"]).shape == (48, 40)
    assert {"image_id", "category_id", "score"} <= set(results[0])


def test_truth_has_the_masks_of_the_dataset():
    example = data().split("val")[0]
    truth = truth_of(example, masks=True)
    assert truth.masks is not None
    assert len(truth.masks) == len(truth)
    covered = np.any([rle.decode(mask) for mask in truth.masks], axis=0)
    assert not covered[example["label"] == 0].any()
    assert covered.any()
    assert truth_of(example).masks is None


def check_evaluation_and_prediction_see_the_same_masks(run, tmp_path):
    """A folder of any sizes: masks, boxes and one picture with the number of each object."""
    opened = trained.load(run, task=task())
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    source = data().split("val")
    Image.fromarray(source[0]["image"]).save(images / "a.png")
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(images / "b.png")
    all_shown = reading(opened.predictor, opened.task, ObjectFlags(shown_score=0.0))
    summary = predictor.predict_folder(all_shown, opened.classes, images, out)
    assert not summary.failures
    found = opened.predict(source[0]["image"])
    assert len(found) > 3
    assert found.heatmaps.shape == (len(found), 28, 28)
    rows = [x for x in json.loads((out / "results.json").read_text()) if x["file_name"] == "a.png"]
    scored = json.loads((run / "results_mask.json").read_text())
    scored = [row for row in scored if row["image_id"] == 0]
    assert len(rows) == len(scored) == len(found)
    for i, (row, other) in enumerate(zip(rows, scored, strict=True)):
        mask = rle.decode(row["segmentation"])
        np.testing.assert_array_equal(mask, rle.decode(other["segmentation"]))
        window = paste(found.heatmaps[i], found.boxes[i], (48, 40), "torchvision")
        np.testing.assert_array_equal(mask, window.mask((48, 40)))
    numbers = np.asarray(Image.open(out / "masks" / "a.png"))
    assert numbers.shape == (48, 40)
    first = rle.decode(rows[0]["segmentation"])
    assert (numbers[first] == 1).all()
    assert (out / "overlays" / "a.png").exists()


def check_a_run_is_evaluated_with_other_settings(run, tmp_path):
    changes = ("test-merge=union", "test-flip=on", "test-score=0.2")
    opened = trained.load(run, changes=changes, task=script.build)
    assert opened.task.config == config(
        workdir=str(run), test_merge="union", test_flip="on", test_score=0.2
    )
    with pytest.raises(UserError, match="leave test-flip=on out"):
        trained.load(run, changes=["test-flip=on"], task=task())
    with pytest.raises(UserError, match="--test-flip=on does not go"):
        trained.load(run, changes=["test-flip=on"], task=script.build)
    evaluate.run(run=run, change=changes)
    record = json.loads(
        (run / f"evaluate-val-last-{'-'.join(changes)}/evaluation.json").read_text()
    )
    assert record["protocol"]["views"].startswith("sizes 1 of the largest, each also flipped")
    assert record["protocol"]["detections"].startswith("scores above 0.2")


def test_masks_move_with_their_boxes_into_the_image():
    """A network that draws what it is told, at twice the size of the image."""
    own = task()
    size, inputs = (24, 20), own.input_size((24, 20))
    boxes = np.zeros((2, 4), np.float32)
    boxes[0] = np.array([4, 6, 16, 20]) * inputs[1] / 20
    grid = np.zeros((2, 28, 28), np.float32)
    grid[0, :14] = 1
    answers = {
        "boxes": boxes, "classes": np.array([2, 0]), "scores": np.array([0.9, 0.0], np.float32),
        "valid": np.array([True, False]), "masks": grid,
    }  # fmt: skip
    found = own.read(answers, np.zeros((*size, 3), np.uint8), data().classes)
    assert len(found) == 1
    rows, columns = np.nonzero(found.mask(0))
    assert abs(rows.min() - 6) <= 1
    assert abs(rows.max() - 12) <= 1  # the upper half of the box
    assert abs(columns.min() - 4) <= 1
    assert abs(columns.max() - 15) <= 1


@pytest.mark.slow  # test_detection_task exports boxes
def test_an_exported_program_draws_what_the_run_draws(run, tmp_path, monkeypatch):
    opened = trained.load(run, task=task())
    monkeypatch.setattr(trained, "load", lambda *_: opened)
    file = tmp_path / "x.stablehlo"
    export.run(run=run, to="stablehlo", out=file)
    record = json.loads((tmp_path / "x.stablehlo.json").read_text())
    assert record["outputs"]["masks"]["shape"] == [1, 100, 28, 28]
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    found = jax.device_get(program.call(image[None]))
    expected, valid = opened.predict(image), found["valid"][0]
    np.testing.assert_allclose(found["masks"][0][valid], expected.heatmaps, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", members(["sigmoid", "softmax"], ["softmax"]))
def test_probabilities_of_masks_are_those_of_the_loss(loss):
    own = task(mask_loss=loss, rois_per_image=4)
    model: Any = own.model.clone(axis_name=None)
    init = functools.partial(model.init, train=False)
    variables = jax.jit(init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    images, sizes = jnp.ones((1, 64, 64, 3)), jnp.array([[64, 64]])

    @jax.jit
    def run(variables):
        found = own.forward(variables, images, sizes)
        apply = functools.partial(model.apply, variables)
        levels = apply(images, train=False, method="features")
        return found, apply(levels, found["boxes"], method="draw")

    found, logits = jax.device_get(run(variables))
    valid = found["valid"][0]
    assert valid.sum() > 3
    assert not found["masks"][0][~valid].any()
    for i in np.flatnonzero(valid)[:5]:
        own_class = found["classes"][0, i]
        if loss == "softmax":
            e = np.exp(logits[0, i] - logits[0, i].max(-1, keepdims=True))
            expected = (e / e.sum(-1, keepdims=True))[..., own_class]
        else:
            expected = 1 / (1 + np.exp(-logits[0, i, ..., own_class]))
        np.testing.assert_allclose(found["masks"][0, i], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"mask_loss": "softmax", "mask_class": "agnostic"}, "give --mask-class=specific"),
        ({"mask_branch": "off", "mask_head": "mlp"}, "--mask-branch=off: leave out"),
    ],
)
def test_flags_that_do_not_go_together(flags, words):
    with pytest.raises(UserError, match=words):
        config(**flags)
