"""Polygons that outline the objects of an image.

Coordinates are those of boxes: edges of pixels, so that the first pixel is (0, 0, 1, 1). COCO's
files have the same.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Polygons:
    """The polygons of the N objects of an image.

    Attributes:
      parts: for each object its parts, each with corners float64 [C, 2], x and y in pixels.
    """

    parts: Sequence[Sequence[np.ndarray]]

    def select(self, index: np.ndarray) -> Self:
        """Returns those of the objects at some indices."""
        return dataclasses.replace(self, parts=[self.parts[i] for i in index])

    def flip(self, width: int) -> Self:
        """Returns those of an image of `width` that was flipped left and right."""
        return self._moved(lambda corners: [width, 0] + corners * [-1, 1])

    def scale(self, factors: tuple[float, float]) -> Self:
        """Returns those of an image whose height and width were multiplied by factors."""
        return self._moved(lambda corners: corners * factors[::-1])

    def shift(self, top: int, left: int) -> Self:
        """Returns those in a window of an image; corners outside of it stay."""
        return self._moved(lambda corners: corners - [left, top])

    def _moved(self, move: Callable[[np.ndarray], np.ndarray]) -> Self:
        return dataclasses.replace(self, parts=[[move(c) for c in own] for own in self.parts])

    def slots(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns arrays of fixed shapes for `dense_jax.ops.polygons.crop_polygons`.

        Of an object with more corners, those farthest from the one before them are kept.

        Args:
          count: P, slots for the corners of an object.

        Returns:
          Corners, float32 [N, P, 2], each part closed by its first one, and the part of each
          corner, int32 [N, P], -1 where there is none.
        """
        corners = np.zeros((len(self.parts), count, 2), np.float32)
        parts = np.full((len(self.parts), count), -1, np.int32)
        for row, own in enumerate(self.parts):
            end = 0
            for number, part in enumerate(_thinned(own, count)):
                places = slice(end, end + len(part) + 1)
                corners[row, places] = [*part, part[0]]
                parts[row, places] = number
                end = places.stop
        return corners, parts

    def to_json(self) -> list[Any]:
        """Returns lists that `from_json` reads."""
        return [[part.ravel().tolist() for part in own] for own in self.parts]

    @classmethod
    def from_json(cls, lists: Sequence[Sequence[Sequence[float]]]) -> Self:
        """Reads the result of `to_json`, which is also how COCO's files have polygons."""
        return cls([[np.array(part, float).reshape(-1, 2) for part in own] for own in lists])


def _thinned(parts: Sequence[np.ndarray], count: int) -> Sequence[np.ndarray]:
    """Returns parts that take at most `count` slots, when each is closed."""
    if sum(len(part) + 1 for part in parts) <= count:
        return parts
    parts = parts[: count // 2]
    lengths = [np.linalg.norm(part - np.roll(part, 1, axis=0), axis=1) for part in parts]
    longest = np.argsort(-np.concatenate(lengths), kind="stable")[: count - len(parts)]
    is_kept = np.zeros(sum(map(len, parts)), bool)
    is_kept[longest] = True
    each = np.split(is_kept, np.cumsum([len(part) for part in parts])[:-1])
    thinned = [part[own] for part, own in zip(parts, each, strict=True)]
    return [part for part in thinned if len(part)]
