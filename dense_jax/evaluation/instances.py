"""Average precision of predicted objects on a split, with curves, pictures and files of results."""

import dataclasses
import functools
import itertools
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dense_jax import viz
from dense_jax.analysis.drawing import INK, Drawing
from dense_jax.data import rle
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset, Source
from dense_jax.data.keypoints import KeypointTable, to_coco
from dense_jax.errors import UserError
from dense_jax.evaluation.labels import Top
from dense_jax.evaluation.record import Column, Findings, Picture, Record, Score, Table
from dense_jax.infer.instances import object_colours
from dense_jax.metrics import coco, voc
from dense_jax.metrics.detections import Detections, Truth
from dense_jax.train import processes

_KINDS = {"box": "Box", "mask": "Mask", "keypoint": "Keypoint"}
_TITLES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP of small objects",
    "ap_medium": "AP of medium objects",
    "ap_large": "AP of large objects",
    "ar_1": "AR of 1 detection",
    "ar_10": "AR of 10 detections",
    "ar_100": "AR of 100 detections",
    "ar_20": "AR of 20 detections",
    "ar_small": "AR of small objects",
    "ar_medium": "AR of medium objects",
    "ar_large": "AR of large objects",
}
_NOT_OF = {  # scores that COCO does not have
    "keypoint": ("ap_small", "ar_1", "ar_10", "ar_100", "ar_small"),
    "box": ("ar_20",),
    "mask": ("ar_20",),
}
_MAIN = ("ap", "ap50", "ap75")
_OF_MASKS = typing.get_args(voc.MaskProtocol)
_VOC_TITLES = {"voc_ap50": "VOC AP50", "apr50": "APr 50", "apr70": "APr 70", "apr_vol": "APr vol"}
_AVERAGES = {"area": "area", "points": "11 points"}
_AT_50, _AT_70 = (voc.VOLUME.index(threshold) for threshold in (0.5, 0.7))
_DRAWN_SCORE = 0.5  # of detections in pictures
_LEAST_SIDE = 300  # pixels of the longer side of pictures of images; smaller ones are enlarged
_RULE = "#e5e7eb"


class DetectionEvaluator:
    """Collects the objects of a split, image by image and in any order.

    It holds boxes, scores and run lengths, and no pixels. Scores do not depend on the order of the
    images, to the last bit.
    """

    def __init__(self) -> None:
        self._images: dict[int, tuple[Truth, Detections]] = {}

    def __len__(self) -> int:
        return len(self._images)

    def add(self, index: int, truth: Truth, detections: Detections) -> None:
        """Adds one image.

        Args:
          index: its index in the split.
          truth: its objects.
          detections: what was predicted.

        Raises:
          ValueError: the image has been added before.
        """
        if index in self._images:
            raise ValueError(f"image {index} has been added before")
        self._images[index] = truth, detections

    def gather(self) -> None:
        """Adds the images of all other processes. All processes call it once, at the end."""
        if not processes.are_many():
            return
        own = [[i, _plain(truth), _plain(found)] for i, (truth, found) in self._images.items()]
        self._images = {}
        for images in processes.from_all(own):
            for index, truth, found in images:
                self.add(index, Truth.build(**truth), Detections.build(**found))

    def images(self) -> dict[int, tuple[Truth, Detections]]:
        """Returns the objects of all images, in the order of their indices."""
        return dict(sorted(self._images.items()))


def _plain(objects: Truth | Detections) -> dict[str, Any]:
    """Returns JSON values from which `build` makes the same objects."""
    values = {field.name: getattr(objects, field.name) for field in dataclasses.fields(objects)}
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}


