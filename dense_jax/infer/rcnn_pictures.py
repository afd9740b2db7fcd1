"""Pictures of what happens inside a detector: its proposals, and the anchors of each object.

Boxes are those of `dense_jax.ops.boxes`, in pixels of the image. The image is dimmed, and enlarged
by a whole number if it is small, so that lines and words have room.
"""

import numpy as np
from PIL import Image, ImageDraw

from dense_jax import viz

BEST = 50  # Proposals that are drawn on top.
_LEAST_SIDE = 480  # Pixels of the longer side of a picture.
_OTHERS = (148, 163, 184)
# Colours that are told apart without red and green: Okabe, Ito, "Color universal design", 2008.
OBJECT, ANCHOR, FORCED, WITHOUT = (
    (255, 255, 255), (86, 180, 233), (230, 159, 0), (240, 90, 170)
)  # fmt: skip


def proposals(image: np.ndarray, boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns the image with its proposals, the `BEST` on top in colours of their scores.

    Args:
      image: uint8 [H, W, 3].
      boxes: [R, 4], the best first.
      scores: [R], in [0, 1], in falling order.
    """
    drawn, factor = _ground(image)
    num_others = max(0, len(boxes) - BEST)
    # The more there are, the fainter each, so that the image stays visible behind all of them.
    opacity = round(np.clip(8000 / max(num_others, 1), 10, 80))
    for box in boxes[BEST:]:
        _outline(drawn, factor * box, (*_OTHERS, opacity), 1)
    best = scores[:BEST]
    high = float(best.max(initial=0.0))
    colours = viz.heat(best[None], high)[0]
    for i in reversed(range(len(best))):
        width = 2 if best[i] >= high / 2 else 1
        _outline(drawn, factor * boxes[i], tuple(colours[i].tolist()), width)
    words = [f"the best {len(best)} of {len(boxes)} proposals, in colours of their scores"]
    if len(best):
        words[0] += f", {best[-1]:.2g} to {high:.2g}"
    if num_others:
        words.append(f"{num_others} others, of scores down to {scores[-1]:.2g}")
    key = np.array([viz.heat(np.ones((1, 1)), 1)[0, 0], _OTHERS], np.uint8)
    scale = viz.heat_scale(high, min(drawn.height, 200)) if len(best) else None
    return _with_key(np.asarray(drawn), words, key, scale)


def anchors(
    image: np.ndarray,
    objects: np.ndarray,
    boxes: np.ndarray,
    index: np.ndarray,
    is_forced: np.ndarray,
    limit: float,
) -> np.ndarray:
    """Returns the image with its objects and the anchors that stand for them.

    Args:
      image: uint8 [H, W, 3].
      objects: [G, 4].
      boxes: [F, 4], the anchors that stand for an object.
      index: int [F], the object of each.
      is_forced: bool [F], whether an anchor stands for an object only because none is better.
      limit: the IoU from which other anchors stand for an object.
    """
    drawn, factor = _ground(image)
    for forced, colour in ((False, ANCHOR), (True, FORCED)):
        for box in boxes[is_forced == forced]:
            _outline(drawn, factor * box, colour, 2 if forced else 1)
    has_anchor = np.isin(np.arange(len(objects)), index)
    for box, has in zip(objects, has_anchor, strict=True):
        _outline(drawn, factor * box, OBJECT if has else WITHOUT, 3)
    num_forced = int(np.count_nonzero(is_forced))
    words = [
        f"{np.count_nonzero(has_anchor)} objects with anchors",
        f"{np.count_nonzero(~has_anchor)} objects without an anchor",
        f"{len(boxes) - num_forced} anchors of an IoU of at least {limit:g}",
        f"{num_forced} forced anchors: of a smaller IoU, but the best of an object",
    ]
    key = np.array([OBJECT, WITHOUT, ANCHOR, FORCED], np.uint8)
    return _with_key(np.asarray(drawn), words, key)


def _ground(image: np.ndarray) -> tuple[Image.Image, int]:
    """Returns the dimmed image in grey, enlarged by a factor, and the factor."""
    factor = max(1, _LEAST_SIDE // max(image.shape[:2]))
    grey = np.rint(24 + 0.5 * (image @ np.array([0.299, 0.587, 0.114]))).astype(np.uint8)
    large = grey.repeat(factor, axis=0).repeat(factor, axis=1)
    return Image.fromarray(large).convert("RGB"), factor


def _outline(picture: Image.Image, box: np.ndarray, colour: tuple[int, ...], width: int) -> None:
    """Draws the edges of a box inside it; a fourth channel of the colour is its opacity."""
    x0, y0, x1, y1 = (int(edge) for edge in np.rint(box))
    corners = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
    ImageDraw.Draw(picture, "RGBA").rectangle(corners, outline=colour, width=width)


def _with_key(
    picture: np.ndarray, words: list[str], key: np.ndarray, scale: np.ndarray | None = None
) -> np.ndarray:
    """Returns a picture with a scale on its right and words below, on white."""
    legend = viz.legend(words, key, columns=1)
    parts = [(0, 0, picture), (picture.shape[0], 0, legend)]
    if scale is not None:
        parts.append((0, picture.shape[1] + 8, scale))
    size = [max(part[axis] + part[2].shape[axis] for part in parts) for axis in (0, 1)]
    sheet = np.full((*size, 3), 255, np.uint8)
    for top, left, part in parts:
        sheet[top : top + part.shape[0], left : left + part.shape[1]] = part
    return sheet
