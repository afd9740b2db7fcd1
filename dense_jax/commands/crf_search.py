"""Searches the parameters of a CRF for a run, from coarse to fine, on a part of a split.

The network scores the images once; after that, each setting needs mean field inference alone. Round
one scores both ends and the middle of every range. Each further round scores the neighbours of the
best setting at half the distance. Every score is written at once, so a search can be resumed.

Reference: Chen et al., ICLR 2015, arXiv:1412.7062, Section 5.1, and PAMI 2017, arXiv:1606.00915,
Section 4.1, with the default ranges: w2 = sg = 3, and the others from coarse to fine on 100 images.
"""

import csv
import dataclasses
import io
import itertools
import pathlib
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dense_jax import runs
from dense_jax.data.dataset import Part, Source
from dense_jax.errors import UserError
from dense_jax.evaluation.batches import Predicts, eval_batches, predict_each
from dense_jax.infer.crf import check_crf, refine
from dense_jax.metrics import semantic as metrics
from dense_jax.ops.crf import CrfParams
from dense_jax.tasks import trained
from dense_jax.tasks.semantic import labelling
from dense_jax.train.step import Batch, eval_step, replicate, shard

AXES = ("w1", "sxy", "srgb", "w2", "sg")
Range = tuple[float, float]
Point = tuple[float, ...]  # one value for each of AXES
Scores = dict[str, float]

_SCORES = ("mean_iou", "pixel_accuracy", "seconds")


def run(
    *,
    run: pathlib.Path,
    split: str = "val",
    num_images: int = 100,
    w1: Range | None = (3.0, 6.0),
    sxy: Range | None = (30.0, 100.0),
    srgb: Range | None = (3.0, 6.0),
    w2: Range | None = None,
    sg: Range | None = None,
    rounds: int = 3,
    crf_params: Annotated[
        CrfParams, tyro.conf.arg(name="crf", help="Fixed values of the other parameters.")
    ] = CrfParams(),  # noqa: B008  (frozen)
    data_dir: str | None = None,
    checkpoint: Literal["last", "best"] = "last",
    output: pathlib.Path | None = None,
) -> None:
    """Search for the best parameters of a fully connected CRF for a run, from coarse to fine.

    Prints the best setting and the command that uses it. The same command resumes a stopped search.
    A search with other ranges or rounds skips all settings with known scores.

    Args:
      run: folder of a training run.
      split: split to search on; use another split for the final metrics.
      num_images: number of images to use, evenly spaced in the split.
      w1: least and greatest weight of the bilateral kernel; None uses --crf.w1.
      sxy: range of its standard deviation in pixels.
      srgb: range of its standard deviation in colour.
      w2: range of the weight of the spatial kernel.
      sg: range of its standard deviation in pixels.
      rounds: number of rounds; each but the first halves the distance between settings.
      crf_params: the other parameters.
      data_dir: current folder of the dataset. Default: its folder in training.
      checkpoint: which parameters of the network to use.
      output: folder of the table. Default: RUN/crf-search-SPLIT-CHECKPOINT.
    """
    ranges = _ranges({"w1": w1, "sxy": sxy, "srgb": srgb, "w2": w2, "sg": sg}, crf_params)
    for name, value in (("num-images", num_images), ("rounds", rounds)):
        if value < 1:
            raise UserError(f"--{name}={value}: give at least 1")
    opened = trained.load(run, checkpoint)
    dataset = trained.dataset_of(opened, data_dir)
    source, config = spread(dataset.split(split), num_images), opened.config
    lowest = at(crf_params, [low for low, _ in ranges])
    check_crf(lowest, config.normalisation)
    task = dataclasses.replace(labelling(opened.task, "crf-search"), crf=None)
    output = output or run / f"crf-search-{split}-{checkpoint}"
    fixed = {k: v for k, v in dataclasses.asdict(crf_params).items() if k not in AXES}
    table = Table(
        output,
        {
            "run": str(run),
            "step": opened.step,
            "fingerprint": dataset.fingerprint,
            "split": split,
            "num_images": len(source),
            **fixed,
        },
    )
    unaries = Unaries(output / "logits", source, task, opened.variables, crf_params)
    with unaries:
        start = unaries.scores()
        print(f"mean IoU {start['mean_iou']:.4f} without CRF on {len(source)} {split} images")
        if np.isnan(start["mean_iou"]):
            raise UserError(f"split {split!r} has no labels to score with: give another --split")

        def score(point: Point) -> Scores:
            began = time.perf_counter()
            scores = unaries.scores(point)
            return {**scores, "seconds": time.perf_counter() - began}

        best = search(score, ranges, rounds, table)
    print(_advice(at(crf_params, best), ranges, table.rows[best], start, run, split, checkpoint))


