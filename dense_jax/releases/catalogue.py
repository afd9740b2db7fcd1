"""Finds all published weights, and the networks that they belong to.

Each other module of this folder is a family of networks, has the name of its model, and defines

  RELEASES: tuple[Release, ...]    the tables of rules for its files
  NETWORKS: dict[str, Network]     the published networks by the names that --model takes

A new family is a new file; no other file changes.
"""

import importlib
import pkgutil
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from dense_jax import releases as folder
from dense_jax.errors import UserError
from dense_jax.weights.rules import Release


class Network(NamedTuple):
    """A network whose weights somebody has published.

    Attributes:
      build: function that builds the network.
      num_classes: number of classes of the published weights; None for a network without classes.
      has_aux: whether `build` takes `aux` for the second classifier that some files have.
    """

    build: Callable[..., nn.Module]
    num_classes: int | None = None
    has_aux: bool = False


def families() -> list[types.ModuleType]:
    """Returns the modules of the families, in alphabetical order."""
    modules = pkgutil.iter_modules(folder.__path__, f"{folder.__name__}.")
    names = sorted(module.name for module in modules if module.name != __name__)
    return [importlib.import_module(name) for name in names]


def releases() -> list[Release]:
    """Returns all releases; those with fewer rules come first.

    Several tables may have a name for each parameter of a network. The one with the fewest rules is
    the closest, and `export` takes the first.
    """
    unsorted = [release for family in families() for release in family.RELEASES]
    return sorted(unsorted, key=lambda release: (len(release.rules), release.name, release.trunk))


def networks() -> dict[str, Network]:
    """Returns all networks by name.

    Raises:
      ValueError: two families have a network of the same name.
    """
    by_name: dict[str, Network] = {}
    for family in families():
        if common := by_name.keys() & family.NETWORKS.keys():
            raise ValueError(f"{family.__name__} has {min(common)}, and another family has it too.")
        by_name |= family.NETWORKS
    return by_name


def network(name: str) -> Network:
    """Returns one network.

    Raises:
      UserError: unknown name.
    """
    by_name = networks()
    if name not in by_name:
        raise UserError(f"unknown network {name!r}; the known ones are {', '.join(by_name)}")
    return by_name[name]


def build(name: str, num_classes: int | None = None, aux: bool = False) -> nn.Module:
    """Returns a network by name.

    Args:
      name: one of `networks`. "vgg16" ends in fc7 and has the names of FCN, DeepLab and the dilated
        front end.
      num_classes: number of classes; None for the published number.
      aux: whether a network of torchvision for segmentation has its second classifier.

    Raises:
      UserError: unknown name.
    """
    published = network(name)
    options: dict[str, Any] = {"aux": aux} if published.has_aux else {}
    if published.num_classes is not None:
        options["num_classes"] = num_classes or published.num_classes
    return published.build(**options)
