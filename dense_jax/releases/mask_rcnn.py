"""Published weights of Mask R-CNN, in torchvision; the network is not here yet.

Reference: He, Gkioxari, Dollar, Girshick, "Mask R-CNN", ICCV 2017, arXiv:1703.06870; names and
layouts: pytorch/vision, torchvision/models/detection/{mask_rcnn,faster_rcnn,rpn}.py and
torchvision/ops/feature_pyramid_network.py.
"""

from dense_jax.releases import resnet
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule


def _torchvision_rules(fpn: str, rpn: str, mask: dict[str, str]) -> tuple[Rule, ...]:
    """Rules for maskrcnn_resnet50_fpn and others on a residual network with a feature pyramid.

    fc6 reads 7x7 units, channels first, and is a kernel of this size here. The four deltas of a
    box, or of a class, are neighbours among the channels of bbox_pred.

    Args:
      fpn: name there of a convolution of the pyramid, with its kind and level.
      rpn: name there of the shared convolution of the proposals.
      mask: names there of the mask head's four convolutions, by ours.
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
    # The heads know the classes that they were trained for.
    trunk = ("*/backbone/*", "*/fpn/*", "*/rpn/*")
    return Release(name, table, trunk, "torchvision", needs=needs)


_CONVS = [f"mask_fcn{i}" for i in range(1, 5)]
# Files saved today, and those of 2019, among them torchvision's own of COCO. Their normalisation is
# frozen: torchvision adds nothing to the variance for its own file (pytorch/vision#2933), and 1e-5
# for others.
TORCHVISION = (
    _release(
        "torchvision's Mask R-CNN",
        _torchvision_rules(
            "{}.{{level}}.0",
            "rpn.head.conv.0.0",
            {name: f"{i}.0" for i, name in enumerate(_CONVS)},
        ),
        needs="bn_epsilon=1e-5, or 0 if torchvision's weights of COCO were its start",
    ),
    _release(
        "torchvision's Mask R-CNN of 2019",
        _torchvision_rules("{}.{{level}}", "rpn.head.conv", {name: name for name in _CONVS}),
        needs="bn_epsilon=0",
    ),
)

# The tables wait for their network: until it is here, import-weights does not know such files.
RELEASES: tuple[Release, ...] = ()
NETWORKS: dict[str, Network] = {}
