"""Faster R-CNN (Ren, He, Girshick, Sun, NIPS 2015, arXiv:1506.01497) and Fast R-CNN.

    python -m experiments.faster_rcnn demo
    python -m experiments.faster_rcnn coco --data-dir=/data/coco --init=file:resnet50.pth
    python -m experiments.faster_rcnn paper --data-dir=/data/VOCdevkit --workdir=/runs/faster
    python -m experiments.faster_rcnn paper_alternating --backbone=zf --data-dir=/data/VOCdevkit
    python -m experiments.faster_rcnn paper --proposal-source=file --proposals=boxes.json

--recipe chooses as a whole what codes do differently: torchvision, detectron2, or paper (the
release in Caffe). Results: docs/results.md.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, TypeVar

from dense_jax.data.detection import Rounding
from dense_jax.errors import refuse
from dense_jax.infer.detections import (
    DetectionRule,
    ProposalsOf,
    first_stage,
    from_grid,
    from_input,
    from_network,
    proposals_alone,
    two_stages,
    with_edges,
)
from dense_jax.infer.views import View, merged
from dense_jax.models.rcnn.faster_rcnn import Backbone, FasterRCNN, Neck
from dense_jax.models.resnet import StrideIn
from dense_jax.objectives.masks import MaskRule
from dense_jax.objectives.rcnn import head_objective, objective
from dense_jax.ops.roi import Reduce, RoiOp
from dense_jax.tasks import training
from dense_jax.tasks.alternating import OF_HEAD, PARTS, Part, four_runs
from dense_jax.tasks.detection import Detection, DetectionConfig
from dense_jax.tasks.keypoints import KeypointDetection, KeypointsAndMasks
from dense_jax.tasks.rcnn_recipes import RECIPES, HeadLoss, Recipe, anchors, frozen_by, head_rule
from dense_jax.tasks.segmentation import InstanceSegmentation
from dense_jax.train.config import (
    AtLeastZero,
    Count,
    Factor,
    Rate,
    Share,
    Shares,
    from_scratch,
    smoke,
)
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.step import AXIS

NetworkT = TypeVar("NetworkT", bound=FasterRCNN)
_NUM_GIVEN = 2000  # Boxes of an image, about as many as selective search finds.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(DetectionConfig):
    """The paper's ablations; then the flags of every detector."""

    recipe: Literal["torchvision", "detectron2", "paper"] = "torchvision"
    """Sizes of images, anchors, matching, sampling, losses and suppression as in one of these
    codes."""
    backbone: Backbone = "resnet50"
    """Trunk."""
    neck: Neck = "fpn"
    """Maps of proposals and boxes: a feature pyramid, layer3 (c4), or the last map (c5, dc5)."""
    stride_in: StrideIn = "3x3"
    """Convolution of residual blocks that has the stride: 3x3 (torchvision, ResNeXt) or the 1x1
    before it (the ResNets of MSRA, Detectron and detectron2)."""
    heads: Literal["v1", "v2"] = "v1"
    """v2: torchvision's second version: more convolutions in the heads, normalised (needs fpn)."""
    width: Factor = 1.0
    """Factor for the number of channels; use less than 1 for trials."""
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    """Square roots of the areas of anchors, in pixels: one for each level of a pyramid."""
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Heights of anchors over their widths (Table 8)."""
    train_mode: Literal["joint", "alternating"] = "joint"
    """joint: all parts at once. alternating: four runs, each from --init or the one before: trunk
    and proposals; trunk and head, on these; then, on this trunk, proposals; the head (Section 3.2).
    """
    head_steps: Count | None = None
    """Optimiser steps of the second and fourth run of --train-mode=alternating. Default: half of
    --num-steps."""
    learn: tuple[Part, ...] = PARTS
    """Parts that learn. Without head, the run is scored by boxes of any class, and leaves the
    proposals of all images as a file for --proposals."""
    proposal_source: Literal["rpn", "grid", "file"] = "rpn"
    """rpn: the network's own (Faster R-CNN). file: those of --proposals (Fast R-CNN). grid: all
    anchors, as in one-stage detectors (Table 10)."""
    proposals: str | None = None
    """JSON file of boxes for --proposal-source=file: {"image name": [[x0, y0, x1, y1], ...]} in
    pixels, the best first, for all images."""
    num_proposals: Count | None = None
    """Largest number of boxes of an image from --proposals. Default: 2000."""
    rpn_cls: Literal["on", "off"] = "on"
    """off: evaluate with random proposals instead of the best (Table 2, no cls)."""
    rpn_reg: Literal["on", "off"] = "on"
    """off: evaluate with anchors that do not move as proposals (Table 2, no reg)."""
    rpn_lambda: AtLeastZero = 1.0
    """Factor of the proposals' box loss (Table 9)."""
    head_loss: HeadLoss = "both"
    """Losses of the head. box after class, with --init=run:DIR, is training in stages: only the
    last layer of the boxes learns (Fast R-CNN, Table 6). svm, likewise, trains support vector
    machines in place of the last layer of the classes (Table 8)."""
    test_boxes: Literal["moved", "proposals"] = "moved"
    """Whether detections are proposals moved by the head, or the proposals themselves (Fast R-CNN,
    Table 6)."""
    rois_per_image: Count | None = None
    """Boxes that train the head, of each image. Default: as the recipe (512; paper: 128)."""
    roi_op: RoiOp | None = None
    """How to crop boxes from the maps (Mask R-CNN, Table 2c). warp and pool need a single map.
    Default: as the recipe (align; paper: pool)."""
    roi_reduce: Reduce = "mean"
    """Mean or maximum of the samples in a bin, with align and warp."""
    test_scales: Shares = (1.0,)
    """Sizes of an image in evaluation, as factors of its largest, --test-side."""
    test_merge: Literal["suitable", "union"] = "suitable"
    """What several sizes are for. suitable: each box is classified where its area is closest to
    224 x 224 pixels (Fast R-CNN, Table 7). union: each size has proposals and detections of its
    own, which are suppressed together, and masks are averaged (Mask R-CNN, Appendix B)."""
    test_flip: Literal["off", "on"] = "off"
    """on: also see the mirror image in evaluation, as another size; needs --test-merge=union."""
    test_nms: Share | None = None
    """Of two detections of a class with a larger IoU, the one with the lower score is dropped.
    Default: as the recipe (0.5; Faster R-CNN's paper: 0.3)."""
    test_score: Rate = 0.05
    """Detections have scores above this."""
    test_proposals: Count | None = None
    """Number of proposals in evaluation (Table 2). Default: as the recipe."""
    trained_stages: Literal[0, 1, 2, 3, 4, 5] = 3
    """Parts of the trunk that train, counted from the last one, if --learn names the trunk (Fast
    R-CNN, Section 4.5)."""
    bn: Literal["frozen", "train"] = "frozen"
    """Batch normalisation of the trunk; train uses the statistics over all devices."""
    bn_epsilon: float = 1e-5
    """Added to variances; 0 for torchvision's own COCO weights."""
    remat: Literal["off", "on"] = "off"
    """on: compute the trunk's blocks again for gradients, which takes less memory and more time."""
    max_detections: Count = 100
    """Largest number of detections of an image."""

    def each_stage(self) -> Iterator["Config"]:
        """Yields the configurations to train in turn."""
        yield from four_runs(self) if self.train_mode == "alternating" else (self,)

    @property
    def differences(self) -> Recipe:
        """What the code of the recipe does differently."""
        return RECIPES[self.recipe]

    @property
    def rounding(self) -> Rounding:
        """As in the code of the recipe."""
        return self.differences.rounding

    @property
    def antialias(self) -> bool:
        """As in the code of the recipe."""
        return self.differences.antialias

    def __post_init__(self) -> None:
        """Raises UserError for flags that do not go together."""
        super().__post_init__()
        has_rpn, learns = self.proposal_source == "rpn", set(self.learn)
        is_alternating = self.train_mode == "alternating"
        refuse(
            is_alternating and (not has_rpn or bool(self.proposals)),
            "--train-mode=alternating makes its own proposals: leave out --proposal-source and "
            "--proposals",
        )
        self.needs("head_steps", train_mode="alternating")
        refuse(
            len(learns) < len(self.learn),
            f"--learn {' '.join(self.learn)}: a part is named twice",
        )
        refuse(
            is_alternating and (learns != set(PARTS) or self.head_loss in ("box", "svm")),
            "--train-mode=alternating trains all parts in turn: leave out --learn and "
            f"--head-loss={self.head_loss}",
        )
        refuse(
            self.learn != PARTS and "rpn" in learns and not has_rpn,
            f"--learn {' '.join(self.learn)}: there is no rpn with "
            f"--proposal-source={self.proposal_source}",
        )
        refuse(
            not learns & ({"rpn", "head"} if has_rpn else {"head"}),
            f"--learn {' '.join(self.learn)}: add {'rpn or ' if has_rpn else ''}head",
        )
        for name, value in OF_HEAD.items() if "head" not in learns else ():
            refuse(
                getattr(self, name) != value,
                f"--{name.replace('_', '-')} is of the head: leave it out, or add head to --learn",
            )
        self.needs("test_flip", "on", test_merge="union")
        refuse(
            self.test_merge == "union" and (self.test_scales, self.test_flip) == ((1.0,), "off"),
            "--test-merge=union merges several views of an image: give --test-scales or "
            "--test-flip=on",
        )
        refuse(
            self.head_loss in ("box", "svm") and self.init is None,
            f"--head-loss={self.head_loss} trains the last layer of a trained network alone: give "
            "--init=run:DIR",
        )
        from_file = self.proposal_source == "file"
        refuse(
            from_file and not self.proposals,
            "--proposal-source=file needs boxes: give --proposals=FILE",
        )
        refuse(
            bool(self.proposals) and not from_file,
            f"--proposals is not read with --proposal-source={self.proposal_source}: give "
            "--proposal-source=file",
        )
        refuse(
            self.num_proposals is not None and not from_file,
            "--num-proposals counts boxes of a file: give --proposal-source=file, or leave it out",
        )
        of_network = (self.rpn_cls, self.rpn_reg, self.rpn_lambda) != ("on", "on", 1.0)
        refuse(
            self.proposal_source != "rpn" and of_network,
            f"--rpn-cls, --rpn-reg and --rpn-lambda change proposals of the network: leave them "
            f"out with --proposal-source={self.proposal_source}",
        )
        refuse(
            "rpn" not in learns and self.rpn_lambda != 1.0,
            "--rpn-lambda weighs a loss of the proposals: leave it out, or add rpn to --learn",
        )
        refuse(
            self.proposal_source == "grid" and self.test_proposals is not None,
            "--test-proposals takes the best, and the boxes of a grid have no order: leave it out",
        )


