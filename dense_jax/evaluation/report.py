"""Makes one HTML page for a run: metrics, curves, and the tables and pictures of its record.

The page does not depend on the task. It is a single file with inlined pictures and curves, without
scripts or downloads. It therefore opens offline, can be mailed, and prints.
"""

import base64
import html
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dense_jax import runs
from dense_jax.data.classes import ClassTable
from dense_jax.errors import UserError, printable
from dense_jax.evaluation import record
from dense_jax.train.log import read_metrics

_NONE = "\N{EN DASH}"
_TRAIN, _EVAL = "#94a3b8", "#1d4e89"
_TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "images_per_second": "Images per second",
}
_NUM_TILES = 6  # scores in large figures
_NUM_CURVES = 2  # scores whose curves are always visible

Points = list[tuple[float, float]]


def write_report(run_dir: str | pathlib.Path) -> pathlib.Path:
    """Writes ``report.html`` into a run folder and returns its path.

    Reads ``config.json`` (script, config, classes), ``metrics.jsonl`` (rows with ``step``, ``kind``
    "train" or "eval", and scalars) and ``evaluation.json`` (see `dense_jax.evaluation.record`) with
    its pictures. If one of the last two is missing, the page lacks its sections.

    Raises:
      UserError: there is no readable ``config.json``, or a file in the folder is damaged.
    """
    run_dir = pathlib.Path(run_dir)
    path = run_dir / "config.json"
    if not path.exists():
        raise UserError(f"{run_dir} has no config.json: give the folder of a training run")
    config = runs.read_json(path, {"script": str, "config": dict, "classes": dict}, "restore it")
    classes = runs.classes_of(run_dir, config)
    evaluation = record.read(run_dir) or {}
    rows = list(read_metrics(run_dir / "metrics.jsonl"))
    if not evaluation and any(row["kind"] == "eval" for row in rows):
        print(f"{run_dir / 'evaluation.json'} is missing: the report is without scores")
    step = evaluation.get("protocol", {}).get("step")
    logged = [row["step"] for row in rows if row["kind"] == "eval"]
    if step is not None and step not in logged and (run_dir / "checkpoints").exists():
        print(f"{run_dir / 'metrics.jsonl'} is missing the evaluation of step {step}")
    main, further = _scores(evaluation)
    tables = evaluation.get("tables", ())
    body = [
        _header(config, evaluation),
        _tiles(main[:_NUM_TILES]),
        _section("Training", _curves(rows, evaluation, classes)),
        *(_section(html.escape(table["title"]), _table(table, classes)) for table in tables),
        *_galleries(evaluation, classes, run_dir),
        _section("Further scores", _facts(dict(main[_NUM_TILES:] + further))),
        _section("How this was scored", _facts(evaluation.get("protocol", {}))),
        _section("Settings", _details("All flags of this run", _facts(config.get("config", {})))),
    ]
    path = run_dir / "report.html"
    runs.write_text(path, page(_title(config, evaluation), body))
    return path


def page(title: str, body: Iterable[str]) -> str:
    """Returns an HTML page in the style of the reports, from a plain title and pieces of HTML."""
    return _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(filter(None, body)))


