"""Errors of membranes: worked values, slow twins of each part, and the edges of the definitions."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dense_jax.metrics import em

ROW = np.array([[1, 1, 1, 1, 2, 2, 2, 2]])
# Truth, prediction, V-Rand precision, recall and F, V-Info F: 8 pixels inside.
WORKED = {
    "merged": (ROW, np.ones((1, 8), int), (0.5, 1, 0.6667), 0),
    "split": (np.ones((1, 8), int), ROW, (1, 0.5, 0.6667), 0),
    "shifted": (ROW, np.array([[1, 1, 1, 2, 2, 2, 2, 2]]), (0.7647, 0.8125, 0.7879), 0.5616),
    "border": (ROW, np.array([[1, 1, 1, 0, 2, 2, 2, 2]]), (1, 0.8125, 0.8966), 0.8314),
    "equal": (ROW, ROW, (1, 1, 1), 1),
}


@pytest.mark.parametrize("case", WORKED)
def test_worked_values(case):
    truth, predicted, v_rand, v_info = WORKED[case]
    np.testing.assert_allclose(em.v_rand_score(truth, predicted), v_rand, atol=5e-5)
    np.testing.assert_allclose(em.v_info_score(truth, predicted)[2], v_info, atol=5e-5)
    # Pixels outside the true cells do not count, whatever is predicted there.
    outside = np.zeros((3, 8), int)
    truth = np.concatenate([truth, outside])
    predicted = np.concatenate([predicted, outside + 7])
    np.testing.assert_allclose(em.v_rand_score(truth, predicted), v_rand, atol=5e-5)
    np.testing.assert_allclose(em.v_info_score(truth, predicted)[2], v_info, atol=5e-5)


def test_maps_of_one_cell_have_no_information():
    one, two = np.ones((1, 8), int), ROW
    assert em.v_info_score(one, two) == (0, 1, 0)
    assert em.v_info_score(two, one) == (1, 0, 0)
    assert em.v_info_score(one, one) == (0, 1, 0)


def test_an_all_border_prediction_is_a_cell_a_pixel():
    precision, recall, _ = em.v_rand_score(ROW, np.zeros_like(ROW))
    assert precision == 1
    np.testing.assert_allclose(recall, (1 / 8) / (2 * 0.25))
    # I = ln 2 is all that the truth has; the prediction has ln 8.
    scores = em.v_info_score(ROW, np.zeros_like(ROW))
    np.testing.assert_allclose(scores, (1, 1 / 3, 0.5), rtol=1e-12)


def _slow_v_scores(truth, predicted):
    """From the definitions, with each border pixel turned into a cell of its own."""
    scored = truth > 0
    a, b = truth[scored], predicted[scored].copy()
    b[b == 0] = b.max() + 1 + np.arange((b == 0).sum())
    num = len(a)

    def squares(names):
        return sum((names.count(name) / num) ** 2 for name in set(names))

    def entropy(names):
        shares = [names.count(name) / num for name in set(names)]
        return -sum(share * math.log(share) for share in shares)

    a, b, both = a.tolist(), b.tolist(), list(zip(a.tolist(), b.tolist(), strict=True))
    shared = entropy(a) + entropy(b) - entropy(both)
    return (
        (squares(both) / squares(b), squares(both) / squares(a)),
        (shared / entropy(a), shared / entropy(b)),
    )


def test_v_scores_equal_their_definition():
    rng = np.random.default_rng(0)
    for _ in range(5):
        truth, predicted = rng.integers(0, 4, (2, 9, 10))
        v_rand, v_info = _slow_v_scores(truth, predicted)
        np.testing.assert_allclose(em.v_rand_score(truth, predicted)[:2], v_rand)
        np.testing.assert_allclose(em.v_info_score(truth, predicted)[:2], v_info)


def _slow_thin(inside):
    """One pixel after another, in rounds, even ones first."""
    cells = ndimage.label(inside)[0]
    height, width = cells.shape
    line = np.zeros_like(inside)

    def beside(y, x):
        return {
            int(cells[v, u])
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
            if 0 <= v < height and 0 <= u < width and cells[v, u]
        }

    while True:
        open_pixels = np.argwhere((cells == 0) & ~line).tolist()
        front = [(y, x) for y, x in open_pixels if beside(y, x)]
        if not front:
            return cells
        for y, x in sorted(front, key=lambda at: (at[0] + at[1]) % 2):
            found = beside(y, x)
            if len(found) == 1:
                cells[y, x] = found.pop()
            else:
                line[y, x] = True


def _blobs(seed, size=(24, 30), sigma=1.5):
    noise = np.random.default_rng(seed).normal(size=size)
    return ndimage.gaussian_filter(noise, sigma)


def test_thinning_equals_its_slow_twin():
    for seed in range(4):
        for level in (-0.1, 0.0, 0.15):
            inside = _blobs(seed) > level
            np.testing.assert_array_equal(em.thin_borders(inside), _slow_thin(inside))


def test_thinned_borders_are_lines_between_the_same_cells():
    inside = _blobs(9, (60, 70), 2) > 0.05
    cells, num = ndimage.label(inside)
    thinned = em.thin_borders(inside)
    np.testing.assert_array_equal(thinned[inside], cells[inside])
    assert num > 5
    for k in range(1, num + 1):
        assert ndimage.label(thinned == k)[1] == 1
    for one, other in ((thinned[1:], thinned[:-1]), (thinned[:, 1:], thinned[:, :-1])):
        assert ((one == other) | (one == 0) | (other == 0)).all()
    padded = np.pad(thinned, 1)
    for y, x in np.argwhere(thinned == 0):
        cross = padded[[y, y + 2, y + 1, y + 1], [x + 1, x + 1, x, x + 2]]
        # No line is thicker than it must be; where four meet, they may lock in a pixel.
        assert len(set(cross.tolist()) - {0}) >= 2 or not cross.any()


def test_thick_borders_cost_nothing_and_stray_membranes_vanish():
    inside = np.ones((9, 21), bool)
    inside[:, 8:13] = False
    inside[2:5, 2:5] = False
    expected = np.ones((9, 21), int)
    expected[:, 11:] = 2
    expected[:, 10] = 0
    np.testing.assert_array_equal(em.thin_borders(inside), expected)
    assert not em.thin_borders(np.zeros((4, 5), bool)).any()
    assert (em.thin_borders(np.ones((4, 5), bool)) == 1).all()


def test_a_diagonal_contact_is_two_cells():
    inside = np.array([[1, 0], [0, 1]], bool)
    assert (em.thin_borders(inside) == [[1, 0], [0, 2]]).all()
    scores = em.scores([inside.astype(np.uint8)], [inside.astype(np.float32)])
    assert scores["v_rand"] == scores["v_info"] == 1


def _topological_numbers(code):
    """Components around a pixel that touch it: 4-connected ones of 1s, 8-connected ones of 0s."""
    patch = np.zeros((3, 3), int)
    for k, (dy, dx) in enumerate(em._RING):
        patch[1 + dy, 1 + dx] = code >> k & 1
    cells = ndimage.label(patch)[0]
    edges = {int(cells[at]) for at in ((0, 1), (1, 0), (1, 2), (2, 1))} - {0}
    background = 1 - patch
    background[1, 1] = 0
    return len(edges), ndimage.label(background, np.ones((3, 3)))[1]


def test_simple_points_are_those_with_topological_numbers_of_one():
    table = em.simple_points()
    assert [bool(table[code]) for code in range(256)] == [
        _topological_numbers(code) == (1, 1) for code in range(256)
    ]


def _slow_warp(truth, probability, threshold):
    state, inside = np.pad(truth, 1).copy(), np.pad(probability > threshold, 1)
    while True:
        wrong = [tuple(at) for at in np.argwhere((state != inside).T)[:, ::-1].tolist()]
        confidence = {
            (y, x): np.float32(abs(float(probability[y - 1, x - 1]) - threshold)) for y, x in wrong
        }
        flipped = False
        for y, x in sorted(wrong, key=lambda at: -confidence[at]):
            code = sum(int(state[y + dy, x + dx]) << k for k, (dy, dx) in enumerate(em._RING))
            if _topological_numbers(code) == (1, 1):
                state[y, x] ^= True
                flipped = True
        if not flipped:
            return state[1:-1, 1:-1]


def _count_membranes(cells):
    """8-connected pieces of what is not cell; outside the image is membrane."""
    return ndimage.label(np.pad(~cells, 1, constant_values=True), np.ones((3, 3)))[1]


def test_warping_equals_its_slow_twin_and_keeps_the_topology():
    for seed in range(3):
        truth = _blobs(seed) > 0.05
        probability = 1 / (1 + np.exp(-10 * (_blobs(seed) + 0.5 * _blobs(seed + 50))))
        probability = np.round(probability, 1)  # so that many are equal
        for threshold in (0.3, 0.5):
            warped = em.warp(truth, probability, threshold)
            np.testing.assert_array_equal(warped, _slow_warp(truth, probability, threshold))
            assert ndimage.label(warped)[1] == ndimage.label(truth)[1]
            assert _count_membranes(warped) == _count_membranes(truth)
            assert (warped != (probability > threshold)).sum() < (truth != warped).sum()


def _two_cells():
    truth = np.zeros((11, 17), bool)
    truth[1:10, 1:8] = truth[1:10, 9:16] = True
    return truth


def _edited(*edits):
    inside = _two_cells()
    for where, value in edits:
        inside[where] = value
    return inside


TOPOLOGY = {
    "equal": (_edited(), {}),
    # The border moves: wrong pixels, but the same cells.
    "moved": (_edited(((slice(1, 10), 8), True), ((slice(1, 10), 9), False)), {}),
    # All nine pixels of the border join the two cells, and none could go without the others.
    "merged": (_edited(((slice(1, 10), 8), True)), {"merge": 9}),
    # A false border is eaten from both of its ends; the last pixel would split the cell.
    "split": (_edited(((5, slice(1, 8)), False)), {"split": 1}),
    "hole": (_edited(((slice(4, 7), slice(3, 6)), False)), {"hole_addition": 9}),
    "lost": (_edited(((slice(1, 10), slice(1, 8)), False)), {"object_deletion": 1}),
    "nothing": (_edited((slice(None), False)), {"object_deletion": 2}),
}


@pytest.mark.parametrize("case", TOPOLOGY)
def test_topological_errors(case):
    inside, expected = TOPOLOGY[case]
    probability = np.where(inside, 0.9, 0.1)
    warped = em.warp(_two_cells(), probability, 0.5)
    counts = em.classify_mismatches(warped, inside)
    assert {kind: count for kind, count in counts.items() if count} == expected
    row = em.sweep([_two_cells().astype(np.uint8)], [probability])
    errors = counts["split"] + counts["merge"]
    assert row["warping_error"][5] == errors / inside.size
    assert row["warping_error_classic"][5] == sum(counts.values()) / inside.size


def test_errors_that_only_the_prediction_has():
    truth = np.zeros((9, 9), bool)
    inside = truth.copy()
    inside[4, 4] = True
    assert em.classify_mismatches(em.warp(truth, inside * 1.0, 0.5), inside)["object_addition"] == 1
    truth = np.ones((9, 9), bool)
    truth[4, 4] = False
    inside = np.ones((9, 9), bool)
    assert em.classify_mismatches(em.warp(truth, inside * 1.0, 0.5), inside)["hole_deletion"] == 1


def test_a_split_is_seen_within_the_radius():
    # A ring of cell, cut once: whole when one looks far enough, in two pieces nearby.
    warped = np.zeros((31, 31), bool)
    warped[2:29, 2:29] = True
    warped[3:28, 3:28] = False
    inside = warped.copy()
    inside[2, 15] = False
    assert em.classify_mismatches(warped, inside, radius=5)["split"] == 1
    assert em.classify_mismatches(warped, inside, radius=30)["hole_deletion"] == 1


def test_scores_of_a_perfect_and_of_a_useless_prediction():
    truth = _two_cells().astype(np.uint8)
    perfect = em.scores([truth], [truth.astype(np.float32)])
    for name, value in perfect.items():
        assert value == (1 if name.startswith("v_") else 0), name
    blank = em.scores([truth], [np.full(truth.shape, 0.5)])
    share = truth.mean()
    np.testing.assert_allclose(blank["pixel_error"], 1 - 2 * share / (1 + share))
    np.testing.assert_allclose(blank["pixel_error_plain"], 1 - share)
    np.testing.assert_allclose(blank["pixel_error_squared"], 0.25)
    np.testing.assert_allclose(blank["rand_error"], 1 / 3)  # two equal cells, merged
    np.testing.assert_allclose(blank["v_rand"], 2 / 3)
    np.testing.assert_allclose(blank["warping_error"], 0)  # above 0.5 nothing is merged
    np.testing.assert_allclose(blank["warping_error_classic"], 2 / truth.size)


def test_thresholds_are_exclusive():
    truth = _two_cells().astype(np.uint8)
    swept = em.sweep([truth], [truth * 0.5])
    assert (swept["pixel_f"][:5] == 1).all()
    assert (swept["pixel_f"][5:] == 0).all()
    assert len(em.THRESHOLDS) == len(swept["v_rand"]) == 11


def test_stacks_add_counts_and_average_v_scores():
    first, second = _two_cells().astype(np.uint8), np.ones((11, 17), np.uint8)
    second[:, 3] = 0
    merged = np.ones((11, 17))
    pairs = [(first, merged), (second, second * 1.0)]
    stack = em.sweep(*zip(*pairs, strict=True))
    single = [em.sweep([label], [probability]) for label, probability in pairs]
    np.testing.assert_allclose(
        stack["v_rand"][5], np.mean([slice_scores["v_rand"][5] for slice_scores in single])
    )
    counts = np.sum(
        [
            em.rand_counts(*(ndimage.label(m)[0] for m in (label, probability > 0.5)))
            for label, probability in pairs
        ],
        axis=0,
    )
    np.testing.assert_allclose(stack["rand_f"][5], 2 * counts[0] / (counts[1] + counts[2]))
    hits, true, predicted = first.sum() + second.sum(), first.sum() + second.sum(), 187 + 176
    np.testing.assert_allclose(stack["pixel_f"][5], 2 * hits / (true + predicted))


def test_a_slice_of_membrane_only_is_left_out():
    truth, empty = _two_cells().astype(np.uint8), np.zeros((11, 17), np.uint8)
    assert em.scores([truth, empty], [truth * 1.0, empty * 1.0])["v_rand"] == 1
    assert np.isnan(em.scores([empty], [empty * 1.0])["v_info"])


def test_wrong_input_is_refused():
    truth = np.zeros((4, 5), np.uint8)
    for labels, probabilities, message in (
        ([truth], [np.zeros((5, 4))], "not \\[H, W\\]"),
        ([truth + 255], [truth * 1.0], "0 or 1"),
        ([truth], [truth + 1.5], "softmax"),
        ([truth], [], "zip"),
    ):
        with pytest.raises(ValueError, match=message):
            em.scores(labels, probabilities)


def test_real_membranes(data_root):
    """A smoothed slice, thresholded, is a poor but honest prediction."""
    folder = data_root / "em_membrane"
    image = np.asarray(Image.open(folder / "images/00.png"))[:256, :256].astype(float)
    label = (np.asarray(Image.open(folder / "labels/00.png"))[:256, :256] > 0).astype(np.uint8)
    probability = 1 / (1 + np.exp((115 - ndimage.gaussian_filter(image, 2)) / 12))
    scores = em.scores([label], [probability])
    assert 0.05 < scores["pixel_error"] < 0.2
    assert 0.5 < scores["v_rand"] < 1
    assert 0 < scores["warping_error"] < scores["warping_error_classic"] < 0.1
