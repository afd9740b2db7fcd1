"""Our parameters under torchvision's names and in torch's layout, by one rule."""

import re
from typing import Any

from flax import traverse_util

_KINDS = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def torch_name(path):
    """("layer1_0", "bn1", "scale") -> "layer1.0.bn1.weight"."""
    *modules, kind = path
    return ".".join([*(re.sub(r"_(\d)", r".\1", name) for name in modules), _KINDS[kind]])


def torch_leaves(variables) -> dict[str, Any]:
    """{torchvision's name: leaf}; the leaves may be shapes only."""
    trees = [traverse_util.flatten_dict(variables[name]) for name in ("params", "batch_stats")]
    return {torch_name(path): leaf for tree in trees for path, leaf in tree.items()}


def torch_axes(leaf):
    """Torch's order of our axes: [h, w, i, o] to [o, i, h, w], [i, o] to [o, i]."""
    return {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]


def torch_shapes(variables):
    """{torchvision's name: torch's shape}."""
    return {
        name: tuple(leaf.shape[axis] for axis in torch_axes(leaf))
        for name, leaf in torch_leaves(variables).items()
    }


def num_keys(names):
    """How many keys torch's state dict has: it counts batches in every normalisation too."""
    return len(names) + sum(name.endswith("running_mean") for name in names)
