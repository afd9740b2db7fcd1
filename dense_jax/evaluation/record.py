"""What an evaluation found, in a form that describes itself: scores, tables and pictures.

Reports, sweeps and galleries show what a record holds and know no task. The record of a run is
``evaluation.json``; pictures lie beside it.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from dense_jax import runs
from dense_jax.errors import UserError

Cell = str | float | None


@dataclasses.dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
      name: its key, such as "mean_iou".
      value: NaN where nothing was scored.
      title: what people read; empty for the name.
      unit: "%" for a share in [0, 1], which is shown in percent; else what stands behind the
        number, such as "px".
      main: whether it is shown among the first; others come further down.
    """

    name: str
    value: float
    title: str = ""
    unit: str = "%"
    main: bool = True


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a `Table`: its heading, and the unit of its numbers as in `Score`."""

    title: str
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text and numbers; None is an empty cell.

    Attributes:
      title: its heading.
      columns: the first holds the rows' names.
      rows: a cell for each column.
      log: if not empty, the second column is logged with every evaluation, as LOG/NAME.
      note: a line below it.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    log: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture with its caption.

    Attributes:
      file: name of the PNG.
      draw: returns uint8 [H, W, 3]; called when the record is written.
      group: heading that it shares with others, such as "Worst".
      caption: its own line.
      parts: what its parts show, from left to right.
    """

    file: str
    draw: Callable[[], np.ndarray]
    group: str
    caption: str = ""
    parts: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Findings:
    """What one measure found.

    Attributes:
      scores: numbers.
      tables: tables.
      pictures: pictures.
      files: further text files by name.
    """

    scores: Sequence[Score] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Record:
    """The result of one evaluation.

    Attributes:
      headline: name of the score that decides which checkpoint is the best; higher is better.
      findings: of each measure, the main one first.
      protocol: how it was scored.
      data: raw counts and tables for programs, plain JSON values.
    """

    headline: str
    findings: Sequence[Findings]
    protocol: Mapping[str, Any]
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def scores(self) -> dict[str, Score]:
        """All scores by name."""
        return {score.name: score for found in self.findings for score in found.scores}

    def row(self) -> dict[str, float]:
        """Returns the numbers of the log: the scores, and the tables that are logged."""
        numbers = {name: score.value for name, score in self.scores.items()}
        for found in self.findings:
            for table in found.tables:
                for name, value, *_ in table.rows if table.log else ():
                    numbers[f"{table.log}/{name}"] = math.nan if value is None else float(value)
        return numbers

    def write(self, workdir: pathlib.Path, step: int) -> None:
        """Writes ``evaluation.json`` and ``pictures/`` of parameters that are `step` steps old."""
        folder, pictures = workdir / "pictures", []
        folder.mkdir(parents=True, exist_ok=True)
        for picture in (picture for found in self.findings for picture in found.pictures):
            Image.fromarray(picture.draw()).save(folder / picture.file)
            kept = {f: getattr(picture, f) for f in ("group", "caption", "parts")}
            pictures.append({"file": f"pictures/{picture.file}", **kept})
        for name, text in (item for found in self.findings for item in found.files.items()):
            (workdir / name).write_text(text)
        scores = self.scores.values()
        about = {s.name: {"title": s.title, "unit": s.unit, "main": s.main} for s in scores}
        tables = [table for found in self.findings for table in found.tables]
        record = {
            "protocol": {**self.protocol, "step": step, **runs.provenance()},
            "headline": self.headline,
            "scores": {score.name: score.value for score in scores},
            "about_scores": about,
            "tables": [dataclasses.asdict(table) for table in tables],
            "pictures": pictures,
            **self.data,
        }
        runs.write_json(workdir / "evaluation.json", _without_nan(record))

    def tell(self, step: int) -> None:
        """Prints the main scores, above a progress bar where there is one."""
        first = [s for s in self.scores.values() if s.main and not math.isnan(s.value)]
        shown = ", ".join(f"{(s.title or s.name).lower()} {s.value:.4f}" for s in first[:3])
        count, split = self.protocol["images_scored"], self.protocol["split"]
        tqdm.tqdm.write(f"step {step}: {shown} on {count} {split} images")


def read(folder: pathlib.Path) -> dict[str, Any] | None:
    """Reads the ``evaluation.json`` of a folder, or returns None where there is none.

    Records of earlier versions come back in today's form; what they do not tell is left out.

    Raises:
      UserError: it is damaged.
    """
    path = folder / "evaluation.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if "about_scores" in record else _upgrade(record, folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): evaluate the run again") from error


def _upgrade(record: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Describes a record of the time when every run labelled pixels."""
    scores = record["scores"]
    about = {
        name: {"title": name.replace("_", " ").capitalize(), "unit": "", "main": False}
        for name in scores
    }
    for name in ("mean_iou", "pixel_accuracy", "mean_accuracy", "boundary_f1", "mask_iou"):
        if name in about:
            about[name] |= {"unit": "%", "main": True}
    columns = [("Class", ""), ("IoU", "%"), ("Accuracy", "%")]
    table = {
        "title": "Classes",
        "columns": [{"title": title, "unit": unit} for title, unit in columns],
        "rows": [[row["name"], row["iou"], row.get("accuracy")] for row in record["per_class"]],
        "log": "iou",
        "note": "",
    }
    pictures = [
        {
            "file": image["triplet"],
            "group": image["kind"].capitalize(),
            "caption": f"{image['name']}, {100 * image['score']:.1f} %",
            "parts": ["image", "label", "prediction", "errors red, void white"],
        }
        for kind in ("worst", "best")
        for image in record.get("images", ())
        if image["kind"] == kind
    ]
    told = {picture["file"] for picture in pictures}
    for path in sorted((folder / "pictures").glob("*.png")):
        if (file := f"pictures/{path.name}") not in told:
            group = path.stem.split("_")[0].capitalize()
            pictures.append({"file": file, "group": group, "caption": "", "parts": []})
    headline = "mask_iou" if "mask_iou" in scores else "mean_iou"
    new = {"headline": headline, "about_scores": about, "tables": [table], "pictures": pictures}
    return record | new


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for a number that does not exist."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
