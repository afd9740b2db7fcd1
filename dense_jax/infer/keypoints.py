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
    wide = _resized(logits.swapaxes(0, 1), width)
    flat = _resized(wide.swapaxes(0, 1), height).reshape(height * width, -1)
    best = flat.argmax(axis=0)
    cell = np.stack([best % width, best // width], axis=1).astype(np.float32)
    at = corner + (cell + np.float32(0.5)) * (sides / np.array([width, height], np.float32))
    return np.concatenate([at, flat.max(axis=0)[:, None]], axis=1).astype(np.float32)


def _resized(cells: np.ndarray, count: int) -> np.ndarray:
    """Returns the values of ``count`` pixels that cover cells [M, ...], float32 [count, ...].

    Beyond the ends, the outermost cells are repeated.

    Reference: Keys, "Cubic convolution interpolation for digital image processing", IEEE ASSP 1981.
    """
    at = (np.arange(count) + 0.5) * (len(cells) / count) - 0.5
    taps = np.floor(at).astype(int) + np.arange(-1, 3)[:, None]
    t, a = np.abs(at - taps), _SHARPNESS
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = a * (((t - 5) * t + 8) * t - 4)
    weights = np.where(t <= 1, near, far).astype(np.float32)
    taps = np.clip(taps, 0, len(cells) - 1)
    # Sums of four, not a product of matrices: that takes longer, and all cores.
    return np.einsum("tn,tn...->n...", weights, cells[taps])
