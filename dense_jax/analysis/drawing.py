"""Simple drawings: one list of shapes, written as SVG or rendered to pixels.

Coordinates are pixels from the top left corner. Colours are "#rrggbb". Consecutive shapes of the
same style share one SVG element, so that a figure of a thousand cells needs only a few kilobytes.
"""

import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK = "#1f2937"
Point = tuple[float, float]


class _Polygon(NamedTuple):
    points: tuple[Point, ...]  # Two points are a line.
    fill: str | None
    stroke: str | None
    width: float
    dashed: bool
    opacity: float

    @property
    def style(self) -> tuple:
        return self[1:]


class _Text(NamedTuple):
    place: Point
    string: str
    size: float
    colour: str
    anchor: Literal["start", "middle", "end"]
    bold: bool

    @property
    def style(self) -> tuple:
        return self[2:]


class Drawing:
    """A white sheet with shapes, where later shapes cover earlier ones.

    Attributes:
      width: width in pixels.
      height: height in pixels.
      title: a description for readers who cannot see the drawing.
    """

    def __init__(self, width: float, height: float, title: str):
        self.width, self.height, self.title = width, height, title
        self._shapes: list[_Polygon | _Text] = []

    def polygon(
        self,
        points: Sequence[Point],
        *,
        fill: str | None = None,
        stroke: str | None = None,
        width: float = 1.0,
        dashed: bool = False,
        opacity: float = 1.0,
    ) -> None:
        """Adds a polygon, or a line if there are two points. `opacity` applies to the fill."""
        shape = _Polygon(tuple(points), fill, stroke, width, dashed, opacity)
        self._shapes.append(shape)

    def rectangle(self, x: float, y: float, width: float, height: float, **style) -> None:
        """Adds a rectangle. Options are those of `polygon`, but the line width is named `line`."""
        style["width"] = style.pop("line", 1.0)
        right, bottom = x + width, y + height
        self.polygon([(x, y), (right, y), (right, bottom), (x, bottom)], **style)

    def text(
        self,
        x: float,
        y: float,
        string: str,
        *,
        size: float = 13,
        colour: str = INK,
        anchor: Literal["start", "middle", "end"] = "middle",
        bold: bool = False,
    ) -> None:
        """Adds a line of text that is vertically centred at y."""
        self._shapes.append(_Text((x, y), string, size, colour, anchor, bold))

    def svg(self) -> str:
        """Returns the drawing as an SVG document without scripts, links or embedded fonts."""
        size = f'width="{self.width:g}" height="{self.height:g}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
            f'viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            'font-family="Helvetica,Arial,sans-serif">',
            f"<title>{escape(self.title)}</title>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
        ]
        for _, group in itertools.groupby(self._shapes, lambda s: (type(s), s.style)):
            lines.append(_element(list(group)))
        return "\n".join([*lines, "</svg>", ""])

    def picture(self, scale: int = 2) -> np.ndarray:
        """Returns the drawing as uint8 RGB [scale height, scale width, 3]."""
        fine = 2 * scale  # Pillow does not smooth lines, so draw twice as large, then reduce
        size = (round(self.width * scale), round(self.height * scale))
        image = Image.new("RGB", (2 * size[0], 2 * size[1]), "white")
        draw = ImageDraw.Draw(image, "RGBA")
        for shape in self._shapes:
            if isinstance(shape, _Text):
                _paint_text(draw, shape, fine)
            else:
                _paint_polygon(draw, shape, fine)
        return np.asarray(image.resize(size, Image.Resampling.BOX))

    def save(self, path: pathlib.Path) -> None:
        """Writes PATH.svg and PATH.png."""
        path.with_suffix(".svg").write_text(self.svg())
        Image.fromarray(self.picture()).save(path.with_suffix(".png"))


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _element(shapes: list) -> str:
    first = shapes[0]
    if isinstance(first, _Text):
        weight = ' font-weight="bold"' if first.bold else ""
        texts = (
            f'<text x="{_number(t.place[0])}" y="{_number(t.place[1] + 0.35 * t.size)}">'
            f"{escape(t.string)}</text>"
            for t in shapes
        )
        return (
            f'<g font-size="{first.size:g}" fill="{first.colour}" '
            f'text-anchor="{first.anchor}"{weight}>{"".join(texts)}</g>'
        )
    attributes = f'fill="{first.fill or "none"}"'
    if first.opacity < 1:
        attributes += f' fill-opacity="{first.opacity:g}"'
    if first.stroke:
        attributes += f' stroke="{first.stroke}" stroke-width="{first.width:g}"'
    if first.dashed:
        attributes += ' stroke-dasharray="3 2"'
    return f'<path {attributes} d="{"".join(map(_path, shapes))}"/>'


