"""What the metrics of detection compare: the true objects of an image, and the predicted ones.

Boxes are (x0, y0, x1, y1) in pixels, as in `dense_jax.ops.boxes`; masks are COCO's run lengths, as
in `dense_jax.data.rle`; keypoints have the coordinates of boxes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from hotcoco import mask as coco_mask
from numpy.typing import ArrayLike

from dense_jax.errors import refuse
from dense_jax.ops import boxes as box_ops

Rle = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Truth:
    """The N true objects of one image.

    Attributes:
      boxes: [N, 4].
      classes: integers [N], from 1.
      crowd: bool [N], whether it stands for many objects (COCO's iscrowd).
      difficult: bool [N], whether VOC's metrics leave it out.
      area: [N], in square pixels; COCO's metrics sort objects by it into small, medium and large.
      masks: N masks, or None if there are none.
      keypoints: [N, K, 3], x, y and visibility (0: not labelled), or None if there are none.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    area: np.ndarray
    masks: Sequence[Rle] | None
    keypoints: np.ndarray | None = None

    @classmethod
    def build(
        cls,
        boxes: ArrayLike,
        classes: ArrayLike,
        *,
        crowd: ArrayLike | None = None,
        difficult: ArrayLike | None = None,
        area: ArrayLike | None = None,
        masks: Sequence[Rle] | None = None,
        keypoints: ArrayLike | None = None,
    ) -> Self:
        """Checks and completes the objects of an image.

        Args:
          boxes: [N, 4].
          classes: integers [N].
          crowd: bool [N]; by default no object is a crowd.
          difficult: bool [N]; by default no object is difficult.
          area: [N]; by default the areas of the masks or, without masks, of the boxes.
          masks: N masks.
          keypoints: [N, K, 3].

        Raises:
          ValueError: the lengths differ.
        """
        boxes, classes = np.asarray(boxes, float).reshape(-1, 4), np.asarray(classes, int)
        none = np.zeros(len(boxes), bool)
        if area is None and masks is not None:
            area = np.array([coco_mask.area(dict(mask)) for mask in masks], float)
        truth = cls(
            boxes,
            classes,
            none if crowd is None else np.asarray(crowd, bool),
            none if difficult is None else np.asarray(difficult, bool),
            box_ops.area(boxes) if area is None else np.asarray(area, float),
            masks,
            None if keypoints is None else np.asarray(keypoints, float),
        )
        _check_lengths(truth)
        return truth

    def __len__(self) -> int:
        return len(self.boxes)


@dataclasses.dataclass(frozen=True, eq=False)
class Detections:
    """The N predicted objects of one image, in any order.

    Attributes:
      boxes: [N, 4].
      classes: integers [N], from 1.
      scores: [N]; higher is more certain. Equal scores rank in the order of the arrays.
      masks: N masks, or None if there are none.
      keypoints: [N, K, 3], x, y and a score, or None if there are none.
    """

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    masks: Sequence[Rle] | None
    keypoints: np.ndarray | None = None

    @classmethod
    def build(
        cls,
        boxes: ArrayLike,
        classes: ArrayLike,
        scores: ArrayLike,
        masks: Sequence[Rle] | None = None,
        keypoints: ArrayLike | None = None,
    ) -> Self:
        """Checks the detections of an image.

        Raises:
          ValueError: the lengths differ.
          UserError: a score, a box or a keypoint is not finite.
        """
        boxes, classes = np.asarray(boxes, float).reshape(-1, 4), np.asarray(classes, int)
        scores = np.asarray(scores, float)
        points = None if keypoints is None else np.asarray(keypoints, float)
        for numbers, name in ((scores, "score"), (boxes, "box"), (points, "keypoint")):
            refuse(
                numbers is not None and not np.isfinite(numbers).all(),
                f"a predicted {name} is not finite: the network diverged, train it again",
            )
        detections = cls(boxes, classes, scores, masks, points)
        _check_lengths(detections)
        return detections

    def select(self, index: np.ndarray) -> Self:
        """Returns the detections where a bool [N] is True."""
        masks = self.masks
        if masks is not None:
            masks = [masks[i] for i in np.flatnonzero(index).tolist()]
        keypoints = None if self.keypoints is None else self.keypoints[index]
        return type(self)(
            self.boxes[index], self.classes[index], self.scores[index], masks, keypoints
        )

    def found_in(self, others: "Detections", min_iou: float) -> np.ndarray:
        """Returns whether each has one of its class, with at least an IoU of boxes, among others.

        Args:
          others: the detections of the same image by another network or rule.
          min_iou: the least IoU.

        Returns:
          bool [N].
        """
        is_same = self.classes[:, None] == others.classes[None]
        return (is_same & (box_ops.iou(self.boxes, others.boxes) >= min_iou)).any(axis=1)

    def __len__(self) -> int:
        return len(self.boxes)


def _check_lengths(objects: Truth | Detections) -> None:
    parts = {f.name: getattr(objects, f.name) for f in dataclasses.fields(objects)}
    lengths = {name: len(part) for name, part in parts.items() if part is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lengths of an image's objects differ: {lengths}")
