"""Matching, sampling and the losses of Faster R-CNN, against slow twins and values by hand."""

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.infer.detections import from_input
from dense_jax.objectives import rcnn, targets
from dense_jax.objectives.rcnn import AnchorRule, RoiRule
from dense_jax.ops import boxes as box_ops
from dense_jax.ops.proposals import Proposals

RNG = np.random.default_rng


def slow_match(iou, valid, foreground, background, force, candidates=None):
    """The rules as sentences, box by box."""
    low, high = background if isinstance(background, tuple) else (0, background)
    num_boxes, num_objects = iou.shape
    objects = [g for g in range(num_objects) if valid[g]]
    allowed = [n for n in range(num_boxes) if candidates is None or candidates[n]]
    index, label = np.zeros(num_boxes, int), np.full(num_boxes, -1)
    for n in allowed:
        best = max((iou[n, g] for g in objects), default=-1.0)
        for g in reversed(objects):
            if iou[n, g] == best:
                index[n] = g
        if low <= best < high or not objects:
            label[n] = 0
        if best >= foreground:
            label[n] = 1
    if force:
        for g in objects:
            best = max((iou[n, g] for n in allowed), default=0.0)
            for n in allowed:
                if iou[n, g] == best > 0:
                    label[n] = 1
    return index, label


RULES = [
    dict(foreground=0.7, background=0.3, force=True),
    dict(foreground=0.5, background=0.5, force=False),
    dict(foreground=0.5, background=(0.1, 0.5), force=False),
]


@pytest.mark.parametrize("rule", RULES)
def test_matches_equal_the_slow_twin(rule):
    match = jax.jit(lambda iou, valid, some: targets.match(iou, valid, candidates=some, **rule))
    for seed in range(20):
        rng = RNG(seed)
        # Tenths, so that there are ties and values exactly at the thresholds.
        iou = (rng.integers(0, 11, (30, 5)) / 10).astype(np.float32)
        iou *= rng.random((30, 5)) < 0.6
        valid, some = rng.random(5) < 0.7, rng.random(30) < 0.8
        if seed == 0:
            valid[:] = False
        expected = slow_match(iou, valid, **rule, candidates=some)
        found = match(iou, valid, some)
        np.testing.assert_array_equal(found.label, expected[1])
        matched = expected[1] == 1
        np.testing.assert_array_equal(np.asarray(found.index)[matched], expected[0][matched])


def test_forced_matches_by_hand():
    """They keep their own best object, and an object that meets no box forces none."""
    iou = jnp.array([[0.5, 0.5, 0.2], [0.6, 0.1, 0.2]])
    found = targets.match(iou, jnp.ones(3, bool), foreground=0.7, background=0.3, force=True)
    assert found.label.tolist() == [1, 1]
    assert found.index.tolist() == [0, 0]
    # As columns of an IoU matrix of two objects and three boxes.
    iou = jnp.array([[0.5, 0.6], [0.5, 0.1], [0.2, 0.2]])
    found = targets.match(iou, jnp.ones(2, bool), foreground=0.7, background=0.3, force=True)
    assert found.index.tolist() == [1, 0, 0]
    assert found.label.tolist() == [1, 1, 0]
    iou = jnp.array([[0.0, 0.8], [0.0, 0.0], [0.0, 0.4]])
    found = targets.match(iou, jnp.ones(2, bool), foreground=0.7, background=0.3, force=True)
    assert found.label.tolist() == [1, 0, -1]


def slow_sample(labels, uniform, size, most):
    order = np.argsort(uniform, kind="stable")
    taken = [n for n in order if labels[n] == 1][:most]
    rest = [n for n in order if labels[n] == 0][: size - len(taken)]
    return taken, rest


def test_samples_equal_the_slow_twin():
    sample = jax.jit(targets.sample, static_argnums=(2, 3))
    for seed, (size, most) in itertools.product(range(8), [(8, 2), (16, 4), (64, 64), (40, 10)]):
        rng = RNG(seed)
        labels = rng.choice([1, 0, -1], 40, p=[[0.3, 0.4, 0.3], [0.0, 0.2, 0.8]][seed % 2])
        uniform = rng.random(40).astype(np.float32)
        taken, rest = slow_sample(labels, uniform, size, most)
        found = sample(jnp.array(labels), jnp.array(uniform), size, most)
        number = len(taken) + len(rest)
        np.testing.assert_array_equal(found.filled, np.arange(size) < number)
        np.testing.assert_array_equal(found.foreground, np.arange(size) < len(taken))
        np.testing.assert_array_equal(found.index[:number], taken + rest)


