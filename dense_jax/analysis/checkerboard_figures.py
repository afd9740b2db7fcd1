"""Figures of checkerboards: overlap of kernels, gradients of strided layers, measured levels."""

import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from PIL import Image

from dense_jax import viz
from dense_jax.analysis import checkerboard
from dense_jax.analysis.decoders import Outputs
from dense_jax.analysis.drawing import Drawing, mix

_EDGE, _BLANK, _GREY = 24, "#ffffff", "#64748b"
_MEASURES = ("untrained_constant", "trained_constant", "trained_smooth")


def overlaps() -> Drawing:
    """Draws the number of copies on each pixel, for kernels of 2 to 6 taps and strides 2 to 4."""
    kernels, strides, cell, box, name = range(2, 7), (2, 3, 4), 8, 152, "Overlap of kernels"
    d = Drawing(_EDGE + 40 + len(kernels) * box, 110 + len(strides) * (box + 12), name)
    title = "Copies of a k x k kernel on each output pixel, at stride s"
    d.text(_EDGE, 26, title, size=18, anchor="start", bold=True)
    words = "4 x 4 pixels of ones, a kernel of ones; darker is more. Even inside iff s divides k."
    d.text(_EDGE, 52, words, size=14, anchor="start")
    for (row, s), (column, k) in itertools.product(enumerate(strides), enumerate(kernels)):
        counts = checkerboard.overlap_map(k, s, 4)
        side = len(counts) * cell
        x, y = _EDGE + 40 + (column + 0.5) * box, 92 + (row + 0.5) * (box + 12)
        left, top = x - side / 2, y - side / 2
        for value in np.unique(counts[counts > 0]):
            colour = mix("#e3ecfb", "#1e3a8a", (value - 1) / 8)
            for r, start, stop in _runs(counts == value):
                corner = (left + start * cell, top + r * cell)
                d.rectangle(*corner, (stop - start) * cell, cell, fill=colour)
        inner = np.unique(checkerboard.inner_counts(k, s))
        words, frame = f"{inner[0]} to {inner[-1]}", "#dc2626"
        if len(inner) == 1:
            words, frame = f"{inner[0]} everywhere inside", "#16a34a"
        d.rectangle(left, top, side, side, stroke=frame, line=2)
        d.text(x, top + side + 11, words, size=11, colour=frame)
        if row == 0:
            d.text(x, 84, f"k = {k}", size=14, bold=True)
        if column == 0:
            d.text(_EDGE, y, f"s = {s}", size=14, anchor="start", bold=True)
    return d


def backward() -> Drawing:
    """Draws input gradients of strided layers, for an output gradient of ones."""
    size, cell, gap, top = 17, 9, 34, 100
    panels: list[tuple[str, str, np.ndarray]] = [
        (
            f"{kind.replace('_', ' ')}, k = {k}, s = 2",
            words,
            checkerboard.gradient_map(kind, k, 2, size, seed)[0, :, :, 0],
        )
        for kind, k, seed, words in (
            ("conv", 3, None, "ones: uneven"),
            ("conv", 4, None, "ones: even inside"),
            ("conv", 3, 0, "random kernel"),
            ("max_pool", 2, 0, "random image"),
        )
    ]
    side = size * cell
    d = Drawing(2 * _EDGE + 4 * side + 3 * gap, top + side + 44, "Gradients of strided layers")
    d.text(_EDGE, 26, d.title, size=18, anchor="start", bold=True)
    words = "Input gradient for an output gradient of ones: red above, blue below zero."
    d.text(_EDGE, 52, words, size=14, anchor="start")
    for number, (name, words, gradient) in enumerate(panels):
        left = _EDGE + number * (side + gap)
        steps = np.rint(16 * gradient / np.abs(gradient).max())  # the same on every machine
        for step in np.unique(steps[steps != 0]):
            colour = mix("#ffffff", "#dc2626" if step > 0 else "#2563eb", abs(float(step)) / 16)
            for row, start, stop in _runs(steps == step):
                corner = (left + start * cell, top + row * cell)
                d.rectangle(*corner, (stop - start) * cell, cell, fill=colour)
        d.rectangle(left, top, side, side, stroke=_GREY)
        d.text(left + side / 2, top - 14, name)
        d.text(left + side / 2, top + side + 16, words, colour=_GREY)
    return d


