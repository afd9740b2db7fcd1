"""Predicted objects of an image: boxes, classes, masks, keypoints, scores; drawn and as files."""

import dataclasses
import functools
import pathlib
import re
from typing import Any

import numpy as np

from dense_jax import runs, viz
from dense_jax.data import rle
from dense_jax.data.box_masks import paste
from dense_jax.data.classes import ClassTable, voc_colours
from dense_jax.data.keypoints import to_coco
from dense_jax.infer import pasting
from dense_jax.infer.pasting import Convention

_COLOURS = 20


def object_colours(count: int) -> np.ndarray:
    """Returns colours that tell objects apart, uint8 [count, 3]; the 21st is the first again."""
    palette = np.array(voc_colours(1 + _COLOURS)[1:], np.uint8)
    return palette[np.arange(count) % _COLOURS]


@dataclasses.dataclass(frozen=True)
class Instances:
    """The objects of an image, the highest score first.

    Attributes:
      image: uint8 [H, W, 3].
      boxes: float32 [N, 4], x0 y0 x1 y1 in pixels, from outer edge to outer edge.
      class_ids: int32 [N], ids in `classes`.
      scores: float32 [N] in [0, 1].
      classes: names and colours.
      heatmaps: float32 [N, S, S], the probability that a cell of the box lies in the object; None
        if only boxes are predicted.
      threshold: a pixel belongs to a mask if its probability is at least this.
      convention: how heat maps are pasted; see `dense_jax.infer.pasting`. None: each pixel takes
        the cell that contains its centre.
      keypoints: float32 [N, K, 3], x and y in pixels, and the logit, of the names in
        `classes.keypoints`; None if none are predicted.
      shown_score: pictures show objects of at least this score; results list all.
      cutouts: whether `save` also cuts the shown objects out.
    """

    image: np.ndarray
    boxes: np.ndarray
    class_ids: np.ndarray
    scores: np.ndarray
    classes: ClassTable
    heatmaps: np.ndarray | None = None
    threshold: float = 0.5
    convention: Convention | None = None
    keypoints: np.ndarray | None = None
    shown_score: float = 0.0
    cutouts: bool = False

    def __len__(self) -> int:
        return len(self.boxes)

    def above(self, score: float) -> "Instances":
        """Returns the objects of at least this score; their numbers stay the same."""
        count = int(np.sum(self.scores >= score))  # the highest are first
        own = {
            name: None if (rows := getattr(self, name)) is None else rows[:count]
            for name in ("boxes", "class_ids", "scores", "heatmaps", "keypoints")
        }
        return dataclasses.replace(self, **own)

    @functools.cached_property
    def _shown(self) -> "Instances":
        return self.above(self.shown_score)

    @property
    def remark(self) -> str:
        """What pictures leave out, if they show nothing of what was found."""
        if len(self._shown) or not len(self):
            return ""
        return (
            f"all objects have scores below {self.shown_score:g}, so that results.json alone has "
            "them; give a lower --shown-score"
        )

    @functools.cached_property
    def masks(self) -> np.ndarray | None:
        """The pixels of each object, bool [N, H, W]; None if only boxes are predicted."""
        if self.heatmaps is None:
            return None
        pasted = [self.mask(i) for i in range(len(self))]
        return np.stack(pasted) if pasted else np.zeros((0, *self.image.shape[:2]), bool)

    def mask(self, index: int) -> np.ndarray:
        """Returns the pixels of an object, bool [H, W]."""
        assert self.heatmaps is not None
        heatmap, box, size = self.heatmaps[index], self.boxes[index], self.image.shape[:2]
        if self.convention is None:
            return paste(heatmap, box, size) >= self.threshold
        return pasting.paste(heatmap, box, size, self.convention).mask(size, self.threshold)

    def overlay(self) -> np.ndarray:
        """Returns the image with box, name, score, mask and keypoints of each shown object."""
        shown, table = self._shown, self.classes.keypoints
        points = shown.keypoints
        if table and points is not None:
            points = table.only(points, shown.class_ids)
        return viz.objects(
            self.image,
            shown.boxes,
            shown.class_ids,
            self.classes.names,
            object_colours(len(shown)),
            scores=shown.scores,
            masks=shown.masks,
            keypoints=points,
            edges=table.edges if table else (),
        )

    def results(self) -> list[dict[str, Any]]:
        """Returns the objects in COCO's results format (box, class, mask, ...), without image.

        "keypoints" are COCO's numbers, which are those of pixels; "keypoint_scores" are logits.
        """
        rows, table = [], self.classes.keypoints
        has_keypoints = table.have(self.class_ids) if table else np.ones(len(self), bool)
        for i, (x0, y0, x1, y1) in enumerate(self.boxes):
            row: dict[str, Any] = {
                "category_id": int(self.class_ids[i]),
                "bbox": [round(float(x), 2) for x in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(float(self.scores[i]), 6),
            }
            if self.heatmaps is not None:
                row["segmentation"] = rle.encode(self.mask(i))
            if self.keypoints is not None and has_keypoints[i]:
                row["keypoints"] = to_coco(self.keypoints[i])
                row["keypoint_scores"] = [round(float(x), 4) for x in self.keypoints[i, :, 2]]
            rows.append(row)
        return rows

    def save(self, folder: pathlib.Path, stem: str, *, probabilities: bool) -> list[dict[str, Any]]:
        """Writes ``masks/STEM.png``, if there are masks, and returns the results.

        Its pixels are the numbers of the shown objects, from 1 in the order of the results; the
        highest score is on top. With ``probabilities``, it also writes the heat maps of all objects
        (float16) to ``probabilities/STEM.npz``. With `cutouts`, ``cutouts/STEM/NUMBER_CLASS.png``
        are the shown objects alone, transparent around their masks.
        """
        if self.cutouts:
            self._cut_out(folder / "cutouts", stem)
        if self.heatmaps is None:
            return self.results()
        runs.make_inner_folder(folder / "masks")
        numbers = np.zeros(self.image.shape[:2], np.uint16)
        for i in reversed(range(len(self._shown))):
            numbers[self.mask(i)] = i + 1
        runs.write_png(folder / "masks" / f"{stem}.png", numbers)
        if probabilities:
            runs.make_inner_folder(folder / "probabilities")
            with runs.replacing(folder / "probabilities" / f"{stem}.npz") as stream:
                heatmaps = self.heatmaps.astype(np.float16)
                np.savez_compressed(stream, boxes=self.boxes, heatmaps=heatmaps)
        return self.results()

    def _cut_out(self, folder: pathlib.Path, stem: str) -> None:
        runs.make_inner_folder(folder)
        runs.make_inner_folder(folder / stem)
        for old in (folder / stem).glob("*.png"):
            old.unlink()
        for i in range(len(self._shown)):
            if self.heatmaps is None:
                mask = np.zeros(self.image.shape[:2], bool)
                x0, y0 = np.floor(self.boxes[i, :2]).astype(int).clip(0)
                x1, y1 = np.ceil(self.boxes[i, 2:]).astype(int).clip(0)
                mask[y0:y1, x0:x1] = True
            else:
                mask = self.mask(i)
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            if not len(rows):
                continue
            window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            alpha = np.where(mask, 255, 0).astype(np.uint8)
            name = re.sub(r"[^\w-]+", "-", self.classes.names[self.class_ids[i]])
            picture = np.dstack([self.image, alpha])[window]
            runs.write_png(folder / stem / f"{i + 1}_{name}.png", picture)
