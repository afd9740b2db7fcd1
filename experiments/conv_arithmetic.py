"""Convolution arithmetic made visible, and checkerboard artefacts measured.

    python -m experiments.conv_arithmetic figures --workdir=lecture --animate
    python -m experiments.conv_arithmetic checkerboard
    python -m experiments.conv_arithmetic checkerboard --upsample deconv_k3s2 subpixel

Dumoulin, Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285.
Odena, Dumoulin, Olah, "Deconvolution and checkerboard artifacts", Distill 2016.

figures writes SVG and PNG (and GIF) of each figure, and sizes.md: the fifteen output sizes and how
many of the library's layers agree with them. checkerboard trains a small decoder for each way of
upsampling to enlarge generated pictures four times, and measures the pattern that it leaves on
constant and on smooth inputs before and after. Results: docs/conv_arithmetic.md.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from PIL import Image

from dense_jax import viz
from dense_jax.analysis import arithmetic, checkerboard, checkerboard_figures, figures
from dense_jax.analysis.drawing import Drawing
from dense_jax.data.datasets.shapes import Shapes, ShapesSpec
from dense_jax.errors import UserError
from dense_jax.layers.upsample import Kind
from dense_jax.train import cli

FACTOR = 4  # Two doublings.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What is drawn and what is measured."""

    workdir: str = "runs/conv-arithmetic"
    """Folder for everything that is written."""
    figures: bool = True
    """Draw the figures."""
    animate: bool = False
    """Also write GIFs in which the window slides over the input."""
    checkerboard: bool = True
    """Train the decoders and measure."""
    upsample: tuple[Kind, ...] = typing.get_args(Kind)
    """Ways of upsampling to compare."""
    num_seeds: int = 5
    """Runs of each, with seeds 0, 1, ..."""
    num_steps: int = 1000
    """Training steps (Adam, cosine decay)."""
    batch_size: int = 8
    """Pictures of 64 x 64 in a step."""
    width: int = 16
    """Channels of the decoder."""
    learning_rate: float = 3e-3
    """Of the first step."""

    def __post_init__(self) -> None:
        """Raises UserError for values with which nothing can be trained."""
        for name in ("num_seeds", "num_steps", "batch_size", "width"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}={getattr(self, name)}: give at least 1")
        if not self.learning_rate > 0:
            raise UserError(f"--learning-rate={self.learning_rate}: give a rate above 0")
        if not self.upsample:
            raise UserError("--upsample names nothing: give at least one way of upsampling")


COMMANDS = {
    "figures": Config(checkerboard=False),
    "checkerboard": Config(figures=False),
    "smoke": Config(num_seeds=1, num_steps=2, batch_size=2, width=4),
}
_WORDS = {
    "figures": "every figure of docs/conv_arithmetic.md",
    "checkerboard": "the trained comparison; minutes",
    "smoke": "all of it, hardly trained",
}


def write(drawing: Drawing, path: pathlib.Path) -> None:
    """Writes PATH.svg and PATH.png."""
    path.with_suffix(".svg").write_text(drawing.svg())
    Image.fromarray(drawing.picture()).save(path.with_suffix(".png"))


def sizes_table() -> str:
    """The fifteen relationships and the number of layers whose size they give.

    Raises:
      ValueError: one of them does not hold.
    """
    lines = ["| # | case | formula | layers checked |", "|---|---|---|---|"]
    for row in arithmetic.RELATIONSHIPS:
        layers = list(arithmetic.layers(row, 5))
        if wrong := [layer for layer in layers if row.size(layer) != layer.output_size]:
            raise ValueError(f"relationship {row.number} does not hold for {wrong[0]}")
        lines.append(f"| {row.number} | {row.case} | `{row.formula}` | {len(layers)} |")
    return "\n".join([*lines, ""])


