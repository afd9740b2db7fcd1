"""Published weights of Mask R-CNN in torchvision; the network is not here yet.

Reference: He, Gkioxari, Dollar, Girshick, "Mask R-CNN", ICCV 2017, arXiv:1703.06870; names and
layouts: pytorch/vision, torchvision/models/detection/{mask_rcnn,faster_rcnn,rpn}.py and
torchvision/ops/feature_pyramid_network.py.
"""

from dense_jax.releases import faster_rcnn
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule


def _mask_rules(convs: dict[str, str]) -> tuple[Rule, ...]:
    """Returns rules for the mask head of maskrcnn_resnet50_fpn.

    Args:
      convs: our names of the four convolutions to torchvision's.
    """
    table: list[Rule] = []
    for ours, theirs in convs.items():
        table += rules.conv(f"roi_heads.mask_head.{theirs}", f"mask_head/{ours}")
    predictor = "roi_heads.mask_predictor"
    table += rules.conv(f"{predictor}.conv5_mask", "mask_head/conv5_mask", "up_conv")
    table += rules.conv(f"{predictor}.mask_fcn_logits", "mask_head/mask_fcn_logits")
    return tuple(table)


_CONVS = [f"mask_fcn{i}" for i in range(1, 5)]
TORCHVISION = (
    Release(
        "torchvision's Mask R-CNN",
        (*faster_rcnn.V1, *_mask_rules({name: f"{i}.0" for i, name in enumerate(_CONVS)})),
        faster_rcnn.TRUNK,
        "torchvision",
        needs=faster_rcnn.EPSILON,
    ),
    Release(
        "torchvision's Mask R-CNN of 2019",
        (*faster_rcnn.V1_2019, *_mask_rules({name: name for name in _CONVS})),
        faster_rcnn.TRUNK,
        "torchvision",
        needs=faster_rcnn.EPSILON_2019,
    ),
)

# No command uses the tables above until the network is here.
RELEASES: tuple[Release, ...] = ()
NETWORKS: dict[str, Network] = {}
