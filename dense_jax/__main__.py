"""What one does with a run or a dataset: ``python -m dense_jax COMMAND --help``."""

import dataclasses
import functools
import pathlib
import shutil
import sys
from typing import Annotated, Any, Literal

import jax
import tyro
from PIL import Image

from dense_jax import report, runs
from dense_jax.analysis import cost
from dense_jax.data import check
from dense_jax.data import dataset as datasets
from dense_jax.data.datasets.shapes import ShapesSpec
from dense_jax.data.normalise import num_channels
from dense_jax.errors import UserError
from dense_jax.infer import predictor
from dense_jax.ops.crf import CrfParams
from dense_jax.sweep import command as sweep
from dense_jax.tasks import (
    crf_search,
    evaluation,
    export,
    import_weights,
    prediction,
    receptive_field,
    semantic,
)
from dense_jax.tasks.networks import network
from dense_jax.train import cli
from dense_jax.train.config import DatasetName

CrfFlag = Annotated[bool | None, tyro.conf.arg(constructor=bool)]  # --crf, --no-crf or neither
CrfFlags = Annotated[CrfParams, tyro.conf.arg(name="crf", help="The CRF of --crf.")]


def _crf_choice(crf: bool | None, params: CrfParams) -> prediction.CrfChoice:
    if crf:
        return params
    if params != CrfParams():
        raise UserError("--crf.* are the parameters of a CRF that is not in use: give --crf too")
    return "run" if crf is None else "none"


def predict(
    *,
    run: pathlib.Path,
    input: pathlib.Path,
    output: pathlib.Path,
    checkpoint: Literal["last", "best"] = "last",
    overlays: bool = True,
    probabilities: bool = False,
    crf: CrfFlag = None,
    crf_params: CrfFlags = CrfParams(),  # noqa: B008  (frozen)
) -> None:
    """Label a folder of images: palette PNGs of class ids, overlays, optionally probabilities.

    Args:
      run: folder of a training run.
      input: folder of images, of any sizes.
      output: folder to write; made if it does not exist.
      checkpoint: which parameters to use.
      overlays: also write the images tinted by their labels.
      probabilities: also write the class probabilities (.npz, float16 [H, W, C]).
      crf: refine by this fully connected CRF, or by none; by default as the run's script does.
      crf_params: its parameters.
    """
    choice = _crf_choice(crf, crf_params)
    opened = runs.load(run, checkpoint)
    predict_fn, _ = prediction.predict_of(opened, choice)
    summary = predictor.predict_folder(
        functools.partial(jax.jit(predict_fn), jax.device_put(opened.variables)),
        opened.classes,
        opened.config.normalisation,
        input,
        output,
        overlays=overlays,
        probabilities=probabilities,
    )
    print(summary)
    if summary.failures:
        sys.exit(1)


