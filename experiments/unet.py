"""U-Net (Ronneberger, Fischer, Brox, MICCAI 2015, arXiv:1505.04597).

    python -m experiments.unet demo
    python -m experiments.unet paper --data-dir=/data/em_membrane
    python -m experiments.unet nuclei --data-dir=/data/dsb2018 --loss-weight=none --elastic=off

Results: docs/results.md has every run with its command, device and the paper's figure.

Differences: (1) The paper gives neither learning rate nor number of steps; see the presets. (2) The
test labels of ISBI 2012 are not public: scores are on slices held out from the training stack. (3)
The paper leaves open and we choose: "7 rotated versions" are 7 of the square's 8 symmetries, the
class balance w_c is the inverse frequency in each image, reflections do not repeat the edge. (4)
Learning rates are for the mean over pixels; the paper's sum is --loss-norm=sum.
"""

import dataclasses
from dataclasses import replace
from typing import Annotated, Literal

from dense_jax.data import transforms
from dense_jax.data.border import BorderWeights, SeparateTouching
from dense_jax.data.normalise import Normalise
from dense_jax.errors import refuse
from dense_jax.evaluation import cells
from dense_jax.infer.tiles import VIEWS_IN_WORDS, Views, average_views, check_tile, whole_or_tiles
from dense_jax.infer.whole_image import ONE_PASS
from dense_jax.models.unet import UNet, Up
from dense_jax.tasks import training
from dense_jax.tasks.semantic import LabelConfig, Semantic, check_sides, whole_images_fit
from dense_jax.train import config as flags
from dense_jax.train.step import AXIS

Nodes = Annotated[int, flags.Limit(lambda x: x >= 2, "2 or more")]
_EVAL_MULTIPLE = 32  # Images are padded to multiples of this for evaluation.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(LabelConfig):
    """The paper's ablations; then the flags of every semantic run."""

    variant: Literal["paper", "release"] = "paper"
    """release: the last up-convolution keeps 128 channels, and ReLUs follow up-convolutions."""
    padding: Literal["valid", "same"] = "valid"
    """valid (Figure 1): reflected context and overlapping tiles. same: zero padding."""
    up: Up = "upconv"  # The paper's up-convolution 2x2, or a resize by 2 and a 3x3 convolution.
    depth: Literal[3, 4, 5] = 4  # Number of poolings.
    width: flags.Count = 64
    """Channels of the first level; 16 or 32 for trials."""
    norm: Literal["none", "batch", "group"] = "none"
    """Normalisation after 3x3 convolutions; with group, tiles differ at their borders."""
    dropout_rate: flags.Rate = 0.5  # Dropout at the end of the contracting path (Section 3.1).
    kernel_init: Literal["he", "xavier"] = "he"  # The paper's (Section 3) or the release's.
    tile: flags.Count | None = 572  # Side of training images and valid tiles; None: whole images.
    mirror: transforms.Mirror = "reflect"  # Reflected context; symmetric repeats the edge pixel.
    loss_weight: Literal["none", "class", "border"] = "none"
    """Pixel weights. class: balanced classes. border: also borders between cells (Equation 2)."""
    w0: flags.AtLeastZero = 10.0  # Height of the border weights (Equation 2).
    sigma: flags.Factor = 5.0  # Width of the border weights, in pixels (Equation 2).
    ridge: flags.CountOrZero = 0  # Width of the background between touching objects (Section 3).
    elastic: Literal["off", "on"] = "off"  # Elastic deformation (Section 3.1).
    elastic_grid: Nodes = 3  # Displacement vectors along each side of the grid.
    elastic_std: flags.AtLeastZero = 10.0  # Standard deviation of the displacements, in pixels.
    augment: Literal["none", "mirror", "dihedral"] = "none"
    """mirror flips left and right; dihedral also rotates by 90, 180 and 270 degrees."""
    grey_jitter: flags.AtLeastZero = 0.0
    """Largest change of contrast and brightness, in standard deviations."""
    tta: Views = "none"  # Average over 7 rotated and flipped images (Section 4), or all 8.

    def __post_init__(self) -> None:
        """Raises UserError for flags that do not go together."""
        super().__post_init__()
        net, is_valid = _network(self, 1), self.padding == "valid"
        lacks = is_valid and (self.tile is None or self.scale != 1)
        least = net.grid / _EVAL_MULTIPLE
        is_odd = not is_valid and self.scale % least > 0
        refuse(lacks, "--padding=valid needs --tile and --scale=1; or give --padding=same")
        refuse(is_odd, f"--scale={self.scale}: {net.depth} poolings need a multiple of {least}")
        if self.tile is not None:
            check_sides(net.check_side, [self.tile], f"--tile={self.tile}")
            check_tile(self.tile if is_valid else None, net.context, net.grid)


