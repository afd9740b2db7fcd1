"""Imports point one way, and each field-made library has one home."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# What each part of the library may import from the library, besides itself and errors.
ALLOWED = {
    "ops": {"ops"},
    "layers": {"ops", "layers"},
    "models": {"ops", "layers", "models"},
    "objectives": {"ops", "objectives"},
    "metrics": {"ops", "metrics"},
    "data": {"data", "ops", "viz"},
    "train": {"data", "train"},
    "viz": set(),
    "weights": {"weights"},
    "releases": {"layers", "models", "releases", "weights"},  # of weights only the rules
    "start": {"data", "releases", "runs", "train", "weights"},
    "analysis": {"ops", "layers", "analysis", "viz"},
    "scripts": {"train"},
    "runs": {"data", "train", "scripts"},
    "infer": {"data", "infer", "ops", "runs", "viz"},
    "evaluation": {
        *("analysis", "data", "evaluation", "infer", "metrics", "objectives", "runs", "train"),
        "viz",
    },
    "tasks": {
        *("data", "evaluation", "infer", "metrics", "objectives", "ops", "runs", "scripts"),
        *("start", "tasks", "train"),
    },
    "sweep": {"analysis", "data", "evaluation", "runs", "scripts", "sweep", "train"},
}
HOMES = {
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "hotcoco": {"data", "metrics"},
    "orbax": {"train"},
    "optax": {"train", "tasks", "analysis"},  # analysis trains the decoders that it compares
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


def offences(path):
    """What a file may not import."""
    names = list(imports(path))
    is_ours = path.is_relative_to(ROOT / "dense_jax")
    for name in names:
        first = name.split(".")[0]
        if first in {"tensorflow", "torchvision"}:
            yield name
        scripts = (ROOT / "experiments", ROOT / "examples")
        if first == "experiments" and path.parent not in scripts:
            yield name  # a script may extend another one
        if first == "torch" and not path.is_relative_to(ROOT / "benchmarks"):
            yield name
        if name.startswith("dense_jax.commands") and path.parts[-2] not in {
            "dense_jax",
            "commands",
        }:
            yield name
        if first in HOMES and is_ours and part(path) not in HOMES[first]:
            yield f"{name}, which has another home"
    if is_ours and part(path) in ALLOWED:
        ours = {name.split(".")[1] for name in names if name.startswith("dense_jax.")}
        yield from sorted(ours - ALLOWED[part(path)] - {"errors"})


def test_imports_point_one_way():
    wrong = [f"{p.relative_to(ROOT)}: {name}" for p in FILES for name in offences(p)]
    assert not wrong, "\n".join(wrong)


def test_every_room_has_its_place():
    rooms = {part(p) for p in FILES if p.is_relative_to(ROOT / "dense_jax")}
    assert rooms - set(ALLOWED) == {"commands", "__init__", "__main__", "errors"}


def test_releases_read_no_files():
    users = [p for p in FILES if p.is_relative_to(ROOT / "dense_jax" / "releases")]
    names = {name for p in users for name in imports(p) if name.startswith("dense_jax.weights")}
    assert {".".join(name.split(".")[:3]) for name in names} == {"dense_jax.weights.rules"}


def test_init_files_are_empty():
    inits = [p for p in FILES if p.name == "__init__.py"]
    assert inits
    assert [p for p in inits if p.read_text()] == [ROOT / "dense_jax" / "__init__.py"]


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