def at(params: CrfParams, point: Sequence[Any]) -> CrfParams:
    """Returns the CRF with the values of a setting, which may be traced."""
    values: dict[str, Any] = dict(zip(AXES, point, strict=True))
    return dataclasses.replace(params, **values)


def search(
    score: Callable[[Point], Scores], ranges: Sequence[Range], rounds: int, table: "Table"
) -> Point:
    """Returns the setting with the highest mean IoU of a coarse-to-fine search.

    Args:
      score: (setting) -> its scores; called once for each setting that `table` lacks.
      ranges: least and greatest value of each of `AXES`; equal if the axis is not searched.
      rounds: number of rounds; each but the first halves the distance between settings.
      table: earlier scores; each new score is added to it.
    """
    best: Point = tuple((low + high) / 2 for low, high in ranges)
    mean_ious: dict[Point, float] = {}
    for number in range(rounds):
        points = list(neighbours(best, ranges, 0.5 ** (number + 1)))
        for rank, point in enumerate(points, 1):
            if point not in table.rows:
                table.add(point, score(point))
            mean_ious[point] = table.rows[point]["mean_iou"]
            setting = " ".join(f"{k}={v:g}" for k, v in zip(AXES, point, strict=True))
            print(
                f"round {number + 1} of {rounds}, {rank} of {len(points)}: {setting}: "
                f"mean IoU {mean_ious[point]:.4f}",
                flush=True,
            )
        best = max(mean_ious, key=lambda point: mean_ious[point])  # the first of equal ones
    return best


def neighbours(centre: Point, ranges: Sequence[Range], share: float) -> Iterator[Point]:
    """Yields all settings at most one step from the centre on each axis, within the ranges.

    A step is this share of the range.
    """
    axes = []
    for middle, (low, high) in zip(centre, ranges, strict=True):
        step = share * (high - low)
        axes.append(sorted({x for x in (middle - step, middle, middle + step) if low <= x <= high}))
    yield from itertools.product(*axes)


