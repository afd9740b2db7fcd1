"""Masks of objects: cropped for training, pasted back into images; and the loss of masks."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.infer.pasting import paste
from dense_jax.objectives.masks import MaskRule, mask_losses, mask_targets
from dense_jax.objectives.rcnn import RoiRule, head_objective
from dense_jax.ops.masks import cells_of, crop_cells, crop_masks

RNG = np.random.default_rng


def slow_crop(mask, box, bins, aligned):
    """RoIAlign of one mask, sample by sample, with as many of them as a bin has pixels."""
    offset = 0.5 if aligned else 0.0
    (x0, y0), (x1, y1) = box[:2] - offset, box[2:] - offset
    sides = np.array([y1 - y0, x1 - x0])
    sides = sides if aligned else np.maximum(sides, 1)
    step = sides / bins
    counts = [math.ceil(s) for s in step]
    result = np.zeros((bins, bins))
    for v, u in np.ndindex(bins, bins):
        total = 0.0
        for j, i in np.ndindex(*counts):
            y = y0 + (v + (j + 0.5) / counts[0]) * step[0]
            x = x0 + (u + (i + 0.5) / counts[1]) * step[1]
            total += bilinear(mask, y, x)
        result[v, u] = total / max(counts[0] * counts[1], 1)
    return result


def bilinear(mask, y, x):
    height, width = mask.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = max(y, 0), max(x, 0)
    top, left = min(int(y), height - 1), min(int(x), width - 1)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    b, a = (y - top if top < height - 1 else 0), (x - left if left < width - 1 else 0)
    upper = (1 - a) * mask[top, left] + a * mask[top, right]
    lower = (1 - a) * mask[bottom, left] + a * mask[bottom, right]
    return (1 - b) * upper + b * lower


@pytest.mark.parametrize("aligned", [False, True])
def test_crops_are_roi_align_of_the_mask(aligned):
    rng = RNG(0)
    masks = rng.random((3, 40, 30)) < 0.5
    corner, sides = rng.uniform(-2, 20, (12, 2)), rng.uniform(0.3, 25, (12, 2))
    boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
    index = rng.integers(0, 3, 12).astype(np.int32)
    found = jax.jit(lambda *x: crop_masks(*x, bins=7, aligned=aligned))(masks, boxes, index)
    for one, box, i in zip(found, boxes, index, strict=True):
        np.testing.assert_allclose(one, slow_crop(masks[i], box, 7, aligned), atol=1e-4)


@pytest.mark.parametrize("aligned", [False, True])
def test_padding_of_masks_is_not_read(aligned):
    """Boxes that end at the lower and right edge repeat the last pixel, however far masks go on."""
    masks = RNG(0).random((2, 21, 17)) < 0.6
    boxes = np.array([[3.2, 4, 17, 21], [0, 0, 17, 9.5], [16.4, 2, 17, 21]], np.float32)
    index = np.array([0, 1, 1], np.int32)
    padded: Any = jnp.pad(masks, [(0, 0), (0, 11), (0, 15)])
    given: Any = padded, boxes, index, np.array([21, 17])
    found = jax.jit(lambda *x: crop_masks(*x, bins=14, aligned=aligned))(*given)
    for one, box, i in zip(found, boxes, index, strict=True):
        np.testing.assert_allclose(one, slow_crop(masks[i], box, 14, aligned), atol=1e-4)


def test_cells_are_means_of_the_interpolated_mask():
    mask = RNG(2).random((9, 12)) < 0.5
    box, per_cell = np.array([1.3, 0, 12, 7.7], np.float32), 50
    places = (np.arange(6 * per_cell) + 0.5) / (6 * per_cell)
    x, y = (box[i] + places * (box[i + 2] - box[i]) - 0.5 for i in (0, 1))
    fine = np.array([[bilinear(mask, v, u) for u in x] for v in y])
    means = fine.reshape(6, per_cell, 6, per_cell).mean((1, 3))
    np.testing.assert_allclose(cells_of(mask, box, 6) / 255, means, atol=0.004)
    np.testing.assert_array_equal(cells_of(np.ones((9, 12), bool), box, 6), 255)


@pytest.mark.parametrize("aligned", [False, True])
def test_targets_from_cells_are_nearly_those_of_masks(aligned):
    """Of an ellipse and a triangle, and boxes around them that are up to a third off."""
    y, x = np.mgrid[:150, :170] + 0.5
    masks = np.stack([((x - 60) / 45) ** 2 + ((y - 70) / 60) ** 2 < 1, (x > 30) & (x < y - 40)])
    own = np.array([[15, 10, 105, 130], [30, 70, 110, 150]], np.float32)
    index = np.arange(40) % 2
    sides = np.tile(own[index, 2:] - own[index, :2], 2)
    boxes = own[index] + RNG(3).uniform(-0.3, 0.3, (40, 4)) * sides
    boxes = np.clip(boxes, 0, [170, 150, 170, 150]).astype(np.float32)
    cells = np.stack([cells_of(m, b, 112) for m, b in zip(masks, own, strict=True)])
    options = {"bins": 28, "aligned": aligned}
    wanted = jax.jit(lambda *arrays: crop_masks(*arrays, **options))(masks, boxes, index)
    found = jax.jit(lambda *arrays: crop_cells(*arrays, **options))(cells, own, boxes, index)
    assert np.abs(found - wanted).mean() < 0.005
    assert ((found >= 0.5) != (wanted >= 0.5)).mean() < 0.003


def test_targets_of_a_mask_of_ones_by_hand():
    """Of a box that begins 14 pixels outside: soft targets begin a cell before half, bits half."""
    masks = jnp.ones((1, 1, 40, 40), bool)
    box, index = jnp.array([[[-14.0, -14, 14, 14]]]), jnp.zeros((1, 1), jnp.int32)
    size = jnp.array([[40, 40]])
    soft = mask_targets({"masks": masks}, box, index, size, 28, MaskRule("soft"))[0, 0]
    inside = np.arange(28) >= 13
    np.testing.assert_array_equal(soft, np.outer(inside, inside))
    bits = mask_targets({"masks": masks}, box, index, size, 28, MaskRule("bitmap"))[0, 0]
    assert float(bits.sum()) == 15**2


def test_each_box_has_the_mask_of_its_own_object_in_its_own_image():
    masks = np.zeros((2, 2, 20, 20), bool)
    masks[0, 0, :, :10], masks[0, 1, :10] = True, True
    masks[1, 0, 10:] = True
    boxes, index = jnp.tile(jnp.array([0.0, 0, 20, 20]), (2, 3, 1)), jnp.array([[1, 0, 0]] * 2)
    sizes = jnp.full((2, 2), 20)
    found = mask_targets({"masks": jnp.asarray(masks)}, boxes, index, sizes, 20, MaskRule("bitmap"))
    np.testing.assert_array_equal(found[0], masks[0, [1, 0, 0]])
    np.testing.assert_array_equal(found[1], masks[1, [1, 0, 0]])


def test_losses_of_masks_by_hand():
    """Cells of the boxes with a class count, each in the mask of its own class."""
    logits = jnp.array([[[[[9.0, 0.0, 2.0]]], [[[9.0, 1.0, 9.0]]], [[[9.0, 9.0, 9.0]]]]])
    targets, classes = jnp.array([[[[1.0]], [[0.25]], [[1.0]]]]), jnp.array([[2, 1, 0]])
    total, count = mask_losses(logits, targets, classes, MaskRule())["mask"]
    expected = math.log1p(math.exp(-2)) + math.log1p(math.e) - 0.25
    assert math.isclose(float(total), expected, rel_tol=1e-6)
    assert int(count) == 2
    shared, _ = mask_losses(logits[..., 2:], targets, classes, MaskRule())["mask"]
    assert math.isclose(
        float(shared), math.log1p(math.exp(-2)) + math.log1p(math.exp(9)) - 0.25 * 9, rel_tol=1e-6
    )
    # Softmax: the first cell has class 2, the second is background.
    total, _ = mask_losses(logits, targets, classes, MaskRule(loss="softmax"))["mask"]
    sums = [np.log(np.exp(row).sum()) for row in ([9.0, 0, 2], [9.0, 1, 9])]
    assert math.isclose(float(total), sums[0] - 2 + sums[1] - 9, rel_tol=1e-5)
    none = mask_losses(logits, targets, 0 * classes, MaskRule())["mask"]
    assert [float(x) for x in none] == [0, 0]


def slow_paste(grid, box, size, convention):
    """The definitions, pixel by pixel."""
    cells, (height, width) = len(grid), size
    result = np.zeros(size)
    if convention == "detectron2":
        padded = np.pad(grid, 1)
        for i, j in np.ndindex(*size):
            y = (i + 0.5 - box[1]) / (box[3] - box[1]) * cells + 0.5
            x = (j + 0.5 - box[0]) / (box[2] - box[0]) * cells + 0.5
            if 0 <= y <= cells + 1 and 0 <= x <= cells + 1:
                result[i, j] = bilinear(padded, y, x)
        return result
    centre = (box[:2] + box[2:]) / 2
    half = (box[2:] - box[:2]) / 2 * (cells + 2) / cells
    (x0, y0), (x1, y1) = (centre - half).astype(int), (centre + half).astype(int)
    h, w = max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1)
    padded = np.pad(grid, 1)
    for i, j in np.ndindex(h, w):
        if 0 <= y0 + i < height and 0 <= x0 + j < width:
            y = min((i + 0.5) * (cells + 2) / h - 0.5, cells + 1)
            x = min((j + 0.5) * (cells + 2) / w - 0.5, cells + 1)
            result[y0 + i, x0 + j] = bilinear(padded, max(y, 0), max(x, 0))
    return result


@pytest.mark.parametrize("convention", ["torchvision", "detectron2"])
def test_pasted_masks_equal_the_slow_twin(convention):
    rng, size = RNG(1), (23, 31)
    for _ in range(12):
        grid = rng.random((5, 5)).astype(np.float32)
        corner, sides = rng.uniform(-6, 20, 2), rng.uniform(0.7, 18, 2)
        box = np.concatenate([corner, corner + sides]).astype(np.float32)
        window = paste(grid, box, size, convention)
        whole = np.zeros(size)
        height, width = window.values.shape
        whole[window.top : window.top + height, window.left : window.left + width] = window.values
        expected = slow_paste(grid, box.astype(float), size, convention)
        np.testing.assert_allclose(whole, expected, atol=2e-5)
        clear = abs(expected - 0.5) > 1e-4
        np.testing.assert_array_equal(window.mask(size)[clear], (expected >= 0.5)[clear])


def test_a_mask_of_ones_covers_its_box_by_each_convention():
    ones, box = np.ones((28, 28), np.float32), np.array([10, 10, 38, 38], np.float32)
    assert paste(ones, box, (60, 60), "detectron2").mask((60, 60)).sum() == 784
    assert paste(ones, box, (60, 60), "torchvision").mask((60, 60)).sum() == 841
    window = paste(ones, np.array([10, 10, 38, 66], np.float32), (90, 90), "torchvision")
    assert (window.left, window.top) == (9, 8)
    assert window.values.shape == (61, 31)  # up to 39 and 68


@pytest.mark.parametrize("convention", ["torchvision", "detectron2"])
def test_boxes_outside_or_without_an_area_paste_nothing_or_little(convention):
    ones = np.ones((4, 4), np.float32)
    outside = paste(ones, np.array([50, 50, 60, 60]), (20, 20), convention)
    assert not outside.mask((20, 20)).any()
    for box in ([5, 5, 5, 5], [5, 5, 5, 9], [-9, -9, -8, -8]):
        assert paste(ones, np.array(box), (20, 20), convention).mask((20, 20)).sum() <= 8


@pytest.mark.parametrize("cells", [None, 16])
@pytest.mark.parametrize("plus_one", [False, True])
def test_each_box_learns_the_mask_and_the_class_of_its_own_object(plus_one, cells):
    """A network that draws each object as it is, in the mask of its class alone, has no loss."""
    masks = np.zeros((1, 2, 32, 32), bool)
    masks[0, 0, :16, :8], masks[0, 1, 16:24, 16:] = True, True  # a left half, an upper half
    boxes = jnp.array([[[0.0, 0, 16, 16], [16, 16, 32, 32]]])
    rule = RoiRule(sample=8, max_foreground=4, plus_one=plus_one)
    drawn: Any = {"masks": jnp.asarray(masks)}
    if cells:
        each = zip(masks[0], np.asarray(boxes[0]), strict=True)
        drawn = {"cells": jnp.stack([cells_of(*x, cells) for x in each])[None]}

    def apply(_, boxes: Any = None, num: int = 0, *, method):
        if method == "features":
            return [jnp.zeros((1, 8, 8, 1))]
        logits = jnp.full((1, num, 4, 4, 3), 30.0)  # wrong in the masks of other classes
        is_first = (boxes[:, :num, 0] == 0)[..., None, None]
        left, top = jnp.arange(4)[None, None, None] < 2, jnp.arange(4)[None, None, :, None] < 2
        logits = logits.at[..., 1].set(jnp.where(jnp.where(is_first, left, ~left), 30.0, -30.0))
        logits = logits.at[..., 2].set(jnp.where(jnp.where(is_first, ~top, top), 30.0, -30.0))
        shape = (1, boxes.shape[1], 3)
        return jnp.zeros(shape), jnp.zeros((*shape, 4)), logits

    def loss(classes):
        batch = {
            "images": jnp.zeros((1, 32, 32, 3)),
            "index": jnp.zeros(1, jnp.int32),
            "objects": {
                "boxes": boxes, "classes": jnp.array([classes]), **drawn,
                "valid": jnp.ones((1, 2), bool),
            },
            "proposals": {  # background comes first
                "boxes": jnp.concatenate([jnp.array([[[0.0, 20, 10, 30]]]), boxes], axis=1),
                "valid": jnp.ones((1, 3), bool),
            },
        }  # fmt: skip
        losses = head_objective(rule, mask_rule=MaskRule("bitmap"))
        found = jax.jit(lambda key: losses(apply, batch, key))(jax.random.key(0))
        return [float(x) for x in found["mask"]]

    total, count = loss([1, 2])
    assert count == 4 * 16  # two objects, and a proposal like each
    assert total < 1e-3
    assert loss([2, 1])[0] > 100
