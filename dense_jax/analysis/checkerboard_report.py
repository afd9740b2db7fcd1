"""Files that a comparison of decoders writes: a record, tables, a plot and pictures."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from dense_jax.analysis import arithmetic_tables, checkerboard_figures
from dense_jax.analysis.decoders import Outputs


def write(
    folder: pathlib.Path,
    config: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    columns: Sequence[tuple[str, Outputs]],
) -> str:
    """Writes checkerboard.json, .md, .svg and .png and checkerboard_outputs.png.

    Args:
      folder: where to write.
      config: options of the comparison, for the record.
      rows: for each run, "upsample", "seed" and the values that `decoders.measure` returns.
      columns: names and outputs of the decoders to show.

    Returns:
      The tables in checkerboard.md. The table of gradients uses as many random kernels as `rows`
      has seeds.
    """
    record = {"config": config, "jax": jax.__version__, "rows": rows}
    (folder / "checkerboard.json").write_text(json.dumps(record, indent=1) + "\n")
    num_seeds = len({row["seed"] for row in rows})
    tables = arithmetic_tables.decoders(rows) + "\n" + arithmetic_tables.gradients(num_seeds)
    (folder / "checkerboard.md").write_text(tables)
    checkerboard_figures.decoders(rows).save(folder / "checkerboard")
    checkerboard_figures.outputs(columns).save(folder / "checkerboard_outputs.png")
    return tables
