"""Hypercolumns (Hariharan, Arbelaez, Girshick, Malik, CVPR 2015, arXiv:1411.5752).

    python -m experiments.hypercolumns demo
    python -m experiments.hypercolumns demo_box --grid=1
    python -m experiments.hypercolumns camvid --data-dir=/data/camvid --taps=fc7
    python -m experiments.hypercolumns paper --data-dir=/data/VOCdevkit --workdir=/runs/hyper

--mode=semantic labels whole images by the same classifiers. --mode=box is the authors' task: the
mask of an object in a given box of a given category. Results: docs/results.md has every run with
its command, device and the paper's figure.

Differences: (1) Boxes are those of the ground truth, moved at random, and their categories are
known; the paper's are detections, slightly enlarged, so AP^r is not measured. Without instances in
the data, connected parts of a class are its objects. (2) fc7 of a box is computed from a bilinear
crop; the release rounds boxes to whole units. (3) Images are drawn uniformly; the release draws a
category first. (4) Masks are thresholded per pixel, not per superpixel. (5) The learning rate
multiplies the momentum and not, as in Caffe, the gradient; equal at the constant rates used here.
(6) The paper presets need ImageNet or Fast R-CNN weights; --init takes ImageNet's.
"""

import dataclasses
from typing import Literal

from flax import linen as nn

from dense_jax.data.box_masks import SampleBoxes
from dense_jax.data.transforms import Transform, whole_images
from dense_jax.errors import UserError
from dense_jax.models.hypercolumns import (
    BoxHypercolumns,
    Hypercolumns,
    Joint,
    Kernels,
    Mix,
    Taps,
    TapScale,
)
from dense_jax.tasks import box_masks, prediction, semantic
from dense_jax.train.config import FROM_SCRATCH, SMOKE, RunConfig
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.state import TrainState
from dense_jax.train.step import AXIS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Flags of the paper's ablations, then the shared ones."""

    # The network.
    mode: Literal["semantic", "box"] = "semantic"
    """Label images, or find the mask of the object in each box (the paper)."""
    backbone: Literal["vgg16", "alexnet"] = "vgg16"
    """The paper's O-Net or T-Net. Boxes are of vgg16 only."""
    taps: Taps = "all"
    """Layers that are classified (ablation: without one of them, fc7 alone). Boxes have pool3 and
    pool4, as released, in place of pool2 and conv4."""
    tap_kernel: Kernels = (1, 1, 1)
    """Kernel sizes of the classifiers of pool2, conv4 and fc7; released: 3 1 1."""
    tap_scale: TapScale = "none"
    """How tapped layers are scaled; fixed: 0.0027, 0.063 and 1 (released)."""
    grid: Literal[1, 2, 5, 10] = 1
    """K of the K x K classifiers over an image or box; paper 10, release 5 (Section 4)."""
    mix: Mix = "after_prob"
    """Average neighbouring classifiers' probabilities (Section 4), or their scores."""
    joint: Joint = "end_to_end"
    """Train the mixture, or each classifier on its own cell (Section 4's simple scheme)."""
    heatmap: int = 50
    """Height and width of a box's heat map (Section 3)."""
    width: float = 1.0
    """Channel multiplier; below 1 for trials."""
    dropout_rate: float = 0.5
    """Dropout after fc6 and fc7."""

    # Training.
    trunk: Literal["trained", "frozen"] = "trained"
    """frozen trains the classifiers only (released)."""
    fc7_lr: float = 1.0
    """Learning rate of fc7's classifier over that of the others (released: 0.1)."""
    boxes_per_image: int = 5
    """Boxes drawn for each image of a batch, with --mode=box."""
    box_iou: float = 0.7
    """Least IoU of a box with its object's own, in training and evaluation; 1 does not move any."""
    box_weight: Literal["on", "off"] = "on"
    """Boxes weigh min(area / 224^2, 1) (released), or all the same."""
    mask_threshold: float = 0.5
    """Least probability of the pixels of a mask."""
    augment: Literal["none", "mirror", "mirror_scale"] = "none"
    """mirror_scale is for training from scratch."""
    crop: tuple[int, int] | None = None
    """Height and width of training images; None takes whole images (all of one size)."""

    def __post_init__(self) -> None:
        """Raises UserError for values that no network or batch can have."""
        super().__post_init__()
        for name, good, want in (
            ("width", self.width > 0, "a factor above 0"),
            ("dropout_rate", 0 <= self.dropout_rate < 1, "a value in [0, 1)"),
            ("fc7_lr", self.fc7_lr >= 0, "a factor of at least 0"),
            ("heatmap", self.heatmap >= 1, "at least 1"),
            ("boxes_per_image", self.boxes_per_image >= 1, "at least 1"),
            ("box_iou", 0 < self.box_iou <= 1, "a value in (0, 1]"),
            ("mask_threshold", 0 < self.mask_threshold <= 1, "a value in (0, 1]"),
            ("crop", self.crop is None or min(self.crop) >= 1, "at least 1 1"),
            ("tap_kernel", all(k % 2 for k in self.tap_kernel), "odd sizes, such as 3 1 1"),
        ):
            if not good:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}={getattr(self, name)}: give {want}")


