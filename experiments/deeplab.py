"""DeepLab v2 (Chen, Papandreou, Kokkinos, Murphy, Yuille, PAMI 2017, arXiv:1606.00915), v1, and v3.

    python -m experiments.deeplab demo
    python -m experiments.deeplab camvid --data-dir=/data/camvid --head=aspp_l
    python -m experiments.deeplab paper --data-dir=/data/VOCdevkit --init=run:runs/coco
    python -m dense_jax evaluate --run runs/deeplab-paper --crf

v1 (ICLR 2015, arXiv:1412.7062) is the presets paper_v1 and paper_v1_msc; v2 on VGG-16 is paper_vgg.
--head=deeplabv3 and fcn are torchvision's networks of these names (v3: arXiv:1706.05587).
Results: docs/results.md has every run with its command, device and the paper's figure.

Differences: (1) The learning rate multiplies the momentum; in Caffe it multiplies the gradient. (2)
The poly rate falls at every step; in some ports every ten steps. (3) Crops and scales have 8 m + 1
pixels and aligned corners, so all units lie on pixels. (4) The paper's scores need weights from
ImageNet, for ResNet-101 from COCO (about 2 points): give a file or a run with --init.
"""

import dataclasses
from dataclasses import replace
from typing import Literal

from dense_jax.errors import refuse
from dense_jax.infer.tiles import check_tile, whole_or_tiles
from dense_jax.models import deeplab
from dense_jax.models.deeplabv3 import ResNetSegmenter
from dense_jax.objectives.pixels import LossTerm
from dense_jax.tasks import training
from dense_jax.tasks.semantic import Semantic, SemanticConfig
from dense_jax.train.config import CountOrZero, Counts, Factor, Rate, Sides, from_scratch, smoke
from dense_jax.train.schedules import ParamGroup, own_rate
from dense_jax.train.step import AXIS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SemanticConfig):
    """The papers' ablations; then the flags of every semantic run."""

    backbone: deeplab.Backbone = "vgg16"  # Trunk (v2, Tables 3, 4). torchvision's heads: a ResNet.
    head: Literal["fc7x7", "fc4x4", "largefov", "aspp_s", "aspp_l", "deeplabv3", "fcn"] = "largefov"
    """fc7x7, fc4x4, largefov: window and dilation of fc6 (v1, Table 1 b; v2, Table 1). aspp_*: four
    dilations (v2, Table 3). deeplabv3, fcn: torchvision's heads."""
    rates: Counts | None = None  # Dilations instead of the head's (fc4x4 with 8: v2, Table 1).
    pool5a: Literal["off", "on"] = "off"  # Average pooling before VGG-16's fc6 (v1's release).
    msc_features: Literal["off", "on"] = "off"  # Score 4 poolings and the image (v1, Section 4.2).
    msc_inputs: Literal["off", "max"] = "off"  # Maximum of scales 1, 0.75 and 0.5 (v2, Table 4).
    upsample: Literal["align_corners", "half_pixel"] = "align_corners"
    """How to enlarge scores; half_pixel shifts them by up to 3.5 pixels, an error of some ports."""
    stride_in: Literal["published", "1x1", "3x3"] = "published"
    """Convolution with the stride in a ResNet; published: 1x1 in DeepLab v2, 3x3 in torchvision."""
    bn: Literal["frozen", "train"] = "frozen"  # Batch normalisation of ResNets; v2: frozen.
    aux: Literal["off", "on"] = "off"  # A loss on layer3 of torchvision's networks, weight 0.5.
    dropout_rate: Rate | None = None  # None: 0.5 as published, 0.1 in torchvision's FCN heads.
    loss_at: Literal["units", "pixels"] = "units"
    """units: labels of every eighth pixel (v1, Section 3.2). pixels: enlarge the scores first."""
    head_lr: Factor = 10.0  # Learning-rate factor of the classifier (torchvision: of aux).
    finetune: Literal["all", "new"] = "all"  # new: classifier and msc layers (v1, Section 4.2).
    augment: Literal["none", "mirror", "mirror_scale"] = "mirror"
    """mirror flips left and right; mirror_scale also resizes by 0.5 to 1.5 (v2, Table 4: Aug)."""
    crop: Sides | None = (321, 321)
    """Height and width of training images, 8 m + 1; None takes whole images (all of one size)."""
    tile: int | None = None  # Side of overlapping tiles (v2, Section 4.4); None: whole images.
    tile_context: CountOrZero = 64  # Margin of a tile, in pixels, around the part that it labels.

    def __post_init__(self) -> None:
        """Raises UserError for flags that do not go together."""
        super().__post_init__()
        resnets, torchvision = tuple(deeplab.RESIDUAL), ("deeplabv3", "fcn")
        self.needs("head", *torchvision, backbone=resnets, rates=None, msc_inputs="off")
        self.needs("head", "fc7x7", "fc4x4", backbone="vgg16")
        self.needs("pool5a", "on", backbone="vgg16")
        self.needs("msc_features", "on", backbone="vgg16")
        self.needs("aux", "on", head=torchvision)
        self.needs("tile", scale=1)
        check_tile(self.tile, self.tile_context, deeplab.STRIDE)
        is_odd = self.head == "fc4x4" and any(rate % 2 for rate in self.rates or ())
        refuse(is_odd, f"--rates={self.rates}: give even ones with --head=fc4x4")
        fits = self.loss_at == "pixels" or (self.crop and all(s % 8 == 1 for s in self.crop))
        refuse(not fits, f"--crop={self.crop}: give 8 m + 1, as 321 321, or --loss-at=pixels")


