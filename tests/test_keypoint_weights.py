"""Published weights of the keypoint branch: every name is explained, and comes back."""

import re
from collections import Counter
from typing import Any

import chex
import numpy as np
import pytest

from dense_jax import start
from dense_jax.models.rcnn.mask_rcnn import MaskRCNN, keypointrcnn_resnet50_fpn
from dense_jax.releases import catalogue
from dense_jax.releases import keypoint_rcnn as releases
from dense_jax.weights import rules
from tests import contract
from tests.test_rcnn_weights import published, renamed_as_in_2019, written

NOW, OF_2019 = releases.TORCHVISION

# torchvision/models/detection/keypoint_rcnn.py: what stands beside the tensors of Faster R-CNN.
HEAD = {
    f"roi_heads.keypoint_head.{i}.{kind}": shape
    for i in range(0, 16, 2)
    for kind, shape in (("weight", (512, 512 if i else 256, 3, 3)), ("bias", (512,)))
} | {
    "roi_heads.keypoint_predictor.kps_score_lowres.weight": (512, 17, 4, 4),
    "roi_heads.keypoint_predictor.kps_score_lowres.bias": (17,),
}
PREDICTOR = {  # people and background
    "roi_heads.box_predictor.cls_score.weight": (2, 1024),
    "roi_heads.box_predictor.cls_score.bias": (2,),
    "roi_heads.box_predictor.bbox_pred.weight": (8, 1024),
    "roi_heads.box_predictor.bbox_pred.bias": (8,),
}


def state_dict():
    tensors = published("fasterrcnn_resnet50_fpn")
    tensors = {k: x for k, x in tensors.items() if not k.endswith("num_batches_tracked")}
    own = {k: np.broadcast_to(np.float32(0), x) for k, x in (HEAD | PREDICTOR).items()}
    return tensors | own


@pytest.mark.parametrize("release", releases.TORCHVISION, ids=lambda release: release.name)
def test_every_name_of_keypoint_rcnn_is_explained(release):
    tensors = state_dict()
    assert len(tensors) == 295 + 18
    if release is OF_2019:
        tensors = renamed_as_in_2019(tensors)
    template = rules.template_of(catalogue.build("keypointrcnn_resnet50_fpn"))
    assert rules.choose(catalogue.releases(), template, tensors) is release
    account = rules.match(template, tensors, release.rules)
    assert Counter(row.status for row in account.rows) == {"loaded": 295 + 18}
    trained = sum(bool(re.search(r"\.(weight|bias)$", row.source)) for row in account.rows)
    assert trained == len(rules.traverse_util.flatten_dict(template["params"]))


def test_numbers_of_the_up_convolution_keep_their_places(tmp_path):
    """torch stores [in, out, rows, columns]; a tap lands where it does in torch."""
    theirs = keypointrcnn_resnet50_fpn(num_classes=2, width=1 / 16)
    variables = contract.random_variables(theirs, (1, 32, 32, 3))
    tensors: Any = rules.unload(variables, NOW.rules)
    own = variables["params"]["keypoint_predictor"]["kps_score_lowres"]["kernel"]
    name = "roi_heads.keypoint_predictor.kps_score_lowres.weight"
    np.testing.assert_array_equal(tensors[name], own.transpose(2, 3, 0, 1))
    path = written(tmp_path / "coco.npz", variables, NOW)
    same, normalisation = start.initial(f"file:{path}", rules.template_of(theirs))
    chex.assert_trees_all_equal(same, variables)
    assert normalisation == "torchvision"


@pytest.mark.slow
def test_masks_and_keypoints_start_from_keypoints(tmp_path, capsys):
    """Another number of classes: the rest of the file is copied, masks start anew."""
    thin: Any = dict(width=1 / 16)
    variables = contract.random_variables(keypointrcnn_resnet50_fpn(2, **thin), (1, 32, 32, 3))
    path = written(tmp_path / "coco.npz", variables, NOW)
    ours = MaskRCNN(7, num_keypoints=17, **thin)
    loaded, _ = start.initial(f"file:{path}", rules.template_of(ours))
    assert NOW.name in capsys.readouterr().out
    assert {"keypoint_head", "keypoint_predictor", "backbone"} <= set(loaded["params"])
    assert not {"mask_head", "mask_predictor", "box_predictor"} & set(loaded["params"])
