"""Writes the results of a sweep: tables in Markdown, CSV and LaTeX, a plot, and a page of links."""

import csv
import dataclasses
import html
import io
import math
import os
import pathlib
import statistics
from collections.abc import Iterable, Sequence

from dense_jax import runs
from dense_jax.evaluation import report
from dense_jax.evaluation.record import Score

_NONE = "\N{EN DASH}"
_DOT, _BAND, _GREY = "#1d4e89", "#93b4d8", "#6b7280"


@dataclasses.dataclass(frozen=True)
class Result:
    """The results of one finished run.

    Attributes:
      seed: its seed.
      scores: metrics by name; only the CSV file shows those that are not main.
      classes: the metric of each class, in [0, 1]; NaN for a class without one.
      class_score: title of the metric in `classes`, such as "IoU".
      seconds: time spent in training steps, with compilation and without evaluation.
      images_per_second: the median over the rows of the log.
      report: its HTML page.
    """

    seed: int
    scores: dict[str, Score]
    classes: dict[str, float]
    class_score: str
    seconds: float
    images_per_second: float
    report: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Row:
    """One combination of flag values.

    Attributes:
      settings: value of each varied flag.
      commands: the command of each seed.
      results: the results of finished runs.
      failures: one line for each failed run.
      parameters: number of the network's parameters; None if it is unknown.
      flops: operations of one forward pass for one image; None if they are unknown.
    """

    settings: dict[str, str]
    commands: list[str]
    results: list[Result]
    failures: list[str]
    parameters: int | None = None
    flops: int | None = None

    @property
    def label(self) -> str:
        """The values of the flags."""
        return ", ".join(self.settings.values())

    def scores(self, name: str) -> list[float]:
        """Returns a metric of every run that has it."""
        values = (result.scores[name].value for result in self.results if name in result.scores)
        return [value for value in values if not math.isnan(value)]

    def class_scores(self, name: str) -> list[float]:
        """Returns a class's metric of every run that has it."""
        values = (result.classes.get(name, math.nan) for result in self.results)
        return [value for value in values if not math.isnan(value)]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns mean and sample standard deviation; NaN if there are too few values for them."""
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def write(folder: pathlib.Path, title: str, facts: Sequence[str], rows: Sequence[Row]) -> None:
    """Writes table.md, table.csv, table.tex, plot.svg and index.html into ``folder``.

    Args:
      folder: an existing folder.
      title: heading, plain text.
      facts: lines about the evaluation, plain text.
      rows: combinations in order; classes of the others are compared with those of the first.
    """
    picture = _plot(rows)
    runs.write_text(folder / "table.csv", _csv(rows))
    runs.write_text(folder / "plot.svg", picture)
    runs.write_text(folder / "table.md", "\n".join(_markdown(title, facts, rows)) + "\n")
    runs.write_text(folder / "table.tex", "\n".join(_latex(title, facts, rows)) + "\n")
    runs.write_text(folder / "index.html", _index(folder, title, facts, rows, picture))


_NOTE = (
    "Scores in percent where their heading says so, ± sample standard deviation over the seeds of "
    "the finished runs; FLOPs of one forward pass for one training image (two for each "
    "multiplication and addition); time in training steps, with compilation."
)


def _class_score(rows: Sequence[Row]) -> str:
    return next((r.class_score for row in rows for r in row.results if r.class_score), "score")


def _class_note(rows: Sequence[Row]) -> str:
    score = _class_score(rows)
    return f"Per class: {score} in percent of the first row, then differences to it in points."


def _main_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    scores = [score for score in _scores(rows).values() if score.main]
    heads = [
        *rows[0].settings,
        *map(_title, scores),
        *("Parameters", "GFLOPs", "Time", "Images/s", "Runs"),
    ]

    def cells(row: Row) -> list[str]:
        seconds, _ = mean_and_spread([r.seconds for r in row.results])
        rate, _ = mean_and_spread([r.images_per_second for r in row.results])
        return [
            *row.settings.values(),
            *(
                _score(row.scores(score.name), "{:.1f}", 100)
                if score.unit == "%"
                else _score(row.scores(score.name), "{:.4g}")
                for score in scores
            ),
            _NONE if row.parameters is None else f"{row.parameters:,}",
            _NONE if row.flops is None else f"{row.flops / 1e9:,.3g}",
            _duration(seconds),
            _NONE if math.isnan(rate) else f"{rate:.3g}",
            f"{len(row.results)} of {len(row.commands)}",
        ]

    return heads, [cells(row) for row in rows]


def _class_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    names = _names(r.classes for row in rows for r in row.results)
    first = {name: mean_and_spread(rows[0].class_scores(name))[0] for name in names}

    def cell(row: Row, name: str) -> str:
        value = mean_and_spread(row.class_scores(name))[0] - (0 if row is rows[0] else first[name])
        if math.isnan(value):
            return _NONE
        points = round(100 * value, 1) + 0.0  # not -0.0
        return f"{points:.1f}" if row is rows[0] else f"{points:+.1f}"

    cells = [[*row.settings.values(), *(cell(row, name) for name in names)] for row in rows]
    return [*rows[0].settings, *names], cells


def _score(values: Sequence[float], form: str, times: float = 1) -> str:
    mean, spread = mean_and_spread([times * value for value in values])
    if math.isnan(mean):
        return _NONE
    shown = form.format(mean)
    return shown if math.isnan(spread) else f"{shown} ± {form.format(spread)}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return _NONE
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _scores(rows: Sequence[Row]) -> dict[str, Score]:
    """Returns each metric that any run has, by name, for its title and unit."""
    return {
        name: score
        for row in reversed(rows)
        for r in reversed(row.results)
        for name, score in r.scores.items()
    }


def _title(score: Score) -> str:
    return f"{score.title or score.name.replace('_', ' ')} {score.unit}".rstrip()


def _names(mappings: Iterable[Iterable[str]]) -> list[str]:
    """Returns the keys of all mappings, each once, in order."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _csv(rows: Sequence[Row]) -> str:
    """Returns raw numbers: fractions and seconds; an unknown number is an empty cell."""
    names = list(_scores(rows))
    classes = _names(r.classes for row in rows for r in row.results)
    first = {name: mean_and_spread(rows[0].class_scores(name))[0] for name in classes}
    kind = _class_score(rows).lower().replace(" ", "_")
    table = [
        [
            *rows[0].settings,
            *("runs_finished", "runs"),
            *(f"{name}_{kind}" for name in names for kind in ("mean", "sd")),
            *("parameters", "flops", "train_seconds", "images_per_second"),
            *(f"{kind}{end}/{name}" for name in classes for end in ("", "_difference")),
            "commands",
        ]
    ]
    for row in rows:
        numbers: list[float] = []
        for name in names:
            numbers += mean_and_spread(row.scores(name))
        numbers += [math.nan if n is None else n for n in (row.parameters, row.flops)]
        numbers += [mean_and_spread([r.seconds for r in row.results])[0]]
        numbers += [mean_and_spread([r.images_per_second for r in row.results])[0]]
        for name in classes:
            mean, _ = mean_and_spread(row.class_scores(name))
            numbers += [mean, mean - first[name]]
        shown = ["" if math.isnan(number) else f"{number:.8g}" for number in numbers]
        counts = [str(len(row.results)), str(len(row.commands))]
        table.append([*row.settings.values(), *counts, *shown, " && ".join(row.commands)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()


def _markdown(title: str, facts: Sequence[str], rows: Sequence[Row]) -> list[str]:
    def table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
        num_left = len(rows[0].settings)
        rule = ["---" if i < num_left else "---:" for i in range(len(heads))]
        return [
            "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
            for row in (heads, rule, *cells)
        ]

    return [
        f"# {title}",
        "",
        *(f"{fact}  " for fact in facts),
        "",
        *table(*_main_table(rows)),
        "",
        f"{_NOTE} {_class_note(rows)}",
        "",
        *table(*_class_table(rows)),
        "",
        *(f"* failed: {failure}" for row in rows for failure in row.failures),
        "",
        "```",
        *(command for row in rows for command in row.commands),
        "```",
    ]


def _latex(title: str, facts: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Returns two tabulars that need no package; comments above each row hold its commands."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(_latex_text, cells)) + r" \\"

    def table(heads: Sequence[str], body: Sequence[str]) -> list[str]:
        num_left = len(rows[0].settings)
        columns = "l" * num_left + "r" * (len(heads) - num_left)
        start, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
        return [start, r"\hline", line(heads), r"\hline", *body, r"\hline", end]

    heads, cells = _main_table(rows)
    class_heads, class_cells = _class_table(rows)
    body = []
    for row, row_cells in zip(rows, cells, strict=True):
        body += [f"% {command}" for command in row.commands] + [line(row_cells)]
    return [
        *(f"% {text}" for text in (title, *facts, _NOTE)),
        *table(heads, body),
        f"% {_class_note(rows)}",
        *table(class_heads, [line(row_cells) for row_cells in class_cells]),
    ]


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    _NONE: "--",
}


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _plot(rows: Sequence[Row]) -> str:
    """Returns an SVG with a panel for each metric: runs, mean and ± one standard deviation."""
    scores = [score for score in _scores(rows).values() if score.main]
    scores = [score for score in scores if any(row.scores(score.name) for row in rows)]
    left = 16 + 6.4 * max(len(row.label) for row in rows)
    wide, high, across = 190, 22 * len(rows) + 62, 4
    width = left + wide * min(across, max(1, len(scores)))
    height = high * max(1, -(-len(scores) // across))
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        'font-family="system-ui, sans-serif" font-size="11" role="img" aria-label="scores">'
    ]
    for number, score in enumerate(scores):
        x, top = left + wide * (number % across), high * (number // across)
        if number % across == 0:
            for i, row in enumerate(rows):
                svg.append(_text(left - 14, top + 45 + 22 * i, row.label, "end"))
        svg += _panel(score, rows, x, top, wide - 24)
    return "\n".join([*svg, "</svg>"])


def _panel(score: Score, rows: Sequence[Row], x: float, top: float, width: float) -> list[str]:
    """Draws one metric of all rows, from ``x`` to ``x + width``."""
    factor = 100 if score.unit == "%" else 1
    values = [[factor * value for value in row.scores(score.name)] for row in rows]
    ends = [value for row in values for value in row]
    for mean, spread in map(mean_and_spread, values):
        ends += [] if math.isnan(spread) else [mean - spread, mean + spread]
    marks = report.ticks(min(ends), max(ends), 3)

    def place(value: float) -> float:
        return round(x + width * (value - marks[0]) / (marks[-1] - marks[0]), 1)

    bottom = top + 30 + 22 * len(rows)
    svg = [_text(x, top + 16, _title(score), "start")]
    for mark in marks:
        svg.append(f'<path d="M{place(mark)} {top + 26}V{bottom}" stroke="#e5e7eb"/>')
        svg.append(_text(place(mark), bottom + 14, f"{mark:.4g}", "middle"))
    for i, (row, numbers) in enumerate(zip(rows, values, strict=True)):
        y = top + 41 + 22 * i
        mean, spread = mean_and_spread(numbers)
        if not math.isnan(spread):
            start, end = place(mean - spread), place(mean + spread)
            svg.append(f'<path d="M{start} {y}H{end}" stroke="{_BAND}" stroke-width="7"/>')
        if not math.isnan(mean):
            svg.append(f'<path d="M{place(mean)} {y - 7}v14" stroke="{_DOT}" stroke-width="2"/>')
        for value in numbers:
            tip = html.escape(f"{row.label}: {value:.4g}")
            svg.append(
                f'<circle cx="{place(value)}" cy="{y}" r="3" fill="{_DOT}" fill-opacity=".6">'
                f"<title>{tip}</title></circle>"
            )
    return svg


def _text(x: float, y: float, text: str, anchor: str) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {where} fill="{_GREY}">{html.escape(text)}</text>'


def _index(
    folder: pathlib.Path, title: str, facts: Sequence[str], rows: Sequence[Row], picture: str
) -> str:
    """Returns the page: plot, tables with a link to each run's report, failures, commands."""
    links = [
        " ".join(f'<a href="{_relative(r.report, folder)}">seed {r.seed}</a>' for r in row.results)
        for row in rows
    ]
    heads, cells = _main_table(rows)
    failures = "".join(
        f"<li>{html.escape(failure)}</li>" for row in rows for failure in row.failures
    )
    commands = html.escape("\n".join(command for row in rows for command in row.commands))
    lines = "<br>".join(html.escape(fact) for fact in facts)
    files = " · ".join(f'<a href="{name}">{name}</a>' for name in _FILES)
    return report.page(
        title,
        [
            f"<header><h1>{html.escape(title)}</h1><p>{lines}</p><p>{files}</p></header>",
            f"<section><h2>Scores</h2>{picture}</section>",
            f"<section><h2>Runs</h2>{_html_table(heads, cells, links)}<p>{_NOTE}</p></section>",
            f"<section><h2>Classes</h2>{_html_table(*_class_table(rows))}"
            f"<p>{_class_note(rows)}</p></section>",
            f"<section><h2>Failed</h2><ul>{failures}</ul></section>" if failures else "",
            f"<section><h2>Commands</h2><pre>{commands}</pre></section>",
        ],
    )


_FILES = ("table.md", "table.csv", "table.tex", "plot.svg")


def _html_table(
    heads: Sequence[str], cells: Sequence[Sequence[str]], links: Sequence[str] = ()
) -> str:
    """Returns a table; ``links`` are a first column of HTML, all other cells plain text."""
    top = "<th>Reports</th>" * bool(links) + "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = []
    for i, row in enumerate(cells):
        line = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body.append(f"<tr>{f'<td>{links[i]}</td>' if links else ''}{line}</tr>")
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(body)}</table></div>'


def _relative(path: pathlib.Path, folder: pathlib.Path) -> str:
    return html.escape(pathlib.Path(os.path.relpath(path, folder)).as_posix())