def findings(
    evaluator: DetectionEvaluator,
    dataset: Dataset,
    split: str,
    kinds: Sequence[coco.Kind],
    *,
    voc_boxes: voc.BoxProtocol | None = None,
    voc_masks: voc.MaskProtocol | None = None,
    image_ids: Sequence[int] | Sequence[str] | None = None,
    category_ids: Sequence[int] | None = None,
) -> Findings:
    """Returns the metrics, a table of classes, pictures and results of a split.

    COCO's metrics are "box_ap", "box_ap50", ..., of masks "mask_ap", ..., and of keypoints
    "keypoint_ap", ... VOC's are "voc_ap50" of boxes, and "apr50", "apr70" and "apr_vol" of masks;
    each ends in "_area" (under the curve) or "_points" (mean over 11 points). The files
    ``results_box.json``, ``results_mask.json`` and ``results_keypoint.json`` are in COCO's results
    format; its tools compute the same from them.

    Args:
      evaluator: the objects of all images.
      dataset: the scored dataset.
      split: name of the scored split.
      kinds: what is scored, the main one first: such as ("mask", "box"), or ("box",) without masks.
      voc_boxes: protocol of VOC's metrics of boxes; None leaves them out.
      voc_masks: protocol of VOC's metrics of masks; None leaves them out.
      image_ids: the id in files of each image of the split; by default its index.
      category_ids: the id in files of each class id; by default the class id.

    Raises:
      UserError: no image has an object.
    """
    images, classes = evaluator.images(), dataset.classes
    if image_ids is not None:  # the order in which COCO's tools rank equal scores
        images = dict(sorted(images.items(), key=lambda item: image_ids[item[0]]))
    truths = [truth for truth, _ in images.values()]
    detections = [found for _, found in images.values()]
    if all(truth.crowd.all() for truth in truths):
        raise UserError(f"no {split} image of {dataset.name} shows an object: give other data")
    compute = functools.partial(coco.average_precision, truths, detections, classes.num_classes)
    summaries = {kind: compute(kind, _sigmas(classes)) for kind in kinds}
    of_voc: dict[str, voc.VocScores] = {
        protocol: voc.average_precision(
            truths, detections, classes.num_classes, protocol, voc.VOLUME
        )
        for protocol in (voc_boxes, voc_masks)
        if protocol is not None
    }
    scores = [score for kind in kinds for score in _coco_scores(kind, summaries[kind])]
    scores += [score for item in of_voc.items() for score in _voc_scores(*item)]
    pictures = _extremes(images, dataset.split(split), split, classes, kinds[0])
    pictures += [
        Picture(
            f"precision_{kind}_{split}.png",
            functools.partial(_curves, summaries[kind], classes, _measure(kind)),
            "Precision and recall",
            f"{_KINDS[kind]} {_measure(kind)}; each class in its colour, their mean in black",
        )
        for kind in kinds
    ]
    results = functools.partial(_results, images, image_ids, category_ids, classes.keypoints)
    files = {f"results_{kind}.json": json.dumps(results(kind)) for kind in kinds}
    return Findings(scores, [_class_table(summaries, of_voc, images, classes)], pictures, files)


def record(
    evaluator: DetectionEvaluator,
    found: Sequence[Findings],
    dataset: Dataset,
    split: str,
    headline: str,
    card: Mapping[str, Any],
) -> Record:
    """Returns the record of predicted objects.

    Args:
      evaluator: the objects of all images.
      found: findings of each measure, the main metrics first.
      dataset: the scored dataset.
      split: name of the scored split.
      headline: name of the metric that decides which checkpoint is the best.
      card: further lines of the protocol: how the network was used.
    """
    protocol = {
        "dataset": dataset.name,
        "description": dataset.description,
        "fingerprint": dataset.fingerprint,
        "split": split,
        "images_scored": len(evaluator),
        "images_in_split": len(dataset.split(split)),
        "average_precision": "COCO's: mean over IoU 0.5 to 0.95, 100 detections of image and class",
        **card,
    }
    return Record(headline, found, protocol)


def _measure(kind: coco.Kind) -> str:
    return "OKS" if kind == "keypoint" else "IoU"


def _sigmas(classes: ClassTable) -> np.ndarray | None:
    return None if classes.keypoints is None else classes.keypoints.sigmas


def _coco_scores(kind: coco.Kind, summary: coco.CocoScores) -> list[Score]:
    return [
        Score(
            f"{kind}_{name}",
            getattr(summary, name),
            f"{_KINDS[kind]} {title}",
            main=name in _MAIN,
        )
        for name, title in _TITLES.items()
        if name not in _NOT_OF[kind]
    ]


