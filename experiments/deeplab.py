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
from dataclasses import replace
from typing import Annotated, Literal

from dense_jax.data.normalise import Normalise
from dense_jax.data.transforms import RandomCrop, RandomFlip, RandomScale, Transform
from dense_jax.errors import refuse
from dense_jax.infer.tiles import overlap_tile
from dense_jax.infer.whole_image import whole_image
from dense_jax.models import deeplab
from dense_jax.models.deeplabv3 import ResNetSegmenter
from dense_jax.objectives.pixels import LossTerm
from dense_jax.tasks import training
from dense_jax.tasks.semantic import Semantic, SemanticConfig
from dense_jax.train.config import CountOrZero, Factor, Limit, Rate, Sides, from_scratch, smoke
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.step import AXIS

Rates = Annotated[
    tuple[int, ...] | None, Limit(lambda x: x is None or min((0, *x)[1:] or (0,)) > 0, "1 or more")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SemanticConfig):
    """The papers' ablations; then the flags of every semantic run."""

    backbone: deeplab.Backbone = "vgg16"
    """Trunk (v2, Tables 3 and 4). torchvision's heads need a ResNet."""
    head: Literal["fc7x7", "fc4x4", "largefov", "aspp_s", "aspp_l", "deeplabv3", "fcn"] = "largefov"
    """fc6 with another window and dilation (v1, Table 1 b; v2, Table 1), pyramids of four dilations
    (v2, Table 3), or torchvision's heads."""
    rates: Rates = None
    """Dilations in place of the head's own, one for each branch (8 with fc4x4: v2, Table 1)."""
    pool5a: Literal["off", "on"] = "off"  # Average pooling before VGG-16's fc6 (v1's release).
    msc_features: Literal["off", "on"] = "off"
    """Score the image and four poolings of VGG-16 too (v1, Section 4.2)."""
    msc_inputs: Literal["off", "max"] = "off"
    """See images at scales 1, 0.75 and 0.5 and take the maximum of the scores (v2, Table 4)."""
    upsample: Literal["align_corners", "half_pixel"] = "align_corners"
    """How scores are enlarged; half_pixel moves them by up to 3.5 pixels, a mistake of ports."""
    stride_in: Literal["published", "1x1", "3x3"] = "published"
    """Convolutions of a ResNet that stride; published: 1x1 in DeepLab v2, 3x3 in torchvision's."""
    bn: Literal["frozen", "train"] = "frozen"  # Normalisation of ResNets: as loaded (v2), or not.
    aux: Literal["off", "on"] = "off"  # A loss on layer3 of torchvision's networks, weight 0.5.
    dropout_rate: Rate | None = None
    """None: as published, 0.5 after fc6 and fc7, 0.5 or 0.1 in torchvision's heads."""
    loss_at: Literal["units", "pixels"] = "units"
    """Compare scores with the label of every eighth pixel (v1, Section 3.2), or enlarge first."""
    head_lr: Factor = 10.0
    """Learning rate of the classifier (of torchvision's aux head) over that of the others."""
    finetune: Literal["all", "new"] = "all"
    """new trains the classifier and the multi-scale features only (v1, Section 4.2)."""
    augment: Literal["none", "mirror", "mirror_scale"] = "mirror"
    """Flip left and right, and resize by 0.5 to 1.5 (v2, Table 4: Aug)."""
    crop: Sides = (321, 321)
    """Height and width of training images, 8 m + 1; None takes whole images (all of one size)."""
    tile: int | None = None
    """Side of overlapping tiles for large images (v2, Section 4.4); None takes whole images."""
    tile_context: CountOrZero = 64  # Pixels that a tile sees on each side of what it labels.

    def __post_init__(self) -> None:
        """Raises UserError for flags that do not go together."""
        super().__post_init__()
        residual, torchvision = self.backbone != "vgg16", self.head in ("deeplabv3", "fcn")
        head, needs_vgg = f"--head={self.head}", "needs --backbone=vgg16"
        mult8 = self.crop is not None and all(side % 8 == 1 for side in self.crop)
        least = 2 * self.tile_context + 8
        odd = self.head == "fc4x4" and any(rate % 2 for rate in self.rates or ())
        refuse(odd, "--rates: fc4x4 takes even ones")
        refuse(torchvision and not residual, f"{head} needs a ResNet: give --backbone=resnet50")
        refuse(torchvision and bool(self.rates), f"{head} has rates of its own: leave --rates out")
        refuse(torchvision and self.msc_inputs != "off", f"{head} needs --msc-inputs=off")
        refuse(self.aux == "on" and not torchvision, "--aux=on needs --head=deeplabv3 or fcn")
        refuse(residual and self.head in ("fc7x7", "fc4x4"), f"{head} {needs_vgg}")
        refuse(residual and self.pool5a == "on", f"--pool5a=on {needs_vgg}")
        refuse(residual and self.msc_features == "on", f"--msc-features=on {needs_vgg}")
        refuse(self.loss_at == "units" and not mult8, f"--crop={self.crop}: units sit on pixels of "
               "8 m + 1 only: give such a crop, 321 321 for one, or --loss-at=pixels")  # fmt: skip
        refuse(bool(self.tile) and self.scale != 1, f"--scale={self.scale}: tiles need --scale=1")
        refuse(self.tile is not None and self.tile < least, f"--tile={self.tile}: give {least} or "
               "more, twice --tile-context and a unit")  # fmt: skip


