"""Fast R-CNN on proposals from a file, and detectors whose proposals are all anchors or random."""

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from dense_jax.data import proposals as proposal_file
from dense_jax.data.detection import GiveProposals, PadProposals, ReadObjects
from dense_jax.data.transforms import RandomFlip, Resize
from dense_jax.errors import UserError
from dense_jax.evaluation import instances
from dense_jax.infer import predictor
from dense_jax.infer.detections import DetectionRule, classify_at_scales, detect, from_input
from dense_jax.models.rcnn import faster_rcnn as models
from dense_jax.objectives.rcnn import RoiRule, RoiTargets, roi_losses, sample_rois
from dense_jax.ops.proposals import ProposalRule, Proposals, propose, whole_grid
from dense_jax.ops.resize import resize_bilinear
from dense_jax.tasks import trained, training
from dense_jax.tasks.detection import truth_of
from dense_jax.tasks.rcnn_recipes import head_rule
from experiments import faster_rcnn as script
from tests import contract, members
from tests.test_detection_task import (
    NUM_CLASSES,
    Trunk,
    batch_of,
    config,
    data,
    steps,
    task,
    variables_of,
)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(models.FasterRCNN, "_trunk", lambda self: Trunk(name="backbone"))
    with jax.numpy_dtype_promotion("standard"):  # AdamW raises a float to an integer power
        yield


BOX = {"head_loss": "box"}


@pytest.fixture
def boxes_file(tmp_path):
    """True boxes, made a little larger, then the whole image."""
    table = {}
    for source in (data().split("train"), data().split("val")):
        for i in range(len(source)):
            boxes = truth_of(source[i]).boxes + np.array([-2.5, -1, 2.25, 3])
            table[source[i]["name"]] = [*boxes.tolist(), [0, 0, 40, 48]]
    (tmp_path / "proposals.json").write_text(json.dumps(table))
    return tmp_path / "proposals.json"


def test_proposals_move_with_their_image(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"a": [[1, 2, 5, 8], [-4, 0, 3, 2], [0, 0, 1, 1]]}))
    image = np.zeros((10, 20, 3), np.uint8)
    example: Any = {"image": image, "label": np.zeros((10, 20), np.uint8), "name": "a"}
    steps = [ReadObjects(), GiveProposals(str(path), 2), Resize((20, 20)), RandomFlip(1.0)]
    for step in [*steps, PadProposals(3)]:
        example = step(example, np.random.default_rng(0))
    expected = [[15, 4, 19, 16], [17, 0, 20, 4], [0, 0, 0, 0]]
    np.testing.assert_array_equal(example["proposals"]["boxes"], expected)
    assert example["proposals"]["valid"].tolist() == [True, True, False]
    with pytest.raises(UserError, match="no boxes for image 'b'"):
        GiveProposals(str(path), 2)({**example, "name": "b"})


@pytest.mark.slow
def test_a_run_on_given_boxes_trains_scores_and_predicts(boxes_file, tmp_path):
    flags: Any = {"proposal_source": "file", "proposals": str(boxes_file), "num_proposals": 12}
    workdir = tmp_path / "run"
    own = task(workdir=str(workdir), **flags)
    training.train(own)
    record = json.loads((workdir / "evaluation.json").read_text())
    assert 0 <= record["scores"]["box_ap"] <= 1

    opened = trained.load(workdir, task=own)
    images = tmp_path / "images"
    images.mkdir()
    source = data().split("val")
    Image.fromarray(source[0]["image"]).save(images / "x.png")
    with pytest.raises(UserError, match=r"proposals\.json cannot be read"):
        own.inputs_in(images)
    boxes = proposal_file.read(boxes_file)[source[0]["name"]]
    (images / "proposals.json").write_text(json.dumps({"x": boxes.tolist()}))
    inputs_of = own.inputs_in(images)
    predictor.predict_folder(
        opened.predictor, opened.classes, images, tmp_path / "out", inputs_of=inputs_of
    )
    results = json.loads((tmp_path / "out/results.json").read_text())
    shares = boxes / [40, 48, 40, 48]
    found = opened.predict(source[0]["image"], proposals=np.clip(shares, 0, 1))
    assert len(found.boxes) == len(results)
    scores = [round(row["score"], 4) for row in results]
    np.testing.assert_allclose(scores, np.round(found.scores, 4), atol=1e-3)
    for wrong, words in [
        (boxes, "divide pixels"),
        (np.clip(shares, 0, 1)[:, [2, 1, 0, 3]], "x1 below x0"),
        (np.zeros((4, 12)), r"\[4, 12\]: give \[R, 4\]"),
        ([[0, 0, 1]], r"\[1, 3\]"),
        ([[0, 0, 1, np.nan]], "divide pixels"),
    ]:
        with pytest.raises(UserError, match=words):
            opened.predict(source[0]["image"], proposals=wrong)
    boxes_file.write_text(json.dumps({"other name": []}))
    proposal_file.read_once.cache_clear()
    with pytest.raises(UserError, match="no boxes for image"):
        own.loss(data())


