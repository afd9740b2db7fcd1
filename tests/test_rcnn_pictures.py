"""Pictures of what happens inside a detector."""

import numpy as np

from dense_jax.infer import rcnn_pictures as pictures

IMAGE = np.full((40, 48, 3), 200, np.uint8)  # drawn ten times as large, on grey of 124
GROUND = (124, 124, 124)


def at(picture, y, x):
    return tuple(picture[y, x].tolist())


def test_the_best_proposals_are_on_top_in_colours_of_their_scores():
    boxes = np.array([[2, 2, 12, 12], [2, 2, 30, 30]] + [[40, 2, 46, 30]] * 60, np.float32)
    scores = np.array([0.8, 0.4] + [0.1] * 60, np.float32)
    picture = pictures.proposals(IMAGE, boxes, scores)
    assert picture.shape[0] > 400
    assert at(picture, 20, 50) == (252, 255, 164)  # the best is brightest, and hides the second
    assert at(picture, 20, 250) == (188, 55, 84)  # half as good, halfway between the colours
    assert at(picture, 22, 250) == at(picture, 21, 402) == GROUND  # lines of 2 pixels, and of 1
    assert at(picture, 70, 70) == GROUND
    # Behind the first 50 are twelve faint ones, at the same place and hidden.
    few = pictures.proposals(IMAGE, boxes[:50], scores[:50])
    np.testing.assert_array_equal(picture[:400, :480], few[:400, :480])
    others = pictures.proposals(IMAGE, np.roll(boxes, -2, axis=0), np.full(62, 0.5))
    y, x = 20, 250
    assert GROUND < at(others, y, x) < (148, 163, 184)


def test_no_proposals_are_a_picture_too():
    picture = pictures.proposals(IMAGE, np.zeros((0, 4)), np.zeros(0))
    assert at(picture, 200, 200) == GROUND


def test_anchors_forced_ones_and_lost_objects_have_colours_of_their_own():
    objects = np.array([[4, 4, 14, 14], [20, 4, 30, 14], [20, 20, 30, 30]], np.float32)
    boxes = np.array([[5, 5, 13, 13], [22, 6, 36, 16]], np.float32)
    drawn = pictures.anchors(
        IMAGE, objects, boxes, np.array([0, 1]), np.array([False, True]), limit=0.7
    )
    assert at(drawn, 40, 90) == at(drawn, 40, 250) == pictures.OBJECT
    assert at(drawn, 200, 250) == pictures.WITHOUT
    assert at(drawn, 50, 90) == pictures.ANCHOR
    assert at(drawn, 60, 290) == at(drawn, 100, 359) == pictures.FORCED
    assert at(drawn, 90, 90) == GROUND


def test_large_images_and_those_of_one_pixel_are_drawn():
    large = pictures.proposals(np.zeros((20, 900, 3), np.uint8), np.ones((1, 4)), np.ones(1))
    assert large.shape[1] >= 900
    assert at(large, 10, 500) == (24, 24, 24)
    one = pictures.anchors(
        np.zeros((1, 1, 3), np.uint8), *(np.zeros((0, 4)),) * 2, *(np.zeros(0, bool),) * 2, 0.7
    )
    assert one.shape[0] > 480