_COCO = Config(
    dataset="coco", batch_size=16, learning_rate=0.02, weight_decay=1e-4, num_steps=90_000,
    schedule="step", step_at=(2 / 3, 8 / 9), warmup_steps=1000, eval_every=10_000,
)  # fmt: skip
_PAPER = replace(
    _COCO, recipe="paper", dataset="voc2012_objects", backbone="vgg16", neck="c5",
    normalisation="fast_rcnn", anchor_sizes=(128, 256, 512), short_side=(600,), max_side=1000,
    batch_size=2, learning_rate=1e-3, weight_decay=5e-4, bias_lr=2.0, num_steps=70_000,
    step_at=(5 / 7,), warmup_steps=0,
)  # fmt: skip
_SCRATCH = from_scratch(
    Config(backbone="resnet14", bn="train", trained_stages=5, width=0.25, short_side=(96,),
           max_side=96, anchor_sizes=(12, 20, 32, 48, 64), max_objects=8, rois_per_image=64,
           learning_rate=2e-3)
)  # fmt: skip

PRESETS = {
    "coco": _COCO,
    "paper": _PAPER,
    # The release trains proposals on one image at a time, and the head on two.
    "paper_alternating": replace(
        _PAPER, train_mode="alternating", num_steps=80_000, step_at=(3 / 4,)
    ),
    "demo": replace(_SCRATCH, num_steps=1200, eval_every=400, batch_size=8),
    "smoke": smoke(replace(_SCRATCH, width=1 / 32, short_side=(32,))),
}  # fmt: skip


