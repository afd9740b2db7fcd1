"""The task that finds objects and their masks, scored by average precision of both."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from dense_jax.data import rle
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.padded import Size
from dense_jax.errors import refuse
from dense_jax.infer.instances import Instances
from dense_jax.infer.pasting import Convention, paste
from dense_jax.metrics.coco import Kind
from dense_jax.metrics.detections import Detections
from dense_jax.tasks.detection import Detection


@dataclasses.dataclass(frozen=True)
class InstanceSegmentation(Detection):
    """A run whose network finds objects and draws their masks.

    Its `forward` also returns "masks" [B, D, M, M], probabilities in the cells of each box.

    Attributes:
      convention: how masks are pasted into images.
    """

    _: dataclasses.KW_ONLY
    convention: Convention = "torchvision"

    kinds: ClassVar[Sequence[Kind]] = ("mask", "box")
    headline: ClassVar[str] = "mask_ap"
    reads: ClassVar[Sequence[str]] = (*Detection.reads, "masks")
    meanings: ClassVar[Mapping[str, str]] = {
        **Detection.meanings,
        "masks": "probability that a cell of the box is in the object; pixels of the image are "
        "interpolated between cells and belong to it from 0.5 on",
    }

    @property
    def card(self) -> dict[str, Any]:
        """How images are resized, masks are pasted, and what was chosen."""
        return {**super().card, "masks": f"pasted as by {self.convention}, from 0.5 on"}

    def training_data(self, dataset: Dataset) -> Dataset:
        """Returns what `Detection` does, and tells if masks are bitmaps in place of polygons.

        Raises:
          UserError: masks must be polygons, and the dataset has none.
        """
        asked = self.config.polygons
        if asked != "off" and not _has_polygons(dataset):
            words = f"not all objects of {dataset.name} have polygons"
            refuse(
                asked == "on", f"--mask-target=polygon: {words}; give --mask-target=bitmap or soft"
            )
            print(f"{words}: masks train as with --mask-target=bitmap")
        return super().training_data(dataset)

    def in_image(self, answers: Mapping[str, np.ndarray], size: Size) -> dict[str, np.ndarray]:
        """Returns what `Detection` does, and "masks" [N, M, M]."""
        return {**super().in_image(answers, size), "masks": answers["masks"][answers["valid"]]}

    def read(
        self, answers: Mapping[str, np.ndarray], image: np.ndarray, classes: ClassTable
    ) -> Instances:
        """Returns the objects of an image, in its own pixels, the highest score first."""
        found = super().read(answers, image, classes)
        masks = answers["masks"][answers["valid"]]
        return dataclasses.replace(found, heatmaps=masks, convention=self.convention)

    def _detections(self, answers: Mapping[str, np.ndarray], size: Size) -> Detections:
        found = self.in_image(answers, size)
        # One after another: all masks of an image at once are hundreds of megabytes.
        windows = (
            paste(mask, box, size, self.convention)
            for mask, box in zip(found["masks"], found["boxes"], strict=True)
        )
        masks = [rle.encode(window.mask(size)) for window in windows]
        return dataclasses.replace(super()._detections(answers, size), masks=masks)


def _has_polygons(dataset: Dataset) -> bool:
    """Returns whether the objects that train have polygons, which all or none of them have."""
    objects = dataset.split("train")[0].get("annotations")
    return objects is not None and objects.polygons is not None