def _voc_scores(protocol: str, summary: voc.VocScores) -> list[Score]:
    """Returns both averages at IoU 0.5 and, of masks, at 0.7 and over `voc.VOLUME`."""
    scores = []
    for average, values in (("area", summary.area), ("points", summary.points)):
        numbers = {"voc_ap50": values[_AT_50]}
        if protocol in _OF_MASKS:
            numbers = {"apr50": values[_AT_50], "apr70": values[_AT_70], "apr_vol": values.mean()}
        for name, value in numbers.items():
            title = f"{_VOC_TITLES[name]}, {protocol}, {_AVERAGES[average]}"
            is_main = average == _usual(protocol)
            scores.append(Score(f"{name}_{average}", float(value), title, main=is_main))
    return scores


def _usual(protocol: str) -> str:
    return "points" if protocol == "mnc" else "area"


def _class_table(
    summaries: Mapping[coco.Kind, coco.CocoScores],
    of_voc: Mapping[str, voc.VocScores],
    images: Mapping[int, tuple[Truth, Detections]],
    classes: ClassTable,
) -> Table:
    columns = {f"{_KINDS[kind]} AP": s.class_ap for kind, s in summaries.items()}
    for i, name in enumerate(("AP50", "AP75")):
        curves = {kind: summary.precision[i] for kind, summary in summaries.items()}
        columns |= {f"{_KINDS[kind]} {name}": c.mean(1) for kind, c in curves.items()}
    for protocol, summary in of_voc.items():
        name = _VOC_TITLES["apr50" if protocol in _OF_MASKS else "voc_ap50"]
        columns[name] = getattr(summary, f"class_{_usual(protocol)}")[_AT_50]
    counts = np.zeros((2, classes.num_classes), int)
    for truth, found in images.values():
        np.add.at(counts[0], truth.classes[~truth.crowd], 1)
        np.add.at(counts[1], found.classes, 1)
    rows = [
        [
            classes.names[i],
            *(None if np.isnan(values[i]) else float(values[i]) for values in columns.values()),
            *counts[:, i].tolist(),
        ]
        for i in range(1, classes.num_classes)
    ]
    heads = [Column("Class"), *(Column(name, "%") for name in columns)]
    heads += [Column("Objects"), Column("Detections")]
    return Table("Classes", heads, rows, log=f"{next(iter(summaries))}_ap")


def _extremes(
    images: Mapping[int, tuple[Truth, Detections]],
    source: Source,
    split: str,
    classes: ClassTable,
    kind: coco.Kind,
) -> list[Picture]:
    """Returns pictures of the images with the lowest and the highest AP of their own."""
    best, worst = Top(), Top()
    for index, (truth, found) in images.items():
        score = _own_ap(truth, found, kind, _sigmas(classes))
        if not np.isnan(score):
            best.offer(score, index, None)
            worst.offer(-score, index, None)
    return [
        Picture(
            f"{split}_{group.lower()}_{rank}.png",
            functools.partial(_compare, source, index, *images[index], classes),
            group,
            f"{source[index]['name']}, AP {100 * abs(score):.1f} %",
            ("objects", f"detections with a score of {_DRAWN_SCORE} or more"),
        )
        for group, top in (("Worst", worst), ("Best", best))
        for rank, (score, index, _) in enumerate(top.items(), 1)
    ]


def _own_ap(
    truth: Truth, found: Detections, kind: coco.Kind, sigmas: np.ndarray | None = None
) -> float:
    """Returns COCO's AP of one image: of the classes that it shows."""
    present, numbers = np.unique(truth.classes, return_inverse=True)
    rows = np.flatnonzero(np.isin(found.classes, present))
    ids = 1 + np.searchsorted(present, found.classes[rows])
    relevant = dataclasses.replace(found.select(np.isin(found.classes, present)), classes=ids)
    renumbered = dataclasses.replace(truth, classes=1 + numbers)
    return coco.average_precision([renumbered], [relevant], 1 + len(present), kind, sigmas).ap


