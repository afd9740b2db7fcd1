"""Boundary F1, a measure of how well predicted contours follow labelled ones, on the host.

This is the measure of SegNet (Badrinarayanan et al., PAMI 2017, arXiv:1511.00561, Section 4; script
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
    """Returns the mean over classes of the F1 score of one image's boundary pixels.

    Precision is the share of a class's predicted boundary pixels that match, and recall is the
    share of its labelled boundary pixels that match. F1 is 2PR / (P + R), or 0 if no pixel matches.
    The score of a set of images is the mean over all images that have a score.

    As in the script, void is a region like a class. Its border with a class is a boundary of that
    class, and predicted boundaries inside it count.

    Args:
      labels: [H, W] integer class ids; values outside [0, C) belong to no class.
      predictions: [H, W] integer class ids.
      num_classes: C.
      tolerance: largest distance between matched pixels, as a share of the image diagonal. The
        default is 4.5 pixels at 360x480.
      match: "distance" matches a pixel if any pixel of the other map is within the tolerance
        (Csurka et al.). "assignment" makes as many one-to-one pairs as possible. The script
        minimises a cost instead, but an unpaired pixel costs 100 times the longest distance.
      classes: "union" averages over classes with a boundary in either map (the script's code).
        "gt" averages over classes with a boundary in the labels (the script's comment).

    Returns:
      A value in [0, 1], or NaN if there is no class to average over.

    Raises:
      ValueError: the maps are not [H, W] of equal size.
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
    """Returns the pixels [H, W] whose 2x2 block (itself, right, below, diagonal) is not uniform.

    This is BSDS ``seg2bdry(..., 'imageSize')``. Blocks are cropped at the right and bottom edges,
    so that pixels of the last row are compared only with the right neighbour, and pixels of the
    last column only with the lower one.
    """
    padded = np.pad(region, ((0, 1), (0, 1)), mode="edge")
    here, right = padded[:-1, :-1], padded[:-1, 1:]
    below, diagonal = padded[1:, :-1], padded[1:, 1:]
    return (here != right) | (here != below) | (here != diagonal)


def _count_in_reach(a: np.ndarray, b: np.ndarray, radius: float) -> tuple[int, int]:
    """Returns how many points of `a` have a point of `b` within `radius`, and vice versa."""
    # Boundary points are few: nearest neighbours are seven times faster than distance transforms.
    to_b, to_a = KDTree(b).query(a)[0], KDTree(a).query(b)[0]
    return int((to_b <= radius).sum()), int((to_a <= radius).sum())


def _count_assigned(a: np.ndarray, b: np.ndarray, radius: float) -> tuple[int, int]:
    """Returns, twice, the largest number of one-to-one pairs of `a` and `b` within `radius`."""
    near = KDTree(a).sparse_distance_matrix(KDTree(b), radius, output_type="ndarray")
    # A flow with capacity one: source, points of a, points of b, sink. It takes milliseconds, while
    # SciPy's maximum_bipartite_matching takes seconds on such dense neighbourhoods.
    num = len(a) + len(b)
    points_a, points_b = np.arange(len(a)), np.arange(len(a), num)
    tails = np.concatenate([np.full(len(a), num), near["i"], points_b])
    heads = np.concatenate([points_a, len(a) + near["j"], np.full(len(b), num + 1)])
    capacity = np.ones(len(tails), np.int32)
    graph = sparse.csr_array((capacity, (tails, heads)), shape=(num + 2, num + 2))
    pairs = int(csgraph.maximum_flow(graph, num, num + 1).flow_value)
    return pairs, pairs
