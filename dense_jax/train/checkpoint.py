"""Checkpoints: the whole state and the data position in one atomic step (Orbax).

A digest of each array, of the position and of the metrics is saved with a step, and compared when
the step is read. Where they differ, an older step is read instead, and a message says so.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import logging
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util

from dense_jax.errors import UserError

T = TypeVar("T")

_NUM_LATEST = 2  # steps on disk besides the best one: the last may be damaged
_RECORD = pathlib.Path("data") / "metadata"  # of a step: data position and digests


class Checkpoints:
    """The ``checkpoints`` folder of a run, as its training uses it.

    It keeps the last two steps and the best by validation score. Saving is asynchronous and atomic.
    A step gets its final name only when it is complete. A run that is killed while it saves
    therefore resumes from the step before.
    """

    def __init__(self, workdir: str | pathlib.Path, headline: str = "") -> None:
        """Opens the folder; makes it if it does not exist.

        Args:
          workdir: the run folder.
          headline: name of the metric that decides which step is the best; higher is better.
        """
        _hide_late_callbacks()
        self._folder, self._headline = _folder_of(workdir), headline
        self._scores, damages = _scores_of(self._folder, _steps_in(self._folder), headline)
        for damage in damages:
            print(f"{damage}: this step is not taken as the best")
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LastAndBest(self._folder, self._scores),
            best_fn=lambda metrics: _score(metrics, self._headline),
            lightweight_initialize=True,  # Orbax would stop at damaged metrics
            multiprocessing_options=_alone(),
            create=False,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        return ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The evaluated step with the highest score (of equal ones the newest), or None."""
        return _best_of(self._scores)

    def is_evaluated(self, step: int) -> bool:
        """Whether a step was saved with a score."""
        return self._scores.get(step, -math.inf) > -math.inf

    def save(
        self, step: int, state: Any, data: Any, metrics: dict[str, float] | None = None
    ) -> None:
        """Starts to save ``state`` and the data position ``data`` (JSON values).

        Raises:
          UserError: the state is not finite, and the step before stays; or this save or the one
            before failed: the disk is full or read-only.
        """
        if step == self.latest_step:
            return
        tree = traverse_util.flatten_dict(serialization.to_state_dict(jax.device_get(state)))
        tree = {k: np.asarray(v) for k, v in tree.items() if v is not None}
        for key, array in tree.items():  # the loss of this step can be finite all the same
            if jnp.issubdtype(array.dtype, jnp.floating) and not np.all(np.isfinite(array)):
                kept = f"step {self.latest_step} is kept" if self.latest_step else "none is saved"
                raise UserError(
                    f"the update of step {step} made {'/'.join(map(str, key))} infinite or NaN, so "
                    f"it is not saved ({kept}): start in another --workdir with a lower "
                    "--learning-rate or more --warmup-steps"
                )
        metrics, tree = metrics or {}, traverse_util.unflatten_dict(tree)
        digests = _digests(tree, data) | {"metrics": _digest(_as_bytes(metrics))}
        record = {"position": data, "digests": digests}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(tree), data=ocp.args.JsonSave(record)
        )
        self._scores[step] = _score(metrics, self._headline)
        try:
            self._manager.save(step, args=items, metrics=metrics, force=True)
        except Exception as error:
            raise _explain(error, self._folder) from error

    def restore(self, target: T) -> tuple[T, Any]:
        """Reads the latest sound step into a state like ``target``.

        Damaged steps are renamed, so that the run can save steps of their names again.

        Returns:
          The state with host arrays, and the data position.

        Raises:
          UserError: the checkpoint belongs to another network or optimiser; the message names the
            first difference. Or all steps are damaged.
        """
        tree, position, step = _read_sound(self._folder)
        state = _fill(target, tree, self._folder)
        if damaged := [other for other in _steps_in(self._folder) if other > step]:
            self._manager.close()
            for other in damaged:
                aside = self._folder / f"damaged-{other}"
                shutil.rmtree(aside, ignore_errors=True)
                (self._folder / str(other)).rename(aside)
                self._scores.pop(other)
                print(f"the damaged step {other} is now {aside}, which may be removed")
            self._manager = self._open()
        return state, position

    def read(self) -> tuple[dict[str, Any], Any]:
        """Reads the latest sound step as nested dicts of host arrays, and the data position.

        Raises:
          UserError: all steps are damaged.
        """
        return _read_sound(self._folder)[:2]

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          UserError: the save could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise _explain(error, self._folder) from error

    def close(self) -> None:
        """Waits for the last save and ends the background threads.

        Raises:
          UserError: the last save could not be written.
        """
        try:
            self._manager.close()
        except Exception as error:
            raise _explain(error, self._folder) from error


