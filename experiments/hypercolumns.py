"""Hypercolumns (Hariharan, Arbelaez, Girshick, Malik, CVPR 2015, arXiv:1411.5752).

    python -m experiments.hypercolumns demo
    python -m experiments.hypercolumns demo_box --grid=1
    python -m experiments.hypercolumns camvid --data-dir=/data/camvid --taps=fc7
    python -m experiments.hypercolumns paper --data-dir=/data/VOCdevkit --workdir=/runs/hyper

--mode=semantic labels whole images with the same classifiers. --mode=box is the authors' task: the
mask of an object from its box and category. Results: docs/results.md has every run with its
command, device and the paper's figure.

Differences: (1) Boxes are the ground truth, shifted at random, with known categories; in the paper
they are enlarged detections, so AP^r is not measured here. Without instances in the data, connected
components of a class are its objects. (2) fc7 of a box comes from a bilinear crop; the release
rounds boxes to whole units. (3) Images are drawn uniformly; the release draws a category first. (4)
Masks are thresholded per pixel, not per superpixel. (5) The learning rate multiplies the momentum;
in Caffe it multiplies the gradient. At constant rates, as here, both are equal. (6) The paper
presets need ImageNet or Fast R-CNN weights; --init takes ImageNet's.
"""

import dataclasses
from dataclasses import replace
from typing import Annotated, Literal

from dense_jax.data.box_masks import SampleBoxes
from dense_jax.errors import refuse
from dense_jax.infer.whole_image import ONE_PASS, whole_image
from dense_jax.models import hypercolumns
from dense_jax.models.hypercolumns import BoxHypercolumns, Hypercolumns
from dense_jax.tasks import training
from dense_jax.tasks.box_masks import BoxMasks
from dense_jax.tasks.semantic import Semantic, SemanticConfig
from dense_jax.train.config import AtLeastZero, Count, Limit, Rate, Share, from_scratch, smoke
from dense_jax.train.schedules import ParamGroup, own_rate
from dense_jax.train.step import AXIS

Kernels = Annotated[
    hypercolumns.Kernels, Limit(lambda x: all(k % 2 for k in x), "odd sizes, such as 3 1 1")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SemanticConfig):
    """The paper's ablations; then the flags of every semantic run."""

    mode: Literal["semantic", "box"] = "semantic"
    """semantic labels images; box predicts the mask of the object in each box (the paper)."""
    backbone: Literal["vgg16", "alexnet"] = "vgg16"
    """The paper's O-Net or T-Net. --mode=box needs vgg16."""
    taps: hypercolumns.Taps = "all"
    """Layers with a classifier (ablation: without one of them, fc7 alone). --mode=box takes pool3
    and pool4 instead of pool2 and conv4, as released."""
    tap_kernel: Kernels = (1, 1, 1)
    """Kernel sizes of the classifiers of pool2, conv4 and fc7; released: 3 1 1."""
    tap_scale: hypercolumns.TapScale = "none"
    """How to scale tapped layers; fixed: 0.0027, 0.063 and 1 (released)."""
    grid: Literal[1, 2, 5, 10] = 1
    """K of the K x K classifiers over an image or box; paper 10, release 5 (Section 4)."""
    mix: hypercolumns.Mix = "after_prob"
    """Average neighbouring classifiers' probabilities (Section 4), or their scores."""
    joint: hypercolumns.Joint = "end_to_end"
    """Train the mixture, or each classifier on its own cell (Section 4's simple scheme)."""
    heatmap: Count = 50  # Height and width of a box's heat map (Section 3).
    dropout_rate: Rate = 0.5  # Dropout after fc6 and fc7.
    trunk: Literal["trained", "frozen"] = "trained"
    """frozen trains the classifiers only (released)."""
    fc7_lr: AtLeastZero = 1.0
    """Learning-rate factor of fc7's classifier (released: 0.1)."""
    boxes_per_image: Count = 5  # Boxes drawn for each image of a batch, with --mode=box.
    box_iou: Share = 0.7
    """Least IoU of a box with the true box, in training and evaluation; 1 shifts no box."""
    box_weight: Literal["on", "off"] = "on"
    """on: boxes have the weight min(area / 224^2, 1) (released). off: equal weights."""
    mask_threshold: Share = 0.5  # Least probability of the pixels of a mask.

    def __post_init__(self) -> None:
        """Raises UserError for flags that do not go together."""
        super().__post_init__()
        self.needs("mode", "box", backbone="vgg16", post="none")
        is_wide = self.mode == "box" and self.tap_kernel[2] != 1
        refuse(is_wide, "--mode=box: fc7 of a box is one unit; give --tap-kernel 3 1 1 or 1 1 1")


