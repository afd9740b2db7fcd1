"""Rules that bring the tensors of a weight file into the tree of a network, and back again.

A rule is a name in the file, the name here, and how the layouts differ:

    Rule("layer{s}.{b}.conv{i}.weight", "params/layer{s}_{b}/conv{i}/kernel", "conv")

where {...} stands for a whole number, the same wherever the word is the same. Names here are the
path in the tree of variables. A table of rules stands beside each model. Whatever a table does not
explain, of the file or of the network, is an error; nothing is dropped or left as initialised in
silence.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dense_jax.errors import UserError
from dense_jax.weights.account import Account, Row, Shape

_FIELD = re.compile(r"\{(\w+)\}")


class Rule(NamedTuple):
    """What a tensor of a file is here.

    Attributes:
      source: name in the file, with fields.
      target: path here with the same fields, such as "batch_stats/bn{i}/mean"; None for tensors
        that have no counterpart, such as torch's count of batches.
      layout: a name of `LAYOUTS`, or several joined by "+", done from left to right.
    """

    source: str
    target: str | None
    layout: str = "same"


class Release(NamedTuple):
    """Weights that somebody has published, for networks here of certain names.

    Attributes:
      name: whose they are.
      rules: what its tensors are here.
      trunk: patterns ("*/layer*") of the parameters that the file has to have. What stands on the
        trunk may be of another kind here.
      normalisation: what the weights expect of images, a name of
        `dense_jax.data.transforms.NORMALISATIONS`; in RGB, BGR is permuted by the rules.
    """

    name: str
    rules: tuple[Rule, ...]
    trunk: tuple[str, ...]
    normalisation: str


class _Step(NamedTuple):
    """A change of layout: what it is called, the way here (with the shape here), the way back."""

    name: str
    load: Callable[[np.ndarray, Shape], np.ndarray]
    unload: Callable[[np.ndarray], np.ndarray]


def _permuted(*axes: int) -> _Step:
    back = tuple(int(axis) for axis in np.argsort(axes))
    return _Step("permuted", lambda x, _: x.transpose(axes), lambda x: x.transpose(back))


def _split(x: np.ndarray, shape: Shape) -> np.ndarray:
    height, width, channels, features = shape
    return x.reshape(features, channels, height, width).transpose(2, 3, 1, 0)


def _join(x: np.ndarray) -> np.ndarray:
    return x.transpose(3, 2, 0, 1).reshape(x.shape[3], -1)


def _reversed(name: str, *axes: int) -> _Step:
    return _Step(name, lambda x, _: np.flip(x, axes), lambda x: np.flip(x, axes))


LAYOUTS: dict[str, _Step] = {
    "conv": _permuted(2, 3, 1, 0),
    "conv_ohwi": _permuted(1, 2, 3, 0),
    "up_conv": _permuted(2, 3, 0, 1),
    "up_conv_hwoi": _permuted(0, 1, 3, 2),
    "depthwise": _permuted(0, 1, 3, 2),
    "depthwise_1hwc": _permuted(1, 2, 0, 3),
    "dense": _permuted(1, 0),
    "dense_chw": _Step("reshaped", _split, _join),
    "flip": _reversed("flipped", 0, 1),
    "bgr": _reversed("channels reversed", 2),
}
"""How tensors are laid out in files, by name; "same" is none of these. Here kernels are
[h, w, i, o] of cross-correlation for images in RGB.

  conv            [o, i, h, w]: torch, Caffe, Theano; any number of groups
  conv_ohwi       [o, h, w, i]: TensorFlow Lite
  up_conv         [i, o, h, w]: torch's ConvTranspose2d and Caffe's Deconvolution, of one group
  up_conv_hwoi    [h, w, o, i]: TensorFlow's conv2d_transpose, Keras's Conv2DTranspose
  depthwise       [h, w, i, 1]: TensorFlow's and Keras's depthwise convolution, of multiplier 1
  depthwise_1hwc  [1, h, w, i]: TensorFlow Lite's
  dense           [o, i]: torch's Linear, Caffe's InnerProduct
  dense_chw       [o, c h w]: the same on a map flattened in this order, here a kernel of its size
  flip            after one of these: a kernel stored for true convolution is turned around
  bgr             after one of these: the first kernel of a network for images in BGR
