"""Polygons of objects: drawn in boxes as by pycocotools, moved with images, read from files."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.data import rle, transforms
from dense_jax.data.datasets import coco
from dense_jax.data.detection import PadObjects, ReadObjects
from dense_jax.data.normalise import Normalise
from dense_jax.data.objects import Objects
from dense_jax.data.polygons import Polygons
from dense_jax.errors import UserError
from dense_jax.objectives.masks import MaskRule, mask_targets
from dense_jax.ops.polygons import crop_polygons
from tests.test_data_coco import CONTENT, opened
from tests.test_mask_rcnn import config, data, task

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # pycocotools

SQUARE, OTHER = [2, 2, 8, 2, 8, 8, 2, 8], [6, 6, 10, 6, 10, 10, 6, 10]


def crop(shapes, boxes, index, bins, slots=64):
    corners, parts = Polygons.from_json(shapes).slots(slots)
    arrays: Any = corners, parts, np.asarray(boxes, np.float32), np.asarray(index, np.int32)
    return jax.jit(lambda *x: crop_polygons(*x, bins=bins))(*arrays)


def slow_crop(parts, box, bins):
    """detectron2's rule: polygons in the box, scaled to its bins, drawn by pycocotools."""
    tools = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    box = np.asarray(box, float)
    scale = bins / np.maximum(box[2:] - box[:2], 0.1)
    moved = [((np.reshape(part, (-1, 2)) - box[:2]) * scale).ravel().tolist() for part in parts]
    return tools.decode(tools.merge(tools.frPyObjects(moved, bins, bins)))


@pytest.mark.parametrize("bins", [14, 28])
def test_bins_are_those_of_pycocotools(bins):
    """Of random stars of one to four parts, which cross themselves and leave their boxes.

    Sides of boxes are bins times a power of two, and corners are 64ths of a pixel: no rounding.
    """
    rng = np.random.default_rng(bins)
    shapes = [
        [(rng.integers(-640, 4000, 2 * rng.integers(3, 13)) / 64).tolist()
         for _ in range(rng.integers(1, 5))] for _ in range(60)
    ]  # fmt: skip
    corner = rng.integers(-10, 30, (60, 2))
    boxes = np.concatenate([corner, corner + bins * 2.0 ** rng.integers(-3, 2, (60, 2))], axis=1)
    found = crop(shapes, boxes, np.arange(60), bins)
    expected = [slow_crop(parts, box, bins) for parts, box in zip(shapes, boxes, strict=True)]
    np.testing.assert_array_equal(found, expected)
    assert 0.2 < np.mean(found) < 0.8


def test_bins_of_any_box_are_nearly_those_of_pycocotools():
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    rim = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    shapes = [[(50 + r[:, None] * rim).ravel().tolist()] for r in rng.uniform(5, 45, (30, 40))]
    boxes = np.array([5, 5, 95, 95]) + rng.uniform(-20, 20, (30, 4))
    found = crop(shapes, boxes, np.arange(30), 28)
    expected = [slow_crop(parts, box, 28) for parts, box in zip(shapes, boxes, strict=True)]
    assert np.mean(np.asarray(found) != np.array(expected)) < 1e-4


def test_bins_by_hand():
    """A bin is in an object if its centre is; here, no centre is on an outline."""
    inside = np.arange(10) >= 2
    square = np.outer(inside & (np.arange(10) < 8), inside & (np.arange(10) < 8))
    box = [0, 0, 10, 10]
    np.testing.assert_array_equal(crop([[SQUARE]], [box], [0], 10)[0], square)
    both = square.copy()
    both[6:, 6:] = True  # parts are united, not crossed out
    np.testing.assert_array_equal(crop([[SQUARE, OTHER]], [box], [0], 10)[0], both)
    ring = [0, 0, 10, 0, 10, 10, 0, 10, 0, 0, 2, 2, 2, 8, 8, 8, 8, 2, 2, 2]
    np.testing.assert_array_equal(crop([[ring]], [box], [0], 10)[0], ~square)
    # Rows of two, four, ... bins: the slope passes centres a tenth of a bin to their right.
    stairs = crop([[[-0.4, 0, 9.6, 10, -0.4, 10]]], [box], [0], 10)[0]
    np.testing.assert_array_equal(stairs, np.tril(np.ones((10, 10))) - np.eye(10))
    outside = crop([[[0, 0, 40, 0, 40, 40, 0, 40]]], [[-14, -14, 14, 14]], [0], 28)
    assert outside.sum() == 14**2


def test_padding_has_no_effect_and_no_polygon_draws_nothing():
    shapes, boxes, index = [[SQUARE], [SQUARE, OTHER]], [[1, 1, 11, 9], [0, 3, 8, 9]], [1, 0]
    few, many = (crop(shapes, boxes, index, 14, slots) for slots in (10, 50))
    np.testing.assert_array_equal(few, many)
    more = crop([*shapes, [np.full(20, 3.0)]], [*boxes, boxes[0]], [*index, 2], 14)
    np.testing.assert_array_equal(more[:2], few)
    assert not crop([[]], [[0, 0, 9, 9]], [0], 14).any()
    assert crop([[SQUARE]], [[5, 5, 5, 5]], [0], 14).all()  # an empty box counts as 0.1 wide
    with pytest.raises(ValueError, match="32 bins"):
        crop(shapes, boxes, index, 32)


