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
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dense_jax.errors import UserError
from dense_jax.weights import layouts
from dense_jax.weights.account import Account, Row, Shape
from dense_jax.weights.tensors import Lazy, empty

_NUM_NAMED = 3  # tensors in an error message
_FIELD = re.compile(r"\{(\w+)\}")


class Rule(NamedTuple):
    """What a tensor of a file is here.

    Attributes:
      source: name in the file, with fields.
      target: path here with the same fields, such as "batch_stats/bn{i}/mean"; None for tensors
        that have no counterpart, such as torch's count of batches.
      layout: a name of `layouts.LAYOUTS`, or several joined by "+", done from left to right.
      role: "whole": the tensor is the parameter. "alias": it is, under a name that other files of
        this kind have; `unload` does not use it. "part": it is added to the tensor that is the
        parameter; likewise.
      constant: for layers that networks may have as a constant: what they then compute with, from
        the shape here. A tensor of other values does not fit such a network.
    """

    source: str
    target: str | None
    layout: str = "same"
    role: Literal["whole", "alias", "part"] = "whole"
    constant: Callable[[Shape], Any] | None = None


class Release(NamedTuple):
    """Weights that somebody has published, for networks here of certain names.

    Attributes:
      name: whose they are.
      rules: what its tensors are here.
      trunk: patterns ("*/layer*") of the parameters that the file has to have, as far as a network
        has any of a pattern. What stands on the trunk may be of another kind here.
      normalisation: what the weights expect of images, a name of
        `dense_jax.data.normalise.NORMALISATIONS`; in RGB, BGR is permuted by the rules.
      absent: patterns of the parameters that its files never have; they stay as initialised.
      needs: what else a network has to be like to compute what the release did, for people; "".
      hollow: patterns of the tensors that its files fill with NaN, by which they are known.
    """

    name: str
    rules: tuple[Rule, ...]
    trunk: tuple[str, ...]
    normalisation: str
    absent: tuple[str, ...] = ()
    needs: str = ""
    hollow: tuple[str, ...] = ()


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


def caffe_conv(source: str, target: str, layout: str = "rows+conv") -> tuple[Rule, Rule]:
    """Rules for Caffe's name of a Convolution, or of an InnerProduct on a map."""
    return (
        Rule(f"{source}.0", f"params/{target}/kernel", layout),
        Rule(f"{source}.1", f"params/{target}/bias", "ones"),
    )


def caffe_convs(first: str, *others: str) -> tuple[Rule, ...]:
    """Rules for layers of the same name here, of which the first reads images in BGR."""
    return (
        *caffe_conv(first, first, "rows+conv+bgr"),
        *(rule for name in others for rule in caffe_conv(name, name)),
    )


def caffe_dense(source: str, target: str) -> tuple[Rule, Rule]:
    """Rules for Caffe's name of an InnerProduct (`flax.linen.Dense`)."""
    return caffe_conv(source, target, "ones+dense")


def caffe_scale(source: str, target: str) -> tuple[Rule, Rule]:
    """Rules for Caffe's name of a Scale, and of others' BN that knows no statistics."""
    return (
        Rule(f"{source}.0", f"params/{target}/scale", "ones"),
        Rule(f"{source}.1", f"params/{target}/bias", "ones"),
    )


def caffe_batch_norm(source: str, scale: str, target: str) -> tuple[Rule, ...]:
    """Rules for Caffe's names of a BatchNorm and of the Scale that follows it."""
    return (
        Rule(f"{source}.0", f"batch_stats/{target}/mean", "ones"),
        Rule(f"{source}.1", f"batch_stats/{target}/var", "ones"),
        *caffe_scale(scale, target),
    )


def outline(tensors: Mapping[str, Any], rules: Sequence[Rule] = ()) -> dict[str, np.ndarray]:
    """Returns arrays of the same names, shapes and dtypes that take no memory.

    For `match`: some files have to read a tensor each time its shape is asked for.
    What `match` would compare by its values stays as it is, if it gets the same rules.
    """
    find = _finder([rule for rule in rules if rule.constant or "diagonal" in rule.layout])

    def outlined(name: str) -> np.ndarray:
        if find(name):
            return tensors[name]
        if isinstance(tensors, Lazy):
            return tensors.outline(name)
        return empty(tensors[name].shape, tensors[name].dtype)

    return {name: outlined(name) for name in tensors}


