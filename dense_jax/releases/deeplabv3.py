"""Published weights of torchvision's segmentation networks, and of a ResNet as their trunk.

Reference: pytorch/vision: torchvision/models/segmentation/{deeplabv3,fcn}.py.
"""

import functools

from dense_jax.models import deeplabv3
from dense_jax.releases import resnet
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule


def _unit(source: str, target: str, first: int = 0) -> tuple[Rule, ...]:
    """Returns rules for a convolution, number `first`, and its normalisation, the next number."""
    return (
        *rules.conv(f"{source}.{first}", f"{target}_{first}"),
        *rules.batch_norm(f"{source}.{first + 1}", f"{target}_{first + 1}"),
    )


_BACKBONE_RULES = resnet.torchvision_rules("backbone.", "backbone/")
_SCORE_RULES = (
    *rules.conv("classifier.4", "classifier_4"),
    *_unit("aux_classifier", "aux_classifier"),
    *rules.conv("aux_classifier.4", "aux_classifier_4"),
)
_ASPP_RULES = (
    *(  # the 1x1 branch and the three dilated ones
        rule
        for i in range(4)
        for rule in _unit(f"classifier.0.convs.{i}", f"classifier_0/convs_{i}")
    ),
    *_unit("classifier.0.convs.4", "classifier_0/convs_4", 1),  # the pooling is number 0
    *_unit("classifier.0.project", "classifier_0/project"),
)
_release = functools.partial(Release, trunk=("*/backbone/*",), normalisation="torchvision")
TORCHVISION = (
    _release(
        "torchvision's DeepLabv3",
        (*_BACKBONE_RULES, *_ASPP_RULES, *_unit("classifier", "classifier", 1), *_SCORE_RULES),
    ),
    _release(
        "torchvision's FCN on ResNet",
        (*_BACKBONE_RULES, *_unit("classifier", "classifier"), *_SCORE_RULES),
    ),
    _release(
        "torchvision's ResNet",
        (*resnet.torchvision_rules(target="backbone/"), *rules.dense("fc", "fc")),
    ),
)

RELEASES = TORCHVISION
NETWORKS = {  # VOC's classes
    "fcn_resnet50": Network(deeplabv3.fcn_resnet50, num_classes=21, has_aux=True),
    "fcn_resnet101": Network(deeplabv3.fcn_resnet101, num_classes=21, has_aux=True),
    "deeplabv3_resnet50": Network(deeplabv3.deeplabv3_resnet50, num_classes=21, has_aux=True),
    "deeplabv3_resnet101": Network(deeplabv3.deeplabv3_resnet101, num_classes=21, has_aux=True),
}
