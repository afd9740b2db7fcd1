"""Draws what RoIPool, RoIWarp and RoIAlign return for a box that moves by fractions of a pixel.

    python -m dense_jax.analysis.roi_figures --path=docs/figures/roi_shift

Reference: He et al., ICCV 2017, arXiv:1703.06870, Section 3 and Table 2c.
"""

import dataclasses
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dense_jax.analysis.drawing import Drawing
from dense_jax.ops import roi

STRIDE, CELLS, BINS = 16, 12, 2
SHIFTS = np.arange(0, 48.1, 0.25)  # Pixels.
_BOX = (36.0, 36.0, 100.0, 100.0)  # 4 x 4 cells, moved to the right.
_COLOURS = {"RoIPool": "#d97706", "RoIWarp": "#2563eb", "RoIAlign": "#16a34a"}
_CELL = np.arange(CELLS, dtype=np.float32)
FEATURES = {
    "Features that grow by 1 in each cell": _CELL,
    "A smooth object": 8 * np.exp(-(((_CELL - 7) / 2) ** 2)),
}


def curves(features: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the feature of the left bin at each of SHIFTS, by the operator's name.

    Args:
      features: [CELLS], the same in each row of the map.
    """
    maps = jnp.broadcast_to(jnp.asarray(features, jnp.float32)[:, None], (1, CELLS, CELLS, 1))
    zeros = np.zeros_like(SHIFTS)
    boxes = np.stack([SHIFTS, zeros, SHIFTS, zeros], axis=-1) + np.array(_BOX)
    operators = {
        "RoIPool": functools.partial(roi.roi_pool, maps, stride=STRIDE),
        "RoIWarp": functools.partial(roi.roi_warp, maps, stride=STRIDE, reduce="mean"),
        "RoIAlign": functools.partial(roi.roi_align, [maps], strides=[STRIDE], aligned=True),
    }
    moved = jnp.asarray(boxes, jnp.float32)[None]
    return {
        name: np.asarray(jax.jit(functools.partial(f, bins=BINS))(moved))[0, :, 0, 0, 0]
        for name, f in operators.items()
    }


def shifts() -> Drawing:
    """Plots `curves` of both kinds of features."""
    edge, wide, high, gap, top = 24, 380, 240, 70, 132
    d = Drawing(2 * edge + 2 * wide + gap + 30, top + high + 84, "Rounding of boxes to cells")
    d.text(edge, 26, "A box moves by fractions of a pixel", size=18, anchor="start", bold=True)
    words = (
        f"Feature of its left bin. A cell is {STRIDE} pixels; the box is 4 cells wide, with 2 bins."
    )
    d.text(edge, 52, words, size=14, anchor="start")
    for number, (name, colour) in enumerate(_COLOURS.items()):
        x = edge + 130 * number
        d.polygon([(x, 80), (x + 26, 80)], stroke=colour, width=3)
        d.text(x + 34, 80, name, size=14, anchor="start")
    for number, (title, features) in enumerate(FEATURES.items()):
        left, values = edge + 30 + number * (wide + gap), curves(features)
        limit = float(np.ceil(max(v.max() for v in values.values())))

        def at(shift, value, left=left, limit=limit):
            return left + wide * shift / SHIFTS[-1], top + high * (1 - value / limit)

        d.text(left, top - 18, title, anchor="start", bold=True)
        for tick in range(0, int(limit) + 1, 2):
            d.polygon([at(0, tick), at(SHIFTS[-1], tick)], stroke="#e2e8f0")
            d.text(left - 12, at(0, tick)[1], str(tick), size=12)
        for tick in range(0, int(SHIFTS[-1]) + 1, STRIDE // 2):
            d.polygon([at(tick, 0), at(tick, limit)], stroke="#e2e8f0")
            d.text(at(tick, 0)[0], top + high + 14, str(tick), size=12)
        d.text(left + wide / 2, top + high + 36, "shift to the right, pixels", size=12)
        for name, line in values.items():
            points = [at(*pair) for pair in zip(SHIFTS.tolist(), line.tolist(), strict=True)]
            for pair in itertools.pairwise(points):
                d.polygon(pair, stroke=_COLOURS[name], width=2.5)
    words = (
        "RoIPool and RoIWarp round the box to cells: between steps they do not see that it moves."
    )
    d.text(edge, top + high + 64, words, size=14, anchor="start")
    return d


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Where to draw the figure."""

    path: pathlib.Path = pathlib.Path("roi_shift")
    """PATH.svg and PATH.png are written."""


def main(config: Config) -> None:
    """Writes the figure."""
    shifts().save(config.path)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, prog="python -m dense_jax.analysis.roi_figures"))