# Without pretrained weights: inputs of unit scale, and a fast start.
_SCRATCH = Config(
    **FROM_SCRATCH,
    learning_rate=2e-3,
    dropout_rate=0.1,
    width=0.125,
)
# The release: one image and five boxes per forward pass, 20 of them per step.
_RELEASE = Config(
    dataset="voc2012_sbd",
    normalisation="caffe",
    tap_scale="fixed",
    batch_size=20,
    accumulate=20,
    learning_rate=1e-3,
    momentum=0.9,
    weight_decay=1e-3,
    bias_lr=2.0,
    num_steps=10_000,
)

PRESETS = {
    "paper": dataclasses.replace(_RELEASE, crop=(500, 500), augment="mirror", eval_batch_size=4),
    # At 1.6 the shorter side of most VOC images, 375, is the release's 600.
    "sds_vgg": dataclasses.replace(
        _RELEASE, mode="box", grid=5, tap_kernel=(3, 1, 1), trunk="frozen", fc7_lr=0.1, scale=1.6,
        crop=(800, 800), loss_norm="batch",
    ),
    "camvid": dataclasses.replace(
        _SCRATCH, dataset="camvid", scale=0.5, augment="mirror_scale", crop=(180, 240),
        width=0.25, learning_rate=1e-3, num_steps=1000, eval_every=500, save_every=500,
    ),
    "demo": dataclasses.replace(
        _SCRATCH, num_steps=2000, eval_every=500, save_every=500, eval_batch_size=16,
    ),
    "demo_box": dataclasses.replace(
        _SCRATCH, mode="box", grid=5, tap_kernel=(3, 1, 1), box_weight="off", num_steps=1000,
        eval_every=500, save_every=500,
    ),
    "smoke": dataclasses.replace(
        _SCRATCH, **SMOKE, width=1 / 32, grid=2, taps="pool2_conv4",
    ),
    "smoke_box": dataclasses.replace(
        _SCRATCH, **SMOKE, mode="box", width=1 / 32, grid=2, heatmap=10,
    ),
}  # fmt: skip


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The network of a configuration; of boxes, class 0 is the background."""
    shared = dict(
        taps=config.taps,
        tap_kernels=config.tap_kernel,
        tap_scale=config.tap_scale,
        grid=config.grid,
        mix=config.mix,
        joint=config.joint,
        width=config.width,
        dropout_rate=config.dropout_rate,
        axis_name=AXIS,
        dtype=config.dtype,
    )
    if config.mode == "semantic":
        return Hypercolumns(num_classes, backbone=config.backbone, **shared)
    if config.backbone != "vgg16":
        raise UserError("--mode=box is built on VGG-16: give --backbone=vgg16 with it")
    if config.tap_kernel[2] != 1:
        raise UserError("--mode=box: fc7 of a box is one unit; give --tap-kernel 3 1 1 or 1 1 1")
    return BoxHypercolumns(num_classes - 1, heatmap=config.heatmap, **shared)


def build_groups(config: Config) -> tuple[ParamGroup, ...]:
    """The frozen trunk, and the rates of fc7's classifier."""
    frozen = (ParamGroup(r"^(conv\d(_\d)?|fc[67])/", lr=0.0),) if config.trunk == "frozen" else ()
    if config.fc7_lr == 1:
        return frozen
    head = r"^(score_fc7|fcfc7)/"
    bias = ParamGroup(f"{head}bias", lr=config.fc7_lr * config.bias_lr, decay=0.0)
    return (*frozen, bias, ParamGroup(f"{head}kernel", lr=config.fc7_lr))


def build_transforms(config: Config) -> list[Transform]:
    """Training transforms, scale and colour before cropping and mirroring; boxes last."""
    transforms = whole_images(config.normalisation, config.scale, config.augment, config.crop)
    if config.mode == "box":
        is_weighed = config.box_weight == "on"
        transforms.append(
            SampleBoxes(config.boxes_per_image, config.heatmap, config.box_iou, is_weighed)
        )
    return transforms


def test_time(config: Config) -> str:
    """How the network is used, in words."""
    if config.grid == 1:
        return prediction.ONE_PASS
    return f"{prediction.ONE_PASS}; {config.grid}x{config.grid} classifiers span each image"


def build_predict(config: Config, model: nn.Module) -> prediction.PredictFn:
    """One pass over the images, at their scale; the grid spans them without their padding."""
    if config.mode == "box":
        raise UserError("a run with --mode=box labels boxes, not images; its own command scores it")
    return prediction.whole_image(model, config.scale, sized=True)


def main(config: Config) -> TrainState:
    """Trains, evaluates and reports."""
    dataset = semantic.load_dataset(config)
    model = build_model(config, dataset.classes.num_classes)
    transforms, groups = build_transforms(config), build_groups(config)
    if config.mode == "box":
        return box_masks.train_and_evaluate(
            config,
            model,
            dataset,
            transforms,
            groups=groups,
            min_iou=config.box_iou,
            threshold=config.mask_threshold,
        )
    return semantic.train_and_evaluate(
        config,
        model,
        dataset,
        transforms,
        groups=groups,
        predict=build_predict(config, model),
        test_time=test_time(config),
    )


if __name__ == "__main__":
    semantic.run(main, PRESETS, __doc__)
