"""Features of regions: twins that loop over boxes, bins and points, and values by hand."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops import roi

RAMP = np.tile(np.arange(9, dtype=np.float32)[None, :, None], (9, 1, 1))  # f(x) = x


def floats(rows):
    return np.array(rows, np.float32)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def some_boxes(num, side, seed=0):
    """Boxes of an image of this side, a few of them outside, empty or turned over."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-0.3 * side, 1.1 * side, (num, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0, side, (num, 2))], 1)
    boxes[0] = 0
    boxes[1] = [5, 5, 2, 1]
    boxes[2] = [0, 0, side, side]
    return boxes.astype(np.float32)


def bilinear(features, y, x):
    """Features at a point; the border is repeated for one cell, then come zeros."""
    height, width, _ = features.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0 * features[0, 0]
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    upper = (1 - u) * features[top, left] + u * features[top, right]
    return (1 - v) * upper + v * ((1 - u) * features[bottom, left] + u * features[bottom, right])


def align_one(
    features, box, *, bins, stride, samples=2, max_samples=4, aligned=False, reduce="mean"
):
    """RoIAlign of one box, by loops: float64 [bins, bins, C]."""
    features = features.astype(np.float64)
    x0, y0, x1, y1 = box.astype(np.float64) / stride - (0.5 if aligned else 0)
    w, h = (length if aligned else max(length, 1) for length in (x1 - x0, y1 - y0))
    counts = [
        samples if samples is not None else min(max(math.ceil(length / bins), 0), max_samples)
        for length in (h, w)
    ]
    out = np.zeros((bins, bins, features.shape[-1]))
    for row, column in itertools.product(range(bins), range(bins)):
        points = [
            bilinear(
                features,
                y0 + (row + (i + 0.5) / counts[0]) * h / bins,
                x0 + (column + (j + 0.5) / counts[1]) * w / bins,
            )
            for i, j in itertools.product(*map(range, counts))
        ]
        if points:
            out[row, column] = np.mean(points, 0) if reduce == "mean" else np.max(points, 0)
    return out