def has_checkpoint(workdir: str | pathlib.Path) -> bool:
    """Whether a run folder holds a complete checkpoint."""
    return bool(_steps_in(_folder_of(workdir)))


def read_variables(
    workdir: str | pathlib.Path, which: str = "last", headline: str = ""
) -> tuple[dict[str, Any], int]:
    """Reads the parameters of a run for evaluation: their running average if the run has one.

    Nothing is written, and a training may go on in the folder meanwhile.

    Args:
      workdir: a run folder.
      which: "last" or "best"; "best" falls back to the last if no step was evaluated.
      headline: name of the metric that decides which step is the best.

    Returns:
      The variables {"params": ..., other collections} as host arrays, and their step.

    Raises:
      UserError: the folder holds no checkpoint, or no sound one.
    """
    folder = _folder_of(workdir)
    if not folder.is_dir():
        raise UserError(f"{workdir} holds no checkpoints: give the folder of a training run")
    if not _steps_in(folder):
        raise UserError(f"{workdir} holds no complete checkpoint: train it first")
    saved, _, step = _read_sound(folder, headline if which == "best" else None)
    params = saved.get("ema_params") or saved["params"]
    variables = {"params": params, **saved.get("model_state", {})}
    return variables, step


@dataclasses.dataclass(frozen=True)
class _LastAndBest:
    """Orbax's rule of what stays on disk: also what another process reads just now."""

    folder: pathlib.Path
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-_NUM_LATEST:], _best_of(self.scores)}
        return [step in kept or _is_read(self.folder, step) for step in steps]


class _DamagedError(Exception):
    """The files of a step are not as they were saved."""


