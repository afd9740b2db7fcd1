"""DeepLab v2 (Chen, Papandreou, Kokkinos, Murphy, Yuille, PAMI 2017, arXiv:1606.00915), v1, and v3.

    python -m experiments.deeplab demo
    python -m experiments.deeplab camvid --data-dir=/data/camvid --head=aspp_l
    python -m experiments.deeplab paper --data-dir=/data/VOCdevkit --init=run:runs/coco
    python -m dense_jax evaluate --run runs/deeplab-paper --crf

v1 (ICLR 2015, arXiv:1412.7062) is the presets paper_v1 and paper_v1_msc; v2 on VGG-16 is paper_vgg.
--head=deeplabv3 and fcn are torchvision's networks of these names (v3: arXiv:1706.05587).
Results: docs/results.md has every run with its command, device and the paper's figure.

Differences: (1) The learning rate multiplies the momentum and not, as in Caffe, the gradient. (2)
Poly falls at every step; some ports let it fall every ten. (3) Crops and scales are of 8 m + 1
pixels and resized corner to corner everywhere, so that all units sit on pixels. (4) The paper
presets need weights from ImageNet, and COCO for ResNet-101 (about 2 points), to reach the paper's
scores; --init takes those, or another run, such as one on COCO.
"""

import dataclasses
import functools
from dataclasses import field
from typing import Literal

from flax import linen as nn

from dense_jax.data.normalise import Normalise
from dense_jax.data.transforms import RandomCrop, RandomFlip, RandomScale, Transform
from dense_jax.errors import UserError
from dense_jax.infer.crf import with_crf
from dense_jax.infer.tiles import overlap_tile
from dense_jax.losses import LossTerm
from dense_jax.models import deeplab
from dense_jax.models.deeplab import Backbone, DeepLab
from dense_jax.models.deeplabv3 import ResNetSegmenter
from dense_jax.ops.crf import CrfParams
from dense_jax.tasks import prediction, semantic
from dense_jax.train.config import FROM_SCRATCH, SMOKE, RunConfig
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.state import TrainState
from dense_jax.train.step import AXIS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Flags of the papers' ablations, then the shared ones."""

    # The network.
    backbone: Backbone = "vgg16"
    """Trunk (v2, Tables 3 and 4). torchvision's heads need a ResNet."""
    head: Literal["fc7x7", "fc4x4", "largefov", "aspp_s", "aspp_l", "deeplabv3", "fcn"] = "largefov"
    """fc6 with another window and dilation (v1, Table 1 b; v2, Table 1), pyramids of four dilations
    (v2, Table 3), or torchvision's heads."""
    rates: tuple[int, ...] | None = None
    """Dilations in place of the head's own, one for each branch (8 with fc4x4: v2, Table 1)."""
    pool5a: Literal["off", "on"] = "off"
    """Average pooling in front of VGG-16's fc6, as in v1's release."""
    msc_features: Literal["off", "on"] = "off"
    """Score the image and four poolings of VGG-16 too (v1, Section 4.2)."""
    msc_inputs: Literal["off", "max"] = "off"
    """See images at scales 1, 0.75 and 0.5 and take the maximum of the scores (v2, Table 4)."""
    upsample: Literal["align_corners", "half_pixel"] = "align_corners"
    """How scores are enlarged; half_pixel moves them by up to 3.5 pixels, a mistake of ports."""
    stride_in: Literal["published", "1x1", "3x3"] = "published"
    """Convolutions of a ResNet that stride; published: 1x1 in DeepLab v2, 3x3 in torchvision's."""
    bn: Literal["frozen", "train"] = "frozen"
    """Batch normalisation of ResNets: as loaded (v2), or trained."""
    aux: Literal["off", "on"] = "off"
    """A second loss on layer3 of torchvision's networks, weight 0.5."""
    width: float = 1.0
    """Channel multiplier; below 1 for trials."""
    dropout_rate: float | None = None
    """Dropout; None: as published, 0.5 after fc6 and fc7, 0.5 or 0.1 in torchvision's heads."""

    # Training.
    loss_at: Literal["units", "pixels"] = "units"
    """Compare scores with the label of every eighth pixel (v1, Section 3.2), or enlarge first."""
    head_lr: float = 10.0
    """Learning rate of the classifier (of torchvision's aux head) over that of the rest."""
    finetune: Literal["all", "new"] = "all"
    """new trains the classifier and the multi-scale features only (v1, Section 4.2)."""
    augment: Literal["none", "mirror", "mirror_scale"] = "mirror"
    """Mirror left and right, and resize by 0.5 to 1.5 (v2, Table 4: Aug)."""
    crop: tuple[int, int] | None = (321, 321)
    """Height and width of training images, 8 m + 1; None takes whole images (all of one size)."""

    # Prediction.
    tile: int | None = None
    """Side of overlapping tiles for large images (v2, Section 4.4); None takes whole images."""
    tile_context: int = 64
    """Pixels that a tile sees on each side of those that it labels."""
    post: Literal["none", "crf"] = "none"
    """Refine with a fully connected CRF."""
    crf: CrfParams = field(default_factory=CrfParams)
    """Parameters of --post=crf."""

    def __post_init__(self) -> None:
        """Raises UserError for values that no network or batch can have."""
        super().__post_init__()
        residual, torchvision = self.backbone != "vgg16", self.head in ("deeplabv3", "fcn")
        head, rates = f"--head={self.head}", self.rates or (2,)
        mult8 = self.crop is not None and all(side % 8 == 1 for side in self.crop)
        least = 2 * max(self.tile_context, 0) + 8
        for wrong, message in (
            (self.width <= 0, f"--width={self.width}: give a factor above 0"),
            (not 0 <= (self.dropout_rate or 0) < 1, "--dropout-rate: give a value in [0, 1)"),
            (self.head_lr <= 0, f"--head-lr={self.head_lr}: give a factor above 0"),
            (self.rates == () or min(rates) < 1, f"--rates={self.rates}: give 1 or more"),
            (self.head == "fc4x4" and any(r % 2 for r in rates), "--rates: fc4x4 takes even ones"),
            (torchvision and not residual, f"{head} needs a ResNet: give --backbone=resnet50"),
            (torchvision and self.rates, f"{head} has rates of its own: leave --rates out"),
            (torchvision and self.msc_inputs != "off", f"{head} needs --msc-inputs=off"),
            (self.aux == "on" and not torchvision, "--aux=on needs --head=deeplabv3 or fcn"),
            (residual and self.head in ("fc7x7", "fc4x4"), f"{head} needs --backbone=vgg16"),
            (residual and self.pool5a == "on", "--pool5a=on needs --backbone=vgg16"),
            (residual and self.msc_features == "on", "--msc-features=on needs --backbone=vgg16"),
            (self.crop and min(self.crop) < 1, f"--crop={self.crop}: give at least 1 1"),
            (self.loss_at == "units" and not mult8, f"--crop={self.crop}: units sit on pixels of "
             "8 m + 1 only: give such a crop, 321 321 for one, or --loss-at=pixels"),
            (self.tile and self.scale != 1, f"--scale={self.scale}: tiles need --scale=1"),
            (self.tile_context < 0, f"--tile-context={self.tile_context}: give 0 or more"),
            (self.tile is not None and self.tile < least, f"--tile={self.tile}: give {least} or "
             "more, twice --tile-context and a unit"),
        ):  # fmt: skip
            if wrong:
                raise UserError(message)


