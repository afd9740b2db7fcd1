"""``python -m dense_jax debug-pictures``: draws what happens inside a run's network."""

import pathlib
import sys
from typing import Literal

import jax

from dense_jax import runs
from dense_jax.errors import UserError, refuse
from dense_jax.infer.predictor import read_images
from dense_jax.tasks import trained
from dense_jax.train.config import Count


def run(
    *,
    run: pathlib.Path,
    output: pathlib.Path,
    split: str | None = None,
    input: pathlib.Path | None = None,
    images: Count = 8,
    data_dir: str | None = None,
    checkpoint: Literal["last", "best"] = "last",
) -> None:
    """Draw what happens inside a run's network, for images of its dataset or of a folder.

    Of detectors: the proposals of each image, and of images of the dataset, whose objects are
    known, the anchors that stand for them. Writes OUTPUT/NAME-PICTURE.png.

    Args:
      run: folder of a training run.
      output: folder to write; made if it does not exist.
      split: draw the first images of this split: train, val or test. Default: val.
      input: draw this image, or the first images of this folder, in place of a split's.
      images: number of images.
      data_dir: current folder of the dataset. Default: its folder in training.
      checkpoint: which parameters to use.
    """
    refuse(
        input is not None and (split, data_dir) != (None, None),
        "--input takes the place of a dataset: leave out --split and --data-dir",
    )
    opened = trained.load(run, checkpoint)
    offered = opened.task.debug_pictures()
    if offered is None:
        raise UserError(
            f"{run}: runs of {opened.script} have no debug pictures: see their predictions with "
            "predict"
        )
    if input is not None:
        examples = read_images(input)
    else:
        source = trained.dataset_of(opened, data_dir).split(split or "val")
        examples = (source[i] for i in range(len(source)))
    runs.make_folder(output)
    variables, drawn, failures, num_done = jax.device_put(opened.variables), [], [], 0
    for example in examples:
        if isinstance(example, UserError):
            failures.append(str(example))
            continue
        if num_done == images:
            break
        num_done += 1
        for kind, picture in offered.draw(variables, example).items():
            name = example["name"].replace("/", "_")
            runs.write_png(output / f"{name}-{kind}.png", picture)
            drawn.append(kind)
    for kind in dict.fromkeys(drawn):
        print(f"*-{kind}.png: {offered.words[kind]}")
    print("\n".join([f"{len(drawn)} pictures in {output}; {len(failures)} failed", *failures]))
    if failures:
        sys.exit(1)
