"""Rules that load the tensors of a weight file into the tree of a network, and the way back.

A rule has the name in the file, the name here, and the layout in the file:

    Rule("layer{s}.{b}.conv{i}.weight", "params/layer{s}_{b}/conv{i}/kernel", "conv")

A field {...} stands for a whole number, and equal fields for the same number. The name here is the
path in the tree of variables. `dense_jax.releases` has the tables of published weights. A table
must explain each tensor of the file and each parameter of the network; loading stops otherwise.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
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
    """Says which parameter a tensor becomes.

    Attributes:
      source: name in the file, with fields.
      target: path here with the same fields, such as "batch_stats/bn{i}/mean"; None for a tensor
        without a counterpart, such as torch's count of batches.
      layout: a name of `layouts.LAYOUTS`, or several joined by "+" and applied from left to right.
      role: "whole": the tensor becomes the parameter. "alias": so it does, and the name is one of
        other files. "part": its values are added to the parameter. `unload` uses "whole" alone.
      constant: for layers that are fixed in some networks: a function from the shape here to the
        fixed values. A network with the fixed layer rejects a tensor of other values.
      reason: why a tensor without a counterpart stays in the file, for the user.
    """

    source: str
    target: str | None
    layout: str = "same"
    role: Literal["whole", "alias", "part"] = "whole"
    constant: Callable[[Shape], Any] | None = None
    reason: str = ""


class Release(NamedTuple):
    """Weights that somebody has published.

    Attributes:
      name: who published them, and for which network.
      rules: the table of rules for its tensors.
      trunk: patterns ("*/layer*") of the parameters that a file must have. A pattern counts if the
        network has a parameter that matches it. The head on the trunk may differ.
      normalisation: how the weights expect images, a name of
        `dense_jax.data.normalise.NORMALISATIONS`. Images are RGB; rules permute BGR weights.
      absent: patterns of the parameters that its files never have; these keep their initial values.
      needs: options with which a network reproduces the published outputs, as text for the user.
      sign: whether a file has the tensors of this release and not of another one with the same
        names: (name to tensor) -> bool. None: the names are enough.
    """

    name: str
    rules: tuple[Rule, ...]
    trunk: tuple[str, ...]
    normalisation: str
    absent: tuple[str, ...] = ()
    needs: str = ""
    sign: Callable[[Mapping[str, Any]], bool] | None = None


def conv(source: str, target: str, layout: str = "conv") -> tuple[Rule, Rule]:
    """Returns rules for torch's name of a convolution (`dense_jax.layers.conv.Conv`)."""
    return (
        Rule(f"{source}.weight", f"params/{target}/kernel", layout),
        Rule(f"{source}.bias", f"params/{target}/bias"),
    )


