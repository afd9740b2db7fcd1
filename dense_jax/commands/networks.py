"""Builds the network that a command line names: from a run, or from a script's preset and flags."""

import pathlib
import shlex
from typing import NamedTuple

from dense_jax import scripts
from dense_jax.errors import UserError
from dense_jax.tasks import trained
from dense_jax.tasks.task import Task


class Network(NamedTuple):
    """A task with its network; `run` holds trained weights, or is None."""

    task: Task
    run: trained.Run | None


def network(
    run: pathlib.Path | None, script: str, preset: str, flags: str, num_classes: int
) -> Network:
    """Builds a network.

    Args:
      run: folder of a training run; with a run, the other arguments have no effect.
      script: script that defines the network.
      preset: one of its presets.
      flags: more of its flags, in one string, such as "--stride=32 --pad-mode=same".
      num_classes: number of classes.

    Raises:
      UserError: the run, script, preset or a flag does not exist.
    """
    if run is not None:
        opened = trained.load(run)
        return Network(opened.task, opened)
    module = scripts.load(script)
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise UserError(f"--flags={flags}: {error}; close the quotes") from error
    return Network(module.build(module.parse([preset, *words]), num_classes), None)