def _alone() -> ocp.options.MultiprocessingOptions:
    """Lets a process save and read without the others; see `dense_jax.train.processes`."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
    )


def _folder_of(workdir: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(workdir).absolute() / "checkpoints"


def _steps_in(folder: pathlib.Path) -> list[int]:
    """The complete steps: their folders get a number as the name at the end."""
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]


def _read_sound(
    folder: pathlib.Path, headline: str | None = None
) -> tuple[dict[str, Any], Any, int]:
    """Reads the last sound step, or that of the best headline.

    Returns:
      Its state, its data position and its number.
    """
    _hide_late_callbacks()
    while True:
        steps = _steps_in(folder)
        scores, damages = _scores_of(folder, [] if headline is None else steps, headline or "")
        found, read_as = None, 0
        for step in sorted(steps, key=lambda s: (scores.get(s, 0.0), s), reverse=True):
            try:
                found, read_as = _read(folder, step), step
                break
            except _DamagedError as damage:
                damages.append(f"the checkpoint {folder / str(step)} is damaged ({damage})")
        if damages and _changes(folder, steps):
            continue  # a training removes old steps
        if found is None:
            more = "" if len(steps) == 1 else ", and so is each other one"
            raise UserError(
                f"{damages[-len(steps)]}{more}: restore that folder from a copy, or train in "
                "another --workdir"
            )
        for damage in damages:
            print(f"{damage}: step {read_as} is read instead")
        return *found, read_as


def _changes(folder: pathlib.Path, steps: list[int]) -> bool:
    """Whether the steps of a folder change within the second that the removal of one may take."""
    for _ in range(20):
        if set(_steps_in(folder)) != set(steps):
            return True
        time.sleep(0.05)
    return False


def _read(folder: pathlib.Path, step: int) -> tuple[dict[str, Any], Any]:
    """Reads a step and compares its digests.

    Raises:
      _DamagedError: with the reason.
    """
    path = folder / str(step)
    try:
        with (path / _RECORD).open("rb") as file, contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_SH)  # until the file is closed; see `_is_read`
            record = json.load(file)
            handler = ocp.StandardCheckpointHandler(multiprocessing_options=_alone())
            reader = stack.enter_context(
                ocp.Checkpointer(handler, multiprocessing_options=_alone())
            )
            tree = reader.restore(path / "state", args=ocp.args.StandardRestore())
        tree = jax.tree.map(np.asarray, tree)
        position = record["position"]
        if "digests" in record:  # runs of earlier versions have none
            saved = {name: x for name, x in record["digests"].items() if name != "metrics"}
            found = _digests(tree, position)
            if wrong := [name for name in saved | found if saved.get(name) != found.get(name)]:
                raise ValueError(f"{wrong[0]} is not what was saved")
        if "step" in tree and int(tree["step"]) != step:
            raise ValueError(f"it is of step {int(tree['step'])}, so somebody has renamed it")
        return tree, position
    except Exception as error:  # a damaged file makes Orbax raise almost anything
        raise _DamagedError(_first_line(error)) from error


def _is_read(folder: pathlib.Path, step: int) -> bool:
    """Whether another process reads a step just now; see `_read`."""
    with contextlib.suppress(OSError), (folder / str(step) / _RECORD).open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _scores_of(
    folder: pathlib.Path, steps: Sequence[int], headline: str
) -> tuple[dict[int, float], list[str]]:
    """The headline of each step, minus infinity for none; and which metrics are damaged."""
    scores, damages = {}, []
    for step in steps:
        path = folder / str(step) / "metrics" / "metrics"
        try:
            metrics = json.loads(path.read_bytes()) if path.exists() else {}
            record = json.loads((folder / str(step) / _RECORD).read_bytes())
            if "digests" in record and record["digests"]["metrics"] != _digest(_as_bytes(metrics)):
                raise ValueError("they are not what was saved")
            scores[step] = _score(metrics, headline)
        except Exception as error:  # any bytes may stand there
            damages.append(f"{path} is damaged ({_first_line(error)})")
            scores[step] = -math.inf
    return scores, damages


def _score(metrics: Mapping[str, float], headline: str) -> float:
    score = metrics.get(headline, -math.inf)
    return -math.inf if math.isnan(score) else score


def _best_of(scores: Mapping[int, float]) -> int | None:
    evaluated = [step for step, score in scores.items() if score > -math.inf]
    return max(evaluated, key=lambda step: (scores[step], step), default=None)


def _digests(tree: Any, position: Any) -> dict[str, str]:
    """The digests of all arrays, by name, and of the position."""
    leaves = traverse_util.flatten_dict(tree, sep="/")
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing sets other threads free
        digests = dict(zip(leaves, pool.map(_digest_of, leaves.values()), strict=True))
    return digests | {"position": _digest(_as_bytes(position))}


def _digest_of(array: np.ndarray) -> str:
    head = f"{array.dtype} {array.shape}".encode()
    return _digest(head, np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _digest(*parts: Any) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def _as_bytes(value: Any) -> bytes:
    """JSON text that is equal for equal values, whatever the file looks like."""
    return json.dumps(value, sort_keys=True).encode()


def _fill(target: T, tree: dict[str, Any], folder: pathlib.Path) -> T:
    """Returns ``target`` with the saved arrays."""
    saved: dict[Any, Any] = traverse_util.flatten_dict(tree)
    template: dict[Any, Any] = traverse_util.flatten_dict(
        serialization.to_state_dict(target), keep_empty_nodes=True
    )
    expected: dict[Any, Any] = {k: v for k, v in template.items() if hasattr(v, "shape")}
    for key in sorted(expected.keys() | saved.keys(), key=str):
        ours = tuple(expected[key].shape) if key in expected else "absent"
        theirs = tuple(saved[key].shape) if key in saved else "absent"
        if ours != theirs:
            raise UserError(
                f"the checkpoint in {folder} belongs to another network: "
                f"the shape of {'/'.join(key)} is {theirs} there and {ours} here; "
                "give the flags of that run, or another --workdir"
            )
    leaves = {k: np.asarray(saved[k]) if k in expected else v for k, v in template.items()}
    filled: Any = serialization.from_state_dict(target, traverse_util.unflatten_dict(leaves))
    return filled


@functools.cache
def _hide_late_callbacks() -> None:
    """Hides what tensorstore's callbacks report after Orbax has given up reading or saving."""

    def without_late(show: Callable[..., object]) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            if not any(str(getattr(x, "exc_value", x)) == "Event loop is closed" for x in args):
                show(*args)

        return hook

    sys.excepthook = without_late(sys.excepthook)
    sys.unraisablehook = without_late(sys.unraisablehook)
    logging.getLogger("asyncio").addFilter(
        lambda record: "OCDBT database" not in str(record.exc_info and record.exc_info[1])
    )


def _explain(error: Exception, folder: Any) -> Exception:
    """Returns a UserError for a failed write, and any other error unchanged."""
    text = str(error)
    if isinstance(error, OSError) or "No space left" in text or "RESOURCE_EXHAUSTED" in text:
        reason = _first_line(error)
        return UserError(
            f"cannot write a checkpoint under {folder} ({reason}): free some disk space"
        )
    return error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
