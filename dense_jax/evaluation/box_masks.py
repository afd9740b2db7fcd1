"""Scores masks in boxes, one box for each object of an image.

Boxes are shifted at random, as those of a detector would be. The shifts depend only on the index of
the image, so they are equal in every evaluation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dense_jax.data import box_masks as box_data
from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.dataset import Dataset, Example
from dense_jax.data.objects import Objects
from dense_jax.data.padded import Shapes, padded_shapes, prepare
from dense_jax.errors import UserError
from dense_jax.evaluation import labels
from dense_jax.evaluation.record import Findings, Record, Score

_MULTIPLE = 8  # The number of boxes is rounded up to a multiple of this: few shapes to compile.

# (variables, images [1, H, W, C], boxes [1, N, 4], classes [1, N]) -> heat maps [1, N, S, S]
Heatmaps = Callable[[Any, np.ndarray, np.ndarray, np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Predicted:
    """The masks of an image's objects.

    Attributes:
      objects: the ground truth.
      boxes: float32 [N, 4], the network's input, in pixels of the original image.
      heatmaps: float32 [N, S, S] probabilities, over the boxes.
    """

    objects: Objects
    boxes: np.ndarray
    heatmaps: np.ndarray


@dataclasses.dataclass(frozen=True)
class ImageScore:
    """The scores of one image.

    Attributes:
      ious: [N], IoU of each mask with its object, over labelled pixels.
      box_ious: [N], IoU of each whole box with its object.
      log_loss: sum of -log p over the labelled pixels in the heat maps.
      num_pixels: number of these pixels.
      labels: uint8 [H, W], the masks pasted as classes, the highest score last (on top).
    """

    ious: np.ndarray
    box_ious: np.ndarray
    log_loss: float
    num_pixels: int
    labels: np.ndarray


def score_image(predicted: Predicted, label: np.ndarray, threshold: float) -> ImageScore:
    """Pastes the heat maps into their boxes and compares them with the objects.

    Args:
      predicted: masks of the image.
      label: uint8 [H, W] class ids; pixels of the ignore label do not count.
      threshold: a pixel belongs to a mask if its probability is at least this.
    """
    objects, counted = predicted.objects, label != IGNORE_LABEL
    ious, box_ious, pasted, log_loss, num_pixels = [], [], [], 0.0, 0
    for i, (box, heatmap) in enumerate(zip(predicted.boxes, predicted.heatmaps, strict=True)):
        truth = objects.mask(i)
        inside = box_data.paste(heatmap, box, label.shape)
        mask = inside >= threshold
        ious.append(_iou(mask & counted, truth & counted))
        filled = box_data.paste(np.ones_like(heatmap), box, label.shape) > 0
        box_ious.append(_iou(filled & counted, truth & counted))
        pasted.append((float(inside[mask].mean()) if mask.any() else 0.0, mask))
        target = box_data.targets(truth, label, box, len(heatmap))
        right = np.where(target == 1, heatmap, 1 - heatmap)[target >= 0]
        log_loss -= float(np.log(np.maximum(right, np.finfo(np.float32).tiny)).sum())
        num_pixels += right.size
    labels = np.zeros(label.shape, np.uint8)
    for i in sorted(range(len(pasted)), key=lambda i: pasted[i][0]):
        labels[pasted[i][1]] = objects.classes[i]
    return ImageScore(np.array(ious), np.array(box_ious), log_loss, num_pixels, labels)


def _iou(mask: np.ndarray, truth: np.ndarray) -> float:
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def mask_scores(ious: np.ndarray, box_ious: np.ndarray) -> list[Score]:
    """Returns metrics of N objects: mean IoU of masks and of bare boxes, and shares of good masks.

    A mask is good if its IoU is at least 0.5 or 0.7. These shares equal the AP^r at these
    thresholds of a perfect detector: one box with the right category for each object.
    """
    return [
        Score("mask_iou", float(np.mean(ious)), "Mask IoU"),
        Score("masks_at_50", float(np.mean(ious >= 0.5)), "Masks of IoU 0.5"),
        Score("masks_at_70", float(np.mean(ious >= 0.7)), "Masks of IoU 0.7"),
        Score("box_iou", float(np.mean(box_ious)), "IoU of bare boxes"),
    ]


def draw_boxes(image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Returns a uint8 image [H, W, 3] with outlines of the boxes [N, 4]."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for x0, y0, x1, y1 in np.rint(boxes).astype(int):
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=(255, 235, 59))
    return np.asarray(picture)


class MaskEvaluator:
    """Scores the masks of a split; compiled once for each shape."""

    def __init__(
        self,
        heatmaps: Heatmaps,
        dataset: Dataset,
        split: str,
        *,
        normalisation: str,
        min_iou: float,
        threshold: float,
        shapes: Shapes = "exact",
    ) -> None:
        """Chooses the shapes of a split.

        Args:
          heatmaps: predicts the masks of the objects of an image, each in its box.
          dataset: the images and their objects.
          split: name of the split.
          normalisation: a name in `dense_jax.data.normalise.NORMALISATIONS`.
          min_iou: least IoU of a shifted box with the true one.
          threshold: a pixel belongs to a mask if its probability is at least this.
          shapes: of the images; see `dense_jax.data.padded`.
        """
        self._heatmaps, self._dataset, self._split = heatmaps, dataset, split
        self._source, self._normalisation = dataset.split(split), normalisation
        self._min_iou, self._threshold = min_iou, threshold
        sizes = [self._source.size(i) for i in range(len(self._source))]
        self._shapes = padded_shapes(sizes, shapes)

    def boxes_of(self, index: int, objects: Objects) -> np.ndarray:
        """Returns the shifted boxes of an image; they depend on its index alone."""
        return box_data.jitter(objects.boxes, self._min_iou, np.random.default_rng(index))

    def predict(self, variables: Any, index: int, example: Example) -> Predicted:
        """Predicts the masks of all objects of an image."""
        objects = box_data.find_objects(example)
        boxes, shape = self.boxes_of(index, objects), self._shapes[example["label"].shape]
        images, _ = prepare(example["image"], self._normalisation, shape)
        heatmaps = self._heatmaps(variables, images, *in_batch(boxes, objects.classes))
        return Predicted(objects, boxes, np.asarray(heatmaps)[0, : len(boxes)])

    def __call__(self, variables: Any, card: dict[str, Any], headline: str) -> Record:
        """Scores the masks, and also the label maps that the pasted masks make.

        Raises:
          UserError: no image has an object.
        """
        dataset, num_classes = self._dataset, self._dataset.classes.num_classes
        confusion = np.zeros((num_classes, num_classes), np.int64)
        best, worst = labels.Top(), labels.Top()
        ious, box_ious, log_loss, num_pixels = [], [], 0.0, 0
        for index in range(len(self._source)):
            example = self._source[index]
            predicted = self.predict(variables, index, example)
            score = score_image(predicted, example["label"], self._threshold)
            counted = example["label"] < num_classes
            pairs = example["label"][counted].astype(np.int64) * num_classes + score.labels[counted]
            confusion += np.bincount(pairs, minlength=num_classes**2).reshape(confusion.shape)
            if len(score.ious):
                best.offer(float(score.ious.mean()), index, score.labels)
                worst.offer(-float(score.ious.mean()), index, score.labels)
            ious.extend(score.ious)
            box_ious.extend(score.box_ious)
            log_loss += score.log_loss
            num_pixels += score.num_pixels
        if not ious:
            raise UserError(
                f"no {self._split} image of {dataset.name} shows an object: give other data"
            )
        counts = labels.Counts(
            confusion=confusion,
            loss=log_loss / max(1, num_pixels),
            num_images=len(self._source),
            shapes=set(self._shapes.values()),
            best=best.items(),
            worst=[(-score, index, pasted) for score, index, pasted in worst.items()],
        )
        masks = Findings(mask_scores(np.array(ious), np.array(box_ious)))
        pasted = labels.findings(counts, dataset, self._split, draw=self._draw)
        protocol = {
            "objects_scored": len(ious),
            "boxes": f"ground truth with edges shifted at random to an IoU >= {self._min_iou}",
            "mask_threshold": self._threshold,
            "class_scores": "of the masks pasted into the image, the highest score on top",
            **card,
        }
        findings = [masks, pasted]
        return labels.record(counts, findings, dataset, self._split, headline, protocol)

    def _draw(self, index: int, example: Example) -> np.ndarray:
        boxes = self.boxes_of(index, box_data.find_objects(example))
        return draw_boxes(example["image"], boxes)


def in_batch(boxes: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pads N boxes and classes to [1, M, 4] and [1, M], M a multiple of 8: few shapes to compile.

    The padding has class 0, the background.
    """
    size = max(_MULTIPLE, -(-len(boxes) // _MULTIPLE) * _MULTIPLE)
    padded, ids = np.zeros((1, size, 4), np.float32), np.zeros((1, size), np.int32)
    padded[0, : len(boxes)], ids[0, : len(boxes)] = boxes, classes
    return padded, ids
