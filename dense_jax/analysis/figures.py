"""Lecture figures of convolutions, drawn from the results of the library's layers.

Each entry of `FIGURES` makes one drawing. Sizes, positions of taps, inserted zeros, matrices,
copies and all numbers in cells come from `dense_jax.analysis.arithmetic`, which runs the layers.
This file chooses only their positions and colours.

Reference: Dumoulin, Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dense_jax.analysis import arithmetic, checkerboard_figures
from dense_jax.analysis.arithmetic import INSERTED, PADDING, RELATIONSHIPS, Layer
from dense_jax.analysis.drawing import INK, Drawing, grid, mix

# The worked example of the guide's first figure.
IMAGE = np.array(
    [[3, 3, 2, 1, 0], [0, 0, 1, 3, 1], [3, 1, 2, 2, 3], [2, 0, 0, 2, 2], [2, 0, 0, 0, 1]],
    np.float32,
)
KERNEL = np.array([[0, 1, 2], [2, 2, 0], [0, 1, 2]], np.float32)
_COUNTING = np.arange(1, 10, dtype=np.float32).reshape(
    3, 3
)  # A kernel in which every tap has its own weight.

_INPUT, _OUTPUT, _KERNEL = ("#dbeafe", "#7db4f5"), ("#d1fae5", "#4cc79a"), "#fde68a"
_COUNT = ("#ffffff", "#f59e0b")
_TAP = ("#fff1d0", "#fbbf5d")  # Cells of a window.
_ZERO, _BLANK, _FRAME, _BROWN, _GREY = "#eef1f5", "#ffffff", "#d97706", "#92400e", "#64748b"
# Nine colours that differ clearly on white and below black digits. Copies use the first four.
_HUES = (
    "#fca5a5",
    "#93c5fd",
    "#fcd34d",
    "#86efac",
    "#d8b4fe",
    "#fdba74",
    "#67e8f9",
    "#f9a8d4",
    "#cbd5e1",
)
_EDGE = 24


class _View(NamedTuple):
    """One position of a window: a layer, its output unit (row, column), and a caption."""

    layer: Layer
    unit: tuple[int, int]
    words: str


def _image(size: int) -> np.ndarray:
    """Returns the guide's example if it has this size, else arbitrary small numbers."""
    if size == len(IMAGE):
        return IMAGE
    row, column = np.ogrid[:size, :size]
    return (1 + (row * row + 2 * column + row * column) % 5).astype(np.float32)


def _shades(values: np.ndarray, ends: tuple[str, str]) -> Callable[[int, int], str]:
    """Returns a function of (row, column) that maps larger values closer to the second colour."""
    low, range_ = values.min(), max(np.ptp(values), 1)
    return lambda row, column: mix(*ends, float((values[row, column] - low) / range_))


def _draw_cells(
    d: Drawing, x: float, y: float, layer: Layer, side: float, taps: np.ndarray
) -> np.ndarray:
    """Draws the input with its padding and inserted zeros; returns the values [n, n].

    Each row of `taps` starts with the (row, column) of a cell in the window.
    """
    cells, image = arithmetic.laid_out(layer), _image(layer.size)
    values = np.where(cells >= 0, image.ravel()[np.maximum(cells, 0)], 0)
    in_window = np.zeros(cells.shape, bool)
    in_window[taps[:, 0], taps[:, 1]] = True
    largest = max(float(image.max()), 1)
    for kind, blank in ((PADDING, _BLANK), (INSERTED, _ZERO), (None, "")):
        for row, column in np.argwhere(cells >= 0 if kind is None else cells == kind):
            ends = _TAP if in_window[row, column] else _INPUT if kind is None else (blank, blank)
            fill = mix(*ends, float(values[row, column]) / largest)
            stroke = _GREY if kind is None else "#94a3b8"
            corner = (x + column * side, y + row * side)
            d.rectangle(*corner, side, side, fill=fill, stroke=stroke, dashed=kind == PADDING)
    for chosen, colour in ((cells >= 0, "#1f2937"), (cells < 0, "#94a3b8")):
        for row, column in np.argwhere(chosen):
            middle = (x + (column + 0.42) * side, y + (row + 0.42) * side)
            d.text(*middle, f"{values[row, column]:g}", size=0.42 * side, colour=colour)
    return values


