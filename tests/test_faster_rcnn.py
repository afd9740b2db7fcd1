"""The script of Faster R-CNN: recipes, presets and refusals; what test_flags tries of it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.data.detection import ResizeShortSide
from dense_jax.data.normalise import normalise
from dense_jax.data.transforms import resize_image
from dense_jax.errors import UserError
from dense_jax.evaluation.batches import eval_batches
from dense_jax.infer import predictor
from dense_jax.tasks.rcnn_recipes import RECIPES, anchors
from experiments import faster_rcnn as script

OTHER = {
    "anchor_ratios": (0.5, 1.0),
    "anchor_sizes": (8, 16, 24, 32, 40),
    "learn": ("rpn", "head"),
    "max_side": 20,
    "short_side": (24,),
    "test_side": 24,
    "max_objects": 3,
    "rois_per_image": 8,
    "roi_op": "pool",
    "test_nms": 0.3,
    "test_proposals": 5,
    "test_scales": (1.0, 0.5),
    "weight_decay": 0.5,
}
REFUSED = {
    "head_steps": "--head-steps does not go with --train-mode=joint",  # used in test_alternating
    "num_proposals": "--num-proposals counts boxes of a file",  # used in test_given_proposals
    "scale": "detectors resize by --short-side",
}
VIEWS = {
    "test_merge": {"test_scales": (1.0, 0.5)},
    "test_flip": {"test_scales": (1.0, 0.5), "test_merge": "union"},
}
_SINGLE_MAP = {"neck": "dc5", "anchor_sizes": (16, 32)}
NEEDED = {
    "backbone": {"neck": "c5", "anchor_sizes": (16, 32)},
    "roi_op": _SINGLE_MAP,
    **VIEWS,
}
PROPOSALS: dict[str, Any] = {"proposal_source": "file", "proposals": "proposals.json"}


@functools.cache
def built(preset, **changes):
    return script.build(dataclasses.replace(script.PRESETS[preset], **changes), 21)


@pytest.mark.parametrize("preset", list(script.PRESETS))
def test_presets_build_networks_of_their_size(preset):
    task = built(preset)
    model = task.model.clone(axis_name=None)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)["params"]
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    if preset.startswith("paper"):
        assert count == 137_078_239  # Faster R-CNN on VGG-16, 20 classes
    assert count > 0


def test_recipes_are_those_of_the_codes():
    """The differences that the codes are known for."""
    tables = RECIPES
    assert tables["torchvision"].anchor_rule.beta == tables["torchvision"].roi_rule.beta == 1 / 9
    assert tables["detectron2"].anchor_rule.beta == tables["detectron2"].roi_rule.beta == 0
    assert tables["detectron2"].anchor_rule.fixed_count
    assert tables["detectron2"].train.count == 1000
    paper = tables["paper"]
    assert paper.anchor_rule.inside
    assert paper.anchor_rule.plus_one
    assert (paper.roi_rule.sample, paper.roi_rule.max_foreground) == (128, 32)
    assert (paper.train.candidates, paper.test.candidates) == (12_000, 6000)
    assert (paper.train.count, paper.test.count) == (2000, 300)
    assert (paper.detections.max_iou, paper.roi_op) == (0.3, "pool")
    model: Any = built("smoke").model
    strides = [anchors(model, name, (96, 96), grids) for name, grids in (
        ("torchvision", [(24, 24), (12, 12), (6, 6), (3, 3), (2, 2)]),
        ("detectron2", [(24, 24), (12, 12), (6, 6), (3, 3), (2, 2)]),
    )]  # fmt: skip
    last = [np.unique((levels[-1][:, 0] + levels[-1][:, 2]) / 2) for levels in strides]
    np.testing.assert_array_equal(last, [[0, 48], [0, 64]])  # 96 // 2, and the level's own
    # A map with a cell more than the image has strides, as ZF's, keeps the network's stride.
    zf = script.FasterRCNN(2, backbone="zf", neck="c5", anchor_sizes=(32,))
    (own,) = anchors(zf, "torchvision", (608, 1024), [(39, 65)])
    np.testing.assert_array_equal((own[-1, :2] + own[-1, 2:]) / 2, [1024, 608])


class Stripes:
    """One image whose columns are white, black and black."""

    def __len__(self):
        return 1

    def size(self, index):
        return 96, 96

    def __getitem__(self, index):
        image = np.zeros((96, 96, 3), np.uint8)
        image[:, ::3] = 255
        return {"image": image, "label": image[..., 0], "name": "stripes"}


@pytest.mark.parametrize("recipe", ["torchvision", "detectron2", "paper"])
def test_images_are_resized_as_in_the_code_of_the_recipe(recipe):
    """Pillow smooths what shrinks; torchvision and py-faster-rcnn do not."""
    task, source = built("smoke", recipe=recipe, roi_op="align"), Stripes()
    training: Any = next(t for t in task.transforms if isinstance(t, ResizeShortSide))
    trained = training(source[0], np.random.default_rng(0))["image"]
    expected = resize_image(source[0]["image"], (32, 32), antialias=recipe == "detectron2")
    np.testing.assert_array_equal(trained, expected)
    (batch,) = eval_batches(source, task)
    normalised = normalise(expected, task.config.normalisation)
    np.testing.assert_array_equal(batch["images"][0], normalised)
    assert (expected.max() == 0) == (recipe != "detectron2")  # one column of three is seen
    read: Any = lambda answers, image: answers["images"]  # noqa: E731
    predict: Any = predictor.Predictor(
        lambda images, sizes: {"images": images},
        read,
        task.config.normalisation,
        input_size=task.input_size,
        antialias=task.antialias,
    )
    np.testing.assert_array_equal(predict(source[0]["image"]), normalised)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"roi_op": "pool"}, "roi_op"),
        ({"anchor_sizes": (16, 32)}, "anchor_sizes"),
        ({"anchor_sizes": (16, 32), "proposal_source": "grid"}, "anchor_sizes"),
        ({"heads": "v2", "neck": "c4", "anchor_sizes": (16, 32)}, "heads=v2"),
        ({"proposal_source": "file"}, "give --proposals=FILE"),
        ({"proposals": "a.json"}, "--proposals is not read with --proposal-source=rpn"),
        ({"rpn_reg": "off", "proposal_source": "grid"}, "leave them out"),
        ({"rpn_lambda": 2.0, "proposal_source": "grid"}, "leave them out"),
        ({"head_loss": "svm"}, "--head-loss=svm trains the last layer .* give --init=run:DIR"),
        ({"head_loss": "box"}, "--head-loss=box trains the last layer"),
        ({"num_proposals": 7}, "--num-proposals counts boxes of a file"),
        ({"test_proposals": 7, "proposal_source": "grid"}, "have no order"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(flags, words):
    with pytest.raises(UserError, match=words):
        built("smoke", **flags)
