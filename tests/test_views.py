"""Detections from several views of an image: sizes and mirror images."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.errors import UserError
from dense_jax.infer import detections
from dense_jax.infer.views import View, merged
from dense_jax.models.rcnn import faster_rcnn as models
from experiments import mask_rcnn as script
from tests import contract, members
from tests.test_detection_task import NUM_CLASSES, Trunk

SIZES = np.array([[64, 64], [50, 41]])


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(models.FasterRCNN, "_trunk", lambda self: Trunk(name="backbone"))


def task(**changes: Any):
    flags: dict[str, Any] = {"neck": "dc5", "anchor_sizes": (16, 32), "test_score": 0.0}
    config = dataclasses.replace(script.PRESETS["smoke"], **flags | changes)
    return script.build(config, NUM_CLASSES)


@functools.cache
def arrays():
    """Returns variables and two images, the second one padded by zeros."""
    variables = contract.random_variables(task().model.clone(axis_name=None), (1, 64, 64, 3))
    images = np.random.default_rng(3).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    images[1, 50:] = images[1, :, 41:] = 0
    return variables, images


def run(own: Any, images: np.ndarray, sizes: np.ndarray = SIZES) -> dict[str, np.ndarray]:
    found: Any = jax.jit(own.forward)(arrays()[0], jnp.asarray(images), jnp.asarray(sizes))
    return {name: np.asarray(values) for name, values in found.items()}


def mirrored(images):
    flipped = np.zeros_like(images)
    for image, result, (_, width) in zip(images, flipped, SIZES, strict=True):
        result[:, :width] = image[:, width - 1 :: -1] if width < 64 else image[:, ::-1]
    return flipped


def test_what_a_view_sees_and_where_its_boxes_are():
    images = np.arange(2 * 4 * 6, dtype=np.float32).reshape(2, 4, 6, 1)
    sizes = jnp.array([[4, 6], [3, 4]])
    images[1, 3:] = images[1, :, 4:] = 0
    seen, seen_sizes = View(is_flipped=True).images(jnp.asarray(images), sizes)
    np.testing.assert_array_equal(seen[0], images[0, :, ::-1])
    np.testing.assert_array_equal(seen[1, :, :4], images[1, :, 3::-1])
    assert not np.any(seen[1, :, 4:])
    np.testing.assert_array_equal(seen_sizes, sizes)
    boxes = jnp.array([[[0.0, 1, 2, 4]], [[1.0, 0, 4, 2]]])
    flipped = View(is_flipped=True).boxes(boxes, (4, 6), seen_sizes)
    np.testing.assert_array_equal(flipped, [[[4, 1, 6, 4]], [[0, 0, 3, 2]]])
    half, half_sizes = View(0.5).images(jnp.zeros((2, 64, 40, 3)), jnp.array([[64, 40], [51, 7]]))
    assert half.shape == (2, 32, 32, 3)  # 32 x 20 and padding
    assert half_sizes.tolist() == [[32, 20], [26, 4]]
    view = View(0.5, is_flipped=True)
    there = view.boxes(boxes, (64, 40), half_sizes)
    np.testing.assert_array_equal(there, [[[19, 0.5, 20, 2]], [[2, 0, 3.5, 1]]])
    np.testing.assert_allclose(view.in_image(there, (64, 40), half_sizes), boxes, atol=1e-6)
    given = jnp.array([[[0.0, 0.25, 0.5, 1]]])
    np.testing.assert_array_equal(view.inputs([given])[0], [[[0.5, 0.25, 1, 1]]])
    assert view.inputs([]) == ()


@pytest.mark.parametrize("recipe", members(["torchvision", "paper"], ("paper",)))
def test_one_view_is_the_usual_pass(recipe, monkeypatch):
    images = arrays()[1]
    usual = run(task(recipe=recipe), images)
    assert usual["valid"].sum() > 20
    one = functools.partial(merged, views=[View()])
    monkeypatch.setattr(
        "experiments.faster_rcnn.two_stages",
        lambda model, first, rule, scales, masks, keypoints: one(model, first, rule, masks=masks),
    )
    found = run(task(recipe=recipe), images)
    for name, values in usual.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_mirror_image_has_the_mirrored_detections():
    own = task(test_merge="union", test_flip="on", max_detections=20)
    images = arrays()[1]
    here, there = run(own, images), run(own, mirrored(images))
    alone = run(task(max_detections=20), images)
    assert not np.allclose(here["scores"], alone["scores"], atol=1e-4)
    assert here["valid"].all()
    np.testing.assert_allclose(here["scores"], there["scores"], atol=1e-5)
    np.testing.assert_array_equal(here["classes"], there["classes"])
    x0, y0, x1, y1 = np.moveaxis(there["boxes"], -1, 0)
    width = SIZES[:, 1:].astype(np.float32)
    back = np.stack([width - x1, y0, width - x0, y1], axis=-1)
    np.testing.assert_allclose(here["boxes"], back, atol=2e-3)
    np.testing.assert_allclose(here["masks"], there["masks"][..., ::-1], atol=1e-4)
    assert not np.allclose(here["masks"], there["masks"], atol=1e-2)


def test_all_views_compete_and_masks_are_means():
    """By hand: a network whose every view has one box, the object where the image is bright."""

    class Network:
        def apply(self, variables, levels, boxes, *, train, method):
            del train
            if method == "classify":
                logits = jnp.log(jnp.stack([jnp.ones(boxes.shape[:2]), variables], axis=-1))
                return logits, jnp.zeros((*boxes.shape[:2], 2, 4))
            assert method == "draw"
            left, right = boxes[..., 0], boxes[..., 2]
            cells = jnp.stack([left, right], axis=-1)[..., None, :, None] / 100
            return jnp.log(cells / (1 - cells)) + jnp.zeros((*boxes.shape[:2], 2, 2, 1))

    def first(variables, images, sizes):
        boxes = jnp.array([[[10.0, 10, 30, 30], [20, 2, 24, 6]]])
        valid = jnp.array([[True, images.shape[1] == 64]])  # the small one in the large view only
        del variables, sizes
        proposals = detections.Proposals(boxes, jnp.zeros((1, 2)), valid)
        return detections.FirstStage([], jnp.zeros((0, 4)), proposals)

    network: Any = Network()
    rule = detections.DetectionRule(count=4, max_iou=0.5)
    views = [View(), View(is_flipped=True), View(0.5)]
    predict = merged(network, first, rule, views, masks="sigmoid")
    found = predict(jnp.array([[3.0, 1.0]]), jnp.zeros((1, 64, 64, 3)), jnp.array([[64, 64]]))
    # Of the mirror image, [10, 30] is [34, 54]; of half the size, [20, 60], which overlaps both by
    # 100 and 200 of 1600 pixels. Scores 3/4 come first in the order of views, then 1/2.
    assert found["valid"].tolist() == [[True] * 4]
    expected = [[10, 10, 30, 30], [34, 10, 54, 30], [20, 20, 60, 60], [20, 2, 24, 6]]
    np.testing.assert_allclose(found["boxes"][0], expected, atol=1e-4)
    np.testing.assert_allclose(found["scores"][0], [0.75, 0.75, 0.75, 0.5], rtol=1e-6)
    # The edges of the first box are 10 and 30 in the image, 34 and 54 in its mirror image, whose
    # cells change places, and 5 and 15 in half of it.
    means = [(0.10 + 0.54 + 0.05) / 3, (0.30 + 0.34 + 0.15) / 3]
    np.testing.assert_allclose(found["masks"][0, 0], [means, means], rtol=1e-5)


def test_flags_of_views():
    own = task(test_merge="union", test_flip="on", test_scales=(1.0, 0.75), test_nms=0.4)
    card = own.card
    assert (
        card["views"]
        == "sizes 1, 0.75 of the largest, each also flipped; boxes suppressed together"
    )
    assert (
        card["detections"]
        == "scores above 0, IoU within a class at most 0.4, at most 100 of an image"
    )
    assert "views" not in task().card
    for flags, words in [
        ({"test_flip": "on"}, "--test-flip=on does not go with --test-merge=suitable: give"),
        ({"test_merge": "union"}, "--test-merge=union merges several views .* --test-flip=on"),
        (
            {"test_merge": "union", "test_flip": "on", "keypoint_branch": "on"},
            "--keypoint-branch=on does not go with --test-merge=union",
        ),
    ]:
        with pytest.raises(UserError, match=words):
            task(**flags)
