"""The task that predicts an object mask for each box, from the box and its class."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.data import given_boxes
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.padded import Size
from dense_jax.errors import UserError
from dense_jax.evaluation.box_masks import MaskEvaluator, in_batch
from dense_jax.evaluation.record import Record
from dense_jax.infer.instances import Instances
from dense_jax.objectives.box_masks import mask_loss
from dense_jax.ops import boxes as box_ops
from dense_jax.ops.resize import rescaled
from dense_jax.tasks.task import Evaluate, Input, Task
from dense_jax.train.step import Batch, Losses, LossFn

BOXES_FILE = "boxes.json"
"""The file in a folder of images that holds their boxes."""


@dataclasses.dataclass(frozen=True)
class BoxMasks(Task):
    """A run whose network maps images, boxes and categories to "log_probabilities" of heat maps.

    Its transforms end in `dense_jax.data.box_masks.SampleBoxes`.

    Attributes:
      min_iou: least IoU of a box of the evaluation with the object's true box.
      threshold: a pixel belongs to a mask if its probability is at least this.
    """

    _: dataclasses.KW_ONLY
    min_iou: float = 0.7
    threshold: float = 0.5

    finds_objects: ClassVar[bool] = True
    headline: ClassVar[str] = "mask_iou"
    reads: ClassVar[Sequence[str]] = ("boxes", "classes", "masks", "scores")

    def loss(self, dataset: Dataset) -> LossFn:
        """Returns the logistic loss of the pixels of each box's heat map."""

        def loss_fn(apply: Callable[..., Any], batch: Batch, rng: jax.Array) -> Losses:
            del rng
            outputs = apply(batch["images"], batch["boxes"], batch["categories"])
            return mask_loss(outputs["log_probabilities"], batch, self.config.loss_norm)

        return loss_fn

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Boxes, and the class of the object in each."""
        return {
            "boxes": Input(("n", 4), "float32", "x0 y0 x1 y1 in pixels, from edge to edge"),
            "classes": Input(("n",), "int32", "class ids from 1; 0 for padding, without an object"),
        }

    def predict(
        self, variables: Any, images: jax.Array, sizes: jax.Array, *inputs: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns "masks" (probabilities [B, N, S, S] over the boxes), "boxes" and "classes"."""
        del sizes
        boxes, classes = inputs
        if (scale := self.config.scale) != 1.0:
            size = (images.shape[1], images.shape[2])
            small = [max(1, rescaled(side, scale)) for side in size]
            images = jax.image.resize(images, (images.shape[0], *small, images.shape[3]), "linear")
            boxes = box_ops.scale(boxes, (small[0] / size[0], small[1] / size[1]))
        outputs: Any = self.model.apply(variables, images, boxes, classes - 1, train=False)
        masks = jnp.exp(outputs["log_probabilities"][..., 1])
        return {"masks": masks, "boxes": inputs[0], "classes": classes}

    def answers(self, outputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Adds "scores" [B, N]: the mean probability of the cells inside the mask."""
        masks = outputs["masks"]
        inside = masks >= self.threshold
        count = jnp.sum(inside, axis=(2, 3))
        total = jnp.sum(jnp.where(inside, masks, 0.0), axis=(2, 3))
        scores = total / jnp.maximum(count, 1).astype(total.dtype)
        return {**outputs, "scores": scores}

    def read(
        self, answers: Mapping[str, np.ndarray], image: np.ndarray, classes: ClassTable
    ) -> Instances:
        """Returns the objects of an image, the highest score first."""
        objects = np.flatnonzero(answers["classes"] > 0)
        order = objects[np.argsort(-answers["scores"][objects], kind="stable")]
        boxes, class_ids, masks, scores = (
            answers[name][order] for name in ("boxes", "classes", "masks", "scores")
        )
        return Instances(image, boxes, class_ids, scores, classes, masks, self.threshold)

    def as_inputs(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Checks "boxes" and "classes"; see `dense_jax.data.given_boxes.as_arrays`."""
        num_classes = self.model.num_categories + 1
        boxes, classes = given_boxes.as_arrays(given["boxes"], given["classes"], num_classes)
        return {"boxes": boxes, "classes": classes}

    def inputs_in(
        self, folder: pathlib.Path
    ) -> Callable[[pathlib.Path, Size], dict[str, np.ndarray]]:
        """Reads ``boxes.json`` in the folder of the images; see `dense_jax.data.given_boxes`."""
        path = (folder if folder.is_dir() else folder.parent) / BOXES_FILE
        boxes_by_name = given_boxes.read(path, self.model.num_categories + 1)

        def inputs_of(image: pathlib.Path, size: Size) -> dict[str, np.ndarray]:
            if image.name not in boxes_by_name:
                raise UserError(f"{image}: {path} has no boxes for this image; add some")
            boxes, classes = in_batch(*boxes_by_name[image.name])
            return {"boxes": boxes, "classes": classes}

        return inputs_of

    def evaluator(self, dataset: Dataset, split: str) -> Evaluate:
        """Returns a function that scores the masks of a split."""

        @jax.jit
        def heatmaps(variables: Any, images: Any, boxes: Any, classes: Any) -> jax.Array:
            sizes = jnp.zeros((1, 2), jnp.int32)
            return self.predict(variables, images, sizes, boxes, classes)["masks"]

        evaluator = MaskEvaluator(
            heatmaps,
            dataset,
            split,
            normalisation=self.config.normalisation,
            shapes=self.config.eval_shapes,
            min_iou=self.min_iou,
            threshold=self.threshold,
        )

        def evaluate(variables: Any, is_last: bool) -> Record:
            del is_last
            return evaluator(variables, self.card, self.headline)

        return evaluate