def _draw_view(d: Drawing, top: float, view: _View, side: float) -> None:
    """Draws input, window, output and kernel in a row, and the window's sum below."""
    layer, left = view.layer, _EDGE
    high = len(arithmetic.laid_out(layer)) * side
    weights = KERNEL[::-1, ::-1] if layer.kind == "up_conv" else KERNEL
    output = layer.image(_image(layer.size), KERNEL)
    o = len(output)
    out_x, out_y = left + high + 2.6 * side, top + (high - o * side) / 2
    row, column = view.unit
    cell = (out_x + column * side, out_y + row * side)

    # The cell of each tap, the box around these cells, the beam from the box to the output.
    taps = np.argwhere(arithmetic.wiring(arithmetic.direct(layer))[view.unit])
    (first, last), (start, end) = (
        (origin + axis.min() * side, origin + (axis.max() + 1) * side)
        for axis, origin in ((taps[:, 0], top), (taps[:, 1], left))
    )
    beam = [(end, first), cell, (cell[0], cell[1] + side), (end, last)]
    d.polygon(beam, fill="#fdf0d9")
    values = _draw_cells(d, left, top, layer, side, taps)
    for r, c, a, b in taps:
        corner = (left + (c + 0.8) * side, top + (r + 0.8) * side)
        d.text(*corner, f"{weights[a, b]:g}", size=0.28 * side, colour=_BROWN, bold=True)
    grid(d, out_x, out_y, output, side, _shades(output, _OUTPUT), size=0.42 * side)
    for a, b in ((beam[0], beam[1]), (beam[3], beam[2])):
        d.polygon([a, b], stroke=_FRAME, dashed=True)
    d.rectangle(start, first, end - start, last - first, stroke=_FRAME, line=2.5)
    d.rectangle(*cell, side, side, stroke=_FRAME, line=2.5)

    k_x, k_y = d.width - _EDGE - 3 * side, top + (high - 3 * side) / 2
    grid(d, k_x, k_y, weights, side, lambda *_: _KERNEL, size=0.42 * side)
    below = top + high + 15
    d.text(left, below, view.words, anchor="start", colour=_GREY)
    d.text(out_x + o * side / 2, out_y + o * side + 15, f"output {o} x {o}", colour=_GREY)
    turned = ", turned" if layer.kind == "up_conv" else ""
    d.text(k_x + 1.5 * side, k_y + 3 * side + 15, f"kernel{turned}", colour=_GREY)
    is_pixel = arithmetic.laid_out(layer) >= 0  # sums omit cells that are always zero
    on_pixels = [(r, c, a, b) for r, c, a, b in taps if is_pixel[r, c]]
    products = [f"{weights[a, b]:g}\u00b7{values[r, c]:g}" for r, c, a, b in on_pixels]
    total = " + ".join(products or ["0"]) + f" = {output[view.unit]:g}"
    d.text(left, below + 22, total, anchor="start", colour=_BROWN)


def _windows(title: str, formula: str, views: Sequence[_View], side: float = 34) -> Drawing:
    """Draws a heading and the views below it."""
    sizes = [(len(arithmetic.laid_out(v.layer)), v.layer.output_size) for v in views]
    width = max(n + o for n, o in sizes) + 7  # includes the gaps and a kernel of 3 x 3
    heights = [n * side + 58 for n, _ in sizes]
    d = Drawing(max(width * side + 2 * _EDGE, 560), 78 + sum(heights), title)
    d.text(_EDGE, 26, title, size=18, anchor="start", bold=True)
    d.text(_EDGE, 52, formula, size=14, anchor="start")
    top = 76.0
    for view, height in zip(views, heights, strict=True):
        _draw_view(d, top, view, side)
        top += height
    return d


def _symbols(layer: Layer, number: int) -> str:
    """Returns the formula of a relationship, the layer's options, and its computed output size."""
    row, mark = RELATIONSHIPS[number - 1], "'" if layer.kind == "up_conv" else ""
    if row.size(layer) != layer.output_size:
        raise ValueError(f"relationship {number} does not hold for {layer}")
    symbols = {f"i{mark}": layer.size, "k": layer.kernel, "s": layer.stride, "p": layer.padding}
    symbols |= {"d": layer.dilation} if layer.dilation > 1 else {}
    symbols |= {"a": layer.remainder} if layer.remainder else {}
    given = ", ".join(f"{name} = {value}" for name, value in symbols.items())
    return f"{row.formula};   {given}:   o{mark} = {layer.output_size}"


