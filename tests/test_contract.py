"""The contract of networks finds each mistake, and says what it is."""

import re
from typing import Any

import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

from dense_jax.layers.norm import BatchNorm
from tests import contract

SHAPE = (2, 4, 5, 3)


class Net(nn.Module):
    """Two layers and a skip; ``fault`` names what is wrong with it."""

    fault: str = ""
    norm: bool = False
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        fault = self.fault
        is_eager = fault == "jit" and not isinstance(images, jnp.ndarray)  # NumPy's are concrete
        x = nn.Conv(4, (3, 3), dtype=self.dtype, name="conv")(images)
        if self.norm:
            is_still = not train or fault == "statistics"
            x = BatchNorm(use_running_average=is_still, axis_name=self.axis_name, name="norm")(x)
        features = nn.tanh(x)
        skip = nn.Conv(3, (1, 1), dtype=self.dtype, name="skip")(x)
        if fault == "skip":
            skip = skip - lax.stop_gradient(skip)  # it gets gradients all the same
        if fault == "dead":
            self.param("dead", nn.initializers.ones, (3,))
        scores = nn.Conv(3, (1, 1), dtype=self.dtype, name="score")(features) + skip
        if fault == "ignored":  # of all images
            scores = scores + jnp.mean(scores, axis=0, keepdims=True)
        if fault == "train":
            scores = scores * jnp.asarray(1 + train, scores.dtype)
        if fault == "jit":
            scores = scores + jnp.asarray(is_eager, scores.dtype)
        logits = scores if fault == "bfloat16" else scores.astype(jnp.float32)
        if fault == "nan":
            logits = logits.at[0, 1, 2].set(jnp.nan)
        if fault == "pixel":
            logits = logits.at[:, 1, 2].multiply(0.0)
        if fault == "size":
            logits = logits[:, 1:]
        if fault == "name":
            return {"scores": scores, "output": logits}
        return {"scores": scores.astype(jnp.float32) if fault == "dtype" else scores,
                "logits": logits}  # fmt: skip


def check(net, num_params=142, **changes):
    options: Any = dict(image_shape=SHAPE, num_classes=3, thin_shape=SHAPE, skips=["skip", "score"])
    contract.check_model(net, num_params=num_params, thin=net, **(options | changes))


@pytest.mark.parametrize("net", [Net(), Net(norm=True), Net(norm=True, axis_name="devices")])
def test_a_sound_network_passes(net):
    check(net, 150 if net.norm else 142)


def test_a_wrong_count_names_the_right_one():
    with pytest.raises(AssertionError, match=r"^the network has 142 parameters, not 1,140$"):
        check(Net(), 1140)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("bfloat16", "logits are bfloat16, not float32 where layers are bfloat16"),
        ("dtype", "dtype=bfloat16 changes no output: {'logits': 'float32', 'scores': 'float32'}"),
        ("name", 'no output is called "logits": output, scores'),
        ("size", "logits are of shape (2, 3, 5, 3), not (2, 4, 5, 3)"),
        ("nan", "logits are not finite"),
        ("skip", "skip does not matter"),
        ("pixel", "1 pixels do not depend on the image, the first at y=[1], x=[2]"),
        ("ignored", "ignored pixels change the loss"),
        ("train", "training and prediction give other logits"),
    ],
)
def test_a_mistake_is_named(fault, words):
    with pytest.raises(AssertionError, match=re.escape(words)):
        check(Net(fault))


def test_a_network_that_knows_whether_it_is_compiled_is_named():
    contract.check_without_jit(Net(), image_shape=SHAPE)
    with pytest.raises(AssertionError, match="jit changes the logits"):
        contract.check_without_jit(Net("jit"), image_shape=SHAPE)


def test_a_parameter_that_nothing_uses_is_named():
    with pytest.raises(AssertionError, match=re.escape("no gradient reaches ['dead']")):
        check(Net("dead"), 145)


def test_statistics_that_training_does_not_update_are_named():
    words = "training does not update ['batch_stats']['norm']['mean']"
    with pytest.raises(AssertionError, match=re.escape(words)):
        check(Net("statistics", norm=True), 150)


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(AssertionError, match="there is no layer sklp: conv, score, skip"):
        check(Net(), skips=["sklp"])
