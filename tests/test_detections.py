"""Proposals and detections of one image, against slow twins and cases by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.infer import detections
from dense_jax.infer.detections import DetectionRule
from dense_jax.ops import boxes as box_ops
from dense_jax.ops.proposals import ProposalRule, Proposals, propose

RNG = np.random.default_rng


def slow_nms(boxes, order, max_iou, groups=None):
    """Returns the kept places of an order, one after another."""
    kept = []
    for i in order:
        rivals = [j for j in kept if groups is None or groups[i] == groups[j]]
        if all(box_ops.iou(boxes[[i]], boxes[[j]])[0, 0] <= max_iou for j in rivals):
            kept.append(i)
    return kept


def levels(seed, counts=(40, 12)) -> Any:
    rng = RNG(seed)
    anchors = []
    for count in counts:
        corner, sides = rng.uniform(-10, 50, (count, 2)), rng.uniform(5, 25, (count, 2))
        anchors.append(np.concatenate([corner, corner + sides], 1).astype(np.float32))
    logits = [rng.permutation(count).astype(np.float32) / 4 - 3 for count in counts]
    deltas = [rng.normal(0, 0.3, (count, 4)).astype(np.float32) for count in counts]
    return logits, deltas, anchors


def slow_propose(logits, deltas, anchors, size, rule):
    everything = []
    for own, moves, places in zip(logits, deltas, anchors, strict=True):
        top = np.argsort(-own, kind="stable")[: rule.candidates]
        boxes = box_ops.clip(box_ops.decode(moves[top], places[top]), tuple(size))
        good = [i for i in range(len(top)) if box_ops.min_side(boxes[[i]])[0] >= rule.min_side]
        everything += [(own[top[i]], boxes[i]) for i in slow_nms(boxes, good, rule.max_iou)]
    return sorted(everything, key=lambda pair: -pair[0])[: rule.count]


@pytest.mark.parametrize("rule", [ProposalRule(20, 12), ProposalRule(1000, 60, 0.3, 8.0)])
def test_proposals_equal_the_slow_twin(rule):
    compiled = jax.jit(propose, static_argnames="rule")
    size = jnp.array([45, 40])
    for seed in range(6):
        logits, deltas, anchors = levels(seed)
        found = compiled(logits, deltas, anchors, size, rule=rule)
        expected = slow_propose(logits, deltas, anchors, size, rule)
        assert found.boxes.shape == (rule.count, 4)
        np.testing.assert_array_equal(found.valid, np.arange(rule.count) < len(expected))
        scores = np.array([score for score, _ in expected])
        boxes = np.array([box for _, box in expected]).reshape(-1, 4)
        assert len(boxes) > 0
        # Equal scores of two levels may stand in either order.
        order = np.lexsort((boxes[:, 0], -scores))
        own = np.lexsort((found.boxes[: len(scores), 0], -found.scores[: len(scores)]))
        np.testing.assert_array_equal(np.asarray(found.scores)[own], scores[order])
        np.testing.assert_allclose(np.asarray(found.boxes)[own], boxes[order], atol=1e-4)


def test_dropped_proposals_are_not_replaced_and_logits_decide():
    """The best anchors are taken first; sigmoids of large logits are all 1."""
    anchors: Any = np.array(
        [[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 9, 10], [30, 30, 40, 40]], np.float32
    )
    logits: Any = np.array([30, 40, 20, -5], np.float32)
    none: Any = np.zeros((4, 4), np.float32)
    size = jnp.array([50, 50])
    found = propose([logits], [none], [anchors], size, ProposalRule(3, 4))
    assert found.valid.tolist() == [True, False, False, False]  # the fourth anchor was never taken
    np.testing.assert_array_equal(found.boxes[0], anchors[1])
    assert float(found.scores[0]) == 40
    everything = propose([logits], [none], [anchors], size, ProposalRule(4, 4))
    assert everything.valid.tolist() == [True, True, False, False]  # -5 is a score like any other


def heads(seed, count=30, num_classes=4) -> tuple[Any, Any, Any, Any]:
    rng = RNG(seed)
    corner, sides = rng.uniform(0, 30, (count, 2)), rng.uniform(4, 20, (count, 2))
    return (
        rng.normal(0, 2, (count, num_classes)).astype(np.float32),
        rng.normal(0, 1, (count, num_classes, 4)).astype(np.float32),
        np.concatenate([corner, corner + sides], 1).astype(np.float32),
        rng.random(count) < 0.9,
    )


def slow_detect(logits, deltas, boxes, valid, size, rule):
    pairs = []
    for i in range(len(boxes)):
        soft = np.exp(logits[i] - logits[i].max())
        soft /= soft.sum()
        for c in range(1, logits.shape[1]):
            box = box_ops.decode(deltas[i, c][None], boxes[i][None], weights=(10, 10, 5, 5))
            box = box_ops.clip(box, tuple(size))
            if valid[i] and soft[c] > rule.min_score and box_ops.min_side(box)[0] >= rule.min_side:
                pairs.append((soft[c], c, box[0]))
    pairs.sort(key=lambda pair: -pair[0])
    boxes = np.array([box for _, _, box in pairs])
    classes = [c for _, c, _ in pairs]
    kept = slow_nms(boxes, range(len(pairs)), rule.max_iou, classes)
    return [pairs[i] for i in kept][: rule.count]


@pytest.mark.parametrize(
    "rule", [DetectionRule(), DetectionRule(count=10, max_iou=0.3), DetectionRule(min_score=0.3)]
)
def test_detections_equal_the_slow_twin(rule):
    detect = jax.jit(detections.detect, static_argnames="rule")
    size = jnp.array([44, 40])
    for seed in range(4):
        given = heads(seed)
        found = jax.device_get(detect(*given, size, rule=rule))
        expected = slow_detect(*given, size, rule)
        number = len(expected)
        assert found["boxes"].shape == (rule.count, 4)
        np.testing.assert_array_equal(found["valid"], np.arange(rule.count) < number)
        np.testing.assert_allclose(found["scores"][:number], [p[0] for p in expected], rtol=1e-5)
        np.testing.assert_array_equal(found["classes"][:number], [p[1] for p in expected])
        np.testing.assert_allclose(found["boxes"][:number], [p[2] for p in expected], atol=1e-4)
        assert not found["boxes"][number:].any()
        assert not found["classes"][number:].any()
        assert not found["overflow"]


def test_a_pool_that_is_too_small_is_told():
    given, size = heads(0), jnp.array([44, 40])
    rule = DetectionRule(candidates=20)
    found = detections.detect(*given, size, rule)
    assert bool(found["overflow"])
    # As many as are wanted survive, so that nothing left out could be among them.
    enough = detections.detect(*given, size, DetectionRule(candidates=20, count=5))
    assert not bool(enough["overflow"])
    expected = slow_detect(*given, size, DetectionRule(count=5))
    np.testing.assert_allclose(enough["scores"], [p[0] for p in expected], rtol=1e-5)


def test_values_that_are_not_finite_are_dropped():
    logits, deltas, boxes, _ = heads(0)
    deltas[0] = np.nan
    boxes[1] = np.inf
    size = jnp.array([44, 40])
    detect = jax.jit(detections.detect, static_argnames="rule")
    found = detect(logits, deltas, boxes, np.ones(30, bool), size, rule=DetectionRule())
    assert np.isfinite(found["boxes"]).all()
    expected: Any = np.arange(30) > 1
    same = detect(*heads(0)[:3], expected, size, rule=DetectionRule())
    np.testing.assert_array_equal(found["boxes"], same["boxes"])


def test_boxes_of_py_faster_rcnn_by_hand():
    """Moved boxes are one larger, cut at the last pixel, and as large as exp(dw) says."""
    # Width 16, centre 8: moved by 4; then exp(5) as large, though others stop at 62.5; too narrow.
    anchors = jnp.array([[0.0, 0, 15, 15], [0, 0, 15, 15], [20, 20, 27, 35]])
    deltas = jnp.array([[0.25, 0, 0, 0], [0, 0, 5, 5], [0, 0, 0, 0]])
    logits, rule = jnp.array([3.0, 2, 1]), ProposalRule(3, 3, 1.0, 10.0, plus_one=True)
    proposed = jax.jit(propose, static_argnames="rule")
    found = proposed([logits], [deltas], [anchors], jnp.array([1000, 2000]), rule=rule)
    wide = 16 * np.exp(5) / 2 + 8
    expected = [[4, 0, 20, 16], [0, 0, wide, 999]]
    np.testing.assert_allclose(found.boxes[:2], expected, rtol=1e-5)
    assert found.valid.tolist() == [True, True, False]
    still = proposed([logits], [0 * deltas], [anchors], jnp.array([30, 40]), rule=rule)
    assert still.boxes[1].tolist() == [0, 0, 16, 16]  # 17 wide: at least 17 pixels stay
    least = dataclasses.replace(rule, min_side=17.0)
    narrow = proposed([logits], [0 * deltas], [anchors], jnp.array([30, 40]), rule=least)
    assert narrow.valid.tolist() == [True, True, False]

    # A detection of the same move; its edges are one further.
    scores = jnp.log(jnp.array([[0.1, 0.9]]))
    moves = jnp.array([[[0.0] * 4, [2.5, 0, 0, 0]]])
    one, size = DetectionRule(count=1, plus_one=True), jnp.array([16, 2000])
    box, ok = jnp.array([[0.0, 0, 15, 15]]), jnp.ones(1, bool)
    detect = jax.jit(detections.detect, static_argnames="rule")
    seen = detect(scores, moves, box, ok, size, rule=one)
    np.testing.assert_allclose(seen["boxes"], [[4, 0, 21, 16]], rtol=1e-6)


@pytest.mark.parametrize("plus_one", [False, True])
def test_detections_that_do_not_move_are_their_proposals(plus_one):
    logits, deltas, boxes, valid, size = *heads(0), jnp.array([64, 64])
    rule = DetectionRule(max_iou=1.0, count=200, plus_one=plus_one, is_moved=False)
    found = detections.detect(logits, deltas, boxes, valid, size, rule)
    inside = np.clip(boxes, 0, 63) + np.array([0, 0, 1, 1]) if plus_one else np.clip(boxes, 0, 64)
    apart = np.abs(np.asarray(found["boxes"])[found["valid"]][:, None] - inside[None])
    assert found["valid"].sum() > 20
    assert apart.max(axis=2).min(axis=1).max() < 1e-4


def test_one_box_may_have_several_classes():
    logits = jnp.log(jnp.array([[0.1, 0.3, 0.6]]))
    box, none = jnp.array([[0.0, 0, 10, 10]]), jnp.zeros((1, 3, 4))
    size = jnp.array([20, 20])
    found = detections.detect(logits, none, box, jnp.ones(1, bool), size, DetectionRule(count=3))
    assert found["classes"].tolist() == [2, 1, 0]
    np.testing.assert_allclose(found["scores"], [0.6, 0.3, 0], rtol=1e-5)


@pytest.mark.parametrize("plus_one", [False, True])
def test_proposals_are_seen_with_their_edges(plus_one):
    """Files and pictures of proposals do not depend on the form of boxes inside the network."""
    inside = jnp.array([[[2.0, 2, 6 - plus_one, 9 - plus_one]]])
    found = Proposals(inside, jnp.zeros((1, 1)), jnp.ones((1, 1), bool))
    first = detections.with_edges(lambda: detections.FirstStage([], inside[0], found), plus_one)
    assert first().proposals.boxes.tolist() == [[[2, 2, 6, 9]]]
    boxes = detections.proposals_alone(lambda *_: first(), 1)(
        {}, jnp.zeros((1, 9, 9, 3)), jnp.full((1, 2), 9)
    )
    assert boxes["boxes"].tolist() == [[[2, 2, 6, 9]]]
