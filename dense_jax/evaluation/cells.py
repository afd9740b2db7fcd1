"""Further metrics and pictures of runs on touching cells: objects and membranes.

Class 1 of the labels is the inside of cells and class 0 everything between them. A third class, if
a dataset has one, is the border of touching cells. Objects are connected components of class 1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dense_jax import viz
from dense_jax.data.border import BorderWeights, SeparateTouching
from dense_jax.data.classes import voc_colours
from dense_jax.data.dataset import Dataset, Source
from dense_jax.data.normalise import Normalise, to_uint8
from dense_jax.data.transforms import Transform
from dense_jax.evaluation.batches import Predicts, predict_split
from dense_jax.evaluation.record import Findings, Picture, Score
from dense_jax.metrics import em, instances

DATASETS = ("em_membrane", "nuclei", "nuclei_border")
"""Datasets whose objects touch and must be separated."""

_INSIDE, _BORDER = 1, 2
_NUM_PICTURES = 4
_NUM_COLOURS = 20


def measures(dataset: str, transforms: Sequence[Transform]) -> tuple[Callable[..., Findings], ...]:
    """Returns the further measures of a run on one of `DATASETS`; nothing for another dataset.

    Args:
      dataset: name of the dataset.
      transforms: the training transforms.
    """
    if dataset not in DATASETS:
        return ()
    objects = functools.partial(measure, membranes=dataset == "em_membrane")
    return objects, functools.partial(training_pictures, transforms=transforms)


def measure(
    task: Predicts, variables: Any, dataset: Dataset, split: str, *, membranes: bool
) -> Findings:
    """Predicts a split whose examples have "instances", and scores and draws its objects.

    Args:
      task: predicts the images.
      variables: parameters and batch statistics.
      dataset: the images and their objects.
      split: name of the split.
      membranes: whether to add the metrics of ISBI 2012.
    """
    source = dataset.split(split)
    indices = set(np.linspace(0, len(source) - 1, _NUM_PICTURES).round().astype(int).tolist())
    truths, predictions, labels, insides, drawings = [], [], [], [], {}
    for index, outputs in predict_split(task, variables, source):
        example, objects = source[index], objects_of(outputs["logits"])
        truths.append(example["instances"])
        predictions.append(objects)
        if index in indices:
            drawings[index] = objects
        if membranes:
            labels.append((example["label"] == _INSIDE).astype(np.uint8))
            insides.append(np.asarray(jax.nn.softmax(outputs["logits"]))[..., _INSIDE])
    scores = instances.scores(truths, predictions)
    scores |= em.scores(labels, insides) if membranes else {}
    pictures = [
        Picture(
            f"cells_{rank}.png",
            functools.partial(_objects_picture, source, index, objects),
            "Objects",
            source[index]["name"],
            ("image", "true objects", "predicted objects"),
        )
        for rank, (index, objects) in enumerate(sorted(drawings.items()), 1)
    ]
    return Findings([Score(name, value, unit="") for name, value in scores.items()], (), pictures)


def _objects_picture(source: Source, index: int, predicted: np.ndarray) -> np.ndarray:
    example = source[index]
    row = [_visible(example["image"]), colours(example["instances"]), colours(predicted)]
    return viz.contact_sheet(row, columns=len(row))


def objects_of(logits: np.ndarray) -> np.ndarray:
    """Returns the object numbers of logits [H, W, 2 or 3], int32 [H, W]; 0 means no object."""
    border = _BORDER if logits.shape[-1] > _BORDER else None
    return instances.from_semantic(logits.argmax(-1), object_class=_INSIDE, border_class=border)


def colours(objects: np.ndarray) -> np.ndarray:
    """Returns a colour for each object number [H, W], uint8 [H, W, 3]; 20 colours take turns."""
    palette = np.array(voc_colours(1 + _NUM_COLOURS), np.uint8)
    return palette[np.where(objects > 0, 1 + (objects - 1) % _NUM_COLOURS, 0)]


def _visible(image: np.ndarray) -> np.ndarray:
    """Returns the picture in grey with normalised contrast: many raw images are almost black."""
    return to_uint8(Normalise("grey_image")({"image": image})["image"], "grey_image")


def training_pictures(
    task: Predicts, variables: Any, dataset: Dataset, split: str, *, transforms: Sequence[Transform]
) -> Findings:
    """Draws training images, their objects before and after separation, and the pixel weights.

    Args:
      task: unused.
      variables: unused.
      split: unused.
      dataset: draws images of its training split.
      transforms: the training transforms; draws `SeparateTouching` and `BorderWeights`, applied to
        whole images.
    """
    del task, variables, split
    source = dataset.split("train")
    drawn = [t for t in transforms if isinstance(t, SeparateTouching | BorderWeights)]
    pictures = [
        Picture(
            f"weights_{index + 1}.png",
            functools.partial(_training_picture, source, index, drawn),
            "Training images",
            source[index]["name"],
            ("image", *(_HEADINGS[type(t)] for t in (None, *drawn))),
        )
        for index in range(min(_NUM_PICTURES, len(source)) if drawn else 0)
    ]
    return Findings(pictures=pictures)


_HEADINGS = {
    type(None): "objects",
    SeparateTouching: "separated where they touch",
    BorderWeights: "weights of the pixels",
}


def _training_picture(source: Source, index: int, drawn: Sequence[Transform]) -> np.ndarray:
    example, rng = source[index], np.random.default_rng(0)
    row = [_visible(example["image"]), colours(example["instances"])]
    for transform in drawn:
        example = transform(example, rng)
        if isinstance(transform, SeparateTouching):
            row.append(colours(example["instances"]))
    if "weights" in example:
        high = float(example["weights"].max())
        row += [viz.heat(example["weights"], high)]
        row[-1] = np.concatenate([row[-1], viz.heat_scale(high, len(row[-1]))], axis=1)
    return viz.contact_sheet(row, columns=len(row))