def test_shares_become_pixels_of_each_image():
    given = jnp.array([[[0.25, 0.5, 0.75, 1.0], [0, 0, 0, 0]], [[0, 0, 1, 0.5], [0.5, 0, 0.5, 1]]])
    found = from_input(lambda: None, [], (64, 64), jnp.array([[20, 40], [60, 16]]), given)
    expected = [[[10, 10, 30, 20], [0, 0, 0, 0]], [[0, 0, 16, 30], [8, 0, 8, 60]]]
    np.testing.assert_array_equal(found.boxes, expected)
    assert found.valid.tolist() == [[True, False], [True, False]]


def test_evaluation_takes_the_boxes_of_each_image(boxes_file, monkeypatch):
    """With the given boxes in place of detections, these are the boxes in the file, cut."""

    def given_back(variables, images, sizes, given):
        found = from_input(lambda: None, [], images.shape[1:3], sizes, given)
        classes = jnp.ones(found.valid.shape, jnp.int32)
        arrays = {"boxes": found.boxes, "classes": classes, "valid": found.valid}
        return {**arrays, "scores": 1.0 * found.valid, "overflow": jnp.zeros(len(images), bool)}

    seen = {}
    collect = instances.DetectionEvaluator.add

    def add(self, index, truth, detections):
        seen[index] = detections.boxes
        collect(self, index, truth, detections)

    monkeypatch.setattr(instances.DetectionEvaluator, "add", add)
    flags: Any = {"proposal_source": "file", "proposals": str(boxes_file), "num_proposals": 12}
    own = dataclasses.replace(task(**flags), forward=given_back)
    own.evaluator(data(), "val")({"params": {}}, True)
    table, source = proposal_file.read(boxes_file), data().split("val")
    assert len(seen) == len(source)
    for index, boxes in seen.items():
        expected = np.clip(table[source[index]["name"]], 0, [40, 48, 40, 48])
        np.testing.assert_allclose(boxes, expected, atol=1e-3)