def test_each_box_has_the_polygons_of_its_own_object_in_its_own_image():
    slots = [Polygons.from_json(own).slots(8) for own in ([[SQUARE], [OTHER]], [[OTHER], []])]
    corners, parts = (jnp.stack(arrays) for arrays in zip(*slots, strict=True))
    objects = {"corners": corners, "parts": parts}
    boxes, index = jnp.tile(jnp.array([2.0, 2, 10, 10]), (2, 2, 1)), jnp.array([[1, 0], [0, 1]])
    args = boxes, index, jnp.full((2, 2), 20), 8, MaskRule("polygon")
    found = mask_targets(objects, *args)
    assert found.sum((2, 3)).tolist() == [[16, 36], [16, 0]]
    bitmaps = jnp.zeros((2, 2, 20, 20), bool).at[:, :, 6:10, 6:10].set(True)
    np.testing.assert_array_equal(mask_targets({"masks": bitmaps}, *args)[0, 0], found[0, 0])


def objects() -> Any:
    """Two rectangles and a triangle on 16 x 20 pixels, as polygons and masks."""
    shapes = [[SQUARE], [[12, 1, 17, 1, 17, 9, 12, 9], [1, 9, 3, 9, 3, 15, 1, 15]],
              [[4, 3, 9, 13, 4, 13]]]  # fmt: skip
    masks = [rle.from_polygons(parts, 16, 20) for parts in shapes]
    boxes = np.array([rle.to_box(mask) for mask in masks])
    numbers, areas = np.arange(3), np.array([rle.area(mask) for mask in masks], np.float32)
    crowd = np.zeros(3, bool)
    polygons = Polygons.from_json(shapes)
    return Objects(boxes, numbers.astype(np.int32), numbers, crowd, areas, masks, None, polygons)


def example() -> Any:
    image = np.zeros((16, 20, 3), np.uint8)
    return {"image": image, "label": image[..., 0], "annotations": objects()}


def drawn(polygons, size):
    return [rle.decode(rle.from_polygons([c.ravel().tolist() for c in own], *size))
            for own in polygons.parts]  # fmt: skip


def test_polygons_move_with_images_as_masks_do():
    """Of corners at edges of pixels, whose pixels are the same after a flip; twice the size too."""
    masked, outlined = ReadObjects(masks=True), ReadObjects(masks=True, polygons=True)
    one, other = masked(example()), outlined(example())
    assert one["objects"].polygons is None
    assert other["objects"].masks is None
    steps = transforms.RandomFlip(1.0), transforms.Resize((32, 40)), Normalise("torchvision")
    for step in steps:
        one, other = (step(x, np.random.default_rng(0)) for x in (one, other))
    one, other = (transforms.window(x, 3, -2, (24, 30))["objects"] for x in (one, other))
    assert one.ids.tolist() == other.ids.tolist() == [0, 1, 2]
    found = drawn(other.polygons, (24, 30))
    np.testing.assert_array_equal(found[:2], one.masks[:2])
    assert np.mean(found[2] != one.masks[2]) < 0.05
    assert other.select(np.array([False, True, True])).polygons.parts[0] == other.polygons.parts[1]


def test_polygons_survive_their_text_form():
    given = objects()
    found = Objects.from_json(given.to_json())
    assert found.polygons is not None
    assert found.polygons.to_json() == given.polygons.to_json()
    none = given.select(np.zeros(3, bool))
    text = none.to_json()
    assert Objects.from_json(text).polygons == Polygons([])


def test_slots_of_polygons():
    """Parts are closed; of too many corners, those next to another one are left out."""
    corners, parts = Polygons.from_json([[SQUARE, OTHER[:6]], []]).slots(12)
    assert parts.tolist() == [[0] * 5 + [1] * 4 + [-1] * 3, [-1] * 12]
    np.testing.assert_array_equal(corners[0, :5].ravel(), [*SQUARE, *SQUARE[:2]])
    near = [2, 2, 2.1, 2, 8, 2, 8, 2.2, 8, 8, 2, 8]
    thinned, parts = Polygons.from_json([[near]]).slots(5)
    assert parts.tolist() == [[0] * 5]
    np.testing.assert_array_equal(thinned[0], [[2, 2], [8, 2], [8, 8], [2, 8], [2, 2]])
    _, parts = Polygons.from_json([[SQUARE] * 9]).slots(8)
    assert parts.tolist() == [[0] * 5 + [-1] * 3]
    slots = PadObjects(5)(ReadObjects(masks=True, polygons=True)(example()))["objects"]
    assert "masks" not in slots
    assert (slots["corners"].shape, slots["parts"].shape) == ((5, 512, 2), (5, 512))


def test_polygons_of_files(tmp_path):
    """Crowds have none; without one, an object has its box; with run lengths, nobody has any."""
    content = copy.deepcopy(CONTENT)
    content["annotations"][1]["segmentation"] = []
    found = opened(tmp_path / "a", content).split("train")[0]["annotations"].polygons
    assert found is not None
    assert found.to_json() == [[[1, 2, 5, 2, 5, 5, 1, 5]], [[2, 3, 3, 3, 3, 4, 2, 4]], []]
    content["annotations"][1]["segmentation"] = {"size": [8, 10], "counts": [19, 1, 60]}
    mixed = opened(tmp_path / "b", content)
    assert mixed.split("train")[0]["annotations"].polygons is None
    notes = coco.find(tmp_path / "b").notes
    assert any("train: 1 objects have run-length codes" in note for note in notes)


def test_recipes_without_polygons_take_bitmaps(capsys):
    own = task(recipe="detectron2")
    own.training_data(data())
    assert "masks train as with --mask-target=bitmap" in capsys.readouterr().out
    with pytest.raises(UserError, match="--mask-target=polygon: not all objects of shapes"):
        task(mask_target="polygon").training_data(data())
    task(recipe="detectron2", mask_target="soft").training_data(data())
    assert not capsys.readouterr().out
    with pytest.raises(UserError, match="--train-masks=cells"):
        config(recipe="detectron2", train_masks="cells")
    config(recipe="detectron2", train_masks="cells", mask_target="bitmap")
