"""What published codes of Faster and Mask R-CNN do differently, as tables.

Sources: pytorch/vision: torchvision/models/detection; facebookresearch/detectron2:
detectron2/config/defaults.py; rbgirshick/py-faster-rcnn: lib/fast_rcnn/config.py and
models/pascal_voc/VGG16/faster_rcnn_end2end.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

from dense_jax.data.detection import Rounding
from dense_jax.infer.detections import DetectionRule
from dense_jax.infer.pasting import Convention
from dense_jax.objectives.masks import MaskTarget
from dense_jax.objectives.rcnn import AnchorRule, RoiRule
from dense_jax.ops import anchors as anchor_ops
from dense_jax.ops.proposals import ProposalRule
from dense_jax.ops.roi import RoiOp


class Recipe(NamedTuple):
    """What the codes do differently.

    Attributes:
      anchors: convention of the anchors.
      anchor_rule: which anchors train.
      roi_rule: which proposals train the head.
      train: proposals in training.
      test: proposals in evaluation.
      detections: the final choice.
      roi_op, roi_aligned, roi_samples: how boxes are cropped; see `FasterRCNN`.
      objectness: see `dense_jax.models.rcnn.rpn.ProposalHead`.
      rounding: of the sides of resized images; see `dense_jax.data.detection.short_side_size`.
      antialias: of resized images; see `dense_jax.data.transforms.resize_image`.
      mask_target: see `dense_jax.objectives.masks.MaskRule`.
      paste: how masks come into images; see `dense_jax.infer.pasting`.
    """

    anchors: anchor_ops.Convention
    anchor_rule: AnchorRule
    roi_rule: RoiRule
    train: ProposalRule
    test: ProposalRule
    detections: DetectionRule
    roi_op: RoiOp = "align"
    roi_aligned: bool = False
    roi_samples: int | None = 2
    objectness: Literal["sigmoid", "softmax"] = "sigmoid"
    rounding: Rounding = "nearest"
    antialias: bool = False
    mask_target: MaskTarget = "soft"
    paste: Convention = "torchvision"


RECIPES = {
    "torchvision": Recipe(
        "torchvision", AnchorRule(), RoiRule(),
        ProposalRule(2000, 2000), ProposalRule(1000, 1000), DetectionRule(), rounding="down",
    ),
    "detectron2": Recipe(
        "detectron2", AnchorRule(beta=0.0, fixed_count=True), RoiRule(beta=0.0),
        ProposalRule(2000, 1000, min_side=0.0), ProposalRule(1000, 1000, min_side=0.0),
        DetectionRule(min_side=0.0), roi_aligned=True, roi_samples=None, antialias=True,
        mask_target="polygon", paste="detectron2",
    ),
    # The paper of Mask R-CNN and its release, Detectron, but for its widths with "+ 1".
    "detectron": Recipe(
        "detectron2", AnchorRule(inside=True), RoiRule(beta=1.0),
        ProposalRule(2000, 2000, min_side=0.0), ProposalRule(1000, 1000, min_side=0.0),
        DetectionRule(), mask_target="polygon",
    ),
    # py-faster-rcnn, end to end: models/pascal_voc/VGG16/faster_rcnn_end2end. There, 16 pixels and
    # the 1 of `plus_one` of known boxes are of the image before it is resized; here, after.
    "paper": Recipe(
        "caffe", AnchorRule(inside=True, plus_one=True),
        RoiRule(sample=128, max_foreground=32, beta=1.0, plus_one=True),
        ProposalRule(12_000, 2000, min_side=16.0, plus_one=True),
        ProposalRule(6000, 300, min_side=16.0, plus_one=True),
        DetectionRule(max_iou=0.3, plus_one=True), roi_op="pool", objectness="softmax",
    ),
}  # fmt: skip


HeadLoss = Literal["both", "class", "box", "svm"]
"""Losses of the head: of classes and boxes, of one of them, or of support vector machines."""
# The last layer that alone learns, on a network that has been trained.
_ALONE = {"box": "bbox_pred", "svm": "cls_score"}


def head_rule(rule: RoiRule, loss: HeadLoss, sample: int | None = None) -> RoiRule:
    """Returns the rule of a recipe for some losses of the head.

    At most a quarter of the boxes have a class. For support vector machines these are the objects'
    own boxes, against boxes that hardly touch any (Girshick et al., "Rich feature hierarchies",
    CVPR 2014, arXiv:1311.2524, Section 2.3).

    Args:
      rule: of the recipe.
      loss: the losses.
      sample: number of boxes of an image; None for the recipe's.
    """
    if loss == "svm":
        rule = dataclasses.replace(rule, foreground=0.999, background=(0.0, 0.3), hinge=True)
    sample = sample or rule.sample
    return dataclasses.replace(
        rule,
        sample=sample,
        max_foreground=max(1, sample // 4),
        class_weight=float(loss != "box"),
        box_weight=float(loss in ("both", "box")),
    )


def frozen_by(loss: HeadLoss) -> tuple[str, ...]:
    """Returns regular expressions for the paths of what does not learn under some losses."""
    return (f"^(?!box_predictor/{_ALONE[loss]}/)",) if loss in _ALONE else ()


class HasAnchors(Protocol):
    """The part of a detector that says where its anchors are."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each map."""
        ...

    @property
    def level_sizes(self) -> tuple[tuple[float, ...], ...]:
        """Square roots of the areas of the anchors of each map."""
        ...

    @property
    def anchor_ratios(self) -> tuple[float, ...]:
        """Heights of anchors over their widths."""
        ...


def anchors(
    model: HasAnchors, convention: anchor_ops.Convention, size: Any, grids: Sequence[Any]
) -> tuple[Any, ...]:
    """Returns the anchors of each map, [N_l, 4].

    Args:
      model: says their sizes, ratios and strides.
      convention: of a code; see `dense_jax.ops.anchors`.
      size: height and width of the padded images.
      grids: height and width of each map.
    """
    strides = model.strides
    # torchvision divides the size of the image by that of the map. ZF's maps have a cell more.
    is_exact = all(
        side_of_grid == -(-side // stride)
        for grid, stride in zip(grids, strides, strict=True)
        for side_of_grid, side in zip(grid, size, strict=True)
    )
    if convention == "torchvision" and is_exact:
        strides = anchor_ops.torchvision_strides(size, grids)
    return anchor_ops.pyramid(
        grids, strides, sizes=model.level_sizes, ratios=model.anchor_ratios, convention=convention
    )
