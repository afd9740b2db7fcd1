"""Rules of `reach`: how each operation transforms the image bounds of its inputs.

A rule is a function (notes, equation, inputs) -> outputs on `Value`s. It is called if at least one
input depends on the image. `RULES` maps names of primitives to rules.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core

NOTHING = 2**30  # Bound of an element that sees no pixel; neutral for the minimum.


class Seen(NamedTuple):
    """The part of the image that each element of a value sees.

    Attributes:
      rows: int32 [2, ...], the first row and minus the last row that each element sees. The minimum
        of such bounds is thus their union. An axis of size 1 represents any size.
      columns: the same for columns.
    """

    rows: np.ndarray
    columns: np.ndarray


class Known:
    """A value that depends on no input of the program; computed on demand."""

    def __init__(self, compute: Callable[[], Any]):
        self._compute = compute

    @functools.cached_property
    def value(self) -> np.ndarray:
        """The value. An axis of size 1 represents any size."""
        return np.asarray(self._compute())


class Free(NamedTuple):
    """A value that passes no gradient to the image: parameters, comparisons, switches."""


class Opaque(NamedTuple):
    """An image-dependent value behind an unsupported operation."""

    primitive: str


Value = Seen | Known | Free | Opaque
FREE = Free()
# Elementwise operations; several inputs may depend on the image.
_ARITHMETIC = "add add_any sub mul div rem max min pow atan2 clamp select_n"
_FUNCTIONS = (
    "abs cbrt cos erf erf_inv erfc exp exp2 expm1 integer_pow log log1p logistic neg rsqrt sin "
    "sqrt square tan tanh convert_element_type copy copy_p real reduce_precision"
)
_DISCRETE = "and eq ge gt is_finite le lt ne not or xor ceil floor round sign stop_gradient"
ELEMENTWISE = frozenset(f"{_ARITHMETIC} {_FUNCTIONS} {_DISCRETE}".split())


class Notes:
    """Facts that a walk collects besides values; see `reach.Trace`."""

    def __init__(self) -> None:
        self.widest = 0.0
        self.is_global = False

    def window(self, bounds: np.ndarray, axis: int, size: int, w: "_Window") -> np.ndarray:
        """Returns the union of bounds over each window along one axis of a map of `size`."""
        if bounds.shape[axis] == 1:
            return bounds
        count = w.count(size)
        if count == 1 and w.span >= size:
            self.is_global = True
        elif w.span > 1:
            self.widest = max(self.widest, w.span / ((size - 1) * w.spread + 1))
        at = w.stride * np.arange(count)[:, None] + w.dilation * w.taps - w.padding[0]
        at, rest = np.divmod(at, w.spread)
        is_pixel = (rest == 0) & (at >= 0) & (at < size)
        is_pixel = is_pixel.reshape(*is_pixel.shape, *[1] * (bounds.ndim - axis - 1))
        found = np.take(bounds, np.clip(at, 0, size - 1), axis)
        return np.where(is_pixel, found, NOTHING).min(axis + 1)


class _Window(NamedTuple):
    """Windows along one axis.

    Attributes:
      size: number of taps.
      stride: distance between windows.
      padding: padding before and after the map.
      spread: distance between pixels of the map (fractional stride).
      dilation: distance between taps.
      taps: indices of the taps that are not known to be zero.
    """

    size: int
    stride: int
    padding: tuple[int, int]
    spread: int
    dilation: int
    taps: np.ndarray

    @property
    def span(self) -> int:
        return (self.size - 1) * self.dilation + 1

    def count(self, size: int) -> int:
        """Returns the number of windows on a map."""
        return ((size - 1) * self.spread + 1 + sum(self.padding) - self.span) // self.stride + 1


def shape_of(variable) -> tuple[int, ...]:
    """Returns the shape of a program's variable."""
    return variable.aval.shape


def _map(function: Callable[[np.ndarray], np.ndarray], value: Seen) -> list[Value]:
    return [Seen(function(value.rows), function(value.columns))]


def known(eqn: core.JaxprEqn, inputs: list[Known]) -> list[Value]:
    """Returns the outputs of an operation on known values; they are computed on demand."""
    name, params = eqn.primitive.name, eqn.params
    if name == "iota":
        shape = [1] * len(params["shape"])
        shape[params["dimension"]] = -1
        size = params["shape"][params["dimension"]]
        return [Known(lambda: np.arange(size).astype(params["dtype"]).reshape(shape))]
    if name == "broadcast_in_dim":
        return [Known(lambda: _spread(inputs[0].value, eqn))]

    @functools.cache
    def compute() -> list[Any]:
        values = [known.value for known in inputs]
        if name in ELEMENTWISE:
            values = np.broadcast_arrays(*values)
        else:
            shapes = map(shape_of, eqn.invars)
            values = [np.broadcast_to(v, s) for v, s in zip(values, shapes, strict=True)]
        outputs = eqn.primitive.bind(*map(jnp.asarray, values), **params)
        return outputs if eqn.primitive.multiple_results else [outputs]

    return [Known(functools.partial(lambda i: compute()[i], i)) for i in range(len(eqn.outvars))]


