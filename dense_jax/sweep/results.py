"""Reads the results of a sweep's runs from their folders, anew on every call."""

import contextlib
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from dense_jax import runs
from dense_jax.analysis import cost
from dense_jax.errors import UserError
from dense_jax.evaluation import record as record_lib
from dense_jax.evaluation.record import Score
from dense_jax.scripts import Script
from dense_jax.sweep import tables
from dense_jax.sweep.plan import Run
from dense_jax.train.config import from_json
from dense_jax.train.log import read_metrics


@dataclasses.dataclass(frozen=True)
class Scoring:
    """The split and the rules of scoring: flags of ``python -m dense_jax evaluate``."""

    split: str
    absent: str
    bf_match: str

    def folder(self, item: Run) -> pathlib.Path:
        """Returns the folder of the evaluation; with the default rules a run scores itself."""
        if self == Scoring("val", "skip", "distance"):
            return item.final
        rules = (
            ""
            if (self.absent, self.bf_match) == ("skip", "distance")
            else (f"-{self.absent}-{self.bf_match}")
        )
        return item.final / f"evaluate-{self.split}-last{rules}"

    def words(self, item: Run) -> list[str]:
        """Returns the arguments of "python -m" that make the evaluation."""
        return [
            *("dense_jax", "evaluate", f"--run={item.final}", f"--split={self.split}"),
            *(f"--absent={self.absent}", f"--bf-match={self.bf_match}"),
            f"--output={self.folder(item)}",
            *item.processes,
        ]

    def read(self, item: Run) -> dict[str, Any] | None:
        """Returns the evaluation of the run's last step, or None."""
        evaluation = _evaluation(self.folder(item))
        done = evaluation and evaluation["protocol"].get("step") == item.stages[-1].num_steps
        return evaluation if done else None


def is_trained(script: str, item: Run) -> bool:
    """Whether the folder holds all steps of exactly this configuration, saved and evaluated."""
    config = item.stages[-1]
    evaluation = _evaluation(item.final)
    if evaluation is None:
        return False
    try:
        record = runs.read_config(item.final)
        before = from_json(type(config), record["config"])
    except UserError:  # missing, damaged, or of a run with other flags
        return False
    # The folder may have moved, and other processes may have trained it.
    own = ("workdir", "distributed", "coordinator", "process_id", "num_processes")
    same = dataclasses.replace(before, **{name: vars(config)[name] for name in own}) == config
    # The last evaluation is written before the last checkpoint.
    saved = (item.final / "checkpoints" / str(config.num_steps)).is_dir()
    done = evaluation["protocol"].get("step") == config.num_steps
    return record["script"] == script and same and saved and done


class Summary:
    """Tables of the finished runs, written anew after each run."""

    def __init__(
        self,
        out: pathlib.Path,
        title: str,
        script: Script,
        planned: Sequence[Run],
        scoring: Scoring,
    ) -> None:
        self._out, self._title, self._script = out, title, script
        self._planned, self._scoring = planned, scoring
        self._costs: dict[str, tuple[int, int] | None] = {}

    def write(self, failures: dict[pathlib.Path, str]) -> None:
        """Writes the tables; ``failures`` are reasons by run folder."""
        rows: dict[str, list[Run]] = {}
        for item in self._planned:
            rows.setdefault(str(item.settings), []).append(item)
        protocols: list[dict[str, Any]] = []
        table = [self._row(items, failures, protocols) for items in rows.values()]
        tables.write(self._out, self._title, self._facts(protocols), table)

    def _row(
        self,
        items: list[Run],
        failures: dict[pathlib.Path, str],
        protocols: list[dict[str, Any]],
    ) -> tables.Row:
        results, counted = [], None
        for item in items:
            evaluation = self._scoring.read(item)
            if evaluation is None or not is_trained(item.words[0], item):
                continue
            protocols.append(evaluation["protocol"])
            results.append(_result(item, evaluation, self._scoring.folder(item)))
            key = str(item.settings)
            if key not in self._costs:
                self._costs[key] = _cost(self._script, item)
            counted = self._costs[key]
        return tables.Row(
            items[0].settings,
            [item.command for item in items],
            results,
            [f"{i.workdir.name}: {failures[i.workdir]}" for i in items if i.workdir in failures],
            *(counted or (None, None)),
        )

    def _facts(self, protocols: list[dict[str, Any]]) -> list[str]:
        def every(name: str) -> str:
            return ", ".join(dict.fromkeys(str(protocol.get(name)) for protocol in protocols))

        facts = [f"{len(protocols)} of {len(self._planned)} runs finished"]
        if protocols:
            absent = f"; absent classes {every('absent_classes')}"
            has_rule = any(protocol.get("absent_classes") for protocol in protocols)
            facts += [
                f"scored on {every('images_scored')} images of {every('dataset')}, "
                f"{every('split')} split{absent if has_rule else ''}",
                f"device {every('device')}; commit {every('commit')}",
            ]
        return facts


def _result(item: Run, evaluation: dict[str, Any], folder: pathlib.Path) -> tables.Result:
    seconds, rates = 0.0, [math.nan]
    for stage in item.stages:
        last = 0
        found = read_metrics(pathlib.Path(stage.workdir or "") / "metrics.jsonl")
        rows = [(row["step"], _rate(row)) for row in found if row["kind"] == "train"]
        for step, rate in rows:
            seconds += (step - last) * stage.batch_size / rate
            last = step
        rates = [rate for _, rate in rows] or [math.nan]
    about = evaluation["about_scores"]
    scores = [
        Score(name, _number(value), **about.get(name, {}))
        for name, value in evaluation["scores"].items()
    ]
    table = next((table for table in evaluation["tables"] if table["log"]), None)
    return tables.Result(
        item.seed,
        {score.name: score for score in scores},
        {row[0]: _number(row[1]) for row in table["rows"]} if table else {},
        table["columns"][1]["title"] if table else "",
        seconds,
        statistics.median(rates[1:] or rates),  # the first row has the compilation
        folder / "report.html",
    )


def _rate(row: dict[str, Any]) -> float:
    """Returns the images per second of a row; NaN if it has none."""
    rate = row.get("images_per_second")
    return rate if isinstance(rate, int | float) and rate > 0 else math.nan


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _cost(script: Script, item: Run) -> tuple[int, int] | None:
    """Returns the number of parameters, and the FLOPs for one image of the training size."""
    evaluation = _evaluation(item.final) or {"protocol": {}}
    shape = evaluation["protocol"].get("input_shape")
    if shape is None:
        return None
    classes = runs.classes_of(item.final, runs.read_config(item.final))
    try:
        model = script.build(item.stages[-1], classes.num_classes).model
        rows = cost.summarise(model, (1, *shape))
    except Exception as error:  # leave two cells empty rather than end a long sweep
        print(f"{item.workdir.name}: its layers cannot be counted ({error})")
        return None
    return sum(row.num_params for row in rows), sum(row.flops for row in rows)


def _evaluation(folder: pathlib.Path) -> dict[str, Any] | None:
    """Returns the record of a folder, or None if it is missing or damaged."""
    with contextlib.suppress(UserError):
        return record_lib.read(folder)
    return None