def build(config: Config, num_classes: int) -> Detection:
    """Returns the task: the network, its losses and its use."""
    return detection(config, network(config, num_classes, FasterRCNN))


def network(
    config: Config, num_classes: int, kind: Callable[..., NetworkT], **options: Any
) -> NetworkT:
    """Returns the network, a `FasterRCNN` or one with more options."""
    recipe, has_rpn = config.differences, config.proposal_source == "rpn"
    return kind(
        num_classes, backbone=config.backbone, neck=config.neck, heads=config.heads,
        stride_in=config.stride_in,
        anchor_sizes=config.anchor_sizes if has_rpn else (), anchor_ratios=config.anchor_ratios,
        objectness=recipe.objectness, bn=config.bn, bn_epsilon=config.bn_epsilon,
        trained_stages=config.trained_stages, trunk_learns="trunk" in config.learn,
        roi_op=config.roi_op or recipe.roi_op, roi_reduce=config.roi_reduce,
        roi_aligned=recipe.roi_aligned, roi_samples=recipe.roi_samples,
        remat=config.remat == "on", width=config.width, axis_name=AXIS, dtype=config.dtype,
        **options,
    )  # fmt: skip


def detection(
    config: Config, model: FasterRCNN, mask_rule: MaskRule | None = None, num_keypoints: int = 0
) -> Detection:
    """Returns the task of a network; with a rule for masks, one that draws them; or keypoints."""
    recipe, source = config.differences, config.proposal_source
    has_rpn, is_given, has_head = source == "rpn", source == "file", "head" in config.learn
    with_anchors = model.clone(anchor_sizes=config.anchor_sizes)
    with_anchors.check()
    anchors_of = functools.partial(anchors, with_anchors, recipe.anchors)

    # What is proposed and found.
    test = replace(
        recipe.test,
        count=config.test_proposals or recipe.test.count,
        is_ranked=config.rpn_cls == "on",
        is_moved=config.rpn_reg == "on",
    )
    one = recipe.test.plus_one
    proposals_of: ProposalsOf = {
        "rpn": from_network(anchors_of, test),
        "grid": from_grid(anchors_of, plus_one=one),
        "file": functools.partial(from_input, plus_one=one),
    }[source]
    first = first_stage(model, anchors_of, proposals_of)
    many = first_stage(model, anchors_of, from_network(anchors_of, recipe.train))
    first_seen, many_seen = with_edges(first, one), with_edges(many, one)
    forward, notes = proposals_alone(first_seen, config.max_detections), {}
    if has_head:
        rule = replace(
            recipe.detections,
            count=config.max_detections,
            max_iou=config.test_nms or recipe.detections.max_iou,
            min_score=config.test_score,
            is_moved=config.test_boxes == "moved",
            one_against_rest=config.head_loss == "svm",
        )
        notes = _in_words(config, rule)
        masks = mask_rule.loss if mask_rule else None
        if config.test_merge == "union":
            flips = (False, True) if config.test_flip == "on" else (False,)
            views = [View(scale, flip) for scale in config.test_scales for flip in flips]
            forward = merged(model, first, rule, views, masks)
        else:
            keypoints = num_keypoints > 0
            forward = two_stages(model, first, rule, config.test_scales, masks, keypoints)

    # What learns.
    anchor_rule = replace(recipe.anchor_rule, box_weight=config.rpn_lambda)
    roi_rule = head_rule(recipe.roi_rule, config.head_loss, config.rois_per_image)
    branches = mask_rule, num_keypoints > 0
    losses = head_objective(roi_rule, anchors_of if source == "grid" else None, *branches)
    if has_rpn:
        losses = objective(
            anchors_of,
            anchor_rule if "rpn" in config.learn else None,
            recipe.train,
            roi_rule if has_head else None,
            *branches,
        )
    frozen = [*model.frozen, *frozen_by(config.head_loss)]
    frozen += ["^rpn/"] if has_rpn and "rpn" not in config.learn else []
    frozen += [] if has_head else ["^(box|mask|keypoint)_(head|predictor)/"]

    num_given = config.num_proposals or _NUM_GIVEN
    draws, locates = mask_rule is not None and has_head, num_keypoints > 0 and has_head
    kind: Callable[..., Detection] = {
        (False, False): Detection,
        (True, False): InstanceSegmentation,
        (False, True): KeypointDetection,
        (True, True): KeypointsAndMasks,
    }[draws, locates]
    own: dict[str, Any] = {"convention": recipe.paste} if draws else {}
    own |= {"num_keypoints": num_keypoints} if locates else {}
    return kind(
        config,
        model,
        config.transforms(
            masks=draws,
            keypoints=locates,
            proposals=config.proposals if is_given else None,
            num_proposals=num_given,
        ),
        groups=[ParamGroup(pattern, lr=0.0) for pattern in frozen],
        objective=losses,
        forward=forward,
        finds_any_class=not has_head,
        first_stage=None if is_given else first_seen,
        many_proposals=many_seen if has_rpn else None,
        anchor_rule=anchor_rule if has_rpn else None,
        notes=notes,
        given=config.proposals if is_given else None,
        num_given=min(num_given, config.test_proposals or num_given),
        **own,
    )


def _in_words(config: Config, rule: DetectionRule) -> dict[str, str]:
    """Returns lines of the protocol card: how detections are chosen."""
    words = f"scores above {rule.min_score:g}, IoU within a class at most {rule.max_iou:g}, "
    lines = {"detections": words + f"at most {rule.count} of an image"}
    if config.test_scales != (1.0,) or config.test_flip == "on":
        sizes = ", ".join(f"{scale:g}" for scale in config.test_scales)
        flips = ", each also flipped" if config.test_flip == "on" else ""
        how = {"union": "boxes suppressed together", "suitable": "one for each box"}
        lines["views"] = f"sizes {sizes} of the largest{flips}; {how[config.test_merge]}"
    return lines


if __name__ == "__main__":
    training.main(build, PRESETS, __doc__)
