"""Windows of images as training examples: single objects, and proposals around objects.

A box is (x1, y1, x2, y2) in pixels, between pixels: x2 - x1 is its width, and it may leave the
image. Windows are cut from uint8 images, so `Resize` and `Normalise` come afterwards.

Reference: Noh, Hong, Han, "Learning deconvolution network for semantic segmentation", ICCV 2015,
arXiv:1505.04366, Section 4.2 (two-stage training) and the released window lists' enlargement.
"""

import dataclasses
import itertools
import json
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from scipy import ndimage

from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.dataset import Example, Source
from dense_jax.data.transforms import num_channels, to_uint8
from dense_jax.errors import UserError

Box = tuple[int, int, int, int]

_CELLS = (2, 3, 4, 6)  # of the grids of `relative_windows`, an axis
_NUM_JITTERED = 8  # random boxes for each object
_JITTER = 0.25  # how far an edge moves at most, as a share of the object's width or height


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of an image.

    Attributes:
      index: position of the image in its split.
      name: name of the image.
      box: the part.
      label: class of the object for which it was chosen.
      object_id: that object in `object_map`.
    """

    index: int
    name: str
    box: Box
    label: int
    object_id: int


@dataclasses.dataclass(frozen=True)
class Crops:
    """Windows of a split as examples of their own: a `Source`.

    Outside of the image a window has the colour `fill` and labels that no loss counts.

    Attributes:
      source: the split.
      windows: an example each.
      fill: R, G, B.
      background: what other objects are labelled, so that an example shows one object alone; None
        keeps all labels.
    """

    source: Source
    windows: Sequence[Window]
    fill: tuple[int, int, int]
    background: int | None = None

    def __len__(self) -> int:
        return len(self.windows)

    def size(self, index: int) -> tuple[int, int]:
        """Returns the height and width of a window."""
        x1, y1, x2, y2 = self.windows[index].box
        return y2 - y1, x2 - x1

    def __getitem__(self, index: int) -> Example:
        window = self.windows[index]
        example = self.source[window.index]
        label = example["label"]
        if self.background is not None:
            is_other = object_map(example, self.background) != window.object_id
            is_other &= label != IGNORE_LABEL
            label = np.where(is_other, np.uint8(self.background), label)
        return {
            "image": cut(example["image"], window.box, self.fill),
            "label": cut(label, window.box, IGNORE_LABEL),
            "name": f"{window.name} {window.box}",
        }


def cut(array: np.ndarray, box: Box, fill: int | Sequence[int]) -> np.ndarray:
    """Returns the part [y2 - y1, x2 - x1, ...] of [H, W, ...], with `fill` outside of it."""
    (x1, y1, x2, y2), (height, width) = box, array.shape[:2]
    result = np.empty((y2 - y1, x2 - x1, *array.shape[2:]), array.dtype)
    result[...] = fill
    top, left, bottom, right = max(y1, 0), max(x1, 0), min(y2, height), min(x2, width)
    if top < bottom and left < right:
        result[top - y1 : bottom - y1, left - x1 : right - x1] = array[top:bottom, left:right]
    return result


def object_map(example: Example, background: int | None) -> np.ndarray:
    """Returns int32 [H, W], a number for each object and 0 elsewhere.

    Those of "instances" where the example has it; else each connected part (over edges) of the
    pixels of one class is an object. Without a background every class has objects.
    """
    if "instances" in example:
        return example["instances"]
    label = example["label"]
    result = np.zeros(label.shape, np.int32)
    for value in np.setdiff1d(label, [IGNORE_LABEL, *([] if background is None else [background])]):
        parts, _ = ndimage.label(label == value)
        np.add(result, parts + result.max(), out=result, where=parts > 0)
    return result


def find_objects(source: Source, background: int | None, min_side: int = 8) -> list[Window]:
    """Reads a split and returns the tight box of every object, image after image.

    Args:
      source: the split.
      background: the class that is no object, or None.
      min_side: objects with a shorter side than this, in pixels, are left out.

    Raises:
      UserError: there are none.
    """
    windows = []
    for index in tqdm.trange(len(source), desc="looking for objects", unit="image", disable=None):
        example = source[index]
        objects = object_map(example, background)
        for object_id, slices in enumerate(ndimage.find_objects(objects), 1):
            if slices is None:
                continue
            rows, columns = slices
            box = (columns.start, rows.start, columns.stop, rows.stop)
            labels = example["label"][slices][objects[slices] == object_id]
            counts = np.bincount(labels[labels != IGNORE_LABEL])
            if min(box[2] - box[0], box[3] - box[1]) < min_side or not counts.any():
                continue
            if (label := int(counts.argmax())) != background:
                windows.append(Window(index, example["name"], box, label, object_id))
    if not windows:
        raise UserError(
            f"no image shows an object of at least {min_side} x {min_side} pixels: "
            "train on whole images with --stages=whole"
        )
    return windows


def enlarge(box: Box, factor: float) -> Box:
    """Returns the box, `factor` times as wide and as high around the same centre."""
    grow_x, grow_y = (round((b - a) * (factor - 1) / 2) for a, b in (box[::2], box[1::2]))
    return box[0] - grow_x, box[1] - grow_y, box[2] + grow_x, box[3] + grow_y


def enlarged(windows: Iterable[Window], factor: float) -> list[Window]:
    """Returns the windows with enlarged boxes."""
    return [dataclasses.replace(w, box=enlarge(w.box, factor)) for w in windows]


def iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the intersection over the union of each two boxes, [N, 4] and [M, 4] to [N, M]."""
    boxes, others = boxes[:, None], others[None]
    sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(
        boxes[..., :2], others[..., :2]
    )
    both = np.prod(np.maximum(sides, 0), axis=-1)
    areas = [np.prod(b[..., 2:] - b[..., :2], axis=-1) for b in (boxes, others)]
    return both / (areas[0] + areas[1] - both)


