"""Greedy suppression: equal to a slow twin in both forms, at borders of the rule and on chains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops import boxes as box_ops
from dense_jax.ops import nms


def greedy(boxes, valid, threshold, groups=None, plus_one=False):
    """Keeps a box if no kept box before it overlaps it by more than the threshold."""
    keep = []
    one = int(plus_one)
    for i, box in enumerate(boxes.astype(np.float64)):
        hits = False
        for j in keep:
            other = boxes[j].astype(np.float64)
            sides = [
                max(0, min(box[k + 2], other[k + 2]) - max(box[k], other[k]) + one) for k in (0, 1)
            ]
            areas = [(b[2] - b[0] + one) * (b[3] - b[1] + one) for b in (box, other)]
            shared = sides[0] * sides[1]
            is_same = groups is None or groups[i] == groups[j]
            hits |= is_same and shared > threshold * (sum(areas) - shared)
        if valid[i] and not hits:
            keep.append(i)
    return np.isin(np.arange(len(boxes)), keep)


def clusters(num, objects=10, seed=0):
    """Boxes that are shifted from the boxes of some objects, in no order."""
    rng = np.random.default_rng(seed)
    corners, sides = rng.uniform(0, 100, (objects, 2)), rng.uniform(10, 50, (objects, 2))
    which = rng.integers(0, objects, num)
    corners = corners[which] + rng.normal(size=(num, 2)) * 0.1 * sides[which]
    boxes = np.concatenate([corners, corners + sides[which] * rng.uniform(0.8, 1.2, (num, 2))], 1)
    return boxes.astype(np.float32)


def chain(num):
    """Boxes each of which overlaps only the next one by 1/2: a greedy rule keeps every other."""
    left = np.arange(num, dtype=np.float32) * 3
    return np.stack([left, 0 * left, left + 9, 0 * left + 1], 1)


def tiles(boxes, valid, threshold, groups=None, plus_one=False, *, tile=7):
    """The form for accelerators, with small tiles."""
    return nms._tiles(nms._columns(boxes, groups, plus_one), valid, threshold, tile)


FORMS = {"for CPUs": nms.nms, "tiles": tiles}


@pytest.fixture(params=FORMS)
def form(request):
    """Calls one form, compiled, with NumPy in and out."""

    def call(boxes, valid, threshold, groups=None, plus_one=False):
        f = jax.jit(functools.partial(FORMS[request.param], threshold=threshold, plus_one=plus_one))
        return np.asarray(f(boxes, valid, groups=groups))

    return call


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_kept_boxes_are_those_of_a_greedy_twin(form, threshold):
    rng = np.random.default_rng(1)
    boxes, valid, groups = clusters(60), rng.random(60) < 0.8, rng.integers(0, 2, 60)
    ignored = np.where(valid[:, None], boxes, boxes[:1])  # equal to the best box, but padding
    for some, *options in ((boxes,), (ignored, groups), (boxes, groups, True)):
        expected = greedy(some, valid, threshold, *options)
        assert 5 < expected.sum() < 50
        np.testing.assert_array_equal(form(some, valid, threshold, *options), expected)


def test_boxes_at_the_threshold_stay(form):
    half = np.array([[0, 0, 10, 10], [0, 0, 10, 5]], np.float32)  # IoU 0.5 exactly
    both = np.ones(2, bool)
    assert form(half, both, 0.5).tolist() == [True, True]
    assert form(half, both, 0.4999).tolist() == [True, False]
    # With the last pixel inside, 10 x 10 and 10 x 5 pixels.
    edges = np.array([0, 0, 1, 1], np.float32)
    assert form(half - edges, both, 0.5, None, True).tolist() == [True, True]
    assert form(half, both, 0.5, None, True).tolist() == [True, False]  # 66 of 121


def test_equal_and_empty_boxes(form):
    same = np.tile(np.array([[1, 1, 4, 4]], np.float32), (9, 1))
    assert form(same, np.ones(9, bool), 0.7).tolist() == [True] + [False] * 8
    assert form(same, np.arange(9) > 2, 0.7).tolist() == [i == 3 for i in range(9)]
    assert form(same, np.ones(9, bool), 0.7, np.arange(9) // 3).tolist() == [
        i % 3 == 0 for i in range(9)
    ]
    assert form(same * 0, np.ones(9, bool), 0.0).all()
    assert form(same, np.ones(9, bool), 1.0).all()
    assert nms.nms(jnp.zeros((0, 4)), jnp.ones(0, bool), 0.5).shape == (0,)


@pytest.mark.parametrize("num", [1, 6, 7, 8, 33])
def test_a_chain_is_followed_to_its_end(form, num):
    # Each box overlaps the next by IoU 1/2 and the one after that by 1/5.
    got = form(chain(num), np.ones(num, bool), 0.4)
    np.testing.assert_array_equal(got, np.arange(num) % 2 == 0)
    np.testing.assert_array_equal(got, greedy(chain(num), np.ones(num, bool), 0.4))


def test_no_kept_boxes_overlap_and_each_dropped_box_has_a_kept_one_before_it(form):
    boxes = clusters(300, objects=20, seed=3)
    keep = form(boxes, np.ones(300, bool), 0.5)
    overlap = box_ops.iou(boxes, boxes) > 0.5
    before = np.tril(overlap, -1) & keep[None]
    np.testing.assert_array_equal(before.any(1), ~keep)


@pytest.mark.parametrize("name", FORMS)
def test_batches(name):
    boxes = np.stack([clusters(40, seed=s) for s in range(3)])
    valid = np.arange(40)[None] < np.array([[40], [25], [0]])
    groups = np.random.default_rng(0).integers(0, 2, (3, 40))
    rule = functools.partial(FORMS[name], threshold=0.5)
    got = jax.jit(jax.vmap(lambda b, v, g: rule(b, v, groups=g)))(boxes, valid, groups)
    for one, *args in zip(got, boxes, valid, groups, strict=True):
        np.testing.assert_array_equal(one, greedy(args[0], args[1], 0.5, args[2]))


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError, match="shape"):
        nms.nms(jnp.zeros((3, 4)), jnp.ones(2, bool), 0.5)
    with pytest.raises(AssertionError, match="shape"):
        nms.nms(jnp.zeros((3, 5)), jnp.ones(3, bool), 0.5)
