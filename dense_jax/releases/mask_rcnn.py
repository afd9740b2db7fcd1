"""Published weights of Mask R-CNN in torchvision.

Reference: He, Gkioxari, Dollar, Girshick, "Mask R-CNN", ICCV 2017, arXiv:1703.06870; names and
layouts: pytorch/vision, torchvision/models/detection/{mask_rcnn,faster_rcnn,rpn}.py and
torchvision/ops/feature_pyramid_network.py.
"""

import functools

from dense_jax.models.rcnn import mask_rcnn
from dense_jax.releases import faster_rcnn
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule

_NUMBERS = range(1, 5)
_PREDICTOR = (
    *rules.conv("roi_heads.mask_predictor.conv5_mask", "mask_predictor/conv5_mask", "up_conv"),
    *rules.conv("roi_heads.mask_predictor.mask_fcn_logits", "mask_predictor/mask_fcn_logits"),
)


def _convs(theirs: str) -> tuple[Rule, ...]:
    """Returns rules for the mask head of maskrcnn_resnet50_fpn.

    Args:
      theirs: torchvision's name of a convolution, with its number from 1, or from 0.
    """
    table: list[Rule] = []
    for i in _NUMBERS:
        name = theirs.format(i, from_zero=i - 1)
        table += rules.conv(f"roi_heads.mask_head.{name}", f"mask_head/mask_fcn{i}")
    return tuple(table)


_NORMS = tuple(
    rule
    for i in _NUMBERS
    for rule in rules.batch_norm(f"roi_heads.mask_head.{i - 1}.1", f"mask_head/bn{i}")
)
_release = functools.partial(Release, trunk=faster_rcnn.TRUNK, normalisation="torchvision")
TORCHVISION = (
    _release(
        "torchvision's Mask R-CNN",
        (*faster_rcnn.V1, *_convs("{from_zero}.0"), *_PREDICTOR),
        needs=faster_rcnn.EPSILON,
    ),
    _release(
        "torchvision's Mask R-CNN of 2019",
        (*faster_rcnn.V1_2019, *_convs("mask_fcn{}"), *_PREDICTOR),
        needs=faster_rcnn.EPSILON_2019,
    ),
    _release(
        "torchvision's Mask R-CNN v2",
        (*faster_rcnn.V2, *_convs("{from_zero}.0"), *_NORMS, *_PREDICTOR),
        needs='MaskRCNN(heads="v2")',
    ),
)

RELEASES = TORCHVISION
NETWORKS = {  # torchvision numbers COCO's 80 classes up to 90
    "maskrcnn_resnet50_fpn": Network(mask_rcnn.maskrcnn_resnet50_fpn, num_classes=91),
    "maskrcnn_resnet50_fpn_v2": Network(mask_rcnn.maskrcnn_resnet50_fpn_v2, num_classes=91),
}