def _title(config: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    name = str(config.get("script", "run")).rsplit(".", 1)[-1]
    dataset = evaluation.get("protocol", {}).get("dataset") or config["config"].get("dataset", "")
    return f"{name} on {dataset}" if dataset else name


def _header(config: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    protocol = {**config, **evaluation.get("protocol", {})}
    count, total = protocol.get("images_scored"), protocol.get("images_in_split")
    split = protocol.get("split", "")
    facts = [
        f"{count} of {total} {split} images scored" if count is not None else "",
        f"step {protocol['step']}" if "step" in protocol else "",
        protocol.get("device"),
        protocol.get("time"),
    ]
    line = " · ".join(html.escape(str(fact)) for fact in facts if fact)
    command = html.escape(str(protocol.get("command", "")))
    return (
        f"<header><h1>{html.escape(_title(config, evaluation))}</h1><p>{line}</p>"
        + (f"<pre>{command}</pre>" if command else "")
        + "</header>"
    )


def _scores(evaluation: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Returns (title, number with its unit) of the main metrics, and of the others."""
    main, further = [], []
    for name, value in evaluation.get("scores", {}).items():
        about = evaluation["about_scores"].get(name, {})
        title = about.get("title") or name.replace("_", " ")
        entry = (title, number(value, about.get("unit", "")))
        (main if about.get("main") else further).append(entry)
    return main, further


def number(value: float | None, unit: str) -> str:
    """Returns a number with its unit, such as "86.4 %"; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return _NONE
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.4g} {unit}".rstrip()


def _tiles(scores: Sequence[tuple[str, str]]) -> str:
    tiles = [
        f"<div><b>{html.escape(value)}</b><span>{html.escape(title)}</span></div>"
        for title, value in scores
        if value != _NONE
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _curves(
    rows: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any], classes: ClassTable
) -> str:
    """Returns a chart for each scalar with train and eval; all but the main ones are folded."""
    series: dict[str, dict[str, Points]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "kind") and isinstance(value, (int, float)):
                points = series.setdefault(name, {}).setdefault(str(row["kind"]), [])
                if math.isfinite(value):
                    points.append((row["step"], value))
    if not series:
        return ""
    about = evaluation.get("about_scores", {})
    charts = {
        name: _chart(
            about.get(name, {}).get("title") or _TITLES.get(name, name.replace("_", " ")),
            [
                (kind, kinds[kind], colour)
                for kind, colour in (("train", _TRAIN), ("eval", _EVAL))
                if kinds.get(kind)
            ],
        )
        for name, kinds in series.items()
        if "/" not in name
    }
    main = [name for name in evaluation.get("scores", {}) if about.get(name, {}).get("main")]
    names = ("loss", *main[:_NUM_CURVES], "learning_rate")
    first = [charts.pop(name) for name in names if name in charts]
    colours = dict(zip(classes.names, map(_css, classes.colours), strict=True))
    for table in evaluation.get("tables", ()):
        if log := table["log"]:
            lines = [
                (str(row[0]), points, colours.get(str(row[0]), _EVAL))
                for row in table["rows"]
                if (points := series.get(f"{log}/{row[0]}", {}).get("eval"))
            ]
            head, value = (column["title"] for column in table["columns"][:2])
            first.append(_chart(f"{value} of each {head.lower()}", lines, key=False))
    more = _details("More curves", _grid(charts.values())) if charts else ""
    return _grid(first) + more


def _chart(title: str, lines: Sequence[tuple[str, Points, str]], *, key: bool = True) -> str:
    """Returns an SVG line chart; up to 60 points of a line have their values as tooltips."""
    width, height, left, right, top, bottom = 340, 196, 46, 20, 12, 24
    points = [point for _, line, _ in lines for point in line]
    if not points:
        return ""
    xs = [x for x, _ in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(*_robust_range(lines))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = left + (point[0] - x_low) / (x_high - x_low) * (width - left - right)
        y = (min(point[1], y_high) - y_low) / (y_high - y_low) * (height - top - bottom)
        return round(x, 1), round(height - bottom - y, 1)

    svg = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
    for tick in y_ticks:
        _, y = place((x_low, tick))
        svg.append(f'<path class="rule" d="M{left} {y}H{width - right}"/>')
        svg.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{tick:.4g}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = place((tick, y_low))
            svg.append(f'<text x="{x}" y="{height - 6}" text-anchor="middle">{tick:,.6g}</text>')
    for name, line, colour in lines:
        if len(line) > 60:  # draw the trend over the pale raw values
            svg.append(_path(map(place, _thin(line)), colour, 'opacity=".35"'))
            line = _smooth(line)
        svg.append(_path(map(place, _thin(line)), colour, 'stroke-width="2"'))
        for point in line if len(line) <= 60 else line[-1:]:
            x, y = place(point)
            tip = f"{name} {point[1]:.4g} at step {point[0]:,}"
            svg.append(
                f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}">'
                f"<title>{html.escape(tip)}</title></circle>"
            )
    svg.append("</svg>")
    names = [
        f'<span><i style="background:{colour}"></i>{html.escape(name)} {line[-1][1]:.4g}</span>'
        for name, line, colour in lines
        if key and line
    ]
    caption = f"<figcaption><b>{html.escape(title)}</b>{''.join(names)}</figcaption>"
    return f"<figure>{caption}{''.join(svg)}</figure>"


def _path(points: Iterable[tuple[float, float]], colour: str, attributes: str) -> str:
    steps = "L".join(f"{x} {y}" for x, y in points)
    return f'<path class="line" d="M{steps}" stroke="{colour}" {attributes}/>'


def _thin(line: Points, limit: int = 400) -> Points:
    """Returns about `limit` points at most, with the last one."""
    return line[:: -max(1, len(line) // limit)][::-1]


def _smooth(line: Points) -> Points:
    """Returns a running mean over a fortieth of the points on each side, fewer near the ends."""
    index = np.arange(len(line))
    reach = np.minimum(len(line) // 40, np.minimum(index, index[::-1]))
    total = np.concatenate([[0.0], np.cumsum([y for _, y in line])])
    means = (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)
    return [(x, float(mean)) for (x, _), mean in zip(line, means, strict=True)]


def _robust_range(lines: Sequence[tuple[str, Points, str]]) -> tuple[float, float]:
    """Returns the least and greatest value without the top 2 % of long lines, such as spikes."""
    low, high = [], []
    for values in ([y for _, y in line] for _, line, _ in lines if line):
        low.append(min(values))
        high.append(float(np.quantile(values, 0.98)) if len(values) > 60 else max(values))
    return min(low), max(high)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers that enclose [low, high]."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        low, high = low - abs(low or 1) / 2, high + abs(high or 1) / 2
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _table(table: Mapping[str, Any], classes: ClassTable) -> str:
    """Returns a table of a record; classes get their colours, the first percentages a bar."""
    columns = table["columns"]
    bar = next((i for i, column in enumerate(columns) if column["unit"] == "%"), None)
    heads = "".join(
        f"<th>{html.escape(column['title'])}" + ("<th>" if i == bar else "")
        for i, column in enumerate(columns)
    )
    rows = []
    for row in table["rows"]:
        cells = []
        for i, (cell, column) in enumerate(zip(row, columns, strict=True)):
            if isinstance(cell, str):
                is_class = i == 0 and cell in classes.names
                text = _swatch(classes, classes.names.index(cell)) if is_class else cell
                cells.append(text if is_class else html.escape(cell))
            else:
                cells.append(number(cell, column["unit"]))
            if i == bar:
                width = 0 if isinstance(cell, str) else 100 * min(max(cell or 0, 0), 1)
                cells.append(f'<div class="bar"><i style="width:{width:.1f}%"></i></div>')
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    note = f"<p>{html.escape(table['note'])}</p>" if table["note"] else ""
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(rows)}</table></div>{note}'


def _galleries(
    evaluation: Mapping[str, Any], classes: ClassTable, run_dir: pathlib.Path
) -> list[str]:
    """Returns a section of pictures for each group; the first has the legend of classes."""
    groups: dict[str, list[str]] = {}
    for picture in evaluation.get("pictures", ()):
        path = record.picture_path(run_dir, picture["file"])
        caption = html.escape(printable(picture["caption"]))
        if not path.is_file():
            raise UserError(f"{path} is missing: evaluate the run again")
        try:
            with Image.open(path, formats=["PNG"]) as opened:
                width = opened.width  # small pictures are enlarged: show their pixels
                opened.verify()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} is no picture ({error}): evaluate the run again") from error
        parts = picture["parts"]
        style = "image-rendering:pixelated" if width < 800 and parts else ""
        if not parts:  # as large as it was drawn, on a screen with two pixels per CSS pixel
            style = f"width:auto;margin:6px auto 0;max-width:min(100%,{max(width // 2, 320)}px)"
        heads = "".join(f"<span>{html.escape(part)}</span>" for part in parts)
        strip = f'<div class="heads" style="--parts:{len(parts)}">{heads}</div>' if parts else ""
        groups.setdefault(picture["group"], []).append(
            f'<figure class="images"><figcaption><b>{caption}</b></figcaption>{strip}'
            f'<img src="{_data_uri(path.read_bytes())}" alt="{caption}" style="{style}"></figure>'
        )
    legend = "".join(_swatch(classes, i) for i in range(classes.num_classes))
    void = f'<span class="class"><i style="background:{_css(classes.palette()[255])}"></i>void'
    sections = []
    for name, figures in groups.items():
        head = "" if sections else f'<p class="legend">{legend}{void}</span></p>'
        sections.append(_section(html.escape(name), head + "".join(figures)))
    return sections


def _facts(facts: Mapping[str, Any]) -> str:
    """Returns a two-column list; each nested mapping becomes one line."""
    if not facts:
        return ""
    rows = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        label = html.escape(name.replace("_", " "))
        rows.append(f"<dt>{label}</dt><dd>{html.escape(str(value))}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>" if content else ""


def _grid(figures: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def _swatch(classes: ClassTable, index: int) -> str:
    colour, name = _css(classes.colours[index]), html.escape(classes.names[index])
    return f'<span class="class"><i style="background:{colour}"></i>{name}</span>'


def _css(colour: Sequence[int] | np.ndarray) -> str:
    return "#" + bytes(int(channel) for channel in colour).hex()


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""

_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:#f6f7f9;color:#1f2937;font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:20px;margin:0 0 14px} h3{font-size:16px;margin:22px 0 6px}
p{margin:0 0 10px;color:#4b5563}
pre{background:#eceff3;border-radius:8px;padding:10px 14px;margin:10px 0 0;overflow-x:auto;
font-size:13px}
section{background:#fff;border:1px solid #e5e7eb;border-radius:12px;padding:20px 22px;
margin-top:20px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin-top:20px}
.tiles div{background:#fff;border:1px solid #e5e7eb;border-radius:12px;padding:14px 18px}
.tiles div:first-child{background:#1d4e89;border-color:#1d4e89;color:#fff}
.tiles b{display:block;font-size:28px;line-height:1.2;font-variant-numeric:tabular-nums}
.tiles span{font-size:13px;opacity:.8}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));
gap:20px 26px}
figure{margin:0} figcaption{display:flex;flex-wrap:wrap;gap:0 14px;font-size:14px}
figcaption b{margin-right:auto} figcaption span{color:#4b5563}
svg{width:100%;height:auto;display:block}
svg text{font:11px system-ui,sans-serif;fill:#6b7280}
.rule{stroke:#e5e7eb} .line{fill:none;stroke-linejoin:round}
figcaption i,.class i{display:inline-block;width:12px;height:12px;border-radius:3px;
margin-right:6px;box-shadow:inset 0 0 0 1px #0003}
.class{white-space:nowrap;margin-right:16px} .legend{margin-bottom:4px}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:15px;font-variant-numeric:tabular-nums}
th{font-weight:600;font-size:13px;color:#6b7280;text-align:right;padding:4px 12px 8px}
td{border-top:1px solid #eef0f3;padding:7px 12px;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
.bar{width:min(220px,18vw);height:9px;border-radius:5px;background:#eceff3}
.bar i{display:block;height:100%;border-radius:5px;background:#1d4e89}
img{max-width:100%;display:block}
.images{margin-top:14px} .images img{width:100%;border-radius:4px}
.heads{display:grid;grid-template-columns:repeat(var(--parts),1fr);font-size:12px;color:#6b7280;
text-align:center}
dl{display:grid;grid-template-columns:minmax(120px,max-content) 1fr;gap:4px 22px;margin:0;
font-size:14px}
dt{color:#6b7280} dd{margin:0;overflow-wrap:anywhere}
details{margin-top:8px} summary{cursor:pointer;color:#1d4e89;margin-bottom:8px}
@media print{body{background:#fff} section{break-inside:avoid}}
"""
