"""The torch networks of the benchmarks are ours; the benchmark itself also compares gradients."""

import numpy as np
import pytest

from benchmarks import train_step

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    "name",
    [
        "segnet_basic",
        "unet_same",
        "hypercolumns",
        "dilated_basic_same",
        "deeplab_largefov",
        "fcn_resnet50",
    ],
)
def test_a_twin_gives_our_logits(name):
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    images = rng.standard_normal((1, 32, 32, 3), np.float32)
    labels = np.zeros((1, 32, 32), np.int32)
    network = train_step.MODELS[name].build(1 / 16, 32)
    variables = train_step.random_variables(network, images)
    ours = train_step.build_ours(network, variables, images, labels)
    theirs = train_step.build_theirs(train_step.MODELS[name].twin, variables, images, labels)
    assert train_step.logits_differ(ours, theirs) < 1e-5
