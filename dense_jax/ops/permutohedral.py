"""Gaussian filtering of values at scattered points, by the permutohedral lattice.

The sums over all pairs sum_j exp(-|f_i - f_j|^2 / 2) v_j are approximated in three linear steps:
splat each value onto the d + 1 corners of the simplex that its point lies in, blur along the d + 1
directions of the lattice with the taps 1/2, 1, 1/2, and slice, which reads at the points.

Which corners exist is found on the host, in NumPy: sorting is several times faster there. The
steps themselves are sums of gathered rows, for XLA runs scatters on CPUs one row after another.
So the splat, whose corners collect from one to all of the points, is a tree: the contributions of
each corner are added eight by eight. Sizes that depend on the points are padded to one of a few
capacities; `lax.switch` takes the program of the smallest that holds them.

Reference: Adams, Baek, Davis, "Fast high-dimensional filtering using the permutohedral lattice",
Eurographics 2010.
"""

import functools
import itertools
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import sparse

_FAN = 8  # What a node of the splat's tree adds up.
_SHARES = (16, 8, 4, 2, 1)  # A capacity for corners each, as a fraction of the worst case.
_FEW = 1 << 16  # Up to so many corners one capacity is enough: compiling takes longer than padding.
T = TypeVar("T")
Filter = Callable[[jax.Array], jax.Array]


class Simplices(NamedTuple):
    """Where each of N points lies in the lattice of d dimensions; D = d + 1."""

    origin: jax.Array  # int32 [N, D], the corner whose coordinates are multiples of D.
    path: jax.Array  # int32 [N, D], the axes in the order in which the point's walk takes them.
    weights: jax.Array  # [N, D], barycentric: of the corner after r steps of the walk.


class Lattice(NamedTuple):
    """The corners in use, numbered from 1; 0 is one that is always zero.

    Arrays have the size of the worst case, E = N D corners, and mean something up to what is used.
    """

    corners: jax.Array  # int32 [N, D].
    weights: jax.Array  # [N, D].
    neighbours: jax.Array  # int32 [D, 2, E + 1], the next corners each way along each direction.
    points: jax.Array  # int32 [E], the points of all corners, corner after corner.
    point_weights: jax.Array  # [E].
    nodes: tuple[jax.Array, ...]  # Each level of the tree: [2, n] first and end in the one below.
    roots: jax.Array  # int32 [E + 1], each corner's node, counted through all the levels.
    capacity: jax.Array  # int32 [], the number of the capacity that holds it all.


def locate(features: jax.Array) -> Simplices:
    """Returns the simplices that points lie in.

    Args:
      features: float32 [N, d], in standard deviations of the Gaussian.
    """
    dims = features.shape[1]
    sides = dims + 1
    # Rows are orthogonal vectors of the plane whose coordinates sum to 0, all scaled so that the
    # three steps together have the variance of the Gaussian (Adams et al., Section 3.1).
    rows = [[1.0] * (i + 1) + [-(i + 1.0)] + [0.0] * (dims - i - 1) for i in range(dims)]
    scale = [np.sqrt(2 / 3) * sides / np.sqrt((i + 1) * (i + 2)) for i in range(dims)]
    plane = jnp.asarray(np.array(rows) * np.array(scale)[:, None], jnp.float32)
    elevated = jnp.dot(features, plane, precision="highest")

    multiple = jnp.round(elevated / sides)
    rest = elevated / sides - multiple
    axes = jnp.arange(sides, dtype=jnp.int32)
    is_before = (rest[:, None] > rest[..., None]) | (
        (rest[:, None] == rest[..., None]) & (axes[None] < axes[:, None])[None]
    )
    rank = jnp.sum(is_before, axis=-1, dtype=jnp.int32)  # 0 is the largest rest.
    # The rounded point may lie off the plane; the axes rounded worst bring it back.
    rank = rank + jnp.sum(multiple, axis=-1, keepdims=True).astype(jnp.int32)
    wrap = (rank < 0).astype(jnp.int32) - (rank > dims).astype(jnp.int32)
    rank, multiple = rank + sides * wrap, multiple + wrap.astype(jnp.float32)
    rest = rest - wrap.astype(jnp.float32)

    is_rank = rank[:, None] == axes[None, :, None]  # [N, rank, axis]
    path = jnp.sum(jnp.where(is_rank, axes[None, None], 0), axis=-1)
    steps = jnp.sum(jnp.where(is_rank, rest[:, None], 0), axis=-1)[:, ::-1]  # Ascending.
    first = 1 - (steps[:, -1:] - steps[:, :1])
    weights = jnp.concatenate([first, steps[:, 1:] - steps[:, :-1]], axis=-1)
    return Simplices((multiple * sides).astype(jnp.int32), path[:, ::-1], weights)


