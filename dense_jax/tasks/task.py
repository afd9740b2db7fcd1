"""What every task answers: how a network is trained, what comes out of it, how that is scored.

A task is one value: all that a configuration decides about a run. A script's ``build`` returns it,
and training, evaluation, prediction and export take it. `dense_jax.tasks.semantic` labels pixels;
`dense_jax.tasks.box_masks` finds the objects in given boxes.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax import linen as nn

from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset, Source
from dense_jax.data.padded import Size
from dense_jax.data.transforms import Transform
from dense_jax.evaluation.record import Record
from dense_jax.infer.predictor import Prediction
from dense_jax.infer.whole_image import ONE_PASS
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.step import LossFn

# (variables, whether it is the last evaluation of a run) -> what was found.
Evaluate = Callable[[Any, bool], Record]


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """One run, ready to be trained or used.

    Attributes:
      config: data, optimisation and bookkeeping.
      model: the network.
      transforms: of training; they end in normalised images of one size.
      groups: learning rates of parts of the network; see `build_optimizer`.
      training_split: what is made of the training split, such as windows around its objects; may
        refuse images that do not fit the network. None leaves it as it is.
      posthoc_batch_stats: evaluate with batch statistics averaged over the training split.
    """

    config: Any
    model: nn.Module
    transforms: Sequence[Transform]
    _: dataclasses.KW_ONLY
    groups: Sequence[ParamGroup] = ()
    training_split: Callable[[Source], Source] | None = None
    posthoc_batch_stats: bool = False

    headline: ClassVar[str]
    """Name of the score that decides which checkpoint is the best; higher is better."""
    reads: ClassVar[Sequence[str]]
    """The answers that `read` looks at."""

    @property
    def card(self) -> dict[str, Any]:
        """How the network is used, for the protocol card; has "test_time_options"."""
        return {"test_time_options": ONE_PASS}

    def training_data(self, dataset: Dataset) -> Dataset:
        """Returns the dataset as training sees it."""
        if self.training_split is None:
            return dataset
        train = self.training_split(dataset.split("train"))
        return dataclasses.replace(dataset, splits={**dataset.splits, "train": train})

    @abc.abstractmethod
    def loss(self, dataset: Dataset) -> LossFn:
        """Returns the losses of a micro-batch; the dataset may weigh them."""

    @abc.abstractmethod
    def evaluator(self, dataset: Dataset, split: str) -> Evaluate:
        """Returns what scores variables on a split; it compiles once for many calls."""

    @abc.abstractmethod
    def predict(
        self, variables: Any, images: jax.Array, sizes: jax.Array, *inputs: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns what the network says of images, by name; can be compiled.

        Args:
          variables: of the network.
          images: normalised and padded, float32 [B, H, W, C].
          sizes: int32 [B, 2], heights and widths before padding.
          *inputs: those of `inputs`, in order.
        """

    @property
    def inputs(self) -> Mapping[str, "Input"]:
        """What a prediction needs besides the images, by name."""
        return {}

    @abc.abstractmethod
    def answers(self, outputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns what people and programs want of the outputs of `predict`; can be compiled."""

    @abc.abstractmethod
    def read(
        self, answers: Mapping[str, np.ndarray], image: np.ndarray, classes: ClassTable
    ) -> Prediction:
        """Returns what is said of one image.

        Args:
          answers: those of the padded image, without the axis of the batch.
          image: uint8 [H, W, 3].
          classes: of the run.
        """

    def inputs_in(
        self, folder: pathlib.Path
    ) -> Callable[[pathlib.Path, Size], dict[str, np.ndarray]] | None:
        """Returns what knows the `inputs` of each image of a folder; None if there are none."""
        return None


@dataclasses.dataclass(frozen=True)
class Input:
    """One of the inputs of a prediction.

    Attributes:
      shape: behind the axis of the batch; a name stands for a side that may be of any length.
      dtype: of its numbers.
      words: what it holds.
    """

    shape: tuple[str | int, ...]
    dtype: str
    words: str