@pytest.mark.parametrize(("positives", "expected"), [(200, (128, 128)), (3, (3, 253))])
def test_the_sampler_of_proposals_by_hand(positives, expected):
    labels = jnp.zeros(1000, jnp.int32).at[:positives].set(1)
    found = targets.sample(labels, jnp.array(RNG(0).random(1000), jnp.float32), 256, 128)
    assert int(found.foreground.sum()) == expected[0]
    assert int((found.filled & ~found.foreground).sum()) == expected[1]


def test_smooth_l1_joins_where_it_should():
    for beta, value in ((1 / 9, 1 / 18), (1.0, 0.5)):
        near, far = rcnn.smooth_l1(jnp.array([beta - 1e-6, beta + 1e-6]), beta)
        np.testing.assert_allclose([near, far], value, atol=2e-6)
    np.testing.assert_allclose(rcnn.smooth_l1(jnp.array([-2.0, 0.5]), 0), [2, 0.5])
    np.testing.assert_allclose(rcnn.smooth_l1(jnp.array([-2.0, 0.1]), 1), [1.5, 0.005])


def scene(seed=0, count=60, slots=4, images=2) -> dict[str, Any]:
    """Random anchors and objects; the second image has one object less, in its padding."""
    rng = RNG(seed)

    def boxes(*shape):
        corner, sides = rng.uniform(0, 40, (*shape, 2)), rng.uniform(8, 30, (*shape, 2))
        return np.concatenate([corner, corner + sides], -1).astype(np.float32)

    objects = {
        "boxes": boxes(images, slots),
        "classes": rng.integers(1, 4, (images, slots)).astype(np.int32),
        "valid": np.array([[True] * slots, [True] * (slots - 1) + [False]]),
    }
    anchors = boxes(count)
    anchors[:4] = objects["boxes"][0] + rng.uniform(-1, 1, (4, 4)).astype(np.float32)
    return {
        "logits": rng.normal(0, 2, (images, count)).astype(np.float32),
        "deltas": rng.normal(0, 0.2, (images, count, 4)).astype(np.float32),
        "anchors": anchors,
        "objects": objects,
        "sizes": np.array([[64, 64], [50, 60]], np.int32),
        "uniform": rng.random((images, count)).astype(np.float32),
    }


def slow_smooth(x, beta):
    return (
        np.abs(x)
        if beta == 0
        else np.where(np.abs(x) < beta, x * x / (2 * beta), np.abs(x) - beta / 2)
    )


def slow_anchor_losses(given, rule):
    classes = boxes = 0.0
    drawn = 0
    for b in range(2):
        truth, valid = given["objects"]["boxes"][b], given["objects"]["valid"][b]
        height, width = given["sizes"][b]
        anchors = given["anchors"]
        some = None
        if rule.inside:
            some = (
                (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] <= width) & (anchors[:, 3] <= height)
            )
        iou = box_ops.iou(anchors, truth)
        index, label = slow_match(iou, valid, rule.foreground, rule.background, True, some)
        taken, rest = slow_sample(label, given["uniform"][b], rule.sample, rule.max_foreground)
        for n in taken + rest:
            x = float(given["logits"][b, n])
            classes += np.log1p(np.exp(-x)) if n in taken else np.log1p(np.exp(x))
        for n in taken:
            wanted = box_ops.encode(truth[index[n]][None], anchors[n][None])[0]
            boxes += slow_smooth(given["deltas"][b, n] - wanted, rule.beta).sum()
        drawn += len(taken) + len(rest)
    count = 2 * rule.sample if rule.fixed_count else drawn
    return classes, boxes * rule.box_weight, count


@pytest.mark.parametrize(
    "rule",
    [
        AnchorRule(sample=16, max_foreground=8),
        AnchorRule(sample=256, max_foreground=128, beta=0.0, fixed_count=True),
        AnchorRule(sample=16, max_foreground=2, inside=True, box_weight=10.0),
    ],
)
def test_anchor_losses_equal_the_slow_twin(rule):
    given = scene()
    found = jax.jit(rcnn.anchor_losses, static_argnames="rule")(**given, rule=rule)
    classes, boxes, count = slow_anchor_losses(given, rule)
    np.testing.assert_allclose(found["rpn_class"][0], classes, rtol=1e-5)
    np.testing.assert_allclose(found["rpn_box"][0], boxes, rtol=1e-5)
    assert (int(found["rpn_class"][1]), int(found["rpn_box"][1])) == (count, count)


