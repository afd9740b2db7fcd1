import numpy as np
import pytest

from dense_jax.data import rle


def slow_runs(mask):
    """Run lengths pixel by pixel, the first run of zeros."""
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            runs.append(0)
            value = not value
        runs[-1] += 1
    return runs


def slow_text(runs):
    """Runs as in maskApi.c: five bits a character, from the fourth run differences."""
    text = ""
    for i, run in enumerate(runs):
        number = run - (runs[i - 2] if i > 2 else 0)
        while True:
            digit, number = number & 31, number >> 5
            is_last = number == (-1 if digit & 16 else 0)
            text += chr(48 + digit + (0 if is_last else 32))
            if is_last:
                break
    return text


def masks():
    rng = np.random.default_rng(0)
    yield np.zeros((3, 4), bool)
    yield np.ones((3, 4), bool)  # the first run is empty
    yield np.arange(300 * 40).reshape(300, 40) % 9000 > 4000  # runs of more than one character
    for height, width in rng.integers(1, 30, (30, 2)):
        yield rng.random((height, width)) < rng.random()


@pytest.mark.parametrize("form", ["text", "bytes", "numbers"])
def test_a_mask_goes_to_runs_and_back(form):
    for mask in masks():
        runs = slow_runs(mask)
        encoded = rle.encode(mask)
        assert encoded == {"size": list(mask.shape), "counts": slow_text(runs)}
        counts = {"text": slow_text(runs), "bytes": slow_text(runs).encode(), "numbers": runs}
        given = {"size": mask.shape, "counts": counts[form]}
        decoded = rle.decode(given)
        assert decoded.dtype == bool
        np.testing.assert_array_equal(decoded, mask)
        assert rle.area(given) == mask.sum()
        assert rle.union([given]) == rle.from_segmentation(given, *mask.shape) == encoded


def test_the_box_of_a_mask_is_tight():
    mask = np.zeros((6, 9), bool)
    np.testing.assert_array_equal(rle.to_box(rle.encode(mask)), np.zeros(4, np.float32))
    mask[1, 3] = mask[4, 7] = True
    box = rle.to_box(rle.encode(mask))
    assert box.dtype == np.float32
    np.testing.assert_array_equal(box, [3, 1, 8, 5])


def test_parts_are_joined():
    rng = np.random.default_rng(1)
    parts = rng.random((3, 7, 5)) < 0.3
    joined = rle.decode(rle.union([rle.encode(part) for part in parts]))
    np.testing.assert_array_equal(joined, parts.any(axis=0))
    with pytest.raises(ValueError, match="mismatched"):
        rle.union([rle.encode(np.ones((2, 3), bool)), rle.encode(np.ones((3, 2), bool))])


# Worked by hand from rleFrPoly: edges of whole pixels give the pixels between them.
def test_polygons_of_whole_pixels_are_filled():
    square = [1, 2, 4, 2, 4, 5, 1, 5]
    expected = np.zeros((6, 8), bool)
    expected[2:5, 1:4] = True
    np.testing.assert_array_equal(rle.decode(rle.from_polygons([square], 6, 8)), expected)
    other = [3, 0, 8, 0, 8, 3, 3, 3]  # overlaps in one pixel: parts are joined
    expected[0:3, 3:8] = True
    both = rle.from_polygons([square, other], 6, 8)
    np.testing.assert_array_equal(rle.decode(both), expected)
    assert rle.area(both) == 9 + 15 - 1
    assert rle.from_segmentation([square, other], 6, 8) == both


def test_polygons_are_cut_at_the_image():
    around = [-10, -10, 50, -10, 50, 50, -10, 50]
    assert rle.area(rle.from_polygons([around], 6, 8)) == 48
    assert rle.area(rle.from_polygons([[-9, -9, -3, -9, -3, -3]], 6, 8)) == 0
    assert rle.area(rle.from_polygons([[90, 1, 99, 1, 99, 3]], 6, 8)) == 0
    assert rle.from_polygons([], 6, 8) == rle.encode(np.zeros((6, 8), bool))


def test_polygons_are_those_of_the_reference():
    theirs = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    rng = np.random.default_rng(2)
    for _ in range(300):
        height, width = (int(side) for side in rng.integers(1, 40, 2))
        polygons = [
            rng.uniform(-10, 50, 2 * rng.integers(3, 9)).round(rng.integers(0, 3)).tolist()
            for _ in range(rng.integers(1, 4))
        ]
        expected = theirs.merge(theirs.frPyObjects(polygons, height, width))
        mask = rle.from_polygons(polygons, height, width)
        assert mask["counts"] == expected["counts"].decode()
        x, y, w, h = theirs.toBbox(expected)
        np.testing.assert_array_equal(rle.to_box(mask), [x, y, x + w, y + h])
        assert rle.area(mask) == theirs.area(expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rle.decode({"size": [4, 5], "counts": [0, 1, 40]}), "exceed"),
        (lambda: rle.area({"size": [4, 5], "counts": "é"}), "invalid RLE"),
        (lambda: rle.from_polygons([[0, 0, 3, 3]], 4, 5), "three corners"),
        (lambda: rle.from_polygons([[0, 0, 3, 0, 3, 3, 1]], 4, 5), "three corners"),
        (lambda: rle.from_polygons([[0, 0, 3, 0, 3, np.nan]], 4, 5), "finite"),
        (
            lambda: rle.from_segmentation({"size": [4, 5], "counts": [20]}, 5, 4),
            r"\[4, 5\] is not of the image \[5, 4\]",
        ),
    ],
)
def test_damaged_masks_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
