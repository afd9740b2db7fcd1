"""Trains a network of others further on data of one's own, in the loop of every experiment here.

    python -m examples.finetune_camvid camvid --data-dir=/data/camvid --weights=tensors.npz
    python -m examples.finetune_camvid camvid --data-dir=/data/camvid --learning-rate=3e-3 \
        --workdir=runs/scratch

What to learn: a script needs `Config`, `PRESETS`, `build_model` and `main`, and its runs resume,
predict and evaluate like those of experiments/ (`python -m dense_jax predict --run ...`). Weights
come in as a folder that --init reads: parameters by their paths here and what images they expect.
Those of another shape, here the scores of 21 classes, start anew, and the run says so.

The network is DeepLabv3 on MobileNetV2 of `examples/mobilenet_deeplab.py`, trained on photographs
of VOC's 21 classes; the data are CamVid's streets. Without --weights it starts from nothing, and
without the batch normalisation that the release has folded into its kernels.
"""

import dataclasses
import pathlib

from flax import linen as nn

from dense_jax import start
from dense_jax.data.transforms import Transform, whole_images
from dense_jax.tasks import semantic
from dense_jax.train.checkpoint import has_checkpoint
from dense_jax.train.config import FROM_SCRATCH, SMOKE, RunConfig
from dense_jax.train.state import TrainState
from examples import mobilenet_deeplab
from examples.mobilenet_deeplab import MobileNetDeepLab

_IMAGES = "none"  # 0 to 255: the network's first line brings them to -1..1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Flags of this script, then the shared ones."""

    weights: str | None = None
    """The trained network's tensors.npz; by default training starts from random parameters."""
    crop: tuple[int, int] = (129, 177)
    """Height and width of training images, at best 8 m + 1."""


PRESETS = {
    "camvid": Config(
        **FROM_SCRATCH,
        dataset="camvid",
        scale=0.5,
        normalisation=_IMAGES,
        learning_rate=1e-3,
        num_steps=800,
        eval_every=400,
        save_every=400,
    ),
    "smoke": Config(**FROM_SCRATCH | SMOKE, normalisation=_IMAGES, crop=(33, 33)),
}


def build_model(config: Config, num_classes: int) -> nn.Module:
    """The network of a configuration."""
    return MobileNetDeepLab(num_classes, dtype=config.dtype)


def build_transforms(config: Config) -> list[Transform]:
    """Training transforms: images of 0.75 to 1.5 times their size, crops, mirrors."""
    return whole_images(config.normalisation, config.scale, "mirror_scale", config.crop)


def main(config: Config) -> TrainState:
    """Trains, evaluates and reports; returns the last state."""
    if config.weights:
        folder = pathlib.Path(f"{config.workdir}/start")
        if not has_checkpoint(config.workdir or ""):  # else the run goes on
            variables, account = mobilenet_deeplab.load(pathlib.Path(config.weights))
            told = {"from": config.weights, "normalisation": _IMAGES, "account": account.summary()}
            start.save(folder, variables, told)
        config = dataclasses.replace(config, init=f"run:{folder}")
    dataset = semantic.load_dataset(config)
    model = build_model(config, dataset.classes.num_classes)
    return semantic.train_and_evaluate(config, model, dataset, build_transforms(config))


if __name__ == "__main__":
    semantic.run(main, PRESETS, __doc__)
