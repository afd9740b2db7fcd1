"""Trains a network of others further on data of one's own, in the loop of every experiment here.

    python -m examples.finetune_camvid camvid --data-dir=/data/camvid --weights=tensors.npz
    python -m examples.finetune_camvid camvid --data-dir=/data/camvid --learning-rate=3e-3 \
        --workdir=runs/scratch

What to learn: a script needs `Config`, `PRESETS` and `build`, and its runs resume, predict and
evaluate like those of experiments/ (`python -m dense_jax predict --run ...`). Weights
come in as a folder that --init reads: parameters by their paths here and what images they expect.
Those of another shape, here the scores of 21 classes, start anew, and the run says so.

The network is DeepLabv3 on MobileNetV2 of `examples/mobilenet_deeplab.py`, trained on photographs
of VOC's 21 classes; the data are CamVid's streets. Without --weights it starts from nothing, and
without the batch normalisation that the release has folded into its kernels.
"""

import dataclasses
import pathlib

from dense_jax import start
from dense_jax.data.transforms import whole_images
from dense_jax.tasks import training
from dense_jax.tasks.semantic import LabelConfig, Semantic
from dense_jax.train import cli
from dense_jax.train.checkpoint import has_checkpoint
from dense_jax.train.config import from_scratch, smoke
from dense_jax.train.state import TrainState
from examples import mobilenet_deeplab
from examples.mobilenet_deeplab import MobileNetDeepLab

_IMAGES = "none"  # 0 to 255: the network's first line brings them to -1..1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LabelConfig):
    """Flags of this script, then the shared ones."""

    weights: str | None = None
    """The trained network's tensors.npz; by default training starts from random parameters."""
    crop: tuple[int, int] = (129, 177)
    """Height and width of training images, at best 8 m + 1."""


_SCRATCH = from_scratch(Config(normalisation=_IMAGES))
PRESETS = {
    "camvid": dataclasses.replace(
        _SCRATCH, dataset="camvid", scale=0.5, num_steps=800, eval_every=400
    ),
    "smoke": smoke(dataclasses.replace(_SCRATCH, crop=(33, 33))),
}


def build(config: Config, num_classes: int) -> Semantic:
    """The network, and its training images: 0.75 to 1.5 times their size, cropped and flipped."""
    transforms = whole_images(config.normalisation, config.scale, "mirror_scale", config.crop)
    return Semantic(config, MobileNetDeepLab(num_classes, dtype=config.dtype), transforms)


def main(config: Config) -> TrainState:
    """Trains, evaluates and reports; returns the last state."""
    if config.weights:
        folder = pathlib.Path(f"{config.workdir}/start")
        if not has_checkpoint(config.workdir or ""):  # else the run goes on
            variables, account = mobilenet_deeplab.load(pathlib.Path(config.weights))
            told = {"from": config.weights, "normalisation": _IMAGES, "account": account.summary()}
            start.save(folder, variables, told)
        config = dataclasses.replace(config, init=f"run:{folder}")
    return training.run(build, config)


if __name__ == "__main__":
    cli.run(main, PRESETS, __doc__)
