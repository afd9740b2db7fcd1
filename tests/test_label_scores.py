"""Evaluation and losses refuse what would give a wrong score without a word."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.errors import UserError
from dense_jax.evaluation import labels
from dense_jax.infer.crf import check_crf
from dense_jax.layers.norm import BatchNorm
from dense_jax.metrics import semantic as metrics
from dense_jax.objectives import pixels
from dense_jax.ops.crf import CrfParams
from dense_jax.tasks import training
from dense_jax.train.config import RunConfig
from tests import script

CLASSES = ClassTable(["a", "b", "c"])


class Images:
    """Images of 8 x 8 pixels, labelled as told."""

    def __init__(self, *values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def size(self, index):
        return 8, 8

    def __getitem__(self, index):
        label = np.resize(np.array(self.values[index], np.uint8), (8, 8))
        image = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
        return {"image": image, "label": label, "name": f"image{index}"}


@dataclasses.dataclass(frozen=True)
class Brightness:
    """A task whose classes are ranges of brightness."""

    num_classes: int
    config: RunConfig = dataclasses.field(default_factory=lambda: RunConfig(normalisation="none"))

    antialias = True

    def input_size(self, size):
        return size

    def padded_side(self, side):
        return side

    def predict(self, variables, images, sizes):
        centres = jnp.linspace(60.0, 200.0, self.num_classes)
        grey = jnp.mean(images, axis=-1, keepdims=True)
        return {"logits": -(jnp.abs(grey - centres.reshape(1, 1, 1, -1)))}


def counted(source, num_classes=3):
    return labels.LabelCounter(Brightness(num_classes), source, CLASSES)({}, "distance")


def test_predictions_outside_the_classes_are_not_counted_as_others():
    true, predicted = jnp.array([0, 1, 1, 255]), jnp.array([0, 1, 3, 9])
    with pytest.raises(ValueError, match=r"prediction 3 is outside \[0, 3\)"):
        metrics.confusion_counts(true, predicted, 3)
    count = jax.jit(lambda true, predicted: metrics.confusion_counts(true, predicted, 3))
    for wrong in (predicted, predicted - 2):
        counts = np.asarray(count(true, wrong))
        assert (counts < 0).all()
        with pytest.raises(ValueError, match="a prediction is outside"):
            metrics.add(np.full((3, 3), 1000), counts)
        with pytest.raises(ValueError, match="none negative"):
            metrics.summarise(counts)
    right = count(true, jnp.array([0, 1, 2, 9]))  # where nothing is scored, anything may stand
    np.testing.assert_array_equal(right, [[1, 0, 0], [0, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize("norm", ["valid", "weights"])
def test_the_divisor_counts_what_the_loss_scores(norm):
    label = jnp.array([[[0, 1, 2, 3, 7, 254, 255, -1]]])
    logits = jnp.zeros((1, 1, 8, 3))
    losses = pixels.cross_entropy(
        {"logits": logits}, {"labels": label, "valid": jnp.array([True])}, norm=norm
    )
    total, count = losses["logits"]
    assert count == 3
    np.testing.assert_allclose(total / count, math.log(3), rtol=1e-6)


def test_labels_and_networks_of_other_classes_are_refused():
    with pytest.raises(UserError, match=r"image1: its label holds 7, and class ids are 0 to 2"):
        counted(Images([0, 1], [2, 7]))
    with pytest.raises(UserError, match="logits of the network: 4 channels, and the dataset has 3"):
        counted(Images([0, 1]), num_classes=4)
    config = script("fcn").PRESETS["smoke"]
    task = script("fcn").build(config, 4)
    loss = task.loss(Dataset("d", CLASSES, {}, "", ""))
    with pytest.raises(UserError, match='output "logits" of the network: 4 channels'):
        loss(lambda images: {"logits": jnp.zeros((1, 8, 8, 4))}, {"images": None}, None)


def test_images_without_a_label_have_no_boundary():
    void, source = [255], Images([0, 1], [255], [0, 0, 1])
    alone = [counted(Images(value)).boundary_f1 for value in ([0, 1], void)]
    assert math.isnan(alone[1])
    with_void = counted(Images([0, 1], void)).boundary_f1
    np.testing.assert_allclose(with_void, alone[0])
    assert counted(source).num_images == 3


@pytest.mark.slow
def test_one_class_is_not_trained(tmp_path):
    config = dataclasses.replace(script("fcn").PRESETS["smoke"], workdir=str(tmp_path / "run"))
    table = ClassTable(["foreground"])
    source = Images(*[[0, 255]] * 8)
    dataset = Dataset("mine", table, {"train": source, "val": source}, "", "")
    with pytest.raises(UserError, match="one class, foreground, and a softmax"):
        training.train(script("fcn").build(config, 1), dataset)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_batch_normalisation_of_one_value_is_refused():
    norm = BatchNorm(use_running_average=False, name="pooled")
    variables = norm.init(jax.random.key(0), jnp.zeros((1, 1, 1, 4)))
    with pytest.raises(UserError, match="batch normalisation pooled sees one value per channel"):
        norm.apply(variables, jnp.ones((1, 1, 1, 4)), mutable=["batch_stats"])
    norm.apply(variables, jnp.ones((2, 1, 1, 4)), mutable=["batch_stats"])
    still = norm.clone(use_running_average=True)
    still.apply(variables, jnp.ones((1, 1, 1, 4)))
    # Two devices with one value each.
    two = BatchNorm(use_running_average=False, axis_name="devices")
    step = jax.vmap(lambda x: two.apply(variables, x, mutable=["batch_stats"]), axis_name="devices")
    assert np.all(np.isfinite(step(jnp.ones((2, 1, 1, 1, 4)))[0]))


def test_a_crf_without_own_messages_is_refused():
    with pytest.raises(UserError, match="self-term=exclude: without a pixel's own message"):
        check_crf(CrfParams(self_term="exclude"), "torchvision")


def test_a_split_without_labels_has_null_for_scores(tmp_path):
    counts = counted(Images([255], [255]))
    dataset = Dataset("d", CLASSES, {"val": Images([255], [255])}, "", "")
    found = labels.findings(counts, dataset, "val")
    labels.record(counts, [found], dataset, "val", "mean_iou", {}).write(tmp_path, 1)
    scores = json.loads((tmp_path / "evaluation.json").read_text())["scores"]
    assert scores["mean_iou"] is None
    assert scores["boundary_f1"] is None
