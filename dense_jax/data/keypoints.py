"""Keypoints: their names and lines in a dataset, and where they are on the objects of an image.

Coordinates are those of boxes: edges of pixels, so that the centre of the first one is (0.5, 0.5).
COCO's files number pixels instead; `from_coco` and `to_coco` are half a pixel apart.

Reference: T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014,
arXiv:1405.0312; https://cocodataset.org/#format-data and #keypoints-eval.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}
_SIDE = re.compile(r"left|right|(?<![^\W_])[lr](?![^\W_])", re.IGNORECASE)
# How far people who annotate differ from each other, as a share of the object's size.
_SIGMAS = {
    "nose": 0.026, "eye": 0.025, "ear": 0.035, "shoulder": 0.079, "elbow": 0.072, "wrist": 0.062,
    "hip": 0.107, "knee": 0.087, "ankle": 0.089,
}  # fmt: skip
_SIGMA = 0.05  # of any other keypoint


@dataclasses.dataclass(frozen=True)
class KeypointTable:
    """The keypoints that objects of a dataset have.

    Attributes:
      names: the name of each of the K keypoints.
      edges: pairs of their numbers from 0, between which pictures have a line.
      classes: ids of the classes whose objects have keypoints; (): all.

    Raises:
      ValueError: there are no names, or one occurs twice, or an edge has another end.
    """

    names: Sequence[str]
    edges: Sequence[tuple[int, int]] = ()
    classes: Sequence[int] = ()

    def __post_init__(self):
        names = tuple(self.names)
        if not all(isinstance(name, str) for name in names) or isinstance(self.names, str):
            raise ValueError(f"names of keypoints are a list of text, got {self.names!r}")
        edges = tuple((int(a), int(b)) for a, b in self.edges)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"names of keypoints must differ, got {', '.join(names) or 'none'}")
        if wrong := [edge for edge in edges if not 0 <= min(edge) <= max(edge) < len(names)]:
            raise ValueError(
                f"a line from keypoint {wrong[0][0] + 1} to {wrong[0][1] + 1} of {len(names)}"
            )
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "classes", tuple(map(int, self.classes)))

    def __len__(self) -> int:
        return len(self.names)

    def have(self, class_ids: np.ndarray) -> np.ndarray:
        """Returns whether objects of classes [N] have keypoints, bool [N]."""
        if not self.classes:
            return np.ones(len(class_ids), bool)
        return np.isin(class_ids, self.classes)

    def only(self, keypoints: np.ndarray, class_ids: np.ndarray) -> np.ndarray:
        """Returns keypoints [N, K, 3] that are not known (0) for other classes."""
        return np.where(self.have(class_ids)[:, None, None], keypoints, np.float32(0))

    @property
    def mirror(self) -> np.ndarray:
        """The number of the keypoint that each becomes in a mirror, int64 [K], by left and right.

        One without a partner, such as a nose, stays itself.
        """
        place = {name: i for i, name in enumerate(self.names)}
        return np.array([place.get(_other_side(name), i) for i, name in enumerate(self.names)])

    @property
    def sigmas(self) -> np.ndarray:
        """COCO's tolerance of each keypoint, float64 [K]; 0.05 for one that COCO does not have."""
        words = (_SIDE.sub("", name).strip("_ ").lower() for name in self.names)
        return np.array([_SIGMAS.get(word, _SIGMA) for word in words])


def _other_side(name: str) -> str:
    def other(found: re.Match[str]) -> str:
        word = _OTHER_SIDE[found[0].lower()]
        return (
            word.upper() if found[0].isupper() else word.title() if found[0][0].isupper() else word
        )

    return _SIDE.sub(other, name)


@dataclasses.dataclass(frozen=True)
class Keypoints:
    """The keypoints of the N objects of an image.

    Attributes:
      points: float32 [N, K, 3]: x and y in pixels, and 0 (not labelled; x and y are then 0), 1
        (labelled but hidden) or 2 (visible).
      mirror: int64 [K], see `KeypointTable.mirror`.
    """

    points: np.ndarray
    mirror: np.ndarray

    def select(self, index: np.ndarray) -> Self:
        """Returns those of the objects at some indices, or where a bool [N] is True."""
        return dataclasses.replace(self, points=self.points[index])

    def flip(self, width: int) -> Self:
        """Returns those of an image of `width` that was flipped left and right."""
        x = self.points[..., :1]
        flipped = np.concatenate([width - x, self.points[..., 1:]], axis=-1)
        return self._moved(flipped[:, self.mirror])

    def scale(self, factors: tuple[float, float]) -> Self:
        """Returns those of an image whose height and width were multiplied by factors."""
        return self._moved(self.points * np.array([factors[1], factors[0], 1], np.float32))

    def window(self, top: int, left: int, size: tuple[int, int]) -> Self:
        """Returns those in a window of an image; what is outside of it is no longer labelled."""
        points = self.points - np.array([left, top, 0], np.float32)
        limits = np.array([size[1], size[0]], np.float32)
        inside = np.all((points[..., :2] >= 0) & (points[..., :2] <= limits), axis=-1)
        return self._moved(points * inside[..., None])

    def _moved(self, points: np.ndarray) -> Self:
        labelled = points[..., 2:] > 0
        return dataclasses.replace(self, points=np.where(labelled, points, 0).astype(np.float32))

    def to_json(self) -> dict[str, Any]:
        """Returns lists that `from_json` reads."""
        return {"points": self.points.tolist(), "mirror": self.mirror.tolist()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Reads the result of `to_json`."""
        mirror = np.array(fields["mirror"], np.int64)
        points = np.array(fields["points"], np.float32).reshape(-1, len(mirror), 3)
        return cls(points, mirror)


def from_coco(numbers: Sequence[float], count: int) -> np.ndarray:
    """Returns the keypoints of one annotation, float32 [K, 3], from COCO's list of 3 K numbers.

    Raises:
      ValueError: the list is of another length, or a number is not finite, or a visibility is not
        0, 1 or 2.
    """
    points = np.array(numbers, np.float32)
    if points.shape != (3 * count,):
        raise ValueError(f"{points.size} numbers, not {3 * count} for {count} keypoints")
    points = points.reshape(count, 3)
    if not np.isfinite(points).all():
        raise ValueError("a number that is not finite")
    if wrong := [v for v in points[:, 2].tolist() if v not in (0, 1, 2)]:
        raise ValueError(f"a visibility of {wrong[0]:g}, not 0, 1 or 2")
    return np.where(points[:, 2:] > 0, points + np.array([0.5, 0.5, 0], np.float32), 0).astype(
        np.float32
    )


def to_coco(points: np.ndarray) -> list[float]:
    """Returns COCO's list for predicted keypoints [K, 2 or more]; each counts as visible."""
    places = np.asarray(points, float)[:, :2] - 0.5
    return [round(x, 3) for place in places.tolist() for x in (*place, 1.0)]