def _compare(
    source: Source, index: int, truth: Truth, found: Detections, classes: ClassTable
) -> np.ndarray:
    image, palette = source[index]["image"], classes.palette()
    factor = -(-_LEAST_SIDE // max(image.shape[:2]))

    def draw(objects: Truth | Detections, rows: np.ndarray, scores: np.ndarray | None = None):
        masks = None
        if objects.masks is not None:
            masks = np.array([rle.decode(objects.masks[i]) for i in rows], bool)
            masks = masks.reshape(-1, *image.shape[:2])
        boxes, ids = objects.boxes[rows], objects.classes[rows]
        # Masks of one class touch and overlap.
        colours = palette[ids] if masks is None else object_colours(len(rows))
        options: dict[str, Any] = {"scores": scores, "masks": masks, "factor": factor}
        if objects.keypoints is not None and classes.keypoints is not None:
            options["keypoints"] = classes.keypoints.only(objects.keypoints[rows], ids)
            options["edges"] = classes.keypoints.edges
        return viz.objects(image, boxes, ids, classes.names, colours, **options)

    ranked = np.argsort(-found.scores, kind="stable")
    ranked = ranked[found.scores[ranked] >= _DRAWN_SCORE]
    smallest_first = np.argsort(truth.area, kind="stable")
    pictures = [draw(truth, smallest_first), draw(found, ranked, found.scores[ranked])]
    return viz.contact_sheet(pictures, columns=2)


def _curves(summary: coco.CocoScores, classes: ClassTable, measure: str) -> np.ndarray:
    """Draws precision over recall at IoU or OKS 0.5 and 0.75."""
    side, left, top, gap = 300, 56, 34, 70
    drawing = Drawing(2 * (left + side) + gap, top + side + 48, "precision over recall")
    palette = classes.palette()
    for panel, threshold in enumerate((0.5, 0.75)):
        x0, y0 = left + panel * (left + side + gap / 2), top + side

        def line(curve: np.ndarray, colour: str, width: float, x0=x0, y0=y0) -> None:
            points = list(zip(x0 + side * coco.RECALLS, y0 - side * curve, strict=True))
            for ends in itertools.pairwise(points):
                drawing.polygon(ends, stroke=colour, width=width)

        for tick in np.linspace(0, 1, 6):
            x, y = x0 + side * tick, y0 - side * tick
            drawing.polygon([(x0, y), (x0 + side, y)], stroke=_RULE)
            drawing.text(x0 - 8, y, f"{tick:.1f}", anchor="end", size=11)
            drawing.text(x, y0 + 14, f"{tick:.1f}", size=11)
        curves = summary.precision[panel]
        mean = summary.mean_precision[panel]
        for class_id in np.flatnonzero(~np.isnan(curves).any(axis=1)):
            line(curves[class_id], "#" + bytes(palette[class_id]).hex(), 1)
        line(mean, INK, 3)
        title = f"precision, {measure} {threshold}: mean {100 * mean.mean():.1f} %"
        drawing.text(x0 - 8, 14, title, anchor="start", bold=True)
        drawing.text(x0 + side, y0 + 34, "recall", anchor="end")
    return drawing.picture()


def _results(
    images: Mapping[int, tuple[Truth, Detections]],
    image_ids: Sequence[int] | Sequence[str] | None,
    category_ids: Sequence[int] | None,
    keypoints: KeypointTable | None,
    kind: coco.Kind,
) -> list[dict[str, Any]]:
    """Returns all detections in COCO's results format, boxes, masks or keypoints.

    Those of keypoints are of the classes that have any.
    One file of both would have other areas of masks in COCO's tools: those of the boxes.
    """
    rows = []
    for index, (_, found) in images.items():
        if kind == "keypoint" and keypoints is not None:
            found = found.select(keypoints.have(found.classes))
        for i, (x0, y0, x1, y1) in enumerate(found.boxes.tolist()):
            class_id = int(found.classes[i])
            row: dict[str, Any] = {
                "image_id": index if image_ids is None else image_ids[index],
                "category_id": class_id if category_ids is None else category_ids[class_id],
                "score": float(found.scores[i]),
            }
            if kind == "box":
                row["bbox"] = [x0, y0, x1 - x0, y1 - y0]
            elif kind == "keypoint" and found.keypoints is not None:
                row["keypoints"] = to_coco(found.keypoints[i])
            elif found.masks is not None:
                row["segmentation"] = found.masks[i]
            rows.append(row)
    return rows
