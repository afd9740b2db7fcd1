"""Windows of images as training examples: single objects, and proposals around objects.

A box is (x0, y0, x1, y1) in whole pixels, as in `dense_jax.ops.boxes`, and may leave the image.
Windows are cut from uint8 images, so `Resize` and `Normalise` come afterwards.

Reference: Noh, Hong, Han, "Learning deconvolution network for semantic segmentation", ICCV 2015,
arXiv:1505.04366, Section 4.2 (two-stage training) and the released window lists' enlargement.
"""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tqdm

from dense_jax.data import objects as object_lib
from dense_jax.data import proposals as proposal_file
from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.dataset import Example, Source
from dense_jax.data.normalise import num_channels, to_uint8
from dense_jax.errors import UserError, refuse
from dense_jax.ops import boxes as box_ops

Box = tuple[int, int, int, int]

_CELLS = (2, 3, 4, 6)  # cells along each axis of the grids of `relative_windows`
_NUM_JITTERED = 8  # random boxes for each object
_JITTER = 0.25  # largest shift of an edge, as a share of the object's width or height


@dataclasses.dataclass(frozen=True)
class Window:
    """A part of an image.

    Attributes:
      index: of the image in its split.
      name: of the image.
      box: the part.
      label: class id of the object that the window is for.
      object_id: number of this object; see `dense_jax.data.objects.number`.
    """

    index: int
    name: str
    box: Box
    label: int
    object_id: int


@dataclasses.dataclass(frozen=True)
class Crops:
    """A `Source` with one example for each window of a split.

    Outside the image, a window has the colour `fill` and the ignore label.

    Attributes:
      source: the split.
      windows: one for each example.
      fill: R, G, B.
      background: label for all other objects, so that an example shows one object alone; None
        keeps their labels.
    """

    source: Source
    windows: Sequence[Window]
    fill: tuple[int, int, int]
    background: int | None = None

    def __len__(self) -> int:
        return len(self.windows)

    def size(self, index: int) -> tuple[int, int]:
        """Returns the height and width of a window."""
        x0, y0, x1, y1 = self.windows[index].box
        return y1 - y0, x1 - x0

    def __getitem__(self, index: int) -> Example:
        window = self.windows[index]
        example = self.source[window.index]
        label = example["label"]
        if self.background is not None:
            is_other = object_lib.number(example, self.background) != window.object_id
            is_other &= label != IGNORE_LABEL
            label = np.where(is_other, np.uint8(self.background), label)
        return {
            "image": cut(example["image"], window.box, self.fill),
            "label": cut(label, window.box, IGNORE_LABEL),
            "name": f"{window.name} {window.box}",
        }


def cut(array: np.ndarray, box: Box, fill: int | Sequence[int]) -> np.ndarray:
    """Returns a part of an array: [H, W, ...] to [y1 - y0, x1 - x0, ...], `fill` outside."""
    (x0, y0, x1, y1), (height, width) = box, array.shape[:2]
    result = np.empty((y1 - y0, x1 - x0, *array.shape[2:]), array.dtype)
    result[...] = fill
    top, left, bottom, right = max(y0, 0), max(x0, 0), min(y1, height), min(x1, width)
    if top < bottom and left < right:
        result[top - y0 : bottom - y0, left - x0 : right - x0] = array[top:bottom, left:right]
    return result


def find_objects(source: Source, background: int | None, min_side: int = 8) -> list[Window]:
    """Reads a split and returns the tight box of every object, image by image.

    Args:
      source: the split.
      background: the class that is not an object, or None.
      min_side: objects with a side shorter than this, in pixels, are left out.

    Raises:
      UserError: the split has no objects.
    """
    windows = []
    for index in tqdm.trange(len(source), desc="looking for objects", unit="image", disable=None):
        example = source[index]
        found = object_lib.find(
            example, background, min_side=min_side, background_votes=True, masks=False
        )
        for box, label, number in zip(found.boxes, found.classes, found.ids, strict=True):
            windows.append(Window(index, example["name"], _box(box), int(label), int(number)))
    if not windows:
        raise UserError(
            f"no image shows an object of at least {min_side} x {min_side} pixels: "
            "train on whole images with --stages=whole"
        )
    return windows