def match(
    template: Any,
    tensors: Mapping[str, Any],
    rules: Sequence[Rule],
    *,
    required: Sequence[str] = ("*",),
    absent: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Account:
    """Says what would become of each tensor and each parameter.

    Values are read only of layers that rules call constant, or diagonal.

    Args:
      template: the network's variables {"params": ..., "batch_stats": ...}; shapes will do.
      tensors: the file's arrays by name.
      rules: what they are here.
      required: patterns ("*/layer*") of the parameters that must come from the file, and of which
        the file must have no others, unless the network has none at all. Others may be new here,
        and their counterparts may be left in the file.
      absent: patterns of those among them that stay as initialised (`Release.absent`).
      ignore: patterns of the names of tensors to leave in the file.

    Raises:
      UserError: two tensors are the same parameter.
      ValueError: two rules speak of one tensor.
    """
    leaves: dict[str, Any] = traverse_util.flatten_dict(template, sep="/")
    required = [p for p in required if p == "*" or any(_matches(leaf, [p]) for leaf in leaves)]
    rows, taken, parts, find = [], {}, {}, _finder(rules)
    for name, tensor in tensors.items():
        row = Row("ignored", name, tuple(tensor.shape))
        found = [] if _matches(name, ignore) else find(name)
        if len(found) > 1:
            raise ValueError(f"Two rules speak of {name}: {found[0]} and {found[1]}.")
        rule = found[0] if found else None
        if rule is None or rule.target is None:
            known = rule or _matches(name, ignore)
            rows.append(row if known else row._replace(status="unexpected"))
            continue
        target = _renamed(name, rule.source, rule.target)
        if target not in leaves:
            rows.append(_without_target(row, tensor, rule, target, required))
            continue
        others = parts if rule.role == "part" else taken
        if target in others:
            raise UserError(
                f"the tensors {others[target]} and {name} are both {target}: give --ignore={name} "
                "to leave one out"
            )
        others[target] = name
        leaf = leaves[target]
        fault = _fault(tensor, rule.layout, leaf)
        status = "misfit" if _matches(target, required) else "new"
        status, note = (status, fault) if fault else ("loaded", _changes(tensor, rule, leaf))
        rows.append(Row(status, *row[1:3], target, tuple(leaf.shape), rule.layout, note))
    for target, leaf in leaves.items():
        if target not in taken:
            needed = _matches(target, required) and not _matches(target, absent)
            status = "missing" if needed or target in parts else "new"
            rows.append(Row(status, target=target, target_shape=tuple(leaf.shape)))
    return Account(tuple(rows))


def load(
    template: Any,
    tensors: Mapping[str, Any],
    rules: Sequence[Rule],
    *,
    required: Sequence[str] = ("*",),
    absent: Sequence[str] = (),
    ignore: Sequence[str] = (),
    path: str = "the file",
    advice: str | None = None,
) -> tuple[dict[str, Any], Account]:
    """Brings a file's tensors into the tree of a network.

    Args:
      template: see `match`, as the next five.
      tensors: these are read one by one.
      rules: the table.
      required: parameters that must come from the file.
      absent: parameters among them that need not.
      ignore: tensors to leave in it.
      path: the file, for messages.
      advice: what to do where something is not explained; see `Account.check`.

    Returns:
      The tree of those parameters that come from the file, in the dtypes of the template. Arrays
      that need no other dtype are views of the file's. And the account.

    Raises:
      UserError: something is not explained, or a value is one that no parameter can have.
    """
    seen = outline(tensors, rules)
    account = match(template, seen, rules, required=required, absent=absent, ignore=ignore)
    account.check(path, *([advice] if advice else []))
    return fill(template, tensors, account, path), account


def fill(
    template: Any, tensors: Mapping[str, Any], account: Account, path: str = "the file"
) -> dict[str, Any]:
    """Returns the tree of those parameters that an account calls loaded; see `load`.

    Raises:
      UserError: a value is one that no parameter can have.
    """
    leaves: dict[str, Any] = traverse_util.flatten_dict(template, sep="/")
    loaded = {}
    for row in account.rows:
        if row.status == "loaded":
            leaf = leaves[row.target]
            values = layouts.load(tensors[row.source], row.layout, leaf.shape)
            with np.errstate(over="ignore"):
                values = values.astype(leaf.dtype, copy=False)
            _check_values(values, path, row)
            before = loaded.get(row.target)  # parts are added up
            loaded[row.target] = values if before is None else before + values
    return traverse_util.unflatten_dict(loaded, sep="/")


def unload(variables: Any, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Returns a network's variables under the names and in the layouts of a file: `load` undone.

    What rules drop is not there. Arrays are views where the layouts allow it.

    Raises:
      UserError: a parameter has no name there.
      ValueError: two rules speak of one parameter.
    """
    tensors = {}
    find = _finder([rule for rule in rules if rule.role == "whole"], by="target")
    for path, leaf in traverse_util.flatten_dict(variables, sep="/").items():
        found = find(path)
        if len(found) > 1:
            raise ValueError(f"Two rules speak of {path}: {found[0]} and {found[1]}.")
        if not found:
            raise UserError(f"{path} has no name among the weights asked for: take another table")
        name = _renamed(path, found[0].target or "", found[0].source)
        tensors[name] = layouts.unload(np.asarray(leaf), found[0].layout)
    return tensors


def choose(
    releases: Sequence[Release], template: Any, tensors: Mapping[str, Any], path: str = "the file"
) -> Release:
    """Returns the release whose names a file has, if the network has any of them.

    It is the one that knows most of the file; of several the one that finds most in the network,
    and then the one that has the fewest names which the file lacks. Only names count, and the
    values of what is `Release.hollow`.

    Args:
      releases: those that are known.
      template: see `match`; None for any network.
      tensors: the file's arrays by name.
      path: the file, for messages.

    Raises:
      UserError: none finds any.
    """
    leaves = traverse_util.flatten_dict(template or {}, sep="/")

    def fit(release: Release) -> tuple[bool, int, bool, int, int]:
        find = _finder(release.rules)
        known = [(name, rule) for name in tensors for rule in find(name)]
        targets = {_renamed(name, rule.source, rule.target or "") for name, rule in known}
        used = {rule for _, rule in known}
        num_pairs = sum(target in leaves for target in targets)
        is_of_use = num_pairs > 0 or (template is None and bool(known))
        num_unused = len(release.rules) - len(used)
        return is_of_use, len(known), bool(release.hollow), num_pairs, -num_unused

    fits = {
        fit(release): release
        for release in reversed(releases)  # of equals the first
        if not release.hollow or _is_hollow(release, tensors)
    }
    best = max(fits)
    if best[0]:
        return fits[best]
    some = ", ".join(f"{name:.60}" for name in list(tensors)[:_NUM_NAMED])
    if template is not None and best[1]:  # of another network
        raise UserError(
            f"{path} has names of {fits[best].name} ({some}, ...), of which this network has none: "
            "give another network, or another file"
        )
    raise UserError(
        f"{path} has tensors of no known names ({some}, ...): give weights that docs/weights.md "
        "lists, or load them by a table of rules, which it explains"
    )


def _is_hollow(release: Release, tensors: Mapping[str, Any]) -> bool:
    found = [name for name in tensors if _matches(name, release.hollow)]
    return bool(found) and all(np.isnan(np.sum(tensors[name])) for name in found)


def _finder(
    rules: Sequence[Rule], by: Literal["source", "target"] = "source"
) -> Callable[[str], list[Rule]]:
    """Returns what finds the rules that speak of a name; most have no fields and are looked up."""
    plain: dict[str, list[Rule]] = {}
    others = []
    for rule in rules:
        name = getattr(rule, by) or ""
        if _FIELD.search(name):
            others.append((_pattern(name), rule))
        else:
            plain.setdefault(name, []).append(rule)

    def find(name: str) -> list[Rule]:
        return plain.get(name, []) + [rule for pattern, rule in others if pattern.fullmatch(name)]

    return find


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


def _fault(tensor: Any, layout: str, leaf: Any) -> str:
    """Why a tensor cannot be a parameter, or ""."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return f"of dtype {tensor.dtype}"
    try:
        shape = layouts.load(tensor, layout, leaf.shape).shape
    except layouts.UnfitError as error:
        return str(error)
    except ValueError:  # other axes, or not as many values
        shape = None
    if shape is None or tuple(shape) != tuple(leaf.shape):
        return f"{tuple(tensor.shape)} does not make {tuple(leaf.shape)}"
    return ""


def _without_target(row: Row, tensor: Any, rule: Rule, target: str, required: Sequence[str]) -> Row:
    """The row of a tensor whose parameter this network does not have."""
    needed = _matches(target, required)
    if rule.constant is None:
        return row._replace(status="unexpected" if needed else "ignored", note=f"no {target} here")
    note = "not what is built in here, where this layer is not learned"
    try:
        values = layouts.load(tensor, rule.layout, tensor.shape)
        constant = np.asarray(rule.constant(values.shape))
        if values.shape == constant.shape and np.allclose(values, constant, 1e-5, 1e-6):
            return row._replace(note="what is built in here")
    except ValueError as error:  # of another shape
        note = str(error)
    return row._replace(status="misfit" if needed else "ignored", note=note)


def _check_values(values: np.ndarray, path: str, row: Row) -> None:
    """Refuses what no parameter can be."""
    with np.errstate(invalid="ignore"):  # of infinities of both signs
        total = np.sum(values, dtype=np.float64)
    fault = ""
    if not np.isfinite(total):
        fault = f"NaN, or what is infinite in {values.dtype}"
    elif _matches(row.target, ["batch_stats/*/var"]) and np.min(values, initial=0) < 0:
        fault = "a variance below 0"
    if fault:
        raise UserError(
            f"{path}: {row.source} holds {fault}: give another file, or, if it is of the head, "
            f"import-weights --new-head --ignore={row.source}"
        )


def _changes(tensor: Any, rule: Rule, leaf: Any) -> str:
    changes = layouts.changes(tensor, rule.layout, leaf.shape)
    if tensor.dtype != leaf.dtype:
        changes.append(f"cast from {tensor.dtype}")
    if rule.role == "part":
        changes.append("added")
    return ", ".join(changes)
