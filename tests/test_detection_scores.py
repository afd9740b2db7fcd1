"""The scores, tables, pictures and files of predicted objects on a split."""

import json
import math
import pickle
from typing import Any

import hotcoco
import numpy as np
import pytest

from dense_jax.data import rle
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.errors import UserError
from dense_jax.evaluation import instances, padding, record, report
from dense_jax.metrics import coco, voc
from dense_jax.metrics.detections import Detections, Truth
from dense_jax.train import processes

CLASSES = ClassTable(["background", "cat", "dog", "bird"])
SIZE = (60, 80)


class Images:
    """Grey images of one size."""

    def __init__(self, number):
        self._number = number

    def __len__(self):
        return self._number

    def __getitem__(self, index):
        return {"image": np.full((*SIZE, 3), 100, np.uint8), "name": f"image {index}"}

    def size(self, index):
        return SIZE


def dataset(number):
    return Dataset("things", CLASSES, {"val": Images(number)}, "0", "grey things")


def mask(box):
    result = np.zeros(SIZE, bool)
    x0, y0, x1, y1 = np.rint(box).astype(int)
    result[y0:y1, x0:x1] = True
    return rle.encode(result)


def random_images(number, *, of_masks=True):
    """Objects of cats and dogs, and detections that are shifted, missing or of another class."""
    rng = np.random.default_rng(0)
    images = {}
    for index in range(number):
        count = rng.integers(1, 5)
        corners = rng.integers(0, 40, (count, 2))
        boxes = np.concatenate([corners, corners + rng.integers(6, 20, (count, 2))], axis=1)
        classes = rng.integers(1, 3, count)
        found = np.clip(boxes + rng.normal(0, 1, (count, 4)), 0, 60).astype(np.float32)
        kept = np.flatnonzero(rng.random(count) < 0.9)
        guesses = np.where(rng.random(count) < 0.2, 3, classes)
        scores = rng.integers(1, 9, len(kept)).astype(np.float32) / 9  # equal ones, too
        masks = [
            [mask(box) for box in these] if of_masks else None for these in (boxes, found[kept])
        ]
        crowd = rng.random(count) < 0.1
        images[index] = (
            Truth.build(boxes, classes, crowd=crowd, area=rng.random(count) * 2000, masks=masks[0]),
            Detections.build(found[kept], guesses[kept], scores, masks[1]),
        )
    return images


def collect(images, order=None):
    evaluator = instances.DetectionEvaluator()
    for index in order if order is not None else images:
        evaluator.add(index, *images[index])
    return evaluator


def compute(evaluator, number, kinds: Any = ("mask", "box"), **options):
    return instances.findings(evaluator, dataset(number), "val", kinds, **options)


def numbers(findings):
    return {score.name: score.value for score in findings.scores}


def same(one, other):
    """Whether all findings are equal to the bit."""
    np.testing.assert_equal(numbers(one), numbers(other))  # NaN equals NaN
    assert [t.rows for t in one.tables] == [t.rows for t in other.tables]
    assert one.files == other.files
    pictures = [[(p.file, p.caption) for p in f.pictures] for f in (one, other)]
    assert pictures[0] == pictures[1]


def test_the_order_of_the_images_does_not_matter():
    images = random_images(30)
    options = {"voc_boxes": "devkit", "voc_masks": "sds"}
    first = compute(collect(images), 30, **options)
    order = np.random.default_rng(1).permutation(30).tolist()
    same(first, compute(collect(images, order), 30, **options))
    assert 0.2 < numbers(first)["mask_ap"] < 0.9


def test_images_of_several_processes_are_those_of_one(monkeypatch):
    images = random_images(12)
    parts = [collect({i: images[i] for i in range(k, 12, 3)}) for k in range(3)]
    sent = []
    monkeypatch.setattr(processes, "are_many", lambda: True)
    for part in parts:  # what each process sends
        monkeypatch.setattr(processes, "from_all", lambda own: sent.append(json.dumps(own)) or [])
        part.gather()
    monkeypatch.setattr(processes, "from_all", lambda own: [json.loads(text) for text in sent])
    joined = instances.DetectionEvaluator()
    joined.gather()
    assert len(joined) == 12
    same(compute(collect(images), 12), compute(joined, 12))
    for index, (truth, found) in joined.images().items():
        assert truth.boxes.dtype == images[index][0].boxes.dtype
        np.testing.assert_array_equal(found.scores, images[index][1].scores)
        np.testing.assert_array_equal(truth.crowd, images[index][0].crowd)


def test_an_image_counts_once():
    evaluator = collect(random_images(1))
    with pytest.raises(ValueError, match="image 0 has been added before"):
        evaluator.add(0, *random_images(1)[0])
    evaluator.gather()  # one process: nothing to do
    assert len(evaluator) == 1


