"""Errors of cell boundaries in electron microscopy: the measures of ISBI 2012, on the host.

V-Rand and V-Info define the current ranking. Pixel, Rand and warping error are the challenge's
first measures, which U-Net reports. The implementation follows the web pages of the challenge and
its toolbox, fiji/Trainable_Segmentation, package ``metrics``.

A label is 1 inside a cell and 0 on a membrane. A prediction is the probability of the inside. At
threshold t, the predicted inside is probability > t. Cells are 4-connected components, so that a
diagonal contact does not join two cells. Each measure takes its best value over the thresholds.

Reference: I. Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms
for connectomics", Frontiers in Neuroanatomy 9, 2015; for warping: V. Jain et al., "Boundary
learning by optimization with topological constraints", CVPR 2010.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage, sparse

THRESHOLDS = tuple(k / 10 for k in range(11))
WARPING_RADIUS = 20
"""Radius in pixels within which the toolbox tests whether removing a pixel splits a cell."""

# The neighbours of a pixel in clockwise order; those with even indices share an edge with it.
_RING = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))


def scores(labels: Sequence[np.ndarray], probabilities: Sequence[np.ndarray]) -> dict[str, float]:
    """Returns all measures of a stack of slices, each at its best threshold.

    Args:
      labels: [H, W] each, 1 inside a cell, 0 on a membrane.
      probabilities: [H, W] each, probability of the inside in [0, 1].

    Returns:
      ``pixel_error`` is 1 - F of the inside pixels, ``pixel_error_plain`` the share of wrong
      pixels, and ``pixel_error_squared`` the mean squared difference without threshold.
      ``rand_error`` is 1 - F of the pairs of pixels. ``warping_error`` is the share of pixels with
      splits and mergers, ``warping_error_classic`` that of all topological errors. ``v_rand`` and
      ``v_info`` are scores, for which higher is better. A measure is NaN if no slice has an inside
      to score.

    Raises:
      ValueError: the lists or the shapes do not match, or a value is out of range.
    """
    swept = sweep(labels, probabilities)
    best = {name: float(swept[name].max()) for name in ("v_rand", "v_info")}
    best["rand_error"] = 1 - float(swept["rand_f"].max())
    best["pixel_error"] = 1 - float(swept["pixel_f"].max())
    # The challenge evaluates warping errors only for thresholds up to 0.9.
    for name in ("warping_error", "warping_error_classic"):
        best[name] = float(swept[name][:-1].min())
    best["pixel_error_plain"] = float(swept["pixel_error_plain"].min())
    squared = sum(float(np.square(p - t).sum()) for t, p in zip(labels, probabilities, strict=True))
    best["pixel_error_squared"] = squared / sum(t.size for t in labels)
    return best


def sweep(
    labels: Sequence[np.ndarray], probabilities: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns the measures at each of `THRESHOLDS`; the arguments are those of `scores`.

    Returns:
      Arrays [11] by name: ``pixel_f``, ``pixel_error_plain``, ``rand_f``, ``v_rand``, ``v_info``,
      ``warping_error`` and ``warping_error_classic``.
    """
    pairs = list(zip(labels, probabilities, strict=True))
    for label, probability in pairs:
        _check(label, probability)
    rows = [_at_threshold(pairs, threshold) for threshold in THRESHOLDS]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _check(label: np.ndarray, probability: np.ndarray) -> None:
    if label.shape != probability.shape or label.ndim != 2:
        raise ValueError(f"label {label.shape} and probability {probability.shape} are not [H, W]")
    if not np.isin(label, (0, 1)).all():
        raise ValueError(f"labels are 0 or 1, received values up to {label.max()}")
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError("probabilities are in [0, 1]; apply a softmax")


def _at_threshold(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], threshold: float
) -> dict[str, float]:
    hits = true = predicted = wrong = split_or_merged = unmatched = pixels = 0
    rand_sums, v_rand, v_info = np.zeros(3), [], []
    for label, probability in pairs:
        truth, inside = label > 0, probability > threshold
        pixels += truth.size
        hits += int(np.count_nonzero(truth & inside))
        true += int(np.count_nonzero(truth))
        predicted += int(np.count_nonzero(inside))
        wrong += int(np.count_nonzero(truth != inside))
        warped = warp(truth, probability, threshold)
        kinds = classify_mismatches(warped, inside)
        split_or_merged += kinds["split"] + kinds["merge"]
        unmatched += sum(kinds.values())
        if truth.any():
            cells = ndimage.label(truth)[0]
            rand_sums += rand_counts(cells, ndimage.label(inside)[0])
            thinned = thin_borders(inside)
            v_rand.append(v_rand_score(cells, thinned)[2])
            v_info.append(v_info_score(cells, thinned)[2])
    both, of_prediction, of_truth = rand_sums
    return {
        "pixel_f": _ratio(2 * hits, true + predicted),
        "pixel_error_plain": _ratio(wrong, pixels),
        "rand_f": _ratio(2 * both, of_prediction + of_truth),
        "v_rand": _ratio(sum(v_rand), len(v_rand)),
        "v_info": _ratio(sum(v_info), len(v_info)),
        "warping_error": _ratio(split_or_merged, pixels),
        "warping_error_classic": _ratio(unmatched, pixels),
    }


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else float("nan")


