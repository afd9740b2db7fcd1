"""Fully convolutional networks (Long, Shelhamer, Darrell, CVPR 2015, arXiv:1411.4038).

    python -m experiments.fcn demo
    python -m experiments.fcn camvid --data-dir=/data/camvid --stride=16
    python -m experiments.fcn paper --data-dir=/data/VOCdevkit --workdir=/runs/fcn8s

Results: docs/results.md has every run with its command, device and the paper's figure.

Differences: (1) The upsampling layers hold one filter per class; the release stores a dense
kernel that is zero between classes. Same function, same gradients. (2) The learning rate
multiplies the momentum and not, as in Caffe, the gradient; equal at the constant rates used here.
(3) The paper presets need ImageNet weights to reach the paper's scores; --init takes those.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from flax import linen as nn

from dense_jax.data.transforms import RandomPixelKeep, RandomTranslate, Transform, whole_images
from dense_jax.errors import UserError
from dense_jax.models.fcn import FCN, FCNAlexNet
from dense_jax.tasks import semantic
from dense_jax.train.config import FROM_SCRATCH, SMOKE, RunConfig
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.state import TrainState
from dense_jax.train.step import AXIS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Flags of the paper's ablations, then the shared ones."""

    # The network.
    backbone: Literal["vgg16", "alexnet"] = "vgg16"
    """Trunk (Table 1). alexnet has no skips: it needs --stride=32 and --pad-mode=100."""
    stride: Literal[32, 16, 8] = 8
    """Stride of the finest scores: FCN-32s, 16s or 8s (Table 2)."""
    pad_mode: Literal["100", "same"] = "100"
    """Pad the first layer by 100 pixels and crop (the release), or keep all layers aligned."""
    upsample: Literal["fixed", "learned_inner", "learned_all"] = "fixed"
    """Which bilinear up-convolutions are learned (Section 4.3; no significant difference)."""
    fuse: Literal["sum", "max"] = "sum"
    """How skips are joined (Section 4.2; max made learning hard)."""
    single_skip: Literal["none", "pool4"] = "none"
    """Learn from pool4 alone, without the layers above it (Section 4.2; poor). Needs stride 16."""
    skip_scale: Literal["1", "paper"] = "1"
    """Factors of pool4 and pool3 before scoring; paper: 0.01 and 0.0001 (at-once release)."""
    score_init: Literal["zero", "normal"] = "zero"
    """Start of the score layers (Section 4.2 starts new scores at zero)."""
    width: float = 1.0
    """Channel multiplier; below 1 for trials."""
    dropout_rate: float = 0.5
    """Dropout after fc6 and fc7."""

    # Training.
    train: Literal["staged", "at_once"] = "at_once"
    """staged trains 32s, then 16s from it, then 8s, each for num_steps (Section 4.2, Table 2)."""
    stage_lr: float = 0.01
    """Each stage's learning rate over that of the stage before (Section 4.2: 1/100)."""
    finetune: Literal["all", "last"] = "all"
    """last trains the score layers only (Table 2, FCN-32s-fixed)."""
    pixel_keep: float = 1.0
    """Share of the pixels that the loss samples (Section 4.3, Figure 5; no gain per image)."""
    class_balance: Literal["off", "on"] = "off"
    """on weights classes by median frequency (Section 4.3; unnecessary)."""
    augment: Literal["none", "mirror", "mirror_jitter32", "mirror_scale"] = "none"
    """mirror_jitter32 is Section 4.3's (no gain); mirror_scale is for training from scratch."""
    crop: tuple[int, int] | None = None
    """Height and width of training images; None takes whole images (all of one size)."""

    def __post_init__(self) -> None:
        """Raises UserError for values that no network or batch can have."""
        super().__post_init__()
        if self.width <= 0:
            raise UserError(f"--width={self.width}: give a factor above 0")
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"--dropout-rate={self.dropout_rate}: give a value in [0, 1)")
        if not 0 < self.pixel_keep <= 1:
            raise UserError(f"--pixel-keep={self.pixel_keep}: give a share in (0, 1]")
        if self.crop and min(self.crop) < 1:
            raise UserError(f"--crop {self.crop[0]} {self.crop[1]}: give at least 1 1")


# The release: one whole image per step and the loss summed over its pixels, hence tiny rates.
_RELEASE = Config(
    dataset="voc2012_sbd",
    normalisation="caffe",
    crop=(500, 500),
    batch_size=1,
    loss_norm="batch",
    learning_rate=1e-10,
    momentum=0.99,
    bias_lr=2.0,
    num_steps=100_000,
    eval_batch_size=4,
    eval_every=4000,
    save_every=4000,
    log_every=20,
)
# Without pretrained weights: aligned layers, inputs of unit scale, and a fast start.
_SCRATCH = Config(
    pad_mode="same",
    **FROM_SCRATCH,
    learning_rate=1e-3,
    dropout_rate=0.1,
    width=0.25,
)

