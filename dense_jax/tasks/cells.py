"""What a run on touching cells adds to its scores: objects, membranes, and pictures of both.

Class 1 of the labels is the inside of cells and class 0 what lies between them; in a dataset with
a third class that is the border of touching cells. Objects are connected components of class 1.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from dense_jax import viz
from dense_jax.data.border import BorderWeights, SeparateTouching
from dense_jax.data.classes import voc_colours
from dense_jax.data.dataset import Source
from dense_jax.data.normalise import Normalise, to_uint8
from dense_jax.data.transforms import Transform
from dense_jax.metrics import em, instances
from dense_jax.tasks import prediction
from dense_jax.train.config import RunConfig

_INSIDE, _BORDER = 1, 2
_NUM_PICTURES = 4
_NUM_COLOURS = 20


@dataclasses.dataclass(frozen=True)
class Cells:
    """What a network says about the cells of a split.

    Attributes:
      scores: of `dense_jax.metrics.instances.scores`, and of `dense_jax.metrics.em.scores` for
        membranes.
      pictures: predicted object numbers [H, W] of a few images, by index.
    """

    scores: dict[str, float]
    pictures: dict[int, np.ndarray]

    def write(self, folder: pathlib.Path, source: Source) -> None:
        """Writes ``pictures/cells_*.png``: image, true objects, predicted objects."""
        (folder / "pictures").mkdir(exist_ok=True)
        for rank, (index, predicted) in enumerate(sorted(self.pictures.items()), 1):
            example = source[index]
            row = [_visible(example["image"]), colours(example["instances"]), colours(predicted)]
            sheet = Image.fromarray(viz.contact_sheet(row, columns=len(row)))
            sheet.save(folder / "pictures" / f"cells_{rank}.png")


def measure(
    predict: prediction.PredictFn,
    variables: prediction.Variables,
    source: Source,
    config: RunConfig,
    *,
    membranes: bool,
) -> Cells:
    """Predicts a split whose examples have "instances", and scores its objects.

    Args:
      predict: how images are predicted.
      variables: parameters and batch statistics.
      source: the split.
      config: its evaluation batches.
      membranes: whether the measures of ISBI 2012 are wanted too.
    """
    chosen = set(np.linspace(0, len(source) - 1, _NUM_PICTURES).round().astype(int).tolist())
    truths, found, labels, insides, pictures = [], [], [], [], {}
    for index, logits in prediction.predict_split(predict, variables, source, config):
        example, objects = source[index], objects_of(logits)
        truths.append(example["instances"])
        found.append(objects)
        if index in chosen:
            pictures[index] = objects
        if membranes:
            labels.append((example["label"] == _INSIDE).astype(np.uint8))
            insides.append(np.asarray(jax.nn.softmax(logits))[..., _INSIDE])
    scores = instances.scores(truths, found)
    return Cells(scores | (em.scores(labels, insides) if membranes else {}), pictures)


def objects_of(logits: np.ndarray) -> np.ndarray:
    """Numbers the objects that logits [H, W, 2 or 3] show, int32 [H, W], 0 = none."""
    border = _BORDER if logits.shape[-1] > _BORDER else None
    return instances.from_semantic(logits.argmax(-1), object_class=_INSIDE, border_class=border)


def colours(objects: np.ndarray) -> np.ndarray:
    """A colour for each object number [H, W], neighbouring numbers apart, uint8 [H, W, 3]."""
    palette = np.array(voc_colours(1 + _NUM_COLOURS), np.uint8)
    return palette[np.where(objects > 0, 1 + (objects - 1) % _NUM_COLOURS, 0)]


def _visible(image: np.ndarray) -> np.ndarray:
    """The picture in grey of middling contrast: many microscopes' are almost black."""
    return to_uint8(Normalise("grey_image")({"image": image})["image"], "grey_image")


def write_training_pictures(
    folder: pathlib.Path, source: Source, transforms: Sequence[Transform]
) -> None:
    """Writes ``pictures/weights_*.png``: image, objects, what was carved of them, weights.

    Args:
      folder: of the run.
      source: the training split.
      transforms: of training; of these, what carves and what weighs is shown, on whole images.
    """
    shown = [t for t in transforms if isinstance(t, SeparateTouching | BorderWeights)]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for index in range(min(_NUM_PICTURES, len(source)) if shown else 0):
        example, rng = source[index], np.random.default_rng(0)
        row = [_visible(example["image"]), colours(example["instances"])]
        for transform in shown:
            example = transform(example, rng)
            if isinstance(transform, SeparateTouching):
                row.append(colours(example["instances"]))
        if "weights" in example:
            high = float(example["weights"].max())
            row += [viz.heat(example["weights"], high)]
            row[-1] = np.concatenate([row[-1], viz.heat_scale(high, len(row[-1]))], axis=1)
        sheet = Image.fromarray(viz.contact_sheet(row, columns=len(row)))
        sheet.save(folder / "pictures" / f"weights_{index + 1}.png")