def test_masks_take_no_room_of_their_pixels():
    pixels = np.zeros((2000, 3000), bool)
    pixels[100:1900, 100:2900] = True
    encoded = [rle.encode(pixels)] * 2
    evaluator = instances.DetectionEvaluator()
    boxes = [[100, 100, 2900, 1900]] * 2
    truth = Truth.build(boxes, [1, 1], masks=encoded)
    evaluator.add(0, truth, Detections.build(boxes, [1, 1], [0.5, 0.4], encoded))
    assert len(pickle.dumps(evaluator)) < pixels.size / 200


def test_images_may_lack_everything():
    images = random_images(2) | {
        2: (Truth.build([], []), Detections.build([], [], [])),
        3: (random_images(1)[0][0], Detections.build([], [], [])),
    }
    result = compute(collect(images), 4, voc_boxes="python", voc_masks="mnc")
    assert (
        0 < numbers(result)["mask_ap"] < numbers(compute(collect(random_images(2)), 2))["mask_ap"]
    )


def test_scores_have_the_names_that_runs_ask_for():
    images = random_images(8)
    truths, found = zip(*images.values(), strict=True)
    both = compute(collect(images), 8)
    kinds: list[coco.Kind] = ["mask", "box"]
    for kind in kinds:
        expected = coco.average_precision(truths, found, 4, kind)
        for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ar_1", "ar_10", "ar_100"):
            assert numbers(both)[f"{kind}_{name}"] == getattr(expected, name)
        assert math.isnan(numbers(both)[f"{kind}_ap_large"])
    main = [score.name for score in both.scores if score.main]
    assert main == ["mask_ap", "mask_ap50", "mask_ap75", "box_ap", "box_ap50", "box_ap75"]
    assert both.scores[0].title == "Mask AP"
    boxes = compute(collect(random_images(8, of_masks=False)), 8, ["box"])
    assert {name.split("_")[0] for name in numbers(boxes)} == {"box"}
    assert boxes.files.keys() == {"results_box.json"}


@pytest.mark.parametrize("protocol", ["sds", "hyper", "mnc"])
def test_scores_of_voc_have_both_averages(protocol):
    images = random_images(8)
    truths, found = zip(*images.values(), strict=True)
    result = compute(collect(images), 8, voc_boxes="python", voc_masks=protocol)
    boxes = voc.average_precision(truths, found, 4, "python")
    masks = voc.average_precision(truths, found, 4, protocol, [0.5, 0.7])
    volume = voc.average_precision(truths, found, 4, protocol, voc.VOLUME)
    for kind in ("area", "points"):
        assert numbers(result)[f"voc_ap50_{kind}"] == getattr(boxes, kind)[0]
        apr = [numbers(result)[f"{name}_{kind}"] for name in ("apr50", "apr70", "apr_vol")]
        assert apr == [*getattr(masks, kind), getattr(volume, kind).mean()]
    usual = "points" if protocol == "mnc" else "area"
    main = {score.name for score in result.scores if score.main and score.name.startswith("apr")}
    assert main == {f"{name}_{usual}" for name in ("apr50", "apr70", "apr_vol")}
    row = dict(
        zip([c.title for c in result.tables[0].columns], result.tables[0].rows[0], strict=True)
    )
    assert row["APr 50"] == getattr(masks, f"class_{usual}")[0, 1]
    assert row["VOC AP50"] == boxes.class_area[0, 1]


def test_the_table_has_a_row_for_each_class():
    boxes = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]]
    truth = Truth.build(boxes, [1, 2, 2], crowd=[False, False, True])
    found = Detections.build(boxes[:2], [1, 3], [0.9, 0.8])
    (table,) = compute(collect({0: (truth, found)}), 1, ["box"]).tables
    titles = ["Class", "Box AP", "Box AP50", "Box AP75", "Objects", "Detections"]
    assert [column.title for column in table.columns] == titles
    values = [row[1:] for row in table.rows]
    assert [row[0] for row in table.rows] == ["cat", "dog", "bird"]
    assert values[0] == pytest.approx([1, 1, 1, 1, 1])
    assert values[1] == [0, 0, 0, 1, 0]
    assert values[2] == [None, None, None, 0, 1]  # no birds: no score
    assert table.log == "box_ap"


