"""``python -m dense_jax evaluate``: scores a run or an ensemble of runs on a split."""

import dataclasses
import pathlib
from typing import Any, Literal

from dense_jax import runs
from dense_jax.commands.crf_flags import CrfFlag, CrfFlags, with_flags
from dense_jax.data.padded import Shapes
from dense_jax.errors import UserError
from dense_jax.evaluation import labels, report
from dense_jax.evaluation.record import Record
from dense_jax.ops.crf import CrfParams
from dense_jax.tasks import semantic, trained
from dense_jax.tasks.semantic import Combine, labelling
from dense_jax.train import processes


def run(
    *,
    run: pathlib.Path,
    split: str = "val",
    data_dir: str | None = None,
    checkpoint: Literal["last", "best"] = "last",
    absent: labels.Absent = "skip",
    bf_match: labels.BoundaryMatch = "distance",
    ensemble: tuple[pathlib.Path, ...] = (),
    combine: Combine = "mean_prob",
    output: pathlib.Path | None = None,
    eval_shapes: Shapes | None = None,
    change: tuple[str, ...] = (),
    crf: CrfFlag = None,
    crf_params: CrfFlags = CrfParams(),  # noqa: B008  (frozen)
    distributed: bool = False,
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
) -> None:
    """Score a run, or an ensemble of runs, on a split of its dataset and write a report.

    Args:
      run: folder of a training run.
      ensemble: folders of further runs with the same classes and normalisation; they and the run
        form an ensemble.
      combine: how the ensemble combines its members. mean_prob takes the mean of the class
        probabilities; product_score multiplies the scores of two runs, and negative scores of the
        second run count as zero (DeconvNet with FCN-8s; arXiv:1505.04366).
      split: train, val or test.
      data_dir: current folder of the dataset. Default: its folder in training.
      checkpoint: which parameters to use.
      absent: skip leaves a class without pixels out of the mean (FCN); zero counts it as zero
        (SegNet).
      bf_match: how to match boundary pixels; assignment is one to one and slow.
      output: folder to write. Default: RUN/evaluate-SPLIT-CHECKPOINT, or RUN/ensemble-..., with
        the suffix -crf or -no-crf if the flag is given, and with each change.
      eval_shapes: exact scores each image at its own size, and compiles each size; buckets pads
        images to at most four sizes, and measures what that changes. Default: as the run.
      change: settings of evaluation that differ from the run's, such as test-flip=on
        test-scales=1,0.75; see the flags --test-... of its script.
      crf: refine with a fully connected CRF, or not. Default: as the run's script does.
      crf_params: parameters of --crf; crf-search finds good ones.
      distributed: score with many processes: start the same command in each (docs/scale.md).
      coordinator: HOST:PORT of the first process; needed where no cluster says it.
      process_id: number of this process, from 0.
      num_processes: number of processes.
    """
    processes.start(distributed, coordinator, process_id, num_processes)
    opened = trained.load(run, checkpoint, changes=change)
    others = [trained.load(folder, checkpoint) for folder in ensemble]
    dataset = trained.dataset_of(opened, data_dir)
    task, variables = opened.task, opened.variables
    if others:
        task, variables = _together([opened, *others], combine, crf is not None)
    task = with_flags(task.with_shapes(eval_shapes), crf, crf_params)
    task = semantic.with_rules(task, absent, bf_match)
    kind = f"ensemble-{combine}" if others else "evaluate"
    suffix = {None: "", True: "-crf", False: "-no-crf"}[crf]
    suffix += "".join(f"-{each}" for each in change)
    output = output or run / f"{kind}-{split}-{checkpoint}{suffix}"
    record = task.evaluator(dataset, split)(variables, True)
    record.tell(opened.step)
    if path := processes.by_first(lambda: _write(record, opened, output)):
        print(f"report: {path}")


def _write(record: Record, opened: trained.Run, output: pathlib.Path) -> pathlib.Path:
    """Writes an evaluation and its report; returns the path of the report."""
    output.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "metrics.jsonl"):  # the report reads them
        if (opened.workdir / name).exists():
            with runs.replacing(output / name) as copy:
                copy.write((opened.workdir / name).read_bytes())
    record.write(output, opened.step)
    return report.write_report(output)


def _together(
    members: list[trained.Run], combine: Combine, without_crf: bool
) -> tuple[semantic.Semantic, tuple[Any, ...]]:
    """Returns an ensemble as one task, and the variables of each member."""
    for other in members[1:]:
        if other.classes.names != members[0].classes.names:
            first = members[0].workdir
            raise UserError(
                f"--ensemble: {other.workdir} and {first} label other classes: give runs with the "
                "same classes"
            )
    tasks = [labelling(member.task, "--ensemble") for member in members]
    if without_crf:
        tasks = [dataclasses.replace(task, crf=None) for task in tasks]
    task = semantic.together(tasks, [str(member.workdir) for member in members], combine)
    return task, tuple(member.variables for member in members)
