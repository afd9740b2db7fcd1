"""Tests of the library, the scripts and the commands."""

import importlib
import pathlib
import types

ROOT = pathlib.Path(__file__).parent.parent
_FILES = sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))
SCRIPTS = [name for name in _FILES if name != "conv_arithmetic"]  # those that train


def script(name: str) -> types.ModuleType:
    """Returns a training script, such as "fcn"."""
    return importlib.import_module(f"experiments.{name}")