def thin_borders(inside: np.ndarray) -> np.ndarray:
    """Numbers the cells and grows them until lines one pixel wide separate them.

    This is a watershed of the inverted binary map with 4-connected basins. All cells grow by one
    pixel at a time, and a pixel that would join two cells becomes a line. Borders of any width
    become lines, and a membrane that does not separate cells disappears. If two cells reach
    adjacent pixels in the same step, the pixel with even row + column is decided first.

    Args:
      inside: bool [H, W].

    Returns:
      int32 [H, W] cell numbers, 0 on lines (everywhere if there is no cell).
    """
    wall = -1  # lines, and pixels outside the image
    cells = np.pad(ndimage.label(inside)[0].astype(np.int32), 1, constant_values=wall)
    width, flat = cells.shape[1], cells.ravel()
    beside = np.array([dy * width + dx for dy, dx in _RING[::2]])
    parity = (np.indices(cells.shape).sum(0) % 2).ravel()
    grown = np.flatnonzero(flat > 0)
    while len(grown):
        reached = (grown[:, None] + beside).ravel()
        front = np.unique(reached[flat[reached] == 0])
        # Pixels of the same parity never share an edge, so they can be decided at once.
        for half in (front[parity[front] == 0], front[parity[front] == 1]):
            around = flat[half[:, None] + beside]
            highest = around.max(1)
            differs = ((around > 0) & (around != highest[:, None])).any(1)
            flat[half] = np.where(differs, wall, highest)
        grown = front[flat[front] > 0]
    return np.maximum(cells, 0)[1:-1, 1:-1]


