"""torchvision's networks at full size: ours give the same numbers, stage by stage."""

import functools
import importlib.util

import numpy as np
import pytest

from dense_jax.models import resnet
from tests import members
from tests.parity import drawn, zoo

TOLERANCE = 1e-4  # of the largest magnitude; docs/parity.md has what was measured


def test_what_is_drawn_follows_from_name_and_shape():
    values = drawn.uniform("conv1.weight", (3, 3))
    np.testing.assert_array_equal(values, drawn.uniform("conv1.weight", (3, 3)))
    assert not np.any(values == drawn.uniform("conv2.weight", (3, 3)))
    assert not np.any(values.ravel() == drawn.uniform("conv1.weight", (9,)))
    many = drawn.uniform("x", (9999,))
    assert many.dtype == np.float32
    assert -1 <= many.min() < -0.99
    assert 0.99 < many.max() < 1
    assert abs(many.mean()) < 0.02
    assert abs(many.var() - 1 / 3) < 0.01


@pytest.mark.parametrize("num_channels", [3, 21, 64, 1000])
def test_what_is_kept_meets_all_channels(num_channels):
    values = np.broadcast_to(np.arange(num_channels), (1, 19, 25, num_channels))
    kept = zoo.thinned(values)
    assert len(set(kept.tolist())) == min(num_channels, len(kept))
    assert 300 < len(kept) < 500


def test_references_are_small():
    files = sorted(zoo.REFERENCE.glob("*.npz"))
    assert {file.stem for file in files} >= set(zoo.NETWORKS)
    assert all(file.stat().st_size < 50_000 for file in files)


# Others differ in depth, width or the head alone.
FAST = ("deeplabv3_resnet50", "maskrcnn_resnet50_fpn_v2")
NAMES = members(zoo.NETWORKS, FAST)


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_is_torchvisions(name):
    shapes, stages = zoo.kept(name)
    ours = zoo.ours(name, drawn.parameters(shapes))
    for stage, theirs in stages.items():
        assert theirs.std() > 0.1, stage
        assert zoo.apart(zoo.thinned(ours[stage]), theirs) < TOLERANCE, stage


# What differs between releases, and the first stage that tells.
TRAPS = {
    "stride in the 1x1": ("resnet50", {"stride_in": "1x1"}, "layer2"),
    "pooling rounded up": ("resnet50", {"pool_ceil": True}, "pool1"),
    "epsilon": ("resnet50", {"bn_epsilon": 1e-6}, "conv1"),
    "dilation of first blocks": ("fcn_resnet50", {"first_block_dilation": "new"}, "layer3"),
    "features in centres": ("fasterrcnn_resnet50_fpn", {"roi_aligned": True}, "class_logits"),
    "SegNet's epsilon": ("vgg16_bn", {"bn_epsilon": 1e-9}, "pool1"),
}


SLOW_TRAPS = ("features in centres", "SegNet's epsilon")


@pytest.mark.parametrize(
    ("name", "change", "first"),
    [
        pytest.param(*trap, id=name, marks=[pytest.mark.slow] if name in SLOW_TRAPS else [])
        for name, trap in TRAPS.items()
    ],
)
def test_another_convention_is_told_apart(name, change, first):
    shapes, stages = zoo.kept(name)
    if name == "fcn_resnet50":
        change = {"trunk": functools.partial(resnet.resnet50, **change)}
    model = zoo.NETWORKS[name].build().clone(**change)
    ours = zoo.ours(name, drawn.parameters(shapes), model, until=first)
    for stage, whole in ours.items():
        values, theirs = zoo.thinned(whole), stages[stage]
        is_same = values.shape == theirs.shape and zoo.apart(values, theirs) < 4 * TOLERANCE
        assert is_same == (stage != first), stage


@pytest.mark.parity
@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_references_are_what_torchvision_gives(name):
    pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: pip install --no-deps torchvision")
    from tests.parity import theirs

    network = theirs.build(name)
    shapes, stages = zoo.kept(name)
    assert theirs.shapes_of(network) == shapes
    tensors = drawn.parameters(shapes)
    whole, ours = theirs.stages(name, network, tensors), zoo.ours(name, tensors)
    for stage, values in whole.items():
        np.testing.assert_allclose(zoo.thinned(values), stages[stage], rtol=1e-4, atol=1e-4)
        assert ours[stage].size == values.size  # vgg16 has vectors where ours has 1x1 maps
        assert zoo.apart(ours[stage], values) < TOLERANCE, stage