"""


def conv(source: str, target: str, layout: str = "conv") -> tuple[Rule, Rule]:
    """Rules for torch's name of a convolution (`dense_jax.layers.conv.Conv`)."""
    return (
        Rule(f"{source}.weight", f"params/{target}/kernel", layout),
        Rule(f"{source}.bias", f"params/{target}/bias"),
    )


def dense(source: str, target: str) -> tuple[Rule, Rule]:
    """Rules for torch's name of a fully connected layer (`flax.linen.Dense`)."""
    return conv(source, target, "dense")


def batch_norm(source: str, target: str) -> tuple[Rule, ...]:
    """Rules for torch's name of a batch normalisation; its count of batches has no use here."""
    return (
        Rule(f"{source}.weight", f"params/{target}/scale"),
        Rule(f"{source}.bias", f"params/{target}/bias"),
        Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
        Rule(f"{source}.running_var", f"batch_stats/{target}/var"),
        Rule(f"{source}.num_batches_tracked", None),
    )


def outline(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns arrays of the same names, shapes and dtypes that take no memory.

    For `match` and `choose`: some files have to read a tensor each time its shape is asked for.

    Raises:
      UserError: a name holds line breaks or other signs that would garble what is printed of it.
    """
    for name in tensors:
        if not name.isprintable():
            raise UserError(f"the file has a tensor named {name!r:.80}: give another file")
    return {
        name: np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape)
        for name, tensor in tensors.items()
    }


def match(
    template: Any,
    tensors: Mapping[str, Any],
    rules: Sequence[Rule],
    *,
    required: Sequence[str] = ("*",),
    ignore: Sequence[str] = (),
) -> Account:
    """Says what would become of each tensor and each parameter; no values are read.

    Args:
      template: the network's variables {"params": ..., "batch_stats": ...}; shapes will do.
      tensors: the file's arrays by name.
      rules: what they are here.
      required: patterns ("*/layer*") of the parameters that must come from the file. Others may be
        new here, and their counterparts may be left in the file.
      ignore: patterns of the names of tensors to leave in the file.

    Raises:
      UserError: two tensors are the same parameter.
      ValueError: two rules speak of one tensor.
    """
    leaves: dict[str, Any] = traverse_util.flatten_dict(template, sep="/")
    rows, taken = [], {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if _matches(name, ignore):
            rows.append(Row("ignored", name, shape))
            continue
        found = [rule for rule in rules if _pattern(rule.source).fullmatch(name)]
        if len(found) > 1:
            raise ValueError(f"Two rules speak of {name}: {found[0]} and {found[1]}.")
        rule = found[0] if found else None
        if rule is None or rule.target is None:
            rows.append(Row("ignored" if rule else "unexpected", name, shape))
            continue
        target = _renamed(name, rule.source, rule.target)
        if target not in leaves:
            status = "unexpected" if _matches(target, required) else "ignored"
            rows.append(Row(status, name, shape, note=f"no {target} here"))
            continue
        if target in taken:
            raise UserError(
                f"the tensors {taken[target]} and {name} are both {target}: give --ignore={name} "
                "to leave one out"
            )
        taken[target] = name
        leaf = leaves[target]
        fault = _fault(tensor, rule.layout, leaf)
        status, note = "loaded", _changes(tensor, rule.layout, leaf)
        if fault:
            status, note = ("misfit" if _matches(target, required) else "new"), fault
        rows.append(Row(status, name, shape, target, tuple(leaf.shape), rule.layout, note))
    for target, leaf in leaves.items():
        if target not in taken:
            status = "missing" if _matches(target, required) else "new"
            rows.append(Row(status, target=target, target_shape=tuple(leaf.shape)))
    return Account(tuple(rows))


def load(
    template: Any,
    tensors: Mapping[str, Any],
    rules: Sequence[Rule],
    *,
    required: Sequence[str] = ("*",),
    ignore: Sequence[str] = (),
    path: str = "the file",
) -> tuple[dict[str, Any], Account]:
    """Brings a file's tensors into the tree of a network.

    Args:
      template: see `match`, as the next four.
      tensors: these are read one by one.
      rules: the table.
      required: parameters that must come from the file.
      ignore: tensors to leave in it.
      path: the file, for messages.

    Returns:
      The tree of those parameters that come from the file, in the dtypes of the template. Arrays
      that need no other dtype are views of the file's. And the account.

    Raises:
      UserError: something is not explained.
    """
    account = match(template, outline(tensors), rules, required=required, ignore=ignore)
    account.check(path)
    leaves: dict[str, Any] = traverse_util.flatten_dict(template, sep="/")
    loaded = {}
    for row in account.rows:
        if row.status == "loaded":
            values = _to_ours(tensors[row.source], row.layout, leaves[row.target].shape)
            loaded[row.target] = values.astype(leaves[row.target].dtype, copy=False)
    return traverse_util.unflatten_dict(loaded, sep="/"), account


def unload(variables: Any, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Returns a network's variables under the names and in the layouts of a file: `load` undone.

    What rules drop is not there. Arrays are views where the layouts allow it.

    Raises:
      UserError: a parameter has no name there.
      ValueError: two rules speak of one parameter.
    """
    tensors = {}
    for path, leaf in traverse_util.flatten_dict(variables, sep="/").items():
        found = [r for r in rules if r.target and _pattern(r.target).fullmatch(path)]
        if len(found) > 1:
            raise ValueError(f"Two rules speak of {path}: {found[0]} and {found[1]}.")
        if not found or found[0].target is None:
            raise UserError(f"{path} has no name among the weights asked for: take another table")
        rule, values = found[0], np.asarray(leaf)
        for step in reversed(_steps(rule.layout)):
            values = step.unload(values)
        tensors[_renamed(path, rule.target or "", rule.source)] = values
    return tensors


def choose(releases: Sequence[Release], template: Any, tensors: Mapping[str, Any]) -> Release:
    """Returns the release that finds most of a file's tensors in a network by name.

    Raises:
      UserError: none finds any.
    """

    def num_pairs(release: Release) -> int:
        rows = match(template, tensors, release.rules).rows
        return sum(bool(row.source and row.target) for row in rows)

    best = max(releases, key=num_pairs)
    if not num_pairs(best):
        known = ", ".join(dict.fromkeys(release.name for release in releases))
        raise UserError(
            f"this network has no parameter for the tensors of the file "
            f"({', '.join(list(tensors)[:3])}, ...): names are known of {known}"
        )
    return best


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    """The names that a template with fields stands for."""
    parts, seen = [], set()
    for i, part in enumerate(_FIELD.split(template)):
        if i % 2 == 0:
            parts.append(re.escape(part))
        else:
            parts.append(f"(?P={part})" if part in seen else f"(?P<{part}>[0-9]+)")
            seen.add(part)
    return re.compile("".join(parts))


def _renamed(name: str, old: str, new: str) -> str:
    found = _pattern(old).fullmatch(name)
    assert found is not None
    return new.format(**found.groupdict())


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _steps(layout: str) -> list[_Step]:
    return [] if layout == "same" else [LAYOUTS[name] for name in layout.split("+")]


def _to_ours(tensor: Any, layout: str, shape: Shape) -> np.ndarray:
    for step in _steps(layout):
        tensor = step.load(tensor, shape)
    return tensor


def _fault(tensor: Any, layout: str, leaf: Any) -> str:
    """Why a tensor cannot be a parameter, or ""."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return f"of dtype {tensor.dtype}"
    try:
        shape = tuple(_to_ours(tensor, layout, leaf.shape).shape)
    except ValueError:  # other axes, or not as many values
        shape = None
    if shape != tuple(leaf.shape):
        return f"{tuple(tensor.shape)} does not make {tuple(leaf.shape)}"
    return ""


def _changes(tensor: Any, layout: str, leaf: Any) -> str:
    changes = [step.name for step in _steps(layout)]
    if tensor.dtype != leaf.dtype:
        changes.append(f"cast from {tensor.dtype}")
    return ", ".join(changes)
