"""Timing of two implementations side by side."""

import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import NamedTuple

_TURN = 0.05  # Seconds.


class Comparison(NamedTuple):
    """Median seconds of one call of ours and of theirs."""

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """Our time over theirs; below 1 we are faster."""
        return self.ours / self.theirs


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 15, warmup: int = 2
) -> Comparison:
    """Times both in turns, so that whatever else the machine does falls on both.

    Each call must return only when its result is there. A turn is one call that is not timed, in
    which the other's worker threads stop waiting for more work and our own wake up, and then
    calls of this side only, for about as long as a turn should last.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(warmup + repeats):
        for call, record in zip((ours, theirs), times, strict=True):
            call()
            start, count = time.perf_counter(), 0
            while not count or time.perf_counter() - start < _TURN:
                call()
                count += 1
            if turn >= warmup:
                record.append((time.perf_counter() - start) / count)
    return Comparison(statistics.median(times[0]), statistics.median(times[1]))


def import_torch(threads: int) -> types.ModuleType:
    """Returns torch set to a number of threads, or ends the program saying what is missing."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        sys.exit(
            "error: this benchmark compares with torch, which is not installed: pip install torch"
        )
    torch.set_num_threads(threads)
    return torch
