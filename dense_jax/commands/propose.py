"""``python -m dense_jax propose``: writes boxes that may hold objects, for Fast R-CNN."""

import functools
import pathlib
import sys
from typing import Literal

import jax
import numpy as np

from dense_jax import runs
from dense_jax.errors import UserError, printable, refuse
from dense_jax.evaluation import proposals
from dense_jax.infer.predictor import read_images
from dense_jax.tasks import trained


def run(
    *,
    run: pathlib.Path,
    output: pathlib.Path,
    split: tuple[str, ...] = (),
    input: pathlib.Path | None = None,
    data_dir: str | None = None,
    checkpoint: Literal["last", "best"] = "last",
) -> None:
    """Write the proposals of a detector for a dataset or a folder, as a file for --proposals.

    The file is {"image name": [[x0, y0, x1, y1], ...], ...} in pixels, the best boxes first. For
    predict with given boxes, write it as proposals.json into the folder of the images.

    Args:
      run: folder of a training run.
      output: JSON file to write.
      split: splits of the run's dataset. Default: all of them.
      input: images of this folder, in place of a dataset's.
      data_dir: current folder of the dataset. Default: its folder in training.
      checkpoint: which parameters to use.
    """
    refuse(
        input is not None and (bool(split) or data_dir is not None),
        "--input takes the place of a dataset: leave out --split and --data-dir",
    )
    opened = trained.load(run, checkpoint)
    propose = opened.task.proposer()
    if propose is None:
        raise UserError(f"{run}: this run has no network of proposals: give one of Faster R-CNN")
    refuse(output.is_dir(), f"{output} is a folder: give a file to write")
    propose = functools.partial(propose, jax.device_put(opened.variables))
    boxes: dict[str, np.ndarray] = {}
    failures: list[str] = []
    if input is None:
        dataset = trained.dataset_of(opened, data_dir)
        runs.make_folder(output.parent)
        sources = [dataset.split(name) for name in dict.fromkeys(split or dataset.splits)]
        boxes = proposals.of_sources(propose, sources)
    else:
        images = read_images(input)
        runs.make_folder(output.parent)
        for example in images:
            if isinstance(example, UserError):
                failures.append(str(example))
            else:
                boxes[example["name"]] = propose(example["image"])
    refuse(not boxes, f"no image of {input} could be read: {failures[0] if failures else ''}")
    proposals.write(output, boxes)
    mean = np.mean([len(own) for own in boxes.values()])
    words = f"{output}: {len(boxes)} images, {mean:.0f} proposals each on average"
    print("\n".join([f"{words}; {len(failures)} failed", *map(printable, failures)]))
    if failures:
        sys.exit(1)
