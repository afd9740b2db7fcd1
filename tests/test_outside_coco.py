"""The files of an evaluation, scored by pycocotools: from annotations on disk to a run's folder."""

import contextlib
import dataclasses
import io
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dense_jax.data import dataset
from dense_jax.data.normalise import normalise
from dense_jax.tasks.detection import Detection
from experiments import faster_rcnn, mask_rcnn

SCORES = [
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
]
CATEGORIES = (44, 1, 18, 7)  # no object is of 18
SIZES = {30: (130, 160), 4: (200, 120), 17: (131, 157), 9: (140, 140), 21: (128, 160)}
EMPTY = 9  # the id of an image without objects
SIDES = (12, 31.75, 32, 40.5, 96, 110)
SLOTS = 300


def annotations(rng):
    """Objects of all ranges of areas, at their limits too, and crowds."""
    rows = []
    for image, (height, width) in SIZES.items():
        for category in np.repeat((44, 1, 7), 3).tolist() if image != EMPTY else ():
            w, h = (min(rng.choice(SIDES), side) for side in (width, height))
            x, y = rng.uniform(0, (width - w, height - h)).round(2)
            rows.append({
                "id": len(rows) + 1, "image_id": image, "category_id": category,
                "bbox": [float(x), float(y), float(w), float(h)], "area": float(w * h),
                "iscrowd": int(rng.random() < 0.2),
            })  # fmt: skip
            rows[-1]["segmentation"] = outline(rows[-1], height, width)
    rows[0]["area"], rows[1]["area"] = 1024.0, 9216.0
    return rows


def outline(row, height, width):
    """A diamond as a polygon, or of a crowd the whole box as uncompressed run lengths."""
    x, y, w, h = row["bbox"]
    if not row["iscrowd"]:
        return [[x, y + h / 3, x + w / 2, y, x + w, y + h / 2, x + w / 3, y + h]]
    mask = np.zeros((height, width), bool)
    mask[round(y) : round(y + h), round(x) : round(x + w)] = True
    ends = np.flatnonzero(np.diff(np.concatenate([[False], mask.T.ravel(), [False]])))
    counts = np.diff(np.concatenate([[0], ends, [mask.size]]))
    return {"size": [height, width], "counts": counts[counts > 0].tolist()}


def write(root, objects):
    """A folder in COCO's layout; image i is grey, so that a network can tell which one it is."""
    images = []
    for i, (number, (height, width)) in enumerate(SIZES.items()):
        name = f"{number}.png"
        Image.new("RGB", (width, height), (20 * i,) * 3).save(root / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
    categories = [{"id": number, "name": f"thing {number}"} for number in CATEGORIES]
    content = {"images": images, "categories": categories, "annotations": objects}
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(content))


def guesses(rng, objects) -> dict[str, Any]:
    """Detections in the slots of each image: near its objects, elsewhere and of other classes."""
    arrays = {
        "shares": np.zeros((len(SIZES), SLOTS, 4), np.float32),
        "classes": rng.integers(1, 1 + len(CATEGORIES), (len(SIZES), SLOTS)),
        "scores": rng.integers(1, 30, (len(SIZES), SLOTS)).astype(np.float32) / 30,  # equal ones
    }
    arrays["valid"] = rng.random((len(SIZES), SLOTS)) < 0.9
    arrays["classes"][1] = 1  # more than a hundred of one class
    for i, (number, (height, width)) in enumerate(SIZES.items()):
        corners = rng.uniform(0, 0.8, (SLOTS, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(0.02, 0.5, (SLOTS, 2))], 1)
        own = [row for row in objects if row["image_id"] == number]
        for k, row in enumerate(own * 2):
            x, y, w, h = row["bbox"]
            box = np.array([x, y, x + w, y + h]) + rng.normal(0, 4, 4)
            slot = k * 5
            boxes[slot] = box / [width, height, width, height]
            arrays["classes"][i, slot] = 1 + sorted(CATEGORIES).index(row["category_id"])
        arrays["shares"][i] = boxes
    cells = np.abs(np.linspace(-1, 1, 28))
    diamond = 1.5 - cells[:, None] - cells  # in the middle of its box
    noise = rng.normal(0, 0.1, (len(SIZES), SLOTS, 28, 28))
    arrays["masks"] = np.clip(diamond + noise, 0, 1).astype(np.float32)
    return arrays


def network(levels):
    """In place of one: looks an image up by its grey and gives the detections of a table."""

    def forward(table, images, sizes):
        which = jnp.argmin(jnp.abs(images[:, :1, 0, 0] - levels[None]), axis=1)
        found = {name: x[which] for name, x in table.items()}
        sides = sizes[:, jnp.array([1, 0, 1, 0])].astype(jnp.float32)
        boxes = found.pop("shares") * sides[:, None]
        return {**found, "boxes": boxes, "overflow": jnp.zeros(len(images), bool)}

    return forward


def task(kind: str) -> Detection:
    script: Any = {"box": faster_rcnn, "mask": mask_rcnn}[kind]
    config = dataclasses.replace(script.PRESETS["smoke"], dataset="coco", short_side=(64,))
    greys = np.arange(len(SIZES), dtype=np.uint8)[:, None, None] * 20
    levels = normalise(np.tile(greys, (1, 1, 3)), config.normalisation)[:, 0, 0]
    built = script.build(config, 1 + len(CATEGORIES))
    return dataclasses.replace(built, forward=network(jnp.asarray(levels)))


def outside(truth: pathlib.Path, results: pathlib.Path, kind: str):
    """The twelve numbers of pycocotools, which reads both files itself."""
    theirs = pytest.importorskip("pycocotools.cocoeval", reason="pycocotools is not installed")
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO(str(truth))
        evaluation = theirs.COCOeval(known, known.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["box", "mask"])
@pytest.mark.parametrize("seed", range(3))
def test_pycocotools_gives_the_numbers_of_a_run(tmp_path, kind, seed):
    rng, run = np.random.default_rng(seed), tmp_path / "run"
    objects = annotations(rng)
    write(tmp_path, objects)
    table = jax.tree.map(jnp.asarray, guesses(rng, objects))
    table["classes"] = table["classes"].astype(jnp.int32)
    record = task(kind).evaluator(dataset.load("coco", tmp_path), "val")(table, True)
    record.write(run, 3)

    path = run / f"results_{kind}.json"
    results = json.loads(path.read_text())
    of_class = [(row["image_id"], row["category_id"]) for row in results]
    assert max(map(of_class.count, set(of_class))) > 200  # of which 100 count
    assert (EMPTY, 44) in of_class
    assert any(category == 18 for _, category in of_class)
    assert {row["iscrowd"] for row in objects} == {0, 1}

    scores = json.loads((run / "evaluation.json").read_text())["scores"]
    ours = [scores[f"{kind}_{name}"] for name in SCORES]
    theirs = outside(tmp_path / "val.json", path, {"box": "bbox", "mask": "segm"}[kind])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    assert (theirs > 0).all()  # of each range of areas there are objects
    assert (theirs < 1).all()
