import dataclasses
import json
import math
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from dense_jax.commands import evaluate, export, predict
from dense_jax.data import box_masks as boxes
from dense_jax.data import given_boxes, rle
from dense_jax.data.datasets import shapes
from dense_jax.errors import UserError
from dense_jax.evaluation import box_masks
from dense_jax.objectives.box_masks import mask_loss
from dense_jax.ops.boxes import iou
from dense_jax.tasks import trained, training
from dense_jax.tasks.box_masks import BoxMasks
from dense_jax.train.schedules import build_optimizer
from experiments import hypercolumns as script
from tests import contract, npz

SMOKE = script.PRESETS["smoke_box"]


def example():
    """Two objects, the lower one of class 3 partly ignored, and a rest of one pixel."""
    label, instances = np.zeros((12, 16), np.uint8), np.zeros((12, 16), np.int32)
    label[1:6, 2:10], instances[1:6, 2:10] = 1, 1
    label[6:12, 4:9], instances[6:12, 4:9] = 3, 2
    label[6:12, 8] = 255
    label[0, 15], instances[0, 15] = 2, 3
    image = np.zeros((12, 16, 3), np.float32)
    return {"image": image, "label": label, "instances": instances, "name": "a"}


def test_objects_have_tight_boxes_and_the_class_of_most_labelled_pixels():
    found = boxes.find_objects(example())
    np.testing.assert_array_equal(found.boxes, [[2, 1, 10, 6], [4, 6, 9, 12]])
    np.testing.assert_array_equal(found.classes, [1, 3])
    assert [found.mask(i).sum() for i in range(2)] == [40, 30]
    # Without instances the connected parts of a class are its objects.
    parts = example()
    del parts["instances"]
    np.testing.assert_array_equal(boxes.find_objects(parts).boxes[1], [4, 6, 8, 12])


@pytest.mark.parametrize("min_iou", [0.5, 0.7, 1.0])
def test_jittered_boxes_keep_their_overlap(min_iou):
    tight = np.tile(np.array([[10, 20, 40, 30]], np.float32), (200, 1))
    moved = boxes.jitter(tight, min_iou, np.random.default_rng(0))
    overlaps = iou(moved, tight[:1])[:, 0]
    assert overlaps.min() >= min_iou - 1e-6
    assert moved.dtype == np.float32
    if min_iou == 1:
        np.testing.assert_array_equal(moved, tight)
    else:
        assert overlaps.mean() < (1 + min_iou) / 2 + 0.1
        assert np.std(moved, axis=0).min() > 0.3


def test_targets_are_read_at_the_centres_of_the_cells():
    """A box half outside on the left: cells of 4 x 3 pixels with centres 2 and 1.5 further."""
    shown = example()
    box = np.array([-8, 0, 24, 18], np.float32)
    found = boxes.targets(boxes.find_objects(shown).mask(1), shown["label"], box, 8)
    expected = np.full((8, 8), -1)
    for i, j in np.ndindex(8, 8):
        y, x = int(np.floor(18 / 8 * (i + 0.5))), int(np.floor(-8 + 4 * (j + 0.5)))
        if 0 <= y < 12 and 0 <= x < 16 and shown["label"][y, x] != 255:
            expected[i, j] = shown["instances"][y, x] == 2
    np.testing.assert_array_equal(found, expected)
    assert {-1, 0, 1} == set(found.ravel().tolist())


def test_pasting_takes_the_cell_of_each_pixels_centre():
    heatmap = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    box = np.array([1.3, -2, 9.1, 7.7])
    expected = np.zeros((6, 8), np.float32)
    for y, x in np.ndindex(6, 8):
        i, j = np.floor([(y + 0.5 + 2) / 9.7 * 4, (x + 0.5 - 1.3) / 7.8 * 4]).astype(int)
        if 0 <= i < 4 and 0 <= j < 4:
            expected[y, x] = heatmap[i, j]
    np.testing.assert_array_equal(boxes.paste(heatmap, box, (6, 8)), expected)
    # A box of whole pixels, as large as the heat map, gives the mask back.
    target = boxes.targets(expected > 5, np.zeros((6, 8)), np.array([2, 1, 6, 5]), 4)
    pasted = boxes.paste(target, np.array([2, 1, 6, 5]), (6, 8))
    np.testing.assert_array_equal(pasted[1:5, 2:6], (expected > 5)[1:5, 2:6])


