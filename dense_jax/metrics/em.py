"""Errors of cell boundaries in electron microscopy: the measures of ISBI 2012, on the host.

I. Arganda-Carreras et al., "Crowdsourcing the creation of image segmentation algorithms for
connectomics", Frontiers in Neuroanatomy 9, 2015 (V-Rand, V-Info: the current ranking), and the
measures that the challenge first had and U-Net reports (pixel, Rand and warping error), after the
pages of the challenge and its toolbox, fiji/Trainable_Segmentation, package ``metrics``. Warping:
V. Jain et al., "Boundary learning by optimization with topological constraints", CVPR 2010.

A label is 1 inside a cell and 0 on a membrane; a prediction is the probability of the inside. At a
threshold t the predicted inside is probability > t. Cells are 4-connected components, so a
diagonal contact does not join two. Each measure takes its best value over the thresholds.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage, sparse

THRESHOLDS = tuple(k / 10 for k in range(11))
WARPING_RADIUS = 20
"""How far from a pixel the toolbox looks whether removing it splits a cell, in pixels."""

# The neighbours of a pixel in a circle; those at even places share an edge with it.
_RING = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))


def scores(labels: Sequence[np.ndarray], probabilities: Sequence[np.ndarray]) -> dict[str, float]:
    """All measures of a stack of slices, each at its best threshold.

    Args:
      labels: [H, W] each, 1 inside a cell, 0 membrane.
      probabilities: [H, W] each, of the inside, in [0, 1].

    Returns:
      ``pixel_error`` 1 - F of the inside pixels, ``pixel_error_plain`` the share of wrong pixels,
      ``pixel_error_squared`` the mean squared difference without threshold; ``rand_error``;
      ``warping_error`` (pixels of splits and mergers), ``warping_error_classic`` (all topological
      errors); ``v_rand`` and ``v_info``, which alone are better when higher. NaN where no slice
      has an inside to score.

    Raises:
      ValueError: the lists or the shapes do not match, or a value is out of range.
    """
    swept = sweep(labels, probabilities)
    best = {name: float(swept[name].max()) for name in ("v_rand", "v_info")}
    best["rand_error"] = 1 - float(swept["rand_f"].max())
    best["pixel_error"] = 1 - float(swept["pixel_f"].max())
    # The challenge stops the sweep of warping errors at 0.9.
    for name in ("warping_error", "warping_error_classic"):
        best[name] = float(swept[name][:-1].min())
    best["pixel_error_plain"] = float(swept["pixel_error_plain"].min())
    squared = sum(float(np.square(p - t).sum()) for t, p in zip(labels, probabilities, strict=True))
    best["pixel_error_squared"] = squared / sum(t.size for t in labels)
    return best


def sweep(
    labels: Sequence[np.ndarray], probabilities: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """The measures at each of `THRESHOLDS`, arguments as of `scores`.

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
    """Numbers the cells and grows them until only lines one pixel wide part them.

    This is a watershed with 4-connected basins of the inverted binary map: all cells grow by one
    pixel at a time, and a pixel that would join two becomes a line. Borders of any width turn
    into lines; a membrane that does not part anything vanishes. Where two cells reach adjacent
    pixels at once, the pixel of even row + column is first.

    Args:
      inside: bool [H, W].

    Returns:
      int32 [H, W], 0 on the lines (everywhere, if there is no cell).
    """
    wall = -1  # lines, and what is outside the image
    cells = np.pad(ndimage.label(inside)[0].astype(np.int32), 1, constant_values=wall)
    width, flat = cells.shape[1], cells.ravel()
    beside = np.array([dy * width + dx for dy, dx in _RING[::2]])
    parity = (np.indices(cells.shape).sum(0) % 2).ravel()
    grown = np.flatnonzero(flat > 0)
    while len(grown):
        reached = (grown[:, None] + beside).ravel()
        front = np.unique(reached[flat[reached] == 0])
        # Pixels of one parity are never side by side, so they can be decided at once.
        for half in (front[parity[front] == 0], front[parity[front] == 1]):
            around = flat[half[:, None] + beside]
            highest = around.max(1)
            differs = ((around > 0) & (around != highest[:, None])).any(1)
            flat[half] = np.where(differs, wall, highest)
        grown = front[flat[front] > 0]
    return np.maximum(cells, 0)[1:-1, 1:-1]


