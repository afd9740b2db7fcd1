"""Checkpoints: the whole state and the data position in one atomic step (Orbax)."""

import math
import pathlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util
from orbax.checkpoint import checkpoint_managers

from dense_jax.errors import UserError

T = TypeVar("T")


class Checkpoints:
    """The ``checkpoints`` folder of a run: keeps the last step and the best by validation score.

    Saving is asynchronous and atomic. A step gets its final name only when it is complete. A run
    that is killed while it saves therefore resumes from the step before.
    """

    def __init__(self, workdir: str | pathlib.Path, headline: str = "") -> None:
        """Opens the folder; makes it if it does not exist.

        Args:
          workdir: the run folder.
          headline: name of the metric that decides which step is the best; higher is better.
        """
        self._headline = headline
        policies = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(1),
                checkpoint_managers.BestN(
                    get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            pathlib.Path(workdir).absolute() / "checkpoints",
            options=ocp.CheckpointManagerOptions(preservation_policy=policies, best_fn=self._score),
        )

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
        scores = {s: m for s in self._manager.all_steps() if (m := self._manager.metrics(s))}
        return max(scores, key=lambda s: (self._score(scores[s]), s), default=None)

    def save(
        self, step: int, state: Any, data: Any, metrics: dict[str, float] | None = None
    ) -> None:
        """Starts to save ``state`` and the data position ``data`` (JSON values).

        Raises:
          UserError: the state is not finite, and the step before stays; or this save or the one
            before failed: the disk is full or read-only.
        """
        if step == self.latest_step and (metrics is None or self._manager.metrics(step)):
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
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(traverse_util.unflatten_dict(tree)),
            data=ocp.args.JsonSave({"position": data}),
        )
        try:
            self._manager.save(step, args=items, metrics=metrics or {}, force=True)
        except Exception as error:
            raise _explain(error, self._manager.directory) from error

    def restore(self, target: T, step: int | None = None) -> tuple[T, Any]:
        """Reads ``step`` (default: the latest) into a state like ``target``.

        Returns:
          The state with host arrays, and the data position.

        Raises:
          UserError: the checkpoint belongs to another network or optimiser; the message names the
            first difference.
        """
        tree, position = self.read(step)
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
                    f"the checkpoint in {self._manager.directory} belongs to another network: "
                    f"the shape of {'/'.join(key)} is {theirs} there and {ours} here; "
                    "give the flags of that run, or another --workdir"
                )
        leaves = {k: np.asarray(saved[k]) if k in expected else v for k, v in template.items()}
        state: Any = serialization.from_state_dict(target, traverse_util.unflatten_dict(leaves))
        return state, position

    def read(self, step: int | None = None) -> tuple[dict[str, Any], Any]:
        """Reads ``step`` (default: the latest) as nested dicts of host arrays.

        Raises:
          UserError: the files of the step are damaged.
        """
        step = self.latest_step if step is None else step
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # a damaged file makes Orbax raise almost anything
            raise UserError(
                f"the checkpoint {self._manager.directory / str(step)} is damaged "
                f"({_first_line(error)}): remove that folder to resume from an earlier step, if any"
            ) from error
        return jax.tree.map(np.asarray, restored["state"]), restored["data"]["position"]

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          UserError: the save could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise _explain(error, self._manager.directory) from error

    def close(self) -> None:
        """Waits for the last save and ends the background threads.

        Raises:
          UserError: the last save could not be written.
        """
        try:
            self._manager.close()
        except Exception as error:
            raise _explain(error, self._manager.directory) from error

    def _score(self, metrics: dict[str, float]) -> float:
        score = metrics.get(self._headline, -math.inf)
        return -math.inf if math.isnan(score) else score


def has_checkpoint(workdir: str | pathlib.Path) -> bool:
    """Whether a run folder holds a complete checkpoint."""
    return any(path.name.isdigit() for path in pathlib.Path(workdir).glob("checkpoints/*"))


def read_variables(
    workdir: str | pathlib.Path, which: str = "last", headline: str = ""
) -> tuple[dict[str, Any], int]:
    """Reads the parameters of a run for evaluation: their running average if the run has one.

    Args:
      workdir: a run folder.
      which: "last" or "best"; "best" falls back to the last if no step was evaluated.
      headline: name of the metric that decides which step is the best.

    Returns:
      The variables {"params": ..., other collections} as host arrays, and their step.

    Raises:
      UserError: the folder holds no checkpoint.
    """
    folder = pathlib.Path(workdir)
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} holds no checkpoints: give the folder of a training run")
    with Checkpoints(folder, headline) as checkpoints:
        step = checkpoints.best_step if which == "best" else None
        step = checkpoints.latest_step if step is None else step
        if step is None:
            raise UserError(f"{folder} holds no complete checkpoint: train it first")
        saved, _ = checkpoints.read(step)
    params = saved.get("ema_params") or saved["params"]
    variables = {"params": params, **saved.get("model_state", {})}
    return variables, step


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
