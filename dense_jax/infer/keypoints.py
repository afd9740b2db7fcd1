"""From the logits of cells to keypoints in the pixels of an image, one object after another.

The logits of a box are resized by bicubic interpolation to the whole pixels that cover the box; the
keypoint is in the centre of the highest, moved to the box in the same proportion.

Reference: pytorch/vision: torchvision/models/detection/roi_heads.py (`heatmaps_to_keypoints`).
"""

import numpy as np

_SHARPNESS = -0.75  # of cubic convolution, as torch's


def decode(logits: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Returns x, y and the highest logit of each keypoint of a box, float32 [K, 3].

    Args:
      logits: float32 [M, M, K].
      box: float [4], x0 y0 x1 y1 in pixels; a side below one pixel counts as one.
    """
    box = np.asarray(box, np.float32)
    corner, sides = box[:2], np.maximum(box[2:] - box[:2], 1)
    width, height = (int(side) for side in np.ceil(sides))
    rows, columns = (_cubic(count, len(logits)) for count in (height, width))
    maps = rows @ np.moveaxis(logits, -1, 0) @ columns.T
    flat = maps.reshape(len(maps), -1)
    best = flat.argmax(axis=1)
    cell = np.stack([best % width, best // width], axis=1).astype(np.float32)
    at = corner + (cell + np.float32(0.5)) * (sides / np.array([width, height], np.float32))
    return np.concatenate([at, flat.max(axis=1, keepdims=True)], axis=1).astype(np.float32)


def _cubic(count: int, cells: int) -> np.ndarray:
    """Returns the weights of cells in each of ``count`` pixels over them, float32 [count, cells].

    Beyond the ends, the outermost cells are repeated.

    Reference: Keys, "Cubic convolution interpolation for digital image processing", IEEE ASSP 1981.
    """
    at = (np.arange(count) + 0.5) * (cells / count) - 0.5
    first = np.floor(at).astype(int)
    weights = np.zeros((count, cells))
    for tap in range(-1, 3):
        t, a = np.abs(at - (first + tap)), _SHARPNESS
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = a * (((t - 5) * t + 8) * t - 4)
        np.add.at(
            weights,
            (np.arange(count), np.clip(first + tap, 0, cells - 1)),
            np.where(t <= 1, near, np.where(t < 2, far, 0)),
        )
    return weights.astype(np.float32)
