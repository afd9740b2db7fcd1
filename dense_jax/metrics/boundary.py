"""Boundary F1: how well predicted contours follow the labelled ones, on the host.

The measure of SegNet (Badrinarayanan et al., PAMI 2017, arXiv:1511.00561, Section 4; script
``computeBFmeasure.m`` of alexgkendall/SegNet-Tutorial), after Csurka et al., BMVC 2013.
"""

from typing import Literal

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph
from scipy.spatial import KDTree


def image_boundary_f1(
    labels: np.ndarray,
    predictions: np.ndarray,
    num_classes: int,
    *,
    tolerance: float = 0.0075,
    match: Literal["distance", "assignment"] = "distance",
    classes: Literal["union", "gt"] = "union",
) -> float:
    """Mean over classes of the F1 score of one image's boundary pixels.

    Precision is the matched share of the predicted boundary pixels of a class, recall that of the
    labelled ones, and F1 is 2PR / (P + R), 0 if nothing matches. The score of a set of images is
    the mean over those that have a score.

    Void is treated as in the script, as one more region: its border with a class is a boundary of
    that class, and what is predicted inside it counts.

    Args:
      labels: [H, W] integer class ids; values outside [0, C) belong to no class.
      predictions: [H, W] integer class ids.
      num_classes: C.
      tolerance: how far apart matched pixels may be, as a share of the image diagonal; the default
        is 4.5 pixels at 360x480.
      match: "distance" matches a pixel that has any pixel of the other map in reach (Csurka et
        al.); "assignment" pairs pixels one to one, as many as possible (the script; it minimises
        cost, but not to pair costs there 100 times the longest distance).
      classes: "union" averages over classes with a boundary in either map (the script's code),
        "gt" over those with one in the labels (the script's comment).

    Returns:
      A value in [0, 1]; NaN if there is no class to average over.

    Raises:
      ValueError: if the maps are not two of equal size.
    """
    if labels.shape != predictions.shape or labels.ndim != 2:
        raise ValueError(
            f"labels {labels.shape} and predictions {predictions.shape} are not [H, W]"
        )
    radius = tolerance * float(np.hypot(*labels.shape))
    count_matches = _count_assigned if match == "assignment" else _count_in_reach
    scores = []
    for c in range(num_classes):
        true = np.argwhere(boundary_map(labels == c))
        predicted = np.argwhere(boundary_map(predictions == c))
        if len(true) and len(predicted):
            hit_true, hit_predicted = count_matches(true, predicted, radius)
            recall, precision = hit_true / len(true), hit_predicted / len(predicted)
            scores.append(2 * precision * recall / (precision + recall) if hit_true else 0.0)
        elif len(true) or (len(predicted) and classes == "union"):
            scores.append(0.0)
    return float(np.mean(scores)) if scores else float("nan")


def boundary_map(region: np.ndarray) -> np.ndarray:
    """Pixels [H, W] whose 2x2 block (itself, right, below, diagonal) is not of one value.

    This is BSDS ``seg2bdry(..., 'imageSize')``: blocks at the right and bottom edge are cut off,
    so the last row sees only its right and the last column only its lower neighbour.
    """
    padded = np.pad(region, ((0, 1), (0, 1)), mode="edge")
    here, right = padded[:-1, :-1], padded[:-1, 1:]
    below, diagonal = padded[1:, :-1], padded[1:, 1:]
    return (here != right) | (here != below) | (here != diagonal)


def _count_in_reach(a: np.ndarray, b: np.ndarray, radius: float) -> tuple[int, int]:
    """How many points of `a` have one of `b` within `radius`, and of `b` one of `a`."""
    # Nearest neighbours of the few boundary points: seven times faster than distance transforms.
    to_b, to_a = KDTree(b).query(a)[0], KDTree(a).query(b)[0]
    return int((to_b <= radius).sum()), int((to_a <= radius).sum())


def _count_assigned(a: np.ndarray, b: np.ndarray, radius: float) -> tuple[int, int]:
    """Largest number of pairs of one point of `a` and one of `b` within `radius`, twice."""
    near = KDTree(a).sparse_distance_matrix(KDTree(b), radius, output_type="ndarray")
    # As a flow of capacity one: source, points of a, points of b, sink. SciPy's
    # maximum_bipartite_matching takes seconds on such dense neighbourhoods, this milliseconds.
    num = len(a) + len(b)
    points_a, points_b = np.arange(len(a)), np.arange(len(a), num)
    tails = np.concatenate([np.full(len(a), num), near["i"], points_b])
    heads = np.concatenate([points_a, len(a) + near["j"], np.full(len(b), num + 1)])
    capacity = np.ones(len(tails), np.int32)
    graph = sparse.csr_array((capacity, (tails, heads)), shape=(num + 2, num + 2))
    pairs = int(csgraph.maximum_flow(graph, num, num + 1).flow_value)
    return pairs, pairs
