"""Training scripts as values: what a module of ``experiments/``, or of a user, defines.

A script is known by its module's name and its file. The file decides: another module of the same
name, such as one in a user's own ``experiments/`` folder, is not taken for it.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import io
import pathlib
import re
import shlex
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tyro

from dense_jax.errors import UserError
from dense_jax.train.config import RunConfig

_ROOT = pathlib.Path(__file__).parent.parent  # ours lie in experiments/ beside this package


@dataclasses.dataclass(frozen=True)
class Script:
    """What a training script defines.

    Attributes:
      name: of its module, such as "experiments.fcn".
      config_class: its flags.
      build: (configuration, number of classes) -> what the run is, a `dense_jax.tasks.task.Task`.
      presets: configurations by name.
    """

    name: str
    config_class: type[RunConfig]
    build: Callable[[Any, int], Any]
    presets: Mapping[str, RunConfig]

    def parse(self, words: Sequence[str]) -> RunConfig:
        """Reads ``PRESET --flags`` as the script itself will read them.

        Raises:
          UserError: a flag, value or preset that the script does not take.
        """
        if words[0] not in self.presets:
            known = ", ".join(self.presets)
            raise UserError(f"{self.name} has no preset {words[0]}: give {known}")
        presets = {name: (name, preset) for name, preset in self.presets.items()}
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
                return tyro.extras.overridable_config_cli(presets, args=list(words))
        except SystemExit as error:
            # tyro has printed a title, a rule, the reason, a blank line or rule, and advice.
            blocks = re.split(r"\n[ -]*\n", told.getvalue().strip())
            reason = " ".join(blocks[1].split())
            raise UserError(f"{reason.rstrip('.')} (in {shlex.join(words)})") from error


def load(name: str) -> Script:
    """Imports a training script by the name of its module, or by its path.

    Raises:
      UserError: it cannot be imported, or trains nothing.
    """
    try:
        is_file = name.endswith(".py")
        module = _import_file(pathlib.Path(name)) if is_file else importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise UserError(
            f"{name} cannot be imported ({error}): give a module such as experiments.fcn"
        ) from error
    return of(module, name)


def of(module: types.ModuleType, name: str) -> Script:
    """Returns what a module defines.

    Raises:
      UserError: it trains nothing.
    """
    found = vars(module)
    if missing := [key for key in ("Config", "build") if key not in found]:
        raise UserError(
            f"{name} trains no network (it has no {missing[0]}): give a module such as "
            "experiments.fcn"
        )
    return Script(name, found["Config"], found["build"], found.get("PRESETS", {}))


def file_of(config: RunConfig) -> str | None:
    """The file that defines a configuration's class, relative for scripts of ours; None if none."""
    module = sys.modules[type(config).__module__]
    file = getattr(module, "__file__", None)
    if file is None or not pathlib.Path(file).is_file():  # a notebook, or `python -`
        return None
    path = pathlib.Path(file).resolve()
    return path.relative_to(_ROOT).as_posix() if path.is_relative_to(_ROOT) else str(path)


def reopen(name: str, file: str | None) -> Script:
    """Imports the script that a run folder names.

    Args:
      name: of its module when it trained.
      file: its file then, as `file_of` gave it; None if that is not known.

    Raises:
      UserError: the script is not there any more.
    """
    path = _ROOT / file if file else None  # an absolute path stays as it is
    main = sys.modules["__main__"]
    if name == "__main__" and {"Config", "build"} <= set(vars(main)):
        return of(main, name)
    if name == "__main__" or name.startswith("dense_jax."):
        raise UserError(
            "it was trained from Python, and no script says what it is: pass that, "
            "dense_jax.load(folder, task=task), a task or the function that builds it"
        )
    if path is None and _is_ours(name):
        path = _ROOT.joinpath(*name.split(".")).with_suffix(".py")
    try:
        if path is not None:
            loaded = sys.modules.get(name)
            if loaded is not None and _is_file(loaded, path):
                return of(loaded, name)
            if _is_file(main, path):
                return of(main, name)
            if path.is_file():
                spec = importlib.util.find_spec(name) if _parent_is_there(name) else None
                if spec is not None and spec.origin and pathlib.Path(spec.origin).samefile(path):
                    return of(importlib.import_module(name), name)
                return of(_import_file(path), name)
        return of(importlib.import_module(name), name)
    except (ImportError, OSError) as error:
        where = f"{file or name} cannot be imported ({error})"
        raise UserError(
            f"it was trained by {name}, and {where}: put the script back, or pass what it "
            "built, dense_jax.load(folder, task=task)"
        ) from error


def _is_ours(name: str) -> bool:
    return name.startswith("experiments.")


def _is_file(module: types.ModuleType, path: pathlib.Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and path.is_file() and pathlib.Path(file).resolve() == path.resolve()


def _parent_is_there(name: str) -> bool:
    """Whether the packages above a module can be imported: else looking for it would fail."""
    parent = name.rpartition(".")[0]
    try:
        return not parent or importlib.util.find_spec(parent) is not None
    except (ImportError, ValueError):
        return False


def _import_file(path: pathlib.Path) -> types.ModuleType:
    """Imports a file under a name that no other module has; its neighbours are importable."""
    path = path.expanduser().resolve()
    name = f"dense_jax_script_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