def test_training_takes_the_given_boxes(boxes_file, tmp_path):
    """Empty slots and boxes outside of the image do not take part."""
    flags: Any = {"proposal_source": "file", "num_proposals": 12, "optimizer": "sgd"}
    flags |= {"momentum": 0.0, "rois_per_image": 64, "flip": "off"}
    own = task(proposals=str(boxes_file), **flags)
    batch = batch_of(own)
    assert batch["proposals"]["boxes"].shape == (4, 12, 4)
    table = {k: v.tolist() for k, v in proposal_file.read(boxes_file).items()}
    outside = {name: [*boxes, [90, 90, 99, 99]] for name, boxes in table.items()}
    other = tmp_path / "more.json"
    other.write_text(json.dumps(outside))
    more = batch_of(task(proposals=str(other), **flags))
    assert more["proposals"]["valid"].sum() == batch["proposals"]["valid"].sum()
    expected, found = (scalars for _, scalars in steps(own, (batch, more), 1))
    assert set(expected) == {"loss", "class", "box"}
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flags", members([{"head_loss": "class"}, BOX], [BOX]))
def test_one_of_the_losses_alone(flags):
    flags = {"init": "run:trained", "optimizer": "sgd", **flags}
    own = task(proposal_source="grid", momentum=0.0, weight_decay=0.0, **flags)
    left_out = {"class": "box", "box": "class"}[flags["head_loss"]]
    ((_, scalars),) = steps(own, (batch_of(own),), 1)
    assert scalars[left_out] == 0
    assert scalars[flags["head_loss"]] > 0
    assert not hasattr(own.model, "rpn")


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "layer"), [("box", "bbox_pred"), ("svm", "cls_score")])
def test_only_a_last_layer_learns_in_stages(loss, layer):
    groups = script.build(config(head_loss=loss, init="run:trained"), NUM_CLASSES).groups
    params: Any = traverse_util.flatten_dict(variables_of(task())["params"], sep="/")
    learns = {
        name
        for name in params
        if not any(group.lr == 0 and re.search(group.pattern, name) for group in groups)
    }
    assert learns == {f"box_predictor/{layer}/kernel", f"box_predictor/{layer}/bias"}


@pytest.mark.slow
def test_support_vector_machines_by_hand():
    """Objects against boxes that hardly touch them; margins below 1 cost what they lack."""
    rule = head_rule(RoiRule(), "svm", 8)
    assert (rule.sample, rule.max_foreground, rule.box_weight) == (8, 2, 0)
    boxes = jnp.array([[[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 4], [30, 30, 40, 40]]])
    objects = {"boxes": boxes[:, :1], "classes": jnp.array([[2]]), "valid": jnp.ones((1, 1), bool)}
    given = Proposals(boxes, jnp.zeros((1, 4)), jnp.array([[False, True, True, True]]))
    wanted = sample_rois(given, objects, jnp.full((1, 5), 0.5), rule)
    # IoU 0.9 and 0.4 stand for nothing, 0 is background, and the object itself has its class.
    chosen = [tuple(box) for box in wanted.boxes[0][wanted.filled[0]].tolist()]
    assert sorted(chosen) == [(0, 0, 10, 10), (30, 30, 40, 40)]
    assert sorted(wanted.classes[0][wanted.filled[0]].tolist()) == [0, 2]
    targets = RoiTargets(
        boxes[:, :3], jnp.array([[2, 0, 1]]), jnp.zeros((1, 3, 4)), jnp.zeros((1, 3), int),
        jnp.array([[True, True, False]]),
    )  # fmt: skip
    logits = jnp.array([[[9.0, -2, 0.25], [9, 0.5, -3], [9, 9, 9]]])
    losses = roi_losses(logits, jnp.zeros((1, 3, 3, 4)), targets, rule)
    assert float(losses["class"][0]) == 0.75 + 1.5  # the first lacks 0.75, the second 1.5
    assert int(losses["class"][1]) == 2
    assert float(losses["box"][0]) == 0
    found = detect(
        logits[0, :2], jnp.zeros((2, 3, 4)), boxes[0, 2:], jnp.ones(2, bool), jnp.array([50, 50]),
        DetectionRule(count=4, one_against_rest=True),
    )  # fmt: skip
    assert found["classes"][found["valid"]].tolist() == [1, 2, 1]
    expected = 1 / (1 + np.exp(-np.array([0.5, 0.25, -2])))
    np.testing.assert_allclose(found["scores"][found["valid"]], expected, rtol=1e-6)


@pytest.mark.slow  # detections by hand above
def test_support_vector_machines_score_detections():
    programs = []
    for loss in ("svm", "class"):
        own = task(head_loss=loss, neck="c5", anchor_sizes=(16, 32), init="run:trained")
        variables = contract.shapes_of(own.model.clone(axis_name=None), (1, 64, 64, 3))[1]
        arrays = variables, jnp.zeros((1, 64, 64, 3)), jnp.array([[60, 50]])
        programs.append(re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(own.forward)(*arrays))))
    assert programs[0] != programs[1]  # svm is scored so


