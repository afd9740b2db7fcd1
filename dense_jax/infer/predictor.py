"""Labels a folder of images and writes files for people and programs."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from PIL import Image

from dense_jax import viz
from dense_jax.data.classes import ClassTable
from dense_jax.data.files import decode_image
from dense_jax.data.padded import MAX_SHAPES, SIZE_MULTIPLE, cut, padded_shapes, prepare
from dense_jax.errors import UserError

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result for a folder.

    Attributes:
      predicted: the labelled images.
      failures: one line for each other image, with its path and the reason.
      shapes: the padded sizes (height, width) at which the network ran, each compiled once.
    """

    predicted: tuple[pathlib.Path, ...]
    failures: tuple[str, ...]
    shapes: frozenset[tuple[int, int]]

    def __str__(self) -> str:
        """One line for the folder and one line for each failure."""
        shapes = ", ".join(f"{height}x{width}" for height, width in sorted(self.shapes))
        done = f"{len(self.predicted)} images labelled" + (
            f", padded to {shapes}" if shapes else ""
        )
        return "\n".join([f"{done}; {len(self.failures)} failed", *self.failures])


def predict_folder(
    predict_fn: Callable[[np.ndarray, np.ndarray], jax.Array],
    classes: ClassTable,
    normalisation: str,
    input_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    overlays: bool = True,
    probabilities: bool = False,
    size_multiple: int = SIZE_MULTIPLE,
    max_shapes: int = MAX_SHAPES,
) -> Summary:
    """Labels one image or all images of a folder, each at its own size.

    Writes ``labels/NAME.png`` (palette PNG of class ids, size of the image),
    ``overlays/NAME.png``, ``probabilities/NAME.npz`` (key "probabilities", float16 [H, W, C]),
    ``legend.png`` and ``classes.json``. Images run one at a time, because reading and writing files
    takes longer than the network. As in evaluation, they are padded at the bottom and on the right
    with the mean colour to one of a few shapes. Pixels are read as stored and the orientation in
    the EXIF data is ignored, so that a label always matches its file.

    Args:
      predict_fn: (images float32 [1, H, W, channels], sizes int32 [1, 2] before padding) to logits
        [1, H, W, C].
      classes: names and colours of the C classes.
      normalisation: a name in `dense_jax.data.normalise.NORMALISATIONS`.
      input_path: an image, or a folder of images (without its sub-folders).
      output_dir: made if it does not exist; earlier predictions in it are replaced.
      overlays: write the image tinted by its labels.
      probabilities: write the softmax of the logits.
      size_multiple: padded heights and widths are multiples of this, in pixels.
      max_shapes: the largest number of padded shapes.

    Returns:
      A summary; a bad file becomes one of its failures.

    Raises:
      UserError: there is no image, or the output cannot be written.
    """
    sizes, failures = _read_sizes(_find_images(pathlib.Path(input_path)))
    shape_of = padded_shapes(sizes.values(), size_multiple, max_shapes)
    output, palette = pathlib.Path(output_dir), classes.palette()
    predicted, shapes = [], set()
    try:
        for folder in ["labels"] + ["overlays"] * overlays + ["probabilities"] * probabilities:
            (output / folder).mkdir(parents=True, exist_ok=True)
        (output / "classes.json").write_text(json.dumps(classes.to_json(), indent=2) + "\n")
        Image.fromarray(viz.legend(classes.names, palette)).save(output / "legend.png")
        for path, size in tqdm.tqdm(sizes.items(), unit="image", disable=None):
            try:
                image = decode_image(path.read_bytes(), path)
            except UserError as error:
                failures.append(str(error))
                continue
            shape = shape_of[size]
            logits = predict_fn(*prepare(image, normalisation, shape))
            if logits.shape != (1, *shape, classes.num_classes):
                raise ValueError(f"predict_fn gave {logits.shape} for an image padded to {shape}")
            labels = cut(jnp.argmax(logits[0], axis=-1), size)
            viz.save_label_png(output / "labels" / f"{path.stem}.png", labels, palette)
            if overlays:
                tinted = Image.fromarray(viz.overlay(image, labels, palette))
                tinted.save(output / "overlays" / f"{path.stem}.png")
            if probabilities:
                soft = cut(jax.nn.softmax(logits[0]), size).astype(np.float16)
                np.savez_compressed(output / "probabilities" / path.stem, probabilities=soft)
            predicted.append(path)
            shapes.add(shape)
    except OSError as error:
        raise UserError(
            f"cannot write to {output} ({error.strerror}): give another folder"
        ) from error
    return Summary(tuple(predicted), tuple(failures), frozenset(shapes))


def _find_images(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give an image or a folder of images")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
    if not found:
        raise UserError(f"{path} has no images: give a folder with {', '.join(sorted(_SUFFIXES))}")
    return found


def _read_sizes(
    paths: list[pathlib.Path],
) -> tuple[dict[pathlib.Path, tuple[int, int]], list[str]]:
    """Returns height and width of each image, from its header, and one line for each bad file."""
    sizes: dict[pathlib.Path, tuple[int, int]] = {}
    failures = []
    owners: dict[str, pathlib.Path] = {}
    for path in paths:
        owner = owners.setdefault(path.stem, path)
        if owner != path:
            failures.append(f"{path}: its output would replace that of {owner.name}; rename it")
            continue
        try:
            with Image.open(path) as image:
                sizes[path] = (image.height, image.width)
        except Image.DecompressionBombError:
            failures.append(f"{path}: the image is too large to open; crop it")
        except (OSError, SyntaxError, ValueError):  # Pillow raises all three
            failures.append(f"{path}: not an image or damaged; restore or remove it")
    return sizes, failures
