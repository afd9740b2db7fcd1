"""Predicts images, and writes the predictions to files for people and programs."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
import tqdm
from PIL import Image

from dense_jax import runs, viz
from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Example
from dense_jax.data.files import check_name, pictures_of_any_name
from dense_jax.data.padded import (
    Shapes,
    Size,
    in_words,
    padded_shapes,
    prepare,
    tell_if_many,
)
from dense_jax.data.pictures import (
    FORMATS,
    SUFFIXES,
    decode_image,
    too_large,
    turned_in_words,
)
from dense_jax.errors import UserError, printable, refuse

Answer = Callable[..., dict[str, jax.Array]]


class Prediction(Protocol):
    """A task's prediction for one image."""

    @property
    def remark(self) -> str:
        """What one should know of it, in words that fit several images; mostly nothing."""
        ...

    def overlay(self) -> np.ndarray:
        """Returns the image with the prediction on top, uint8 [H, W, 3]."""
        ...

    def save(
        self, folder: pathlib.Path, stem: str, *, probabilities: bool
    ) -> list[dict[str, Any]] | None:
        """Writes its files with this stem; returns its entries for COCO's results, or None."""
        ...


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of an image.

    Attributes:
      image: uint8 [H, W, 3].
      labels: uint8 [H, W] class ids.
      probabilities: float32 [H, W, classes].
      classes: their names and colours.
      remark: see `Prediction`.
    """

    image: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    classes: ClassTable
    remark: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError if the sizes or the number of classes do not match."""
        expected = (*self.image.shape[:2], self.classes.num_classes)
        if self.probabilities.shape != expected or self.labels.shape != expected[:2]:
            shapes = self.labels.shape, self.probabilities.shape
            raise ValueError(f"labels and probabilities {shapes} do not match {expected}")

    def overlay(self) -> np.ndarray:
        """Returns the image tinted by its labels, uint8 [H, W, 3]."""
        return viz.overlay(self.image, self.labels, self.classes.palette())

    def save(self, folder: pathlib.Path, stem: str, *, probabilities: bool) -> None:
        """Writes ``labels/STEM.png``; with ``probabilities`` also ``probabilities/STEM.npz``."""
        runs.make_inner_folder(folder / "labels")
        with runs.replacing(folder / "labels" / f"{stem}.png") as stream:
            viz.save_label_png(stream, self.labels, self.classes.palette())
        if probabilities:
            runs.make_inner_folder(folder / "probabilities")
            with runs.replacing(folder / "probabilities" / f"{stem}.npz") as stream:
                soft = self.probabilities.astype(np.float16)
                np.savez_compressed(stream, probabilities=soft)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Predicts images, each at its own size.

    Attributes:
      answer: (images [1, H, W, channels] float32, sizes [1, 2] before padding, the task's other
        inputs by name) -> arrays [1, ...] by name.
      read: (arrays [...] by name, uint8 image [H, W, 3]) -> the prediction for the image.
      normalisation: a name in `dense_jax.data.normalise.NORMALISATIONS`.
      shapes: of the network's inputs, each compiled once; see `dense_jax.data.padded`.
      padded_side: the side to which the network pads a side of an image.
      input_size: the size to which an image of a size is resized.
      antialias: how it is resized; see `dense_jax.data.transforms.resize_image`.
    """

    answer: Answer
    read: Callable[[dict[str, np.ndarray], np.ndarray], Prediction]
    normalisation: str
    shapes: Shapes = "exact"
    padded_side: Callable[[int], int] = lambda side: side
    input_size: Callable[[Size], Size] = lambda size: size
    antialias: bool = True

    def shapes_of(self, sizes: Iterable[Size]) -> dict[Size, Size]:
        """Returns the shape of the network's input for each size of an image."""
        sizes = list(sizes)
        resized = [self.input_size(size) for size in sizes]
        shapes = padded_shapes(resized, self.shapes, self.padded_side)
        return {size: shapes[inputs] for size, inputs in zip(sizes, resized, strict=True)}

    def __call__(self, image: np.ndarray, shape: Size | None = None, **inputs: Any) -> Prediction:
        """Predicts one image.

        Args:
          image: uint8 [H, W, 3].
          shape: height and width after padding. Default: that of an image alone.
          **inputs: the task's other inputs, [1, ...] each.
        """
        size = image.shape[:2]
        shape = shape or self.shapes_of([size])[size]
        arrays = prepare(
            image, self.normalisation, shape, self.input_size(size), antialias=self.antialias
        )
        answers = self.answer(*arrays, **inputs)
        return self.read({name: x[0] for name, x in jax.device_get(answers).items()}, image)


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result for a folder.

    Attributes:
      predicted: paths of the predicted images.
      failures: one line for each other image, with its path and the reason.
      shapes: the padded sizes (height, width) of the network's inputs, each compiled once.
      notes: one line for each thing to look at.
    """

    predicted: tuple[pathlib.Path, ...]
    failures: tuple[str, ...]
    shapes: frozenset[Size]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for the folder and one line for each failure and note."""
        done = f"{len(self.predicted)} images predicted, {in_words(self.shapes)}"
        return "\n".join([f"{done}; {len(self.failures)} failed", *self.failures, *self.notes])


