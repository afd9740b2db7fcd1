"""Mask R-CNN on EfficientNet-Lite0: instances from ImageNet's features, without a GPU.

    python -m examples.lite_mask_rcnn coco --data-dir=/data/coco --weights=$WEIGHTS
    python -m examples.lite_mask_rcnn nuclei --data-dir=/data/nuclei --weights=$WEIGHTS
    python -m examples.lite_mask_rcnn nuclei --data-dir=/data/nuclei --workdir=runs/scratch

What to learn: a detector with a trunk of your own is a class of ten lines; flags, losses, scores,
`predict`, `evaluate` and `export` are those of `experiments/mask_rcnn.py`.

The pyramid is on stages of strides 4 to 32 (`examples/efficientnet_lite0.py`); the pyramid and the
heads have a quarter of the paper's channels. With --weights, the statistics of batch normalisation
stay those of ImageNet, since two images are too few for new ones.
"""

import dataclasses
import functools
from typing import Literal

import flax.linen as nn

from dense_jax.models.rcnn.mask_rcnn import MaskRCNN
from dense_jax.tasks.detection import Detection
from dense_jax.train import cli
from dense_jax.train.config import Factor, from_scratch, smoke
from examples.efficientnet_lite0 import (
    NORMALISATION,
    LiteConfig,
    Trunk,
    fine_tune,
    freeze_norms,
    frozen_paths,
)
from experiments import mask_rcnn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LiteConfig, mask_rcnn.Config):
    """The weights; then the flags of Mask R-CNN."""

    backbone: Literal["efficientnet_lite0"] = "efficientnet_lite0"  # pyrefly: ignore
    """Trunk."""
    neck: Literal["fpn"] = "fpn"
    """Maps of proposals and boxes: a feature pyramid."""
    stride_in: Literal["3x3"] = "3x3"
    """Not for this trunk, which has no residual blocks of three convolutions."""
    remat: Literal["off"] = "off"
    """Not for this trunk."""
    width: Factor = 0.25
    """Factor for the channels of the pyramid and the heads."""


class LiteMaskRCNN(MaskRCNN):
    """Mask R-CNN on EfficientNet-Lite0; see `dense_jax.models.rcnn.mask_rcnn`."""

    @property
    def frozen(self) -> tuple[str, ...]:
        """Regular expressions for the paths of the parameters that no gradient reaches."""
        norms = ("^backbone/.*bn[012]/",) if self.bn == "frozen" else ()
        pyramid = () if self.trunk_learns else ("^fpn/",)
        return (*frozen_paths(self._num_frozen), *pyramid, *norms)

    def _trunk(self) -> nn.Module:
        return Trunk(
            centred=True,
            bn=self.bn if self.trunk_learns else "frozen",
            num_frozen=self._num_frozen,
            axis_name=self.axis_name,
            dtype=self.dtype,
            name="backbone",
        )


_BASE = from_scratch(
    Config(
        bn="train", trained_stages=5, normalisation=NORMALISATION, batch_size=4,
        learning_rate=1e-3, max_objects=50, rois_per_image=64,
    )
)  # fmt: skip
PRESETS = {
    "coco": dataclasses.replace(
        _BASE, dataset="coco", short_side=(256,), max_side=384, num_steps=800, eval_every=400
    ),
    "nuclei": dataclasses.replace(
        _BASE, dataset="nuclei", short_side=(256,), max_side=384, max_objects=100, num_steps=400,
        anchor_sizes=(8, 16, 32, 64, 128), rois_per_image=128, eval_every=200,
    ),
    "smoke": smoke(
        dataclasses.replace(_BASE, width=1 / 32, short_side=(32,))
    ),
}  # fmt: skip


def build(config: Config, num_classes: int) -> Detection:
    """Returns the task: the network, its losses and its use."""
    return mask_rcnn.build(config, num_classes, LiteMaskRCNN)


if __name__ == "__main__":
    cli.run(functools.partial(fine_tune, build), PRESETS, __doc__, adapt=freeze_norms)
