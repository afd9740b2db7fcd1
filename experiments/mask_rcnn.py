"""Mask R-CNN (He, Gkioxari, Dollar, Girshick, ICCV 2017, arXiv:1703.06870).

    python -m experiments.mask_rcnn demo
    python -m experiments.mask_rcnn coco --data-dir=/data/coco --init=file:resnet50.pth
    python -m experiments.mask_rcnn paper_r101_fpn --data-dir=/data/coco --init=file:R-101.pkl
    python -m experiments.mask_rcnn coco --mask-branch=off --recipe=detectron2 ...
    python -m experiments.mask_rcnn keypoints --data-dir=/data/coco --init=file:R-50.pkl

--recipe chooses as a whole what codes do differently: torchvision, detectron2, or paper (the paper
with its release, Detectron). The paper's ResNets have the stride of a block in its first
convolution (--stride-in=1x1); R-50.pkl and R-101.pkl of detectron2 do too, torchvision's files do
not. Results: docs/results.md.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from dense_jax.errors import refuse
from dense_jax.models.rcnn.mask_rcnn import MaskClass, MaskLayers, MaskRCNN
from dense_jax.objectives.masks import MaskLoss, MaskRule, MaskTarget
from dense_jax.tasks import training
from dense_jax.tasks.detection import Detection
from dense_jax.tasks.rcnn_recipes import RECIPES, Recipe
from dense_jax.train.config import Count, smoke
from experiments import faster_rcnn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(faster_rcnn.Config):
    """Masks and keypoints; then the flags of Faster R-CNN and of every detector."""

    mask_branch: Literal["on", "off"] = "on"
    """off: Faster R-CNN with the same flags, which Table 3 compares."""
    mask_head: MaskLayers = "fcn"
    """fcn: convolutions. mlp, mlp3: two or three dense layers (Table 2e). c4 has fcn alone, on
    the maps that classify boxes."""
    mask_class: MaskClass = "specific"
    """Whether each class has a mask of its own, or all share one (Section 4.1)."""
    mask_loss: MaskLoss = "sigmoid"
    """sigmoid: in the object or not. softmax: each cell has one of all classes (Table 2b)."""
    keypoint_branch: Literal["off", "on"] = "off"
    """on: find the keypoints of objects too (Section 5); Table 5 compares it with and without
    --mask-branch. Needs a dataset with keypoints."""
    num_keypoints: Count | None = None
    """Keypoints of an object, as many as the dataset has. Default: 17, those of COCO's people."""

    mask_target: MaskTarget | None = None
    """What a cell should be. soft: the share of it that the object fills. bitmap: whether that is
    half. polygon: whether it is in the object's polygons, as COCO's tools draw them. Default: as
    the recipe (torchvision: soft; others: polygon, or bitmap for a dataset without polygons)."""
    train_masks: Literal["whole", "cells"] = "whole"
    """How objects are kept for soft and bitmap. whole: masks of the size of the image. cells: each
    as 112 x 112 cells of its object's box, a hundredth of the memory at 800 x 1344; targets differ
    by 0.006 on average."""

    @property
    def mask_cells(self) -> int | None:
        """As --train-masks says."""
        return 112 if self.train_masks == "cells" else None

    @property
    def target(self) -> MaskTarget:
        """What a cell should be, by default as in the code of the recipe."""
        return self.mask_target or self.differences.mask_target

    @property
    def polygons(self) -> Literal["off", "suitable", "on"]:
        """As --mask-target says, or as the recipe if the dataset has any."""
        if self.mask_branch == "off" or self.target != "polygon":
            return "off"
        return "on" if self.mask_target else "suitable"

    @property
    def differences(self) -> Recipe:
        """What the code of the recipe does differently; of the paper, Detectron."""
        return RECIPES["detectron" if self.recipe == "paper" else self.recipe]

    def __post_init__(self) -> None:
        """Raises UserError for flags that do not go together."""
        super().__post_init__()
        refuse(
            self.mask_loss == "softmax" and self.mask_class == "agnostic",
            "--mask-loss=softmax chooses among classes: give --mask-class=specific",
        )
        own = self.mask_head, self.mask_class, self.mask_loss, self.mask_target, self.train_masks
        refuse(
            self.mask_branch == "off" and own != ("fcn", "specific", "sigmoid", None, "whole"),
            "--mask-branch=off: leave out --mask-head, --mask-class, --mask-loss, --mask-target "
            "and --train-masks",
        )
        refuse(
            self.train_masks == "cells" and self.target == "polygon",
            "--train-masks=cells: polygons are kept as they are; leave it out, or give "
            "--mask-target=bitmap",
        )
        self.needs("num_keypoints", keypoint_branch="on")
        self.needs("keypoint_branch", "on", test_merge="suitable")