def relative_windows() -> np.ndarray:
    """Returns windows, int [39, 4], in twelfths of an image's width and height, largest first.

    They are 2 x 2 cells of grids of 2 x 2 to 6 x 6 cells: the whole image, then two thirds, half
    and a third of its sides in steps of half a window.
    """
    return np.array(
        [
            (12 // n * x, 12 // n * y, 12 // n * (x + 2), 12 // n * (y + 2))
            for n in _CELLS
            for y, x in itertools.product(range(n - 1), repeat=2)
        ],
        np.int32,
    )


def sliding_windows(size: tuple[int, int]) -> np.ndarray:
    """Returns `relative_windows` of an image of `size` (height, width), in whole pixels."""
    sides = np.array([size[1], size[0], size[1], size[0]])
    return (relative_windows() * sides + 6) // 12


def propose(
    source: Source,
    objects: Sequence[Window],
    *,
    min_iou: float = 0.5,
    seed: int = 0,
    boxes: Mapping[str, Sequence[Box]] | None = None,
) -> list[Window]:
    """Returns the proposals that overlap an object enough; each takes the object's class.

    Args:
      source: the split.
      objects: from `find_objects`.
      min_iou: least intersection over union with the best of the image's objects.
      seed: of the random boxes.
      boxes: proposals by the name of the image; None: sliding windows, and the objects' own
        boxes with randomly moved edges, a function of the seed and of the image alone.

    Raises:
      UserError: the proposals of an image with objects are missing, or nothing overlaps enough.
    """
    windows = []
    for index, group in itertools.groupby(objects, key=lambda window: window.index):
        found = list(group)
        truth = np.array([window.box for window in found])
        if boxes is None:
            rng = np.random.default_rng([seed, index])
            candidates = np.concatenate(
                [_jittered(truth, rng), sliding_windows(source.size(index))]
            )
        else:
            candidates = np.array(boxes_of(boxes, found[0].name), int).reshape(-1, 4)
        overlaps = iou(candidates, truth)
        for box, row in zip(candidates, overlaps, strict=True):
            if row.max() >= min_iou:
                best = found[int(row.argmax())]
                windows.append(dataclasses.replace(best, box=_box(box)))
    if not windows:
        raise UserError(f"no proposal overlaps an object by {min_iou}: lower --min-iou")
    return windows


def _jittered(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns boxes [N * _NUM_JITTERED, 4], the first of each object's not moved."""
    sides = np.tile(truth[:, 2:] - truth[:, :2], (1, 2))
    shifts = rng.uniform(-_JITTER, _JITTER, (_NUM_JITTERED, len(truth), 4))
    shifts[0] = 0
    moved = np.rint(truth + shifts * sides).astype(int).transpose(1, 0, 2).reshape(-1, 4)
    return moved[(moved[:, :2] < moved[:, 2:]).all(axis=1)]


def balance(windows: Sequence[Window]) -> list[Window]:
    """Repeats the windows of rare classes, as often as brings a class up to the median.

    The authors repeat rare classes too, without saying how often.
    """
    counts = Counter(window.label for window in windows)
    median = np.median(list(counts.values()))
    return [w for w in windows for _ in range(max(1, round(median / counts[w.label])))]


def read_proposals(path: str | os.PathLike[str]) -> dict[str, list[Box]]:
    """Reads proposals: JSON ``{"image name": [[x1, y1, x2, y2], ...], ...}``, best boxes first.

    Names are those of the dataset (of most, the file's name without its ending); numbers are
    pixels, rounded to whole ones, with x1 < x2 and y1 < y2.

    Raises:
      UserError: the file cannot be read, or a box is none.
    """
    try:
        entries = json.loads(pathlib.Path(path).read_text())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give --proposals=FILE"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): see dense_jax/data/crops.py") from error
    if not isinstance(entries, dict):
        raise UserError(f'{path} holds no object {{"image name": boxes}}: write one')
    return {name: _parse(name, boxes, path) for name, boxes in entries.items()}


def boxes_of(boxes: Mapping[str, Sequence[Box]], name: str) -> list[Box]:
    """Returns the proposals of an image.

    Raises:
      UserError: there is no list of its name.
    """
    if name not in boxes:
        raise UserError(f"--proposals: no boxes for image {name!r}; add its list to the file")
    return list(boxes[name])


def _parse(name: str, boxes: Any, path: str | os.PathLike[str]) -> list[Box]:
    try:
        array = np.rint(np.array(boxes, float).reshape(-1, 4))
        if not (array[:, :2] < array[:, 2:]).all():
            raise ValueError
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: a box of {name!r} is not [x1, y1, x2, y2] with x1 < x2, y1 < y2; correct it"
        ) from error
    return [_box(row) for row in array]


