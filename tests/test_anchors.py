"""Anchors: published lists and counts, and a twin that places each one by loops."""

import math

import numpy as np
import pytest

from dense_jax.errors import UserError
from dense_jax.ops import anchors, boxes

RATIOS = (0.5, 1.0, 2.0)
C4 = (32, 64, 128, 256, 512)
P2_TO_P6 = ((200, 336), (100, 168), (50, 84), (25, 42), (13, 21))  # of 800 x 1344 pixels


def test_nine_anchors_of_py_faster_rcnn_and_twelve_with_a_smaller_scale():
    nine = [
        (-84, -40, 99, 55),
        (-176, -88, 191, 103),
        (-360, -184, 375, 199),
        (-56, -56, 71, 71),
        (-120, -120, 135, 135),
        (-248, -248, 263, 263),
        (-36, -80, 51, 95),
        (-80, -168, 95, 183),
        (-168, -344, 183, 359),
    ]
    got = anchors.base_anchors((128, 256, 512), RATIOS, "caffe", stride=16)
    np.testing.assert_array_equal(got, nine)
    got = anchors.base_anchors((64, 128, 256, 512), RATIOS, "caffe", stride=16)
    fourth = [(-38, -16, 53, 31), (-24, -24, 39, 39), (-14, -36, 29, 51)]
    np.testing.assert_array_equal(got[::4], fourth)
    np.testing.assert_array_equal(np.delete(got, [0, 4, 8], 0), nine)
    # Detectron's pyramid: 48 x 24, 32 x 32 and 24 x 48 pixels on stride 4.
    got = anchors.base_anchors((32,), RATIOS, "caffe", stride=4)
    np.testing.assert_array_equal(boxes.sides(got, plus_one=True), [[48, 24], [32, 32], [24, 48]])
    np.testing.assert_array_equal(got[:, :2] + got[:, 2:], np.full((3, 2), 3))


def test_rounding_of_torchvision_and_detectron2_and_one_order():
    got = anchors.base_anchors((512,))
    np.testing.assert_array_equal(
        got, [(-362, -181, 362, 181), (-256, -256, 256, 256), (-181, -362, 181, 362)]
    )
    np.testing.assert_array_equal(
        anchors.base_anchors((32,)), [(-23, -11, 23, 11), (-16, -16, 16, 16), (-11, -23, 11, 23)]
    )
    # 5 / 2 and 7 / 2 are rounded to even numbers.
    np.testing.assert_array_equal(anchors.base_anchors((5, 7), (1.0,))[:, 2], [2, 4])
    theirs = anchors.base_anchors((32,), convention="detectron2")
    root = 16 / math.sqrt(0.5)
    np.testing.assert_allclose(theirs[0], [-root, -root / 2, root, root / 2], rtol=1e-6)
    assert theirs.dtype == np.float32

    def sizes_and_ratios(convention):
        base = anchors.base_anchors((64, 256), RATIOS, convention, stride=16)
        w, h = boxes.sides(base, plus_one=convention == "caffe").T
        return [
            (2.0 ** round(math.log2(a)), 2.0 ** round(math.log2(r)))
            for a, r in zip(np.sqrt(w * h), h / w, strict=True)
        ]

    ratio_outer = [(s, r) for r in RATIOS for s in (64, 256)]
    for convention in ("torchvision", "caffe", "detectron2"):
        assert sizes_and_ratios(convention) == ratio_outer


def test_locations_are_in_rows():
    base = anchors.base_anchors((32, 64), RATIOS)
    expected = [
        anchor + np.array([x * 8, y * 16, x * 8, y * 16])
        for y in range(3)
        for x in range(4)
        for anchor in base
    ]
    np.testing.assert_array_equal(anchors.on_grid(base, (3, 4), (16, 8)), expected)
    np.testing.assert_array_equal(
        anchors.on_grid(base, (3, 4), 16), anchors.on_grid(base, (3, 4), (16, 16))
    )


def test_counts_of_a_padded_image_of_800_by_1344():
    levels = anchors.pyramid(P2_TO_P6, (4, 8, 16, 32, 64))
    assert [len(level) for level in levels] == [201600, 50400, 12600, 3150, 819]
    assert sum(map(len, levels)) == 268569
    for level, stride in zip(levels, (4, 8, 16, 32, 64), strict=True):
        centre = (level[:, :2] + level[:, 2:]) / 2
        np.testing.assert_array_equal(centre % stride, 0 * centre)
        side = np.sqrt(boxes.area(level))
        np.testing.assert_allclose(side, np.full_like(side, 8 * stride), rtol=0.01)
    (only,) = anchors.pyramid([(50, 84)], [16], sizes=[C4])
    assert len(only) == 63000


def test_torchvision_divides_the_padded_size():
    strides = anchors.torchvision_strides((800, 1344), P2_TO_P6)
    assert strides == ((4, 4), (8, 8), (16, 16), (32, 32), (61, 64))
    assert anchors.torchvision_strides((288, 352), [(5, 6)]) == ((57, 58),)
    level = anchors.pyramid(P2_TO_P6, strides)[-1].reshape(13, 21, 3, 4)
    np.testing.assert_array_equal(level[2, 3] - level[0, 0], np.tile([192, 122, 192, 122], (3, 1)))


@pytest.mark.parametrize(("grid", "num"), [((38, 63), 21546), ((37, 62), 20646)])
def test_anchors_inside_an_image_of_1000_by_600(grid, num):
    (some,) = anchors.pyramid([grid], [16], sizes=[(128, 256, 512)], convention="caffe")
    assert len(some) == num
    assert boxes.inside(some, (600, 1000), plus_one=True).sum() == 8151


def test_mistakes_are_told():
    with pytest.raises(UserError, match="'yolo' are unknown: use one of"):
        anchors.base_anchors((32,), convention="yolo")  # pyrefly: ignore
    with pytest.raises(UserError, match="pass its stride"):
        anchors.base_anchors((32,), convention="caffe")
    with pytest.raises(UserError, match=r"of \(1, 1, 5\) levels"):
        anchors.pyramid([(2, 2)], [4])
