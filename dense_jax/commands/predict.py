"""``python -m dense_jax predict``: predicts a folder of images with a run."""

import dataclasses
import pathlib
import sys
from typing import Annotated, Literal

import tyro

from dense_jax.commands.crf_flags import CrfFlag, CrfFlags, with_flags
from dense_jax.commands.object_flags import ObjectFlags, reading
from dense_jax.data.padded import Shapes
from dense_jax.infer import predictor
from dense_jax.ops.crf import CrfParams
from dense_jax.tasks import trained


def run(
    *,
    run: pathlib.Path,
    input: pathlib.Path,
    output: pathlib.Path,
    checkpoint: Literal["last", "best"] = "last",
    overlays: bool = True,
    probabilities: bool = False,
    eval_shapes: Shapes | None = None,
    change: tuple[str, ...] = (),
    objects: Annotated[ObjectFlags, tyro.conf.arg(name="")] = ObjectFlags(),  # noqa: B008
    crf: CrfFlag = None,
    crf_params: CrfFlags = CrfParams(),  # noqa: B008  (frozen)
) -> None:
    """Predict a folder of images: palette PNGs of class ids or masks of objects, and overlays.

    Runs that predict objects write all of them to results.json in COCO's format; pictures, masks
    and cut-outs show the likely ones. To see what happens inside a detector, see debug-pictures.

    Args:
      run: folder of a training run.
      input: image, or folder of images of any sizes.
      output: folder to write; made if it does not exist.
      checkpoint: which parameters to use.
      overlays: also write the images with the predictions on top.
      probabilities: also write the probabilities (.npz, float16).
      objects: what is written of objects.
      eval_shapes: exact labels each image at its own size, and compiles each size; buckets pads
        images to at most four sizes. Default: as the run.
      change: settings of evaluation that differ from the run's, such as test-flip=on
        test-scales=1,0.75; see the flags --test-... of its script.
      crf: refine with a fully connected CRF, or not. Default: as the run's script does.
      crf_params: parameters of --crf.
    """
    opened = trained.load(run, checkpoint, changes=change)
    task = with_flags(opened.task.with_shapes(eval_shapes), crf, crf_params)
    opened = dataclasses.replace(opened, task=task)
    summary = predictor.predict_folder(
        reading(opened.predictor, opened.task, objects),
        opened.classes,
        input,
        output,
        inputs_of=opened.task.inputs_in(input),
        overlays=overlays,
        probabilities=probabilities,
    )
    print(summary)
    if summary.failures:
        sys.exit(1)