def pool_one(features, box, *, bins, stride):
    """RoIPool of one box, by loops: [bins, bins, C]."""

    def rounded(value):  # halves away from zero
        return math.floor(abs(value) + 0.5) * (1 if value > 0 else -1)

    x0, y0, x1, y1 = (rounded(float(v) / stride) for v in box)
    w, h = max(x1 - x0 + 1, 1), max(y1 - y0 + 1, 1)
    out = np.zeros((bins, bins, features.shape[-1]), features.dtype)
    for row, column in itertools.product(range(bins), range(bins)):
        ys = [y0 + row * h // bins, y0 - (-(row + 1) * h // bins)]
        xs = [x0 + column * w // bins, x0 - (-(column + 1) * w // bins)]
        (top, bottom), (left, right) = (
            np.clip(ys, 0, len(features)),
            np.clip(xs, 0, features.shape[1]),
        )
        if bottom > top and right > left:
            out[row, column] = features[top:bottom, left:right].max((0, 1))
    return out


def one_map(operator, features, boxes, **options):
    """Calls an operator on one map [H, W, C] and boxes [R, 4]."""
    f = jax.jit(functools.partial(operator, **options))
    return np.asarray(f(features[None], boxes[None])[0])


def align(features, boxes, *, stride, **options):
    return roi.roi_align([features], boxes, strides=[stride], **options)


OPTIONS = [
    {},
    {"aligned": True},
    {"reduce": "max"},
    {"samples": None, "max_samples": 2},
    {"samples": None, "aligned": True, "reduce": "max", "max_samples": 3},
    {"samples": 1, "aligned": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_align_is_its_twin(options):
    features, boxes = noise(7, 11, 3), some_boxes(14, 60)
    options = {"bins": 3, "stride": 8, **options}
    expected = [align_one(features, box, **options) for box in boxes]
    got = one_map(align, features, boxes, **options)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert not np.allclose(got, 0)


def test_align_on_a_ramp_by_hand():
    along = lambda *args, **options: one_map(align, *args, stride=16, **options)[0, :, :, 0]  # noqa: E731
    box = floats([[16, 16, 128, 128]])
    np.testing.assert_allclose(along(RAMP, box, bins=7), np.tile(np.arange(1.5, 8), (7, 1)))
    np.testing.assert_allclose(
        along(RAMP, box, bins=7, aligned=True), np.tile(np.arange(1.0, 8), (7, 1))
    )
    box = floats([[-32, 0, 32, 144]])
    np.testing.assert_allclose(along(RAMP, box, bins=4, aligned=True)[1], [0, 0, 0.125, 1])


def test_an_empty_box_takes_one_point_or_none():
    box = floats([[40, 40, 40, 40]])
    at = functools.partial(one_map, align, RAMP, box, bins=2, stride=16)
    np.testing.assert_allclose(at(aligned=True), np.full((1, 2, 2, 1), 2.0))
    none = at(aligned=True, samples=None, max_samples=1)
    np.testing.assert_array_equal(none, np.zeros((1, 2, 2, 1)))
    np.testing.assert_allclose(at()[0, 0, :, 0], [2.75, 3.25])  # widened to one cell


@pytest.mark.parametrize("samples", [1, 3])
def test_align_is_exact_on_linear_features(samples):
    rng = np.random.default_rng(0)
    corners = rng.uniform(1, 5, (50, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 3, (50, 2))], 1).astype(np.float32)
    slopes = rng.normal(size=(3, 20))
    y, x = np.mgrid[:9, :9][..., None]
    features = (slopes[0] + slopes[1] * x + slopes[2] * y).astype(np.float32)
    middle = (np.arange(3) + 0.5) / 3
    for aligned in (False, True):
        got = one_map(align, features, boxes, bins=3, stride=1, samples=samples, aligned=aligned)
        x, y = (
            (boxes[:, i, None] + middle * (boxes[:, i + 2] - boxes[:, i])[:, None]) - 0.5 * aligned
            for i in (0, 1)
        )
        x, y = x[:, None, :, None], y[:, :, None, None]
        np.testing.assert_allclose(got, slopes[0] + slopes[1] * x + slopes[2] * y, atol=1e-4)


def test_pool_is_its_twin():
    features, boxes = noise(7, 11, 3), some_boxes(14, 60)
    boxes[3] = [-500, -500, 900, 900]
    expected = [pool_one(features, box, bins=3, stride=8) for box in boxes]
    got = one_map(roi.roi_pool, features, boxes, bins=3, stride=8)
    np.testing.assert_array_equal(got, expected)


def test_bins_of_pool_by_hand():
    row = np.tile(np.arange(12, dtype=np.float32)[None, :, None], (12, 1, 1))
    pool = functools.partial(one_map, roi.roi_pool, bins=7, stride=16)

    def last_cells(start, end):
        ends = pool(row, floats([[start, 0, end, 176]]))[0, 0, :, 0]
        starts = 11 - pool(11 - row, floats([[start, 0, end, 176]]))[0, 0, :, 0]
        return [*zip(starts.astype(int), ends.astype(int), strict=True)]

    one_each = [(i, i) for i in range(2, 9)]
    assert last_cells(24, 120) == one_each  # round(1.5) = 2, round(7.5) = 8
    assert last_cells(40, 56) == [(3, 3)] * 3 + [(3, 4)] + [(4, 4)] * 3
    assert last_cells(100, 100) == [(6, 6)] * 7
    outside = pool(row + 1, floats([[400, 0, 500, 100]]))
    np.testing.assert_array_equal(outside, np.zeros((1, 7, 7, 1)))
    # -8 / 16 is rounded to -1: of three cells, the first is outside.
    np.testing.assert_array_equal(
        one_map(roi.roi_pool, row + 1, floats([[-8, 0, 16, 0]]), bins=3, stride=16)[0, 0, :, 0],
        [0, 1, 2],
    )


def test_warp_is_align_of_the_rounded_box():
    features = noise(7, 11, 3)
    boxes = some_boxes(8, 60)
    rounded = np.trunc(boxes / 8 + np.copysign(0.5, boxes))
    expected = [align_one(features, box, bins=3, stride=1, reduce="max") for box in rounded]
    got = one_map(roi.roi_warp, features, boxes, bins=3, stride=8)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    cells = floats([[8, 8, 56, 48]])  # whole cells: both operators agree
    warped = one_map(roi.roi_warp, features, cells, bins=3, stride=8, reduce="mean")
    np.testing.assert_allclose(warped, one_map(align, features, cells, bins=3, stride=8), atol=1e-6)


def test_only_align_follows_a_shift_of_less_than_a_cell():
    boxes = floats([[36 + x, 36, 100 + x, 100] for x in (0, 3, 12)])
    for operator in (roi.roi_pool, roi.roi_warp):
        still, near, far = one_map(operator, RAMP, boxes, bins=2, stride=16)
        np.testing.assert_array_equal(near, still)
        assert (far > still).all()
    still, near, _ = one_map(align, RAMP, boxes, bins=2, stride=16)
    np.testing.assert_allclose(near - still, np.full((2, 2, 1), 3 / 16), atol=1e-6)


@pytest.mark.parametrize("operator", [align, roi.roi_pool])
def test_a_shift_by_whole_cells_shifts_the_result(operator):
    features, boxes = noise(12, 12, 2), floats([[20, 12, 50, 44], [8, 17, 31, 41]])
    pair = np.stack([features, np.roll(features, (2, 3), (0, 1))])
    boxes = np.stack([boxes, boxes + floats([24, 16, 24, 16])])
    one, other = jax.jit(functools.partial(operator, bins=2, stride=8))(pair, boxes)
    np.testing.assert_allclose(other, one, atol=1e-5)


def test_levels_of_boxes():
    sides = [1, 32, 111, 113, 223, 225, 447, 449, 2000, 0]
    boxes = floats([[3, 5, 3 + side, 5 + side] for side in sides])
    expected = [2, 2, 2, 3, 3, 4, 4, 5, 5, 2]
    assert roi.assign_levels(jnp.asarray(boxes)).tolist() == expected
    wide = floats([[0, 0, 4 * 224, 56], [5, 5, 1, 1], [9, 9, 1, 200]])
    assert roi.assign_levels(jnp.asarray(wide)).tolist() == [4, 2, 2]
    assert roi.assign_levels(jnp.asarray(boxes), 3, 4).tolist() == np.clip(expected, 3, 4).tolist()


def test_each_box_of_each_image_reads_its_level():
    pyramid = [noise(2, 640 // s, 320 // s, 2, seed=s) for s in (8, 16, 32)]
    boxes = np.stack([some_boxes(6, 100), some_boxes(6, 600, seed=1)])
    which = np.asarray(roi.assign_levels(jnp.asarray(boxes), 3, 5)) - 3
    assert set(which.flat) == {0, 1, 2}
    f = jax.jit(functools.partial(roi.roi_align, bins=2, strides=(8, 16, 32), aligned=True))
    got = f(pyramid, boxes)
    assert got.shape == (2, 6, 2, 2, 2)
    for image, box in np.ndindex(2, 6):
        level = which[image, box]
        expected = align_one(
            pyramid[level][image], boxes[image, box], bins=2, stride=8 << level, aligned=True
        )
        np.testing.assert_allclose(got[image, box], expected, atol=1e-4)
    with pytest.raises(ValueError, match="3 maps, but 4 strides"):
        roi.roi_align([jnp.asarray(x) for x in pyramid], jnp.asarray(boxes), bins=2)
    with pytest.raises(AssertionError, match="shape"):
        f(pyramid, boxes[:1])


def gradient_by_differences(f, features, cotangent):
    grad = np.zeros(features.shape)
    for at in np.ndindex(features.shape):
        values = []
        for sign in (1, -1):
            moved = features.copy()
            moved[at] += sign * 0.01
            values.append((np.asarray(f(moved), np.float64) * cotangent).sum())
        grad[at] = (values[0] - values[1]) / 0.02
    return grad


@pytest.mark.parametrize("operator", ["align", "align max", "adaptive", "pool"])
def test_gradients_are_differences(operator):
    f = {
        "align": functools.partial(align, aligned=True),
        "align max": functools.partial(align, reduce="max"),
        "adaptive": functools.partial(align, samples=None, max_samples=2),
        "pool": roi.roi_pool,
    }[operator]
    features, boxes = noise(2, 4, 5, 2), np.stack([some_boxes(5, 30), some_boxes(5, 30, seed=1)])
    f = jax.jit(functools.partial(f, boxes=jnp.asarray(boxes), bins=2, stride=8))
    y, pull = jax.vjp(f, features)
    cotangent = noise(*y.shape, seed=1)
    (got,) = jax.jit(pull)(cotangent)
    np.testing.assert_allclose(got, gradient_by_differences(f, features, cotangent), atol=2e-3)


def test_gradient_of_a_sum_is_an_outer_product():
    """Of the column sums of the two interpolation matrices, which pooling unit vectors gives."""
    features, box = noise(6, 8, 1), floats([[3, 5, 50, 41]])
    f = functools.partial(align, bins=3, stride=8)
    sum_of = jax.jit(jax.grad(lambda x: f(x[None], box[None]).sum()))
    grad = sum_of(features)[..., 0]
    # A column of ones in each channel, a row of ones in each channel.
    rows, columns = np.eye(6)[:, None].repeat(8, 1), np.eye(8)[None].repeat(6, 0)
    both = one_map(f, floats(np.concatenate([rows, columns], -1)), box)[0]
    by_row, by_column = both[:, 0, :6].sum(0), both[0, :, 6:].sum(0)
    np.testing.assert_allclose(grad, np.outer(by_row, by_column), atol=1e-5)


def test_gradient_of_pool_reaches_the_first_of_equal_maxima():
    features = floats([[0, 0, 7], [7, 0, 7], [0, 0, 0]])[None, ..., None]
    box = jnp.asarray(floats([[[0, 0, 2, 2]]]))
    f = lambda x, b: roi.roi_pool(x, b, bins=1, stride=1).sum()  # noqa: E731
    f = jax.jit(jax.grad(f, argnums=(0, 1)))
    grad, of_boxes = f(features, box)
    np.testing.assert_array_equal(grad[0, ..., 0], [[0, 0, 1], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(of_boxes, 0 * box)
    np.testing.assert_array_equal(f(features, box + 90)[0], 0 * features)  # an empty bin


def test_padding_of_any_value_gives_finite_features():
    features = noise(1, 5, 6, 2)
    boxes = floats([[[math.nan] * 4, [math.inf] * 4, [-1e30, 0, 1e30, 4], [0, 0, 0, 0]]])
    for operator in (align, roi.roi_pool):
        f = functools.partial(operator, boxes=jnp.asarray(boxes), bins=2, stride=8)
        y, pull = jax.vjp(jax.jit(f), features)
        assert np.isfinite(y).all()
        (grad,) = jax.jit(pull)(jnp.zeros_like(y))
        np.testing.assert_array_equal(grad, 0 * features)


def test_half_precision_features_and_vmap():
    features, boxes = noise(2, 5, 6, 2), np.stack([some_boxes(4, 40), some_boxes(4, 40, seed=1)])
    for operator in (align, roi.roi_pool):
        f = functools.partial(operator, bins=2, stride=8)
        whole = jax.jit(f)(features, boxes)
        one_by_one = jax.jit(jax.vmap(lambda x, b, f=f: f(x[None], b[None])[0]))(features, boxes)
        np.testing.assert_allclose(one_by_one, whole, atol=1e-6)
        half = jax.jit(f)(jnp.asarray(features, jnp.bfloat16), jnp.asarray(boxes))
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(half.astype(np.float32), whole, atol=0.03)