def draw(config: Config) -> None:
    """Writes every figure, and animations if asked to."""
    folder = pathlib.Path(config.workdir)
    for name, build in figures.FIGURES.items():
        write(build(), folder / name)
    for name in figures.ANIMATIONS if config.animate else ():
        first, *rest = map(Image.fromarray, figures.animation(name))
        path = folder / f"{name}.gif"
        first.save(path, save_all=True, append_images=rest, duration=700, loop=0)
    (folder / "sizes.md").write_text(sizes_table())
    print(f"{len(figures.FIGURES)} figures and sizes.md are in {folder}")


def pictures(num: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Generated pictures [num, 64, 64, 3] around zero, and their means over 4 x 4 pixels."""
    spec = ShapesSpec(size=(64, 64), num_train=num, num_val=num, noise=0.0)
    source = Shapes(spec, split)
    large = np.stack([source[i]["image"] for i in range(num)]).astype(np.float32) / 255 - 0.5
    small = large.reshape(num, 16, FACTOR, 16, FACTOR, 3).mean((2, 4))
    return small, large


# Compiled once for each model, not for each seed.
init = jax.jit(lambda model, key, x: model.init(key, x), static_argnums=0)
decode = jax.jit(lambda model, variables, x: model.apply(variables, x), static_argnums=0)


def build_optimizer(config: Config) -> optax.GradientTransformation:
    """Adam with cosine decay to zero."""
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.num_steps))


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(config: Config, model: checkerboard.Decoder, variables, state, small, large) -> tuple:
    """Takes one step on the mean squared error; returns the new variables and optimiser state."""

    def loss(variables):
        return jnp.mean(jnp.square(model.apply(variables, small) - large))

    updates, state = build_optimizer(config).update(jax.grad(loss)(variables), state)
    return optax.apply_updates(variables, updates), state


def train(
    config: Config, model: checkerboard.Decoder, seed: int, small: np.ndarray, large: np.ndarray
) -> tuple:
    """Returns the variables before and after training."""
    first = init(model, jax.random.key(seed), small[:1])
    rng, variables, state = np.random.default_rng(seed), first, build_optimizer(config).init(first)
    for _ in range(config.num_steps):
        chosen = rng.integers(len(small), size=config.batch_size)
        variables, state = step(config, model, variables, state, small[chosen], large[chosen])
    return first, variables


def measure(config: Config) -> tuple[list[dict], list[np.ndarray]]:
    """Trains and measures each decoder.

    Returns:
      One row for each kind and seed; and for each kind three pictures of seed 0: what becomes of a
      constant input before and after training, and of a picture that was not trained on.
    """
    (small, large), (val_small, val_large) = pictures(256, "train"), pictures(64, "val")
    colours = checkerboard.probes()["constant"]
    rows, shown = [], []
    for kind, seed in itertools.product(config.upsample, range(config.num_seeds)):
        model = checkerboard.Decoder(kind, config.width)
        variables = train(config, model, seed, small, large)
        row: dict = {"upsample": kind, "seed": seed}
        row["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(variables[0]))
        for state, values in zip(("untrained", "trained"), variables, strict=True):
            levels = checkerboard.measure(functools.partial(decode, model, values), FACTOR)
            row |= {f"{state}_{name}": level for name, level in levels.items()}
        before, after = (functools.partial(decode, model, values) for values in variables)
        enlargement = after(val_small)
        row["psnr"] = float(-10 * np.log10(np.mean(np.square(enlargement - val_large))))
        rows.append(row)
        print(f"{kind}, seed {seed}: {row['trained_constant']:.1f} dB, PSNR {row['psnr']:.1f}")
        if seed == 0:
            shown += [enlarged(before(colours), None), enlarged(after(colours), 16)]
            shown.append(enlarged(enlargement, 1))
    return rows, shown


def enlarged(y: jax.Array, contrast: float | None) -> np.ndarray:
    """The middle 48 x 48 pixels of the first picture, each 4 x 4, as uint8 [192, 192, 3].

    Contrast 1 shows the picture as it is, None and other factors what departs from its mean: at
    full range, or enlarged by the factor.
    """
    edge = (np.shape(y)[1] - 48) // 2
    y = checkerboard.interior(y, edge)[0]
    if contrast != 1:
        y = y - y.mean((0, 1))
        y = y * (contrast or 0.5 / max(float(np.abs(y).max()), 1e-3))  # not the rounding
    pixels = np.clip((y + 0.5) * 255, 0, 255).astype(np.uint8)
    return pixels.repeat(4, axis=0).repeat(4, axis=1)


COLUMNS = {
    "untrained_constant": "constant, untrained",
    "trained_constant": "constant, trained",
    "untrained_smooth": "smooth, untrained",
    "trained_smooth": "smooth, trained",
    "trained_ripple": "ripple",
    "psnr": "PSNR",
}


def table(rows: list[dict]) -> str:
    """Means and standard deviations over seeds, as Markdown."""
    lines = ["| upsample | parameters | " + " | ".join(COLUMNS.values()) + " |", "|---" * 8 + "|"]
    for kind in dict.fromkeys(row["upsample"] for row in rows):
        runs = [row for row in rows if row["upsample"] == kind]
        cells = [kind, f"{runs[0]['parameters']:,}"]
        for column in COLUMNS:
            values = np.array([row[column] for row in runs])
            spread = f" \u00b1 {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def gradients_table(num_seeds: int) -> str:
    """Levels of the pattern in input gradients, as Markdown."""
    lines = ["| layer | random | ones |", "|---|---|---|"]
    for name, (random, ones) in checkerboard.gradient_levels(num_seeds).items():
        lines.append(f"| {name} | {random:.1f} | {'' if ones is None else f'{ones:.1f}'} |")
    return "\n".join([*lines, ""])


def compare(config: Config) -> None:
    """Writes checkerboard.json, .md, .svg and .png and checkerboard_outputs.png."""
    folder = pathlib.Path(config.workdir)
    rows, shown = measure(config)
    record = {"config": dataclasses.asdict(config), "jax": jax.__version__, "rows": rows}
    (folder / "checkerboard.json").write_text(json.dumps(record, indent=1) + "\n")
    text = table(rows) + "\n" + gradients_table(config.num_seeds)
    (folder / "checkerboard.md").write_text(text)
    measures = ("untrained_constant", "trained_constant", "trained_smooth")
    runs: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in config.upsample}
    for row in rows:
        runs[row["upsample"]].append(tuple(row[measure] for measure in measures))
    names = tuple(" input, ".join(reversed(measure.split("_"))) for measure in measures)
    write(checkerboard_figures.levels(runs, names), folder / "checkerboard")
    by_picture = [p for column in range(3) for p in shown[column::3]]
    sheet = viz.contact_sheet(by_picture, columns=len(config.upsample))
    heading = Drawing(sheet.shape[1], 28, "")
    for column, kind in enumerate(config.upsample):
        heading.text((column + 0.5) * sheet.shape[1] / len(config.upsample), 14, kind, size=15)
    sheet = np.concatenate([heading.picture(1), sheet])
    Image.fromarray(sheet).quantize(256).save(folder / "checkerboard_outputs.png")
    print(text + f"checkerboard.json, .md, .svg, .png are in {folder}")


def main(config: Config) -> None:
    """Draws and measures what the configuration asks for."""
    pathlib.Path(config.workdir).mkdir(parents=True, exist_ok=True)
    if config.figures:
        draw(config)
    if config.checkerboard:
        compare(config)


if __name__ == "__main__":
    with cli.exit_on_user_error():
        cli.set_up_jax()
        main(
            tyro.extras.overridable_config_cli(
                {name: (_WORDS[name], preset) for name, preset in COMMANDS.items()},
                description=__doc__,
                prog="python -m experiments.conv_arithmetic",
            )
        )