def evaluate(
    *,
    run: pathlib.Path,
    split: str = "val",
    data_dir: str | None = None,
    checkpoint: Literal["last", "best"] = "last",
    absent: Literal["skip", "zero"] = "skip",
    bf_match: evaluation.BoundaryMatch = "distance",
    ensemble: tuple[pathlib.Path, ...] = (),
    combine: prediction.Combine = "mean_prob",
    output: pathlib.Path | None = None,
    crf: CrfFlag = None,
    crf_params: CrfFlags = CrfParams(),  # noqa: B008  (frozen)
) -> None:
    """Score a run, or several runs as one, on a split of its dataset and write a report.

    Args:
      run: folder of a training run.
      ensemble: folders of runs of the same classes and normalisation that decide together with it.
      combine: how: mean_prob takes the mean of the class probabilities, product_score the product
        of the scores of two runs, negative ones of the second counting as zero (DeconvNet with
        FCN-8s; arXiv:1505.04366).
      split: train, val or test.
      data_dir: where the dataset lies now; by default where it lay in training.
      checkpoint: which parameters to use.
      absent: a class without pixels is left out of the mean (FCN), or counts as zero (SegNet).
      bf_match: how boundary pixels are matched; assignment is one to one and slow.
      output: folder to write; by default RUN/evaluate-SPLIT-CHECKPOINT, or RUN/ensemble-..., with
        -crf or -no-crf behind it.
      crf: refine by this fully connected CRF, or by none; by default as the run's script does.
      crf_params: its parameters; crf-search finds them.
    """
    choice = _crf_choice(crf, crf_params)
    opened = runs.load(run, checkpoint)
    others = [runs.load(folder, checkpoint) for folder in ensemble]
    config, dataset = opened.config, semantic.dataset_of(opened, data_dir)
    predict_fn, card = prediction.predict_of(opened, choice)
    variables: Any = opened.variables
    if others:
        predict_fn, card = prediction.ensemble_of([opened, *others], combine, choice)
        variables = tuple(member.variables for member in (opened, *others))
    evaluator = evaluation.Evaluator(
        predict_fn,
        dataset.split(split),
        dataset.classes,
        batch_size=config.eval_batch_size,
        normalisation=config.normalisation,
    )
    kind = f"ensemble-{combine}" if others else "evaluate"
    suffix = {None: "", True: "-crf", False: "-no-crf"}[crf]
    output = output or run / f"{kind}-{split}-{checkpoint}{suffix}"
    output.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "metrics.jsonl"):  # the report shows them
        if (run / name).exists():
            shutil.copy(run / name, output / name)
    found = evaluator(variables, bf_match)
    extra = {} if others else evaluation.extra_scores_of(opened, predict_fn, dataset.split(split))
    evaluation.write_evaluation(output, found, dataset, split, opened.step, card, extra, absent)
    print(f"report: {report.write_report(output)}")


def check_data(
    *,
    dataset: DatasetName,
    data_dir: str | None = None,
    shapes: ShapesSpec | None = None,
    sheet: pathlib.Path | None = None,
) -> None:
    """Look through a dataset: wrong values, damaged files, sizes, frequencies, duplicates.

    Exits with status 1 if a file is wrong. Training does the same check when it first reads a
    dataset, and stops.

    Args:
      dataset: name of the dataset.
      data_dir: folder of the dataset.
      shapes: difficulty of the generated images, with --dataset=shapes.
      sheet: write training images under their labels to this PNG, to look at.
    """
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet={sheet}: give a name that ends in .png")
    options = dataclasses.asdict(shapes or ShapesSpec()) if dataset == "shapes" else {}
    found = check.check_dataset(dataset, data_dir, **options)
    print(found)
    if found.errors:
        sys.exit(1)
    if sheet is not None:
        Image.fromarray(check.sheet(datasets.load(dataset, data_dir, **options))).save(sheet)


def summary(
    *,
    run: pathlib.Path | None = None,
    script: str = "experiments.fcn",
    preset: str = "paper",
    flags: str = "",
    size: tuple[int, int] = (500, 500),
    num_classes: int = 21,
) -> None:
    """Print a network's layers, output shapes, parameters and FLOPs, without running it.

    Args:
      run: folder of a training run; if given, the next three are not used.
      script: script that defines the network.
      preset: one of its presets.
      flags: more of its flags, in one string, such as "--stride=32 --pad-mode=same".
      size: height and width of the image.
      num_classes: number of classes (a run knows its own).
    """
    if min(size) < 1:
        raise UserError(f"--size {size[0]} {size[1]}: give at least 1 1")
    chosen = network(run, script, preset, flags, num_classes)
    shape = (1, *size, num_channels(chosen.config.normalisation))
    print(cost.format_table(cost.summarise(chosen.model, shape)))


def main() -> None:
    """Runs one command."""
    commands = {
        "predict": predict,
        "evaluate": evaluate,
        "check-data": check_data,
        "crf-search": crf_search.run,
        "export": export.run,
        "import-weights": import_weights.run,
        "receptive-field": receptive_field.run,
        "summary": summary,
        "sweep": sweep.run,
    }
    with cli.exit_on_user_error():
        cli.set_up_jax()
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m dense_jax", description=__doc__
        )


if __name__ == "__main__":
    main()