def _network(config: Config, num_classes: int) -> UNet:
    return UNet(
        num_classes, variant=config.variant, padding=config.padding, up=config.up,
        depth=config.depth, width=config.width, norm=config.norm, axis_name=AXIS,
        dropout_rate=config.dropout_rate, kernel_init=config.kernel_init, dtype=config.dtype,
    )  # fmt: skip


def _fast(config: Config) -> Config:
    """Settings for few steps: fast optimisation, and batch normalisation for any contrast."""
    fast = replace(config, padding="same", tile=None, norm="batch", width=16, dropout_rate=0.1,
                   learning_rate=2e-3, eval_every=500)  # fmt: skip
    return flags.from_scratch(fast)


# Weights and augmentation of Section 3; our values if the paper gives none.
_EM = Config(dataset="em_membrane", normalisation="grey_image", loss_weight="border", elastic="on",
             augment="dihedral", grey_jitter=0.25)  # fmt: skip

PRESETS = {
    "paper": replace(  # Momentum, batch and tile of Section 3.
        _EM, batch_size=1, momentum=0.99, weight_decay=0.0, learning_rate=1e-3, warmup_steps=500,
        num_steps=30_000, tta="rot7", eval_batch_size=1, eval_every=3000, save_every=3000,
    ),
    "em": replace(_fast(_EM), padding="valid", tile=316, loss_norm="weights", batch_size=4,
                  eval_batch_size=2),
    "nuclei": replace(_fast(_EM), dataset="nuclei", tile=256, ridge=1, loss_norm="weights",
                      eval_batch_size=4),
    "demo": replace(_fast(Config()), width=8, eval_batch_size=16),
    "smoke": flags.smoke(replace(_fast(Config()), depth=3, width=2, loss_weight="border", ridge=1,
                                 elastic="on", augment="dihedral")),
}  # fmt: skip


def build(config: Config, num_classes: int) -> Semantic:
    """Returns the task: the network, its training and its use."""
    model, scale = _network(config, num_classes), config.scale
    context, inside = model.context, (config.tile or 0) - 2 * model.context
    w0 = config.w0 if config.loss_weight == "border" else 0.0
    steps = transforms.chosen(  # Bend, separate and weigh whole images, then cut the tile.
        scale != 1 and transforms.RandomScale(scale, scale),
        Normalise(config.normalisation),
        config.grey_jitter > 0 and transforms.GreyJitter(config.grey_jitter, config.grey_jitter),
        config.elastic == "on"
        and transforms.ElasticDeformation(config.elastic_grid, config.elastic_std),
        config.ridge > 0 and SeparateTouching(config.ridge),
        config.loss_weight != "none" and BorderWeights(w0, config.sigma),
        config.tile is not None and transforms.RandomCrop(inside, context, config.mirror),
        config.augment != "none" and transforms.RandomFlip(),
        config.augment == "dihedral" and transforms.RandomRotate90(),
    )
    tile = config.tile if config.padding == "valid" else None
    tiles = dict(context=context, grid=model.grid, mirror=config.mirror)
    forward, passes = whole_or_tiles(model, scale, tile, **tiles)
    words = f"{passes}, {VIEWS_IN_WORDS[config.tta]}, no scales"
    fits = whole_images_fit(model.check_side, scale)
    return Semantic(
        config, model, steps, forward=average_views(forward, config.tta),
        test_time=ONE_PASS if tile is None and config.tta == "none" else words,
        training_split=fits if config.tile is None else None,
        measures=cells.measures(config.dataset, steps),
    )  # fmt: skip


if __name__ == "__main__":
    training.main(build, PRESETS, __doc__)