def _with_masks(config: faster_rcnn.Config) -> Config:
    values: Any = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return Config(**values)


_COCO = _with_masks(faster_rcnn.PRESETS["coco"])
_PEOPLE = "annotations/person_keypoints_{}2017.json"
# 160,000 steps of 16 images; the paper does not say how it warms up, Detectron does.
_PAPER = replace(
    _COCO, recipe="paper", stride_in="1x1", num_steps=160_000, step_at=(3 / 4,), warmup_steps=500
)
_DEMO = replace(_with_masks(faster_rcnn.PRESETS["demo"]), num_steps=600, eval_every=300)

PRESETS = {
    "coco": _COCO,
    "paper": _PAPER,  # ResNet-50 with a pyramid, as in most rows of Table 2
    "paper_r101_fpn": replace(_PAPER, backbone="resnet101"),
    "paper_r101_c4": replace(
        _PAPER, backbone="resnet101", neck="c4", rois_per_image=64, test_proposals=300
    ),
    # One image of each of 8 devices.
    "paper_x101_fpn": replace(
        _PAPER, backbone="resnext101_64x4d", stride_in="3x3", batch_size=8, learning_rate=0.01
    ),
    # Section 5: people, shorter sides drawn from 640 to 800, 90,000 steps.
    "keypoints": replace(
        _PAPER, keypoint_branch="on", mask_branch="off", num_steps=90_000, step_at=(2 / 3, 8 / 9),
        short_side=(640, 672, 704, 736, 768, 800),
        train_json=_PEOPLE.format("train"), val_json=_PEOPLE.format("val"),
    ),
    "nuclei": replace(
        _DEMO, dataset="nuclei", short_side=(256,), max_side=384, max_objects=100,
        anchor_sizes=(8, 16, 32, 64, 128), rois_per_image=128, batch_size=4,
    ),
    "demo": _DEMO,
    "demo_keypoints": replace(_DEMO, keypoint_branch="on", mask_branch="off", num_keypoints=5),
    "smoke": smoke(replace(_DEMO, width=1 / 32, short_side=(32,))),
}  # fmt: skip


def build(config: Config, num_classes: int, kind: Callable[..., MaskRCNN] = MaskRCNN) -> Detection:
    """Returns the task: the network, its losses and its use.

    Args:
      config: the flags.
      num_classes: number of classes with background.
      kind: builds the network; one with another trunk extends `MaskRCNN`.
    """
    draws, locates = config.mask_branch == "on", config.keypoint_branch == "on"
    num_keypoints = (config.num_keypoints or 17) if locates else 0
    model = faster_rcnn.network(
        config, num_classes, kind, draws_masks=draws, mask_layers=config.mask_head,
        mask_class=config.mask_class, num_keypoints=num_keypoints,
    )  # fmt: skip
    rule = MaskRule(config.target, config.mask_loss) if draws else None
    return faster_rcnn.detection(config, model, rule, num_keypoints)


if __name__ == "__main__":
    training.main(build, PRESETS, __doc__)
