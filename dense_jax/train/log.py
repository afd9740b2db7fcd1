"""Logs a run's numbers: a progress bar, metrics.jsonl, CSV files, TensorBoard."""

import csv
import json
import math
import pathlib
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax
import tensorboardX
import tqdm

from dense_jax.errors import UserError
from dense_jax.train.config import from_plain

_CHECKSUM = "crc32"  # of the other entries of a line of metrics.jsonl


class MetricsWriter:
    """Writes rows of scalars to ``metrics.jsonl``, ``train.csv``/``eval.csv`` and TensorBoard.

    On opening, it drops rows later than ``step``: a resumed run writes them again. Each step
    therefore appears once, however often the run was killed.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        step: int = 0,
        log_every: int = 1,
        is_evaluated: bool = False,
    ) -> None:
        """Opens the files.

        Args:
          workdir: the run folder.
          step: the step from which the run goes on.
          log_every: steps between rows; a message tells if later ones are missing.
          is_evaluated: whether there was an evaluation at this step, which is then missed too.
        """
        path = workdir / "metrics.jsonl"
        once = {(row["step"], row["kind"]): row for row in read_metrics(path)}
        rows = [row for row in once.values() if row["step"] <= step]
        last = max((row["step"] for row in rows), default=0)
        if last < step - step % log_every:
            print(f"{path} is missing rows of steps {last + 1} to {step}: the curves lack them")
        elif is_evaluated and (step, "eval") not in [(row["step"], row["kind"]) for row in rows]:
            print(f"{path} is missing the evaluation of step {step}: the curves lack it")
        # Write another file, then rename it: a kill in between must not lose the rows.
        rewritten = path.with_suffix(".tmp")
        rewritten.unlink(missing_ok=True)  # it may be a link
        rewritten.write_text("".join(map(_line_of, rows)))
        rewritten.replace(path)
        self._workdir = workdir
        self._jsonl: TextIO = path.open("a")
        self._csv: dict[str, _Table] = {}
        for row in rows:
            self._append_csv(row)
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._jsonl.close()
        for table in self._csv.values():
            table.close()
        self._board.close()

    def write(self, step: int, kind: str, scalars: Mapping[str, float]) -> None:
        """Appends one row of kind "train" or "eval"."""
        row: dict[str, Any] = {"step": step, "kind": kind}
        # JSON has no NaN: the metric of a class that the split lacks becomes null.
        row |= {k: float(v) if math.isfinite(v) else None for k, v in scalars.items()}
        self._jsonl.write(_line_of(row))
        self._jsonl.flush()
        self._append_csv(row)
        for name, value in scalars.items():
            if math.isfinite(value):
                self._board.add_scalar(f"{kind}/{name}", float(value), step)
        self._board.flush()

    def _append_csv(self, row: Mapping[str, Any]) -> None:
        kind = row["kind"]
        if kind not in self._csv:
            self._csv[kind] = _Table(self._workdir / f"{kind}.csv")
        self._csv[kind].append({name: value for name, value in row.items() if name != "kind"})


class _Table:
    """A CSV file, rewritten for rows with new columns: the last evaluation has more scores."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._file: TextIO = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, [])

    def append(self, row: Mapping[str, Any]) -> None:
        fields = list(self._writer.fieldnames)
        if new := [name for name in row if name not in fields]:
            self._file.close()
            with self._path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            self._file = self._path.open("w", newline="")
            self._writer = csv.DictWriter(self._file, fields + new)
            self._writer.writeheader()
            self._writer.writerows(rows)
        self._writer.writerow(row)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a metrics.jsonl.

    It skips a last line that a kill cut short, and damaged lines with a message.
    """
    if not path.exists():
        return
    if not path.is_file():  # a pipe would wait for ever
        raise UserError(f"{path} is not a file: remove it")
    damaged = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if (row := _row_of(line)) is not None:
            yield row
        elif line.endswith(b"\n") or not line.startswith(b"{"):
            damaged.append(str(number))
    if damaged:
        shown = ", ".join(damaged[:5]) + (" and others" if len(damaged) > 5 else "")
        tqdm.tqdm.write(f"{path}: line {shown} is damaged and left out; the other lines are kept")


def _line_of(row: Mapping[str, Any]) -> str:
    """A row as a line with its checksum."""
    return json.dumps({**row, _CHECKSUM: _checksum(row)}) + "\n"


def _row_of(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None if it is damaged. Lines of earlier versions have no checksum."""
    try:
        # Early versions wrote NaN, which JSON lacks.
        row = json.loads(line, parse_constant=lambda name: None)
        row = from_plain(row, Mapping[str, float | str | None], "row")
        checksum = row.pop(_CHECKSUM, None)
        from_plain((row.get("step"), row.get("kind")), tuple[int, str], "step and kind")
        return row if checksum in (None, _checksum(row)) else None
    except (ValueError, RecursionError):
        return None


def _checksum(row: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"


def progress_bar(num_steps: int, step: int, is_shown: bool = True) -> tqdm.tqdm:
    """A progress bar over the steps of a run; the loop adds the loss and images per second."""
    return tqdm.tqdm(
        total=num_steps,
        initial=step,
        unit="step",
        dynamic_ncols=True,
        mininterval=1,
        disable=not is_shown,
    )


class Throughput:
    """Images per second since the last reading; counts only time spent training."""

    def __init__(self) -> None:
        self._images, self._start, self._paused = 0, time.perf_counter(), 0.0

    def add(self, images: int) -> None:
        """Counts trained images."""
        self._images += images

    def pause(self, seconds: float) -> None:
        """Subtracts time spent on something else, such as an evaluation."""
        self._paused += seconds

    def read(self) -> float:
        """Returns the images per second and resets the counters."""
        now = time.perf_counter()
        rate = self._images / max(now - self._start - self._paused, 1e-9)
        self._images, self._start, self._paused = 0, now, 0.0
        return rate


class CompileCounter:
    """Counts the programs that XLA compiles (or loads from the cache) in this process."""

    programs = 0
    seconds = 0.0
    _listening = False

    @classmethod
    def start(cls) -> None:
        """Starts to count; another call changes nothing."""
        if not cls._listening:
            cls._listening = True
            jax.monitoring.register_event_duration_secs_listener(cls._record)

    @classmethod
    def _record(cls, event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            cls.programs += 1
            cls.seconds += duration_secs