# Version 2 (Section 4.1): poly on 10 crops a step, 20,000 steps.
_VGG = Config(
    dataset="voc2012_sbd",
    normalisation="caffe",
    head="aspp_l",
    batch_size=10,
    learning_rate=1e-3,
    bias_lr=2.0,
    schedule="poly",
    num_steps=20_000,
    eval_every=2000,
    save_every=2000,
    log_every=20,
)
_RESNET = dataclasses.replace(
    _VGG,
    backbone="resnet101",
    msc_inputs="max",
    augment="mirror_scale",
    learning_rate=2.5e-4,
    accumulate=2,
)
# Version 1 (Section 4.1): the rate falls tenfold every 2,000 of 6,000 steps.
_V1 = dataclasses.replace(
    _VGG,
    head="largefov",
    pool5a="on",
    batch_size=20,
    schedule="step",
    step_at=(1 / 3, 2 / 3),
    num_steps=6000,
)
# Without pretrained weights: inputs of unit scale, one rate, and a fast start.
_SCRATCH = Config(
    **FROM_SCRATCH,
    learning_rate=1e-3,
    head="aspp_s",
    bn="train",
    head_lr=1.0,
    dropout_rate=0.1,
    width=0.25,
)

PRESETS = {
    "paper": _RESNET,
    "paper_vgg": _VGG,
    "paper_v1": _V1,
    "paper_v1_msc": dataclasses.replace(_V1, msc_features="on", finetune="new"),
    "cityscapes": dataclasses.replace(
        _RESNET, dataset="cityscapes", msc_inputs="off", tile=769, eval_batch_size=1,
    ),
    "torchvision": dataclasses.replace(  # pytorch/vision: references/segmentation
        _VGG, normalisation="torchvision", backbone="resnet101", head="deeplabv3", bn="train",
        aux="on", loss_at="pixels", augment="mirror_scale", crop=(480, 480), learning_rate=0.01,
        bias_lr=1.0, weight_decay=1e-4, batch_size=16,
    ),
    "camvid": dataclasses.replace(
        _SCRATCH, dataset="camvid", scale=0.5, augment="mirror_scale", crop=(185, 241),
        num_steps=1000, eval_every=500, save_every=500,
    ),
    "demo": dataclasses.replace(
        _SCRATCH, augment="none", crop=(97, 97), width=0.125, learning_rate=2e-3, num_steps=2000,
        eval_every=500, save_every=500, eval_batch_size=16,
    ),
    "smoke": dataclasses.replace(
        _SCRATCH, **SMOKE, crop=(33, 33), width=1 / 32,
    ),
}  # fmt: skip


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The network of a configuration."""
    shared = dict(bn=config.bn, width=config.width, axis_name=AXIS, dtype=config.dtype)
    stride_in = config.stride_in
    if config.head == "deeplabv3" or config.head == "fcn":
        trunk = deeplab.RESIDUAL[config.backbone]
        if stride_in == "1x1":
            trunk = functools.partial(trunk, stride_in="1x1", first_block_dilation="new")
        return ResNetSegmenter(
            num_classes,
            head=config.head,
            trunk=trunk,
            aux=config.aux == "on",
            dropout_rate=config.dropout_rate,
            **shared,
        )
    return DeepLab(
        num_classes,
        backbone=config.backbone,
        head=config.head,
        rates=config.rates,
        pool5a=config.pool5a == "on",
        msc_features=config.msc_features == "on",
        scales=deeplab.SCALES if config.msc_inputs == "max" else (1.0,),
        upsample=config.upsample,
        stride_in="1x1" if stride_in == "published" else stride_in,
        dropout_rate=0.5 if config.dropout_rate is None else config.dropout_rate,
        **shared,
    )


def build_loss_terms(config: Config) -> tuple[LossTerm, ...]:
    """The losses that are added up: of the (fused) scores, of each of several scales, of aux."""
    output = {"units": "scores", "pixels": "logits"}[config.loss_at]
    terms = [LossTerm(output, align_corners=True)]
    if config.msc_inputs == "max":
        terms += [LossTerm(f"scores_x{s:g}", align_corners=True) for s in deeplab.SCALES]
    if config.aux == "on":
        terms.append(LossTerm(f"aux_{output}", 0.5, align_corners=True))
    return tuple(terms)


def build_groups(config: Config) -> tuple[ParamGroup, ...]:
    """A faster classifier, whose biases are twice as fast again in Caffe; frozen older parts."""
    new = fast = "fc8" if config.backbone == "vgg16" else "fc1"
    if config.head in ("deeplabv3", "fcn"):
        new, fast = "(aux_)?classifier", "aux_classifier" if config.aux == "on" else ""
    if config.msc_features == "on":
        new += "|msc_"
    groups = [ParamGroup(rf"^(?!{new})", lr=0.0)] if config.finetune == "new" else []
    if fast:
        bias_lr = config.head_lr * config.bias_lr
        groups.append(ParamGroup(rf"^{fast}.*/bias$", lr=bias_lr, decay=0.0))
        groups.append(ParamGroup(rf"^{fast}.*/kernel$", lr=config.head_lr))
    return tuple(groups)


def build_transforms(config: Config) -> list[Transform]:
    """Training transforms."""
    low, high = (0.5, 1.5) if config.augment == "mirror_scale" else (1.0, 1.0)
    transforms: list[Transform] = []
    if (low * config.scale, high * config.scale) != (1.0, 1.0):
        transforms.append(RandomScale(low * config.scale, high * config.scale))
    transforms.append(Normalise(config.normalisation))
    if config.crop:
        transforms.append(RandomCrop(config.crop))
    if config.augment != "none":
        transforms.append(RandomFlip())
    return transforms


def build_predict(config: Config, model: nn.Module) -> prediction.PredictFn:
    """One pass or overlapping tiles, then the CRF if asked for."""
    if config.tile is None:
        predict = prediction.whole_image(model, config.scale)
    else:
        predict = overlap_tile(model, tile=config.tile, context=config.tile_context, grid=8)
    return predict if config.post == "none" else with_crf(predict, config.crf, config.normalisation)


def test_time(config: Config) -> str:
    """What `build_predict` does but for the CRF, for the protocol card."""
    passes = "one pass" if config.tile is None else f"tiles of {config.tile} pixels"
    scales = "scales 1, 0.75 and 0.5" if config.msc_inputs == "max" else "no scales"
    return f"{passes}, no flips, {scales}"


def main(config: Config) -> TrainState:
    """Trains, evaluates and reports."""
    dataset = semantic.load_dataset(config)
    model = build_model(config, dataset.classes.num_classes)
    return semantic.train_and_evaluate(
        config,
        model,
        dataset,
        build_transforms(config),
        groups=build_groups(config),
        loss_terms=build_loss_terms(config),
        predict=build_predict(config, model),
        test_time=test_time(config),
    )


if __name__ == "__main__":
    semantic.run(main, PRESETS, __doc__)
