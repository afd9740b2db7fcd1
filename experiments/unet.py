"""U-Net (Ronneberger, Fischer, Brox, MICCAI 2015, arXiv:1505.04597).

    python -m experiments.unet demo
    python -m experiments.unet paper --data-dir=/data/em_membrane
    python -m experiments.unet nuclei --data-dir=/data/dsb2018 --loss-weight=none --elastic=off

Results: docs/results.md has every run with its command, device and the paper's figure.

Differences: (1) The paper gives neither learning rate nor number of steps; see the presets. (2) The
test labels of ISBI 2012 are not public: scores are of slices held out from the training stack. (3)
"7 rotated versions" are all but one of the square's 8 symmetries, the class balance w_c is the
inverse frequency in each image, mirrors do not repeat the edge: the paper does not say. (4) Rates
are those of the mean over pixels; the paper's sum is --loss-norm=sum.
"""

import dataclasses
import functools
import pathlib
from typing import Literal

from dense_jax import report
from dense_jax.data.border import BorderWeights, SeparateTouching
from dense_jax.data.dataset import Source
from dense_jax.data.normalise import Normalise
from dense_jax.data.transforms import (
    ElasticDeformation,
    GreyJitter,
    RandomCrop,
    RandomFlip,
    RandomRotate90,
    RandomScale,
    Transform,
)
from dense_jax.errors import UserError
from dense_jax.infer.tiles import average_views, overlap_tile
from dense_jax.models.unet import UNet, Up
from dense_jax.tasks import cells, prediction, semantic
from dense_jax.train.config import FROM_SCRATCH, SMOKE, RunConfig
from dense_jax.train.state import TrainState
from dense_jax.train.step import AXIS

_CELLS = ("em_membrane", "nuclei", "nuclei_border")  # What has objects to be told apart.
_EVAL_MULTIPLE = 32  # Images are padded to multiples of this for evaluation.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Flags of the paper's claims, then the shared ones."""

    # The network.
    variant: Literal["paper", "release"] = "paper"
    """release: the last up-convolution keeps 128 channels, and ReLUs follow up-convolutions."""
    padding: Literal["valid", "same"] = "valid"
    """valid as published (Figure 1): mirrored context and overlapping tiles. same: pad by zeros."""
    up: Up = "upconv"
    """Upsampling: the paper's up-convolution 2x2, or a resize by 2 and a 3x3 convolution."""
    depth: Literal[3, 4, 5] = 4
    """Number of poolings."""
    width: int = 64
    """Channels of the first level; 16 or 32 for trials."""
    norm: Literal["none", "batch", "group"] = "none"
    """Normalisation behind 3x3 convolutions; group makes tiles disagree where they meet."""
    dropout_rate: float = 0.5
    """Dropout at the end of the contracting path (Section 3.1)."""
    kernel_init: Literal["he", "xavier"] = "he"
    """Initial kernels: the paper's (Section 3) or the release's."""

    # Training.
    tile: int | None = 572
    """Side of training images and, with --padding=valid, of tiles; None takes whole images."""
    mirror: Literal["reflect", "symmetric"] = "reflect"
    """Whether mirrored context repeats the pixel at the edge (symmetric)."""
    loss_weight: Literal["none", "class", "border"] = "none"
    """Pixel weights: balanced classes, and borders between cells on top (Equation 2)."""
    w0: float = 10.0
    """Height of the border weights (Equation 2)."""
    sigma: float = 5.0
    """Width of the border weights, in pixels (Equation 2)."""
    ridge: int = 0
    """Width of the background carved between touching objects, in pixels (Section 3)."""
    elastic: Literal["off", "on"] = "off"
    """Elastic deformation (Section 3.1)."""
    elastic_grid: int = 3
    """Nodes along each side of the field of displacements."""
    elastic_std: float = 10.0
    """Standard deviation of the displacements, in pixels."""
    augment: Literal["none", "mirror", "dihedral"] = "none"
    """mirror left and right; dihedral also turns by 90, 180 and 270 degrees."""
    grey_jitter: float = 0.0
    """Changes of contrast and brightness by up to this many standard deviations."""

    # Prediction.
    tta: Literal["none", "rot7", "d4"] = "none"
    """Averages over 7 turned and mirrored images (Section 4), or all 8."""

    def __post_init__(self) -> None:
        """Raises UserError for values that no network or batch can have."""
        super().__post_init__()
        least = {"width": 1, "ridge": 0, "elastic_grid": 2, "w0": 0, "elastic_std": 0}
        for name, value in (least | {"grey_jitter": 0}).items():
            if getattr(self, name) < value:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}={getattr(self, name)}: give {value} or more")
        if self.sigma <= 0:
            raise UserError(f"--sigma={self.sigma}: give a width above 0")
        if not 0 <= self.dropout_rate < 1:
            raise UserError(f"--dropout-rate={self.dropout_rate}: give a value in [0, 1)")
        valid, net = self.padding == "valid", build_model(self, 1)
        if valid and (self.tile is None or self.scale != 1):
            raise UserError(
                "--padding=valid needs --tile and --scale=1: give these, or --padding=same"
            )
        if not valid and (_EVAL_MULTIPLE * self.scale) % net.grid:
            raise UserError(
                f"--scale={self.scale}: {net.depth} poolings need a multiple of "
                f"{net.grid / _EVAL_MULTIPLE}"
            )
        if self.tile is not None:
            _check_side(net, self.tile, f"--tile={self.tile}")


def build_model(config: Config, num_classes: int) -> UNet:
    """The network of a configuration."""
    return UNet(
        num_classes,
        variant=config.variant,
        padding=config.padding,
        up=config.up,
        depth=config.depth,
        width=config.width,
        norm=config.norm,
        dropout_rate=config.dropout_rate,
        kernel_init=config.kernel_init,
        axis_name=AXIS,
        dtype=config.dtype,
    )


