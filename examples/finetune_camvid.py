"""Fine-tunes a published network on your own data, with the training loop of this library.

    python -m examples.finetune_camvid camvid --data-dir=/data/camvid --weights=tensors.npz
    python -m examples.finetune_camvid camvid --data-dir=/data/camvid --learning-rate=3e-3 \
        --workdir=runs/scratch

What to learn: a script needs `Config`, `PRESETS` and `build`; its runs then resume, predict and
evaluate like those of experiments/ (`python -m dense_jax predict --run ...`). --init reads a folder
of weights: parameters by their paths, and the normalisation of their images. Parameters of another
shape, here the scores of 21 classes, keep their random start, and the run lists them.

The network is DeepLabv3 on MobileNetV2 from `examples/mobilenet_deeplab.py`, trained on photographs
of VOC's 21 classes; the data are CamVid's streets. Without --weights it starts from random
parameters, without the batch normalisation that the release has folded into its kernels.
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

_IMAGES = "none"  # 0 to 255: the network's first line scales them to -1..1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LabelConfig):
    """Flags of this script, then the shared ones."""

    weights: str | None = None
    """The trained network's tensors.npz. Default: random parameters."""
    crop: tuple[int, int] = (129, 177)
    """Height and width of training images, preferably 8 m + 1."""


_SCRATCH = from_scratch(Config(normalisation=_IMAGES))
PRESETS = {
    "camvid": dataclasses.replace(
        _SCRATCH, dataset="camvid", scale=0.5, num_steps=800, eval_every=400
    ),
    "smoke": smoke(dataclasses.replace(_SCRATCH, crop=(33, 33))),
}


def build(config: Config, num_classes: int) -> Semantic:
    """Returns the task. Training images are resized by 0.75 to 1.5, cropped and flipped."""
    transforms = whole_images(config.normalisation, config.scale, "mirror_scale", config.crop)
    return Semantic(config, MobileNetDeepLab(num_classes, dtype=config.dtype), transforms)


def main(config: Config) -> TrainState:
    """Trains, evaluates and reports; returns the last state."""
    if config.weights:
        folder = pathlib.Path(f"{config.workdir}/start")
        if not has_checkpoint(config.workdir or ""):  # otherwise the run resumes
            variables, account = mobilenet_deeplab.load(pathlib.Path(config.weights))
            facts = {"from": config.weights, "normalisation": _IMAGES, "account": account.summary()}
            start.save(folder, variables, facts)
        config = dataclasses.replace(config, init=f"run:{folder}")
    return training.run(build, config)


if __name__ == "__main__":
    cli.run(main, PRESETS, __doc__)
