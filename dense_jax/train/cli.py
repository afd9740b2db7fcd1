"""The command line of every training script: a preset, then any field as a flag."""

import dataclasses
import errno
import logging
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import tyro

from dense_jax.errors import UserError
from dense_jax.train import processes
from dense_jax.train.config import RunConfig, own_flags_first

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def run(
    main: Callable[[ConfigT], object],
    presets: Mapping[str, ConfigT],
    doc: str | None,
    *,
    adapt: Callable[[ConfigT], ConfigT] | None = None,
) -> None:
    """Parses ``PRESET --flag=value ...`` and calls ``main`` with the configuration.

    Args:
      main: the script's main function.
      presets: configurations by name; each preset's fields are its flags' defaults.
      doc: the script's docstring, shown by ``--help``.
      adapt: (configuration) -> configuration, called after parsing; it may change the flags that
        the user did not give (see `is_given`).
    """
    doc = doc or ""
    for config_class in {type(preset) for preset in presets.values()}:
        own_flags_first(config_class)
    with exit_on_user_error("interrupted; the same command resumes from the last checkpoint"):
        config = tyro.extras.overridable_config_cli(
            {name: (_first_line(preset), preset) for name, preset in presets.items()},
            description=doc,
            prog=f"python -m {script_name()}",
        )
        if not config.workdir:
            preset = next(word for word in sys.argv[1:] if word in presets)
            workdir = pathlib.Path("runs") / f"{script_name().rpartition('.')[2]}-{preset}"
            config = dataclasses.replace(config, workdir=str(workdir))
        processes.start(
            config.distributed, config.coordinator, config.process_id, config.num_processes
        )
        set_up_jax()
        # Orbax's threads print when a save fails; the user error is one line.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        main(adapt(config) if adapt else config)


def is_given(flag: str) -> bool:
    """Whether the command line contains a flag, such as "--crop"."""
    return any(word.split("=")[0].replace("_", "-") == flag for word in sys.argv[1:])


_DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
)


class exit_on_user_error:  # noqa: N801  (used like a function)
    """Context that ends the program with ``error: ...`` and status 2 on a UserError.

    A file that may not be read, a full or read-only disk and a lack of memory count as user errors
    too, wherever they occur.

    Args:
      interrupted: the message after Ctrl-C.
    """

    def __init__(self, interrupted: str = "interrupted"):
        self.interrupted = interrupted

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            path = error.filename2 or error.filename or "a file"
            error = UserError(f"cannot use {path} ({error.strerror}): give another path")
        if isinstance(error, MemoryError):
            error = UserError(f"not enough memory ({error})")
        if isinstance(error, jax.errors.JaxRuntimeError) and processes.are_many():
            error = processes.ended(error)
        if isinstance(error, UserError):
            line = str(error).splitlines()[0]  # Grain appends lines of its own
            print(f"error: {line}", file=sys.stderr)
            processes.leave(2)
        if isinstance(error, BrokenPipeError):  # such as `| head` causes
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            processes.leave(1)
        if isinstance(error, KeyboardInterrupt):
            print(self.interrupted, file=sys.stderr)
            processes.leave(130)
        if isinstance(error, Exception) and jax.distributed.is_initialized():
            sys.excepthook(type(error), error, error.__traceback__)
            processes.leave(1)


def script_name() -> str:
    """The dotted name of the running script, such as ``experiments.fcn``.

    For a file that is run by its path, the file's name; "__main__" for a notebook or ``python -``.
    """
    if spec := getattr(sys.modules["__main__"], "__spec__", None):
        return spec.name
    file = _main_file()
    return file.stem if file else "__main__"


def command() -> str:
    """The command line of this process, to run it again."""
    if spec := getattr(sys.modules["__main__"], "__spec__", None):
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])
    return shlex.join(["python", *sys.argv]) if _main_file() else "python"


def _main_file() -> pathlib.Path | None:
    file = getattr(sys.modules["__main__"], "__file__", None)
    return pathlib.Path(file) if file and pathlib.Path(file).is_file() else None


def set_up_jax() -> None:
    """Turns on the persistent compilation cache unless the environment already names one."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("DENSE_JAX_CACHE", "~/.cache/dense_jax")
        jax.config.update(
            "jax_compilation_cache_dir", str(pathlib.Path(cache).expanduser() / "xla")
        )


def _first_line(preset: RunConfig) -> str:
    return f"{preset.dataset}, {preset.num_steps} steps of {preset.batch_size} images"
