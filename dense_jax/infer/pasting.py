"""Masks of a grid in the pixels of an image, one object after another.

A mask head gives each object a grid of M x M probabilities in its box. Both published conventions
are here; they differ by about half a pixel around each object.

| convention | a pixel takes | a mask of ones in a box of n pixels covers |
|---|---|---|
| torchvision (and Detectron) | the grid resized to whole pixels around the box | n + 1 pixels |
| detectron2 | the grid where the centre of the pixel is | n pixels |

References: pytorch/vision: torchvision/models/detection/roi_heads.py (`paste_masks_in_image`);
facebookresearch/detectron2: detectron2/layers/mask_ops.py (`paste_masks_in_image`).
"""

from typing import Literal, NamedTuple

import numpy as np

from dense_jax.data.padded import Size

Convention = Literal["torchvision", "detectron2"]


class Window(NamedTuple):
    """Probabilities of pixels in a window of an image; they are 0 elsewhere.

    Attributes:
      top: first row of the window.
      left: first column.
      values: float32 [h, w].
    """

    top: int
    left: int
    values: np.ndarray

    def mask(self, size: Size, threshold: float = 0.5) -> np.ndarray:
        """Returns the pixels of an image of ``size`` with at least a probability, bool [H, W]."""
        result = np.zeros(size, bool)
        height, width = self.values.shape
        rows, columns = slice(self.top, self.top + height), slice(self.left, self.left + width)
        result[rows, columns] = self.values >= threshold
        return result


def paste(grid: np.ndarray, box: np.ndarray, size: Size, convention: Convention) -> Window:
    """Returns the probabilities of the pixels of an image.

    Args:
      grid: float32 [M, M].
      box: float [4], x0 y0 x1 y1 in pixels of the image.
      size: height and width of the image.
      convention: see above.
    """
    box = np.asarray(box, np.float32)
    along = _resized if convention == "torchvision" else _sampled
    top, rows = along(box[1], box[3], len(grid), size[0])
    left, columns = along(box[0], box[2], len(grid), size[1])
    return Window(top, left, rows @ np.asarray(grid, np.float32) @ columns.T)


def _resized(low: np.float32, high: np.float32, cells: int, length: int) -> tuple[int, np.ndarray]:
    """Returns the first pixel along an axis and the shares of cells in each, float32 [n, cells].

    The grid gets a border of zeros, and the box grows with it. Its ends are cut to whole pixels,
    and the grid is resized to what lies between.
    """
    half = (high - low) * np.float32(0.5) * (np.float32(cells + 2) / np.float32(cells))
    centre = (high + low) * np.float32(0.5)
    first, last = int(centre - half), int(centre + half)
    count = max(last - first + 1, 1)
    at = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * np.float32((cells + 2) / count)
    at = np.clip(at - np.float32(0.5), 0, cells + 1)
    shares = _hats(at, cells + 2)[:, 1:-1]
    start, end = max(first, 0), min(first + count, length)
    return start, shares[start - first : max(end, start) - first]


def _sampled(low: np.float32, high: np.float32, cells: int, length: int) -> tuple[int, np.ndarray]:
    """The same for pixels that read the grid at their centres; outside of it are zeros."""
    cell = max(float(high - low), 1e-6) / cells
    start = max(int(np.floor(low - cell)), 0)
    end = max(min(int(np.ceil(high + cell)), length), start)
    at = (np.arange(start, end, dtype=np.float32) + np.float32(0.5) - low) / np.float32(cell)
    return start, _hats(at - np.float32(0.5), cells)


def _hats(at: np.ndarray, cells: int) -> np.ndarray:
    """Returns the weights of linear interpolation between cells, [N] to float32 [N, cells]."""
    places = np.arange(cells, dtype=np.float32)
    return np.maximum(1 - abs(at[:, None] - places), 0).astype(np.float32)
