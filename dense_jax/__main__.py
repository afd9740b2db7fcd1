"""Commands for runs and datasets: ``python -m dense_jax COMMAND --help``."""

import functools
import importlib
import pathlib
import pkgutil
from collections.abc import Callable
from typing import Any

import tyro

from dense_jax import commands
from dense_jax.tasks import trained
from dense_jax.train import cli


def expanded(run: Callable[..., None]) -> Callable[..., None]:
    """Returns a command that expands "~" in its paths, which a shell does not do behind "="."""

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(of, value))
        return value.expanduser() if isinstance(value, pathlib.Path) else value

    @functools.wraps(run)
    def command(**arguments: Any) -> None:
        run(**{name: of(value) for name, value in arguments.items()})

    return command


def main() -> None:
    """Runs one command. Each module of `dense_jax.commands` with a function ``run`` is one."""
    with cli.exit_on_user_error():
        cli.set_up_jax()
        names = (module.name for module in pkgutil.iter_modules(commands.__path__))
        modules = {name: importlib.import_module(f"{commands.__name__}.{name}") for name in names}
        runs = {
            name.replace("_", "-"): expanded(vars(module)["run"])
            for name, module in modules.items()
            if "run" in vars(module)
        }
        with trained.of_its_network():
            tyro.extras.subcommand_cli_from_dict(
                runs, prog="python -m dense_jax", description=__doc__
            )


if __name__ == "__main__":
    main()
