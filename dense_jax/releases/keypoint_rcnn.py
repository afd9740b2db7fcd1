"""Published weights of Mask R-CNN's keypoint branch in torchvision (Keypoint R-CNN).

Reference: He, Gkioxari, Dollar, Girshick, "Mask R-CNN", ICCV 2017, arXiv:1703.06870, Section 5;
names and layouts: pytorch/vision, torchvision/models/detection/keypoint_rcnn.py.
"""

import functools

from dense_jax.models.rcnn import mask_rcnn
from dense_jax.releases import faster_rcnn
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release

# In torchvision, a ReLU follows each convolution and has a number of its own.
_HEAD = (
    *(
        rule
        for i in range(8)
        for rule in rules.conv(f"roi_heads.keypoint_head.{2 * i}", f"keypoint_head/conv_fcn{i + 1}")
    ),
    *rules.conv(
        "roi_heads.keypoint_predictor.kps_score_lowres",
        "keypoint_predictor/kps_score_lowres",
        "up_conv",
    ),
)
_release = functools.partial(Release, trunk=faster_rcnn.TRUNK, normalisation="torchvision")
TORCHVISION = (
    _release("torchvision's Keypoint R-CNN", (*faster_rcnn.V1, *_HEAD), needs=faster_rcnn.EPSILON),
    _release(
        "torchvision's Keypoint R-CNN of 2019",
        (*faster_rcnn.V1_2019, *_HEAD),
        needs=faster_rcnn.EPSILON_2019,
    ),
)

RELEASES = TORCHVISION
NETWORKS = {"keypointrcnn_resnet50_fpn": Network(mask_rcnn.keypointrcnn_resnet50_fpn, 2)}