def _box(row: np.ndarray) -> Box:
    x1, y1, x2, y2 = (int(edge) for edge in row)
    return x1, y1, x2, y2


def training_windows(
    source: Source,
    *,
    background: int | None,
    single_objects: bool,
    proposals: str | None,
    min_iou: float,
    factor: float,
    is_balanced: bool,
    seed: int,
    normalisation: str,
) -> Crops:
    """Returns a split's windows of one stage of training (Sections 4.2 and 6.1).

    Args:
      source: the split.
      background: class that is no object; None: every class has objects.
      single_objects: windows around single objects, whose neighbours count as background (stage 1);
        else proposals that overlap an object (stage 2).
      proposals: JSON file of boxes for stage 2; None: object boxes moved at random, and sliding
        windows.
      min_iou: least overlap of a proposal with an object.
      factor: windows are this much wider and higher than their boxes.
      is_balanced: repeat the windows of rare classes.
      seed: of what is drawn.
      normalisation: its mean colour fills windows outside of the image.

    Raises:
      UserError: there is no object, no proposal overlaps one, or the file lacks an image.
    """
    windows = find_objects(source, background)
    if not single_objects:
        boxes = read_proposals(proposals) if proposals else None
        windows = propose(source, windows, min_iou=min_iou, seed=seed, boxes=boxes)
    windows = enlarged(windows, factor)
    mean = to_uint8(np.zeros(num_channels(normalisation)), normalisation)
    fill = (int(mean[0]), int(mean[1]), int(mean[2]))
    kept = balance(windows) if is_balanced else windows
    return Crops(source, kept, fill, background if single_objects else None)


def known_boxes(
    source: Source, *, proposals: str | None, background: int | None, factor: float
) -> list[list[Box]]:
    """Returns the enlarged boxes of each image of a split: those of a file, or of its objects.

    Args:
      source: the split.
      proposals: JSON file of boxes, best first; None takes those of objects.
      background: class that is no object; None: every class has objects.
      factor: boxes become this much wider and higher.

    Raises:
      UserError: the file of proposals lacks an image.
    """
    if proposals:
        table = read_proposals(proposals)
        boxes = [boxes_of(table, source[i]["name"]) for i in range(len(source))]
    else:
        boxes = [[] for _ in range(len(source))]
        for found in find_objects(source, background):
            boxes[found.index].append(found.box)
    return [[enlarge(box, factor) for box in of_image] for of_image in boxes]
