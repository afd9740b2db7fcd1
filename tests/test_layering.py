"""Imports point one way, and each field-made library has one home."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# What each part of the library may import from the library, besides itself and errors.
ALLOWED = {
    "ops": {"ops"},
    "layers": {"ops", "layers"},
    "models": {"ops", "layers", "models", "weights"},  # of weights only the rules
    "losses": {"ops"},
    "metrics": {"ops", "metrics"},
    "data": {"data", "ops", "viz"},
    "train": {"data", "train"},
    "viz": set(),
    "weights": {"weights"},
    "analysis": {"ops", "layers", "analysis", "viz"},
    "infer": {"data", "infer", "ops", "viz"},
    "report": {"data", "viz"},
    "runs": {"data", "train"},
}
HOMES = {
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "orbax": {"train"},
    "optax": {"train", "tests"},
}
FILES = sorted(
    p
    for d in ("dense_jax", "experiments", "examples", "benchmarks")
    for p in ROOT.glob(f"{d}/**/*.py")
)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path):
    relative = path.relative_to(ROOT / "dense_jax")
    return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    names = list(imports(path))
    for name in names:
        first = name.split(".")[0]
        assert first not in {"tensorflow", "torchvision"}, name
        assert first != "torch" or path.is_relative_to(ROOT / "benchmarks"), name
        assert first != "experiments", f"nothing imports the experiments: {name}"
        if first in HOMES and path.is_relative_to(ROOT / "dense_jax"):
            assert part(path) in HOMES[first], f"{name} has another home"
    if path.is_relative_to(ROOT / "dense_jax") and part(path) in ALLOWED:
        allowed = ALLOWED[part(path)] | {"errors"}
        ours = {name.split(".")[1] for name in names if name.startswith("dense_jax.")}
        assert ours <= allowed, f"{part(path)} may not import {ours - allowed}"


def test_models_read_no_files():
    users = [p for p in FILES if p.is_relative_to(ROOT / "dense_jax" / "models")]
    names = {name for p in users for name in imports(p) if name.startswith("dense_jax.weights")}
    assert names == {"dense_jax.weights.rules"}


def test_init_files_are_empty():
    inits = [p for p in FILES if p.name == "__init__.py"]
    assert inits
    assert all(not p.read_text() for p in inits)


@pytest.mark.parametrize(
    ("call", "home"),
    [
        ("jax.pmap(", "dense_jax/train/step.py"),
        ("lax.conv_general_dilated(", "dense_jax/layers/conv.py"),
    ],
)
def test_a_call_has_one_home(call, home):
    users = [str(p.relative_to(ROOT)) for p in FILES if call in p.read_text()]
    assert users == [home]