# Version 2 (Section 4.1): poly on 10 crops a step, 20,000 steps.
_VGG = Config(
    dataset="voc2012_sbd", normalisation="caffe", head="aspp_l", batch_size=10, bias_lr=2.0,
    schedule="poly", num_steps=20_000, eval_every=2000, save_every=2000, log_every=20,
)  # fmt: skip
_RESNET = replace(
    _VGG, backbone="resnet101", msc_inputs="max", augment="mirror_scale", learning_rate=2.5e-4,
    accumulate=2,
)  # fmt: skip
# Version 1 (Section 4.1): the rate falls tenfold every 2,000 of 6,000 steps.
_V1 = replace(
    _VGG, head="largefov", pool5a="on", batch_size=20, schedule="step", step_at=(1 / 3, 2 / 3),
    num_steps=6000,
)  # fmt: skip
# Without pretrained weights: inputs of unit scale, one rate, and a fast start.
_SCRATCH = from_scratch(
    Config(head="aspp_s", bn="train", head_lr=1.0, dropout_rate=0.1, width=0.25)
)

PRESETS = {
    "paper": _RESNET,
    "paper_vgg": _VGG,
    "paper_v1": _V1,
    "paper_v1_msc": replace(_V1, msc_features="on", finetune="new"),
    "cityscapes": replace(
        _RESNET, dataset="cityscapes", msc_inputs="off", tile=769, eval_batch_size=1,
    ),
    "torchvision": replace(  # pytorch/vision: references/segmentation
        _VGG, normalisation="torchvision", backbone="resnet101", head="deeplabv3", bn="train",
        aux="on", loss_at="pixels", augment="mirror_scale", crop=(480, 480), learning_rate=0.01,
        bias_lr=1.0, weight_decay=1e-4, batch_size=16,
    ),
    "camvid": replace(
        _SCRATCH, dataset="camvid", scale=0.5, augment="mirror_scale", crop=(185, 241),
        eval_every=500,
    ),
    "demo": replace(
        _SCRATCH, augment="none", crop=(97, 97), width=0.125, learning_rate=2e-3, num_steps=2000,
        eval_every=500, eval_batch_size=16,
    ),
    "smoke": smoke(replace(_SCRATCH, crop=(33, 33), width=1 / 32)),
}  # fmt: skip


def build(config: Config, num_classes: int) -> Semantic:
    """The network, and how it is trained and used."""
    shared = dict(bn=config.bn, width=config.width, axis_name=AXIS, dtype=config.dtype)
    stride_in, is_torchvision = config.stride_in, config.head in ("deeplabv3", "fcn")
    if config.head == "deeplabv3" or config.head == "fcn":
        trunk = deeplab.RESIDUAL[config.backbone]
        if stride_in == "1x1":
            trunk = functools.partial(trunk, stride_in="1x1", first_block_dilation="new")
        model = ResNetSegmenter(
            num_classes, head=config.head, trunk=trunk, aux=config.aux == "on",
            dropout_rate=config.dropout_rate, **shared,
        )  # fmt: skip
    else:
        model = deeplab.DeepLab(
            num_classes, backbone=config.backbone, head=config.head, rates=config.rates,
            pool5a=config.pool5a == "on", msc_features=config.msc_features == "on",
            scales=deeplab.SCALES if config.msc_inputs == "max" else (1.0,),
            upsample=config.upsample, stride_in="1x1" if stride_in == "published" else stride_in,
            dropout_rate=0.5 if config.dropout_rate is None else config.dropout_rate, **shared,
        )  # fmt: skip
    # Losses of the (fused) scores, of each of several scales, of aux.
    output = {"units": "scores", "pixels": "logits"}[config.loss_at]
    scales = [f"scores_x{s:g}" for s in deeplab.SCALES] if config.msc_inputs == "max" else []
    terms = [LossTerm(name, align_corners=True) for name in (output, *scales)]
    terms += [LossTerm(f"aux_{output}", 0.5, align_corners=True)] if config.aux == "on" else []
    # A faster classifier, whose biases are twice as fast again in Caffe; frozen older parts.
    new = fast = "fc8" if config.backbone == "vgg16" else "fc1"
    if is_torchvision:
        new, fast = "(aux_)?classifier", "aux_classifier" if config.aux == "on" else ""
    new += "|msc_" if config.msc_features == "on" else ""
    groups = [ParamGroup(rf"^(?!{new})", lr=0.0)] if config.finetune == "new" else []
    if fast:
        bias_lr = config.head_lr * config.bias_lr
        groups.append(ParamGroup(rf"^{fast}.*/bias$", lr=bias_lr, decay=0.0))
        groups.append(ParamGroup(rf"^{fast}.*/kernel$", lr=config.head_lr))
    low, high = (0.5, 1.5) if config.augment == "mirror_scale" else (1.0, 1.0)
    low, high = low * config.scale, high * config.scale
    transforms: list[Transform] = [Normalise(config.normalisation)]
    if (low, high) != (1.0, 1.0):
        transforms.insert(0, RandomScale(low, high))
    transforms += [RandomCrop(config.crop)] if config.crop else []
    transforms += [RandomFlip()] if config.augment != "none" else []
    forward, passes = whole_image(model, config.scale), "one pass"
    if config.tile is not None:
        passes = f"tiles of {config.tile} pixels"
        forward = overlap_tile(model, tile=config.tile, context=config.tile_context, grid=8)
    words = "scales 1, 0.75 and 0.5" if config.msc_inputs == "max" else "no scales"
    return Semantic(
        config, model, transforms, groups=groups, loss_terms=terms, forward=forward,
        test_time=f"{passes}, no flips, {words}",
    )  # fmt: skip


if __name__ == "__main__":
    training.main(build, PRESETS, __doc__)
