"""The task that finds objects, on a network with a small trunk: training, scores, predictions."""

import dataclasses
import functools
import json
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dense_jax import scripts
from dense_jax.commands import debug_pictures, export, sweep
from dense_jax.data import dataset, pipeline
from dense_jax.data.datasets.shapes import ShapesSpec
from dense_jax.errors import UserError
from dense_jax.evaluation import instances
from dense_jax.infer import predictor, rcnn_pictures
from dense_jax.layers.conv import Conv
from dense_jax.models.rcnn import faster_rcnn as models
from dense_jax.tasks import trained, training
from dense_jax.train import step
from dense_jax.train.schedules import build_optimizer
from dense_jax.train.state import TrainState
from experiments import faster_rcnn as script
from tests import contract, members, test_eval_shapes

NUM_CLASSES = 6
SHAPES = ShapesSpec(size=(48, 40), num_train=12, num_val=5, num_test=1)


class Trunk(nn.Module):
    """Four strided convolutions in place of a ResNet, which takes a minute to compile."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        x, stages = images, {}
        for i, stride in enumerate((4, 2, 2, 2), 1):
            x = nn.relu(Conv(8, 3, strides=stride, name=f"layer{i}_0")(x))
            stages[f"layer{i}"] = x
        return stages


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
def data():
    return dataset.load("shapes", **dataclasses.asdict(SHAPES))


def batch_of(own, size=4):
    batches = pipeline.train_batches(
        data().split("train"), own.transforms, size, seed=0, shape_of=own.train_size
    )
    batch = next(batches)
    batches.close()
    return batch


def variables_of(own, shape=(64, 64, 3)):
    model = own.model.clone(axis_name=None)
    return jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), jnp.zeros((1, *shape))
    )


def steps(own, batches, devices):
    """Yields the parameters after one step on each batch, and its losses."""
    chosen = jax.devices()[:devices]
    tx = build_optimizer(own.config, own.groups)
    shape = batches[0]["images"].shape[1:]
    state = TrainState.init(own.model.clone(axis_name=None), tx, shape)
    state = jax.device_get(state.replace(apply_fn=own.model.apply))  # a step frees what it gets
    run = step.train_step(own.loss(data()), devices=chosen)
    for batch in batches:
        new, scalars = run(step.replicate(state, chosen), step.shard(batch, 1, chosen))
        yield jax.device_get((new.params, scalars))


@pytest.mark.slow
def test_one_device_equals_four():
    own = task(optimizer="sgd", momentum=0.0)
    batch = batch_of(own)
    one, four = next(steps(own, (batch,), 1)), next(steps(own, (batch,), 4))
    assert set(one[1]) == {"loss", "rpn_class", "rpn_box", "class", "box"}
    chex.assert_trees_all_close(one, four, rtol=1e-4, atol=1e-6)


def test_padded_objects_and_images_have_no_effect():
    """More slots for objects, and zeros below and beside images, up to the same cells."""
    own = task(optimizer="sgd", momentum=0.0)
    batch = batch_of(own)
    expected = next(steps(own, (batch,), 1))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected[0]))
    more = dict(batch, objects={
        key: np.pad(value, [(0, 0), (0, 5)] + [(0, 0)] * (value.ndim - 2), constant_values=bad)
        for (key, value), bad in zip(batch["objects"].items(), (9.0, 3, False), strict=True)
    })  # fmt: skip
    assert more["objects"]["valid"].shape[1] == batch["objects"]["valid"].shape[1] + 5
    # The random numbers of proposals are as many as proposals and objects together.
    found = next(steps(own, (more,), 1))
    chex.assert_trees_all_close(found[1]["rpn_class"], expected[1]["rpn_class"], rtol=1e-5)
    chex.assert_trees_all_close(found[1]["rpn_box"], expected[1]["rpn_box"], rtol=1e-5)


def test_batches_have_few_shapes_and_sizes_before_padding():
    own = task()
    batch = batch_of(own)
    assert batch["images"].shape == (4, 64, 64, 3)
    assert batch["size"].tolist() == [[57, 48]] * 4
    assert batch["objects"]["boxes"].shape == (4, own.config.max_objects, 4)
    assert batch["objects"]["boxes"].max() <= 57


def test_images_are_resized_for_predictions_too():
    assert task(short_side=(20, 48)).input_size((48, 40)) == (57, 48)  # the last of them
    assert task(recipe="detectron2").input_size((48, 40)) == (58, 48)  # of 57.6
    assert task(test_side=24).input_size((48, 40)) == (28, 24)
    assert task().input_size((10, 500)) == (1, 64)


def test_every_parameter_learns():
    own = task()
    batch = batch_of(own)
    variables, loss = variables_of(own), own.loss(data())

    def total(params):
        def apply(*inputs, **given):
            options: Any = {"train": True} | given
            return own.model.clone(axis_name=None).apply({"params": params}, *inputs, **options)

        losses = loss(apply, batch, jax.random.key(0))
        return sum(value / count for value, count in losses.values())

    gradients = jax.jit(jax.grad(total))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished smoke run on the small trunk."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(models.FasterRCNN, "_trunk", lambda self: Trunk(name="backbone"))
        workdir = tmp_path_factory.mktemp("detector") / "run"
        training.train(task(workdir=str(workdir)))
    return workdir


def test_a_run_leaves_scores_curves_and_pictures(run):
    record = json.loads((run / "evaluation.json").read_text())
    assert record["headline"] == "box_ap"
    assert 0 <= record["scores"]["box_ap"] <= record["scores"]["box_ap50"] <= 1
    assert record["protocol"]["images_scored"] == record["protocol"]["images_in_split"] == 5
    assert any("precision" in picture["file"] for picture in record["pictures"])
    results = json.loads((run / "results_box.json").read_text())
    assert {"image_id", "category_id", "bbox", "score"} <= set(results[0])
    assert "box AP" in (run / "report.html").read_text().replace("Box", "box")


def test_a_folder_of_any_sizes_is_predicted(run, tmp_path):
    """One program for each padded shape; boxes are in pixels of each image."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    sizes = {"a": (48, 40), "b": (1, 1), "c": (500, 20), "d": (20, 500), "e": (96, 80)}
    for name, size in sizes.items():
        pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{name}.png")
    opened = trained.load(run, task=task())
    summary = predictor.predict_folder(opened.predictor, opened.classes, images, out)
    assert not summary.failures
    assert summary.shapes == {(64, 64), (64, 32), (32, 64)}  # a, b and e have one
    results = json.loads((out / "results.json").read_text())
    assert {row["file_name"] for row in results} <= {f"{name}.png" for name in sizes}
    for row in results:
        height, width = sizes[row["file_name"][0]]
        x, y, w, h = row["bbox"]
        assert min(x, y) >= 0
        assert x + w <= width + 0.01
        assert y + h <= height + 0.01
    assert (out / "overlays" / "c.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("shape", members([None, (2, 30, 100)], [None]))
def test_an_exported_program_finds_what_the_run_finds(run, tmp_path, shape, monkeypatch, capsys):
    """Of images of one size, which it resizes and pads itself; None is the size of a default."""
    opened = trained.load(run, task=task())
    monkeypatch.setattr(trained, "load", lambda *_: opened)
    file = tmp_path / "x.stablehlo"
    export.run(run=run, to="stablehlo", out=file, shape=shape)
    assert ("no --shape: one image of 48 x 64" in capsys.readouterr().out) == (shape is None)
    record = json.loads((tmp_path / "x.stablehlo.json").read_text())
    shape = shape or (1, 48, 64)
    assert record["input"]["shape"] == [*shape, 3]
    assert record["outputs"]["boxes"]["shape"] == [shape[0], 100, 4]
    assert record["outputs"]["boxes"]["values"].startswith("x0 y0 x1 y1 in pixels")
    is_resized = shape[1:] == (30, 100)
    assert ("resized to 19 x 64 inside, as the run does" in record["sizes"]) == is_resized
    images = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    found = jax.device_get(program.call(images))
    for i, image in enumerate(images):
        expected, valid = opened.predict(image), found["valid"][i]
        assert len(expected) > 3
        np.testing.assert_array_equal(found["classes"][i][valid], expected.class_ids)
        np.testing.assert_allclose(found["boxes"][i][valid], expected.boxes, atol=1e-3)
        np.testing.assert_allclose(found["scores"][i][valid], expected.scores, atol=1e-5)


def test_a_detector_has_no_scores_of_pixels_to_export(run, tmp_path, monkeypatch):
    opened = trained.load(run, task=task())
    monkeypatch.setattr(trained, "load", lambda *_: opened)
    with pytest.raises(UserError, match="--scores=logits is for runs that label pixels"):
        export.run(run=run, to="stablehlo", out=tmp_path / "x", scores="logits")


@pytest.mark.slow
def test_debug_pictures_of_a_dataset_and_of_a_folder(run, tmp_path, monkeypatch, capsys):
    """Anchors are drawn where objects are known; bad files are told and do not stop the others."""
    opened = trained.load(run, task=task())
    monkeypatch.setattr(trained, "load", lambda *_: opened)
    debug_pictures.run(run=run, output=tmp_path / "val", images=2)
    names = ["val_00000-anchors", "val_00000-proposals", "val_00001-anchors", "val_00001-proposals"]
    assert sorted(path.stem for path in (tmp_path / "val").iterdir()) == names
    said = capsys.readouterr().out
    assert "*-anchors.png: known objects and the anchors" in said
    assert "4 pictures in" in said
    picture = np.asarray(Image.open(tmp_path / "val" / "val_00000-anchors.png"))
    assert picture.shape[0] > 480  # ten times the image's 48, with the key below
    colours = {tuple(colour) for colour in picture[:480, :400].reshape(-1, 3).tolist()}
    assert rcnn_pictures.OBJECT in colours
    assert {rcnn_pictures.ANCHOR, rcnn_pictures.FORCED} & colours

    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in {"a": (1, 1), "b": (20, 500)}.items():
        Image.fromarray(np.full(size, 99, np.uint8)).save(folder / f"{name}.png")
    (folder / "c.png").write_text("no image")
    with pytest.raises(SystemExit, match="1"):
        debug_pictures.run(run=run, output=tmp_path / "out", input=folder)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "a-proposals.png",
        "b-proposals.png",
    ]
    assert "2 pictures in" in (said := capsys.readouterr().out)
    assert "anchors" not in said
    assert "c.png" in said
    with pytest.raises(UserError, match="--input takes the place of a dataset"):
        debug_pictures.run(run=run, output=tmp_path / "x", input=folder, split="val")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["torchvision", "paper"])
