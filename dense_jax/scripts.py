"""Training scripts as values: modules of ``experiments/``, or of a user.

A module's name and its file identify a script. The file decides: another module with the same name,
such as one in a user's own ``experiments/`` folder, is another script.
"""

import ast
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

from dense_jax.errors import UserError, printable, stays_inside
from dense_jax.train.config import RunConfig

_ROOT = pathlib.Path(__file__).parent.parent  # holds this package and its experiments/


@dataclasses.dataclass(frozen=True)
class Script:
    """The definitions of a training script.

    Attributes:
      name: name of its module, such as "experiments.fcn".
      config_class: the class of its configuration.
      build: (configuration, number of classes) -> `dense_jax.tasks.task.Task`.
      presets: configurations by name.
    """

    name: str
    config_class: type[RunConfig]
    build: Callable[[Any, int], Any]
    presets: Mapping[str, RunConfig]

    def parse(self, words: Sequence[str]) -> RunConfig:
        """Parses ``PRESET --flags`` as the script itself does.

        Raises:
          UserError: the script does not take a flag, value or preset.
        """
        preset = words[0] if words else "''"
        if preset not in self.presets:
            known = ", ".join(self.presets)
            raise UserError(f"{self.name} has no preset {preset}: give {known}")
        presets = {name: (name, preset) for name, preset in self.presets.items()}
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
                return tyro.extras.overridable_config_cli(presets, args=list(words))
        except SystemExit as error:
            # tyro prints a title, a rule, the reason, a blank line or rule, and advice.
            blocks = re.split(r"\n[ -]*\n", output.getvalue().strip())
            reason = " ".join(blocks[1].split())
            raise UserError(f"{reason.rstrip('.')} (in {shlex.join(words)})") from error


def load(name: str) -> Script:
    """Imports a training script by the name of its module, or by its path.

    Raises:
      UserError: it cannot be imported, or is no training script.
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
    """Returns the script that a module defines.

    Raises:
      UserError: the module is no training script: it has no ``Config`` or no ``build``.
    """
    names = vars(module)
    if missing := [key for key in ("Config", "build") if key not in names]:
        raise UserError(
            f"{name} trains no network (it has no {missing[0]}): give a module such as "
            "experiments.fcn"
        )
    config = names["Config"]
    if not (isinstance(config, type) and issubclass(config, RunConfig)):
        raise UserError(
            f"{name} trains no network (its Config is no RunConfig): derive it from one"
        )
    return Script(name, config, names["build"], names.get("PRESETS", {}))


def file_of(config: RunConfig) -> str | None:
    """Returns the file of a configuration's class, relative for our scripts; None without one."""
    module = sys.modules[type(config).__module__]
    file = getattr(module, "__file__", None)
    if file is None or not pathlib.Path(file).is_file():  # a notebook, or `python -`
        return None
    path = pathlib.Path(file).resolve()
    return (path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path).as_posix()


def reopen(name: str, file: str | None) -> Script:
    """Imports the script that a run folder names, if it lies where the run recorded it.

    A folder from somebody else names whatever they like, so nothing else is imported: the file must
    have the name of the module, and its text must define what a training script defines. A script
    that is not of ``experiments/`` is told.

    Args:
      name: name of its module in training.
      file: its file in training, as `file_of` returned it; None if it is unknown.

    Raises:
      UserError: the script no longer exists, is no training script, or cannot be imported.
    """
    main = sys.modules["__main__"]
    if name == "__main__" and {"Config", "build"} <= set(vars(main)):
        return of(main, name)
    if name == "__main__" or name.startswith("dense_jax."):
        raise UserError(
            "it was trained from Python, and no script defines its task: pass the task or the "
            "function that builds it, dense_jax.load(folder, task=task)"
        )
    if file is None and name.startswith("experiments."):  # early versions recorded no file
        file = f"{name.replace('.', '/')}.py"
    try:
        path = _recorded(name, file)
        loaded = sys.modules.get(name)
        for module in (loaded, main):
            if module is not None and _is_file(module, path):
                return of(module, name)
        _check_text(path)
        if not path.is_relative_to(_ROOT / "experiments"):
            print(f"the run's own script is imported: {path}", file=sys.stderr)
        module = importlib.import_module(name) if _is_found(name, path) else _import_file(path)
        return of(module, name)
    except (ImportError, OSError) as error:
        raise UserError(
            f"it was trained by {name!r}, and {printable(file or name)} cannot be imported "
            f"({error}): put the script back there, or pass its task, "
            "dense_jax.load(folder, task=task)"
        ) from error


def _recorded(name: str, file: str | None) -> pathlib.Path:
    """Returns the file that a run recorded for its module.

    Raises:
      ImportError: there is none, or it has another name.
    """
    if file is None:
        raise ImportError("the run recorded no file of it")
    if not stays_inside(file.removeprefix(pathlib.PurePath(file).anchor)):
        raise ImportError("no file has such a name")
    path = _ROOT / file  # an absolute path stays as it is
    whole_name = path.with_suffix("").as_posix()
    if path.suffix != ".py" or not whole_name.endswith((f"/{name}", f"/{name.replace('.', '/')}")):
        raise ImportError("it is no file of this module")
    if not path.is_file():
        raise ImportError("no such file")
    return path


def _check_text(path: pathlib.Path) -> None:
    """Checks that a file defines ``Config`` and ``build`` without running it.

    Raises:
      ImportError: it does not, or is not Python.
    """
    try:
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ImportError(f"it is not Python: {error}") from error
    defined = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    defined |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    names = (node for node in nodes if isinstance(node, ast.Name))
    defined |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
    if missing := [key for key in ("Config", "build") if key not in defined]:
        raise ImportError(f"it defines no {missing[0]}, so it is no training script")


def _is_found(name: str, path: pathlib.Path) -> bool:
    """Whether Python finds this file under this name; looks up the first part, which runs nothing.

    Another package of the same name would run its ``__init__.py`` before its modules are found.
    """
    first = name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(first)
    except ValueError:  # a module without a specification
        return False
    if spec is None:
        return False
    found = {
        pathlib.Path(place) for place in spec.submodule_search_locations or [spec.origin or ""]
    }
    here = path.parents[name.count(".") - 1] if "." in name else path
    return here.resolve() in {place.resolve() for place in found}


def _is_file(module: types.ModuleType, path: pathlib.Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and path.is_file() and pathlib.Path(file).resolve() == path.resolve()


def _import_file(path: pathlib.Path) -> types.ModuleType:
    """Imports a file under a unique name; it can import modules from its own folder."""
    path = path.expanduser().resolve()
    name = f"dense_jax_script_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module here
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
