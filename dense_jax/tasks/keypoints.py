"""The tasks that find objects and their keypoints, scored by average precision of all they find."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.padded import Size
from dense_jax.errors import refuse
from dense_jax.infer.instances import Instances
from dense_jax.infer.keypoints import decode
from dense_jax.metrics.coco import Kind
from dense_jax.metrics.detections import Detections
from dense_jax.tasks.detection import Detection
from dense_jax.tasks.segmentation import InstanceSegmentation
from dense_jax.tasks.task import Evaluate


@dataclasses.dataclass(frozen=True)
class KeypointDetection(Detection):
    """A run whose network finds objects and their keypoints.

    Its `forward` also returns "keypoint_logits" [B, D, M, M, K], of the cells of each box.

    Attributes:
      num_keypoints: K.
    """

    _: dataclasses.KW_ONLY
    num_keypoints: int

    kinds: ClassVar[Sequence[Kind]] = ("keypoint", "box")
    headline: ClassVar[str] = "keypoint_ap"
    reads: ClassVar[Sequence[str]] = (*Detection.reads, "keypoint_logits")
    meanings: ClassVar[Mapping[str, str]] = {
        **Detection.meanings,
        "keypoint_logits": "score that a keypoint is in a cell of the box: [..., rows, columns, "
        "keypoints]; a softmax over the cells gives probabilities",
    }

    @property
    def card(self) -> dict[str, Any]:
        """How images are resized, keypoints are found, and what was chosen."""
        words = (
            "the highest bicubic score in each box; OKS with COCO's sigmas, 0.05 for keypoints "
            "that it lacks; 20 detections of image and class"
        )
        return {**super().card, "keypoints": words}

    def training_data(self, dataset: Dataset) -> Dataset:
        """Returns what `Detection` does.

        Raises:
          UserError: the dataset has no keypoints, or another number.
        """
        self._check(dataset)
        return super().training_data(dataset)

    def evaluator(self, dataset: Dataset, split: str) -> Evaluate:
        """Returns a function that scores the detections of a split.

        Raises:
          UserError: as `training_data`.
        """
        self._check(dataset)
        return super().evaluator(dataset, split)

    def _check(self, dataset: Dataset) -> None:
        table = dataset.classes.keypoints
        refuse(
            table is None,
            f"dataset {dataset.name!r} has no keypoints: leave out --keypoint-branch, or give "
            "annotations in COCO's format whose categories name them",
        )
        count = len(table or ())
        refuse(
            count != self.num_keypoints,
            f"dataset {dataset.name!r} has {count} keypoints: give --num-keypoints={count}",
        )

    def read(
        self, answers: Mapping[str, np.ndarray], image: np.ndarray, classes: ClassTable
    ) -> Instances:
        """Returns the objects of an image, in its own pixels, the highest score first."""
        found = super().read(answers, image, classes)
        return dataclasses.replace(found, keypoints=self._keypoints(answers, image.shape[:2]))

    def _detections(self, answers: Mapping[str, np.ndarray], size: Size) -> Detections:
        found = super()._detections(answers, size)
        keypoints = self._keypoints(answers, size)
        return Detections.build(found.boxes, found.classes, found.scores, found.masks, keypoints)

    def _keypoints(self, answers: Mapping[str, np.ndarray], size: Size) -> np.ndarray:
        """Returns x, y and logit, float32 [N, K, 3], for an image of a size before resizing."""
        boxes, logits = (answers[name][answers["valid"]] for name in ("boxes", "keypoint_logits"))
        points = np.array([decode(*own) for own in zip(logits, boxes, strict=True)], np.float32)
        points = points.reshape(-1, self.num_keypoints, 3)
        height, width = self._enlarged(size)  # the boxes are in pixels of the resized image
        return points * np.array([width, height, 1], np.float32)


@dataclasses.dataclass(frozen=True)
class KeypointsAndMasks(KeypointDetection, InstanceSegmentation):
    """A run whose network finds objects, their keypoints and their masks."""

    kinds: ClassVar[Sequence[Kind]] = ("keypoint", "mask", "box")
    headline: ClassVar[str] = "keypoint_ap"
    reads: ClassVar[Sequence[str]] = (*InstanceSegmentation.reads, "keypoint_logits")
    meanings: ClassVar[Mapping[str, str]] = {
        **InstanceSegmentation.meanings,
        **KeypointDetection.meanings,
    }