def with_filter(features: jax.Array, run: Callable[[Filter], T]) -> T:
    """Returns run(filter), with the filter of the Gaussian of points that have these features.

    `filter` maps values [N, C] to approximately sum_j exp(-|f_i - f_j|^2 / 2) values_j, [N, C]; it
    is linear, differentiable in the values, and not in the features. `run` is traced once for each
    capacity.

    Args:
      features: [N, d], in standard deviations of the Gaussian.
      run: a function of JAX arrays, and of what it closes over.
    """
    simplices = locate(lax.stop_gradient(features.astype(jnp.float32)))
    count, sides = simplices.path.shape
    lattice = _build(simplices)
    branches = [
        lambda lattice, sizes=sizes: run(functools.partial(_filter, _prepare(lattice, sizes)))
        for sizes in _capacities(count * sides)
    ]
    return lax.switch(lattice.capacity, branches, lattice)


def self_weights(features: jax.Array) -> jax.Array:
    """Returns what the filter adds of each point's value to itself, [N, d] to [N, 1].

    A walk between two corners k steps apart is either those k steps or the other D - k backwards.
    Exact where the corners between exist; else a little too much.
    """
    weights = locate(features.astype(jnp.float32)).weights
    sides = weights.shape[1]
    apart = np.abs(np.subtract.outer(np.arange(sides), np.arange(sides)))
    # A corner reaches itself without a step, and by all steps either way.
    taps = 0.5**apart + 0.5 ** (sides - apart) + 0.5**sides * np.eye(sides)
    # Corners r and s < r of a simplex differ by steps along r - s of the D directions.
    blurred = jnp.dot(weights, jnp.asarray(_peak(sides) * taps, jnp.float32), precision="highest")
    return jnp.sum(blurred * weights, axis=-1, keepdims=True)


def _peak(sides: int) -> float:
    """The factor that makes the response of a corner to itself 1."""
    return 1 / (1 + 0.5 ** (sides - 1))