class Table:
    """``table.csv`` in a folder: the scores of each setting; every new row is saved at once.

    Attributes:
      rows: the scores by setting.
    """

    def __init__(self, folder: pathlib.Path, facts: Mapping[str, Any]) -> None:
        """Opens a table, or starts a new one.

        Args:
          folder: made if it does not exist.
          facts: everything else that the scores depend on, as plain JSON values.

        Raises:
          UserError: the folder holds a search with other facts, or a damaged one.
        """
        self.rows: dict[Point, Scores] = {}
        self._path, record = folder / "table.csv", folder / "search.json"
        folder.mkdir(parents=True, exist_ok=True)
        if record.exists():
            old = runs.read_json(record, {}, "remove it, or give another --output")
            if changed := [key for key, value in facts.items() if old.get(key) != value]:
                key = changed[0]
                raise UserError(
                    f"{folder} holds another search ({key} was {old.get(key)!r} and is now "
                    f"{facts[key]!r}): give another --output"
                )
        runs.write_json(record, dict(facts))
        if self._path.exists():
            try:
                self._read()
            except (ValueError, KeyError, TypeError, csv.Error) as error:
                raise UserError(
                    f"{self._path} is damaged ({error}): remove it, or give another --output"
                ) from error
        self._write()

    def _read(self) -> None:
        with self._path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if None in row.values():  # a last line that was cut short
                    continue
                numbers = {name: float(row[name]) for name in (*AXES, *_SCORES)}
                if not np.all(np.isfinite(list(numbers.values()))):
                    raise ValueError(f"a row has {numbers}")
                point = tuple(numbers[name] for name in AXES)
                self.rows[point] = {name: numbers[name] for name in _SCORES}

    def add(self, point: Point, scores: Scores) -> None:
        """Adds a row and saves the table."""
        self.rows[point] = scores
        self._write()

    def _write(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow([*AXES, *_SCORES])
        for point, scores in self.rows.items():
            writer.writerow([*point, *(scores[name] for name in _SCORES)])
        runs.write_text(self._path, text.getvalue())


class Unaries:
    """The logits of a split's images, stored on disk for all settings; a context."""

    def __init__(
        self,
        folder: pathlib.Path,
        source: Source,
        task: Predicts,
        variables: Any,
        params: CrfParams,
    ) -> None:
        """Prepares the batches; entering the context computes the logits.

        Args:
          folder: folder of the logits; replaced on entry, removed on exit.
          source: the images.
          task: predicts the logits.
          variables: the network's variables.
          params: the CRF parameters besides `AXES`.
        """
        self._folder, self._batches = folder, eval_batches(source, task)
        self._task, self._variables = task, variables
        self._params, self._normalisation = params, task.config.normalisation
        self._steps: dict[float | None, Any] = {}

    def __enter__(self) -> "Unaries":
        shutil.rmtree(self._folder, ignore_errors=True)  # a killed search may have left it
        self._folder.mkdir(parents=True)

        def logits_of(variables: Any, batch: Batch) -> tuple[Any, Any]:
            outputs = predict_each(self._task, variables, batch["images"], batch["size"])
            return {}, outputs["logits"]

        step, variables = eval_step(logits_of), replicate(self._variables)
        for number, batch in enumerate(self._batches):
            arrays = shard({key: batch[key] for key in ("images", "size")})
            logits = np.asarray(step(variables, arrays)[1])
            np.save(self._folder / f"{number}.npy", logits.reshape(-1, *logits.shape[2:]))
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def scores(self, point: Point | None = None) -> Scores:
        """Returns mean IoU and pixel accuracy with the CRF of a setting, or without a CRF.

        Only a new sg needs a compilation: it decides the size of the truncated filter.
        """
        *values, sg = point or (None,)
        if sg not in self._steps:
            self._steps[sg] = self._counts_step(sg)
        numbers = tuple(np.float32(value) for value in values)
        confusion = None
        for number, batch in enumerate(self._batches):
            arrays = {name: batch[name] for name in ("images", "labels", "size")}
            arrays["logits"] = np.load(self._folder / f"{number}.npy")
            counts, _ = self._steps[sg](numbers, shard(arrays))
            confusion = metrics.add(confusion, jax.device_get(counts))
        if confusion is None:
            raise UserError("the split to search on has no images")
        summary = metrics.summarise(confusion)
        return {name: summary[name] for name in ("mean_iou", "pixel_accuracy")}

    def _counts_step(self, sg: float | None) -> Any:
        """Returns (values of `AXES` but sg, batch with logits) -> confusion [C, C]."""

        def counts(values: tuple[jax.Array, ...], batch: Batch) -> tuple[Any, Any]:
            logits = batch["logits"]
            if sg is not None:
                crf = at(self._params, (*values, sg))
                logits = refine(logits, batch["images"], batch["size"], crf, self._normalisation)
            predictions = jnp.argmax(logits, axis=-1)
            return metrics.confusion_counts(batch["labels"], predictions, logits.shape[-1]), {}

        return eval_step(counts)


def spread(source: Source, num: int) -> Part:
    """Returns evenly spaced examples of a split, or all of them if it has no more."""
    indices = np.linspace(0, len(source) - 1, min(num, len(source))).round().astype(int)
    return Part(source, indices.tolist())


def _ranges(flags: Mapping[str, Range | None], params: CrfParams) -> list[Range]:
    ranges = []
    for name in AXES:
        fixed = getattr(params, name)
        low, high = flags[name] or (fixed, fixed)
        if not low <= high:
            raise UserError(f"--{name} {low:g} {high:g}: give the lesser value first")
        ranges.append((low, high))
    return ranges


def _advice(
    params: CrfParams,
    ranges: Sequence[Range],
    best: Scores,
    start: Scores,
    run: pathlib.Path,
    split: str,
    checkpoint: str,
) -> str:
    """Returns the result of a search, and the commands that use it."""
    defaults = CrfParams()
    flags = [
        f"--crf.{name.replace('_', '-')}={value}"
        for name, value in dataclasses.asdict(params).items()
        if name in AXES or value != getattr(defaults, name)
    ]
    edges = [
        f"{name}={value:g} is at the end of its range: try a wider one"
        for name, (low, high) in zip(AXES, ranges, strict=True)
        if low < high and (value := getattr(params, name)) in (low, high)
    ]
    where = shlex.quote(str(run))
    return "\n".join(
        [
            f"best: mean IoU {best['mean_iou']:.4f} (without CRF {start['mean_iou']:.4f}), pixel "
            f"accuracy {best['pixel_accuracy']:.4f} (without {start['pixel_accuracy']:.4f})",
            *edges,
            f"python -m dense_jax evaluate --run {where} --split {split} "
            f"--checkpoint {checkpoint} --crf {' '.join(flags)}",
            f"a script that has --post takes: --post=crf {' '.join(flags)}",
        ]
    )
