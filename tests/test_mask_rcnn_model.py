"""The networks of Mask R-CNN: published counts, shapes, and what reaches which parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.errors import UserError
from dense_jax.models.rcnn import heads
from dense_jax.models.rcnn.mask_rcnn import (
    MaskRCNN,
    keypointrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn_v2,
)
from tests import contract, members
from tests.test_rcnn_models import NORM

# detectron2's networks have no deltas and no mask of background.
PYRAMID_BACKGROUND = 4 * 1025 + 257
C4_BACKGROUND = 4 * 2049 + 257
# Parameters without frozen normalisations; of torchvision in its weights' metadata.
COUNTS = {
    "torchvision v1": (maskrcnn_resnet50_fpn(91), 44_401_393),
    "torchvision v2": (maskrcnn_resnet50_fpn_v2(91), 46_359_409),
    "R50-FPN": (MaskRCNN(81), 44_343_216 + PYRAMID_BACKGROUND),
    "R101-FPN": (MaskRCNN(81, "resnet101"), 63_283_120 + PYRAMID_BACKGROUND),
    "X101-32x8d-FPN": (MaskRCNN(81, "resnext101_32x8d"), 107_427_760 + PYRAMID_BACKGROUND),
    "R50-C4": (MaskRCNN(81, neck="c4"), 35_909_612 + C4_BACKGROUND),
    "R101-C4": (MaskRCNN(81, "resnet101", "c4"), 54_849_516 + C4_BACKGROUND),
    # Table 2: one mask of all classes; dense layers of 1024, 1024 and 80 masks of 28 x 28.
    "agnostic": (MaskRCNN(81, mask_class="agnostic"), 44_343_216 + 4 * 1025 - 79 * 257),
    "MLP": (
        MaskRCNN(81, mask_layers="mlp"),
        44_343_216 + 4 * 1025 - 2_360_320 - 262_400 - 80 * 257
        + 14 * 14 * 256 * 1024 + 1024 + 1024 * 1025 + 81 * 28 * 28 * 1025,
    ),
}  # fmt: skip
SMALL = ("torchvision v2", "MLP")
PARTS = {"mask_head": 2_360_320, "mask_predictor": 285_787}

thin = functools.partial(MaskRCNN, 4, "resnet14", width=1 / 32)
THIN = {
    "fpn": thin(),
    "v2": thin(heads="v2"),
    "c4": thin(neck="c4", anchor_sizes=(16, 32)),
    "dc5": thin(neck="dc5", anchor_sizes=(16, 32), mask_class="agnostic"),
    "mlp3": thin(mask_layers="mlp3"),
}


def counts(params):
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x.size for p, x in flat}


@pytest.mark.parametrize("name", members(COUNTS, SMALL))
def test_published_counts(name):
    model, expected = COUNTS[name]
    outputs, variables = contract.shapes_of(model, (1, 64, 64, 3))
    found = counts(variables["params"])
    total = sum(n for path, n in found.items() if model.bn == "train" or not NORM.search(path))
    assert total == expected
    bins, classes = outputs["mask_logits"].shape[2:4], outputs["mask_logits"].shape[4]
    assert bins == (model.mask_bins,) * 2
    assert classes == (1 if model.mask_class == "agnostic" else model.num_classes)
    if name == "torchvision v1":
        for part, count in PARTS.items():
            assert sum(n for path, n in found.items() if path.startswith(f"{part}/")) == count


@pytest.mark.parametrize("name", members(THIN, ("c4",)))
def test_masks_of_the_first_boxes_are_those_of_these_boxes(name):
    model = THIN[name]
    variables = contract.random_variables(model, (1, 64, 64, 3))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    boxes = jnp.array([[[0.0, 0, 40, 40], [8, 16, 60, 50], [3, 3, 9, 30]]] * 2)

    @jax.jit
    def run(variables, images):
        apply = functools.partial(model.apply, variables)
        levels = apply(images, train=False, method="features")
        both = apply(levels, boxes, 2, train=False, method="classify_and_draw")
        alone = apply(levels, boxes, train=False, method="classify")
        return both, alone, apply(levels, boxes, method="draw")

    (logits, deltas, masks), (alone, moves), every = run(variables, images)
    np.testing.assert_allclose(logits, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(deltas, moves, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masks, every[:, :2], rtol=1e-4, atol=1e-5)
    assert masks.shape == (2, 2, model.mask_bins, model.mask_bins, 1 if name == "dc5" else 4)
    assert np.std(masks) > 0


@pytest.mark.parametrize("name", members(THIN, ("v2",)))
def test_the_loss_of_masks_reaches_their_branch_and_the_trunk(name):
    model = THIN[name]
    variables = contract.random_variables(model, (1, 64, 64, 3))
    images = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)
    boxes = jnp.array([[[0.0, 0, 40, 40], [8, 16, 60, 50]]])

    def loss(params):
        apply: Any = functools.partial(model.apply, {**variables, "params": params})
        levels = apply(images, train=False, method="features")
        _, _, masks = apply(levels, boxes, 2, train=False, method="classify_and_draw")
        return jnp.sum(masks**2)

    grads = jax.tree.map(np.any, jax.jit(jax.grad(loss))(variables["params"]))
    reached = {path.split("/")[0] for path, any_ in counts(grads).items() if any_}
    flat = jax.tree_util.tree_leaves_with_path(grads)
    paths = [(jax.tree_util.keystr(p, simple=True, separator="/"), x) for p, x in flat]
    branch = [x for path, x in paths if path.startswith("mask_")]
    assert branch
    assert all(branch)
    assert any(x for path, x in paths if path.startswith("backbone/layer3"))
    assert not any(x for path, x in paths if path.startswith(("rpn/", "box_predictor/")))
    assert reached


def test_a_head_that_shares_layer4_has_no_dense_layers():
    with pytest.raises(UserError, match="mask_layers=mlp needs RoIs of its own"):
        thin(neck="c4", anchor_sizes=(16, 32), mask_layers="mlp").check()


KEYPOINT_HEAD = 256 * 512 * 9 + 512 + 7 * (512 * 512 * 9 + 512)  # eight convolutions
KEYPOINT_PREDICTOR = 512 * 17 * 4 * 4 + 17
WITH_KEYPOINTS = {
    "keypoints": (keypointrcnn_resnet50_fpn(2), 59_137_258),  # torchvision, weights' metadata
    "and masks": (
        MaskRCNN(2, num_keypoints=17),
        44_401_393 - 89 * (5 * 1025 + 257) + KEYPOINT_HEAD + KEYPOINT_PREDICTOR,
    ),
}


@pytest.mark.parametrize("name", WITH_KEYPOINTS)
def test_published_counts_of_keypoints(name):
    model, expected = WITH_KEYPOINTS[name]
    outputs, variables = contract.shapes_of(model, (1, 64, 64, 3))
    found = counts(variables["params"])
    assert sum(n for path, n in found.items() if not NORM.search(path)) == expected
    assert outputs["keypoint_logits"].shape == (1, 1, 56, 56, 17)
    assert ("mask_logits" in outputs) == model.draws_masks
    for part, count in (("head", KEYPOINT_HEAD), ("predictor", KEYPOINT_PREDICTOR)):
        assert sum(n for p, n in found.items() if p.startswith(f"keypoint_{part}/")) == count


@pytest.mark.parametrize("neck", members(["fpn", "c4"], ("fpn",)))
def test_the_loss_of_keypoints_reaches_every_parameter_of_their_branch_and_the_trunk(neck):
    sizes: dict[str, Any] = {} if neck == "fpn" else {"anchor_sizes": (16, 32)}
    model = thin(neck=neck, draws_masks=False, num_keypoints=3, **sizes)
    variables = contract.random_variables(model, (1, 64, 64, 3))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    boxes = jnp.array([[[0.0, 0, 40, 40], [8, 16, 60, 50]]] * 2)

    def loss(params):
        apply: Any = functools.partial(model.apply, {**variables, "params": params})
        levels = apply(images, train=False, method="features")
        logits = apply(levels, boxes, method="locate")
        return jnp.sum(logits[0] ** 2), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    assert logits.shape == (2, 2, 56, 56, 3)
    assert np.abs(logits[0] - logits[1]).max() > 0  # each image has its own
    assert np.abs(logits[:, 0] - logits[:, 1]).max() > 0  # and each box
    flat = jax.tree_util.tree_leaves_with_path(jax.tree.map(np.any, grads))
    reached = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}
    branch = [x for path, x in reached.items() if path.startswith("keypoint_")]
    assert len(branch) == 2 * 9
    assert all(branch)
    assert any(x for path, x in reached.items() if path.startswith("backbone/layer3"))
    assert not any(x for p, x in reached.items() if p.startswith(("rpn/", "box_predictor/")))


def test_keypoint_logits_are_enlarged_by_up_convolution_and_interpolation():
    """A one in a map of zeros: 4 x 4 taps at stride 2, cropped by 1, then linear, half-pixel."""
    predictor = heads.KeypointPredictor(1)
    kernel = np.arange(16, dtype=np.float32).reshape(4, 4, 1, 1)
    params = {"kps_score_lowres": {"kernel": kernel, "bias": np.ones(1, np.float32)}}
    x = np.zeros((1, 3, 3, 1), np.float32)
    x[0, 1, 1] = 1
    found = np.asarray(predictor.apply({"params": params}, x))[0, ..., 0]
    small = np.ones((6, 6))
    small[1:5, 1:5] += kernel[..., 0, 0]
    rows = np.zeros((12, 6))
    for i in range(12):
        at = np.clip((i + 0.5) / 2 - 0.5, 0, 5)
        low = min(int(at), 4)
        rows[i, low], rows[i, low + 1] = 1 - (at - low), at - low
    np.testing.assert_allclose(found, rows @ small @ rows.T, rtol=1e-5, atol=1e-5)
