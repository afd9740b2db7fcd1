"""Commands for runs and datasets: ``python -m dense_jax COMMAND --help``."""

import importlib
import pkgutil

import tyro

from dense_jax import commands
from dense_jax.tasks import trained
from dense_jax.train import cli


def main() -> None:
    """Runs one command. Each module of `dense_jax.commands` with a function ``run`` is one."""
    with cli.exit_on_user_error():
        cli.set_up_jax()
        names = (module.name for module in pkgutil.iter_modules(commands.__path__))
        modules = {name: importlib.import_module(f"{commands.__name__}.{name}") for name in names}
        runs = {
            name.replace("_", "-"): vars(module)["run"]
            for name, module in modules.items()
            if "run" in vars(module)
        }
        with trained.of_its_network():
            tyro.extras.subcommand_cli_from_dict(
                runs, prog="python -m dense_jax", description=__doc__
            )


if __name__ == "__main__":
    main()