def levels(rows: dict[str, list[tuple[float, ...]]], names: tuple[str, ...]) -> Drawing:
    """Plots levels in decibels, with a line of dots for each key and name.

    Dots further to the right show a stronger pattern.

    Args:
      rows: for each key the levels of every run, with one level for each name.
      names: names of the measures, at most four.
    """
    low, high, left, wide, top = checkerboard.FLOOR, 0, 190, 580, 124
    colours = ("#94a3b8", "#d97706", "#2563eb", "#16a34a")[: len(names)]
    step = 16 * len(names) + 14
    d = Drawing(left + wide + 40, top + step * len(rows) + 34, "Energy of the checkerboard")
    d.text(_EDGE, 26, d.title, size=18, anchor="start", bold=True)
    words = "Share of the output's energy at the upsampling frequencies; further left is better."
    d.text(_EDGE, 52, words, size=14, anchor="start")

    def dot(x: float, y: float, colour: str) -> None:
        angles = (np.arange(12) + 0.5) * np.pi / 6
        points = [(float(x + 5 * np.cos(a)), float(y + 5 * np.sin(a))) for a in angles]
        d.polygon(points, fill=colour, stroke="#ffffff")

    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        dot(_EDGE + 6 + 190 * number, 84, colour)
        d.text(_EDGE + 18 + 190 * number, 84, name, anchor="start")
    bottom = top + step * len(rows)
    for tick in range(int(low), high + 1, 20):
        x = left + wide * (tick - low) / (high - low)
        d.polygon([(x, top - 14), (x, bottom)], stroke="#e2e8f0")
        d.text(x, bottom + 14, f"{tick} dB" if tick > low else f"at most {tick} dB", size=12)
    for number, (key, runs) in enumerate(rows.items()):
        y = top + step * number
        d.text(_EDGE, y + step / 2 - 7, key, anchor="start")
        for (line, colour), run in itertools.product(enumerate(colours), runs):
            dot(left + wide * (run[line] - low) / (high - low), y + 8 + 16 * line, colour)
    return d


def decoders(rows: Sequence[dict]) -> Drawing:
    """Plots the levels of trained decoders.

    Args:
      rows: for each run, "upsample" and the values that `decoders.measure` returns.
    """
    runs: dict[str, list[tuple[float, ...]]] = {row["upsample"]: [] for row in rows}
    for row in rows:
        runs[row["upsample"]].append(tuple(row[measure] for measure in _MEASURES))
    return levels(runs, tuple(" input, ".join(reversed(m.split("_"))) for m in _MEASURES))


def outputs(columns: Sequence[tuple[str, Outputs]]) -> Image.Image:
    """Draws the outputs of each decoder in a column under its name.

    The rows show a constant input before training at full contrast, a constant input after training
    at 16 times the contrast, and a picture after training.
    """
    rows = (
        [_enlarged(output.before, None) for _, output in columns],
        [_enlarged(output.after, 16) for _, output in columns],
        [_enlarged(output.picture, 1) for _, output in columns],
    )
    sheet = viz.contact_sheet(list(itertools.chain(*rows)), columns=len(columns))
    heading = Drawing(sheet.shape[1], 28, "")
    for column, (name, _) in enumerate(columns):
        heading.text((column + 0.5) * sheet.shape[1] / len(columns), 14, name, size=15)
    return Image.fromarray(np.concatenate([heading.picture(1), sheet])).quantize(256)


def _enlarged(y: jax.Array, contrast: float | None) -> np.ndarray:
    """Returns the middle 48 x 48 pixels of the first image, enlarged to uint8 [192, 192, 3].

    A contrast of 1 shows the image unchanged. Other values show its difference from the mean, times
    the contrast. None scales the difference to the full range.
    """
    edge = (np.shape(y)[1] - 48) // 2
    y = checkerboard.interior(y, edge)[0]
    if contrast != 1:
        y = y - y.mean((0, 1))
        y = y * (contrast or 0.5 / max(float(np.abs(y).max()), 1e-3))  # no rounding errors
    pixels = np.clip((y + 0.5) * 255, 0, 255).astype(np.uint8)
    return pixels.repeat(4, axis=0).repeat(4, axis=1)


def _runs(mask: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yields (row, first column, column after the last) for each run of True."""
    for row, line in enumerate(mask):
        edges = np.flatnonzero(np.diff(line.astype(int), prepend=0, append=0))
        for start, stop in edges.reshape(-1, 2):
            yield row, int(start), int(stop)
