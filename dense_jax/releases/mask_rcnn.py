"""Published weights of Mask R-CNN in torchvision; the network is not here yet.

Reference: He, Gkioxari, Dollar, Girshick, "Mask R-CNN", ICCV 2017, arXiv:1703.06870; names and
layouts: pytorch/vision, torchvision/models/detection/{mask_rcnn,faster_rcnn,rpn}.py and
torchvision/ops/feature_pyramid_network.py.
"""

from dense_jax.releases import resnet
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule


def _torchvision_rules(fpn: str, rpn: str, mask: dict[str, str]) -> tuple[Rule, ...]:
    """Returns rules for maskrcnn_resnet50_fpn and others on a ResNet with a feature pyramid.

    fc6 reads 7x7 units, channels first; here it has a 7x7 kernel. The four deltas of a box, or of
    a class, are consecutive channels of bbox_pred.

    Args:
      fpn: torchvision's name of a convolution of the pyramid, with its kind and level.
      rpn: torchvision's name of the shared convolution of the proposal network.
      mask: our names of the mask head's four convolutions to torchvision's.
    """
    table = list(resnet.torchvision_rules("backbone.body.", "backbone/"))
    for kind in ("inner_blocks", "layer_blocks"):
        table += rules.conv(f"backbone.fpn.{fpn.format(kind)}", f"fpn/{kind}_{{level}}")
    table += rules.conv(rpn, "rpn/conv")
    for name in ("cls_logits", "bbox_pred"):
        table += rules.conv(f"rpn.head.{name}", f"rpn/{name}")
    table += rules.conv("roi_heads.box_head.fc6", "box_head/fc6", "dense_chw")
    table += rules.dense("roi_heads.box_head.fc7", "box_head/fc7")
    for name in ("cls_score", "bbox_pred"):
        table += rules.dense(f"roi_heads.box_predictor.{name}", f"box_head/{name}")
    for ours, theirs in mask.items():
        table += rules.conv(f"roi_heads.mask_head.{theirs}", f"mask_head/{ours}")
    predictor = "roi_heads.mask_predictor"
    table += rules.conv(f"{predictor}.conv5_mask", "mask_head/conv5_mask", "up_conv")
    table += rules.conv(f"{predictor}.mask_fcn_logits", "mask_head/mask_fcn_logits")
    return tuple(table)


def _release(name: str, table: tuple[Rule, ...], needs: str) -> Release:
    # The heads depend on the classes of the training set.
    trunk = ("*/backbone/*", "*/fpn/*", "*/rpn/*")
    return Release(name, table, trunk, "torchvision", needs=needs)


_CONVS = [f"mask_fcn{i}" for i in range(1, 5)]
# Files saved today, and files of 2019 such as torchvision's own for COCO. Their normalisation is
# frozen: torchvision adds nothing to the variance for its own file (pytorch/vision#2933), and adds
# 1e-5 for others.
TORCHVISION = (
    _release(
        "torchvision's Mask R-CNN",
        _torchvision_rules(
            "{}.{{level}}.0",
            "rpn.head.conv.0.0",
            {name: f"{i}.0" for i, name in enumerate(_CONVS)},
        ),
        needs="bn_epsilon=1e-5, or 0 if training started from torchvision's weights for COCO",
    ),
    _release(
        "torchvision's Mask R-CNN of 2019",
        _torchvision_rules("{}.{{level}}", "rpn.head.conv", {name: name for name in _CONVS}),
        needs="bn_epsilon=0",
    ),
)

# No command uses the tables above until the network is here.
RELEASES: tuple[Release, ...] = ()
NETWORKS: dict[str, Network] = {}
