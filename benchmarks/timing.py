"""Times two implementations in turns."""

import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable
from typing import NamedTuple

_TURN = 0.05  # Seconds.


class Comparison(NamedTuple):
    """Median seconds of one call of each side."""

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """Our time divided by theirs; below 1 means that ours is faster."""
        return self.ours / self.theirs


def alternate(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 15, warmup: int = 2
) -> Comparison:
    """Times both sides in turns, so that other load on the machine affects both.

    Each call must return only when its result is ready. A turn starts with one call without timing:
    the threads of the other side stop waiting for work, and those of this side wake up. Timed calls
    of this side follow, for about 0.05 seconds.
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
    """Returns torch with a number of threads; exits with a message if it is not installed."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        sys.exit(
            "error: this benchmark compares with torch, which is not installed: pip install torch"
        )
    torch.set_num_threads(threads)
    return torch
