"""Fully convolutional networks (Long, Shelhamer, Darrell, CVPR 2015, arXiv:1411.4038).

    python -m experiments.fcn demo
    python -m experiments.fcn camvid --data-dir=/data/camvid --stride=16
    python -m experiments.fcn paper --data-dir=/data/VOCdevkit --workdir=/runs/fcn8s

Results: docs/results.md has every run with its command, device and the paper's figure.

Differences: (1) The upsampling layers have one filter per class; the release stores a dense kernel
that is zero between classes. Outputs and gradients are equal. (2) The learning rate multiplies the
momentum; in Caffe it multiplies the gradient. At constant rates, as here, both are equal. (3) The
paper presets need ImageNet weights (--init) to reach the paper's scores.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from dense_jax.data.transforms import RandomPixelKeep
from dense_jax.models.fcn import FCN, FCNAlexNet
from dense_jax.tasks import training
from dense_jax.tasks.semantic import Semantic, SemanticConfig, median_frequency
from dense_jax.train.config import Rate, Share, from_scratch, smoke
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.step import AXIS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SemanticConfig):
    """The paper's ablations; then the flags of every semantic run."""

    backbone: Literal["vgg16", "alexnet"] = "vgg16"
    """Trunk (Table 1). alexnet has no skips: it needs --stride=32 and --pad-mode=100."""
    stride: Literal[32, 16, 8] = 8
    """Stride of the finest scores: FCN-32s, 16s or 8s (Table 2)."""
    pad_mode: Literal["100", "same"] = "100"
    """100: pad the first layer by 100 pixels and crop (release). same: keep all layers aligned."""
    upsample: Literal["fixed", "learned_inner", "learned_all"] = "fixed"
    """Bilinear up-convolutions to learn (Section 4.3; no significant difference)."""
    fuse: Literal["sum", "max"] = "sum"
    """How to combine skips (Section 4.2; max made learning hard)."""
    single_skip: Literal["none", "pool4"] = "none"
    """pool4: learn from pool4 alone, not from later layers (Section 4.2; poor). Needs stride 16."""
    skip_scale: Literal["1", "paper"] = "1"
    """Factors of pool4 and pool3 before scoring; paper: 0.01 and 0.0001 (at-once release)."""
    score_init: Literal["zero", "normal"] = "zero"
    """Initial values of the score layers (Section 4.2: zero for new scores)."""
    dropout_rate: Rate = 0.5
    """Dropout after fc6 and fc7."""
    train: Literal["staged", "at_once"] = "at_once"
    """staged trains 32s, then 16s from it, then 8s, each for num_steps (Section 4.2, Table 2)."""
    stage_lr: float = 0.01
    """Factor of the learning rate from each stage to the next (Section 4.2: 1/100)."""
    finetune: Literal["all", "last"] = "all"
    """last trains the score layers only (Table 2, FCN-32s-fixed)."""
    pixel_keep: Share = 1.0
    """Share of the pixels that the loss samples (Section 4.3, Figure 5; no gain per image)."""
    class_balance: Literal["off", "on"] = "off"
    """on: class weights by median frequency (Section 4.3; unnecessary)."""

    def __post_init__(self) -> None:
        """Raises UserError for flags that do not go together."""
        super().__post_init__()
        self.needs("single_skip", "pool4", stride=16)
        one_form = dict(stride=32, pad_mode="100", upsample="fixed", skip_scale="1")
        self.needs("backbone", "alexnet", **one_form)

    def each_stage(self) -> Iterator["Config"]:
        """Yields the configurations to train in turn; if training is staged, coarser nets first."""
        if self.train == "at_once":
            yield self
            return
        init = self.init
        for number, stride in enumerate(s for s in (32, 16, 8) if s >= self.stride):
            workdir, rate = f"{self.workdir}/fcn{stride}s", self.stage_lr**number
            yield replace(
                self, stride=stride, workdir=workdir, learning_rate=self.learning_rate * rate,
                init=init, single_skip=self.single_skip if stride == 16 else "none",
            )  # fmt: skip
            init = f"run:{workdir}"


# The release: one whole image per step, and the loss summed over its pixels, so rates are tiny.
_RELEASE = Config(
    dataset="voc2012_sbd", normalisation="caffe", crop=(500, 500), batch_size=1, loss_norm="batch",
    learning_rate=1e-10, momentum=0.99, bias_lr=2.0, num_steps=100_000, eval_batch_size=4,
    eval_every=4000, save_every=4000, log_every=20,
)  # fmt: skip
_MEAN: dict[str, Any] = dict(
    batch_size=20, accumulate=20, loss_norm="valid", momentum=0.9, learning_rate=1e-4
)
# Without pretrained weights: aligned layers, inputs of unit scale, and fast optimisation.
_SCRATCH = from_scratch(Config(pad_mode="same", learning_rate=1e-3, dropout_rate=0.1, width=0.25))

PRESETS = {
    "paper": replace(_RELEASE, skip_scale="paper", num_steps=300_000),
    "paper_staged": replace(_RELEASE, train="staged"),
    "paper_cvpr": replace(_RELEASE, train="staged", num_steps=75_000, **_MEAN),
    "paper_alexnet": replace(_RELEASE, backbone="alexnet", stride=32, **_MEAN),
    "camvid": replace(
        _SCRATCH, dataset="camvid", scale=0.5, augment="mirror_scale", crop=(180, 240),
        eval_every=500,
    ),
    "demo": replace(
        _SCRATCH, width=0.125, learning_rate=2e-3, num_steps=2000, eval_every=500,
        eval_batch_size=16,
    ),
    "smoke": smoke(replace(_SCRATCH, width=1 / 32)),
}  # fmt: skip


def build(config: Config, num_classes: int) -> Semantic:
    """Returns the task: the network and its training."""
    options = dict(
        score_init=config.score_init, width=config.width, dropout_rate=config.dropout_rate,
        axis_name=AXIS, dtype=config.dtype,
    )  # fmt: skip
    if config.backbone == "alexnet":
        model = FCNAlexNet(num_classes, **options)
    else:
        model = FCN(
            num_classes,
            stride=config.stride,
            pad_mode=config.pad_mode,
            upsample=config.upsample,
            fuse=config.fuse,
            single_skip=config.single_skip,
            skip_scale=(0.01, 0.0001) if config.skip_scale == "paper" else (1.0, 1.0),
            **options,
        )
    transforms = config.whole_images()
    transforms += [RandomPixelKeep(config.pixel_keep)] if config.pixel_keep < 1 else []
    return Semantic(
        config,
        model,
        transforms,
        groups=(ParamGroup(r"^(?!score)", lr=0.0),) if config.finetune == "last" else (),
        class_weights=median_frequency if config.class_balance == "on" else lambda dataset: None,
    )


if __name__ == "__main__":
    training.main(build, PRESETS, __doc__)