def dense(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns rules for torch's name of a fully connected layer (`flax.linen.Dense`)."""
    return conv(source, target, "dense")


def batch_norm(source: str, target: str) -> tuple[Rule, ...]:
    """Returns rules for torch's name of a batch normalisation; they drop its count of batches."""
    return (
        Rule(f"{source}.weight", f"params/{target}/scale"),
        Rule(f"{source}.bias", f"params/{target}/bias"),
        Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
        Rule(f"{source}.running_var", f"batch_stats/{target}/var"),
        Rule(f"{source}.num_batches_tracked", None),
    )


def caffe_conv(source: str, target: str, layout: str = "rows+conv") -> tuple[Rule, Rule]:
    """Returns rules for Caffe's name of a Convolution, or of an InnerProduct on a map."""
    return (
        Rule(f"{source}.0", f"params/{target}/kernel", layout),
        Rule(f"{source}.1", f"params/{target}/bias", "ones"),
    )


def caffe_convs(first: str, *others: str) -> tuple[Rule, ...]:
    """Returns rules for layers with the same names here; the first one reads BGR images."""
    return (
        *caffe_conv(first, first, "rows+conv+bgr"),
        *(rule for name in others for rule in caffe_conv(name, name)),
    )


def caffe_dense(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns rules for Caffe's name of an InnerProduct (`flax.linen.Dense`)."""
    return caffe_conv(source, target, "ones+dense")


def caffe_scale(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns rules for Caffe's name of a Scale, or of a BN layer without statistics."""
    return (
        Rule(f"{source}.0", f"params/{target}/scale", "ones"),
        Rule(f"{source}.1", f"params/{target}/bias", "ones"),
    )


def caffe_batch_norm(source: str, scale: str, target: str) -> tuple[Rule, ...]:
    """Returns rules for Caffe's names of a BatchNorm and of the Scale behind it."""
    return (
        Rule(f"{source}.0", f"batch_stats/{target}/mean", "ones"),
        Rule(f"{source}.1", f"batch_stats/{target}/var", "ones"),
        *caffe_scale(scale, target),
    )


def template_of(model: nn.Module, num_channels: int = 3) -> Any:
    """Returns the shapes of a network's variables without computing on any device.

    Args:
      model: the network; it must take images of 32x32 pixels.
      num_channels: number of image channels.
    """
    images = jax.ShapeDtypeStruct((1, 32, 32, num_channels), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


def outline(tensors: Mapping[str, Any], rules: Sequence[Rule] = ()) -> dict[str, np.ndarray]:
    """Returns arrays of the same names, shapes and dtypes that take no memory.

    Some files read a tensor each time `match` asks for its shape; outlines avoid this. Tensors
    whose values `match` compares by these rules stay as they are.
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
    """Returns the account of loading: what happens to each tensor and each parameter.

    It reads values only where rules have a constant or a diagonal layout.

    Args:
      template: the network's variables {"params": ..., "batch_stats": ...}, or their shapes.
      tensors: the file's arrays by name.
      rules: the table of rules.
      required: patterns ("*/layer*") of the parameters that must come from the file. The file must
        have no other tensors for a pattern, unless the network has no parameter that matches it.
        Other parameters may be new, and other tensors may stay in the file.
      absent: patterns of required parameters that keep their initial values (`Release.absent`).
      ignore: patterns of the names of tensors that stay in the file.

    Raises:
      UserError: two tensors become the same parameter.
      ValueError: two rules match one tensor.
    """
    leaves: dict[str, Any] = traverse_util.flatten_dict(template, sep="/")
    required = [p for p in required if p == "*" or any(_matches(leaf, [p]) for leaf in leaves)]
    rows, taken, parts, find = [], {}, {}, _finder(rules)
    for name, tensor in tensors.items():
        row = Row("ignored", name, tuple(tensor.shape))
        found = [] if _matches(name, ignore) else find(name)
        if len(found) > 1:
            raise ValueError(f"Two rules match {name}: {found[0]} and {found[1]}.")
        rule = found[0] if found else None
        if rule is None or rule.target is None:
            known = rule or _matches(name, ignore)
            note = rule.reason if rule else ""
            rows.append(row._replace(note=note) if known else row._replace(status="unexpected"))
            continue
        target = _renamed(name, rule.source, rule.target)
        if target not in leaves:
            rows.append(_without_target(row, tensor, rule, target, required))
            continue
        others = parts if rule.role == "part" else taken
        if target in others:
            raise UserError(
                f"the tensors {others[target]} and {name} both become {target}: give "
                f"--ignore={name} to leave one out"
            )
        others[target] = name
        leaf = leaves[target]
        fault = _fault(tensor, rule.layout, leaf)
        status = "mismatch" if _matches(target, required) else "new"
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
    """Loads a file's tensors into the tree of a network.

    Args:
      template: see `match`, also for the next five.
      tensors: the file's arrays; they are read one by one.
      rules: the table of rules.
      required: parameters that must come from the file.
      absent: required parameters that may be missing.
      ignore: tensors that stay in the file.
      path: the file, for messages.
      advice: what the user can do about errors; see `Account.check`.

    Returns:
      The tree of the parameters that come from the file, in the dtypes of the template, and the
      account. Arrays that keep their dtype are views of the file.

    Raises:
      UserError: a tensor or a parameter is not explained, or a value is not valid.
    """
    seen = outline(tensors, rules)
    account = match(template, seen, rules, required=required, absent=absent, ignore=ignore)
    account.check(path, *([advice] if advice else []))
    return fill(template, tensors, account, path), account


def fill(
    template: Any, tensors: Mapping[str, Any], account: Account, path: str = "the file"
) -> dict[str, Any]:
    """Returns the tree of the parameters with the status "loaded"; see `load`.

    Raises:
      UserError: a value is not valid.
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
            before = loaded.get(row.target)  # parts are summed
            loaded[row.target] = values if before is None else before + values
    return traverse_util.unflatten_dict(loaded, sep="/")


def unload(variables: Any, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Returns a network's variables under the names and in the layouts of a file.

    This is the inverse of `load`, without the tensors that the rules drop. Arrays are views where
    the layouts allow it.

    Raises:
      UserError: a parameter has no name in the file.
      ValueError: two rules match one parameter.
    """
    tensors = {}
    find = _finder([rule for rule in rules if rule.role == "whole"], by="target")
    for path, leaf in traverse_util.flatten_dict(variables, sep="/").items():
        found = find(path)
        if len(found) > 1:
            raise ValueError(f"Two rules match {path}: {found[0]} and {found[1]}.")
        if not found:
            raise UserError(f"the table of rules has no name for {path}: give another table")
        name = _renamed(path, found[0].target or "", found[0].source)
        tensors[name] = layouts.unload(np.asarray(leaf), found[0].layout)
    return tensors


def choose(
    releases: Sequence[Release], template: Any, tensors: Mapping[str, Any], path: str = "the file"
) -> Release:
    """Returns the release that a file belongs to.

    The release with rules for the most tensors wins; then the one whose tensors match the most
    parameters of the network; then the one with the fewest rules that the file does not use. The
    texts of `name` and `trunk` break the last ties, so that the order of the releases does not
    matter. Only names count, and `Release.sign`.

    Args:
      releases: the known releases.
      template: see `match`; None for any network.
      tensors: the file's arrays by name.
      path: the file, for messages.

    Raises:
      UserError: no release has rules for the file, or the network has no parameter of the release.
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
        return is_of_use, len(known), release.sign is not None, num_pairs, -num_unused

    fits = [
        (fit(release), release)
        for release in releases
        if release.sign is None or release.sign(tensors)
    ]
    best_fit, best = max(fits, key=lambda pair: (pair[0], pair[1].name, pair[1].trunk))
    is_of_use, num_known = best_fit[:2]
    if is_of_use:
        return best
    some = ", ".join(f"{name:.60}" for name in list(tensors)[:_NUM_NAMED])
    if template is not None and num_known:  # the file belongs to another network
        raise UserError(
            f"{path} holds {best.name} ({some}, ...), and this network has no layer of it: give "
            "another network, or another file"
        )
    raise UserError(
        f"{path} has tensors of unknown names ({some}, ...): give weights that docs/weights.md "
        "lists, or write a table of rules, as it explains"
    )


def num_known(releases: Sequence[Release], names: Iterable[str]) -> int:
    """Returns for how many names the release that knows the most of them has rules."""
    names = list(names)
    finders = [_finder(release.rules) for release in releases]
    return max(sum(bool(find(name)) for name in names) for find in finders)


def _finder(
    rules: Sequence[Rule], by: Literal["source", "target"] = "source"
) -> Callable[[str], list[Rule]]:
    """Returns a function from a name to the rules that match it; it looks up plain names."""
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
    """Returns a regular expression for the names that a template with fields matches."""
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
    """Returns why a tensor cannot become a parameter, or ""."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return f"dtype {tensor.dtype}"
    try:
        shape = layouts.load(tensor, layout, leaf.shape).shape
    except layouts.UnfitError as error:
        return str(error)
    except ValueError:  # other axes, or another number of values
        shape = None
    if shape is None or tuple(shape) != tuple(leaf.shape):
        return f"{tuple(tensor.shape)} does not become {tuple(leaf.shape)}"
    return ""


def _without_target(row: Row, tensor: Any, rule: Rule, target: str, required: Sequence[str]) -> Row:
    """Returns the row of a tensor whose parameter this network lacks."""
    needed = _matches(target, required)
    if rule.constant is None:
        return row._replace(status="unexpected" if needed else "ignored", note=f"no {target} here")
    note = "its values differ from the fixed ones of this layer"
    try:
        values = layouts.load(tensor, rule.layout, tensor.shape)
        constant = np.asarray(rule.constant(values.shape))
        if values.shape == constant.shape and np.allclose(values, constant, 1e-5, 1e-6):
            return row._replace(note="equal to the fixed values of this layer")
    except ValueError as error:  # another shape
        note = str(error)
    return row._replace(status="mismatch" if needed else "ignored", note=note)


def _check_values(values: np.ndarray, path: str, row: Row) -> None:
    """Rejects values that no parameter can have."""
    with np.errstate(invalid="ignore"):  # infinities of both signs
        total = np.sum(values, dtype=np.float64)
    fault = ""
    if not np.isfinite(total):
        fault = f"NaN, or numbers beyond {values.dtype}"
    elif _matches(row.target, ["batch_stats/*/var"]) and np.min(values, initial=0) < 0:
        fault = "a variance below 0"
    if fault:
        raise UserError(
            f"{path}: {row.source} holds {fault}: give another file or, for a tensor of the head, "
            f"import-weights --new-head --ignore={row.source}"
        )


def _changes(tensor: Any, rule: Rule, leaf: Any) -> str:
    changes = layouts.changes(tensor, rule.layout, leaf.shape)
    if tensor.dtype != leaf.dtype:
        changes.append(f"cast from {tensor.dtype}")
    if rule.role == "part":
        changes.append("added")
    return ", ".join(changes)