def _spread(value: np.ndarray, eqn: core.JaxprEqn) -> np.ndarray:
    """Moves the axes of a value as broadcast_in_dim does; all other axes have size 1."""
    shape = [1] * len(eqn.params["shape"])
    for size, axis in zip(value.shape, eqn.params["broadcast_dimensions"], strict=True):
        shape[axis] = size
    return value.reshape(shape)


def _masked(bounds: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the bounds where the mask is true, else NOTHING.

    Along axes on which the bounds do not vary, the mask is first reduced to whether any value is
    true.
    """
    if mask.ndim:
        flat = tuple(a for a, size in enumerate(bounds.shape[1:]) if size == 1)
        mask = np.any(mask, flat, keepdims=True)
    return np.where(mask, bounds, NOTHING)


def elementwise(name: str, inputs: list[Value]) -> Seen:
    """Returns the union of the operands' bounds, except where known zeros multiply them."""
    masks: dict[int, np.ndarray] = {}
    if name == "select_n":
        choice, *inputs = inputs
        if isinstance(choice, Known):
            masks = {i: choice.value == i for i in range(len(inputs))}
    elif name == "mul":
        left, right = inputs
        if isinstance(left, Known):
            masks[1] = left.value != 0
        if isinstance(right, Known):
            masks[0] = right.value != 0
    seen = [(i, value) for i, value in enumerate(inputs) if isinstance(value, Seen)]

    def union(arrays: list[np.ndarray]) -> np.ndarray:
        numbers = [i for i, _ in seen]
        parts = [
            _masked(a, masks[i]) if i in masks else a for i, a in zip(numbers, arrays, strict=True)
        ]
        return functools.reduce(np.minimum, parts)

    return Seen(union([v.rows for _, v in seen]), union([v.columns for _, v in seen]))


def _of_first(function: Callable[[np.ndarray, core.JaxprEqn, Notes], np.ndarray]) -> "Rule":
    """Returns the rule of an operation that transforms the bounds of its first operand."""

    def rule(notes: Notes, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
        if not isinstance(inputs[0], Seen):
            return [Opaque(eqn.primitive.name)]
        return _map(lambda bounds: function(bounds, eqn, notes), inputs[0])

    return rule


def _transpose(bounds: np.ndarray, eqn: core.JaxprEqn, notes: Notes) -> np.ndarray:
    return bounds.transpose(0, *(axis + 1 for axis in eqn.params["permutation"]))


def _reverse(bounds: np.ndarray, eqn: core.JaxprEqn, notes: Notes) -> np.ndarray:
    return np.flip(bounds, tuple(axis + 1 for axis in eqn.params["dimensions"]))


def _squeeze(bounds: np.ndarray, eqn: core.JaxprEqn, notes: Notes) -> np.ndarray:
    rank = bounds.ndim - 1
    return bounds.squeeze(tuple(axis % rank + 1 for axis in eqn.params["dimensions"]))


def _broadcast(bounds: np.ndarray, eqn: core.JaxprEqn, notes: Notes) -> np.ndarray:
    return np.stack([_spread(part, eqn) for part in bounds])


def _reshape(bounds: np.ndarray, eqn: core.JaxprEqn, notes: Notes) -> np.ndarray:
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    full, result = list(bounds.shape), [2]
    for axes, sizes in _common_factors(old, new):
        if all(bounds.shape[axis + 1] == 1 for axis in axes):
            result += [1] * len(sizes)
        else:
            for axis in axes:
                full[axis + 1] = old[axis]
            result += sizes
    return np.broadcast_to(bounds, full).reshape(result)


def _common_factors(
    old: Sequence[int], new: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the smallest groups (axes of old, sizes of new) with the same number of elements."""
    axes, sizes, rest = [], [], list(new)
    for axis in range(len(old)):
        axes.append(axis)
        held = math.prod(old[a] for a in axes)
        while rest and math.prod(sizes) < held:
            sizes.append(rest.pop(0))
        if math.prod(sizes) == held:
            yield axes, sizes
            axes, sizes = [], []
    if axes or rest:
        yield axes, sizes + rest  # Axes of size 1.


def _slice(bounds: np.ndarray, eqn: core.JaxprEqn, notes: Notes) -> np.ndarray:
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or [1] * len(starts)
    cuts = [slice(*cut) for cut in zip(starts, stops, steps, strict=True)]
    sizes = bounds.shape[1:]
    cuts = [slice(None) if n == 1 else cut for n, cut in zip(sizes, cuts, strict=True)]
    return bounds[:, *cuts]


def _pad(bounds: np.ndarray, eqn: core.JaxprEqn, notes: Notes) -> np.ndarray:
    for axis, (low, high, inner) in enumerate(eqn.params["padding_config"], 1):
        if (size := bounds.shape[axis]) == 1:
            continue
        spread = (size - 1) * (inner + 1) + 1
        shape = list(bounds.shape)
        shape[axis] = spread + max(low, 0) + max(high, 0)
        padded = np.full(shape, NOTHING, np.int32)
        at = [slice(None)] * bounds.ndim
        at[axis] = slice(max(low, 0), max(low, 0) + spread, inner + 1)
        padded[tuple(at)] = bounds
        at[axis] = slice(max(-low, 0), shape[axis] - max(-high, 0))
        bounds = padded[tuple(at)]
    return bounds


def _concatenate(notes: Notes, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    axis = eqn.params["dimension"] + 1
    sizes = [shape_of(v)[axis - 1] for v in eqn.invars]

    def join(arrays: list[np.ndarray | None]) -> np.ndarray:
        seen = [a for a in arrays if a is not None]
        if all(a.shape[axis] == 1 for a in seen) and all(np.array_equal(a, seen[0]) for a in seen):
            return seen[0]
        common = list(np.broadcast_shapes(*(np.delete(a.shape, axis) for a in seen)))
        parts = []
        for array, size in zip(arrays, sizes, strict=True):
            array = np.int32(NOTHING) if array is None else array
            parts.append(np.broadcast_to(array, [*common[:axis], size, *common[axis:]]))
        return np.concatenate(parts, axis)

    rows = join([v.rows if isinstance(v, Seen) else None for v in inputs])
    return [Seen(rows, join([v.columns if isinstance(v, Seen) else None for v in inputs]))]


def _split(notes: Notes, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    (value,), axis = inputs, eqn.params["axis"] + 1
    assert isinstance(value, Seen)  # It is the only input.
    ends = list(itertools.accumulate(eqn.params["sizes"]))[:-1]

    def parts(bounds: np.ndarray) -> list[np.ndarray]:
        same = [bounds] * len(eqn.outvars)
        return same if bounds.shape[axis] == 1 else np.split(bounds, ends, axis)

    return [Seen(*pair) for pair in zip(parts(value.rows), parts(value.columns), strict=True)]


def _reduce(bounds: np.ndarray, eqn: core.JaxprEqn, notes: Notes) -> np.ndarray:
    axes = tuple(axis + 1 for axis in eqn.params["axes"])
    notes.is_global |= any(bounds.shape[axis] > 1 for axis in axes)
    return bounds.min(axes)


def _reduce_window(bounds: np.ndarray, eqn: core.JaxprEqn, notes: Notes) -> np.ndarray:
    p = eqn.params
    for axis, size in enumerate(shape_of(eqn.invars[0])):
        taps = np.arange(p["window_dimensions"][axis])
        between = p["base_dilation"][axis], p["window_dilation"][axis]
        w = _Window(len(taps), p["window_strides"][axis], p["padding"][axis], *between, taps)
        bounds = notes.window(bounds, axis + 1, size, w)
    return bounds


def _conv(notes: Notes, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    (value, kernel), p = inputs, eqn.params
    if not isinstance(value, Seen) or isinstance(kernel, Seen) or p["batch_group_count"] > 1:
        return [Opaque(eqn.primitive.name)]
    places, groups = p["dimension_numbers"], p["feature_group_count"]
    size = [shape_of(eqn.invars[0])[axis] for axis in places.lhs_spec]
    taps = [shape_of(eqn.invars[1])[axis] for axis in places.rhs_spec]
    used = [np.arange(k) for k in taps]
    if isinstance(kernel, Known):
        other = [tuple(a for a in range(len(taps)) if a != axis) for axis in places.rhs_spec]
        used = [np.flatnonzero((kernel.value != 0).any(axes)) for axes in other]

    def move(bounds: np.ndarray) -> np.ndarray:
        bounds = bounds.transpose(0, *(axis + 1 for axis in places.lhs_spec))
        if bounds.shape[2] > 1:  # Bounds vary with the channel: take the union over each group.
            grouped = bounds.reshape(*bounds.shape[:2], groups, -1, *bounds.shape[3:]).min(3)
            bounds = grouped if groups == 1 else np.repeat(grouped, taps[0] // groups, 2)
        for i in range(2, len(size)):
            between = p["lhs_dilation"][i - 2], p["rhs_dilation"][i - 2]
            w = _Window(taps[i], p["window_strides"][i - 2], p["padding"][i - 2], *between, used[i])
            bounds = notes.window(bounds, i + 1, size[i], w)
        return bounds.transpose(0, *(np.argsort(places.out_spec) + 1))

    return _map(move, value)


def _dot(notes: Notes, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    contracted, batch = eqn.params["dimension_numbers"]
    ranks = [len(shape_of(v)) for v in eqn.invars]
    axes = []  # For each operand: batch, free and contracted axes.
    for rank, c, b in zip(ranks, contracted, batch, strict=True):
        axes.append((tuple(b), tuple(a for a in range(rank) if a not in (*b, *c)), tuple(c)))

    def product(bounds: np.ndarray, side: int) -> np.ndarray:
        """Returns the union over the contracted axes where the other factor may be nonzero."""
        (b, free, c), (other_b, other_free, other_c) = axes[side], axes[1 - side]
        other = inputs[1 - side]
        bounds = bounds.transpose(0, *(a + 1 for a in (*b, *free, *c)))
        head = bounds.shape[: 1 + len(b) + len(free)]
        bounds = bounds.reshape(*head, *[1] * len(other_free), *bounds.shape[len(head) :])
        if isinstance(other, Known):
            mask = (other.value != 0).transpose(*other_b, *other_free, *other_c)
            mask = mask.reshape(*mask.shape[: len(b)], *[1] * len(free), *mask.shape[len(b) :])
            flat = [a for a in range(mask.ndim) if bounds.shape[a + 1] == 1]
            own = range(len(b) + len(free), len(b) + len(free) + len(other_free))
            mask = np.any(mask, tuple(a for a in flat if a not in own), keepdims=True)
            for axis in own:  # Keeps rows constant if only columns are interpolated.
                first = mask.take([0], axis)
                mask = first if np.all(mask == first) else mask
            bounds = np.where(mask, bounds, NOTHING)
        else:
            notes.is_global |= any(n > 1 for n in bounds.shape[bounds.ndim - len(c) :])
        bounds = bounds.min(tuple(range(bounds.ndim - len(c), bounds.ndim)))
        if side == 0:
            return bounds
        own = range(1 + len(b), 1 + len(b) + len(free))
        rest = range(1 + len(b) + len(free), bounds.ndim)
        return bounds.transpose(*range(1 + len(b)), *rest, *own)

    found = [
        _map(functools.partial(product, side=side), value)[0]
        for side, value in enumerate(inputs)
        if isinstance(value, Seen)
    ]
    return [elementwise("add", found)]


def _gather(notes: Notes, eqn: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    (value, indices), p = inputs, eqn.params
    if not isinstance(value, Seen) or not isinstance(indices, Known):
        return [Opaque(eqn.primitive.name)]
    shape, numbers = shape_of(eqn.invars[0]), p["dimension_numbers"]
    indexed = set(numbers.start_index_map) | set(numbers.operand_batching_dims)

    def move(bounds: np.ndarray) -> np.ndarray:
        if all(bounds.shape[axis + 1] == 1 for axis in indexed):
            result = [1] * len(shape_of(eqn.outvars[0]))
            dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
            kept = [n for axis, n in enumerate(bounds.shape[1:]) if axis not in dropped]
            for axis, n in zip(numbers.offset_dims, kept, strict=True):
                result[axis] = n
            return bounds.reshape(2, *result)
        full = [shape[a] if a in indexed else n for a, n in enumerate(bounds.shape[1:])]
        sizes = [p["slice_sizes"][a] if a in indexed else n for a, n in enumerate(full)]
        places = np.broadcast_to(indices.value, shape_of(eqn.invars[1]))
        params = {**p, "slice_sizes": tuple(sizes), "fill_value": NOTHING}
        bind = functools.partial(eqn.primitive.bind, **params)
        parts = [bind(jnp.asarray(np.broadcast_to(b, full)), jnp.asarray(places)) for b in bounds]
        return np.stack([np.asarray(part) for part in parts])

    return _map(move, value)


Rule = Callable[[Notes, core.JaxprEqn, list[Value]], list[Value]]
RULES: dict[str, Rule] = {
    "broadcast_in_dim": _of_first(_broadcast),
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "gather": _gather,
    "pad": _of_first(_pad),
    "reduce_max": _of_first(_reduce),
    "reduce_min": _of_first(_reduce),
    "reduce_prod": _of_first(_reduce),
    "reduce_sum": _of_first(_reduce),
    "reduce_window_max": _of_first(_reduce_window),
    "reduce_window_min": _of_first(_reduce_window),
    "reduce_window_sum": _of_first(_reduce_window),
    "reshape": _of_first(_reshape),
    "rev": _of_first(_reverse),
    "slice": _of_first(_slice),
    "split": _split,
    "squeeze": _of_first(_squeeze),
    "transpose": _of_first(_transpose),
}
