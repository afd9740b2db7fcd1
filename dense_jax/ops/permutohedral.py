"""Gaussian filtering of values at scattered points with the permutohedral lattice.

Three linear steps approximate the sums sum_j exp(-|f_i - f_j|^2 / 2) v_j over all pairs. Splat adds
each value to the d + 1 corners of the simplex that contains its point. Blur filters along the d + 1
directions of the lattice with the taps 1/2, 1, 1/2. Slice interpolates at the points.

NumPy finds the corners on the host, where sorting is several times faster. The steps are sums of
gathered rows, because XLA runs scatters on CPUs one row at a time. A corner may collect values of
one point or of all points, so the splat is a tree that adds the contributions to each corner eight
at a time. Sizes that depend on the points are padded to one of a few capacities, and `lax.switch`
runs the program of the smallest sufficient one.

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

_FAN = 8  # Number of entries that a node of the splat's tree adds.
_SHARES = (16, 8, 4, 2, 1)  # Each capacity holds the worst case's corners divided by this.
_FEW = 1 << 16  # Up to this many corners use one capacity: compiling costs more than padding.
T = TypeVar("T")
Filter = Callable[[jax.Array], jax.Array]


class Simplices(NamedTuple):
    """The simplices that contain N points in the lattice of d dimensions; D = d + 1.

    A walk from the origin of a simplex visits all its corners, with one step along each axis.
    """

    origin: jax.Array  # int32 [N, D], the corner whose coordinates are multiples of D.
    path: jax.Array  # int32 [N, D], the axes in the order of the walk's steps.
    weights: jax.Array  # [N, D], barycentric weights of the corners after r steps of the walk.


class Lattice(NamedTuple):
    """The corners in use, with indices from 1; index 0 is a corner whose value is always zero.

    Arrays have the size of the worst case, E = N D corners. Entries beyond those in use are
    meaningless.
    """

    corners: jax.Array  # int32 [N, D].
    weights: jax.Array  # [N, D].
    neighbours: jax.Array  # int32 [D, 2, E + 1], the next corners both ways along each direction.
    points: jax.Array  # int32 [E], the points of all corners, ordered by corner.
    point_weights: jax.Array  # [E].
    nodes: tuple[jax.Array, ...]  # For each level [2, n]: first and end in the level below.
    roots: jax.Array  # int32 [E + 1], index of each corner's node among the nodes of all levels.
    capacity: jax.Array  # int32 [], index of the smallest sufficient capacity.


def locate(features: jax.Array) -> Simplices:
    """Returns the simplices that contain the points.

    Args:
      features: float32 [N, d], in standard deviations of the Gaussian.
    """
    dims = features.shape[1]
    sides = dims + 1
    # Rows are orthogonal vectors in the plane of coordinates with sum 0. They are scaled so that
    # the three steps together have the variance of the Gaussian (Adams et al., Section 3.1).
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
    rank = jnp.sum(is_before, axis=-1, dtype=jnp.int32)  # 0 is the largest remainder.
    # The rounded point may lie off the plane. The axes with the largest errors move it back.
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
    """Returns run(filter), where `filter` is a Gaussian filter over points with these features.

    `filter` maps values [N, C] to approximately sum_j exp(-|f_i - f_j|^2 / 2) values_j, [N, C]. It
    is linear and differentiable in the values, but not in the features. `run` is traced once for
    each capacity.

    Args:
      features: [N, d], in standard deviations of the Gaussian.
      run: a traceable function; it may close over other arrays.
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
    """Returns the weight with which the filter adds each point's value to itself, [N, d] to [N, 1].

    Two corners that are k steps apart are connected by these k steps, or by the other D - k steps
    backwards. The weight is exact if the corners between them exist, and otherwise slightly too
    large.
    """
    weights = locate(features.astype(jnp.float32)).weights
    sides = weights.shape[1]
    apart = np.abs(np.subtract.outer(np.arange(sides), np.arange(sides)))
    # A corner reaches itself without a step, and by all steps forwards or backwards.
    taps = 0.5**apart + 0.5 ** (sides - apart) + 0.5**sides * np.eye(sides)
    # Corners r and s < r of a simplex are r - s steps apart, along different directions.
    blurred = jnp.dot(weights, jnp.asarray(_peak(sides) * taps, jnp.float32), precision="highest")
    return jnp.sum(blurred * weights, axis=-1, keepdims=True)


def _peak(sides: int) -> float:
    """Returns the factor that makes the response of a corner to itself 1."""
    return 1 / (1 + 0.5 ** (sides - 1))


def _capacities(entries: int) -> list[tuple[int, ...]]:
    """Returns for each capacity the number of corners and of nodes in each level of the tree."""
    capacities = []
    for share in _SHARES if entries > _FEW else _SHARES[-1:]:
        corners = entries // share + 1
        sizes = [corners, corners + entries // _FAN]
        # A corner that reaches level l + 1 has more than FAN^l contributions; few corners have.
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
    # Coordinates sum to 0 at step 0, so all but the first identify a corner. They are the digits of
    # one number, and a step along the lattice adds a constant to it. The last coordinate is the
    # highest digit. It depends only on the last feature, so that neighbours lie close in memory.
    # Walks and their neighbours stay within D of their origin.
    spans = origin.max(axis=0).astype(np.int64) - origin.min(axis=0) + 4 * sides
    digits = np.concatenate([[0, 1], np.cumprod(spans[1:-1], dtype=np.int64)])
    if np.prod(spans[1:].astype(float)) * sides**dims > 2.0**62:
        raise ValueError(
            f"The points span too many standard deviations: {spans} steps of the lattice."
        )
    steps = np.sum(digits) - sides * digits
    places = (origin - origin.min(axis=0)).astype(np.int64) @ digits
    # Many points share a simplex, and thus its corners.
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
    # In the order of the fields of Lattice.
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
    """Returns the sorted unique keys, an index of each, and the inverse indices."""
    order = np.argsort(keys)
    ordered = keys[order]
    is_new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    inverse = np.empty(len(keys), np.int32)
    inverse[order] = np.cumsum(is_new, dtype=np.int32) - 1
    return ordered[is_new], order[is_new], inverse


def _tree(ends: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Builds a tree whose nodes sum segments of entries, FAN entries at a time.

    Args:
      ends: [n + 1], segment i has the entries ends[i] to ends[i + 1].

    Returns:
      The levels [2, m], with the first and the end index, in the level below, of the entries that
      each node adds; node 0 of the first level adds none. Then the level and the node with the sum
      of each segment, both [n].
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
    """One level of the tree: its nodes add rows of the level below, times weights."""

    rows: jax.Array  # int32 [FAN, n].
    weights: jax.Array  # [FAN, n].
    is_used: jax.Array  # bool [], whether it has any nodes.


class _Prepared(NamedTuple):
    """A lattice reduced to a capacity of M corners."""

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
    # Each step is a branch or a loop. XLA would otherwise fuse the steps, in spite of barriers, and
    # compute a step again for every row that the next one reads.
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
    # Splat and slice are transposes of each other, and each blur is its own transpose.
    return None, _run(lattice, grad, is_reverse=True)


_filter.defvjp(_filter_fwd, _filter_bwd)