def test_files_give_the_same_scores_in_other_tools():
    number = 10
    images = random_images(number)
    image_ids = [900 - 7 * i for i in range(number)]
    category_ids = [0, 18, 90, 3]
    result = compute(collect(images), number, image_ids=image_ids, category_ids=category_ids)
    annotations = [
        {
            "image_id": image_ids[i],
            "category_id": category_ids[truth.classes[k]],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "segmentation": (truth.masks or ())[k],
            "area": truth.area[k],
            "iscrowd": int(truth.crowd[k]),
        }
        for i, (truth, _) in images.items()
        for k, (x0, y0, x1, y1) in enumerate(truth.boxes.tolist())
    ]
    truth = hotcoco.COCO(
        {
            "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in image_ids],
            "categories": [{"id": i, "name": str(i)} for i in category_ids[1:]],
            "annotations": [{"id": k, **a} for k, a in enumerate(annotations, 1)],
        }
    )
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        rows = json.loads(result.files[f"results_{kind}.json"])
        assert set(rows[0]) & {"bbox", "segmentation"} == {
            "bbox" if kind == "box" else "segmentation"
        }
        assert {row["image_id"] for row in rows} <= set(image_ids)
        evaluation = hotcoco.COCOeval(truth, truth.load_res(rows), name)
        evaluation.run()
        # The mean over classes adds in another order.
        assert evaluation.stats[0] == pytest.approx(numbers(result)[f"{kind}_ap"], rel=1e-12)
    plain = json.loads(compute(collect(images), number).files["results_box.json"])
    assert {row["image_id"] for row in plain} <= set(range(number))
    assert {row["category_id"] for row in plain} <= {1, 2, 3}


FACTOR = 4  # of small images in pictures, which names would hide


def test_pictures_show_the_best_and_the_worst_images():
    images = {}
    for index in range(10):  # image k finds k of 9 cats; image 0 shows nothing
        boxes = [[8 * i, 10, 8 * i + 7, 30] for i in range(9 if index else 0)]
        found = boxes[:index]
        scores = np.full(len(found), 0.9)
        images[index] = (
            Truth.build(boxes, [1] * len(boxes)),
            Detections.build(found, [1] * len(found), scores),
        )
    result = compute(collect(images), 10, ["box"])
    shown = {group: [p for p in result.pictures if p.group == group] for group in ("Worst", "Best")}
    assert [p.caption.split(",")[0] for p in shown["Worst"]] == [f"image {i}" for i in (1, 2, 3, 4)]
    assert [p.caption.split(",")[0] for p in shown["Best"]] == [f"image {i}" for i in (9, 8, 7, 6)]
    assert shown["Best"][0].caption == "image 9, AP 100.0 %"
    picture = shown["Worst"][0].draw()
    height, width = FACTOR * SIZE[0], FACTOR * SIZE[1]
    assert picture.shape == (height, 2 * width + 4, 3)
    row, colour = FACTOR * 30 - 1, CLASSES.palette()[1]
    of_box = [(part[row] == colour).all(axis=-1).sum() for part in np.split(picture, [width], 1)]
    assert of_box == [FACTOR * 9 * 7, FACTOR * 7]


def test_pictures_lack_detections_that_are_not_likely():
    image = Truth.build([[0, 20, 10, 30]], [1]), Detections.build([[0, 20, 10, 30]], [1], [0.49])
    picture = compute(collect({0: image}), 1, ["box"]).pictures[0].draw()
    width = FACTOR * SIZE[1]
    assert (picture[:, -width:] == 100).all()
    assert (picture[:, :width] != 100).any()


def test_pictures_show_small_objects_on_top_of_large_ones():
    truth = Truth.build([[30, 20, 60, 50], [30, 20, 70, 55]], [1, 2])
    for rows in ([0, 1], [1, 0]):
        image = Truth.build(truth.boxes[rows], truth.classes[rows])
        evaluator = collect({0: (image, same_boxes(image))})
        picture = compute(evaluator, 1, ["box"]).pictures[0].draw()
        (x0, y0, x1, y1), colour = (FACTOR * truth.boxes[0]).astype(int), CLASSES.palette()[1]
        assert (picture[y1 - 1, x0:x1] == colour).all()
        assert (picture[y0:y1, x0] == colour).all()


def test_masks_of_one_class_have_colours_of_their_own():
    """Touching objects of a class would look like one."""
    masks = np.zeros((2, *SIZE), bool)
    masks[0, 10:20, 10:20], masks[1, 10:20, 20:30] = True, True
    boxes, codes = [[10, 10, 20, 20], [20, 10, 30, 20]], [rle.encode(mask) for mask in masks]
    image = (
        Truth.build(boxes, [1, 1], masks=codes),
        Detections.build(boxes, [1] * 2, [0.9] * 2, codes),
    )
    picture = compute(collect({0: image}), 1, ["mask"]).pictures[0].draw()
    for part in np.split(picture[:, : 2 * FACTOR * SIZE[1] + 4], [FACTOR * SIZE[1] + 4], axis=1):
        left, right = (part[FACTOR * 17, FACTOR * x].astype(int) for x in (17, 27))
        assert abs(left - right).max() > 30


