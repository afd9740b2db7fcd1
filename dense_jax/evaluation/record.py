"""The record of an evaluation, in a form that describes itself: metrics, tables and pictures.

Reports, sweeps and galleries show the contents of a record; they do not depend on the task. The
record of a run is ``evaluation.json``; its pictures are in ``pictures/``.
"""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from dense_jax import runs
from dense_jax.errors import UserError, stays_inside
from dense_jax.train.config import from_plain

Cell = str | float | None


@dataclasses.dataclass(frozen=True)
class Score:
    """One metric.

    Attributes:
      name: its key, such as "mean_iou".
      value: NaN if nothing was scored.
      title: its name for people; if empty, `name`.
      unit: "%" for a share in [0, 1], shown in percent; otherwise the text after the number, such
        as "px".
      main: whether it is shown among the first; the others come further down.
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
      columns: the first column holds the names of the rows.
      rows: a cell for each column.
      log: if not empty, every evaluation logs the second column as LOG/NAME.
      note: a line below the table.
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
      group: heading that several pictures share, such as "Worst".
      caption: its own line.
      parts: headings of its parts, from left to right.
    """

    file: str
    draw: Callable[[], np.ndarray]
    group: str
    caption: str = ""
    parts: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Findings:
    """The results of one measure.

    Attributes:
      scores: its metrics.
      tables: its tables.
      pictures: its pictures.
      files: text of further files by name.
    """

    scores: Sequence[Score] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Record:
    """The result of one evaluation.

    Attributes:
      headline: name of the metric that decides which checkpoint is the best; higher is better.
      findings: the findings of each measure, the main one first.
      protocol: the rules and data of the evaluation.
      data: raw counts and tables for programs, plain JSON values.
    """

    headline: str
    findings: Sequence[Findings]
    protocol: Mapping[str, Any]
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def scores(self) -> dict[str, Score]:
        """All metrics by name."""
        return {score.name: score for part in self.findings for score in part.scores}

    def row(self) -> dict[str, float]:
        """Returns the numbers for the log: the metrics, and the columns with `Table.log`."""
        numbers = {name: score.value for name, score in self.scores.items()}
        for part in self.findings:
            for table in part.tables:
                for name, value, *_ in table.rows if table.log else ():
                    numbers[f"{table.log}/{name}"] = math.nan if value is None else float(value)
        return numbers

    def write(self, workdir: pathlib.Path, step: int) -> None:
        """Writes ``evaluation.json`` and ``pictures/`` for the parameters of a step.

        Pictures of an earlier record are deleted. Links in the folder are replaced, not followed.

        Raises:
          UserError: ``pictures/`` is a link to another folder.
        """
        folder, pictures = workdir / "pictures", []
        runs.make_inner_folder(folder)
        earlier: set[str] = set()
        with contextlib.suppress(UserError):  # a damaged record has no pictures to delete
            earlier = {picture["file"] for picture in (read(workdir) or {}).get("pictures", ())}
        for picture in (picture for part in self.findings for picture in part.pictures):
            runs.write_png(folder / picture.file, picture.draw())
            texts = {f: getattr(picture, f) for f in ("group", "caption", "parts")}
            pictures.append({"file": f"pictures/{picture.file}", **texts})
        for name, text in (item for part in self.findings for item in part.files.items()):
            runs.write_text(workdir / name, text)
        scores = self.scores.values()
        about = {s.name: {"title": s.title, "unit": s.unit, "main": s.main} for s in scores}
        tables = [table for part in self.findings for table in part.tables]
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
        written = {picture["file"] for picture in pictures}
        for file in earlier - written:
            with contextlib.suppress(UserError):  # what is named elsewhere stays
                picture_path(workdir, file).unlink(missing_ok=True)

    def tell(self, step: int) -> None:
        """Prints the first main metrics, above the progress bar if there is one."""
        first = [s for s in self.scores.values() if s.main and not math.isnan(s.value)]
        shown = ", ".join(f"{(s.title or s.name).lower()} {s.value:.4f}" for s in first[:3])
        count, split = self.protocol["images_scored"], self.protocol["split"]
        tqdm.tqdm.write(f"step {step}: {shown} on {count} {split} images")


def read(folder: pathlib.Path) -> dict[str, Any] | None:
    """Reads the ``evaluation.json`` of a folder; returns None if there is none.

    Records of earlier versions are converted to the current form, without the facts that they lack.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / "evaluation.json"
    if not path.exists():
        return None
    if not path.is_file():  # a pipe would wait for ever
        raise UserError(f"{path} is not a file: remove it and evaluate the run again")
    try:
        # Records of early versions have NaN, which JSON lacks.
        record = _without_nan(runs.parse_json(path.read_text(encoding="utf-8"), path))
        if not isinstance(record, dict):
            raise ValueError("it is no object")
        if "about_scores" not in record:
            record = _upgrade(record, folder)
        record.setdefault("pictures", [])
        form = {name: from_plain(record.get(name), hint, name) for name, hint in _FORM.items()}
        record["tables"] = [dataclasses.asdict(table) for table in form["tables"]]
        for table in record["tables"]:
            if any(len(row) != len(table["columns"]) for row in table["rows"]):
                raise ValueError(f"a row of {table['title']!r} has another number of columns")
            if table["log"] and len(table["columns"]) < 2:
                raise ValueError(f"the table {table['title']!r} has no numbers to log")
        return record
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): evaluate the run again"
        ) from error
    except KeyError as error:
        raise UserError(f"{path} is damaged (it lacks {error}): evaluate the run again") from error
    except (
        *(ValueError, TypeError, AttributeError, ArithmeticError, IndexError),
        *(RecursionError, UserError),
    ) as error:
        raise UserError(f"{path} is damaged ({error}): evaluate the run again") from error


@dataclasses.dataclass(frozen=True)
class _About:
    title: str
    unit: str
    main: bool


@dataclasses.dataclass(frozen=True)
class _Shown:
    file: str
    group: str
    caption: str
    parts: Sequence[str]


# What a record must have, as annotations.
_FORM: dict[str, Any] = {
    "protocol": Mapping[str, Any],
    "scores": Mapping[str, float | None],
    "about_scores": Mapping[str, _About],
    "tables": Sequence[Table],
    "pictures": Sequence[_Shown],
}


def picture_path(folder: pathlib.Path, file: str) -> pathlib.Path:
    """Returns the path of a picture that a record names.

    Raises:
      UserError: it is not directly in ``pictures/`` of the folder, or a link leads out of it.
    """
    path = folder / file
    if not stays_inside(file) or path.parent != folder / "pictures" or path.suffix != ".png":
        raise UserError(
            f"{folder / 'evaluation.json'} names the picture {file!r}, which is none of its own "
            "pictures/NAME.png: evaluate the run again"
        )
    _check_inside(folder, path)
    return path


def _check_inside(folder: pathlib.Path, path: pathlib.Path) -> None:
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} is a link out of the run folder: remove it")


def _upgrade(record: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Converts a record of a version in which every run labelled pixels."""
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
    described = {picture["file"] for picture in pictures}
    for path in sorted((folder / "pictures").glob("*.png")):
        if (file := f"pictures/{path.name}") not in described:
            group = path.stem.split("_")[0].capitalize()
            pictures.append({"file": file, "group": group, "caption": "", "parts": []})
    headline = "mask_iou" if "mask_iou" in scores else "mean_iou"
    new = {"headline": headline, "about_scores": about, "tables": [table], "pictures": pictures}
    return record | new


def _without_nan(value: Any) -> Any:
    """Replaces NaN and infinity by None, since JSON has neither."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