# Version 2 (Section 4.1): poly on 10 crops a step, 20,000 steps.
_VGG = Config(
    dataset="voc2012_sbd", normalisation="caffe", head="aspp_l", batch_size=10, bias_lr=2.0,
    schedule="poly", num_steps=20_000, eval_every=2000, save_every=2000, log_every=20,
)  # fmt: skip
_RESNET = replace(_VGG, backbone="resnet101", msc_inputs="max", augment="mirror_scale",
                  learning_rate=2.5e-4, accumulate=2)  # fmt: skip
# Version 1 (Section 4.1): the rate falls tenfold every 2,000 of 6,000 steps.
_V1 = replace(_VGG, head="largefov", pool5a="on", batch_size=20, schedule="step",
              step_at=(1 / 3, 2 / 3), num_steps=6000)  # fmt: skip
# Without pretrained weights: inputs of unit scale, one rate, and fast optimisation.
_SCRATCH = from_scratch(Config(head="aspp_s", bn="train", head_lr=1.0, dropout_rate=0.1, width=0.25,
                               eval_every=500))  # fmt: skip

PRESETS = {
    "paper": _RESNET,
    "paper_vgg": _VGG,
    "paper_v1": _V1,
    "paper_v1_msc": replace(_V1, msc_features="on", finetune="new"),
    "cityscapes": replace(_RESNET, dataset="cityscapes", msc_inputs="off", tile=769,
                          eval_batch_size=1),
    "torchvision": replace(_VGG, normalisation="torchvision", backbone="resnet101", bn="train",
                           head="deeplabv3", aux="on", loss_at="pixels", augment="mirror_scale",
                           crop=(480, 480), learning_rate=0.01, bias_lr=1.0, weight_decay=1e-4,
                           batch_size=16),  # pytorch/vision: references/segmentation
    "camvid": replace(_SCRATCH, dataset="camvid", scale=0.5, augment="mirror_scale",
                      crop=(185, 241)),
    "demo": replace(_SCRATCH, augment="none", crop=(97, 97), width=0.125, learning_rate=2e-3,
                    num_steps=2000, eval_batch_size=16),
    "smoke": smoke(replace(_SCRATCH, crop=(33, 33), width=1 / 32)),
}  # fmt: skip


def build(config: Config, num_classes: int) -> Semantic:
    """Returns the task: the network, its training and its use."""
    is_multiscale, has_aux = config.msc_inputs == "max", config.aux == "on"
    shared = dict(bn=config.bn, width=config.width, axis_name=AXIS, dtype=config.dtype)
    if config.head == "deeplabv3" or config.head == "fcn":
        model = ResNetSegmenter(
            num_classes, head=config.head, aux=has_aux, dropout_rate=config.dropout_rate,
            trunk=deeplab.torchvision_trunk(config.backbone, config.stride_in), **shared,
        )  # fmt: skip
        new, fast = "(aux_)?classifier", "aux_classifier" if has_aux else None
    else:
        model = deeplab.DeepLab(
            num_classes, backbone=config.backbone, head=config.head, rates=config.rates,
            pool5a=config.pool5a == "on", msc_features=config.msc_features == "on",
            scales=deeplab.SCALES if is_multiscale else (1.0,), upsample=config.upsample,
            stride_in="1x1" if config.stride_in == "published" else config.stride_in,
            dropout_rate=0.5 if config.dropout_rate is None else config.dropout_rate, **shared,
        )  # fmt: skip
        new = fast = "fc8" if config.backbone == "vgg16" else "fc1"
        new += "|msc_" if config.msc_features == "on" else ""
    groups = [ParamGroup(rf"^(?!{new})", lr=0.0)] if config.finetune == "new" else []
    groups += own_rate(f"^{fast}.*", config.head_lr, config.bias_lr) if fast else []
    # Losses of the (fused) scores, of those of each scale, of aux.
    output = {"units": "scores", "pixels": "logits"}[config.loss_at]
    scales = [f"scores_x{s:g}" for s in deeplab.SCALES] if is_multiscale else []
    terms = [LossTerm(name, align_corners=True) for name in (output, *scales)]
    terms += [LossTerm(f"aux_{output}", 0.5, align_corners=True)] if has_aux else []
    tiles = dict(context=config.tile_context, grid=deeplab.STRIDE, sized=config.head == "deeplabv3")
    forward, passes = whole_or_tiles(model, config.scale, config.tile, **tiles)
    words = f"{passes}, no flips, " + ("scales 1, 0.75 and 0.5" if is_multiscale else "no scales")
    return Semantic(config, model, config.whole_images(zoom=(0.5, 1.5)), groups=groups,
                    loss_terms=terms, forward=forward, test_time=words)  # fmt: skip


if __name__ == "__main__":
    training.main(build, PRESETS, __doc__)
