"""The labels of an image depend on the image alone: not on its batch, its split or padding."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset, Part
from dense_jax.evaluation import labels
from dense_jax.evaluation.batches import predict_split
from dense_jax.infer.whole_image import padded_side, whole_image
from dense_jax.models import deeplabv3, segnet, unet
from tests import LABELLING, contract, script

CLASSES = ClassTable(["a", "b", "c"])


class Mixed:
    """Noise of a few sizes, by default one of them twice."""

    def __init__(self, sizes=((33, 40), (20, 57), (33, 40), (40, 33), (48, 48))):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (*self.size(index), 3), np.uint8)
        label = rng.integers(0, 3, self.size(index), np.uint8)
        return {"image": image, "label": label, "name": str(index)}


def task_of(name, **flags):
    config = dataclasses.replace(script(name).PRESETS["smoke"], **flags)
    return script(name).build(config, CLASSES.num_classes)


def predicted(task, variables, source):
    """The logits of each image of a split, in its order."""
    found = {index: outputs["logits"] for index, outputs in predict_split(task, variables, source)}
    return [found[index] for index in range(len(source))]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("fcn", {}),
        pytest.param("unet", {}, marks=pytest.mark.slow),
        pytest.param(
            "deeplab", {"backbone": "resnet50", "head": "deeplabv3"}, marks=pytest.mark.slow
        ),
        pytest.param("segnet", {"scale": 0.5, "dropout": "none"}, marks=pytest.mark.slow),
    ],
)
def test_logits_are_the_same_bits_in_any_company(name, flags):
    task, source = task_of(name, **flags), Mixed()
    variables = contract.random_variables(task.model, (1, 48, 48, 3))
    expected = predicted(task, variables, source)
    large = dataclasses.replace(task, config=dataclasses.replace(task.config, eval_batch_size=32))
    for order in ([4, 2, 0], [3, 1, 2, 0, 0, 2, 4, 4, 4]):
        found = predicted(large, variables, Part(source, order))
        for index, logits in zip(order, found, strict=True):
            assert logits.shape == (*source.size(index), 3)
            np.testing.assert_array_equal(logits, expected[index])
            assert np.std(logits) > 0


@pytest.mark.parametrize("name", LABELLING)
def test_networks_pad_as_they_say(name):
    """Zeros in front of the network, up to the side it names, are those that it adds itself."""
    task = task_of(name)
    image = np.random.default_rng(0).standard_normal((1, 37, 50, 3)).astype(np.float32)
    shape = task.padded_side(37), task.padded_side(50)
    variables = contract.random_variables(task.model, (1, 48, 48, 3))
    padded = np.zeros((1, *shape, 3), np.float32)
    padded[:, :37, :50] = image
    predict, sizes = jax.jit(task.predict), np.array([[37, 50]], np.int32)
    logits = predict(variables, image, sizes)["logits"]
    np.testing.assert_array_equal(
        predict(variables, padded, sizes)["logits"][:, :37, :50], logits[:, :37, :50]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        unet.unet_same(3, depth=3, width=4),
        segnet.SegNetBasic(3, width=1 / 16),
        segnet.SegNet(3, width=1 / 16),
    ],
    ids=["unet", "basic", "segnet"],
)
def test_images_that_a_network_does_not_take_are_padded(model):
    size = (3, 20)
    sides = [padded_side(model, side) for side in size]
    images = jnp.ones((1, *size, 3))
    variables = contract.random_variables(model, (1, *sides, 3))
    whole = jnp.zeros((1, *sides, 3)).at[:, : size[0], : size[1]].set(images)
    apply = jax.jit(lambda variables, images: contract.apply(model, variables, images)["logits"])
    expected = apply(variables, whole)[:, : size[0], : size[1]]
    found = jax.jit(whole_image(model))(variables, images, jnp.array([size]))["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found.shape == (1, *size, 3)


def test_image_pooling_leaves_padding_out():
    image = np.random.default_rng(0).standard_normal((5, 7, 4)).astype(np.float32)
    padded = np.full((2, 9, 8, 4), 1e6, np.float32)
    padded[0, :5, :7] = image
    padded[1] = np.random.default_rng(1).standard_normal((9, 8, 4))
    means = deeplabv3._mean(jnp.asarray(padded), jnp.array([[5, 7], [9, 8]]))
    np.testing.assert_allclose(means[0, 0, 0], image.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(means[1, 0, 0], padded[1].mean((0, 1)), rtol=1e-4, atol=1e-6)
    assert np.all(np.isfinite(deeplabv3._mean(jnp.asarray(padded), jnp.zeros((2, 2), int))))


def test_deeplabv3_is_told_the_size_of_the_image(monkeypatch):
    """In units of its scores, at stride 8 of the image of half size."""
    task = task_of("deeplab", backbone="resnet50", head="deeplabv3", scale=0.5)
    variables = contract.random_variables(task.model, (1, 48, 48, 3))
    seen, mean = [], deeplabv3._mean
    monkeypatch.setattr(
        deeplabv3, "_mean", lambda x, within: seen.append(within) or mean(x, within)
    )
    task.predict(variables, jnp.zeros((1, 80, 64, 3)), jnp.array([[40, 42]]))
    assert [within.tolist() for within in seen] == [[[3, 3]]]


@pytest.mark.slow  # exact shapes are the default
def test_buckets_say_what_padding_changes():
    task, source = task_of("fcn", pad_mode="100", eval_shapes="buckets"), Mixed()
    variables = contract.random_variables(task.model, (1, 48, 48, 3))
    counts = labels.LabelCounter(task, source, CLASSES)(variables, "distance")
    assert all(height % 32 == width % 32 == 0 for height, width in counts.shapes)
    changed, total = 0, 0
    exact = predicted(task.with_shapes("exact"), variables, source)
    padded = predicted(task, variables, source)
    for index in (0, 1, 3, 4):  # the first image of each size
        differ = exact[index].argmax(-1) != padded[index].argmax(-1)
        changed, total = changed + int(differ.sum()), total + differ.size
    assert changed > 0
    unmeasured = labels.LabelCounter(task, source, CLASSES)(variables, "none").padding
    assert "zeros pad images" in unmeasured
    assert "measured with the boundaries only" in unmeasured
    assert f"changes {100 * changed / total:.2f} % of the labels of 4 images" in counts.padding
    dataset = Dataset("mixed", CLASSES, {"val": source}, "", "")
    found = labels.findings(counts, dataset, "val")
    record = labels.record(counts, [found], dataset, "val", "mean_iou", {})
    assert record.protocol["padding"] == counts.padding
    assert re.search("native size, computed at .*x", record.protocol["resolution"])


def test_very_many_sizes_are_told(capsys):
    many = Mixed([(8, 8 + i) for i in range(40)])
    labels.LabelCounter(task_of("segnet"), many, CLASSES)
    assert "40 image sizes, and the network is compiled for each" in capsys.readouterr().out
    labels.LabelCounter(task_of("segnet", eval_shapes="buckets"), many, CLASSES)
    assert not capsys.readouterr().out