def test_the_ap_of_an_image_is_that_of_a_set_of_one():
    for truth, found in random_images(20).values():
        expected = coco.average_precision([truth], [found], 4, "mask").ap
        np.testing.assert_equal(instances._own_ap(truth, found, "mask"), expected)


def test_the_curves_are_drawn():
    drawn = [p for p in compute(collect(random_images(6)), 6).pictures if "precision" in p.file]
    assert [p.file for p in drawn] == ["precision_mask_val.png", "precision_box_val.png"]
    truth = Truth.build([[0, 0, 9, 9]], [2])
    perfect = compute(collect({0: (truth, same_boxes(truth))}), 1, ["box"])
    picture = perfect.pictures[-1].draw()
    assert picture.dtype == np.uint8
    # The mean of precision 1 is a line along the top of both panels.
    dark = (picture < 60).all(axis=-1)
    assert dark.sum(axis=1).max() > 1100


def same_boxes(truth):
    return Detections.build(truth.boxes, truth.classes, np.ones(len(truth)))


def test_a_split_without_objects_is_refused():
    images = {0: (Truth.build([[0, 0, 9, 9]], [1], crowd=[True]), Detections.build([], [], []))}
    with pytest.raises(UserError, match="no val image of things shows an object"):
        compute(collect(images), 1)
    with pytest.raises(UserError, match="no val image"):
        compute(collect({}), 1)


def test_a_record_becomes_a_report(tmp_path):
    evaluator, data = collect(random_images(5)), dataset(5)
    found = [instances.findings(evaluator, data, "val", ["mask", "box"], voc_boxes="devkit")]
    result = instances.record(evaluator, found, data, "val", "mask_ap", {"detections": "100"})
    assert result.scores["mask_ap"].value == result.row()["mask_ap"]
    assert math.isnan(result.row()["mask_ap/bird"])
    result.tell(3)
    result.write(tmp_path, 3)
    written = record.read(tmp_path)
    assert written is not None
    assert written["headline"] == "mask_ap"
    assert written["protocol"]["images_scored"] == 5
    assert len(json.loads((tmp_path / "results_mask.json").read_text())) > 3
    config = {"script": "x", "config": {"dataset": "things"}, "classes": CLASSES.to_json()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = report.write_report(tmp_path).read_text()
    for words in ("Mask AP75", "VOC AP50", "Precision and recall", "Worst", "bird"):
        assert words in page


def test_detections_that_padding_changes_are_counted_near_the_edges_and_elsewhere():
    boxes = np.array([[0, 0, 10, 10], [40, 10, 60, 30], [20, 60, 40, 84], [0, 80, 9, 100]], float)
    exact = Detections.build(boxes, [1, 1, 2, 2], [0.9, 0.8, 0.6, 0.5])  # 0.5 is not above 0.5

    def count(padded, size=(100, 100), input_size=(100, 100)):
        return padding.changes(exact, padded, size, input_size).tolist()

    assert count(exact) == [[0, 1], [0, 2]]  # of three, one ends 16 pixels above the lower edge
    assert count(Detections.build([], [], [])) == [[1, 1], [2, 2]]
    moved = boxes + np.array([[0, 0, 0, 0], [1, 0, 1, 0], [0, 3, 0, 0], [0, 0, 0, 0]])
    # 19 of 21 columns are 0.905 of the box; 21 of 24 rows are 0.875.
    assert count(Detections.build(moved, [1, 1, 2, 2], [0.9, 0.8, 0.6, 0.5])) == [[1, 1], [0, 2]]
    assert count(Detections.build(boxes, [2, 1, 2, 2], exact.scores)) == [[0, 1], [1, 2]]
    assert count(Detections.build(boxes, exact.classes, [0.9, 0.4, 0.6, 0.6])) == [[0, 1], [1, 2]]
    # Twice as large for the network, no side ends within 32 pixels; half as large, two do.
    assert count(exact, input_size=(200, 200)) == [[0, 0], [0, 3]]
    assert count(exact, input_size=(50, 50)) == [[0, 2], [0, 1]]
    assert count(exact, input_size=(200, 50)) == [[0, 2], [0, 1]]
    assert count(exact, input_size=(50, 200)) == [[0, 1], [0, 2]]
    nothing = Detections.build([], [], [])
    assert padding.changes(nothing, exact, (100, 100), (100, 100)).sum() == 0


def test_padding_is_measured_on_images_of_frequent_shapes():
    shapes = [(32, 32 * k) for k in range(1, 11)] + [(32, 32 * k) for k in range(3, 11)]
    assert padding.sample(shapes) == list(range(2, 18))
    assert padding.sample([(32, 32)] * 1000) == list(range(100))
    words = padding.in_words(np.array([[1, 8], [0, 0]]), 3)
    assert "changes 12.50 % of 8 within 32 pixels of the lower and right edges" in words
    assert "0.00 % of 0 elsewhere" in words
