"""Boxes: values by hand, and slow twins that count pixels; NumPy and JAX give the same."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops import boxes

# One of 4 x 2 pixels, its right half, one that shares a corner, one far off and an empty one.
BY_HAND = np.array(
    [[1, 1, 5, 3], [3, 1, 5, 3], [4, 2, 6, 6], [10, 10, 11, 12], [2, 2, 2, 2]], np.float32
)
SIDE = 14


def drawn(num, seed=0):
    """Boxes of whole pixels, some of which leave an image of SIDE x SIDE."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(-4, SIDE, (num, 2))
    return np.concatenate([corners, corners + rng.integers(1, 9, (num, 2))], 1).astype(np.float32)


def pixels(box):
    """The pixels in a box, as a set of (row, column)."""
    x0, y0, x1, y1 = box.astype(int)
    return {(y, x) for y in range(y0, y1) for x in range(x0, x1)}


@pytest.fixture(params=["numpy", "jax", "traced"])
def call(request):
    """Calls a function of arrays on NumPy arrays, on JAX arrays, or compiled."""
    if request.param == "numpy":
        return lambda f, *arrays: f(*arrays)
    compiled = jax.jit if request.param == "traced" else lambda f: f
    return lambda f, *arrays: np.asarray(compiled(f)(*map(jnp.asarray, arrays)))


def test_values_by_hand(call):
    np.testing.assert_array_equal(
        call(boxes.sides, BY_HAND), [[4, 2], [2, 2], [2, 4], [1, 2], [0, 0]]
    )
    np.testing.assert_array_equal(call(boxes.area, BY_HAND), [8, 4, 8, 2, 0])
    np.testing.assert_array_equal(call(boxes.min_side, BY_HAND), [2, 2, 2, 1, 0])
    overlaps = call(boxes.iou, BY_HAND, BY_HAND)
    assert overlaps.dtype == np.float32
    expected = [
        [1, 1 / 2, 1 / 15, 0, 0],
        [1 / 2, 1, 1 / 11, 0, 0],
        [1 / 15, 1 / 11, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0],  # the empty box, even with itself
    ]
    np.testing.assert_allclose(overlaps, expected, rtol=1e-6)
    np.testing.assert_array_equal(
        call(lambda b: boxes.clip(b, (4, 5)), BY_HAND),
        [[1, 1, 5, 3], [3, 1, 5, 3], [4, 2, 5, 4], [5, 4, 5, 4], [2, 2, 2, 2]],
    )
    scaled = call(lambda b: boxes.scale(b, (0.5, 2.0)), BY_HAND)
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled[2], [8, 1, 12, 3])


def test_slow_twins(call):
    some, others = drawn(12), drawn(5, seed=1)
    np.testing.assert_array_equal(call(boxes.area, some), [len(pixels(box)) for box in some])
    expected = [
        [len(pixels(a) & pixels(b)) / len(pixels(a) | pixels(b)) for b in others] for a in some
    ]
    np.testing.assert_allclose(call(boxes.iou, some, others), expected, rtol=1e-6)
    whole = some.astype(np.int32), others.astype(np.int32)
    np.testing.assert_allclose(call(boxes.iou, *whole), expected, rtol=1e-6)
    image = {(y, x) for y in range(SIDE) for x in range(SIDE)}
    clipped = call(lambda b: boxes.clip(b, (SIDE, SIDE)), some)
    assert [pixels(box) for box in clipped] == [pixels(box) & image for box in some]
    assert any(len(pixels(box) - image) for box in some)
    large = call(lambda b: boxes.scale(b, (3.0, 2.0)), some)
    np.testing.assert_array_equal(call(boxes.area, large), 6 * call(boxes.area, some))


def test_leading_axes_and_sizes_of_a_batch():
    batch, others = np.stack([drawn(4), drawn(4, 1)]), np.stack([drawn(3, 2), drawn(3, 3)])
    each = np.stack([boxes.iou(a, b) for a, b in zip(batch, others, strict=True)])
    np.testing.assert_array_equal(boxes.iou(batch, others), each)
    np.testing.assert_allclose(boxes.iou(jnp.asarray(batch), jnp.asarray(others)), each, rtol=1e-6)
    sizes = jnp.array([[5, 9], [14, 3]], jnp.int32)
    clipped = jax.jit(jax.vmap(lambda b, size: boxes.clip(b, (size[0], size[1]))))(batch, sizes)
    for got, one, size in zip(clipped, batch, sizes, strict=True):
        np.testing.assert_array_equal(got, boxes.clip(one, (int(size[0]), int(size[1]))))


def test_tight_box_of_a_mask():
    for box in boxes.clip(drawn(20), (SIDE, SIDE)):
        mask = np.zeros((SIDE, SIDE), bool)
        for y, x in pixels(box):
            mask[y, x] = True
        expected = box if mask.any() else np.zeros(4)
        np.testing.assert_array_equal(boxes.of_mask(mask), expected)
    assert boxes.of_mask(np.eye(3, 5, dtype=bool)).tolist() == [0, 0, 3, 3]


