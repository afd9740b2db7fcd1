"""``python -m dense_jax summary``: prints the layers of a network."""

import pathlib

from dense_jax.analysis import cost
from dense_jax.commands.networks import network
from dense_jax.data.normalise import num_channels
from dense_jax.errors import UserError


def run(
    *,
    run: pathlib.Path | None = None,
    script: str = "experiments.fcn",
    preset: str = "paper",
    flags: str = "",
    size: tuple[int, int] = (500, 500),
    num_classes: int = 21,
) -> None:
    """Print a network's layers, output shapes, parameters and FLOPs, without running it.

    Args:
      run: folder of a training run; with it, the next three flags have no effect.
      script: script that defines the network.
      preset: one of its presets.
      flags: more of its flags, in one string, such as "--stride=32 --pad-mode=same".
      size: height and width of the image.
      num_classes: number of classes (a run knows its own).
    """
    if min(size) < 1:
        raise UserError(f"--size {size[0]} {size[1]}: give at least 1 1")
    chosen = network(run, script, preset, flags, num_classes)
    shape = (1, *size, num_channels(chosen.task.config.normalisation))
    print(cost.format_table(cost.summarise(chosen.task.model, shape)))
