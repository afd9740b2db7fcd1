"""Draws convolution arithmetic and measures checkerboard artefacts.

    python -m experiments.conv_arithmetic figures --workdir=lecture --animate
    python -m experiments.conv_arithmetic checkerboard
    python -m experiments.conv_arithmetic checkerboard --upsample deconv_k3s2 subpixel

Dumoulin, Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285.
Odena, Dumoulin, Olah, "Deconvolution and checkerboard artifacts", Distill 2016.

figures writes each figure as SVG and PNG (and GIF), and sizes.md: the fifteen formulas of output
sizes, and for how many of the library's layers each holds. checkerboard trains a small decoder for
each kind of upsampling to enlarge generated pictures four times, and measures its pattern on
constant and smooth inputs before and after training. Results: docs/conv_arithmetic.md.
"""

import dataclasses
import itertools
import pathlib
import typing

import numpy as np
import optax
import tyro

from dense_jax.analysis import (
    arithmetic_tables,
    checkerboard,
    checkerboard_report,
    decoders,
    figures,
)
from dense_jax.data.datasets.shapes import Shapes, ShapesSpec
from dense_jax.errors import UserError
from dense_jax.layers.upsample import Kind
from dense_jax.train import cli


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The figures to draw and the decoders to measure."""

    workdir: str = "runs/conv-arithmetic"
    """Folder for all output."""
    figures: bool = True
    """Draw the figures."""
    animate: bool = False
    """Also write GIFs in which the window slides over the input."""
    checkerboard: bool = True
    """Train and measure the decoders."""
    upsample: tuple[Kind, ...] = typing.get_args(Kind)
    """Kinds of upsampling to compare."""
    num_seeds: int = 5
    """Runs of each kind, with seeds 0, 1, ..."""
    num_steps: int = 1000
    """Training steps (Adam, cosine decay)."""
    batch_size: int = 8
    """Pictures of 64 x 64 in each step."""
    width: int = 16
    """Channels of the decoder."""
    learning_rate: float = 3e-3
    """Learning rate of the first step."""

    def __post_init__(self) -> None:
        """Raises UserError for values that make training impossible."""
        for name in ("num_seeds", "num_steps", "batch_size", "width"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}={getattr(self, name)}: give at least 1")
        if not self.learning_rate > 0:
            raise UserError(f"--learning-rate={self.learning_rate}: give a rate above 0")
        if not self.upsample:
            raise UserError("--upsample is empty: give at least one kind of upsampling")


COMMANDS = {
    "figures": ("every figure of docs/conv_arithmetic.md", Config(checkerboard=False)),
    "checkerboard": ("the trained comparison; minutes", Config(figures=False)),
    "smoke": (
        "everything, with two training steps",
        Config(num_seeds=1, num_steps=2, batch_size=2, width=4),
    ),
}


def pictures(num: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns generated pictures, reduced to 16 x 16 pixels and at 64 x 64."""
    source = Shapes(ShapesSpec(size=(64, 64), num_train=num, num_val=num, noise=0.0), split)
    return decoders.pictures([source[i]["image"] for i in range(num)])


def compare(config: Config, folder: pathlib.Path) -> None:
    """Trains and measures each decoder, and writes the comparison."""
    train, val = pictures(256, "train"), pictures(64, "val")
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.num_steps))
    steps = {"num_steps": config.num_steps, "batch_size": config.batch_size}
    rows, columns = [], []
    for kind, seed in itertools.product(config.upsample, range(config.num_seeds)):
        model = checkerboard.Decoder(kind, config.width)
        decoder = decoders.train(model, optimizer, *train, seed=seed, **steps)
        row = {"upsample": kind, "seed": seed, **decoders.measure(decoder, *val)}
        rows.append(row)
        print(f"{kind}, seed {seed}: {row['trained_constant']:.1f} dB, PSNR {row['psnr']:.1f}")
        if seed == 0:
            columns.append((kind, decoders.outputs(decoder, val[0])))
    tables = checkerboard_report.write(folder, dataclasses.asdict(config), rows, columns)
    print(tables + f"checkerboard.json, .md, .svg, .png are in {folder}")


def main(config: Config) -> None:
    """Draws and measures by the configuration."""
    folder = pathlib.Path(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    if config.figures:
        figures.save(folder, animate=config.animate)
        (folder / "sizes.md").write_text(arithmetic_tables.sizes())
        print(f"{len(figures.FIGURES)} figures and sizes.md are in {folder}")
    if config.checkerboard:
        compare(config, folder)


if __name__ == "__main__":
    with cli.exit_on_user_error():
        cli.set_up_jax()
        main(
            tyro.extras.overridable_config_cli(
                COMMANDS, description=__doc__, prog="python -m experiments.conv_arithmetic"
            )
        )
