import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dense_jax.data import crops
from dense_jax.infer import proposals
from dense_jax.ops.boxes import min_side

SIZE = 8  # that the network sees boxes at
HEIGHT, WIDTH = 20, 26
BOXES = np.array(
    [[2, 3, 18, 19], [0, 0, 26, 20], [-4, 5, 9, 25], [10, 2, 15, 6], [8, 0, 26, 4]], np.float32
)
HOW: Any = [("max", "zero"), ("max", "neg_inf"), ("sum", "zero"), ("mean", "zero")]


def slow_resize(x, size):
    """Bilinear, antialiased where it shrinks: every output averages the inputs that it is near."""
    for axis, out in enumerate(size):
        x = np.moveaxis(x, axis, 0)
        step = len(x) / out
        rows = []
        for j in range(out):
            centre = (j + 0.5) * step - 0.5
            weight = [max(0, 1 - abs(centre - i) / max(step, 1)) for i in range(len(x))]
            rows.append(sum(w * row for w, row in zip(weight, x, strict=True)) / sum(weight))
        x = np.moveaxis(np.array(rows), 0, axis)
    return x


def slow_aggregate(score_fn, image, boxes, how, start):
    """Cuts, scores, resizes back and joins, pixel by pixel."""
    total = np.full((*image.shape[:2], 3), start, np.float64)
    count = np.zeros(image.shape[:2], int)
    for box in boxes.astype(int):
        crop = slow_resize(crops.cut(image, crops._box(box), 0), (SIZE, SIZE))
        scores = score_fn(crop)
        x0, y0, x1, y1 = box
        pasted = slow_resize(scores, (y1 - y0, x1 - x0))
        for y in range(max(y0, 0), min(y1, image.shape[0])):
            for x in range(max(x0, 0), min(x1, image.shape[1])):
                new = pasted[y - y0, x - x0]
                total[y, x] = np.maximum(total[y, x], new) if how == "max" else total[y, x] + new
                count[y, x] += 1
    if how == "mean":
        total /= np.maximum(count, 1)[..., None]
    return np.where(count[..., None] > 0, total, 0)


def network(x):
    """Some scores of both signs, which depend on the place in the box."""
    ramp = np.linspace(-1, 1, SIZE).astype(np.float32)
    bump = np.add.outer(ramp, -ramp)[..., None]
    return x @ np.array([[1, -1, 0.5], [0.3, 1, -1], [0, 0.2, 1]], np.float32) + bump


def batched_network(x):
    return jax.vmap(lambda image: jnp.asarray(network(image)))(x)


@functools.partial(jax.jit, static_argnames=("how", "max_init"))
def aggregate(images, boxes, valid, how: Any, max_init: Any):
    return proposals.aggregate(
        batched_network, images, boxes, valid, size=SIZE, how=how, max_init=max_init
    )


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return rng.standard_normal((HEIGHT, WIDTH, 3)).astype(np.float32)


def one(image, boxes, how: proposals.Aggregate = "max", max_init: proposals.MaxInit = "zero"):
    """Aggregates the boxes of one image; always of the same number, so that it compiles once."""
    filled = np.zeros((1, 6, 4), np.float32)
    filled[0, : len(boxes)] = boxes
    is_valid = np.arange(6)[None] < len(boxes)
    return np.asarray(aggregate(image[None], filled, is_valid, how, max_init))[0]


def test_cutting_resizes_as_pillow_does(image):
    for box in BOXES:
        got = proposals.crop_boxes(jnp.asarray(image[None]), jnp.asarray(box[None]), SIZE)[0]
        cut = crops.cut(image, crops._box(box), 0)
        np.testing.assert_allclose(got, slow_resize(cut, (SIZE, SIZE)), rtol=1e-4, atol=1e-5)
        for channel in range(3):
            pillow = Image.fromarray(cut[..., channel]).resize(
                (SIZE, SIZE), Image.Resampling.BILINEAR
            )
            np.testing.assert_allclose(got[..., channel], np.asarray(pillow), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_box_of_the_size_of_the_network_is_not_resampled(image):
    box = jnp.array([[5.0, 6.0, 13.0, 14.0]])
    crop = proposals.crop_boxes(jnp.asarray(image[None]), box, SIZE)
    np.testing.assert_allclose(crop[0], image[6:14, 5:13], rtol=1e-6)
    back, inside = proposals.paste_scores(crop, box, (HEIGHT, WIDTH))
    expected = np.zeros_like(image)
    expected[6:14, 5:13] = image[6:14, 5:13]
    np.testing.assert_allclose(back[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(inside[0], np.any(expected != 0, axis=-1))


@pytest.mark.parametrize(("how", "max_init"), HOW)
def test_aggregation_is_that_of_the_slow_twin(image, how, max_init):
    start = -np.inf if max_init == "neg_inf" else 0
    for boxes in (BOXES, BOXES[2:4]):
        expected = slow_aggregate(network, image, boxes, how, start)
        got = one(image, boxes, how, max_init)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        assert np.all(np.isfinite(got))


def test_fact_4_the_maximum_needs_no_order_and_only_rises(image):
    scores = one(image, BOXES)
    np.testing.assert_array_equal(one(image, BOXES[::-1]), scores)
    np.testing.assert_array_equal(one(image, BOXES[[0, 1, 2, 3, 4, 2]]), scores)  # idempotent
    before = np.zeros_like(scores)
    for count in range(1, len(BOXES) + 1):
        after = one(image, BOXES[:count])
        assert np.all(after >= before)
        before = after
    assert np.any(one(image, BOXES, "sum") < 0)


def test_fact_5_a_pixel_without_boxes_is_background(image):
    few = BOXES[2:4]
    covered = np.zeros((HEIGHT, WIDTH), bool)
    for x0, y0, x1, y1 in few.astype(int):
        covered[max(y0, 0) : y1, max(x0, 0) : x1] = True
    assert not covered.all()
    for how, max_init in HOW:
        scores = one(image, few, how, max_init)
        assert not np.any(scores[~covered])
        assert not np.any(np.argmax(scores, axis=-1)[~covered])
    assert not np.any(one(image, BOXES[:0]))


def test_images_of_a_batch_have_boxes_of_their_own(image):
    images = np.stack([image, image[::-1], 2 * image])
    boxes = np.stack([np.resize(np.roll(BOXES, i, axis=0), (6, 4)) for i in range(3)])
    valid = np.array([[True] * 6, [True] * 4 + [False] * 2, [False, True] * 3])
    together = aggregate(images, boxes, valid, "max", "zero")
    for i in range(3):
        expected = one(images[i], boxes[i][valid[i]])
        np.testing.assert_allclose(together[i], expected, rtol=1e-4, atol=1e-4)


def test_sliding_boxes_are_those_of_training():
    sizes = np.array([[60, 120], [33, 47], [1, 5]], np.int32)
    boxes = proposals.sliding_boxes(jnp.asarray(sizes))
    for got, size in zip(boxes, sizes, strict=True):
        np.testing.assert_array_equal(got, crops.sliding_windows((size[0], size[1])))
    np.testing.assert_array_equal(min_side(boxes)[0, :6], [60, 40, 40, 40, 40, 30])
