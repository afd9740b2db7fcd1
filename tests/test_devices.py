"""The scripts' own networks, losses and optimisers give one result on one device and on four.

FCN with dropout and a running average of the parameters; SegNet-Basic with batch statistics.
"""

import dataclasses
from typing import Any

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn

from dense_jax.objectives.pixels import LossTerm
from dense_jax.tasks import training
from dense_jax.tasks.semantic import Semantic, pixel_loss
from dense_jax.train import schedules, step
from dense_jax.train.state import TrainState
from experiments import fcn, segnet

NUM_CLASSES, SIZE = 4, 32


def make_batch(number):
    """The first two images are ignored wholly, the others ever more."""
    rng = np.random.default_rng(number)
    labels = rng.integers(NUM_CLASSES, size=(8, SIZE, SIZE), dtype=np.uint8)
    ignored = rng.random(labels.shape) < np.arange(8).reshape(8, 1, 1) / 8
    ignored[:2] = True
    return {
        "images": rng.standard_normal((8, SIZE, SIZE, 3), np.float32),
        "labels": np.where(ignored, np.uint8(255), labels),
        "valid": np.ones(8, bool),
    }


# A large rate and scores that start above zero, so that a wrong gradient or mask shows.
_COMMON: dict[str, Any] = {
    "schedule": "constant",
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "accumulate": 2,
}
_CHANGES = {fcn: {"score_init": "normal", "dropout_rate": 0.5}, segnet: {"dropout": "enc_dec"}}


@pytest.fixture(
    scope="module",
    params=[pytest.param(fcn, marks=pytest.mark.slow), segnet],
    ids=lambda script: script.__name__,
)
def results(request):
    """(losses, state) of five steps on one device, and on four."""
    script = request.param
    config = dataclasses.replace(script.PRESETS["smoke"], **_COMMON, **_CHANGES[script])
    task = script.build(config, NUM_CLASSES)
    tx = schedules.build_optimizer(config, task.groups)
    start = jax.device_get(TrainState.init(task.model, tx, (SIZE, SIZE, 3), ema=True))
    loss = pixel_loss(config.loss_norm, task.loss_terms)

    def train(num_devices):
        devices = jax.devices()[:num_devices]
        train_step = step.train_step(loss, ema_decay=config.ema_decay, devices=devices)
        state, values = step.replicate(start, devices), []
        for number in range(5):
            batch = step.shard(make_batch(number), config.accumulate, devices)
            state, scalars = train_step(state, batch)
            values.append(float(scalars["loss"]))
        return values, state

    return train(1), train(4)


@pytest.mark.slow
def test_dropout_and_uneven_labels_do_not_tell_the_number_of_devices(results):
    (expected, one), (values, state) = results
    assert np.ptp(expected) > 1e-4
    np.testing.assert_allclose(values, expected, atol=1e-5)
    chex.assert_trees_all_close(
        jax.device_get((state.params, state.ema_params, state.model_state)),
        jax.device_get((one.params, one.ema_params, one.model_state)),
        atol=1e-5,
        rtol=0,
    )


def test_all_devices_hold_the_same_bits(results):
    for leaf in jax.tree.leaves(results[1][1]):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(shards) == 4
        assert all(np.array_equal(shards[0], shard) for shard in shards)


class TwoOutputs(nn.Module):
    """Scores at full size and, of one tap, at stride 3."""

    @nn.compact
    def __call__(self, images, *, train):
        del train
        scores = nn.Dense(NUM_CLASSES)(images)
        return {"logits": scores, "coarse": scores[:, ::3, ::3], "gap": scores.mean((1, 2))}


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_each_loss_term_has_its_own_denominator(num_devices):
    config = dataclasses.replace(segnet.PRESETS["smoke"], **_COMMON)
    model, batch = TwoOutputs(), make_batch(0)
    terms = (LossTerm(), LossTerm("coarse", 0.5))
    devices = jax.devices()[:num_devices]
    train_step = step.train_step(pixel_loss(config.loss_norm, terms), devices=devices)
    tx = schedules.build_optimizer(config)
    state = jax.device_get(TrainState.init(model, tx, (SIZE, SIZE, 3)))
    outputs: Any = model.apply({"params": state.params}, batch["images"], train=True)
    _, scalars = train_step(
        step.replicate(state, devices), step.shard(batch, config.accumulate, devices)
    )

    def mean(scores, labels):
        scores = np.asarray(scores, np.float64)
        log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        picked = np.take_along_axis(log_p, np.minimum(labels, NUM_CLASSES - 1)[..., None], -1)
        return -picked[..., 0][labels != 255].mean()

    labels = batch["labels"]
    coarse = labels[:, np.arange(11) * 32 // 11][:, :, np.arange(11) * 32 // 11]
    expected = mean(outputs["logits"], labels) + 0.5 * mean(outputs["coarse"], coarse)
    np.testing.assert_allclose(float(scalars["loss"]), expected, rtol=1e-5)


class OfOneDevice(nn.Module):
    """Normalises by the images of its own device."""

    @nn.compact
    def __call__(self, images, *, train=False):
        normalised = nn.BatchNorm(use_running_average=not train)(images)
        return {"logits": nn.Dense(6)(normalised)}


def test_batch_statistics_of_one_device_are_told(tmp_path, capsys):
    smoke = dataclasses.replace(segnet.PRESETS["smoke"], num_steps=1, class_balance="none")
    config = dataclasses.replace(smoke, workdir=str(tmp_path), dropout="none", bn_stats="running")
    task = Semantic(config, OfOneDevice(), config.whole_images())
    with jax.numpy_dtype_promotion("standard"):  # AdamW raises a float to an integer power
        training.train(task)
    assert "OfOneDevice has batch statistics and no axis_name" in capsys.readouterr().out
