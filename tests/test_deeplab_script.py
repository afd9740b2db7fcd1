"""What experiments/deeplab.py makes of its flags; every value of each is in test_flags."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dense_jax.errors import UserError
from dense_jax.objectives import pixels as losses
from dense_jax.ops.crf import CrfParams
from dense_jax.train.schedules import build_optimizer, build_schedule
from experiments import deeplab
from tests import contract

SMOKE, PRESETS = deeplab.PRESETS["smoke"], deeplab.PRESETS
TORCHVISION = {"head": "deeplabv3", "backbone": "resnet50", "aux": "on"}


def rates(config):
    """The learning rate of each parameter over the base rate."""
    config = dataclasses.replace(
        config,
        width=1 / 32,
        optimizer="sgd",
        learning_rate=1.0,
        weight_decay=0.0,
        schedule="constant",
        warmup_steps=0,
    )
    shapes = contract.shapes_of(deeplab.build(config, 3).model.clone(axis_name=None), (1, 9, 9, 3))
    params = jax.tree.map(lambda _: np.float32(0), shapes[1]["params"])
    optimizer = build_optimizer(config, deeplab.build(config, 4).groups)
    grads = jax.tree.map(lambda _: np.float32(1), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    flat: dict[str, Any] = traverse_util.flatten_dict(updates, sep="/")
    return {name: -float(update) for name, update in flat.items()}


@pytest.mark.slow
def test_classifiers_learn_ten_and_their_biases_twenty_times_as_fast():
    found = rates(PRESETS["paper_vgg"])
    special = {name: rate for name, rate in found.items() if name.startswith("fc8")}
    assert special == {
        f"fc8_{i}/{k}": r for i in range(1, 5) for k, r in (("kernel", 10), ("bias", 20))
    }
    assert {rate for name, rate in found.items() if name.endswith("kernel")} == {1, 10}
    assert {rate for name, rate in found.items() if name.endswith("bias")} == {2, 20}

    found = rates(dataclasses.replace(PRESETS["paper"], backbone="resnet50", msc_inputs="off"))
    assert found["fc1_c0/kernel"] == 10
    assert found["fc1_c3/bias"] == 20
    assert found["layer3_0/conv2/kernel"] == 1

    found = rates(dataclasses.replace(PRESETS["torchvision"], backbone="resnet50"))
    assert found["aux_classifier_4/kernel"] == found["aux_classifier_0/kernel"] == 10
    assert found["classifier_4/kernel"] == 1


def test_multi_scale_features_are_trained_alone():
    found = rates(PRESETS["paper_v1_msc"])
    trained = {name.split("/")[0] for name, rate in found.items() if rate}
    layers = ("image", "pool1", "pool2", "pool3", "pool4")
    assert trained == {"fc8", *(f"msc_{layer}_{i}" for layer in layers for i in (1, 2))}


def test_rates_fall_as_published():
    """Poly: (1 - it / max)^0.9; v1 divides by ten every 2,000 steps."""
    poly = build_schedule(PRESETS["paper_vgg"])
    np.testing.assert_allclose(poly(10_000) / poly(0), 0.5359, atol=5e-5)
    np.testing.assert_allclose(poly(20_000), 0, atol=1e-12)
    step = build_schedule(PRESETS["paper_v1"])
    for at, rate in (
        (0, 1e-3),
        (1999, 1e-3),
        (2001, 1e-4),
        (3999, 1e-4),
        (4001, 1e-5),
        (5999, 1e-5),
    ):
        np.testing.assert_allclose(step(at), rate, rtol=1e-5)


@pytest.mark.parametrize("loss_at", ["units", "pixels"])
@pytest.mark.parametrize(
    ("flags", "weights"),
    [({}, [1]), ({"msc_inputs": "max"}, [1, 1, 1, 1]), (TORCHVISION, [1, 0.5])],
    ids=["one scale", "four losses", "torchvision"],
)
def test_losses_are_of_outputs_that_there_are(flags, weights, loss_at):
    config = dataclasses.replace(SMOKE, loss_at=loss_at, **flags)
    task = deeplab.build(config, 4)
    terms = task.loss_terms
    outputs, _ = contract.shapes_of(task.model, (1, 33, 33, 3))
    assert [term.weight for term in terms] == weights
    sizes = [outputs[term.output].shape[1] for term in terms]
    first = {"units": 5, "pixels": 33}[loss_at]
    assert sizes == {"msc_inputs": [first, 5, 4, 3], "head": [first, first]}.get(
        next(iter(flags), ""), [first]
    )


def test_units_are_compared_with_every_eighth_label():
    labels = jnp.arange(321 * 321, dtype=jnp.int32).reshape(1, 321, 321)
    (term,) = deeplab.build(deeplab.Config(), 4).loss_terms
    picked = losses.labels_at(labels, (41, 41), align_corners=term.align_corners)
    np.testing.assert_array_equal(picked, labels[:, ::8, ::8])


def test_crf_and_tiles_are_what_a_run_predicts_with():
    config = dataclasses.replace(SMOKE, post="crf", crf=CrfParams(w1=5.0))
    assert deeplab.build(config, 4).crf == CrfParams(w1=5.0)
    assert "one pass" in deeplab.build(config, 4).test_time
    tiles = dataclasses.replace(SMOKE, tile=33, tile_context=8, msc_inputs="max")
    assert (
        deeplab.build(tiles, 4).test_time == "tiles of 33 pixels, no flips, scales 1, 0.75 and 0.5"
    )


def test_tiles_with_enough_context_do_not_show():
    """The network sees 259 pixels; so do tiles with 136 around them, whatever their size."""
    config = dataclasses.replace(SMOKE, head="largefov", rates=(1,), tile=288, tile_context=136)
    model = deeplab.build(config, 3).model.clone(axis_name=None)
    images = np.random.default_rng(0).standard_normal((1, 20, 9, 3)).astype(np.float32)
    variables, sizes = contract.random_variables(model, images.shape), jnp.array([[20, 9]])
    first, second = (
        jax.jit(deeplab.build(dataclasses.replace(config, tile=tile), 3).predict)(
            variables, images, sizes
        )["logits"]
        for tile in (288, 296)
    )
    assert first.shape == (1, 20, 9, 3)
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)
    assert np.std(first) > 1e-3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"crop": (320, 320)}, "8 m . 1"),
        ({"crop": None}, "loss-at=pixels"),
        ({"head": "deeplabv3"}, "backbone=resnet50"),
        ({"aux": "on"}, "head=deeplabv3"),
        (TORCHVISION | {"rates": (6,)}, "leave --rates out"),
        (TORCHVISION | {"msc_inputs": "max"}, "msc-inputs=off"),
        ({"head": "fc7x7", "backbone": "resnet101"}, "backbone=vgg16"),
        ({"pool5a": "on", "backbone": "resnet101"}, "backbone=vgg16"),
        ({"msc_features": "on", "backbone": "resnet101"}, "backbone=vgg16"),
        ({"head": "fc4x4", "rates": (3,)}, "even"),
        ({"rates": ()}, "--rates: give one or more"),
        ({"tile": 100, "tile_context": 64}, "136"),
        ({"tile": 513, "scale": 0.5}, "scale=1"),
        ({"dropout_rate": 1.0}, "dropout"),
        ({"width": 0.0}, "width"),
        ({"head_lr": 0.0}, "head-lr"),
    ],
    ids=str,
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(deeplab.Config(), **flags)