@pytest.mark.slow
def test_each_box_is_classified_at_the_size_that_suits_it():
    """Where it is closest to 224 pixels, as a pass over the image of this size alone sees it."""
    own = task(neck="c5", anchor_sizes=(16, 32))
    variables = variables_of(own)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(-1, 1, (1, 480, 448, 3)).astype(np.float32))
    boxes = jnp.array(
        [[[0.0, 0, 448, 440], [20, 30, 240, 250], [10, 10, 20, 18], [0, 100, 300, 400]]]
    )

    def apply(*inputs, method) -> Any:
        return own.model.clone(axis_name=None).apply(variables, *inputs, train=False, method=method)

    @jax.jit
    def at_two_sizes(images, boxes):
        levels = apply(images, method="features")
        return classify_at_scales(apply, images, levels, boxes, (1.0, 0.48))

    logits, deltas = at_two_sizes(images, boxes)

    def sides_of(size):  # 230 / 480 and 215 / 448
        return jnp.array([size[1] / 448, size[0] / 480] * 2, jnp.float32)

    def alone(scale):
        size = (round(480 * scale), round(448 * scale))
        smaller = resize_bilinear(images, size, align_corners=False)
        padded = jnp.pad(smaller, [(0, 0), (0, -size[0] % 32), (0, -size[1] % 32), (0, 0)])
        return apply(
            apply(padded, method="features"), boxes * sides_of(size)[None, None], method="classify"
        )

    one, half = jax.jit(alone, static_argnums=0)(1.0), jax.jit(alone, static_argnums=0)(0.48)
    # Sides of 444, 220, 9 and 300 pixels; at half the size about 213, 106, 4 and 144.
    for box, (scores, moves) in enumerate([half, one, one, half]):
        np.testing.assert_allclose(logits[0, box], scores[0, box], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(deltas[0, box], moves[0, box], rtol=1e-4, atol=1e-6)
    assert not np.allclose(one[0][0, 0], half[0][0, 0], atol=1e-6)


def test_all_anchors_are_proposals():
    anchors = [jnp.array([[-4.0, 0, 4, 8], [40, 0, 44, 4]]), jnp.array([[2.0, 2, 6, 30]])]
    found = whole_grid(anchors, jnp.array([[20, 32]]))
    np.testing.assert_array_equal(found.boxes, [[[0, 0, 4, 8], [32, 0, 32, 4], [2, 2, 6, 20]]])
    assert found.valid.tolist() == [[True, False, True]]


@pytest.mark.slow
def test_proposals_without_scores_or_moves():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 40, (50, 2)).astype(np.float32)
    anchors = [jnp.asarray(np.concatenate([corner, corner + 12], axis=1))]
    logits = [jnp.asarray(rng.normal(size=50).astype(np.float32))]
    deltas = [jnp.asarray(rng.normal(size=(50, 4)).astype(np.float32))]
    size = jnp.array([64, 64])
    still = propose(logits, deltas, anchors, size, ProposalRule(50, 50, is_moved=False))
    apart = np.abs(still.boxes[still.valid][:, None] - anchors[0][None]).max(axis=2)
    assert apart.min(axis=1).max() < 1e-4
    rule = ProposalRule(50, 10, is_ranked=False)
    first = propose(logits, deltas, anchors, size, rule)
    other = propose([-logits[0]], deltas, anchors, size, rule)
    np.testing.assert_array_equal(first.boxes, other.boxes)
    assert first.valid.all()
    whole = ProposalRule(50, 50, is_ranked=False, is_moved=False)
    every = propose(logits, deltas, anchors, size, whole)
    assert every.valid.sum() == 50  # none is suppressed
    ranked = propose(logits, deltas, anchors, size, dataclasses.replace(rule, is_ranked=True))
    assert not np.array_equal(first.boxes, ranked.boxes)