def _show_windows(title: str, number: int, layer: Layer, *units: tuple[int, int]) -> Drawing:
    i, words = layer.size, []
    if layer.kind == "up_conv":
        words.append(f"{layer.stride - 1} zero between pixels" if layer.stride > 1 else "")
        words.append(f"padding k - 1 - p = {layer.span - 1 - layer.padding}")
        words.append(f"{layer.remainder} more below and right" if layer.remainder else "")
    elif layer.padding:
        words.append(f"padding {layer.padding}")
    label = ", ".join([f"input {i} x {i}", *filter(None, words)])
    views = [_View(layer, unit, label) for unit in units]
    return _windows(title, _symbols(layer, number), views)


def _dilations() -> Drawing:
    views = []
    for dilation in (1, 2, 3):
        layer = Layer(size=7, kernel=3, dilation=dilation)
        middle = (layer.output_size // 2,) * 2
        taps = arithmetic.wiring(layer)[middle].any((2, 3)).sum()
        views.append(
            _View(layer, middle, f"d = {dilation}: {taps} taps over {layer.span} x {layer.span}")
        )
    formula = "k_e = k + (k - 1)(d - 1);   o = floor((i + 2p - k_e)/s) + 1"
    return _windows("Dilation 1, 2 and 3", formula, views, side=26)


def _matrices() -> Drawing:
    """Draws W and its transpose between an image and its output, both flattened row by row."""
    layer, up = Layer(size=4, kernel=3), Layer(size=2, kernel=3, kind="up_conv")
    w, x = arithmetic.matrix(layer, _COUNTING), _image(4).reshape(-1, 1)
    transposed, z = arithmetic.matrix(up, _COUNTING), _image(2).reshape(-1, 1)
    y = layer.image(_image(4), _COUNTING).reshape(-1, 1)
    back = up.image(_image(2), _COUNTING).reshape(-1, 1)
    side, top = 24, 104
    d = Drawing(820, top + 16 * side + 60, "A convolution as a matrix, and its transpose")
    d.text(_EDGE, 26, d.title, size=18, anchor="start", bold=True)
    words = "y = W x for images read row by row; the up-convolution has the transposed matrix."
    d.text(_EDGE, 52, words, size=14, anchor="start")
    middle = top + 8 * side

    def table(x_at: float, cells: np.ndarray, ends: tuple[str, str] | None, name: str) -> float:
        """Draws a vertically centred table; returns the position of its right edge."""
        y_at = middle - len(cells) * side / 2
        if ends:
            grid(d, x_at, y_at, cells, side, _shades(cells, ends), size=11)
        else:
            written = np.where(cells == 0, "", [[f"{v:g}" for v in row] for row in cells])
            hue = lambda r, c: _HUES[int(cells[r, c]) - 1] if cells[r, c] else "#f8fafc"  # noqa: E731
            grid(d, x_at, y_at, written, side, hue, size=12, stroke="#cbd5e1")
        right = x_at + cells.shape[1] * side
        d.text((x_at + right) / 2, y_at - 14, name, colour=_GREY)
        return right

    def sign(x_at: float) -> float:
        d.text(x_at + 15, middle, "=", size=18)
        return x_at + 30

    at = table(_EDGE, y, _OUTPUT, "y")
    at = table(sign(at), w, None, "W, 4 x 16: each row is a window of the 4 x 4 image")
    at = table(at + 14, x, _INPUT, "x") + 70
    at = table(at, back, _INPUT, "x'")
    at = table(sign(at), transposed, None, "W^T, 16 x 4")
    table(at + 14, z, _OUTPUT, "y'")
    if not np.array_equal(transposed, w.T):
        raise ValueError("the up-convolution is not the transpose of the convolution")
    grid(d, 78, top + 18, _COUNTING, side, lambda r, c: _HUES[3 * r + c], size=12)
    d.text(166, top + 42, "kernel: each tap has", anchor="start", colour=_GREY)
    d.text(166, top + 60, "its colour; blank is zero", anchor="start", colour=_GREY)
    low = top + 16 * side + 22
    d.text(_EDGE, low, "convolution, 4 x 4 to 2 x 2", anchor="start", bold=True)
    d.text(500, low, "up-convolution, 2 x 2 to 4 x 4", anchor="start", bold=True)
    return d


def _copies() -> Drawing:
    """Draws an up-convolution as a sum of weighted copies of the kernel."""
    layer, x = (
        Layer(size=2, kernel=3, stride=2, kind="up_conv"),
        _COUNTING.ravel()[:4].reshape(2, 2),
    )
    copies, wires = (
        arithmetic.copies(layer, x, KERNEL),
        np.any(arithmetic.wiring(layer), axis=(4, 5)),
    )
    output, counts = layer.image(x, KERNEL), arithmetic.overlap(layer)
    o, side = len(output), 28
    panel, gap, top = o * side, 34, 232
    d = Drawing(2 * _EDGE + 4 * panel + 3 * gap, top + 2 * panel + 76, "Weighted copies, summed")
    d.text(_EDGE, 26, d.title, size=18, anchor="start", bold=True)
    d.text(_EDGE, 52, _symbols(layer, 12), size=14, anchor="start")
    hues = _HUES[:4]

    def blend(row: int, column: int) -> str:
        reaching = [hues[n] for n in np.flatnonzero(wires[row, column])]
        return functools.reduce(lambda a, b: mix(a, b, 0.5), reaching)

    grid(d, _EDGE, 100, x, side, lambda r, c: hues[2 * r + c])
    d.text(_EDGE + side, 86, "input", colour=_GREY)
    at = _EDGE + 3.4 * side
    grid(d, at, 100, KERNEL, side, lambda *_: _KERNEL)
    d.text(at + 1.5 * side, 86, "kernel", colour=_GREY)
    at += 3 * side + 24
    for line, words in enumerate(
        (
            "Each pixel places a copy of the kernel, times its value,",
            "s = 2 pixels from the next. What overlaps is added.",
            "Framed pixels get more than one copy: unevenly,",
            "since k = 3 is no multiple of s = 2.",
        )
    ):
        d.text(at, 108 + 20 * line, words, anchor="start", colour=_BROWN if line > 1 else INK)
    for number, (i, j) in enumerate(np.ndindex(x.shape)):
        left = _EDGE + number * (panel + gap)
        wired = wires[..., i, j]
        written = np.where(wired, [[f"{v:g}" for v in row] for row in copies[i, j]], "")
        hue = lambda r, c, on=wired, n=number: hues[n] if on[r, c] else _BLANK  # noqa: E731
        grid(d, left, top, written, side, hue, stroke="#94a3b8")
        d.text(left + panel / 2, top - 14, f"{x[i, j]:g} times the kernel", colour=_GREY)
        if number:
            d.text(left - gap / 2, top + panel / 2, "+", size=20)
    low, left = top + panel + 52, _EDGE + panel + gap
    d.text(left - gap / 2, low + panel / 2, "=", size=20)
    for cells, words, colour in (
        (output, "output: the sum", blend),
        (counts, "copies on each pixel", _shades(counts, _COUNT)),
    ):
        grid(d, left, low, cells, side, colour)
        for row, column in np.argwhere(counts > 1):
            corner = (left + column * side, low + row * side)
            d.rectangle(*corner, side, side, stroke=_FRAME, line=2)
        d.text(left + panel / 2, low - 14, words, colour=_GREY)
        left += panel + gap
    return d


def _wirings() -> Drawing:
    """Draws one axis of several layers, with a line from input to output pixel for each tap."""
    conv, up = functools.partial(Layer, size=7), functools.partial(Layer, size=4, kind="up_conv")
    panels = [
        ("convolution, k = 3", conv(kernel=3, padding=1)),
        ("k = 3, stride 2", conv(kernel=3, stride=2, padding=1)),
        ("k = 3, dilation 2", conv(kernel=3, dilation=2, padding=2)),
        ("up-convolution, k = 2, stride 2", up(kernel=2, stride=2)),
        ("k = 3, stride 2: uneven", up(kernel=3, stride=2)),
        ("k = 4, stride 2: even inside", up(kernel=4, stride=2)),
    ]
    wide, high, side = 274, 176, 20
    d = Drawing(3 * wide + _EDGE, 2 * high + 140, "Which pixel reaches which, through which tap")
    d.text(_EDGE, 26, d.title, size=18, anchor="start", bold=True)
    words = "Input below, output above; each output shows how many taps reach it."
    d.text(_EDGE, 52, words, size=14, anchor="start")
    for number, (name, layer) in enumerate(panels):
        left, top = _EDGE + number % 3 * wide, 142 + number // 3 * high
        wires = np.any(arithmetic.wiring(layer), axis=(0, 2, 4))  # [o, i, k] of one axis
        counts = wires.sum((1, 2))
        below, space = top + high - 66, wide - 2 * _EDGE - side

        def places(length: int, left=left, space=space) -> np.ndarray:
            step = min(space / (length - 1), 30)
            return left + (space - step * (length - 1)) / 2 + step * np.arange(length)

        outputs, inputs = places(len(wires)), places(layer.size)
        for o, i, tap in sorted(np.argwhere(wires), key=lambda wire: wire[2]):
            ends = [(inputs[i] + side / 2, below), (outputs[o] + side / 2, top + side)]
            d.polygon(ends, stroke=mix(_HUES[tap], "#000000", 0.15), width=2.5)
        shade = _shades(counts[None], _COUNT)
        for o, at in enumerate(outputs):
            d.rectangle(at, top, side, side, fill=shade(0, o), stroke=_GREY)
            d.text(at + side / 2, top + side / 2, str(counts[o]), size=11)
        for at in inputs:
            d.rectangle(at, below, side, side, fill=_INPUT[0], stroke=_GREY)
        d.text(left + (space + side) / 2, top - 16, name, size=14)
    for tap in range(4):
        at = _EDGE + 90 * tap
        d.polygon([(at, 84), (at + 26, 84)], stroke=mix(_HUES[tap], "#000000", 0.15), width=4)
        d.text(at + 32, 84, f"tap {tap}", anchor="start", colour=_GREY)
    return d


def _up(size: int, **geometry: int) -> Layer:
    return Layer(size=size, kernel=3, kind="up_conv", **geometry)


# Name: (title, number of the relationship, layer, output units whose windows are drawn).
_WINDOWS: dict[str, tuple] = {
    "no_padding": ("No padding", 1, Layer(size=5, kernel=3), (0, 0), (1, 2)),
    "half_padding": ("Half padding keeps the size", 3, Layer(size=5, kernel=3, padding=1),
                     (0, 0), (2, 3)),
    "full_padding": ("Full padding", 4, Layer(size=5, kernel=3, padding=2), (0, 0), (3, 4)),
    "strides": ("Stride 2", 6, Layer(size=5, kernel=3, stride=2, padding=1), (0, 0), (0, 1)),
    "strides_remainder": ("Stride 2 with a row and column left over", 6,
                          Layer(size=6, kernel=3, stride=2, padding=1), (0, 0), (2, 2)),
    "transposed": ("Transposed convolution", 8, _up(2), (0, 0), (1, 2)),
    "transposed_half": ("Transposed, half padding", 10, _up(5, padding=1), (0, 0), (2, 3)),
    "transposed_full": ("Transposed, full padding", 11, _up(5, padding=2), (0, 0), (1, 2)),
    "fractional_stride": ("Fractional stride: zeros between pixels", 13,
                          _up(3, stride=2, padding=1), (0, 0), (1, 2)),
    "fractional_stride_remainder": ("Fractional stride with a remainder", 14,
                                    _up(3, stride=2, padding=1, remainder=1), (0, 0), (5, 5)),
}  # fmt: skip

FIGURES: dict[str, Callable[[], Drawing]] = {
    **{name: functools.partial(_show_windows, *values) for name, values in _WINDOWS.items()},
    "dilation": _dilations,
    "weight_matrix": _matrices,
    "weighted_copies": _copies,
    "wiring": _wirings,
    "overlap": checkerboard_figures.overlaps,
    "backward": checkerboard_figures.backward,
}


def animation(name: str, scale: int = 1) -> list[np.ndarray]:
    """Returns one picture for each output unit of a figure with a window, in row-major order."""
    title, number, layer, *_ = _WINDOWS[name]
    outputs = np.ndindex(layer.output_size, layer.output_size)
    return [_show_windows(title, number, layer, unit).picture(scale) for unit in outputs]


def _save_animation(name: str, path: pathlib.Path) -> None:
    first, *others = map(Image.fromarray, animation(name))
    first.save(path, save_all=True, append_images=others, duration=700, loop=0)


ANIMATIONS = tuple(_WINDOWS)


def save(folder: pathlib.Path, *, animate: bool = False) -> None:
    """Writes every figure as SVG and PNG.

    Args:
      folder: where to write.
      animate: also write a GIF of each figure with a window.
    """
    for name, build in FIGURES.items():
        build().save(folder / name)
    for name in ANIMATIONS if animate else ():
        _save_animation(name, folder / f"{name}.gif")