def enlarge(box: Box, factor: float) -> Box:
    """Returns the box enlarged `factor` times around its centre."""
    grow_x, grow_y = (round((b - a) * (factor - 1) / 2) for a, b in (box[::2], box[1::2]))
    return box[0] - grow_x, box[1] - grow_y, box[2] + grow_x, box[3] + grow_y


def enlarged(windows: Iterable[Window], factor: float) -> list[Window]:
    """Returns the windows with enlarged boxes; see `enlarge`."""
    return [dataclasses.replace(w, box=enlarge(w.box, factor)) for w in windows]


def relative_windows() -> np.ndarray:
    """Returns windows, int [39, 4], in twelfths of an image's width and height, largest first.

    Each has 2 x 2 cells of a grid of 2 x 2 to 6 x 6 cells: the whole image, then windows with two
    thirds, half and a third of its sides, in steps of half a window.
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
    """Returns the proposals that overlap an object enough, with the class of the object.

    Args:
      source: the split.
      objects: from `find_objects`.
      min_iou: least intersection over union with an object of the image; the best object counts.
      seed: of the random boxes.
      boxes: proposals by image name; None takes sliding windows and the objects' boxes with
        randomly moved edges, a function of the seed and the image alone.

    Raises:
      UserError: an image with objects has no proposals, or no proposal overlaps enough.
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
            candidates = np.array(proposal_file.of_image(boxes, found[0].name), int).reshape(-1, 4)
        overlaps = box_ops.iou(candidates, truth)
        for box, row in zip(candidates, overlaps, strict=True):
            if row.max() >= min_iou:
                best = found[int(row.argmax())]
                windows.append(dataclasses.replace(best, box=_box(box)))
    if not windows:
        raise UserError(f"no proposal overlaps an object by {min_iou}: lower --min-iou")
    return windows


def _jittered(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns boxes [N * _NUM_JITTERED, 4]; the first box of each object is not moved."""
    sides = np.tile(truth[:, 2:] - truth[:, :2], (1, 2))
    shifts = rng.uniform(-_JITTER, _JITTER, (_NUM_JITTERED, len(truth), 4))
    shifts[0] = 0
    moved = np.rint(truth + shifts * sides).astype(int).transpose(1, 0, 2).reshape(-1, 4)
    return moved[(moved[:, :2] < moved[:, 2:]).all(axis=1)]


def balance(windows: Sequence[Window]) -> list[Window]:
    """Repeats the windows of rare classes until each class has about the median number.

    The authors repeat rare classes too and do not say how often.
    """
    counts = Counter(window.label for window in windows)
    median = np.median(list(counts.values()))
    return [w for w in windows for _ in range(max(1, round(median / counts[w.label])))]


def read_proposals(path: str | os.PathLike[str]) -> dict[str, list[Box]]:
    """Reads proposals, rounded to whole pixels; see `dense_jax.data.proposals`.

    Raises:
      UserError: the file cannot be read, or a box is not valid.
    """
    rounded = {name: np.rint(boxes) for name, boxes in proposal_file.read(path).items()}
    for name, boxes in rounded.items():
        refuse(
            not (boxes[:, :2] < boxes[:, 2:]).all(),
            f"{path}: a box of {name!r} is smaller than a pixel; leave it out",
        )
    return {name: [_box(row) for row in boxes] for name, boxes in rounded.items()}


def _box(row: np.ndarray) -> Box:
    x0, y0, x1, y1 = (int(edge) for edge in row)
    return x0, y0, x1, y1


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
        names = [source[i]["name"] for i in range(len(source))]
        boxes = [proposal_file.of_image(table, name) for name in names]
    else:
        boxes = [[] for _ in range(len(source))]
        for found in find_objects(source, background):
            boxes[found.index].append(found.box)
    return [[enlarge(box, factor) for box in of_image] for of_image in boxes]
