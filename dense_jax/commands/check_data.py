"""``python -m dense_jax check-data``: lists errors and oddities of a dataset."""

import pathlib
import sys
from typing import Any

from dense_jax import runs
from dense_jax.data import check
from dense_jax.data import dataset as datasets
from dense_jax.data.datasets.shapes import ShapesSpec
from dense_jax.errors import UserError
from dense_jax.train.config import DatasetName, RunConfig


def run(
    *,
    dataset: DatasetName,
    data_dir: str | None = None,
    shapes: ShapesSpec | None = None,
    train_json: str | None = None,
    val_json: str | None = None,
    sheet: pathlib.Path | None = None,
) -> None:
    """Check a dataset: wrong values, damaged files, sizes, frequencies, duplicates.

    Exits with status 1 if a file is wrong. Training makes the same check when it first reads a
    dataset, and stops at an error.

    Args:
      dataset: name of the dataset.
      data_dir: folder of the dataset.
      shapes: difficulty of the generated images, with --dataset=shapes.
      train_json: annotations of the training images, with --dataset=coco.
      val_json: annotations of the validation images, likewise.
      sheet: write training images with their labels on top to this PNG.
    """
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet={sheet}: give a name that ends in .png")
    given: dict[str, Any] = {"train_json": train_json, "val_json": val_json}
    config = RunConfig(dataset=dataset, data_dir=data_dir, shapes=shapes or ShapesSpec(), **given)
    data_dir, options = config.data_dir, config.data_options
    summary = check.check_dataset(dataset, data_dir, **options)
    print(summary)
    if summary.errors:
        sys.exit(1)
    if sheet is not None:
        runs.write_png(sheet, check.sheet(datasets.load(dataset, data_dir, **options)))
