"""The network that a command line names: that of a run, or of a script's preset and flags."""

import importlib
import pathlib
import shlex
from typing import NamedTuple

import flax.linen as nn
import tyro

from dense_jax import runs
from dense_jax.errors import UserError
from dense_jax.train.config import RunConfig


class Network(NamedTuple):
    """A network with the configuration it was built from; `run` has its weights, if trained."""

    config: RunConfig
    model: nn.Module
    run: runs.Run | None


def network(
    run: pathlib.Path | None, script: str, preset: str, flags: str, num_classes: int
) -> Network:
    """Builds a network.

    Args:
      run: folder of a training run; if given, the rest is not used.
      script: script that defines the network.
      preset: one of its presets.
      flags: more of its flags, in one string, such as "--stride=32 --pad-mode=same".
      num_classes: number of classes.

    Raises:
      UserError: one of these does not exist.
    """
    if run is not None:
        opened = runs.load(run)
        return Network(opened.config, opened.model, opened)
    try:
        module = importlib.import_module(script)
    except ImportError as error:
        raise UserError(f"--script={script} cannot be imported: {error}") from error
    if not hasattr(module, "PRESETS"):
        raise UserError(f"--script={script} has no PRESETS: give a module of experiments/")
    if preset not in module.PRESETS:
        raise UserError(f"--preset={preset}: {script} has {', '.join(module.PRESETS)}")
    presets = {name: (name, value) for name, value in module.PRESETS.items()}
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise UserError(f"--flags={flags}: {error}; close it") from error
    config = tyro.extras.overridable_config_cli(presets, args=[preset, *words])
    return Network(config, module.build_model(config, num_classes), None)