def _check_side(net: UNet, side: int, what: str) -> None:
    try:
        net.check_side(side)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error


# Momentum, batch, tile and augmentation of Section 3; what the paper leaves open is ours.
_PAPER = Config(
    dataset="em_membrane",
    normalisation="grey_image",
    batch_size=1,
    momentum=0.99,
    weight_decay=0.0,
    learning_rate=1e-3,
    warmup_steps=500,
    num_steps=30_000,
    loss_weight="border",
    elastic="on",
    augment="dihedral",
    grey_jitter=0.25,
    tta="rot7",
    eval_batch_size=1,
    eval_every=3000,
    save_every=3000,
)
# For few steps: a fast optimiser, and batch normalisation for inputs of any contrast.
_FAST = Config(
    padding="same",
    tile=None,
    norm="batch",
    width=16,
    dropout_rate=0.1,
    **FROM_SCRATCH,
    learning_rate=2e-3,
)

PRESETS = {
    "paper": _PAPER,
    "em": dataclasses.replace(
        _FAST, dataset="em_membrane", normalisation="grey_image", padding="valid", tile=316,
        loss_weight="border", loss_norm="weights", elastic="on", augment="dihedral",
        grey_jitter=0.25, batch_size=4, num_steps=1000, eval_batch_size=2, eval_every=500,
        save_every=500,
    ),
    "nuclei": dataclasses.replace(
        _FAST, dataset="nuclei", normalisation="grey_image", tile=256, ridge=1,
        loss_weight="border", loss_norm="weights", elastic="on", augment="dihedral",
        grey_jitter=0.25, num_steps=1000, eval_batch_size=4, eval_every=500, save_every=500,
    ),
    "demo": dataclasses.replace(
        _FAST, width=8, num_steps=1000, eval_every=500, save_every=500, eval_batch_size=16,
    ),
    "smoke": dataclasses.replace(
        _FAST, **SMOKE, depth=3, width=2, loss_weight="border", ridge=1, elastic="on",
        augment="dihedral",
    ),
}  # fmt: skip


def build_transforms(config: Config) -> list[Transform]:
    """Training transforms: grey values, then bending, carving and weighing, then the tile."""
    transforms: list[Transform] = []
    if config.scale != 1:
        transforms.append(RandomScale(config.scale, config.scale))
    transforms.append(Normalise(config.normalisation))
    if config.grey_jitter:
        transforms.append(GreyJitter(config.grey_jitter, config.grey_jitter))
    if config.elastic == "on":
        transforms.append(ElasticDeformation(config.elastic_grid, config.elastic_std))
    if config.ridge:
        transforms.append(SeparateTouching(config.ridge))
    if config.loss_weight != "none":
        w0 = config.w0 if config.loss_weight == "border" else 0.0
        transforms.append(BorderWeights(w0, config.sigma))
    if config.tile is not None:
        context = build_model(config, 1).context
        transforms.append(RandomCrop(config.tile - 2 * context, context, config.mirror))
    if config.augment != "none":
        transforms.append(RandomFlip())
    if config.augment == "dihedral":
        transforms.append(RandomRotate90())
    return transforms


def build_predict(config: Config, model: UNet) -> prediction.PredictFn:
    """Overlapping tiles without padding, else one pass; averaged over ``--tta``."""
    if config.padding == "same" or config.tile is None:
        predict = prediction.whole_image(model, config.scale)
    else:
        predict = overlap_tile(
            model, tile=config.tile, context=model.context, grid=model.grid, mirror=config.mirror
        )
    return predict if config.tta == "none" else average_views(predict, config.tta)


def test_time(config: Config) -> str:
    """What `build_predict` does, for the protocol card."""
    if config.padding == "same" and config.tta == "none":
        return prediction.ONE_PASS
    tiles = f"tiles of {config.tile} pixels" if config.padding == "valid" else "one pass"
    views = {"none": "no flips", "rot7": "7 turned and mirrored views", "d4": "all 8 views"}
    return f"{tiles}, {views[config.tta]}, no scales"


def extra_scores(
    config: Config,
    predict: prediction.PredictFn,
    variables: prediction.Variables,
    source: Source,
    draw_in: pathlib.Path | None = None,
) -> dict[str, float]:
    """Scores of objects and membranes, on the datasets that have them; draws them in a folder."""
    if config.dataset not in _CELLS:
        return {}
    membranes = config.dataset == "em_membrane"
    found = cells.measure(predict, variables, source, config, membranes=membranes)
    if draw_in is not None:
        found.write(draw_in, source)
    return found.scores


def check_images(config: Config, model: UNet, source: Source) -> None:
    """Refuses whole images that do not fit the network, before anything is built."""
    if config.tile is None:
        for side in source.size(0):
            seen = max(1, round(side * config.scale))
            _check_side(model, seen, "an image is seen whole (give --tile to cut it)")


def main(config: Config) -> TrainState:
    """Trains, evaluates and reports."""
    dataset = semantic.load_dataset(config)
    model, transforms = build_model(config, dataset.classes.num_classes), build_transforms(config)
    check_images(config, model, dataset.split("train"))
    predict, folder = build_predict(config, model), pathlib.Path(config.workdir or "")
    state = semantic.train_and_evaluate(
        config,
        model,
        dataset,
        transforms,
        predict=predict,
        test_time=test_time(config),
        extra_scores=functools.partial(extra_scores, config, predict, draw_in=folder),
    )
    if config.dataset in _CELLS:
        cells.write_training_pictures(folder, dataset.split("train"), transforms)
        report.write_report(folder)  # again, with these
    return state


if __name__ == "__main__":
    semantic.run(main, PRESETS, __doc__)
