"""Many processes as one run: ``--distributed`` on a TPU pod, with SLURM, or by hand.

Each process has its own devices and reads its share of the data. The first one writes files and
prints. All take the same decisions at the same step, since what one of them knows is sent to all.
Without ``--distributed``, every function here does its obvious part for one process.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dense_jax.errors import UserError

T = TypeVar("T")

_PATIENCE = 300  # seconds
# The number of a process, as the launchers say it that `jax.distributed` knows, in its order: all
# that one SLURM task starts with mpirun have the SLURM_PROCID of that task.
_RANKS = ("OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "TPU_WORKER_ID", "CLOUD_TPU_TASK_ID")


def start(
    distributed: bool,
    coordinator: str | None,
    process_id: int | None,
    num_processes: int | None,
) -> None:
    """Joins the other processes; must come before any use of a device.

    Args:
      distributed: whether there are others.
      coordinator: HOST:PORT of the first process. None takes all three values from the cluster.
      process_id: the number of this process, from 0.
      num_processes: the number of processes.

    Raises:
      UserError: the values are incomplete, no cluster says them, or the others do not come.
    """
    check(distributed, coordinator, process_id, num_processes)
    if not distributed:
        return
    where = f" at {coordinator}" if coordinator else ""
    print(f"waiting up to {_PATIENCE} s for the other processes{where}", file=sys.stderr)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=_PATIENCE
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"--distributed: the processes do not come together ({reason}): start it with SLURM, "
            "Open MPI or on a TPU pod, or give --coordinator=HOST:PORT --process-id=I "
            "--num-processes=N to each"
        ) from error
    if not is_first():
        # Until the end. Of UTF-8, since names of images and classes are printed in any locale.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def check(
    distributed: bool,
    coordinator: str | None,
    process_id: int | None,
    num_processes: int | None,
) -> None:
    """Checks that all three values are given with ``distributed``, or none.

    Raises:
      UserError: one is missing, or they do not go together.
    """
    given = {
        "--coordinator": coordinator,
        "--process-id": process_id,
        "--num-processes": num_processes,
    }
    if not distributed and any(value is not None for value in given.values()):
        raise UserError(f"{', '.join(given)} go with --distributed: give it too")
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise UserError(f"{missing[0]} is missing: give {', '.join(given)}, or none of them")
    port = (coordinator or ":1").rpartition(":")[2]
    if not (port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator={coordinator}: give HOST:PORT of the first process")
    if process_id is not None and not 0 <= process_id < (num_processes or 0):
        raise UserError(
            f"--process-id={process_id}: give 0 to {(num_processes or 0) - 1}, since "
            f"--num-processes={num_processes}"
        )


def as_flags(
    distributed: bool,
    coordinator: str | None,
    process_id: int | None,
    num_processes: int | None,
) -> list[str]:
    """Returns the words that start another program likewise."""
    check(distributed, coordinator, process_id, num_processes)
    words = ["--distributed"] if distributed else []
    if coordinator is not None:
        words += [f"--coordinator={coordinator}", f"--process-id={process_id}"]
        words += [f"--num-processes={num_processes}"]
    return words


def rank(process_id: int | None) -> int:
    """Returns the number of this process before `start`: as given, or as the launcher says.

    Raises:
      UserError: no launcher says it.
    """
    numbers = [process_id, *(os.environ.get(name) for name in _RANKS)]
    known = [int(number) for number in numbers if number is not None and str(number).isdigit()]
    if not known:
        raise UserError(
            "--distributed: no launcher says the number of this process (SLURM, Open MPI, TPU): "
            "give --coordinator=HOST:PORT --process-id=I --num-processes=N"
        )
    return known[0]


def are_many() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes the files."""
    return jax.process_index() == 0


def leave(status: int) -> NoReturn:
    """Ends this process with an exit status.

    One of many ends at once: Python's usual end waits for the others, which wait for this one.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def wait() -> None:
    """Waits for all processes."""
    if are_many():
        with _together():
            multihost_utils.sync_global_devices("dense_jax")


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Lets the first process run alone, then all others: it prepares what they find prepared."""
    if not is_first():
        wait()
    try:
        yield
    finally:
        if is_first():
            wait()


def by_first(action: Callable[[], T]) -> T | None:
    """Does ``action`` in the first process only, and returns its result there, None elsewhere.

    Raises:
      UserError: in all processes, if the first one raises it.
    """
    result, reason = None, None
    if is_first():
        try:
            result = action()
        except UserError as error:
            reason = str(error)
    if reason := from_first(reason):
        raise UserError(reason)
    return result


def from_first(value: Any) -> Any:
    """Returns the first process's JSON value in all processes."""
    if not are_many():
        return value
    text = json.dumps(value).encode()
    (size,) = _broadcast(np.array([len(text)], np.int32))
    return json.loads(_broadcast(np.resize(np.frombuffer(text, np.uint8), size)).tobytes())


def arrays_from_first(tree: T) -> T:
    """Returns the first process's arrays, bit for bit, in all processes."""
    if not are_many():
        return tree

    def leaf(value: Any) -> np.ndarray:
        array = np.asarray(value)
        return _broadcast(_as_bytes(array)).view(array.dtype).reshape(array.shape)

    return jax.tree.map(leaf, tree)


def gather(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Joins arrays [rows, ...] of all processes, in their order, bit for bit."""
    if not are_many():
        return dict(rows)
    joined = {}
    for name, array in rows.items():
        with _together():
            parts = multihost_utils.process_allgather(_as_bytes(array))
        shape = len(parts) * array.shape[0], *array.shape[1:]
        joined[name] = np.ascontiguousarray(parts).reshape(-1).view(array.dtype).reshape(shape)
    return joined


def from_all(value: Any) -> list[Any]:
    """Returns the JSON values of all processes, in their order, in all processes."""
    if not are_many():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = gather({"size": np.array([len(text)])})["size"]
    padded = np.pad(text, (0, sizes.max() - len(text)))
    rows = gather({"text": padded})["text"].reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _broadcast(array: np.ndarray) -> np.ndarray:
    with _together():
        return np.asarray(multihost_utils.broadcast_one_to_all(array))


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Context for an exchange with the other processes.

    Raises:
      UserError: one of them has ended.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:  # JAX raises either
        raise ended(error) from error


def ended(error: Exception) -> UserError:
    """Returns what to say if an exchange with other processes fails."""
    return UserError(
        f"another process has ended ({str(error).splitlines()[0][:200]}): see what it said, and "
        "start all of them again with the same command"
    )