def test_anchors_drawn_are_those_that_train(recipe, monkeypatch):
    """As a slow twin matches them, and of an image without objects none."""
    drawn = []
    monkeypatch.setattr(rcnn_pictures, "anchors", lambda *args: drawn.append(args) or args[0])
    single = {"neck": "dc5", "anchor_sizes": (16, 32)} if recipe == "paper" else {}
    own = task(recipe=recipe, **single)
    offered, variables = own.debug_pictures(), variables_of(own)
    assert offered is not None
    assert own.first_stage is not None
    example = dict(data().split("val")[0])
    offered.draw(variables, example)
    image, objects, boxes, index, is_forced, limit = drawn.pop()
    assert limit == 0.7
    assert len(boxes) >= len(objects) > 0
    tall = 58 if recipe == "paper" else 57
    factors = [tall / 48, 48 / 40]  # the image is resized by
    sizes = np.array([[tall, 48]])
    first = jax.jit(own.first_stage)(variables, np.zeros((1, 64, 64, 3)), sizes)
    plus = int(recipe == "paper")
    expected = []
    for x0, y0, x1, y1 in np.asarray(first.anchors).tolist():
        row = []
        for a0, b0, a1, b1 in (objects * np.array(factors[::-1] * 2)).tolist():
            width = max(0, min(x1, a1) - max(x0, a0) + plus)
            height = max(0, min(y1, b1) - max(y0, b0) + plus)
            areas = (x1 - x0 + plus) * (y1 - y0 + plus) + (a1 - a0 + plus) * (b1 - b0 + plus)
            row.append(width * height / (areas - width * height))
        outside = plus and (min(x0, y0) < 0 or x1 >= 48 or y1 >= tall)
        expected.append([-1.0] * len(row) if outside else row)
    ious = np.array(expected)
    is_best = np.any((ious > ious.max(axis=0) - 1e-5) & (ious > 0), axis=1)
    chosen = (ious.max(axis=1) >= 0.7) | is_best
    np.testing.assert_array_equal(index, ious[chosen].argmax(axis=1))
    np.testing.assert_array_equal(is_forced, ious[chosen].max(axis=1) < 0.7)
    wanted = np.asarray(first.anchors)[chosen] / np.array(factors[::-1] * 2)
    np.testing.assert_allclose(boxes, wanted, rtol=1e-5)

    empty = {**example, "instances": np.zeros_like(example["instances"])}
    offered.draw(variables, empty)
    assert [len(x) for x in drawn.pop()[1:5]] == [0, 0, 0, 0]
    assert set(offered.draw(variables, {"image": example["image"]})) == {"proposals"}
    assert np.shares_memory(image, example["image"])


