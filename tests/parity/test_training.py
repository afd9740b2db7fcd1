"""Losses of five training steps are torch's, batch normalisation and momentum included."""

from typing import Any

import numpy as np
import pytest
from flax import traverse_util

from tests import members
from tests.parity import training
from tests.parity.training import RUNS


@pytest.mark.parametrize("name", members(RUNS, ("SegNet-Basic",)))
def test_losses_are_torchs_at_each_step(name):
    reference = training.kept()[name]
    assert len(set(reference)) == training.NUM_STEPS
    losses, _ = training.ours(RUNS[name])
    assert max(training.apart(losses, reference)) < 1e-8


@pytest.mark.slow
def test_float32_goes_the_same_way():
    losses, _ = training.ours(RUNS["DeepLab-LargeFOV"], np.float32)
    apart = training.apart(losses, training.kept()["DeepLab-LargeFOV"])
    assert 1e-10 < max(apart) < 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("name", RUNS)
def test_references_are_what_torch_gives(name):
    pytest.importorskip("torch")
    losses, _ = training.theirs(RUNS[name])
    assert max(training.apart(losses, training.kept()[name])) < 1e-8


@pytest.mark.parity
def test_running_variances_differ_by_bessels_correction():
    """torch averages n / (n - 1) times what we average, n values of a channel in a batch."""
    pytest.importorskip("torch")
    run = RUNS["SegNet-Basic"]
    first = training.variables(training.network(run))["batch_stats"]
    (_, last), (_, theirs) = training.ours(run), training.theirs(run)
    start: Any = traverse_util.flatten_dict(first, sep="/")
    ours: Any = traverse_util.flatten_dict(last["batch_stats"], sep="/")
    assert set(ours) == set(theirs)
    for path, values in ours.items():
        if path.endswith("mean"):
            np.testing.assert_allclose(values, theirs[path], rtol=1e-9)
            continue
        stage = int(path[path.index("_bn") - 1])  # conv4_bn, conv_decode4_bn
        height, width = (-(-side // 2 ** (stage - 1)) for side in run.size)
        n = run.batch * height * width
        kept = 0.9**training.NUM_STEPS * start[path]
        np.testing.assert_allclose((values - kept) * n / (n - 1), theirs[path] - kept, rtol=1e-9)
