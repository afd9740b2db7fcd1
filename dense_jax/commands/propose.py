"""``python -m dense_jax propose``: writes boxes that may hold objects, for Fast R-CNN."""

import functools
import pathlib
from typing import Literal

import jax
import numpy as np

from dense_jax import runs
from dense_jax.data.dataset import Example
from dense_jax.data.pictures import decode_image
from dense_jax.errors import UserError, refuse
from dense_jax.evaluation import proposals
from dense_jax.infer.predictor import find_images
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
    if input is not None:
        sources: list[proposals.Examples] = [_Files(input)]
    else:
        dataset = trained.dataset_of(opened, data_dir)
        sources = [dataset.split(name) for name in dict.fromkeys(split or dataset.splits)]
    refuse(output.is_dir(), f"{output} is a folder: give a file to write")
    runs.make_folder(output.parent)
    variables = jax.device_put(opened.variables)
    boxes = proposals.of_sources(functools.partial(propose, variables), sources)
    proposals.write(output, boxes)
    mean = np.mean([len(own) for own in boxes.values()])
    print(f"{output}: {len(boxes)} images, {mean:.0f} proposals each on average")


class _Files:
    """The images of a folder as a split without labels."""

    def __init__(self, folder: pathlib.Path):
        self._files = find_images(folder)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        file = self._files[index]
        try:
            return {"name": file.stem, "image": decode_image(file.read_bytes(), file).pixels}
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}): give an image") from error