def test_sampled_boxes_weigh_by_their_area():
    drawn = boxes.SampleBoxes(6, 4, 0.7, True)(example(), np.random.default_rng(0))
    shapes_of = {k: (drawn[k].shape, drawn[k].dtype) for k in ("boxes", "categories", "targets")}
    assert shapes_of == {
        "boxes": ((6, 4), np.float32),
        "categories": ((6,), np.int32),
        "targets": ((6, 4, 4), np.int32),
    }
    x0, y0, x1, y1 = drawn["boxes"].T
    np.testing.assert_allclose(drawn["box_weights"], (x1 - x0) * (y1 - y0) / 224**2, rtol=1e-5)
    assert set(drawn["categories"].tolist()) == {0, 2}
    even = boxes.SampleBoxes(6, 4, 0.7, False)(example(), np.random.default_rng(0))
    assert np.all(even["box_weights"] == 1)
    large = {**example(), "label": np.kron(example()["label"], np.ones((60, 60), np.uint8))}
    large["instances"] = np.kron(example()["instances"], np.ones((60, 60), np.int32))
    weights = boxes.SampleBoxes(20, 4, 1.0, True)(large, np.random.default_rng(0))["box_weights"]
    assert set(weights.tolist()) == {1.0, np.float32(60**2 / 224**2)}


def test_an_image_without_objects_has_boxes_that_do_not_count():
    empty = {**example(), "label": np.zeros((12, 16), np.uint8)}
    empty["instances"] = np.zeros((12, 16), np.int32)
    drawn = boxes.SampleBoxes(2, 4, 0.7, True)(empty, np.random.default_rng(0))
    assert not drawn["box_valid"].any()
    assert not drawn["box_weights"].any()
    assert np.all(drawn["targets"] == -1)


@pytest.mark.parametrize("norm", ["batch", "valid", "weights", "sum"])
def test_loss_is_the_formula_of_the_release(norm):
    rng = np.random.default_rng(0)
    p = rng.uniform(0.05, 0.95, (2, 3, 4, 4)).astype(np.float32)
    batch = {
        "images": np.zeros((2, 8, 8, 3), np.float32),
        "boxes": np.zeros((2, 3, 4), np.float32),
        "categories": np.zeros((2, 3), np.int32),
        "targets": rng.integers(-1, 2, (2, 3, 4, 4)).astype(np.int32),
        "box_weights": rng.uniform(size=(2, 3)).astype(np.float32),
        "box_valid": np.array([[True, True, False], [True, True, True]]),
    }
    batch["targets"][0, 2], batch["box_weights"][0, 2] = -1, 0
    log_p = jnp.log(np.stack([1 - p, p], axis=-1))
    batch = jax.tree.map(jnp.asarray, batch)
    loss, count = mask_loss(log_p, batch, norm)["masks"]

    total, pixels, weights = 0.0, 0, 0.0
    for index in np.ndindex(p.shape):
        target, weight = batch["targets"][index], batch["box_weights"][index[:2]]
        if target >= 0:
            total -= weight * np.log(p[index] if target else 1 - p[index])
            pixels, weights = pixels + 1, weights + weight
    divisor = {"batch": 5, "valid": pixels, "weights": weights, "sum": 1}[norm]
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    np.testing.assert_allclose(count, 0 if norm == "sum" else divisor, rtol=1e-5)


def test_scores_of_masks_by_hand():
    shown = example()
    found = boxes.find_objects(shown)
    first = np.zeros((5, 8), np.float32)
    first[:, :6] = 0.9  # 30 of its 40 pixels
    heatmaps = [np.kron(first, np.ones((8, 5)))[:40, :40], np.ones((40, 40))]
    predicted = box_masks.Predicted(found, found.boxes, np.array(heatmaps, np.float32))
    score = box_masks.score_image(predicted, shown["label"], 0.5)
    np.testing.assert_allclose(score.ious, [0.75, 1.0])  # ignored pixels count nowhere
    np.testing.assert_allclose(score.box_ious, [1.0, 1.0])
    assert np.count_nonzero(score.labels == 1) == 30
    assert np.count_nonzero(score.labels == 3) == 30
    strict = box_masks.score_image(predicted, shown["label"], 0.95)
    np.testing.assert_allclose(strict.ious, [0, 1.0])
    scores = box_masks.mask_scores(np.array([0.4, 0.6, 0.8]), np.array([0.5, 0.5, 0.5]))
    assert {score.name: round(score.value, 4) for score in scores} == {
        "mask_iou": 0.6, "masks_at_50": 0.6667, "masks_at_70": 0.3333, "box_iou": 0.5
    }  # fmt: skip


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("box") / "run"
    with jax.numpy_dtype_promotion("standard"):  # AdamW raises a float to an integer power
        training.run(script.build, dataclasses.replace(SMOKE, workdir=str(workdir), eval_every=1))
    return workdir


