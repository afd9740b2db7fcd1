"""What a run is whose network finds the mask of the object in a given box.

Training boxes are drawn around the objects of the ground truth; evaluation has one box for each
object, moved at random in the same way but always the same for an image, as a detector's might be.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import linen as nn
from PIL import Image, ImageDraw

from dense_jax import losses, report
from dense_jax.data import box_masks as box_data
from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.dataset import Dataset, Example, Source
from dense_jax.data.normalise import Normalise
from dense_jax.data.objects import Objects
from dense_jax.data.padded import padded_shapes
from dense_jax.data.transforms import Resize, Transform
from dense_jax.errors import UserError
from dense_jax.tasks import evaluation, prediction, semantic
from dense_jax.train.config import RunConfig
from dense_jax.train.loop import fit
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.state import TrainState
from dense_jax.train.step import Batch, LossFn, train_step

_FEW = 8  # The number of boxes is rounded up to a multiple of this: few shapes to compile.


def mask_loss(model: nn.Module, config: RunConfig) -> tuple[LossFn, Callable[[Batch], jax.Array]]:
    """The logistic loss of the pixels of each box's heat map, and what it is divided by.

    `config.loss_norm`: "batch" counts boxes (the release), "valid" scored pixels, "weights" their
    weights, "sum" divides by 1.
    """

    def loss_fn(
        params: Any,
        model_state: dict[str, Any],
        batch: Batch,
        denominator: jax.Array,
        rng: jax.Array,
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        outputs: Any
        outputs, new_state = model.apply(
            {"params": params, **model_state},
            batch["images"],
            batch["boxes"],
            batch["categories"],
            train=True,
            rngs={"dropout": rng},
            mutable=list(model_state),
        )
        outside, inside = jnp.moveaxis(outputs["log_probabilities"], -1, 0)
        targets = batch["targets"]
        log_p = jnp.where(targets == 1, inside, outside)
        pixel_loss = -jnp.where(targets >= 0, log_p, 0.0) * _per_pixel(batch["box_weights"])
        loss = jnp.sum(pixel_loss) / losses.resolve_denominator(denominator, config.loss_norm)
        return loss, (new_state, {})

    def denominator_fn(batch: Batch) -> jax.Array:
        scored = (batch["targets"] >= 0).astype(jnp.float32)
        counted = {
            "batch": batch["box_valid"].astype(jnp.float32),
            "valid": scored,
            "weights": scored * _per_pixel(batch["box_weights"]),
            "sum": jnp.zeros(()),
        }
        return jnp.sum(counted[config.loss_norm])

    return loss_fn, denominator_fn


def _per_pixel(values: jax.Array) -> jax.Array:
    return values[..., None, None]


@dataclasses.dataclass(frozen=True)
class Predicted:
    """The masks of an image's objects.

    Attributes:
      objects: the ground truth.
      boxes: float32 [N, 4], those given to the network, in pixels of the original image.
      heatmaps: float32 [N, S, S] probabilities, over the boxes.
    """

    objects: Objects
    boxes: np.ndarray
    heatmaps: np.ndarray


class Predictor:
    """Predicts the masks of the objects of an image, each in a box of which the object is known.

    Attributes:
      shapes: the sizes (height, width) at which the network runs.
      description: which boxes these are.
    """

    def __init__(self, model: nn.Module, config: RunConfig, min_iou: float, source: Source) -> None:
        """Prepares for the images of `source`; `min_iou`: of the boxes with the objects' own."""
        self._config, self._min_iou = config, min_iou
        self.description = f"of the ground truth, edges moved at random to an IoU >= {min_iou}"
        sizes = {source.size(i) for i in range(len(source))}
        scaled = {size: _scaled(size, config.scale) for size in sizes}
        shapes = padded_shapes(scaled.values(), 32, 4)
        self._sizes = {size: (small, shapes[small]) for size, small in scaled.items()}
        self.shapes = set(shapes.values())

        @jax.jit
        def probabilities(
            variables: Any, images: jax.Array, boxes: jax.Array, categories: jax.Array
        ) -> jax.Array:
            outputs: Any = model.apply(variables, images, boxes, categories, train=False)
            return jnp.exp(outputs["log_probabilities"][0, ..., 1])

        self._probabilities = probabilities

    def boxes_of(self, index: int, objects: Objects) -> np.ndarray:
        """Returns the boxes of an image, a function of its index."""
        return box_data.jitter(objects.boxes, self._min_iou, np.random.default_rng(index))

    def __call__(self, variables: Any, index: int, example: Example) -> Predicted:
        """Predicts the masks of all objects of an image."""
        objects = box_data.find_objects(example)
        boxes, count = self.boxes_of(index, objects), len(objects.boxes)
        size, shape = self._sizes[example["label"].shape]
        image = Normalise(self._config.normalisation)(Resize(size)(example))["image"]
        images = np.zeros((1, *shape, image.shape[2]), np.float32)
        images[0, : size[0], : size[1]] = image
        room = max(_FEW, -(-count // _FEW) * _FEW)
        given, categories = np.zeros((1, room, 4), np.float32), np.zeros((1, room), np.int32)
        factors = np.divide(size, example["label"].shape)[[1, 0, 1, 0]]
        given[0, :count], categories[0, :count] = boxes * factors, objects.classes - 1
        heatmaps = np.asarray(self._probabilities(variables, images, given, categories))
        return Predicted(objects, boxes, heatmaps[:count])


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


@dataclasses.dataclass(frozen=True)
class ImageScore:
    """The scores of one image.

    Attributes:
      ious: [N] of the masks with their objects, over labelled pixels.
      box_ious: [N], were everything in the box the object.
      log_loss: sum of -log p over the labelled pixels in the heat maps.
      num_pixels: their number.
      labels: uint8 [H, W], the masks pasted as classes, the surest last.
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
      threshold: least probability of the pixels of a mask.
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


def mask_scores(ious: np.ndarray, box_ious: np.ndarray) -> dict[str, float]:
    """Scores of all objects [N]: mean IoU, the share of at least 0.5 and 0.7, and of bare boxes.

    With a box of the right category for each object, the shares are what AP^r at these thresholds
    would be for a perfect detector.
    """
    return {
        "mask_iou": float(np.mean(ious)),
        "masks_at_50": float(np.mean(ious >= 0.5)),
        "masks_at_70": float(np.mean(ious >= 0.7)),
        "box_iou": float(np.mean(box_ious)),
    }


def draw_boxes(image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Returns a uint8 image [H, W, 3] with its boxes [N, 4] outlined."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for x0, y0, x1, y1 in np.rint(boxes).astype(int):
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=(255, 235, 59))
    return np.asarray(picture)


def evaluate(
    predictor: Predictor,
    variables: Any,
    dataset: Dataset,
    workdir: pathlib.Path,
    step: int,
    threshold: float,
) -> dict[str, float]:
    """Scores the masks of the validation split and writes ``evaluation.json`` with pictures.

    Besides the scores of masks, the pasted masks are scored as a labelling of the image.

    Raises:
      UserError: no image has an object.
    """
    source, num_classes = dataset.split("val"), dataset.classes.num_classes
    confusion = np.zeros((num_classes, num_classes), np.int64)
    best, worst = evaluation.Top(), evaluation.Top()
    ious, box_ious, log_loss, num_pixels = [], [], 0.0, 0
    for index in range(len(source)):
        example = source[index]
        score = score_image(predictor(variables, index, example), example["label"], threshold)
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
        raise UserError(f"no validation image of {dataset.name} shows an object: give other data")
    found = evaluation.Evaluation(
        confusion=confusion,
        loss=log_loss / max(1, num_pixels),
        num_images=len(source),
        shapes=predictor.shapes,
        best=best.items(),
        worst=[(-score, index, labels) for score, index, labels in worst.items()],
    )
    scores = mask_scores(np.array(ious), np.array(box_ious))
    card = {
        "objects_scored": len(ious),
        "boxes": predictor.description,
        "mask_threshold": threshold,
        "class_scores": "of the masks pasted into the image, the surest on top",
        "test_time_options": prediction.ONE_PASS,
    }

    def draw(index: int, example: Example) -> np.ndarray:
        boxes = predictor.boxes_of(index, box_data.find_objects(example))
        return draw_boxes(example["image"], boxes)

    row = evaluation.write_evaluation(workdir, found, dataset, "val", step, card, scores, draw=draw)
    shares = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    tqdm.tqdm.write(f"step {step}: {shares} of {len(ious)} objects")
    return row | scores


def train_and_evaluate(
    config: RunConfig,
    model: nn.Module,
    dataset: Dataset,
    transforms: Sequence[Transform],
    *,
    groups: Sequence[ParamGroup] = (),
    min_iou: float,
    threshold: float,
) -> TrainState:
    """Trains ``model`` and leaves a run folder with scores, pictures and a report.

    Args:
      config: the run; see ``RunConfig``.
      model: network of images, boxes and categories whose outputs hold "log_probabilities".
      dataset: its "train" split is trained on, its "val" split evaluated.
      transforms: training transforms; they end in `SampleBoxes`.
      groups: learning rates of parts of the network; see ``build_optimizer``.
      min_iou: least IoU of evaluation's boxes with the objects' own.
      threshold: least probability of the pixels of a mask.

    Returns:
      The final state.

    Raises:
      UserError: the batch cannot be shared by the devices, or there are no objects.
    """
    workdir, batches, state = semantic.begin(config, model, dataset, transforms, groups)
    step = train_step(*mask_loss(model, config), ema_decay=config.ema_decay)
    predictor = Predictor(model, config, min_iou, dataset.split("val"))

    def scores(state: TrainState, step: int) -> dict[str, float]:
        return evaluate(predictor, state.eval_variables(), dataset, workdir, step, threshold)

    state = fit(state, step, batches, config, scores)
    print(f"report: {report.write_report(workdir)}")
    return state