PRESETS = {
    "paper": dataclasses.replace(
        _RELEASE, train="at_once", skip_scale="paper", num_steps=300_000
    ),
    "paper_staged": dataclasses.replace(_RELEASE, train="staged"),
    "paper_cvpr": dataclasses.replace(
        _RELEASE, train="staged", batch_size=20, accumulate=20, loss_norm="valid", momentum=0.9,
        learning_rate=1e-4, num_steps=75_000,
    ),
    "paper_alexnet": dataclasses.replace(
        _RELEASE, backbone="alexnet", stride=32, batch_size=20, accumulate=20, loss_norm="valid",
        momentum=0.9, learning_rate=1e-4,
    ),
    "camvid": dataclasses.replace(
        _SCRATCH, dataset="camvid", scale=0.5, augment="mirror_scale", crop=(180, 240),
        num_steps=1000, eval_every=500, save_every=500,
    ),
    "demo": dataclasses.replace(
        _SCRATCH, width=0.125, learning_rate=2e-3, num_steps=2000, eval_every=500, save_every=500,
        eval_batch_size=16,
    ),
    "smoke": dataclasses.replace(
        _SCRATCH, **SMOKE, width=1 / 32,
    ),
}  # fmt: skip


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The network of a configuration."""
    shared = dict(
        score_init=config.score_init,
        width=config.width,
        dropout_rate=config.dropout_rate,
        axis_name=AXIS,
        dtype=config.dtype,
    )
    if config.backbone == "alexnet":
        fixed = {"stride": 32, "pad_mode": "100", "upsample": "fixed", "skip_scale": "1"}
        if changed := [k for k, v in fixed.items() if getattr(config, k) != v]:
            flag, value = changed[0].replace("_", "-"), fixed[changed[0]]
            raise UserError(f"--backbone=alexnet comes in one form: give --{flag}={value} with it")
        return FCNAlexNet(num_classes, **shared)
    if config.single_skip == "pool4" and config.stride != 16:
        raise UserError("--single-skip=pool4 scores at stride 16: give --stride=16 with it")
    return FCN(
        num_classes,
        stride=config.stride,
        pad_mode=config.pad_mode,
        upsample=config.upsample,
        fuse=config.fuse,
        single_skip=config.single_skip,
        skip_scale=(0.01, 0.0001) if config.skip_scale == "paper" else (1.0, 1.0),
        **shared,
    )


def build_groups(config: Config) -> tuple[ParamGroup, ...]:
    """Frozen parts: everything but the score layers with ``--finetune=last``."""
    return (ParamGroup(r"^(?!score)", lr=0.0),) if config.finetune == "last" else ()


def build_transforms(config: Config) -> list[Transform]:
    """Training transforms, scale and colour before cropping and mirroring."""
    transforms = whole_images(config.normalisation, config.scale, config.augment, config.crop)
    if config.augment == "mirror_jitter32":
        transforms.append(RandomTranslate(32))
    if config.pixel_keep < 1:
        transforms.append(RandomPixelKeep(config.pixel_keep))
    return transforms


def stages(config: Config) -> Iterator[Config]:
    """The runs to make one after another: the coarser nets first, if training is staged."""
    if config.train == "at_once":
        yield config
        return
    init = config.init
    for number, stride in enumerate(s for s in (32, 16, 8) if s >= config.stride):
        workdir = f"{config.workdir}/fcn{stride}s"
        rate = config.learning_rate * config.stage_lr**number
        yield dataclasses.replace(
            config, stride=stride, workdir=workdir, learning_rate=rate, init=init
        )
        init = f"run:{workdir}"


def main(config: Config) -> TrainState:
    """Trains, evaluates and reports each stage; returns the last state."""
    dataset = semantic.load_dataset(config)
    weights = semantic.class_weights(dataset) if config.class_balance == "on" else None
    for stage in stages(config):
        state = semantic.train_and_evaluate(
            stage,
            build_model(stage, dataset.classes.num_classes),
            dataset,
            build_transforms(stage),
            groups=build_groups(stage),
            class_weights=weights,
        )
        if int(state.step) < stage.num_steps:  # stopped by a signal: go on from here next time
            break
    return state


if __name__ == "__main__":
    semantic.run(main, PRESETS, __doc__, stages)
