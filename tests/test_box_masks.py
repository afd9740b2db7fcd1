import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dense_jax import runs
from dense_jax.data import box_masks as boxes
from dense_jax.data.datasets import shapes
from dense_jax.errors import UserError
from dense_jax.ops.boxes import iou
from dense_jax.tasks import box_masks
from dense_jax.train.schedules import build_optimizer
from experiments import hypercolumns as script
from tests import contract

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


class Fixed(nn.Module):
    """A network whose output is one of its variables."""

    def apply(self, variables, *inputs, train, **options):
        assert train
        assert len(inputs) == 3
        return {"log_probabilities": variables["params"]}, {}


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
    config = dataclasses.replace(SMOKE, loss_norm=norm)
    loss_fn, denominator_fn = box_masks.mask_loss(Fixed(), config)
    log_p = jnp.log(np.stack([1 - p, p], axis=-1))
    denominator = denominator_fn(jax.tree.map(jnp.asarray, batch))
    loss, _ = loss_fn(log_p, {}, batch, denominator, jax.random.key(0))

    total, pixels, weights = 0.0, 0, 0.0
    for index in np.ndindex(p.shape):
        target, weight = batch["targets"][index], batch["box_weights"][index[:2]]
        if target >= 0:
            total -= weight * np.log(p[index] if target else 1 - p[index])
            pixels, weights = pixels + 1, weights + weight
    divisor = {"batch": 5, "valid": pixels, "weights": weights, "sum": 1}[norm]
    np.testing.assert_allclose(loss, total / divisor, rtol=1e-5)


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
    assert {k: round(v, 4) for k, v in scores.items()} == {
        "mask_iou": 0.6, "masks_at_50": 0.6667, "masks_at_70": 0.3333, "box_iou": 0.5
    }  # fmt: skip


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("box") / "run"
    with jax.numpy_dtype_promotion("standard"):  # AdamW raises a float to an integer power
        script.main(dataclasses.replace(SMOKE, workdir=str(workdir), eval_every=1))
    return workdir


def test_a_run_leaves_masks_scores_and_a_report(smoke_run):
    evaluation = json.loads((smoke_run / "evaluation.json").read_text())
    scores, protocol = evaluation["scores"], evaluation["protocol"]
    assert {"mask_iou", "masks_at_50", "masks_at_70", "box_iou", "mean_iou"} <= set(scores)
    assert protocol["images_scored"] == 6
    assert protocol["objects_scored"] >= 6
    assert "IoU >= 0.7" in protocol["boxes"]
    assert np.sum(evaluation["confusion"]) > 0
    assert all((smoke_run / image["triplet"]).exists() for image in evaluation["images"])
    rows = [json.loads(row) for row in (smoke_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "mask_iou" in row] == [1, 2]
    assert "data:image/png;base64" in (smoke_run / "report.html").read_text()


def test_a_box_run_does_not_label_images(smoke_run):
    opened = runs.load(smoke_run)
    with pytest.raises(UserError, match="mode=box"):
        opened.script.build_predict(opened.config, opened.model)


def test_evaluation_boxes_are_the_same_every_time(smoke_run):
    opened = runs.load(smoke_run)
    source = shapes.load(**dataclasses.asdict(opened.config.shapes)).split("val")
    predictor = box_masks.Predictor(opened.model, opened.config, 0.7, source)
    once, again = (predictor(opened.variables, 2, source[2]) for _ in range(2))
    np.testing.assert_array_equal(once.boxes, again.boxes)
    np.testing.assert_array_equal(once.heatmaps, again.heatmaps)
    assert once.heatmaps.shape == (len(once.objects.boxes), 10, 10)
    assert np.all((once.heatmaps > 0) & (once.heatmaps < 1))


class Echo(nn.Module):
    """A network whose heat maps of one cell show the width of the boxes it was given."""

    def apply(self, variables, images, boxes, categories, *, train):
        width = jnp.log(boxes[..., 2] - boxes[..., 0])
        return {"log_probabilities": jnp.stack([width, width], axis=-1)[:, :, None, None]}


def test_boxes_are_scaled_with_the_images():
    source = shapes.load(**dataclasses.asdict(SMOKE.shapes)).split("val")
    at_full, at_half = (
        box_masks.Predictor(Echo(), dataclasses.replace(SMOKE, scale=s), 0.7, source)(
            {}, 2, source[2]
        )
        for s in (1.0, 0.5)
    )
    np.testing.assert_array_equal(at_full.boxes, at_half.boxes)
    np.testing.assert_allclose(at_half.heatmaps, at_full.heatmaps / 2, rtol=1e-5)


def test_a_box_is_drawn_on_the_image():
    picture = box_masks.draw_boxes(np.zeros((8, 8, 3), np.uint8), np.array([[1, 2, 6, 7]]))
    rim = np.any(picture, axis=-1)
    assert rim[2, 1:6].all()
    assert rim[2:7, 5].all()
    assert not rim[3:6, 2:5].any()
    assert rim.sum() == 16


def test_frozen_trunk_and_rates_of_the_release():
    config = dataclasses.replace(
        script.PRESETS["sds_vgg"], width=1 / 64, heatmap=4, learning_rate=1.0, weight_decay=0.0
    )
    params = contract.shapes_of(script.build_model(config, 3), (1, 32, 32, 3))[1]["params"]
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), params)
    tx = build_optimizer(config, script.build_groups(config))
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
    model = script.build_model(script.PRESETS["sds_vgg"], 21)
    params = contract.shapes_of(model, (1, 64, 64, 3))[1]["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 137_718_044
    paper = script.build_model(script.PRESETS["paper"], 21)
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
        script.build_model(dataclasses.replace(script.PRESETS["smoke"], **flags), 4)


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
        model = script.build_model(dataclasses.replace(SMOKE, **{flag: value}), 4)
        outputs, variables = contract.shapes_of(model.clone(axis_name=None), (1, 32, 32, 3))
        assert outputs["log_probabilities"].shape == (1, 1, 10, 10, 2)
        assert ("batch_stats" in variables) == (value == "bn")


def test_flags_of_boxes_reach_the_transforms():
    last = script.build_transforms(SMOKE)[-1]
    assert last == boxes.SampleBoxes(5, 10, 0.7, True)
    config = dataclasses.replace(
        SMOKE, box_weight="off", boxes_per_image=3, heatmap=7, box_iou=0.5, augment="mirror"
    )
    changed = script.build_transforms(config)
    assert changed[-1] == boxes.SampleBoxes(3, 7, 0.5, False)
    assert len(changed) == 3
    assert not any(
        isinstance(t, boxes.SampleBoxes) for t in script.build_transforms(script.PRESETS["smoke"])
    )


def test_the_grid_of_a_run_spans_images_and_not_their_padding():
    config = dataclasses.replace(script.PRESETS["smoke"], scale=0.5)
    model = script.build_model(config, 3)
    variables = contract.random_variables(model, (1, 32, 64, 3))
    images = np.random.default_rng(0).standard_normal((2, 32, 64, 3)).astype(np.float32)
    predict = jax.jit(script.build_predict(config, model))
    whole, half = (predict(variables, images, np.array([[32, w]] * 2)) for w in (64, 32))
    assert np.any(np.abs(whole - half) > 1e-4)
    assert "2x2" in script.test_time(config)
    assert "2x2" not in script.test_time(dataclasses.replace(config, grid=1))
