"""DeepLabv3's head on EfficientNet-Lite0: labels from ImageNet's features, without a GPU.

    python -m examples.lite_deeplab camvid --data-dir=/data/camvid --weights=$WEIGHTS
    python -m examples.lite_deeplab voc --data-dir=/data/VOCdevkit --weights=$WEIGHTS
    python -m examples.lite_deeplab camvid --data-dir=/data/camvid --workdir=runs/scratch

What to learn: `dense_jax.models.deeplabv3` takes any trunk that returns "layer4". Here the stages
beyond stride 16 are dilated, and the head has half of the paper's channels.
"""

import dataclasses
import functools
from typing import Any

from dense_jax.data.transforms import whole_images
from dense_jax.models.deeplabv3 import ResNetSegmenter
from dense_jax.tasks.semantic import LabelConfig, Semantic
from dense_jax.train import cli
from dense_jax.train.config import Factor, from_scratch, smoke
from dense_jax.train.step import AXIS
from examples.efficientnet_lite0 import NORMALISATION, LiteConfig, Trunk, fine_tune, freeze_norms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LiteConfig, LabelConfig):
    """The weights and the head; then the flags of every script that labels pixels."""

    crop: tuple[int, int] = (192, 256)
    """Height and width of training images."""
    width: Factor = 0.5
    """Factor for the channels of the head."""


_BASE = from_scratch(Config(normalisation=NORMALISATION, batch_size=8, learning_rate=1e-3))
PRESETS = {
    "camvid": dataclasses.replace(
        _BASE, dataset="camvid", scale=0.5, crop=(160, 224), num_steps=800, eval_every=400
    ),
    "voc": dataclasses.replace(
        _BASE, dataset="voc2012", scale=0.5, crop=(192, 192), num_steps=800, eval_every=400
    ),
    "smoke": smoke(dataclasses.replace(_BASE, crop=(32, 32), width=1 / 32)),
}


def build(config: Config, num_classes: int) -> Semantic:
    """Returns the task. Training images are resized by 0.75 to 1.5, cropped and flipped."""
    model = ResNetSegmenter(
        num_classes, trunk=_trunk, output_stride=16, bn=config.bn, width=config.width,
        axis_name=AXIS, dtype=config.dtype,
    )  # fmt: skip
    transforms = whole_images(config.normalisation, config.scale, "mirror_scale", config.crop)
    return Semantic(config, model, transforms)


def _trunk(*, width: float, **options: Any) -> Trunk:
    del width  # of the head alone; trained weights have one width
    return Trunk(centred=True, **options)


if __name__ == "__main__":
    cli.run(functools.partial(fine_tune, build), PRESETS, __doc__, adapt=freeze_norms)
