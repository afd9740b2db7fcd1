"""Runs a script with every combination of flag values and seeds, and tabulates the metrics.

Each run is a separate process, so a crash does not affect the others. Each run has its own folder:
the same sweep, started again, skips finished runs and resumes the others.
"""

import contextlib
import fcntl
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO, Annotated, Any, Literal

import jax
import tyro

from dense_jax import scripts
from dense_jax.sweep.plan import Run, plan
from dense_jax.sweep.results import Scoring, Summary, is_trained
from dense_jax.train import processes


def run(
    script: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SCRIPT")],
    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")],
    flags: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="-- FLAGS")] = (),
    *,
    out: pathlib.Path,
    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    seeds: int = 1,
    split: str = "val",
    absent: Literal["skip", "zero"] = "skip",
    bf_match: Literal["none", "distance", "assignment"] = "distance",
    dry_run: bool = False,
    distributed: bool = False,
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
) -> None:
    """Run a script with every combination of flag values, and tabulate the metrics.

    For example: sweep experiments.fcn demo --vary stride=32,16,8 --vary fuse=sum,max --seeds 2
    --out runs/fuse -- --num-steps=500

    The same command skips finished runs and resumes stopped runs: repeat it after a crash. It
    writes index.html, table.md, table.csv, table.tex and plot.svg in --out after every run. It
    exits with status 1 if a run failed.

    Args:
      script: a module of experiments/.
      preset: one of its presets.
      flags: flags for every run.
      out: folder of the sweep; each run has a folder in it.
      vary: FLAG=VALUE,VALUE,...; separate the words of one value by spaces.
      seeds: number of runs of each combination, with the seeds 0, 1, ...
      split: the split to score.
      absent: skip leaves a class without pixels out of the mean (FCN); zero counts it as zero
        (SegNet).
      bf_match: how to match boundary pixels; assignment is one to one and slow.
      dry_run: only list the commands.
      distributed: each run has many processes: start the same sweep in each (docs/scale.md). The
        first one writes the tables.
      coordinator: HOST:PORT of the first process; needed where no cluster says it.
      process_id: number of this process, from 0.
      num_processes: number of processes.
    """
    joined = processes.as_flags(distributed, coordinator, process_id, num_processes)
    number = processes.rank(process_id) if distributed else 0
    # This process only counts layers: it must not reserve the accelerator's memory.
    jax.config.update("jax_platforms", "cpu")
    module = scripts.load(script)
    planned = plan(module, preset, flags, vary, seeds, out, joined)
    if dry_run:
        for item in planned:
            print(item.command)
        return
    out.mkdir(parents=True, exist_ok=True)
    scoring = Scoring(split, absent, bf_match)
    summary = Summary(out, f"Sweep of {script} {preset}", module, planned, scoring)
    failures: dict[pathlib.Path, str] = {}
    if number == 0:
        summary.write(failures)
    with Children(number) as children:
        for place, item in enumerate(planned, 1):
            if children.stopped_by:
                break
            name = f"[{place}/{len(planned)}] {item.workdir.name}"
            if is_trained(script, item) and scoring.read(item) is not None:
                print(f"{name}: finished before", flush=True)
                continue
            print(f"{name}: see {item.log}", flush=True)
            failure = _finish(script, item, scoring, children)
            if children.stopped_by:
                continue
            if failure:
                failures[item.workdir] = failure
            print(f"{name}: {f'failed: {failure}' if failure else 'finished'}", flush=True)
            if number == 0:
                summary.write(failures)
    print(f"summary: {out / 'index.html'}")
    for workdir, failure in failures.items():
        print(f"failed: {workdir.name}: {failure}; see {workdir / 'log.txt'}", file=sys.stderr)
    if children.stopped_by:
        print("stopped; the same command resumes from there", file=sys.stderr)
        sys.exit(128 + children.stopped_by)
    if failures:
        sys.exit(1)


def _finish(script: str, item: Run, scoring: Scoring, children: "Children") -> str | None:
    """Trains and scores a run unless that is done; returns the reason of a failure, or None."""
    if not is_trained(script, item):
        if failure := children.run(item.words, item.log):
            return failure
        if not children.stopped_by and not is_trained(script, item):
            return f"the run ended without an evaluation of its last step in {item.final}"
    if children.stopped_by or scoring.read(item) is not None:
        return None
    if failure := children.run(scoring.words(item), item.log):
        return failure
    if not children.stopped_by and scoring.read(item) is None:
        return f"the run has no evaluation of its last step in {scoring.folder(item)}"
    return None


class Children:
    """Runs commands one at a time; forwards Ctrl-C, SIGTERM and SIGHUP to the current one.

    Of several processes that run a sweep together, each has a log of its own.
    """

    def __init__(self, number: int = 0) -> None:
        self._number, self.stopped_by = number, 0
        self._child: subprocess.Popen[bytes] | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Children":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._old.items():
            signal.signal(number, previous)

    def run(self, words: Sequence[str], log: pathlib.Path) -> str | None:
        """Runs ``python -m WORDS`` with its output in ``log``; returns the reason of a failure."""
        log.parent.mkdir(parents=True, exist_ok=True)
        log = log.with_name(f"log-{self._number}.txt") if self._number else log
        with log.open("ab") as file:
            # The child shares the lock, so it holds as long as the child lives even if this
            # process is killed: two sweeps never train in one folder.
            if not _lock(file):
                return "another process is at work in this folder"
            start = file.tell()
            # In its own session, Ctrl-C reaches the child only through _handle, and only once.
            self._child = subprocess.Popen(
                [sys.executable, "-m", *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            if self.stopped_by:  # a signal arrived before the child existed
                self._child.send_signal(signal.SIGTERM)
            status = self._child.wait()
        if status == 0:
            return None
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        with log.open("rb") as file:
            file.seek(start)
            return _last_error(file.read().decode(errors="replace"))

    def _handle(self, number: int, _frame: object) -> None:
        self.stopped_by = self.stopped_by or number
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def _lock(file: IO[bytes]) -> bool:
    """Locks a file; waits a little, since a child's own helpers may outlive it for a moment."""
    for _ in range(50):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.1)
    return False


def _last_error(text: str) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    pattern = re.compile(r"error: |[\w.]*(Error|Exception|Interrupt)(:|$)")
    errors = [line for line in lines if pattern.match(line)]
    return (errors or lines or ["it printed nothing"])[-1].removeprefix("error: ")
