"""Opens a trained run: ``dense_jax.load(folder).predict(image)``."""

import contextlib
import dataclasses
import functools
import inspect
import os
import pathlib
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.errors
import jax
import numpy as np
from PIL import Image

from dense_jax import runs, scripts
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.pictures import as_rgb, decode_image, orientation_of, turned_in_words
from dense_jax.errors import UserError, printable
from dense_jax.infer.predictor import Prediction, Predictor
from dense_jax.tasks import training
from dense_jax.tasks.task import Task
from dense_jax.train.checkpoint import read_variables
from dense_jax.train.config import RunConfig, changed, from_json

Picture = np.ndarray | Image.Image | str | os.PathLike[str]


_MISFITS = (
    flax.errors.ScopeParamNotFoundError,
    flax.errors.ScopeParamShapeError,
    flax.errors.ScopeVariableNotFoundError,
    flax.errors.ScopeCollectionNotFound,
)


@contextlib.contextmanager
def of_its_network() -> Iterator[None]:
    """Context for the use of a run's parameters.

    Raises:
      UserError: the network has been edited since, and its parameters are others now.
    """
    try:
        yield
    except _MISFITS as error:
        sentence = str(error).split(" (https:")[0].split(". ")[0].rstrip(".")
        raise UserError(
            f"the parameters of the run belong to another network ({sentence}): use the version of "
            "the script and the network that trained it"
        ) from error


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or stopped run.

    Attributes:
      workdir: its folder.
      task: its task, as built by its script.
      variables: parameters and batch statistics, host arrays.
      step: the step of the variables.
      classes: the classes that it predicts.
      script: the module that trained it.
    """

    workdir: pathlib.Path
    task: Task
    variables: Any
    step: int
    classes: ClassTable
    script: str

    @property
    def config(self) -> RunConfig:
        """The configuration of the training."""
        return self.task.config

    @functools.cached_property
    def predictor(self) -> Predictor:
        """Predicts single images; compiles once for each padded shape."""

        @jax.jit
        def answer(variables: Any, images: jax.Array, sizes: jax.Array, *inputs: jax.Array) -> Any:
            answers = self.task.answers(self.task.predict(variables, images, sizes, *inputs))
            return {name: answers[name] for name in self.task.reads}

        variables, names = jax.device_put(self.variables), tuple(self.task.inputs)

        def run(images: np.ndarray, sizes: np.ndarray, **inputs: np.ndarray) -> Any:
            return answer(variables, images, sizes, *(inputs[name] for name in names))

        def read(answers: dict[str, np.ndarray], image: np.ndarray) -> Prediction:
            return self.task.read(answers, image, self.classes)

        config = self.config
        return Predictor(
            run,
            read,
            config.normalisation,
            config.eval_shapes,
            self.task.padded_side,
            self.task.input_size,
            self.task.antialias,
        )

    def predict(self, images: Picture | Sequence[Picture], **inputs: Any) -> Any:
        """Predicts images with the normalisation, scale, tiles and CRF of the run's script.

        Args:
          images: one image or a list of images. Each is uint8 RGB [H, W, 3], a Pillow image, or the
            path of a file.
          **inputs: the other inputs of the task, such as "boxes"; lists for a list of images.

        Returns:
          A `dense_jax.infer.predictor.Labels` with "labels", "probabilities" and "overlay()", or
          the result of another task's `read`; for a list of images a list of results.

        Raises:
          UserError: an image is not uint8 RGB, an input is missing, or the network has been edited
            since the training.
        """
        several = isinstance(images, list | tuple)
        pictures: list[Any] = list(images) if several else [images]
        if unknown := sorted(set(inputs) - set(self.task.inputs)):
            raise UserError(f"this run takes no {unknown[0]}: leave it out")
        if missing := sorted(set(self.task.inputs) - set(inputs)):
            words = self.task.inputs[missing[0]].words
            raise UserError(f"this run also needs {missing[0]}, {words}: give {missing[0]}=...")
        for name, values in inputs.items() if several else ():
            if not isinstance(values, list | tuple) or len(values) != len(pictures):
                raise UserError(
                    f"{len(pictures)} images: give {name}=[...], a list with one entry for each"
                )
        predictions, orientations = [], {}
        for i, picture in enumerate(pictures):
            own = {name: values[i] if several else values for name, values in inputs.items()}
            arrays: dict[str, Any] = {
                name: values[None] for name, values in self.task.as_inputs(own).items()
            }
            image, orientation = _as_image(picture)
            orientations[_name(picture, i)] = orientation
            with of_its_network():
                predictions.append(self.predictor(image, **arrays))
        for line in turned_in_words(orientations):
            print(printable(line))
        return predictions if several else predictions[0]


def load(
    workdir: str | os.PathLike[str],
    checkpoint: str = "last",
    *,
    changes: Sequence[str] = (),
    task: Task | Callable[[Any, int], Task] | None = None,
) -> Run:
    """Opens a run folder.

    Args:
      workdir: the folder.
      checkpoint: which parameters: "last" or "best".
      changes: settings of evaluation that differ from the run's, such as "test-flip=on".
      task: the task of the run if its script is not available: a `Task`, or the function
        (configuration, number of classes) -> task that built it.

    Raises:
      UserError: the folder holds no run, its script cannot be imported, or it has no such setting.
    """
    folder = pathlib.Path(workdir).expanduser()
    record = runs.read_config(folder)
    if checkpoint not in ("last", "best"):
        raise UserError(f"checkpoint {checkpoint!r}: give 'last' or 'best'")
    classes = runs.classes_of(folder, record)
    if not isinstance(task, Task):
        if task is None:
            if own_model := record.get("own_model"):
                raise UserError(
                    f"{folder}: its network, {own_model}, is not the one that its script builds: "
                    "pass its task, dense_jax.load(folder, task=task)"
                )
            try:
                script = scripts.reopen(record["script"], record.get("script_file"))
            except UserError as error:
                raise UserError(f"{folder}: {error}") from error
            build, config_class = script.build, script.config_class
        else:
            build, config_class = task, _config_class(task)
        path = folder / "config.json"
        config = changed(from_json(config_class, record["config"], path), changes)
        try:
            task = build(config, classes.num_classes)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    elif changes:
        raise UserError(f"task: it has its settings; leave {changes[0]} out")
    variables, step = read_variables(folder, checkpoint, task.headline)
    return Run(folder, task, variables, step, classes, record["script"])


def dataset_of(run: Run, data_dir: str | None = None) -> Dataset:
    """Opens the dataset of a run; ``data_dir`` is its current folder if it has moved.

    Raises:
      UserError: the dataset cannot be opened, or its classes differ from those of the run.
    """
    config = run.config if data_dir is None else dataclasses.replace(run.config, data_dir=data_dir)
    dataset = training.load_dataset(config)
    if dataset.classes.names != run.classes.names:
        raise UserError(
            f"{run.workdir} labels {', '.join(run.classes.names)} but the dataset has "
            f"{', '.join(dataset.classes.names)}: give a --data-dir with the same classes"
        )
    return dataset


def _config_class(build: Callable[[Any, int], Task]) -> type[RunConfig]:
    """Returns the class of a function's first argument, by its annotation."""
    if not callable(build):
        raise UserError(f"task={build!r}: give a task, or the function that builds it")
    first = next(iter(inspect.signature(build).parameters), "")
    annotation = typing.get_type_hints(build).get(first)
    if not (isinstance(annotation, type) and issubclass(annotation, RunConfig)):
        raise UserError(
            f"task={build!r}: annotate its first argument with the class of the configuration"
        )
    return annotation


def _name(picture: Picture, position: int) -> str:
    is_file = isinstance(picture, str | os.PathLike)
    return str(picture) if is_file else f"image {position}"


def _as_image(picture: Picture) -> tuple[np.ndarray, int]:
    """Returns uint8 [H, W, 3], and the EXIF orientation of a file or a Pillow image.

    Raises:
      UserError: it is not uint8 RGB. Floats are an error, since their range would be a guess.
    """
    if isinstance(picture, str | os.PathLike):
        path = pathlib.Path(picture).expanduser()
        try:
            image = decode_image(path.read_bytes(), path)
            return image.pixels, image.orientation
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): give an image") from error
    orientation = 1
    if isinstance(picture, Image.Image):
        orientation = orientation_of(picture)
        picture = np.asarray(as_rgb(picture, "the image"))
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise UserError(
            f"an image is {array.dtype} {list(array.shape)}: give uint8 RGB [H, W, 3] of 0 to 255, "
            "a Pillow image or the path of a file"
        )
    return array, orientation
