"""The command line of every training script: a preset, then any field as a flag."""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import tyro

from dense_jax.errors import UserError
from dense_jax.train.config import RunConfig

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def run(main: Callable[[ConfigT], object], presets: Mapping[str, ConfigT], doc: str | None) -> None:
    """Parses ``PRESET --flag=value ...`` and calls ``main`` with the configuration.

    Args:
      main: the script's main function.
      presets: configurations by name; each preset's fields are its flags' defaults.
      doc: the script's docstring, shown by ``--help``.
    """
    doc = doc or ""
    with exit_on_user_error():
        config = tyro.extras.overridable_config_cli(
            {name: (_first_line(preset), preset) for name, preset in presets.items()},
            description=doc,
            prog=f"python -m {script_name()}",
        )
        if config.workdir is None:
            preset = next(word for word in sys.argv[1:] if word in presets)
            workdir = pathlib.Path("runs") / f"{script_name().rpartition('.')[2]}-{preset}"
            config = dataclasses.replace(config, workdir=str(workdir))
        set_up_jax()
        main(config)


class exit_on_user_error:  # noqa: N801  (used like a function)
    """Context that ends the program with ``error: ...`` and status 2 on a UserError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)


def script_name() -> str:
    """The dotted name of the running script, such as ``experiments.fcn``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else pathlib.Path(sys.argv[0]).stem


def set_up_jax() -> None:
    """Turns on the persistent compilation cache unless the environment has chosen one."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("DENSE_JAX_CACHE", "~/.cache/dense_jax")
        jax.config.update(
            "jax_compilation_cache_dir", str(pathlib.Path(cache).expanduser() / "xla")
        )


def _first_line(preset: RunConfig) -> str:
    return f"{preset.dataset}, {preset.num_steps} steps of {preset.batch_size} images"