# Without pretrained weights: inputs of unit scale, and fast optimisation.
_SCRATCH = from_scratch(Config(learning_rate=2e-3, dropout_rate=0.1, width=0.125))
# The release: one image and five boxes per forward pass, 20 of them per step.
_RELEASE = Config(
    dataset="voc2012_sbd", normalisation="caffe", tap_scale="fixed", batch_size=20, accumulate=20,
    learning_rate=1e-3, weight_decay=1e-3, bias_lr=2.0, num_steps=10_000,
)  # fmt: skip

PRESETS = {
    "paper": replace(_RELEASE, crop=(500, 500), augment="mirror", eval_batch_size=4),
    # A scale of 1.6 gives the shorter side of most VOC images, 375, the release's 600.
    "sds_vgg": replace(
        _RELEASE, mode="box", grid=5, tap_kernel=(3, 1, 1), trunk="frozen", fc7_lr=0.1, scale=1.6,
        crop=(800, 800), loss_norm="batch",
    ),
    "camvid": replace(
        _SCRATCH, dataset="camvid", scale=0.5, augment="mirror_scale", crop=(180, 240),
        width=0.25, learning_rate=1e-3, eval_every=500,
    ),
    "demo": replace(_SCRATCH, num_steps=2000, eval_every=500, eval_batch_size=16),
    "demo_box": replace(
        _SCRATCH, mode="box", grid=5, tap_kernel=(3, 1, 1), box_weight="off", eval_every=500,
    ),
    "smoke": smoke(replace(_SCRATCH, width=1 / 32, grid=2, taps="pool2_conv4")),
    "smoke_box": smoke(replace(_SCRATCH, mode="box", width=1 / 32, grid=2, heatmap=10)),
}  # fmt: skip


def build(config: Config, num_classes: int) -> Semantic | BoxMasks:
    """Returns the task: network, training and use. With --mode=box class 0 is the background."""
    options = dict(
        taps=config.taps, tap_kernels=config.tap_kernel, tap_scale=config.tap_scale,
        grid=config.grid, mix=config.mix, joint=config.joint, width=config.width,
        dropout_rate=config.dropout_rate, axis_name=AXIS, dtype=config.dtype,
    )  # fmt: skip
    groups = [ParamGroup(r"^(conv\d(_\d)?|fc[67])/", lr=0.0)] if config.trunk == "frozen" else []
    if config.fc7_lr != 1:
        groups += own_rate("^(score_fc7|fcfc7)", config.fc7_lr, config.bias_lr)
    transforms = config.whole_images()
    if config.mode == "semantic":
        model = Hypercolumns(num_classes, backbone=config.backbone, **options)
        # The grid covers images without their padding.
        forward = whole_image(model, config.scale, sized=True)
        spans = f"; {config.grid}x{config.grid} classifiers span each image"
        words = ONE_PASS + (spans if config.grid > 1 else "")
        return Semantic(config, model, transforms, groups=groups, forward=forward, test_time=words)
    model = BoxHypercolumns(num_classes - 1, heatmap=config.heatmap, **options)
    weigh = config.box_weight == "on"
    transforms.append(SampleBoxes(config.boxes_per_image, config.heatmap, config.box_iou, weigh))
    return BoxMasks(
        config,
        model,
        transforms,
        groups=groups,
        min_iou=config.box_iou,
        threshold=config.mask_threshold,
    )


if __name__ == "__main__":
    training.main(build, PRESETS, __doc__)