def test_a_run_leaves_masks_scores_and_a_report(smoke_run):
    evaluation = json.loads((smoke_run / "evaluation.json").read_text())
    scores, protocol = evaluation["scores"], evaluation["protocol"]
    assert {"mask_iou", "masks_at_50", "masks_at_70", "box_iou", "mean_iou"} <= set(scores)
    assert protocol["images_scored"] == 6
    assert protocol["objects_scored"] >= 6
    assert "IoU >= 0.7" in protocol["boxes"]
    assert np.sum(evaluation["confusion"]) > 0
    assert evaluation["headline"] == "mask_iou"
    assert len(evaluation["pictures"]) == 9
    assert all((smoke_run / picture["file"]).exists() for picture in evaluation["pictures"])
    rows = [json.loads(row) for row in (smoke_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "mask_iou" in row] == [1, 2]
    assert "data:image/png;base64" in (smoke_run / "report.html").read_text()


def test_the_best_checkpoint_is_that_of_the_best_masks(smoke_run):
    rows = [json.loads(row) for row in (smoke_run / "metrics.jsonl").read_text().splitlines()]
    ious = {row["step"]: row["mask_iou"] for row in rows if "mask_iou" in row}
    assert trained.load(smoke_run, "best").step == max(ious, key=lambda step: (ious[step], step))


def val_of(config):
    return shapes.load(**dataclasses.asdict(config.shapes))


def test_evaluation_boxes_are_the_same_every_time(smoke_run):
    opened = trained.load(smoke_run)
    dataset = val_of(opened.config)
    example = dataset.split("val")[2]
    evaluator = evaluator_of(opened.task, dataset)
    once, again = (evaluator.predict(opened.variables, 2, example) for _ in range(2))
    np.testing.assert_array_equal(once.boxes, again.boxes)
    np.testing.assert_array_equal(once.heatmaps, again.heatmaps)
    assert once.heatmaps.shape == (len(once.objects.boxes), 10, 10)
    assert np.all((once.heatmaps > 0) & (once.heatmaps < 1))


def evaluator_of(task, dataset):
    @jax.jit
    def heatmaps(variables, images, *inputs):
        return task.predict(variables, images, jnp.zeros((1, 2), jnp.int32), *inputs)["masks"]

    options = dict(normalisation=task.config.normalisation, min_iou=0.7, threshold=0.5)
    return box_masks.MaskEvaluator(heatmaps, dataset, "val", **options)


class Echo(nn.Module):
    """A network whose heat maps of one cell show the width of the boxes it was given."""

    def apply(self, variables, images, boxes, categories, *, train):
        width = jnp.log(boxes[..., 2] - boxes[..., 0])
        return {"log_probabilities": jnp.stack([width, width], axis=-1)[:, :, None, None]}


def test_boxes_are_scaled_with_the_images():
    dataset = val_of(SMOKE)
    example = dataset.split("val")[2]
    at_full, at_half = (
        evaluator_of(
            BoxMasks(dataclasses.replace(SMOKE, scale=scale), Echo(), []), dataset
        ).predict({}, 2, example)
        for scale in (1.0, 0.5)
    )
    np.testing.assert_array_equal(at_full.boxes, at_half.boxes)
    np.testing.assert_allclose(at_half.heatmaps, at_full.heatmaps / 2, rtol=1e-5)


@pytest.mark.slow
def test_a_box_run_is_evaluated_again_as_any_other(smoke_run):
    evaluate.run(run=smoke_run)
    again = json.loads((smoke_run / "evaluate-val-last" / "evaluation.json").read_text())
    first = json.loads((smoke_run / "evaluation.json").read_text())
    assert again["scores"] == first["scores"]
    refused: list[dict[str, Any]] = [
        {"crf": True}, {"absent": "zero"}, {"ensemble": (smoke_run,)}
    ]  # fmt: skip
    for flags in refused:
        with pytest.raises(UserError, match="runs that label pixels"):
            evaluate.run(run=smoke_run, **flags)


@pytest.mark.parametrize(
    ("boxes", "classes", "words"),
    [
        ([2, 2, 10, 10], [1], r"boxes are \[4\] and classes \[1\]"),
        ([[2, 2, 10, 10]] * 2, [1], r"boxes are \[2, 4\] and classes \[1\]"),
        ([[2, 2, 10, 10, 1]], [1], r"boxes are \[1, 5\]"),
        ([[2, 2, 10], [1]], [1, 1], "no arrays"),
        ([[2, 2, 10, "a"]], [1], "no arrays"),
        ([[2, 2, 2, 10]], [1], "has no area"),
        ([[2, 2, float("nan"), 10]], [1], "has no area"),
        ([[2, 2, 1e39, 10]], [1], "has no area"),
        ([[2, 2, 10, 10]], [1.7], "give class ids as integers"),
        ([[2, 2, 10, 10]], ["disc"], "give class ids as integers"),
        ([[2, 2, 10, 10]], [-1], "class -1 is none of this run: give 1 to 4"),
        ([[2, 2, 10, 10]], [5], "class 5 is none of this run: give 1 to 4"),
    ],
)
def test_boxes_that_are_none_are_refused_in_python_too(boxes, classes, words):
    with pytest.raises(UserError, match=words):
        given_boxes.as_arrays(boxes, classes, 5)


def test_boxes_in_python_become_arrays():
    for empty in ([], np.zeros((0, 4))):
        boxes, classes = given_boxes.as_arrays(empty, [], 5)
        assert (boxes.shape, classes.shape, classes.dtype) == ((0, 4), (0,), np.int32)
    boxes, classes = given_boxes.as_arrays([[1, 2, 3, 4], [0, 0, 0, 0]], [4, 0], 5)
    assert (boxes.dtype, classes.tolist()) == (np.float32, [4, 0])


@pytest.mark.parametrize(
    "change", [{"file_name": 3}, {"bbox": [1, 1, True, 5]}, {"bbox": [1, 1, 1e39, 5]}]
)
def test_entries_of_another_kind_are_one_line(change, tmp_path):
    entry = {"file_name": "a.png", "category_id": 1, "bbox": [1, 1, 5, 5]} | change
    (tmp_path / "boxes.json").write_text(json.dumps([entry]))
    with pytest.raises(UserError, match=r"boxes\.json: (file_name 3 is no text|bbox)"):
        given_boxes.read(tmp_path / "boxes.json", 5)


def test_a_box_run_predicts_the_objects_in_given_boxes(smoke_run, tmp_path):
    example = val_of(SMOKE).split("val")[0]
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    height, width = 21, 30
    Image.fromarray(example["image"][:height, :width]).save(images / "a.png")
    Image.fromarray(example["image"]).save(images / "b.png")
    with pytest.raises(UserError, match=r"boxes\.json cannot be read.*write the boxes"):
        predict.run(run=smoke_run, input=images, output=out)
    given = [
        {"file_name": "a.png", "category_id": 2, "bbox": [3, 4, 12, 10]},
        {"file_name": "a.png", "category_id": 1, "bbox": [0.5, 0, 20, 21]},
    ]
    (images / "boxes.json").write_text(json.dumps(given))
    with pytest.raises(SystemExit):  # b has no boxes, and is told
        predict.run(run=smoke_run, input=images, output=out, probabilities=True)
    results = json.loads((out / "results.json").read_text())
    assert {r["file_name"] for r in results} == {"a.png"}
    assert sorted((r["category_id"], *r["bbox"]) for r in results) == [
        (1, 0.5, 0, 20, 21), (2, 3, 4, 12, 10)
    ]  # fmt: skip
    scores = [r["score"] for r in results]
    assert scores == sorted(scores, reverse=True)
    masks = [rle.decode(r["segmentation"]) for r in results]
    numbers = np.asarray(Image.open(out / "masks" / "a.png"))
    assert numbers.shape == masks[0].shape == (height, width)
    np.testing.assert_array_equal(numbers > 0, masks[0] | masks[1])
    assert np.asarray(Image.open(out / "overlays" / "a.png")).shape == (height, width, 3)
    assert npz(out / "probabilities" / "a.npz")["heatmaps"].shape == (2, 10, 10)
    # The same from Python, and results are boxes for another prediction.
    run = trained.load(smoke_run)
    boxes = np.array([[3, 4, 15, 14], [0.5, 0, 20.5, 21]], np.float32)
    found = run.predict(example["image"][:height, :width], boxes=boxes, classes=[2, 1])
    assert found.results() == [{k: r[k] for k in found.results()[0]} for r in results]
    with pytest.raises(UserError, match="also needs boxes"):
        run.predict(example["image"])
    with pytest.raises(UserError, match=r"2 images: give boxes=\[...\]"):
        run.predict([example["image"]] * 2, boxes=[boxes], classes=[[2, 1]])
    with pytest.raises(UserError, match="class 99 is none of this run: give 1 to 5"):
        run.predict(example["image"], boxes=boxes[:1], classes=[99])
    shutil.copy(out / "results.json", images / "boxes.json")
    (images / "b.png").unlink()
    predict.run(run=smoke_run, input=images, output=tmp_path / "again")
    assert json.loads((tmp_path / "again" / "results.json").read_text()) == results


@pytest.mark.slow
def test_a_box_run_leaves_as_a_program_of_images_boxes_and_classes(smoke_run, tmp_path):
    file = tmp_path / "x.stablehlo"
    export.run(run=smoke_run, to="stablehlo", out=file)
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    image = np.random.default_rng(0).integers(0, 256, (1, 40, 33, 3), np.uint8)
    boxes, classes = np.array([[[2, 3, 20, 30]]], np.float32), np.array([[1]], np.int32)
    outputs = program.call(image, boxes, classes)
    run = trained.load(smoke_run)
    found = run.predict(image[0], boxes=boxes[0], classes=classes[0])
    np.testing.assert_allclose(outputs["masks"][0], found.heatmaps, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(outputs["scores"][0], found.scores, rtol=1e-4)
    record = json.loads((tmp_path / "x.stablehlo.json").read_text())
    assert record["further_inputs"]["boxes"]["shape"] == ["b", "n", 4]
    with pytest.raises(UserError, match="also takes boxes"):
        export.run(run=smoke_run, to="onnx", out=tmp_path / "x.onnx", shape=(1, 32, 32))
    with pytest.raises(UserError, match="runs that label pixels"):
        export.run(run=smoke_run, to="stablehlo", out=tmp_path / "y.stablehlo", scores="logits")


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ("{", "is no JSON"),
        ([{"file_name": "a.png", "category_id": 1}], "no 'bbox'"),
        ([{"file_name": "a.png", "category_id": 9, "bbox": [0, 0, 1, 1]}], "category_id 9"),
        ([{"file_name": "a.png", "category_id": 1, "bbox": [0, 0, 0, 1]}], "sides above 0"),
        ({"images": [], "annotations": [{"image_id": 7}]}, "no 7"),
        ([{"file_name": "a.png", "category_id": True, "bbox": [0, 0, 1, 1]}], "category_id True"),
        ([{"file_name": "a.png", "category_id": 1, "bbox": [0, 0, math.nan, 1]}], "sides above 0"),
        (
            [{"file_name": f"{n}/a.png", "category_id": 1, "bbox": [0, 0, 1, 1]} for n in "xy"],
            "y/a.png and another entry have the file name a.png",
        ),
        (5, "is no list of boxes"),
    ],
)
def test_boxes_that_cannot_be_read_are_named(entries, match, tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    with pytest.raises(UserError, match=match):
        given_boxes.read(path, 3)


def test_boxes_come_as_annotations_too(tmp_path):
    path = tmp_path / "boxes.json"
    images = [{"id": 4, "file_name": "sub/a.png"}, {"id": 5, "file_name": "b.png"}]
    annotations = [{"image_id": 4, "category_id": 2, "bbox": [1, 2, 3, 4]}]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    found = given_boxes.read(path, 3)
    np.testing.assert_array_equal(found["a.png"][0], [[1, 2, 4, 6]])
    np.testing.assert_array_equal(found["a.png"][1], [2])
    assert found["b.png"][0].shape == (0, 4)  # an image without objects


def test_a_box_is_drawn_on_the_image():
    picture = box_masks.draw_boxes(np.zeros((8, 8, 3), np.uint8), np.array([[1, 2, 6, 7]]))
    rim = np.any(picture, axis=-1)
    assert rim[2, 1:6].all()
    assert rim[2:7, 5].all()
    assert not rim[3:6, 2:5].any()
    assert rim.sum() == 16


@pytest.mark.slow
def test_frozen_trunk_and_rates_of_the_release():
    config = dataclasses.replace(
        script.PRESETS["sds_vgg"], width=1 / 64, heatmap=4, learning_rate=1.0, weight_decay=0.0
    )
    params = contract.shapes_of(script.build(config, 3).model, (1, 32, 32, 3))[1]["params"]
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), params)
    tx = build_optimizer(config, script.build(config, 4).groups)
    updates, _ = jax.jit(lambda p: tx.update(p, tx.init(p), p))(ones)
    rates = {
        f"{layer}/{kind}": -float(x.ravel()[0])
        for layer, leaf in updates.items()
        for kind, x in leaf.items()
    }
    trained = {name: rate for name, rate in rates.items() if rate}
    expected = {
        "conv_pool3/kernel": 1, "conv_pool3/bias": 2, "conv_pool4/kernel": 1,
        "conv_pool4/bias": 2, "fcfc7/kernel": 0.1, "fcfc7/bias": 0.2,
    }  # fmt: skip
    assert {k: round(v, 6) for k, v in trained.items()} == expected