def test_padded_objects_have_no_effect_and_empty_images_no_box_loss():
    given, rule = scene(), AnchorRule(sample=16, max_foreground=8)
    losses = jax.jit(lambda objects: rcnn.anchor_losses(**given | {"objects": objects}, rule=rule))
    expected = losses(given["objects"])
    changed = dict(given["objects"], boxes=given["objects"]["boxes"].copy())
    changed["boxes"][1, 3] = [0, 0, 64, 64]
    chex.assert_trees_all_equal(losses(changed), expected)
    for key, value in given["objects"].items():  # three more slots
        changed[key] = np.pad(value, [(0, 0), (0, 3)] + [(0, 0)] * (value.ndim - 2))
    chex.assert_trees_all_close(losses(changed), expected, rtol=1e-6)
    empty = losses(dict(given["objects"], valid=np.zeros((2, 4), bool)))
    assert float(empty["rpn_box"][0]) == 0
    assert float(empty["rpn_class"][0]) > 0
    assert int(empty["rpn_class"][1]) == 32


def rois(seed=0, rule=RoiRule(sample=12, max_foreground=4)) -> Any:  # noqa: B008
    given = scene(seed)
    proposals = Proposals(
        jnp.broadcast_to(jnp.array(given["anchors"]), (2, 60, 4)),
        jnp.array(given["logits"]),
        jnp.array(RNG(seed).random((2, 60)) < 0.9),
    )
    uniform = RNG(seed + 1).random((2, 64)).astype(np.float32)
    return given, proposals, uniform, rule


def test_sampled_rois_equal_the_slow_twin():
    given, proposals, uniform, rule = rois()
    found = jax.jit(rcnn.sample_rois, static_argnames="rule")(
        proposals, given["objects"], uniform, rule=rule
    )
    for b in range(2):
        truth, valid = given["objects"]["boxes"][b], given["objects"]["valid"][b]
        boxes = np.concatenate([proposals.boxes[b], truth])
        some = np.concatenate([proposals.valid[b], valid])
        iou = box_ops.iou(boxes, truth)
        index, label = slow_match(iou, valid, 0.5, (0, 0.5), False, some)
        taken, rest = slow_sample(label, uniform[b], rule.sample, rule.max_foreground)
        drawn = taken + rest
        np.testing.assert_array_equal(found.filled[b], np.arange(12) < len(drawn))
        np.testing.assert_array_equal(found.boxes[b, : len(drawn)], boxes[drawn])
        classes = [given["objects"]["classes"][b, index[n]] for n in taken]
        np.testing.assert_array_equal(found.classes[b], classes + [0] * (12 - len(taken)))
        for i, n in enumerate(taken):
            wanted = box_ops.encode(truth[index[n]][None], boxes[n][None], weights=(10, 10, 5, 5))
            np.testing.assert_allclose(found.deltas[b, i], wanted[0], rtol=1e-4, atol=1e-5)
            assert found.object_index[b, i] == index[n]
        assert len(taken) > 0


def test_roi_losses_equal_the_slow_twin():
    given, proposals, uniform, rule = rois(3)
    wanted = rcnn.sample_rois(proposals, given["objects"], uniform, rule)
    rng = RNG(5)
    logits: Any = rng.normal(0, 1, (2, 12, 4)).astype(np.float32)
    deltas: Any = rng.normal(0, 1, (2, 12, 4, 4)).astype(np.float32)
    found = rcnn.roi_losses(logits, deltas, wanted, rule)
    classes = boxes = 0.0
    for b, i in itertools.product(range(2), range(12)):
        if not wanted.filled[b, i]:
            continue
        c = int(wanted.classes[b, i])
        classes += np.log(np.exp(logits[b, i]).sum()) - logits[b, i, c]
        if c:
            boxes += slow_smooth(deltas[b, i, c] - np.asarray(wanted.deltas[b, i]), rule.beta).sum()
    np.testing.assert_allclose(found["class"][0], classes, rtol=1e-5)
    np.testing.assert_allclose(found["box"][0], boxes, rtol=1e-5)
    assert int(found["class"][1]) == int(found["box"][1]) == int(wanted.filled.sum())


