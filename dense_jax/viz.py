"""Draws labels and metrics: takes arrays, returns uint8 RGB arrays [H, W, 3].

A palette is uint8 [256, 3], the colour of each class id, from
`dense_jax.data.classes.ClassTable.palette`. Colours are RGB everywhere, and label files contain
their palette: a prediction looks the same in the report, in an overlay and in any viewer.
"""

import contextlib
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import IO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dense_jax.errors import UserError

# From dark to bright, also in grey print: black, violet, red, orange, pale yellow.
_HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])
# Where systems keep fonts. Pillow's own has the letters of English only.
_FONT_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts"),
)
_FONT_SUFFIXES = (".otf", ".ttc", ".ttf")
_SPECIAL = (
    *("black", "bold", "condensed", "italic", "light"),
    *("math", "mono", "oblique", "serif", "thin"),
)
_NO_CHARACTER = "\U0010ffff"
_INK = (31, 41, 55)
_RIGHT = (29, 78, 137)
_WRONG = (220, 38, 38)


def colourise(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Returns the colour of each label: [..., H, W] ids in 0..255 to uint8 [..., H, W, 3].

    Raises:
      ValueError: an id is outside 0..255; it would wrap around to another class.
    """
    return palette[_as_ids(labels)]


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    palette: np.ndarray,
    *,
    alpha: float = 0.55,
    ignore_label: int = 255,
) -> np.ndarray:
    """Returns the image tinted by its labels; pixels of `ignore_label` do not change.

    Args:
      image: uint8 [H, W, 3].
      labels: [H, W] ids.
      palette: uint8 [256, 3].
      alpha: share of the label's colour, 0..1.
      ignore_label: id of pixels without a tint.
    """
    if image.shape[:2] != labels.shape:
        raise ValueError(f"image {image.shape} does not match labels {labels.shape}")
    weight = alpha * (labels != ignore_label)[..., None]
    return np.rint((1 - weight) * image + weight * colourise(labels, palette)).astype(np.uint8)


def objects(
    image: np.ndarray,
    boxes: np.ndarray,
    class_ids: np.ndarray,
    names: Sequence[str],
    colours: np.ndarray,
    *,
    scores: np.ndarray | None = None,
    masks: np.ndarray | None = None,
    keypoints: np.ndarray | None = None,
    edges: Sequence[tuple[int, int]] = (),
    alpha: float = 0.55,
    factor: int = 1,
) -> np.ndarray:
    """Returns the image with mask, keypoints, box, name and score of each object, the first on top.

    Args:
      image: uint8 [H, W, 3].
      boxes: [N, 4], x0 y0 x1 y1 in pixels, from outer edge to outer edge.
      class_ids: [N], indices of `names`.
      names: the name of each class.
      colours: uint8 [N, 3], the colour of each object.
      scores: [N]; None writes none.
      masks: bool [N, H, W]; None draws none.
      keypoints: [N, K, 3], x and y in pixels, and 0 for one that is not known; None draws none.
      edges: pairs of keypoints to join by lines.
      alpha: share of the colour in a mask, 0..1.
      factor: the picture is this many times larger than the image, so that names hide less of it.
    """
    picture = image.astype(np.float32)
    if masks is not None:
        for mask, colour in zip(masks[::-1], colours[::-1].astype(np.float32), strict=True):
            picture[mask] = (1 - alpha) * picture[mask] + alpha * colour
    drawn = Image.fromarray(np.rint(picture).astype(np.uint8))
    drawn = drawn.resize((factor * drawn.width, factor * drawn.height), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(drawn)
    for i in reversed(range(len(boxes))):
        x0, y0, x1, y1 = (int(edge) for edge in np.rint(factor * boxes[i]))
        colour = tuple(int(channel) for channel in colours[i])
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colour)
        if keypoints is not None:
            _skeleton(draw, factor * keypoints[i, :, :2], keypoints[i, :, 2] != 0, edges, colour)
        class_id = int(class_ids[i])
        text, font = lettering(names[class_id], class_id, 11)
        text = text if scores is None else f"{text} {scores[i]:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        # Above the box where there is room, and inside the picture.
        x = max(2, min(x0 + 2, drawn.width - right - 2))
        y = y0 - bottom - 2 if y0 > bottom + 2 else max(1, min(y0, drawn.height - bottom - 2))
        draw.rectangle((x + left - 2, y + top - 1, x + right + 2, y + bottom + 1), fill=colour)
        is_bright = colours[i] @ np.array([0.299, 0.587, 0.114]) > 150
        draw.text((x, y), text, fill=_INK if is_bright else "white", font=font)
    return np.asarray(drawn)


def _skeleton(
    draw: ImageDraw.ImageDraw,
    points: np.ndarray,
    known: np.ndarray,
    edges: Sequence[tuple[int, int]],
    colour: tuple[int, ...],
) -> None:
    """Draws the lines between keypoints [K, 2], and a dot on each."""
    # The centre of the first pixel is (0.5, 0.5) here, and (0, 0) for Pillow.
    places = [(float(x), float(y)) for x, y in points - 0.5]
    for a, b in edges:
        if known[a] and known[b]:
            draw.line((places[a], places[b]), fill=colour, width=2)
    for (x, y), is_known in zip(places, known, strict=True):
        if is_known:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour, outline="white")


def errors(
    image: np.ndarray, labels: np.ndarray, predictions: np.ndarray, *, ignore_label: int = 255
) -> np.ndarray:
    """Returns the image in pale grey, with wrong pixels in red and unscored pixels in white."""
    grey = np.asarray(image @ np.array([0.299, 0.587, 0.114]), np.float32)[..., None]
    picture = np.broadcast_to(0.5 * grey + 127, image.shape).astype(np.uint8)
    picture[(labels != predictions)] = _WRONG
    picture[labels == ignore_label] = 255
    return picture


def comparison(
    image: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    palette: np.ndarray,
    *,
    ignore_label: int = 255,
) -> np.ndarray:
    """Returns image, label, prediction and errors side by side, [H, 4 W + 3 gaps, 3]."""
    wrong = errors(image, labels, predictions, ignore_label=ignore_label)
    pictures = [image, colourise(labels, palette), colourise(predictions, palette), wrong]
    return contact_sheet(pictures, columns=4)


def contact_sheet(pictures: Sequence[np.ndarray], columns: int, *, gap: int = 4) -> np.ndarray:
    """Returns pictures in rows of `columns` on white, each in the centre of an equal cell."""
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    size = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    sheet = np.full(size, 255, np.uint8)
    for i, picture in enumerate(pictures):
        h, w = picture.shape[:2]
        top = i // columns * (height + gap) + (height - h) // 2
        left = i % columns * (width + gap) + (width - w) // 2
        sheet[top : top + h, left : left + w] = picture
    return sheet


def heat(values: np.ndarray, high: float) -> np.ndarray:
    """Colours values from 0 (black) to ``high`` (pale yellow): [H, W] to uint8 [H, W, 3]."""
    share = np.clip(values / high if high > 0 else np.zeros_like(values), 0, 1)
    stops = np.linspace(0, 1, len(_HEAT))
    channels = [np.interp(share, stops, channel) for channel in _HEAT.T]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def heat_scale(high: float, height: int, *, font_size: int = 11) -> np.ndarray:
    """Returns the colours of `heat` as a vertical bar with values, uint8 [height, W, 3]."""
    bar, font = 14, ImageFont.load_default(font_size)
    marks = {0.0: "0", 0.5: f"{high / 2:.2g}", 1.0: f"{high:.2g}"}
    width = bar + 8 + int(max(map(font.getlength, marks.values())))
    picture = Image.new("RGB", (width, height), "white")
    ramp = np.linspace(high, 0, height)[:, None]
    picture.paste(Image.fromarray(heat(np.repeat(ramp, bar, axis=1), high)), (0, 0))
    draw = ImageDraw.Draw(picture)
    for share, text in marks.items():
        y = font_size / 2 + (1 - share) * (height - font_size)
        draw.text((bar + 4, y), text, fill=_INK, font=font, anchor="lm")
    return np.asarray(picture)


def lettering(
    name: str, class_id: int, font_size: float
) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """Returns what to write for a class, and a font that can: its name or, without one, its id."""
    usual = ImageFont.load_default(font_size)
    if _can_write(usual, name):
        return name, usual
    if file := _font_file(name):
        return name, ImageFont.truetype(file, font_size)
    _tell_once(name)
    return str(class_id), usual


def _can_write(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> bool:
    """Whether the font has all characters; it draws a box, or nothing, for one that it lacks."""

    def drawn(character: str) -> bytes:
        picture = Image.new("L", (48, 48))
        ImageDraw.Draw(picture).text((4, 4), character, fill=255, font=font)
        return picture.tobytes()

    box = drawn(_NO_CHARACTER)
    pictures = ((character, drawn(character)) for character in set(text) - {" "})
    return all(p != box and (any(p) or not c.isalnum()) for c, p in pictures)


@functools.cache
def _font_file(text: str) -> pathlib.Path | None:
    """Returns a font of the system that has all characters, a plain one if there is one."""
    files = [
        path
        for folder in _FONT_FOLDERS
        for path in pathlib.Path(folder).expanduser().rglob("*")
        if path.suffix.lower() in _FONT_SUFFIXES and "lastresort" not in path.stem.lower()
    ]
    for path in sorted(files, key=lambda p: (any(s in p.stem.lower() for s in _SPECIAL), p)):
        with contextlib.suppress(OSError):  # damaged, or of pictures in one size
            if _can_write(ImageFont.truetype(path, 14), text):
                return path
    return None


_told: set[str] = set()


def _tell_once(name: str) -> None:
    """Says once in a process that pictures lack names."""
    if not _told:
        print(
            f"no font here has the letters of {name!r}: pictures show the numbers of such classes"
            " in place of their names; install a font that has them, such as Noto Sans CJK"
        )
    _told.add(name)


def legend(
    names: Sequence[str], palette: np.ndarray, *, columns: int = 4, font_size: int = 14
) -> np.ndarray:
    """Returns a legend: a colour patch and a name for each class, row by row."""
    written = [lettering(name, i, font_size) for i, name in enumerate(names)]
    columns = max(1, min(columns, len(names)))
    patch, row = font_size, 2 * font_size
    cell = 3 * patch + int(max((font.getlength(text) for text, font in written), default=0))
    picture = Image.new("RGB", (columns * cell, -(-len(names) // columns) * row), "white")
    draw = ImageDraw.Draw(picture)
    for i, (text, font) in enumerate(written):
        x, y = i % columns * cell + patch // 2, i // columns * row + row // 2
        box = (x, y - patch // 2, x + patch, y + patch // 2)
        draw.rectangle(box, fill=tuple(palette[i].tolist()), outline=_INK)
        draw.text((x + 1.5 * patch, y), text, fill=_INK, font=font, anchor="lm")
    return np.asarray(picture)


def confusion_picture(confusion: np.ndarray, names: Sequence[str], *, cell: int = 44) -> np.ndarray:
    """Draws a confusion matrix as a table of shares: each row sums to 100 % of a true class.

    Args:
      confusion: [C, C] counts, row = label, column = prediction.
      names: C class names.
      cell: side of a cell in pixels; cells below 30 have no numbers.
    """
    num_classes = len(confusion)
    if confusion.shape != (num_classes, num_classes) or len(names) != num_classes:
        raise ValueError(f"confusion {confusion.shape} does not match {len(names)} names")
    font_size = max(8, round(0.36 * cell))
    font = ImageFont.load_default(font_size)
    written = [lettering(name, i, font_size) for i, name in enumerate(names)]
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    widest = max(own.getlength(text) for text, own in written)
    margin, side = int(widest) + cell // 2, num_classes * cell
    picture = Image.new("RGB", (margin + side, margin + side), "white")
    draw = ImageDraw.Draw(picture)
    for i, (text, own) in enumerate(written):
        place = (margin - cell / 4, margin + (i + 0.5) * cell)
        draw.text(place, text, fill=_INK, font=own, anchor="rm")
        for j in range(num_classes):
            x, y, value = margin + j * cell, margin + i * cell, float(share[i, j])
            # Mistakes are rare: the square root makes a share of 5 % visible.
            strength, tone = (value, _RIGHT) if i == j else (value**0.5, _WRONG)
            tint = _mix((241, 245, 249), tone, strength)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=tint)
            if cell >= 30 and value >= 0.005:
                ink = "white" if strength > 0.6 else _INK
                middle = (x + cell / 2 - 1, y + cell / 2 - 1)
                draw.text(middle, f"{100 * value:.0f}", fill=ink, font=font, anchor="mm")
    # Column names read upwards: draw them as rows on a rotated picture.
    rotated = picture.rotate(-90, expand=True)
    draw = ImageDraw.Draw(rotated)
    for j, (text, own) in enumerate(written):
        draw.text((side + cell / 4, margin + (j + 0.5) * cell), text, _INK, own, "lm")
    return np.asarray(rotated.rotate(90, expand=True))


def save_label_png(
    path: str | os.PathLike[str] | IO[bytes], labels: np.ndarray, palette: np.ndarray
) -> None:
    """Writes [H, W] ids in 0..255 as a palette PNG: viewers show colours, readers get ids."""
    picture = Image.fromarray(_as_ids(labels), "P")
    picture.putpalette(palette.tobytes())
    picture.save(path, format="PNG", optimize=False)


def load_label_png(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads the ids of a palette or 8-bit grey PNG, uint8 [H, W].

    Raises:
      UserError: the file does not hold one id for each pixel.
    """
    with Image.open(path) as picture:
        if picture.mode not in ("P", "L"):
            raise UserError(
                f"{pathlib.Path(path)} has pixels of mode {picture.mode}, not ids: "
                "save labels as 8-bit palette or grey PNG"
            )
        return np.asarray(picture, np.uint8)


def _as_ids(labels: np.ndarray) -> np.ndarray:
    if labels.size and not 0 <= labels.min() <= labels.max() <= 255:
        raise ValueError(f"labels in {labels.min()}..{labels.max()} are outside 0..255")
    return labels.astype(np.uint8)


def _mix(low: tuple[int, ...], high: tuple[int, ...], share: float) -> tuple[int, ...]:
    return tuple(round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