def _path(shape: _Polygon) -> str:
    """Returns SVG path data of relative steps; steps along an axis use the short commands."""
    x, y = shape.points[0]
    steps = [f"M{_number(x)} {_number(y)}"]
    for right, down in shape.points[1:]:
        dx, dy = right - x, down - y
        if dy == 0:
            steps.append(f"h{_number(dx)}")
        elif dx == 0:
            steps.append(f"v{_number(dy)}")
        else:
            steps.append(f"l{_number(dx)} {_number(dy)}")
        x, y = right, down
    return "".join(steps) + ("z" if len(shape.points) > 2 else "")


def _rgb(colour: str, opacity: float = 1.0) -> tuple[int, int, int, int]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return red, green, blue, round(255 * opacity)


def _paint_polygon(draw: ImageDraw.ImageDraw, shape: _Polygon, scale: int) -> None:
    points = [(scale * x, scale * y) for x, y in shape.points]
    if shape.fill and len(points) > 2:
        draw.polygon(points, fill=_rgb(shape.fill, shape.opacity))
    if not shape.stroke:
        return
    ends = [*points[1:], points[0]] if len(points) > 2 else points[1:]
    width = max(1, round(shape.width * scale))
    for start, end in zip(points, ends, strict=False):
        for piece in _dashes(start, end, scale) if shape.dashed else [(start, end)]:
            draw.line(piece, fill=_rgb(shape.stroke), width=width)


def _dashes(start: Point, end: Point, scale: int) -> list[tuple[Point, Point]]:
    """Splits a line into dashes of 3 pixels with gaps of 2, as in the SVG."""
    (x, y), (dx, dy) = start, (end[0] - start[0], end[1] - start[1])
    length = max(np.hypot(dx, dy), 1e-9)
    pieces = []
    for at in np.arange(0, length, 5 * scale):
        a, b = at / length, min(at + 3 * scale, length) / length
        pieces.append(((x + a * dx, y + a * dy), (x + b * dx, y + b * dy)))
    return pieces


def _paint_text(draw: ImageDraw.ImageDraw, text: _Text, scale: int) -> None:
    font = ImageFont.load_default(text.size * scale)
    anchor = {"start": "lm", "middle": "mm", "end": "rm"}[text.anchor]
    place = (text.place[0] * scale, text.place[1] * scale)
    stroke = 0.3 * scale if text.bold else 0
    draw.text(place, text.string, _rgb(text.colour), font, anchor, stroke_width=stroke)


def mix(low: str, high: str, share: float) -> str:
    """Returns the colour between `low` and `high`, where share 0 gives `low` and 1 gives `high`."""
    pairs = zip(_rgb(low)[:3], _rgb(high)[:3], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def grid(
    drawing: Drawing,
    x: float,
    y: float,
    cells: np.ndarray,
    side: float,
    colour: Callable[[int, int], str],
    *,
    size: float | None = None,
    stroke: str = "#64748b",
) -> None:
    """Draws a table of numbers or strings.

    Args:
      drawing: the drawing to add it to.
      x: left edge.
      y: upper edge.
      cells: numbers or strings [rows, columns]. An empty string leaves its cell blank.
      side: side of a cell in pixels.
      colour: returns the fill colour of cell (row, column).
      size: font size. None: it follows from the side.
      stroke: colour of the lines.
    """
    places = sorted(np.ndindex(cells.shape), key=lambda at: colour(*at))  # groups equal styles
    for row, column in places:
        left, top = x + column * side, y + row * side
        drawing.rectangle(left, top, side, side, fill=colour(row, column), stroke=stroke)
    for row, column in np.ndindex(cells.shape):
        value = cells[row, column]
        string = value if isinstance(value, str) else f"{value:g}"
        if string:
            middle = (x + (column + 0.5) * side, y + (row + 0.5) * side)
            drawing.text(*middle, string, size=size or 0.45 * side)
