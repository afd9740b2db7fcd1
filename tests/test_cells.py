"""Scores and pictures of cells, and the flags of the script that trains on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dense_jax.data.border import BorderWeights, SeparateTouching
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset, Example
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
from dense_jax.evaluation import cells
from dense_jax.evaluation.record import Record
from experiments import unet
from tests import contract

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


class FromRed:
    """Finds the cells of `TwoCells` exactly."""

    config = dataclasses.replace(SAME, normalisation="none", eval_batch_size=4)

    antialias = True

    def input_size(self, size):
        return size

    def padded_side(self, side):
        return side

    def predict(self, variables, images, sizes):
        del sizes
        inside = images[..., :1] - variables["threshold"]
        return {"logits": jnp.concatenate([-inside, inside], axis=-1)}


DATASET = Dataset(
    "two", ClassTable(["between", "inside"]), {"train": TwoCells(), "val": TwoCells()}, "", ""
)


def written(findings, folder):
    """The names of the pictures in a record's folder."""
    Record("x", [findings], {"images_scored": 3, "split": "val"}).write(folder, 1)
    return sorted(path.name for path in (folder / "pictures").iterdir())


def test_objects_and_membranes_are_scored(tmp_path):
    found = cells.measure(FromRed(), VARIABLES, DATASET, "val", membranes=True)
    scores = {score.name: score.value for score in found.scores}
    # Two images show one object of 12x6 for two; the other is right.
    assert scores["num_objects"] == 6
    assert scores["num_predicted"] == 4
    assert scores["average_precision_50"] == pytest.approx((0 + 1 + 0) / 3)
    assert scores["pixel_error"] == pytest.approx(0)
    assert written(found, tmp_path) == [f"cells_{i}.png" for i in (1, 2, 3)]
    without = cells.measure(FromRed(), VARIABLES, DATASET, "val", membranes=False)
    assert "pixel_error" not in {score.name for score in without.scores}


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
    def draw(transforms):
        return cells.training_pictures(FromRed(), {}, DATASET, "val", transforms=transforms)

    found = draw([SeparateTouching(1), BorderWeights()])
    assert written(found, tmp_path) == [f"weights_{i}.png" for i in (1, 2, 3)]
    assert [len(picture.parts) for picture in found.pictures] == [4, 4, 4]
    picture = np.asarray(Image.open(tmp_path / "pictures/weights_1.png"))
    width = (picture.shape[1] - 3 * 4) // 4
    black = [(picture[6, i * (width + 4) : i * (width + 4) + width] == 0).all(-1) for i in (1, 2)]
    assert black[1].sum() == black[0].sum() + 1  # the ridge
    assert not draw([Normalise("grey")]).pictures


def test_flags_reach_the_network():
    config = dataclasses.replace(
        SAME, variant="release", up="nearest_conv", depth=4, width=16, norm="group",
        dropout_rate=0.25, kernel_init="xavier", dtype="bfloat16", shapes=PAPER.shapes,
    )  # fmt: skip
    net = unet.build(config, 7).model
    for field in ("variant", "padding", "up", "depth", "width", "norm", "dropout_rate"):
        assert getattr(net, field) == getattr(config, field)
    assert (net.num_classes, net.kernel_init, net.dtype) == (7, "xavier", "bfloat16")


def test_flags_reach_the_transforms():
    transforms = {type(t): t for t in unet.build(PAPER, 4).transforms}
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
    assert list(unet.build(changed, 4).transforms) == [
        RandomScale(0.5, 0.5), Normalise("torchvision"), GreyJitter(0.5, 0.5),
        ElasticDeformation(5, 2.0), SeparateTouching(3), BorderWeights(0.0, 5.0),
        RandomCrop(24, 0, "symmetric"), RandomFlip(),
    ]  # fmt: skip
    plain = dataclasses.replace(SAME, loss_weight="none", ridge=0, elastic="off", augment="none")
    assert list(unet.build(plain, 4).transforms) == [Normalise("torchvision")]


def test_tiles_of_training_fit_the_network():
    rng = np.random.default_rng(0)
    config = dataclasses.replace(PAPER, tile=316)
    example: Example = TwoCells()[0]
    for transform in unet.build(config, 4).transforms:
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
    assert said in unet.build(config, 4).test_time
    side = config.tile or 16
    images, sizes = jnp.zeros((1, side, side, 3)), jnp.array([[side, side]])
    task = unet.build(config, 3)
    variables = contract.shapes_of(task.model, images.shape)[1]
    outputs = jax.eval_shape(task.predict, variables, images, sizes)
    assert outputs["logits"].shape == (1, side, side, 3)


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
    with pytest.raises(UserError, match=r"images of 16x16 are seen whole.*16 pixels.*32 and up"):
        unet.build(config, 2).training_data(DATASET)
    tiled = dataclasses.replace(config, tile=32)
    unet.build(tiled, 2).training_data(DATASET)