def test_tasks_without_debug_pictures_refuse_the_command(run, tmp_path, monkeypatch):
    opened = trained.load(run, task=dataclasses.replace(task(), first_stage=None))
    monkeypatch.setattr(trained, "load", lambda *_: opened)
    with pytest.raises(
        UserError, match=r"runs of .* have no debug pictures: see their predictions"
    ):
        debug_pictures.run(run=run, output=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow  # test_sweep runs one of labels
def test_a_sweep_tabulates_box_ap(tmp_path, monkeypatch):
    def train(self, words, log):
        log.parent.mkdir()
        loaded = scripts.load(words[0])
        training.train(loaded.build(loaded.parse(words[1:]), NUM_CLASSES))

    monkeypatch.setattr(sweep.Children, "run", train)
    flags = ("--neck=dc5", "--anchor-sizes", "16", "32", "--shapes.num-train=8")
    sweep.run(
        "experiments.faster_rcnn", "smoke", flags, out=tmp_path / "o", vary=("roi-op=align,pool",)
    )
    text = (tmp_path / "o" / "table.md").read_text()
    assert "| roi-op | Box AP % |" in text
    assert text.count("| 1 of 1 |") == 2
    assert "val split  \n" in text  # no word of the classes' absence, a rule for labels


def test_evaluation_does_not_depend_on_batches_or_order(run):
    opened = trained.load(run, task=task())
    scores = []
    for size in (1, 8):
        own = dataclasses.replace(opened.task, config=config(eval_batch_size=size))
        record = own.evaluator(data(), "val")(opened.variables, True)
        scores.append({name: score.value for name, score in record.scores.items()})
    np.testing.assert_equal(scores[0], scores[1])


class OneObject(test_eval_shapes.Mixed):
    """Noise of some sizes, with one object in each."""

    def __init__(self):
        super().__init__(((48, 48), (48, 150), (150, 48), (48, 90), (48, 120), (48, 90)))

    def __getitem__(self, index):
        label = np.zeros(self.size(index), np.uint8)
        label[5:30, 5:30] = 1
        return {**super().__getitem__(index), "label": label}


@pytest.mark.slow  # test_eval_shapes counts labels that padding changes
def test_shared_shapes_say_what_padding_changes(monkeypatch):
    """The share in the protocol is that between two evaluations, one at shapes of each image."""
    mixed = dataclasses.replace(data(), splits={"val": OneObject()})
    variables = contract.random_variables(task().model, (1, 64, 64, 3))
    found, protocols = {}, {}
    collect = instances.DetectionEvaluator.add

    def add(self, index, truth, detections):
        found[shapes, index] = detections
        collect(self, index, truth, detections)

    monkeypatch.setattr(instances.DetectionEvaluator, "add", add)
    for shapes in ("exact", "buckets"):
        evaluate = task(eval_shapes=shapes, max_side=160).evaluator(mixed, "val")
        protocols[shapes] = [evaluate(variables, is_last).protocol for is_last in (True, False)]
    counts = np.zeros((2, 2), int)
    for i, (height, width) in enumerate(OneObject().sizes):
        others = [*likely(found["buckets", i])]
        for box, class_id in likely(found["exact", i]):
            is_near = width - box[2] < 32 or height - box[3] < 32
            stays = any(c == class_id and iou_of(o, box) >= 0.9 for o, c in others)
            counts[int(not is_near)] += not stays, 1
    (changed, near), (moved, elsewhere) = counts.tolist()
    assert changed / near > moved / elsewhere > 0
    words = protocols["buckets"][0]["padding"]
    assert f"changes {100 * changed / near:.2f} % of {near} within 32 pixels" in words
    assert f"and {100 * moved / elsewhere:.2f} % of {elsewhere} elsewhere" in words
    assert words.endswith("in 6 images of the most frequent shapes")
    assert "measured in the last evaluation only" in protocols["buckets"][1]["padding"]
    assert protocols["exact"][0]["padding"].endswith("to multiples of 32 pixels")
    computed = [protocols[shapes][0]["resolution"] for shapes in ("exact", "buckets")]
    assert [words.count("x") for words in computed] == [5, 4]


def likely(found):
    rows = found.scores > 0.5
    return zip(found.boxes[rows], found.classes[rows], strict=True)


def iou_of(one, other):
    w, h = (min(one[k + 2], other[k + 2]) - max(one[k], other[k]) for k in (0, 1))
    shared = max(w, 0) * max(h, 0)
    sizes = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return shared / (sum(sizes) - shared)


@pytest.mark.slow
def test_images_with_more_candidates_than_take_part_are_told(run, capsys):
    plain = task()
    opened = trained.load(run, task=plain)

    def cut_off(variables, images, sizes):
        outputs = plain.forward(variables, images, sizes)
        return outputs | {"overflow": sizes[:, 0] > 0}

    own = dataclasses.replace(plain, forward=cut_off)
    record = own.evaluator(data(), "val")(opened.variables, True)
    assert record.protocol["candidates"] == "5 images had more than took part"
    assert "5 images had more candidates than take part" in capsys.readouterr().out


def test_flags_that_detectors_do_not_have_are_refused():
    with pytest.raises(UserError, match=r"--scale=0\.5: detectors resize by --short-side"):
        config(scale=0.5)
    with pytest.raises(UserError, match="--loss-norm=sum: the losses of detectors"):
        config(loss_norm="sum")


def test_images_without_objects_are_left_out_and_too_many_are_told(capsys):
    own = task(max_objects=3)
    counted = dataclasses.replace(data(), num_objects={"train": [2, 0, 5] + [1] * 9})
    left = own.training_data(counted)
    assert len(left.split("train")) == 11
    said = capsys.readouterr().out
    assert "1 training images have more than --max-objects=3 objects, up to 5" in said
    assert "1 training images without objects are left out" in said
    kept = task(empty_images="keep").training_data(counted)
    assert len(kept.split("train")) == 12
    nothing = dataclasses.replace(data(), num_objects={"train": [0] * 12})
    with pytest.raises(UserError, match="no training image of shapes shows an object"):
        own.training_data(nothing)
