"""Scores and pictures of cells, and the flags of the script that trains on them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dense_jax.data.border import BorderWeights, SeparateTouching
from dense_jax.data.dataset import Example
from dense_jax.data.normalise import Normalise
from dense_jax.data.transforms import (
    ElasticDeformation,
    GreyJitter,
    RandomCrop,
    RandomFlip,
    RandomRotate90,
    RandomScale,
)
from dense_jax.errors import UserError
from dense_jax.tasks import cells
from experiments import unet

SAME = unet.PRESETS["smoke"]
PAPER = unet.PRESETS["paper"]


class TwoCells:
    """Squares of 6x6 that touch in every second image; red says where they are."""

    def __len__(self):
        return 3

    def size(self, index):
        return (16, 16)

    def __getitem__(self, index):
        instances = np.zeros((16, 16), np.int32)
        instances[4:10, 1:7], instances[4:10, 7 + index % 2 : 13 + index % 2] = 1, 2
        label = (instances > 0).astype(np.uint8)
        image = np.stack([255 * label, 0 * label, 0 * label], -1)
        return {"image": image, "label": label, "instances": instances, "name": str(index)}


VARIABLES = {"threshold": np.float32(100)}


def from_red(variables, images, sizes):
    """Finds the cells of `TwoCells` exactly."""
    inside = images[..., :1] - variables["threshold"]
    return jnp.concatenate([-inside, inside], axis=-1)


def test_objects_and_membranes_are_scored(tmp_path):
    config = dataclasses.replace(SAME, normalisation="none", eval_batch_size=4)
    found = cells.measure(from_red, VARIABLES, TwoCells(), config, membranes=True)
    # Two images show one object of 12x6 for two; the other is right.
    assert found.scores["num_objects"] == 6
    assert found.scores["num_predicted"] == 4
    assert found.scores["average_precision_50"] == pytest.approx((0 + 1 + 0) / 3)
    assert found.scores["pixel_error"] == pytest.approx(0)
    found.write(tmp_path, TwoCells())
    assert len(list(tmp_path.glob("pictures/cells_*.png"))) == 3
    without = cells.measure(from_red, VARIABLES, TwoCells(), config, membranes=False)
    assert "pixel_error" not in without.scores


def test_a_third_class_is_the_border_between_objects():
    logits = np.zeros((5, 9, 3), np.float32)
    logits[..., 0] = 1
    logits[1:4, 1:8, 1] = 2
    logits[1:4, 4, 2] = 3
    objects = cells.objects_of(logits)
    assert objects.max() == 2
    assert (objects[2, 1:4] == 1).all()
    assert (objects[2, 5:8] == 2).all()
    assert objects[2, 4] > 0  # the border is given back
    assert cells.objects_of(logits[..., :2]).max() == 1


def test_pictures_of_weights_and_of_cells_carved_apart(tmp_path):
    cells.write_training_pictures(tmp_path, TwoCells(), [SeparateTouching(1), BorderWeights()])
    assert len(list(tmp_path.glob("pictures/weights_*.png"))) == 3
    picture = np.asarray(Image.open(tmp_path / "pictures/weights_1.png"))
    width = (picture.shape[1] - 3 * 4) // 4
    black = [(picture[6, i * (width + 4) : i * (width + 4) + width] == 0).all(-1) for i in (1, 2)]
    assert black[1].sum() == black[0].sum() + 1  # the ridge
    cells.write_training_pictures(tmp_path / "none", TwoCells(), [Normalise("grey")])
    assert not list((tmp_path / "none").glob("pictures/*"))


def test_flags_reach_the_network():
    config = dataclasses.replace(
        SAME, variant="release", up="nearest_conv", depth=4, width=16, norm="group",
        dropout_rate=0.25, kernel_init="xavier", dtype="bfloat16", shapes=PAPER.shapes,
    )  # fmt: skip
    net = unet.build_model(config, 7)
    for field in ("variant", "padding", "up", "depth", "width", "norm", "dropout_rate"):
        assert getattr(net, field) == getattr(config, field)
    assert (net.num_classes, net.kernel_init, net.dtype) == (7, "xavier", "bfloat16")


def test_flags_reach_the_transforms():
    transforms = {type(t): t for t in unet.build_transforms(PAPER)}
    assert list(transforms) == [
        Normalise, GreyJitter, ElasticDeformation, BorderWeights, RandomCrop, RandomFlip,
        RandomRotate90,
    ]  # fmt: skip
    assert transforms[RandomCrop] == RandomCrop(388, context=92, mirror="reflect")
    assert transforms[ElasticDeformation] == ElasticDeformation(grid=3, std=10)
    assert transforms[BorderWeights] == BorderWeights(10, 5)
    changed = dataclasses.replace(
        SAME, tile=24, loss_weight="class", ridge=3, elastic_grid=5, elastic_std=2.0,
        augment="mirror", grey_jitter=0.5, scale=0.5, mirror="symmetric",
    )  # fmt: skip
    assert unet.build_transforms(changed) == [
        RandomScale(0.5, 0.5), Normalise("torchvision"), GreyJitter(0.5, 0.5),
        ElasticDeformation(5, 2.0), SeparateTouching(3), BorderWeights(0.0, 5.0),
        RandomCrop(24, 0, "symmetric"), RandomFlip(),
    ]  # fmt: skip
    plain = dataclasses.replace(SAME, loss_weight="none", ridge=0, elastic="off", augment="none")
    assert unet.build_transforms(plain) == [Normalise("torchvision")]


def test_tiles_of_training_fit_the_network():
    rng = np.random.default_rng(0)
    config = dataclasses.replace(PAPER, tile=316)
    example: Example = TwoCells()[0]
    for transform in unet.build_transforms(config):
        example = transform(example, rng)
    assert example["image"].shape == (316, 316, 1)
    assert example["label"].shape == example["weights"].shape == (132, 132)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "one pass, no flips"),
        ({"tta": "d4"}, "one pass, all 8 views"),
        ({"padding": "valid", "tile": 132, "tta": "rot7"}, "tiles of 132 pixels, 7 turned"),
        ({"padding": "valid", "tile": 132, "mirror": "symmetric"}, "tiles of 132 pixels, no"),
    ],
)
def test_prediction_is_what_the_flags_say(changes, said):
    config = dataclasses.replace(SAME, **changes)
    assert said in unet.test_time(config)
    predict = unet.build_predict(config, unet.build_model(config, 3))
    assert callable(predict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "--width=0"),
        ({"ridge": -1}, "--ridge=-1"),
        ({"elastic_grid": 1}, "--elastic-grid=1"),
        ({"w0": -1.0}, "--w0=-1"),
        ({"sigma": 0.0}, "--sigma=0"),
        ({"dropout_rate": 1.0}, "--dropout-rate=1"),
        ({"grey_jitter": -0.1}, "--grey-jitter"),
        ({"padding": "valid"}, "--padding=valid needs --tile"),
        ({"padding": "valid", "tile": 133}, "--tile=133: A side of 133 pixels"),
        ({"padding": "valid", "tile": 132, "scale": 0.5}, "needs --tile and --scale=1"),
        ({"tile": 20}, "the nearest are 16 and 24"),
        ({"scale": 0.3}, "--scale=0.3: 3 poolings need a multiple of 0.25"),
    ],
)
def test_values_that_no_run_can_have(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SAME, **changes)


def test_images_that_do_not_fit_are_refused_before_training():
    config = dataclasses.replace(SAME, depth=5)
    with pytest.raises(UserError, match=r"an image is seen whole .*16 pixels.*32 and up"):
        unet.check_images(config, unet.build_model(config, 2), TwoCells())
    tiled = dataclasses.replace(config, tile=32)
    unet.check_images(tiled, unet.build_model(tiled, 2), TwoCells())