def test_the_release_has_its_number_of_parameters():
    model = script.build(script.PRESETS["sds_vgg"], 21).model
    params = contract.shapes_of(model, (1, 64, 64, 3))[1]["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 137_718_044
    paper = script.build(script.PRESETS["paper"], 21).model
    params = contract.shapes_of(paper, (1, 64, 64, 3))[1]["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 134_360_063


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"mode": "box", "backbone": "alexnet"}, "backbone"),
        ({"mode": "box", "tap_kernel": (1, 1, 3)}, "tap-kernel"),
        ({"tap_kernel": (2, 1, 1)}, "tap-kernel"),
        ({"box_iou": 0.0}, "box-iou"),
        ({"boxes_per_image": 0}, "boxes-per-image"),
        ({"mask_threshold": 1.5}, "mask-threshold"),
    ],
)
def test_flags_that_no_run_can_have_are_refused(flags, word):
    with pytest.raises(UserError, match=f"--{word}"):
        dataclasses.replace(script.PRESETS["smoke"], **flags)


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("taps", ("fc7", "fc7_pool2", "fc7_conv4", "pool2_conv4", "all")),
        ("grid", (1, 2, 5)),
        ("tap_scale", ("none", "fixed", "l2", "bn")),
        ("mix", ("after_prob", "before_prob")),
        ("joint", ("end_to_end", "independent_cells")),
    ],
)
def test_flags_build_box_networks(flag, values):
    for value in values:
        model = script.build(dataclasses.replace(SMOKE, **{flag: value}), 4).model
        outputs, variables = contract.shapes_of(model.clone(axis_name=None), (1, 32, 32, 3))
        assert outputs["log_probabilities"].shape == (1, 1, 10, 10, 2)
        assert ("batch_stats" in variables) == (value == "bn")