def _capacities(entries: int) -> list[tuple[int, ...]]:
    """Returns for each capacity the number of corners, and of nodes in each level of the tree."""
    capacities = []
    for share in _SHARES if entries > _FEW else _SHARES[-1:]:
        corners = entries // share + 1
        sizes = [corners, corners + entries // _FAN]
        # A corner that reaches level l + 1 has more than FAN^l contributions; mostly they are few.
        for level in itertools.count(1):
            worst = entries // (_FAN**level + 1)
            if not worst:
                break
            sizes.append(min(worst, entries // _FAN ** (level + 1) + corners // 4**level))
        capacities.append(tuple(sizes))
    return capacities


def _build(simplices: Simplices) -> Lattice:
    """Finds the corners of the points' simplices, on the host."""
    count, sides = simplices.path.shape
    entries = count * sides
    *_, worst = _capacities(entries)

    def array(*shape: int, dtype: jax.typing.DTypeLike = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    shapes = Lattice(
        corners=array(count, sides),
        weights=array(count, sides, dtype=jnp.float32),
        neighbours=array(sides, 2, entries + 1),
        points=array(entries),
        point_weights=array(entries, dtype=jnp.float32),
        nodes=tuple(array(2, size) for size in worst[1:]),
        roots=array(entries + 1),
        capacity=array(),
    )
    return jax.pure_callback(_build_on_host, shapes, simplices, vmap_method="sequential")


def _build_on_host(simplices: Simplices) -> Lattice:
    origin, path, weights = (np.asarray(a) for a in simplices)
    count, sides = path.shape
    dims, entries = sides - 1, count * sides
    # Coordinates sum to 0 at step 0, so all but the first tell corners apart. They are the digits
    # of one number, to which a step along the lattice adds a constant. The last is the highest: it
    # is of the last feature alone, so that in the order of these numbers neighbours lie close in
    # memory, slab after slab. A walk stays within D of its origin, and a neighbour too.
    spans = origin.max(axis=0).astype(np.int64) - origin.min(axis=0) + 4 * sides
    digits = np.concatenate([[0, 1], np.cumprod(spans[1:-1], dtype=np.int64)])
    if np.prod(spans[1:].astype(float)) * sides**dims > 2.0**62:
        raise ValueError(f"The points span too many deviations: {spans} steps of the lattice.")
    steps = np.sum(digits) - sides * digits
    places = (origin - origin.min(axis=0)).astype(np.int64) @ digits
    # Points that share a simplex are many, and share its corners.
    code = path[:, :dims] @ sides ** np.arange(dims)
    _, first, inverse = _unique(places * sides**dims + code)
    keys = np.empty((len(first), sides), np.int64)
    keys[:, 0] = places[first]
    keys[:, 1:] = steps[path[first, :-1]]
    keys, _, numbers = _unique(np.cumsum(keys, axis=1).ravel())
    total = len(keys)
    corners = (numbers + 1).reshape(-1, sides)[inverse]

    neighbours = np.zeros((sides, 2, entries + 1), np.int32)

    def link(ends: np.ndarray, step: np.int64) -> None:
        wanted = keys + step
        found = np.searchsorted(keys, wanted)
        found[found == total] = 0
        here = np.flatnonzero(keys[found] == wanted)
        there = found[here] + 1
        ends[0, here + 1], ends[1, there] = there, here + 1

    with futures.ThreadPoolExecutor() as pool:
        list(pool.map(link, neighbours, steps))
    matrix = sparse.csr_matrix(
        (weights.ravel(), corners.ravel(), np.arange(0, entries + 1, sides, dtype=np.int32)),
        shape=(count, total + 1),
    ).tocsc()
    levels, height, roots = _tree(matrix.indptr)
    needs = (total + 1, *(level.shape[1] for level in levels))
    capacities = _capacities(entries)
    capacity = next(
        i
        for i, sizes in enumerate(capacities)
        if all(need <= size for need, size in zip(needs, sizes, strict=False))
    )
    nodes = tuple(np.zeros((2, size), np.int32) for size in capacities[-1][1:])
    for level, node in zip(levels, nodes, strict=False):
        node[:, : level.shape[1]] = level
    offsets = np.cumsum((0, *capacities[capacity][1:]))[height]
    all_roots = np.zeros(entries + 1, np.int32)
    all_roots[: total + 1] = roots + offsets
    # In the order of Lattice's fields.
    arrays: Any = (
        corners,
        weights,
        neighbours,
        matrix.indices,
        matrix.data,
        nodes,
        all_roots,
        np.int32(capacity),
    )
    return Lattice(*arrays)


def _unique(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the different keys in order, one place of each, and which of them each key is."""
    order = np.argsort(keys)
    ordered = keys[order]
    is_new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    inverse = np.empty(len(keys), np.int32)
    inverse[order] = np.cumsum(is_new, dtype=np.int32) - 1
    return ordered[is_new], order[is_new], inverse


def _tree(ends: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Builds the tree that adds up runs of entries, FAN by FAN.

    Args:
      ends: [n + 1], run i has the entries ends[i] to ends[i + 1].

    Returns:
      the levels, [2, m] each: first and end, in the level below, of what a node adds up; node 0 of
      the first level adds up nothing. Then the level and the node that hold each run's sum, [n].
    """
    starts, counts = ends[:-1].astype(np.int64), np.diff(ends).astype(np.int64)
    runs = np.arange(len(counts))
    height, roots = np.zeros(len(counts), np.int32), np.zeros(len(counts), np.int64)
    levels = []
    while len(runs):
        parts = -(-counts // _FAN)
        firsts = np.cumsum(parts) - parts + (not levels)
        owner = np.repeat(np.arange(len(runs)), parts)
        low = starts[owner] + _FAN * (np.arange(len(owner)) + (not levels) - firsts[owner])
        level = np.stack([low, np.minimum(low + _FAN, (starts + counts)[owner])])
        levels.append(level if levels else np.pad(level, [(0, 0), (1, 0)]))
        is_done = parts == 1
        height[runs[is_done]], roots[runs[is_done]] = len(levels) - 1, firsts[is_done]
        rest = parts > 1
        runs, starts, counts = runs[rest], firsts[rest], parts[rest]
    return levels, height, roots


class _Level(NamedTuple):
    """One level of the tree: rows of the one below and their weights, which nodes add up."""

    rows: jax.Array  # int32 [FAN, n].
    weights: jax.Array  # [FAN, n].
    is_used: jax.Array  # bool [], whether it has nodes at all.


class _Prepared(NamedTuple):
    """A lattice cut to a capacity of M corners."""

    levels: tuple[_Level, ...]
    roots: jax.Array  # int32 [M].
    neighbours: jax.Array  # int32 [D, 2, M].
    corners: jax.Array  # int32 [D, N].
    weights: jax.Array  # [D, N], with the factor that the blur needs.


def _prepare(lattice: Lattice, sizes: tuple[int, ...]) -> _Prepared:
    levels = []
    for size, (first, end) in zip(sizes[1:], lattice.nodes, strict=True):
        rows = first[None, :size] + jnp.arange(_FAN, dtype=jnp.int32)[:, None]
        is_one = rows < end[None, :size]
        rows, weights = jnp.where(is_one, rows, 0), is_one.astype(jnp.float32)
        if not levels:
            rows, weights = (
                _rows(lattice.points, rows),
                weights * _rows(lattice.point_weights, rows),
            )
        levels.append(_Level(rows, weights, jnp.any(is_one)))
    return _Prepared(
        tuple(levels),
        lattice.roots[: sizes[0]],
        lattice.neighbours[..., : sizes[0]],
        lattice.corners.T,
        _peak(lattice.corners.shape[1]) * lattice.weights.T,
    )


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
    return table.at[index].get(mode="promise_in_bounds")


def _weighted_rows(table: jax.Array, rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns sum_k weights[k, i] table[rows[k, i]], [n, C]."""
    terms = (w[:, None] * _rows(table, i) for i, w in zip(rows, weights, strict=True))
    return functools.reduce(jnp.add, terms)


def _run(lattice: _Prepared, values: jax.Array, is_reverse: bool = False) -> jax.Array:
    # Each step is a branch or a loop. XLA would merge plain steps, barriers or not, and work out
    # the one before anew for every row that is read of it.
    def add_up(below: jax.Array, level: _Level) -> jax.Array:
        nothing = jnp.zeros((level.rows.shape[1], values.shape[1]), values.dtype)
        return lax.cond(
            level.is_used,
            lambda below: _weighted_rows(below, level.rows, level.weights),
            lambda _: nothing,
            below,
        )

    levels = list(itertools.accumulate(lattice.levels, add_up, initial=values))
    sums = _rows(jnp.concatenate(levels[1:]), lattice.roots)

    def blur(sums: jax.Array, ends: jax.Array) -> tuple[jax.Array, None]:
        return sums + 0.5 * (_rows(sums, ends[0]) + _rows(sums, ends[1])), None

    sums, _ = lax.scan(blur, sums, lattice.neighbours, reverse=is_reverse)
    return _weighted_rows(sums, lattice.corners, lattice.weights)


@jax.custom_vjp
def _filter(lattice: _Prepared, values: jax.Array) -> jax.Array:
    return _run(lattice, values)


def _filter_fwd(lattice, values):
    return _filter(lattice, values), lattice


def _filter_bwd(lattice, grad):
    # Splat and slice are each other's transpose, each blur is its own.
    return None, _run(lattice, grad, is_reverse=True)


_filter.defvjp(_filter_fwd, _filter_bwd)
