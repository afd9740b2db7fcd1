"""Objects move with their images, fill slots, and come in batches of few shapes."""

from typing import Any

import chex
import numpy as np
import pytest
from PIL import Image

from dense_jax.data import pipeline, transforms
from dense_jax.data.detection import (
    LargeScaleJitter,
    PadObjects,
    ReadObjects,
    ResizeShortSide,
    short_side_size,
)
from dense_jax.data.normalise import Normalise
from dense_jax.data.objects import Objects
from dense_jax.ops import boxes as box_ops

RNG = np.random.default_rng


def example(size=(20, 30), seed=0):
    """Two rectangles and a crowd, as a dataset with annotations gives them."""
    height, width = size
    boxes = np.array([[2, 3, 12, 9], [15, 0, 30, 20], [0, 12, 5, 20]], np.float32)
    masks = np.zeros((3, height, width), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
        mask[y0:y1, x0:x1] = True
    annotations = Objects(
        boxes,
        np.array([1, 2, 1], np.int32),
        np.array([5, 6, 7]),
        np.array([False, False, True]),
        masks.sum((1, 2)).astype(np.float32),
        masks,
    )
    image = RNG(seed).integers(0, 255, (*size, 3), np.uint8)
    return {"image": image, "label": np.zeros(size, np.uint8), "name": "a",
            "annotations": Objects.from_json(annotations.to_json())}  # fmt: skip


def read(masks=True) -> Any:
    return ReadObjects(masks=masks)(example())


def tight(objects: Any):
    return np.array([box_ops.of_mask(mask) for mask in objects.masks])


def test_objects_survive_their_text_form():
    given, found = read()["objects"], example()["annotations"]
    assert found.boxes.dtype == np.float32
    for i in range(3):
        np.testing.assert_array_equal(found.mask(i), given.masks[i])
    assert [len(found), found.crowd.tolist(), found.ids.tolist()] == [
        3,
        [False, False, True],
        [5, 6, 7],
    ]
    empty: Any = Objects.from_json(found.select(np.zeros(3, bool)).to_json())
    assert (empty.boxes.shape, len(empty), len(empty.masks)) == ((0, 4), 0, 0)
    assert empty.decoded((4, 5)).masks.shape == (0, 4, 5)


def test_flipped_boxes_are_those_of_flipped_masks():
    flipped = transforms.RandomFlip(1.0)(read(), RNG(0))
    objects = flipped["objects"]
    np.testing.assert_array_equal(objects.boxes, tight(objects))
    np.testing.assert_array_equal(objects.boxes[0], [18, 3, 28, 9])
    np.testing.assert_array_equal(flipped["image"], example()["image"][:, ::-1])
    twice = transforms.RandomFlip(1.0)(flipped, RNG(0))["objects"]
    np.testing.assert_array_equal(twice.boxes, read()["objects"].boxes)
    without = transforms.RandomFlip(1.0)(read(masks=False), RNG(0))["objects"]
    np.testing.assert_array_equal(without.boxes, objects.boxes)
    assert without.masks is None


def test_resized_boxes_follow_each_axis():
    objects = transforms.Resize((40, 45))(read())["objects"]
    np.testing.assert_allclose(objects.boxes[0], [3, 6, 18, 18])
    np.testing.assert_allclose(objects.areas, read()["objects"].areas * 3)
    np.testing.assert_allclose(tight(objects), objects.boxes, atol=1)
    assert objects.masks.shape == (3, 40, 45)
    assert objects.masks.view(np.uint8).max() == 1  # another byte is no True to XLA


def test_a_window_cuts_objects_and_drops_what_is_left_outside():
    normalised = Normalise("torchvision")(read())
    objects = transforms.window(normalised, 4, 1, (30, 13))["objects"]  # rows 4-33, columns 1-13
    np.testing.assert_array_equal(objects.ids, [5, 7])
    np.testing.assert_array_equal(objects.boxes, [[1, 0, 11, 5], [0, 8, 4, 16]])
    np.testing.assert_array_equal(objects.boxes, tight(objects))
    np.testing.assert_array_equal(objects.areas, [50, 32])
    without = transforms.window(Normalise("torchvision")(read(masks=False)), 4, 1, (30, 13))
    np.testing.assert_array_equal(without["objects"].boxes, objects.boxes)
    np.testing.assert_allclose(without["objects"].areas, objects.areas)
    left = transforms.window(normalised, -3, -5, (26, 40))["objects"]
    np.testing.assert_array_equal(left.boxes, read()["objects"].boxes + np.array([5, 3, 5, 3]))
    np.testing.assert_array_equal(left.boxes, tight(left))


def test_transforms_that_move_no_boxes_refuse_objects():
    for transform in (transforms.RandomRotate90(), transforms.ElasticDeformation()):
        with pytest.raises(ValueError, match="moves no boxes"):
            transform(Normalise("torchvision")(read()), RNG(0))


def test_objects_of_maps_are_read_once():
    label = np.zeros((10, 10), np.uint8)
    numbers = np.zeros((10, 10), np.int32)
    label[2:5, 3:9], numbers[2:5, 3:6], numbers[2:5, 6:9] = 4, 1, 2
    own = {"image": np.zeros((10, 10, 3), np.uint8), "label": label, "instances": numbers}
    found = ReadObjects()(own)
    np.testing.assert_array_equal(found["objects"].boxes, [[3, 2, 6, 5], [6, 2, 9, 5]])
    assert found["objects"].classes.tolist() == [4, 4]
    assert "instances" not in found


@pytest.mark.parametrize(
    ("size", "rounding", "expected"),
    [
        ((480, 640), "nearest", (800, 1067)),
        ((480, 640), "down", (800, 1066)),
        ((375, 1242), "nearest", (402, 1333)),
        ((305, 400), "down", (799, 1049)),  # double precision, as torchvision does it
        ((305, 400), "nearest", (800, 1049)),
        ((1, 5000), "nearest", (1, 1333)),
    ],
)
def test_the_shorter_side_decides(size, rounding, expected):
    assert short_side_size(size, 800, 1333, rounding) == expected


def test_short_sides_are_drawn_and_bounded():
    resize = ResizeShortSide((10, 16), 24)
    sizes = {resize(read(), RNG(i))["image"].shape[:2] for i in range(20)}
    assert sizes == {(10, 15), (16, 24)}
    assert resize.largest((20, 30)) == (16, 24)
    small = ResizeShortSide((10,), 24)(read(), RNG(0))
    np.testing.assert_allclose(small["objects"].boxes, read()["objects"].boxes / 2)
    expected = Image.fromarray(example()["image"]).resize((15, 10), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(small["image"], np.asarray(expected))


def test_large_scale_jitter_ends_in_one_size():
    chain = [LargeScaleJitter((16, 16)), Normalise("torchvision"), transforms.RandomCrop((16, 16))]
    factors = set()
    for seed in range(12):
        rng, moved = RNG(seed), read()
        for transform in chain:
            moved = transform(moved, rng)
        assert moved["image"].shape == (16, 16, 3)
        objects = moved["objects"]
        assert (objects.boxes >= 0).all()
        assert (objects.boxes <= 16).all()
        np.testing.assert_allclose(tight(objects), objects.boxes, atol=1.01)
        factors.add(len(objects))
    assert len(factors) > 1  # small factors keep all objects, large ones do not


def test_slots_hold_the_largest_objects_and_no_crowd():
    padded = PadObjects(4)(read())["objects"]
    np.testing.assert_array_equal(padded["valid"], [True, True, False, False])
    np.testing.assert_array_equal(padded["boxes"][:2], read()["objects"].boxes[:2])
    np.testing.assert_array_equal(padded["classes"], [1, 2, 0, 0])
    assert padded["masks"].shape == (4, 20, 30)
    assert not padded["boxes"][2:].any()
    one = PadObjects(1)(read(masks=False))["objects"]
    np.testing.assert_array_equal(one["boxes"], [[15, 0, 30, 20]])  # the larger of the two
    assert "masks" not in one


class Memory:
    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]

    def __getitem__(self, index):
        return {**example(self.sizes[index], index), "name": str(index)}


SIZES = [(20, 30)] * 6 + [(40, 30)] * 3 + [(64, 96)]
CHAIN = [ReadObjects(masks=True), Normalise("torchvision"), PadObjects(3)]


def batches(count=1, index=0, **options):
    size = options.pop("batch_size", 2)
    return pipeline.train_batches(
        Memory(SIZES),
        CHAIN,
        size // count,
        seed=3,
        shape_of=lambda size: size,
        process_index=index,
        process_count=count,
        **options,
    )


def take(stream, number):
    with_end = [next(stream) for _ in range(number)]
    stream.close()
    return with_end


def test_each_batch_has_one_of_few_shapes():
    found = take(batches(), 40)
    shapes = [batch["images"].shape[1:3] for batch in found]
    assert set(shapes) == {(32, 32), (64, 32), (64, 96)}
    # By the number of their images: 6, 3 and 1 of 10.
    assert [shapes.count(shape) for shape in [(32, 32), (64, 32), (64, 96)]] == [24, 12, 4]
    for batch in found:
        assert batch["objects"]["boxes"].shape == (2, 3, 4)
        assert batch["objects"]["masks"].shape == (2, 3, *batch["images"].shape[1:3])
        for index, size in zip(batch["index"], batch["size"], strict=True):
            assert tuple(size) == SIZES[index]
        for image, (height, width) in zip(batch["images"], batch["size"], strict=True):
            assert not image[height:].any()
            assert not image[:, width:].any()


def test_all_images_come_before_one_comes_again():
    seen = np.concatenate([batch["index"] for batch in take(batches(), 40)])
    counts = np.bincount(seen, minlength=10)
    assert counts.sum() == 80
    assert (counts[:9] == 8).all()
    assert counts[9] == 8


@pytest.mark.slow
@pytest.mark.parametrize("workers", [{"num_threads": 1}, {"num_workers": 2}])
def test_threads_workers_and_positions_do_not_change_a_batch(workers):
    expected = take(batches(), 9)
    stream = batches(**workers)
    stream.set_state({"next_batch": 4})
    chex.assert_trees_all_equal(take(stream, 5), expected[4:])


def test_processes_share_each_batch_in_one_shape():
    """Two processes see batches of one shape at each step, and together all images."""
    first, second = (take(batches(2, i), 40) for i in (0, 1))
    assert [b["images"].shape for b in first] == [b["images"].shape for b in second]
    seen = np.concatenate([b["index"] for b in (*first, *second)])
    np.testing.assert_array_equal(np.bincount(seen), [8] * 10)