def test_boxes_of_an_image_without_objects_are_background():
    given, proposals, uniform, rule = rois()
    empty = given["objects"] | {"valid": np.zeros((2, 4), bool)}
    wanted = rcnn.sample_rois(proposals, empty, uniform, rule)
    assert wanted.filled.all()
    assert not wanted.classes.any()
    logits, deltas = jnp.zeros((2, 12, 4)), jnp.ones((2, 12, 4, 4))
    found = rcnn.roi_losses(logits, deltas, wanted, rule)
    np.testing.assert_allclose(found["class"][0], 24 * np.log(4), rtol=1e-6)
    assert (float(found["box"][0]), int(found["box"][1])) == (0, 24)


def test_no_gradient_reaches_the_proposals():
    given, proposals, uniform, rule = rois()

    def total(boxes):
        found = rcnn.sample_rois(proposals._replace(boxes=boxes), given["objects"], uniform, rule)
        return jnp.sum(found.boxes) + jnp.sum(found.deltas)

    assert not np.asarray(jax.grad(total)(proposals.boxes)).any()


def test_random_numbers_belong_to_an_image():
    key = jax.random.key(0)
    both = rcnn.uniforms(key, jnp.array([4, 9]), 5)
    np.testing.assert_array_equal(rcnn.uniforms(key, jnp.array([9]), 5)[0], both[1])
    assert not np.array_equal(both[0], both[1])


def test_known_boxes_of_py_faster_rcnn_end_in_their_last_pixel():
    """A known box (8, 8, 24, 24) is (8, 8, 23, 23): anchors and proposals like it fit exactly."""
    truth = {
        "boxes": jnp.array([[[8.0, 8, 24, 24]]]),
        "classes": jnp.ones((1, 1), jnp.int32),
        "valid": jnp.ones((1, 1), bool),
    }
    like = jnp.array([[8.0, 8, 23, 23]])
    anchors = AnchorRule(foreground=0.999, plus_one=True, beta=0.0)
    matched = jax.jit(rcnn.match_anchors, static_argnames="rule")
    found = matched(like, truth["boxes"][0], truth["valid"][0], jnp.array([40, 40]), anchors)
    assert found.iou[0] == 1
    losses = jax.jit(rcnn.anchor_losses, static_argnames="rule")(
        jnp.zeros((1, 1)), jnp.full((1, 1, 4), 0.25), like, truth, jnp.array([[40, 40]]),
        jnp.zeros((1, 1)), rule=anchors,
    )  # fmt: skip
    assert float(losses["rpn_box"][0]) == 1.0  # four differences of 0.25 from no move

    rule = RoiRule(sample=2, max_foreground=2, foreground=0.999, plus_one=True)
    proposals = Proposals(like[None], jnp.zeros((1, 1)), jnp.ones((1, 1), bool))
    sampled = jax.jit(rcnn.sample_rois, static_argnames="rule")
    wanted = sampled(proposals, truth, jnp.zeros((1, 2)), rule=rule)
    np.testing.assert_array_equal(wanted.boxes, [[like[0], like[0]]])
    np.testing.assert_array_equal(wanted.classes, [[1, 1]])
    assert not wanted.deltas.any()


@pytest.mark.parametrize("plus_one", [False, True])
def test_given_proposals_take_the_form_of_the_network(plus_one):
    """Training crops a given box where evaluation does."""
    seen = []

    def apply(_, boxes: Any = None, *, method):
        if method == "features":
            return [jnp.zeros((1, 4, 4, 1))]
        seen.append(boxes)
        return jnp.zeros((1, boxes.shape[1], 2)), jnp.zeros((1, boxes.shape[1], 2, 4))

    batch = {
        "images": jnp.zeros((1, 32, 32, 3)),
        "index": jnp.zeros(1, jnp.int32),
        "objects": {
            "boxes": jnp.zeros((1, 1, 4)), "classes": jnp.zeros((1, 1), jnp.int32),
            "valid": jnp.zeros((1, 1), bool),
        },
        "proposals": {"boxes": jnp.array([[[4.0, 8, 20, 24]]]), "valid": jnp.ones((1, 1), bool)},
    }  # fmt: skip
    rule = RoiRule(sample=1, max_foreground=1, plus_one=plus_one)
    losses = functools.partial(rcnn.head_objective(rule), apply)
    seen_boxes = jax.jit(lambda key: (losses(batch, key), seen[-1])[1])(jax.random.key(0))
    shares = jnp.array([[[4.0, 8, 20, 24]]]) / 32
    size = jnp.array([[32, 32]])
    used = from_input(apply, [], (32, 32), size, shares, plus_one=plus_one).boxes
    np.testing.assert_array_equal(used, [[[4, 8, 20 - plus_one, 24 - plus_one]]])
    np.testing.assert_array_equal(seen_boxes, used)
