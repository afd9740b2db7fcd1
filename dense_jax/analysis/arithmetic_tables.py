"""The tables of docs/conv_arithmetic.md, as Markdown."""

from collections.abc import Sequence

import numpy as np

from dense_jax.analysis import arithmetic, checkerboard

_COLUMNS = {
    "untrained_constant": "constant, untrained",
    "trained_constant": "constant, trained",
    "untrained_smooth": "smooth, untrained",
    "trained_smooth": "smooth, trained",
    "trained_ripple": "ripple",
    "psnr": "PSNR",
}


def sizes() -> str:
    """Returns the fifteen relationships, each with the number of layers that confirm it.

    Raises:
      ValueError: a relationship does not hold for a layer.
    """
    lines = ["| # | case | formula | layers checked |", "|---|---|---|---|"]
    for row in arithmetic.RELATIONSHIPS:
        layers = list(arithmetic.layers(row, 5))
        if wrong := [layer for layer in layers if row.size(layer) != layer.output_size]:
            raise ValueError(f"relationship {row.number} does not hold for {wrong[0]}")
        lines.append(f"| {row.number} | {row.case} | `{row.formula}` | {len(layers)} |")
    return "\n".join([*lines, ""])


def decoders(rows: Sequence[dict]) -> str:
    """Returns the mean and standard deviation over seeds for each way of upsampling.

    Args:
      rows: for each run, "upsample" and the values that `decoders.measure` returns.
    """
    lines = ["| upsample | parameters | " + " | ".join(_COLUMNS.values()) + " |", "|---" * 8 + "|"]
    for kind in dict.fromkeys(row["upsample"] for row in rows):
        runs = [row for row in rows if row["upsample"] == kind]
        cells = [kind, f"{runs[0]['parameters']:,}"]
        for column in _COLUMNS:
            values = np.array([row[column] for row in runs])
            spread = f" \u00b1 {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.1f}{spread}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def gradients(num_seeds: int) -> str:
    """Returns the checkerboard levels of input gradients (`checkerboard.gradient_levels`)."""
    lines = ["| layer | random | ones |", "|---|---|---|"]
    for name, (random, ones) in checkerboard.gradient_levels(num_seeds).items():
        lines.append(f"| {name} | {random:.1f} | {'' if ones is None else f'{ones:.1f}'} |")
    return "\n".join([*lines, ""])
