"""The interface of every task: training, prediction and scoring of a network.

A task is one value that holds everything a configuration decides about a run. A script's ``build``
returns it; training, evaluation, prediction and export take it. `dense_jax.tasks.semantic` labels
pixels; `dense_jax.tasks.box_masks` predicts the objects in given boxes.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import numpy as np
from flax import linen as nn

from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset, Example, Source
from dense_jax.data.padded import Shapes, Size
from dense_jax.data.transforms import Transform
from dense_jax.evaluation.record import Record
from dense_jax.infer.predictor import Prediction
from dense_jax.infer.whole_image import ONE_PASS
from dense_jax.train.schedules import ParamGroup
from dense_jax.train.step import LossFn

# (variables, whether it is the last evaluation of a run) -> its record.
Evaluate = Callable[[Any, bool], Record]
# (variables, image uint8 [H, W, 3]) -> boxes [N, 4], x0 y0 x1 y1 in its pixels, the best first.
ProposeFn = Callable[[Any, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """One run, ready to be trained or used.

    Attributes:
      config: data, optimisation and bookkeeping.
      model: the network.
      transforms: training transforms; they end in normalised images of one size.
      groups: learning rates of parts of the network; see `build_optimizer`.
      training_split: (split) -> split to train on, such as windows around its objects. It may raise
        UserError for images that do not fit the network. None trains on the split itself.
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
    """Name of the metric that decides which checkpoint is the best; higher is better."""
    reads: ClassVar[Sequence[str]]
    """Names of the answers that `read` needs."""
    finds_objects: ClassVar[bool] = False
    """Whether `read` returns `dense_jax.infer.instances.Instances`."""
    meanings: ClassVar[Mapping[str, str]] = {}
    """Answers in words, by name, for those who get them from an exported program."""

    @property
    def card(self) -> dict[str, Any]:
        """How the network is used, for the protocol card; has "test_time_options"."""
        return {"test_time_options": ONE_PASS}

    def training_data(self, dataset: Dataset) -> Dataset:
        """Returns the dataset with the training split of `training_split`."""
        if self.training_split is None:
            return dataset
        train = self.training_split(dataset.split("train"))
        return dataclasses.replace(dataset, splits={**dataset.splits, "train": train})

    def input_size(self, size: Size) -> Size:
        """Returns the size to which an image of a size is resized before it is normalised."""
        return size

    @property
    def antialias(self) -> bool:
        """Whether images that shrink are smoothed; see `dense_jax.data.transforms.resize_image`."""
        return True

    @property
    def train_size(self) -> Callable[[Size], Size] | None:
        """The largest size of a training image, by its size in the dataset.

        None if the transforms give all images one size.
        """
        return None

    @property
    def export_size(self) -> Size | None:
        """The size of the images of an exported program, if none is given; None leaves it open."""
        return None

    def in_pixels(self, answers: Mapping[str, Any], size: Size) -> dict[str, Any]:
        """Returns the answers for an image in pixels of its ``size`` before it was resized.

        Arrays are NumPy's or traced, with or without a batch axis.
        """
        return dict(answers)

    def padded_side(self, side: int) -> int:
        """Returns the side to which zeros may pad images without an effect on predictions.

        Images that are padded alike share a compiled program.
        """
        return side

    @abc.abstractmethod
    def loss(self, dataset: Dataset) -> LossFn:
        """Returns the loss of a micro-batch; class weights may come from the dataset."""

    @abc.abstractmethod
    def evaluator(self, dataset: Dataset, split: str) -> Evaluate:
        """Returns a function that scores variables on a split; it compiles once for many calls."""

    @abc.abstractmethod
    def predict(
        self, variables: Any, images: jax.Array, sizes: jax.Array, *inputs: jax.Array
    ) -> dict[str, jax.Array]:
        """Returns the network's outputs for images, by name; can be compiled.

        Args:
          variables: the network's variables.
          images: normalised and padded, float32 [B, H, W, C].
          sizes: int32 [B, 2], heights and widths before padding.
          *inputs: those of `inputs`, in order.
        """

    def with_shapes(self, shapes: Shapes | None) -> Self:
        """Returns the task with other shapes of images in evaluation; None leaves its own."""
        if shapes is None:
            return self
        return dataclasses.replace(
            self, config=dataclasses.replace(self.config, eval_shapes=shapes)
        )

    @property
    def inputs(self) -> Mapping[str, "Input"]:
        """The inputs that a prediction needs besides the images, by name."""
        return {}

    @abc.abstractmethod
    def answers(self, outputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Turns the outputs of `predict` into results for users, by name; can be compiled."""

    @abc.abstractmethod
    def read(
        self, answers: Mapping[str, np.ndarray], image: np.ndarray, classes: ClassTable
    ) -> Prediction:
        """Returns the prediction for one image.

        Args:
          answers: the answers named in `reads` for the padded image, without the batch axis.
          image: uint8 [H, W, 3].
          classes: the classes of the run.
        """

    def debug_pictures(self) -> "DebugPictures | None":
        """Returns what can be drawn of the inside of the network; None: nothing."""
        return None

    def proposer(self) -> "ProposeFn | None":
        """Returns how to find boxes that may hold objects of any class; None: there is no way."""
        return None

    def after_training(self, variables: Any, dataset: Dataset) -> None:
        """Writes what a finished training leaves besides its record; by default nothing.

        Args:
          variables: those that are evaluated, host arrays.
          dataset: the dataset of the training.
        """
        del variables, dataset

    def as_inputs(self, given: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Returns the further inputs of one image as arrays [...], in the dtypes of `inputs`.

        Raises:
          UserError: they are not what `inputs` says.
        """
        return {name: np.asarray(x, self.inputs[name].dtype) for name, x in given.items()}

    def inputs_in(
        self, folder: pathlib.Path
    ) -> Callable[[pathlib.Path, Size], dict[str, np.ndarray]] | None:
        """Returns (path, size) -> `inputs` for the images of a folder; None if no inputs exist."""
        return None


@dataclasses.dataclass(frozen=True)
class DebugPictures:
    """Pictures of what happens inside a network.

    Attributes:
      words: what each picture shows, by its name.
      draw: (variables, example) -> pictures by name, uint8 [H, W, 3]. The example holds "image" and
        what else is known of it; pictures that need more are left out.
    """

    words: Mapping[str, str]
    draw: Callable[[Any, Example], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Input:
    """One of the inputs of a prediction.

    Attributes:
      shape: its shape without the batch axis; a name stands for a side of any length.
      dtype: the dtype of its numbers.
      words: its content in words.
    """

    shape: tuple[str | int, ...]
    dtype: str
    words: str
