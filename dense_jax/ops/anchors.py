"""Anchors: the boxes that a region proposal network refines, in three published conventions.

| convention | base anchors |
|---|---|
| torchvision | sides rounded to even halves |
| detectron2 | not rounded |
| caffe | rounded for a cell of a stride, then scaled; with `plus_one` |

Within a location, all sizes of a ratio are neighbours. detectron2 has all ratios of a size instead;
its weights are permuted when they are imported, so that weights mean the same in each convention.

"caffe" is py-faster-rcnn and Detectron, where x1 and y1 are inside the box (`plus_one` in
`dense_jax.ops.boxes`). Its base anchors are centred on the first cell, the others on the upper left
corner of that cell. Anchors depend on shapes alone, so everything here is NumPy and becomes a
constant of the program.

References: Ren et al., NIPS 2015, arXiv:1506.01497; Lin et al., CVPR 2017, arXiv:1612.03144;
pytorch/vision: torchvision/models/detection/anchor_utils.py; facebookresearch/detectron2:
detectron2/modeling/anchor_generator.py; facebookresearch/Detectron:
detectron/modeling/generate_anchors.py.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from dense_jax.errors import UserError, refuse

Convention = Literal["torchvision", "detectron2", "caffe"]
Pair = tuple[int, int]


def base_anchors(
    sizes: Sequence[float],
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
    convention: Convention = "torchvision",
    *,
    stride: int | None = None,
) -> np.ndarray:
    """Returns the anchors of the first location, float32 [A, 4] with A = ratios x sizes.

    An anchor of size s and ratio r is s / sqrt(r) wide and s sqrt(r) high, before rounding.

    Args:
      sizes: square roots of areas, in pixels.
      ratios: height / width.
      convention: the code to follow, see above.
      stride: side of a cell in pixels; only "caffe" depends on it.

    Raises:
      UserError: the convention is unknown, or "caffe" has no stride.
    """
    known = get_args(Convention)
    refuse(convention not in known, f"Anchors {convention!r} are unknown: use one of {known}.")
    if convention == "caffe":
        if stride is None:
            raise UserError("Anchors 'caffe' are rounded for a cell: pass its stride.")
        return _caffe(sizes, ratios, stride)
    root = np.sqrt(np.array(ratios, np.float64))[:, None]
    sides = np.stack([np.array(sizes) / root, np.array(sizes) * root], axis=-1)  # [ratio, size, 2]
    # NumPy rounds halves to even numbers, as torch does.
    half = np.rint(sides / 2) if convention == "torchvision" else sides / 2
    return np.concatenate([-half, half], axis=-1).reshape(-1, 4).astype(np.float32)


def _caffe(sizes: Sequence[float], ratios: Sequence[float], stride: int) -> np.ndarray:
    width = np.rint(np.sqrt(stride**2 / np.array(ratios, np.float64)))
    height = np.rint(width * np.array(ratios))
    scales = np.array(sizes) / stride
    reach = (np.stack([width, height], axis=-1)[:, None] * scales[:, None] - 1) / 2
    centre = (stride - 1) / 2
    return np.concatenate([centre - reach, centre + reach], -1).reshape(-1, 4).astype(np.float32)


def on_grid(base: np.ndarray, grid: Pair, strides: int | Pair) -> np.ndarray:
    """Returns the anchors of every location, float32 [rows x columns x A, 4], rows outermost.

    Args:
      base: anchors of the first location, [A, 4].
      grid: (rows, columns) of the feature map.
      strides: distance of locations in pixels, one number or (vertical, horizontal).
    """
    down, right = (strides, strides) if isinstance(strides, int) else strides
    y, x = np.mgrid[: grid[0], : grid[1]].astype(np.float32)
    shift = np.stack([x * right, y * down, x * right, y * down], axis=-1).reshape(-1, 1, 4)
    return (shift + base).reshape(-1, 4).astype(np.float32)


def pyramid(
    grids: Sequence[Pair],
    strides: Sequence[int | Pair],
    *,
    sizes: Sequence[Sequence[float]] = ((32,), (64,), (128,), (256,), (512,)),
    ratios: Sequence[float] = (0.5, 1.0, 2.0),
    convention: Convention = "torchvision",
) -> tuple[np.ndarray, ...]:
    """Returns the anchors of each level, finest first, each float32 [rows x columns x A, 4].

    Args:
      grids: (rows, columns) of each feature map.
      strides: of each level: 4, 8, 16, 32, 64 for P2 to P6, or `torchvision_strides`.
      sizes: anchor sizes of each level in pixels; one tuple of all sizes for a single map.
      ratios: height / width.
      convention: the code to follow, see above.

    Raises:
      UserError: the numbers of levels differ.
    """
    numbers = (len(grids), len(strides), len(sizes))
    refuse(
        len(set(numbers)) > 1, f"Grids, strides and sizes are of {numbers} levels: make them equal."
    )
    levels = []
    for grid, stride, some in zip(grids, strides, sizes, strict=True):
        cell = stride if isinstance(stride, int) else stride[0]
        levels.append(on_grid(base_anchors(some, ratios, convention, stride=cell), grid, stride))
    return tuple(levels)


def torchvision_strides(padded_size: Pair, grids: Sequence[Pair]) -> tuple[Pair, ...]:
    """Returns the strides with which torchvision's weights were trained, (vertical, horizontal).

    torchvision divides the padded image size by the number of cells and rounds down. The result is
    the level's stride wherever that divides the size. P6 of 800 x 1344 pixels has 13 rows, and its
    vertical stride is 61 instead of 64.
    """
    height, width = padded_size
    return tuple((height // rows, width // columns) for rows, columns in grids)
