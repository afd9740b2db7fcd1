"""Published weights of Faster R-CNN in torchvision, and of classifiers as its trunk.

Reference: Ren, He, Girshick, Sun, "Faster R-CNN", NIPS 2015, arXiv:1506.01497; names and layouts:
pytorch/vision, torchvision/models/detection/{faster_rcnn,rpn}.py and
torchvision/ops/feature_pyramid_network.py; rbgirshick/py-faster-rcnn: models/pascal_voc/ZF.
"""

import functools
from collections.abc import Iterator

from dense_jax.models import zf
from dense_jax.models.rcnn import faster_rcnn
from dense_jax.releases import resnet, vgg
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule

TRUNK = ("*/backbone/*", "*/fpn/*", "*/rpn/*")  # the heads depend on the classes
# What torchvision adds to the variance of frozen normalisations (pytorch/vision#2933).
EPSILON = (
    'stride_in="3x3" and bn_epsilon=1e-5, or 0 if training started from torchvision\'s weights '
    "for COCO"
)
EPSILON_2019 = 'stride_in="3x3" and bn_epsilon=0'


def torchvision_rules(fpn: str, *rpn: str) -> tuple[Rule, ...]:
    """Returns rules for fasterrcnn_resnet50_fpn but for its box head.

    The four deltas of a box, or of a class, are consecutive channels of bbox_pred.

    Args:
      fpn: torchvision's name of a convolution of the pyramid, with its kind and level.
      *rpn: torchvision's names of the convolutions in front of scores of proposals.
    """
    table = list(resnet.torchvision_rules("backbone.body.", "backbone/"))
    for kind in ("inner_blocks", "layer_blocks"):
        table += rules.conv(f"backbone.fpn.{fpn.format(kind)}", f"fpn/{kind}_{{level}}")
    for i, name in enumerate(rpn, start=1):
        table += rules.conv(f"rpn.head.{name}", f"rpn/conv{i}")
    for name in ("cls_logits", "bbox_pred"):
        table += rules.conv(f"rpn.head.{name}", f"rpn/{name}")
    for name in ("cls_score", "bbox_pred"):
        table += rules.dense(f"roi_heads.box_predictor.{name}", f"box_predictor/{name}")
    return tuple(table)


# fc6 reads 7x7 units, channels first; here it has a 7x7 kernel.
_TWO_DENSE = (
    *rules.conv("roi_heads.box_head.fc6", "box_head/fc6", "dense_chw"),
    *rules.dense("roi_heads.box_head.fc7", "box_head/fc7"),
)
V1 = (*torchvision_rules("{}.{{level}}.0", "conv.0.0"), *_TWO_DENSE)
V1_2019 = (*torchvision_rules("{}.{{level}}", "conv"), *_TWO_DENSE)
V2 = (
    *torchvision_rules("{}.{{level}}.0", "conv.0.0", "conv.1.0"),
    *(
        rule
        for kind in ("inner", "layer")
        for rule in rules.batch_norm(
            f"backbone.fpn.{kind}_blocks.{{level}}.1", f"fpn/{kind}_norms_{{level}}"
        )
    ),
    *(
        rule
        for i in range(4)
        for rule in (
            *rules.conv(f"roi_heads.box_head.{i}.0", f"box_head/conv{i + 1}"),
            *rules.batch_norm(f"roi_heads.box_head.{i}.1", f"box_head/bn{i + 1}"),
        )
    ),
    *rules.conv("roi_heads.box_head.5", "box_head/fc1", "dense_chw"),
)
_release = functools.partial(Release, trunk=TRUNK, normalisation="torchvision")
TORCHVISION = (
    _release("torchvision's Faster R-CNN", V1, needs=EPSILON),
    _release("torchvision's Faster R-CNN of 2019", V1_2019, needs=EPSILON_2019),
    _release("torchvision's Faster R-CNN v2", V2, needs='FasterRCNN(heads="v2")'),
)


def _resnet_rules() -> Iterator[Rule]:
    """Yields torchvision's names of a ResNet whose layer4 is the box head (C4)."""
    for rule in resnet.torchvision_rules(target="backbone/"):
        for number in "1234" if "{s}" in rule.source else "-":
            place = "box_head" if number == "4" else "backbone"
            target = (rule.target or "").replace("backbone", place).replace("{s}", number)
            source = rule.source.replace("{s}", number)
            yield rule._replace(source=source, target=target or None)


def _with_vgg16(release: Release) -> Release:
    """Returns a release of VGG-16 under the names of this network; fc6 and fc7 are the box head."""

    def moved(rule: Rule) -> Rule:
        if rule.target is None:
            return rule
        place = "box_head" if "/fc" in rule.target else "backbone"
        # fc7 is a dense layer here, and a convolution there.
        layout = "ones+dense" if rule.target.endswith("/fc7/kernel") else rule.layout
        return rule._replace(target=rule.target.replace("/", f"/{place}/", 1), layout=layout)

    trunk = ("*/backbone/conv?_?/*", "*/box_head/fc[67]/*")
    return release._replace(rules=tuple(map(moved, release.rules)), trunk=trunk)


# On other necks, the trunk has the names of `deeplabv3`.
RESNET = resnet.TORCHVISION._replace(
    rules=(*_resnet_rules(), *rules.dense("fc", "fc")),
    trunk=("*/backbone/*", "*/box_head/layer4_*"),
    needs="",
)
VGG16 = tuple(map(_with_vgg16, (vgg.TORCHVISION, vgg.TORCHVISION_FEATURES, vgg.CAFFE)))
_CONVS = [layer.name for layer in zf.LAYERS if layer.features]
ZF = Release(
    "Caffe's ZF",
    (
        *rules.caffe_conv(_CONVS[0], f"backbone/{_CONVS[0]}", "rows+conv+bgr"),
        *(rule for name in _CONVS[1:] for rule in rules.caffe_conv(name, f"backbone/{name}")),
        *rules.caffe_conv("fc6", "box_head/fc6"),
        # Caffe's dropout halves values in testing where `scale_train` is false, as in ZF; here it
        # doubles those that are left in training.
        *rules.caffe_conv("fc7", "box_head/fc7", "half+ones+dense"),
        *(Rule(f"fc8.{i}", None) for i in range(2)),  # scores of ImageNet's classes
    ),
    ("*/backbone/conv?/*", "*/box_head/fc[67]/*"),
    "fast_rcnn",
)

RELEASES = (*TORCHVISION, RESNET, *VGG16, ZF)
NETWORKS = {  # torchvision numbers COCO's 80 classes up to 90
    "fasterrcnn_resnet50_fpn": Network(faster_rcnn.fasterrcnn_resnet50_fpn, num_classes=91),
    "fasterrcnn_resnet50_fpn_v2": Network(faster_rcnn.fasterrcnn_resnet50_fpn_v2, num_classes=91),
}