def test_flags_of_boxes_reach_the_transforms():
    last = script.build(SMOKE, 4).transforms[-1]
    assert last == boxes.SampleBoxes(5, 10, 0.7, True)
    config = dataclasses.replace(
        SMOKE, box_weight="off", boxes_per_image=3, heatmap=7, box_iou=0.5, augment="mirror"
    )
    changed = script.build(config, 4).transforms
    assert changed[-1] == boxes.SampleBoxes(3, 7, 0.5, False)
    assert len(changed) == 3
    assert not any(
        isinstance(t, boxes.SampleBoxes)
        for t in list(script.build(script.PRESETS["smoke"], 4).transforms)
    )


def test_the_grid_of_a_run_spans_images_and_not_their_padding():
    config = dataclasses.replace(script.PRESETS["smoke"], scale=0.5)
    task = script.build(config, 3)
    variables = contract.random_variables(task.model, (1, 32, 64, 3))
    images = np.random.default_rng(0).standard_normal((2, 32, 64, 3)).astype(np.float32)
    run = jax.jit(task.predict)
    whole, half = (run(variables, images, np.array([[32, w]] * 2))["logits"] for w in (64, 32))
    assert np.any(np.abs(whole - half) > 1e-4)
    one = script.build(dataclasses.replace(config, grid=1), 4)
    assert "2x2" in task.card["test_time_options"]
    assert "2x2" not in one.card["test_time_options"]
