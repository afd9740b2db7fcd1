"""Published weights of Mask R-CNN: every name is explained, and comes back."""

import re
from collections import Counter
from typing import Any

import chex
import numpy as np
import pytest

from dense_jax import start
from dense_jax.models.rcnn.mask_rcnn import MaskRCNN, maskrcnn_resnet50_fpn_v2
from dense_jax.releases import catalogue
from dense_jax.releases import mask_rcnn as releases
from dense_jax.weights import rules
from tests import contract
from tests.test_rcnn_weights import published, written

V1, V1_2019, V2 = releases.TORCHVISION
THIN: Any = dict(num_classes=3, width=1 / 16)

# torchvision/models/detection/mask_rcnn.py: what stands beside the tensors of Faster R-CNN.
PREDICTOR = {
    "roi_heads.mask_predictor.conv5_mask.weight": (256, 256, 2, 2),
    "roi_heads.mask_predictor.conv5_mask.bias": (256,),
    "roi_heads.mask_predictor.mask_fcn_logits.weight": (91, 256, 1, 1),
    "roi_heads.mask_predictor.mask_fcn_logits.bias": (91,),
}
HEAD_V1 = {
    f"roi_heads.mask_head.{i}.0.{kind}": shape
    for i in range(4)
    for kind, shape in (("weight", (256, 256, 3, 3)), ("bias", (256,)))
}
HEAD_V2 = {f"roi_heads.mask_head.{i}.0.weight": (256, 256, 3, 3) for i in range(4)} | {
    f"roi_heads.mask_head.{i}.1.{kind}": shape
    for i in range(4)
    for kind, shape in (
        *((kind, (256,)) for kind in ("weight", "bias", "running_mean", "running_var")),
        ("num_batches_tracked", ()),
    )
}


def state_dict(version):
    """torchvision's tensors, of which frozen normalisations count no batches."""
    base = {"v1": "fasterrcnn_resnet50_fpn", "v2": "fasterrcnn_resnet50_fpn_v2"}[version]
    tensors = published(base)
    if version == "v1":
        tensors = {k: x for k, x in tensors.items() if not k.endswith("num_batches_tracked")}
    own = PREDICTOR | (HEAD_V1 if version == "v1" else HEAD_V2)
    return tensors | {k: np.broadcast_to(np.float32(0), shape) for k, shape in own.items()}


def renamed_as_in_2019(tensors):
    """Layers had no number of their own yet."""
    pattern = re.compile(r"(fpn\.(?:inner|layer)_blocks\.\d)\.0\.|(rpn\.head\.conv)\.0\.0\.")
    tensors = {pattern.sub(lambda m: f"{m[1] or m[2]}.", key): x for key, x in tensors.items()}
    convs = re.compile(r"mask_head\.(\d)\.0\.")
    return {convs.sub(lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.", k): x
            for k, x in tensors.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("version", "release", "num_tensors"), [("v1", V1, 307), ("v1", V1_2019, 307), ("v2", V2, 432)]
)
def test_every_name_of_mask_rcnn_is_explained(version, release, num_tensors):
    tensors = state_dict(version)
    assert len(tensors) == num_tensors
    if release is V1_2019:
        tensors = renamed_as_in_2019(tensors)
        assert "roi_heads.mask_head.mask_fcn4.weight" in tensors
    name = "maskrcnn_resnet50_fpn" + ("_v2" if version == "v2" else "")
    template = rules.template_of(catalogue.build(name))
    assert rules.choose(catalogue.releases(), template, tensors) is release
    account = rules.match(template, tensors, release.rules)
    statuses = Counter(row.status for row in account.rows)
    assert set(statuses) <= {"loaded", "ignored"}
    ignored = {row.source for row in account.rows if row.status == "ignored"}
    assert all(source.endswith("num_batches_tracked") for source in ignored)
    assert len(ignored) == (69 if version == "v2" else 0)


@pytest.mark.parametrize("release", [V1_2019, V2], ids=lambda release: release.name)
def test_masks_start_from_a_file_with_a_new_head(tmp_path, release, capsys):
    build = maskrcnn_resnet50_fpn_v2 if release is V2 else MaskRCNN
    theirs = build(**THIN)
    variables = contract.random_variables(theirs, (1, 32, 32, 3))
    path = written(tmp_path / "coco.npz", variables, release)
    same, _ = start.initial(f"file:{path}", rules.template_of(theirs))
    chex.assert_trees_all_equal(same, variables)
    loaded, normalisation = start.initial(
        f"file:{path}", rules.template_of(theirs.clone(num_classes=7))
    )
    said = capsys.readouterr().out
    assert release.name in said
    assert normalisation == "torchvision"
    assert "box_predictor" not in loaded["params"]
    assert set(loaded["params"]["mask_head"]) == set(variables["params"]["mask_head"])
    # The up-convolution does not depend on the classes, its last layer does.
    assert set(loaded["params"].get("mask_predictor", {})) <= {"conv5_mask"}