def _joint(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of pixels inside the true cells, for all cells that have any.

    Returns:
      Of each overlap of a true and a predicted cell, of each true cell (with its pixels on the
      prediction's borders) and of each predicted cell.
    """
    scored = truth > 0
    ones = np.ones(np.count_nonzero(scored), np.int64)
    table: Any = sparse.coo_array((ones, (truth[scored], predicted[scored]))).tocsr()
    of_truth = np.asarray(table.sum(1)).ravel()
    table = table[:, 1:]
    of_prediction = np.asarray(table.sum(0)).ravel()
    return table.data, of_truth[of_truth > 0], of_prediction[of_prediction > 0]


def rand_counts(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float, float]:
    """Pairs of pixels inside the true cells that share a cell: in both maps, predicted, true.

    Each border pixel of the prediction counts as a cell of its own. To be added over slices.

    Args:
      truth: [H, W] numbers of cells, 0 outside.
      predicted: [H, W] numbers of cells, 0 on borders.
    """
    both, of_truth, of_prediction = (c.astype(float) for c in _joint(truth, predicted))
    border = of_truth.sum() - of_prediction.sum()
    return (
        float(np.square(both).sum() + border),
        float(np.square(of_prediction).sum() + border),
        float(np.square(of_truth).sum()),
    )


def v_rand_score(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float, float]:
    """Precision, recall and F of the foreground-restricted Rand score; arguments as above.

    With p_ij the share of pixels in true cell i and predicted cell j: precision is sum p_ij^2 /
    sum b_j^2, recall sum p_ij^2 / sum a_i^2. Precision falls by mergers, recall by splits.
    """
    both, of_prediction, of_truth = rand_counts(truth, predicted)
    return both / of_prediction, both / of_truth, 2 * both / (of_prediction + of_truth)


def v_info_score(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float, float]:
    """Mutual information over the entropy of the truth, of the prediction, and their F.

    A map of one cell has no entropy: then the score is (0, 1, 0) if it is the truth, else (1, 0,
    0), as in the toolbox.
    """
    both, of_truth, of_prediction = _joint(truth, predicted)
    num = of_truth.sum()
    border = 1 - of_prediction.sum() / num  # so many cells of one pixel each
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
    """For each of 256 neighbourhoods, 1 if flipping its centre keeps the topology.

    Bit k of an index is the k-th neighbour, clockwise from above. With 4-connected cells and
    8-connected membranes a pixel is simple if its Yokoi number, sum over the four edges k of
    x_k - x_k x_(k+1) x_(k+2), is 1: one cell touches it, and it fills or opens no hole.
    """

    def yokoi(code: int) -> int:
        x = [code >> k & 1 for k in range(8)]
        return sum(x[k] - x[k] * x[k + 1] * x[(k + 2) % 8] for k in range(0, 8, 2))

    return bytes(yokoi(code) == 1 for code in range(256))


def warp(truth: np.ndarray, probability: np.ndarray, threshold: float) -> np.ndarray:
    """Deforms the true map towards the prediction without changing its topology.

    Pixels in which the two differ are flipped where they are simple, those with the largest
    |probability - threshold| first, column by column among equals, over and over until none is.

    Args:
      truth: bool [H, W].
      probability: [H, W] of the inside.
      threshold: above which a pixel is inside.

    Returns:
      bool [H, W]; what still differs from the prediction are topological errors.
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
        for i in pending:  # one by one: each flip changes what is simple next to it
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
    """Counts the pixels in which a warped truth and a prediction differ, by what they do wrong.

    The rules of the toolbox, from the cells among the eight neighbours of such a pixel. Missing in
    the prediction (inside only in the truth): no cell around is an ``object_deletion``, nothing but
    cell a ``hole_addition``; two cells, or one that falls apart within ``radius`` without the
    pixel, a ``split``; else a ``hole_deletion``. Inside only in the prediction: no cell is an
    ``object_addition``, nothing but cell a ``hole_deletion``, two cells a ``merge``, else a
    ``hole_addition``.

    Args:
      warped: bool [H, W] as of `warp`.
      inside: bool [H, W], the prediction.
      radius: in pixels.
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
    """The numbers at the up to eight neighbours of a pixel."""
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