def test_boxes_of_an_image_are_scaled_in_double_precision():
    some, factors = drawn(12), np.divide((31, 47), (97, 101))
    scaled = boxes.scale(some, (factors[0], factors[1]))
    np.testing.assert_array_equal(scaled, (some * factors[[1, 0, 1, 0]]).astype(np.float32))


def floats(rows):
    return np.array(rows, np.float32)


def encode_one(box, anchor, weights, one):
    """What a network predicts for a box, from its centre and size and those of the anchor."""
    (w, h), (a, b) = ((c[2] - c[0] + one, c[3] - c[1] + one) for c in (box, anchor))
    x, y, xa, ya = box[0] + w / 2, box[1] + h / 2, anchor[0] + a / 2, anchor[1] + b / 2
    deltas = ((x - xa) / a, (y - ya) / b, math.log(w / a), math.log(h / b))
    return [weight * delta for weight, delta in zip(weights, deltas, strict=True)]


HEAD = (10.0, 10.0, 5.0, 5.0)


def test_boxes_are_encoded_as_by_hand(call):
    anchor, box = floats([[10, 20, 50, 100]]), floats([[14, 30, 44, 120]])
    got = call(lambda b, a: boxes.encode(b, a, weights=HEAD), box, anchor)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [[-0.25, 1.875, -1.438410, 0.588915]], atol=1e-6)
    some, others = drawn(12), drawn(12, seed=1)
    for one in (0, 1):
        expected = [encode_one(*pair, HEAD, one) for pair in zip(some, others, strict=True)]
        got = call(
            lambda b, a, one=one: boxes.encode(b, a, weights=HEAD, plus_one=bool(one)), some, others
        )
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("side", "atol"), [(250, 1e-4), (1000, 3e-4)])  # in float32
def test_decoded_boxes_are_those_that_were_encoded(call, side, atol):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, side, (2, 200, 2))
    sides = rng.uniform(1, 0.4 * side, (2, 200, 2))
    some, anchors = np.concatenate([corners, corners + sides], 2).astype(np.float32)

    def both(b, a, **options):
        one = {"plus_one": options.get("plus_one", False)}
        deltas = boxes.encode(b, a, weights=HEAD, **one)
        return boxes.decode(deltas, a, weights=HEAD, max_log_scale=None, **options)

    np.testing.assert_allclose(call(both, some, anchors), some, atol=atol)
    detectron = call(lambda b, a: both(b, a, plus_one=True), some, anchors)
    np.testing.assert_allclose(detectron, some, atol=atol)
    caffe = call(lambda b, a: both(b, a, plus_one=True, subtract_one=False), some, anchors)
    np.testing.assert_allclose(caffe - some, np.tile([0, 0, 1, 1], (200, 1)), atol=atol)


def test_growth_of_decoded_boxes_is_limited_from_above(call):
    anchors = floats([[0, 0, 16, 16]] * 3)
    deltas = floats([[0, 0, 30, -30], [0, 0, 5 * math.log(62), 5 * math.log(63)], [0, 0, 0, 0]])
    got = call(lambda d, a: boxes.decode(d, a, weights=HEAD), deltas, anchors)
    np.testing.assert_allclose(
        boxes.sides(got), [[1000, 16 * math.exp(-6)], [992, 1000], [16, 16]], rtol=1e-4
    )
    assert math.isclose(boxes.MAX_LOG_SCALE, 4.135167, abs_tol=1e-6)


def test_deltas_of_several_classes_and_rows_of_padding():
    some, anchors = jnp.asarray(drawn(6)), drawn(6, seed=1)
    deltas = jnp.stack([boxes.encode(some, anchors), jnp.zeros((6, 4))], axis=1)
    got = jax.jit(lambda d: boxes.decode(d, anchors[:, None]))(deltas)  # NumPy and JAX together
    np.testing.assert_allclose(got[:, 0], some, atol=1e-4)
    np.testing.assert_allclose(got[:, 1], anchors, atol=1e-5)
    zeros = np.zeros((6, 4), np.float32)
    for one, other in ((zeros, anchors), (anchors, zeros), (zeros, zeros)):
        assert np.isfinite(boxes.encode(one, other)).all()
    with pytest.raises(AssertionError, match="to have dimension equal"):
        boxes.sides(anchors[:, :3])


def test_boxes_whose_last_pixel_is_inside(call):
    np.testing.assert_array_equal(
        call(lambda b: boxes.sides(b, plus_one=True), BY_HAND),
        [[5, 3], [3, 3], [3, 5], [2, 3], [1, 1]],
    )
    some, others = drawn(12), drawn(5, seed=1)
    edges = floats([0, 0, 1, 1])
    np.testing.assert_allclose(
        call(lambda a, b: boxes.iou(a, b, plus_one=True), some, others),
        boxes.iou(some + edges, others + edges),
        rtol=1e-6,
    )
    image = {(y, x) for y in range(SIDE) for x in range(SIDE)}
    expected = [pixels(box) <= image for box in some]
    assert 0 < sum(expected) < 12
    np.testing.assert_array_equal(call(lambda b: boxes.inside(b, (SIDE, SIDE)), some), expected)
    last = some - edges
    got = call(lambda b: boxes.inside(b, (SIDE, SIDE), plus_one=True), last)
    np.testing.assert_array_equal(got, expected)
