"""torchvision's Faster and Mask R-CNN as wholes: the same proposals, detections and losses."""

import importlib.util
import os

import pytest

from dense_jax.objectives import rcnn
from tests import members
from tests.parity import detection


@pytest.mark.parametrize("name", members(detection.NAMES, ("maskrcnn_resnet50_fpn",)))
def test_proposals_detections_and_losses_are_torchvisions(name, monkeypatch):
    monkeypatch.setattr(rcnn, "uniforms", detection.given_uniforms)
    monkeypatch.setattr(rcnn, "sample_rois", detection.sample_by_place)
    reference = detection.kept(name)
    found = detection.ours(name, detection.parameters(name))
    assert len(reference["proposals"]) == detection.NUM_PROPOSALS
    assert found["valid"].sum() == len(reference["boxes"]) == 100
    for key, apart in detection.differences(found, reference).items():
        assert apart < (1e-5 if key in detection.LOSSES else 1e-4), key


@pytest.mark.parity
@pytest.mark.parametrize("name", detection.NAMES)
def test_references_are_what_torchvision_gives(name):
    pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: pip install --no-deps torchvision")
    if "DENSE_JAX_TORCHVISION_OPS" not in os.environ:
        pytest.skip("DENSE_JAX_TORCHVISION_OPS names no library with torchvision's operators")
    reference = detection.kept(name)
    for key, value in detection.theirs(name, detection.parameters(name)).items():
        assert value == pytest.approx(reference[key], rel=1e-4, abs=1e-2), key
