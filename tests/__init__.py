"""Tests of the library, the scripts and the commands."""

import importlib
import os
import pathlib
import types
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
_FILES = sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))
SCRIPTS = [name for name in _FILES if name != "conv_arithmetic"]  # those that train

LABELLING = [name for name in SCRIPTS if not name.endswith("_rcnn")]  # those that label pixels


def script(name: str) -> types.ModuleType:
    """Returns a training script, such as "fcn"."""
    return importlib.import_module(f"experiments.{name}")


def members(names: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Returns the members of a kind as parameters; all but those that stand for it are slow."""
    return [x if x in fast else pytest.param(x, marks=pytest.mark.slow) for x in names]


def npz(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the arrays of a file, which is closed again."""
    with np.load(path) as arrays:
        return dict(arrays)