def _joint(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts pixels inside true cells, for all cells that have any.

    Returns:
      The count for each overlap of a true and a predicted cell, for each true cell (including its
      pixels on predicted borders) and for each predicted cell.
    """
    scored = truth > 0
    ones = np.ones(np.count_nonzero(scored), np.int64)
    table: Any = sparse.coo_array((ones, (truth[scored], predicted[scored]))).tocsr()
    of_truth = np.asarray(table.sum(1)).ravel()
    table = table[:, 1:]
    of_prediction = np.asarray(table.sum(0)).ravel()
    return table.data, of_truth[of_truth > 0], of_prediction[of_prediction > 0]


def rand_counts(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float, float]:
    """Counts pairs of pixels inside true cells that share a cell.

    Each border pixel of the prediction counts as a separate cell. Sums over slices are meaningful.

    Args:
      truth: [H, W] cell numbers, 0 outside.
      predicted: [H, W] cell numbers, 0 on borders.

    Returns:
      The number of pairs that share a cell in both maps, in the prediction, and in the truth.
    """
    both, of_truth, of_prediction = (c.astype(float) for c in _joint(truth, predicted))
    border = of_truth.sum() - of_prediction.sum()
    return (
        float(np.square(both).sum() + border),
        float(np.square(of_prediction).sum() + border),
        float(np.square(of_truth).sum()),
    )


def v_rand_score(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float, float]:
    """Returns precision, recall and F of the foreground-restricted Rand score.

    Let p_ij be the share of pixels in true cell i and predicted cell j, a_i = sum_j p_ij and
    b_j = sum_i p_ij. Precision is sum p_ij^2 / sum b_j^2, and recall is sum p_ij^2 / sum a_i^2.
    Mergers reduce precision, and splits reduce recall. The arguments are those of `rand_counts`.
    """
    both, of_prediction, of_truth = rand_counts(truth, predicted)
    return both / of_prediction, both / of_truth, 2 * both / (of_prediction + of_truth)


def v_info_score(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float, float]:
    """Returns the mutual information over the entropy of the truth, of the prediction, and their F.

    The entropy of a map with one cell is zero. As in the toolbox, the score is then (0, 1, 0) if
    this map is the truth, else (1, 0, 0). The arguments are those of `rand_counts`.
    """
    both, of_truth, of_prediction = _joint(truth, predicted)
    num = of_truth.sum()
    border = 1 - of_prediction.sum() / num  # share of border pixels, each a separate cell
    of_borders = border * np.log(num)
    h_truth = _entropy(of_truth / num)
    h_prediction = _entropy(of_prediction / num) + of_borders
    if h_truth == 0:
        return 0.0, 1.0, 0.0
    if h_prediction == 0:
        return 1.0, 0.0, 0.0
    shared = h_truth + h_prediction - _entropy(both / num) - of_borders
    return shared / h_truth, shared / h_prediction, 2 * shared / (h_truth + h_prediction)


def _entropy(shares: np.ndarray) -> float:
    return float(-(shares * np.log(shares)).sum())


@functools.cache
def simple_points() -> bytes:
    """Returns for each of 256 neighbourhoods 1 if flipping its centre keeps the topology, else 0.

    Bit k of an index is the k-th neighbour, clockwise from the upper one. With 4-connected cells
    and 8-connected membranes, a pixel is simple if its Yokoi number is 1. This number is the sum
    over the four edges k of x_k - x_k x_(k+1) x_(k+2). A simple pixel touches one cell, and it
    neither fills nor opens a hole.
    """

    def yokoi(code: int) -> int:
        x = [code >> k & 1 for k in range(8)]
        return sum(x[k] - x[k] * x[k + 1] * x[(k + 2) % 8] for k in range(0, 8, 2))

    return bytes(yokoi(code) == 1 for code in range(256))


def warp(truth: np.ndarray, probability: np.ndarray, threshold: float) -> np.ndarray:
    """Deforms the true map towards the prediction without changing its topology.

    Among the pixels in which the maps differ, simple ones are flipped, until no simple pixel
    remains. Those with the largest |probability - threshold| come first, and equal ones in
    column-major order.

    Args:
      truth: bool [H, W].
      probability: [H, W], probability of the inside.
      threshold: a pixel is inside if its probability is above this.

    Returns:
      bool [H, W]. Pixels that still differ from the prediction are topological errors.
    """
    state = np.pad(truth, 1)
    padded = np.zeros(state.shape, np.int64)
    for k, (dy, dx) in enumerate(_RING):
        padded |= np.roll(state, (-dy, -dx), (0, 1)).astype(np.int64) << k
    codes, width = bytearray(padded.astype(np.uint8).tobytes()), state.shape[1]
    # A flipped pixel is the opposite neighbour of each of its neighbours.
    links = [(dy * width + dx, 1 << (k + 4) % 8) for k, (dy, dx) in enumerate(_RING)]
    columns, rows = np.nonzero((truth != (probability > threshold)).T)
    confidence = np.abs(probability[rows, columns].astype(float) - threshold).astype(np.float32)
    order = np.argsort(-confidence, kind="stable")
    pending = ((rows + 1) * width + columns + 1)[order].tolist()
    is_simple, flipped = simple_points(), []
    while True:
        kept, before = [], len(flipped)
        for i in pending:  # in sequence: each flip changes which neighbours are simple
            if is_simple[codes[i]]:
                flipped.append(i)
                for offset, bit in links:
                    codes[i + offset] ^= bit
            else:
                kept.append(i)
        if len(flipped) == before:
            break
        pending = kept
    state.ravel()[flipped] ^= True
    return state[1:-1, 1:-1]


def classify_mismatches(
    warped: np.ndarray, inside: np.ndarray, *, radius: int = WARPING_RADIUS
) -> dict[str, int]:
    """Counts the pixels in which a warped truth and a prediction differ, by kind of error.

    The rules of the toolbox use the cells among the eight neighbours of such a pixel.

    A pixel that is inside only in the truth is an ``object_deletion`` if there is no cell, and a
    ``hole_addition`` if all neighbours are cell. It is a ``split`` if there are two cells, or if
    the cell falls apart within ``radius`` without the pixel. Else it is a ``hole_deletion``.

    A pixel that is inside only in the prediction is an ``object_addition`` if there is no cell, a
    ``hole_deletion`` if all neighbours are cell, and a ``merge`` if there are two cells. Else it is
    a ``hole_addition``.

    Args:
      warped: bool [H, W], the result of `warp`.
      inside: bool [H, W], the prediction.
      radius: radius in pixels for the test of splits.
    """
    counts = dict.fromkeys(
        ("split", "merge", "hole_addition", "hole_deletion", "object_addition", "object_deletion"),
        0,
    )
    cells = ndimage.label(warped)[0]
    for y, x in np.argwhere(warped != inside).tolist():
        around = _around(cells, y, x)
        touching = around - {0}
        if not touching:
            kind = "object_deletion" if warped[y, x] else "object_addition"
        elif 0 not in around:
            kind = "hole_addition" if warped[y, x] else "hole_deletion"
        elif not warped[y, x]:
            kind = "merge" if len(touching) > 1 else "hole_addition"
        elif len(touching) > 1 or _falls_apart(warped, y, x, radius):
            kind = "split"
        else:
            kind = "hole_deletion"
        counts[kind] += 1
    return counts


def _around(cells: np.ndarray, y: int, x: int) -> set[int]:
    """Returns the cell numbers of the up to eight neighbours of a pixel."""
    height, width = cells.shape
    return {
        int(cells[y + dy, x + dx])
        for dy, dx in _RING
        if 0 <= y + dy < height and 0 <= x + dx < width
    }


def _falls_apart(warped: np.ndarray, y: int, x: int, radius: int) -> bool:
    top, left = max(y - radius, 0), max(x - radius, 0)
    window = warped[top : y + radius + 1, left : x + radius + 1].copy()
    window[y - top, x - left] = False
    return len(_around(ndimage.label(window)[0], y - top, x - left) - {0}) > 1