def predict_folder(
    predict: Predictor,
    classes: ClassTable,
    input_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    inputs_of: Callable[[pathlib.Path, Size], dict[str, np.ndarray]] | None = None,
    overlays: bool = True,
    probabilities: bool = False,
) -> Summary:
    """Predicts one image or all images of a folder, each at its own size.

    Tasks that label pixels write ``labels/NAME.png``, a palette PNG of class ids with the size of
    the image, and ``probabilities/NAME.npz``, float16 [H, W, C] with the key "probabilities". Tasks
    that predict objects write masks and ``results.json`` in COCO's format, and on request
    cut-outs; see `dense_jax.infer.instances.Instances.save`. All tasks write
    ``overlays/NAME.png``, ``legend.png`` and ``classes.json``.

    Images run one at a time, since reading and writing files takes longer than the network. Pixels
    stay as stored: the EXIF orientation is not applied, so labels always fit their image file. A
    note names the images that have one.

    Args:
      predict: predicts one image.
      classes: names and colours of the C classes.
      input_path: an image, or a folder of images; its sub-folders are ignored.
      output_dir: made if it does not exist; old predictions in it are replaced.
      inputs_of: (path of an image, its height and width) -> the task's other inputs.
      overlays: write the images with the predictions on top.
      probabilities: write the softmax of the logits.

    Returns:
      A summary; it lists bad files as failures.

    Raises:
      UserError: there is no image, or the output cannot be written.
    """
    given, target = (pathlib.Path(path).resolve() for path in (input_path, output_dir))
    refuse(
        target == (given.parent if given.is_file() else given),
        f"--output={output_dir} is the folder of the images: give another, so that results are "
        "never taken for images",
    )
    sizes, failures = _read_sizes(find_images(pathlib.Path(input_path)))
    shape_of = predict.shapes_of(sizes.values())
    tell_if_many(shape_of, predict.shapes)
    output, palette = pathlib.Path(output_dir), classes.palette()
    predicted, shapes, results, orientations = [], set(), [], {}
    remarks: dict[str, list[str]] = {}
    has_results = inputs_of is not None
    try:
        output.mkdir(parents=True, exist_ok=True)
        runs.write_json(output / "classes.json", classes.to_json())
        runs.write_png(output / "legend.png", viz.legend(classes.names, palette))
        for path, size in tqdm.tqdm(sizes.items(), unit="image", disable=None):
            try:
                image = decode_image(path.read_bytes(), path)
                inputs = inputs_of(path, size) if inputs_of else {}
            except UserError as error:
                failures.append(str(error))
                continue
            orientations[path.name] = image.orientation
            prediction = predict(image.pixels, shape_of[size], **inputs)
            entries = prediction.save(output, path.stem, probabilities=probabilities)
            if entries is not None:
                has_results = True
                results += [{"file_name": path.name, **entry} for entry in entries]
            if overlays:
                runs.make_inner_folder(output / "overlays")
                runs.write_png(output / "overlays" / f"{path.stem}.png", prediction.overlay())
            if prediction.remark:
                remarks.setdefault(prediction.remark, []).append(path.name)
            predicted.append(path)
            shapes.add(shape_of[size])
        if has_results:
            runs.write_json(output / "results.json", results)
    except OSError as error:
        raise UserError(
            f"cannot write to {output} ({error.strerror}): give another folder"
        ) from error
    notes = [*turned_in_words(orientations), *map(_in_words, remarks.values(), remarks)]
    failed = tuple(map(printable, failures))
    return Summary(tuple(predicted), failed, frozenset(shapes), tuple(map(printable, notes)))


def _in_words(names: list[str], remark: str) -> str:
    """Returns a remark on some images in one line."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}: {remark}"


def read_images(path: pathlib.Path) -> Iterator[Example | UserError]:
    """Yields name and image of each file of `find_images`, or what is wrong with it."""
    sizes, failures = _read_sizes(find_images(path))
    yield from map(UserError, failures)
    for file in sizes:
        try:
            yield {"name": file.stem, "image": decode_image(file.read_bytes(), file).pixels}
        except UserError as error:
            yield error
        except OSError as error:
            yield UserError(f"{file} cannot be read ({error.strerror}): give an image")


def find_images(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns the image at a path, or the images in the folder there.

    Raises:
      UserError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give an image or a folder of images")
    images = pictures_of_any_name(path)
    if not images:
        raise UserError(f"{path} has no images: give a folder with {', '.join(SUFFIXES)}")
    return images


def _read_sizes(
    paths: list[pathlib.Path],
) -> tuple[dict[pathlib.Path, tuple[int, int]], list[str]]:
    """Returns height and width of each image from its header, and one line for each bad file."""
    sizes: dict[pathlib.Path, tuple[int, int]] = {}
    failures = []
    owners: dict[str, pathlib.Path] = {}
    for path in paths:
        try:
            check_name(path)
        except UserError as error:
            failures.append(str(error))
            continue
        owner = owners.setdefault(path.stem, path)
        if owner != path:
            failures.append(f"{path}: its output would replace that of {owner.name}; rename it")
            continue
        try:
            if not path.is_file():  # a pipe would wait for ever
                failures.append(f"{path}: not a file; remove it")
                continue
            with Image.open(path, formats=FORMATS) as image:
                sizes[path] = (image.height, image.width)
        except Image.DecompressionBombError as error:
            failures.append(f"{path}: {too_large(error)}")
        except (OSError, SyntaxError, ValueError):  # Pillow raises all three
            failures.append(f"{path}: not an image or damaged; restore or remove it")
    return sizes, failures
