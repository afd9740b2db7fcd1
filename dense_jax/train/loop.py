"""The training loop: step, log, evaluate, save. It stops if the loss is not finite."""

import collections
import contextlib
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dense_jax.errors import UserError
from dense_jax.train import processes
from dense_jax.train.checkpoint import Checkpoints
from dense_jax.train.config import RunConfig
from dense_jax.train.log import CompileCounter, MetricsWriter, Throughput, progress_bar
from dense_jax.train.state import TrainState
from dense_jax.train.step import Batch, eval_step, replicate, shard


class Batches(Protocol):
    """An endless, resumable stream of training batches (see ``data.pipeline``)."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> Any:
        """The position after the last batch that was returned, as JSON values."""
        ...

    def set_state(self, state: Any) -> None:
        """Moves to a position."""
        ...

    def close(self) -> None:
        """Ends the reading threads and processes."""
        ...

    def names(self, index: np.ndarray) -> list[str]:
        """The names of the images of a batch by their indices, for messages."""
        ...


Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
Evaluate = Callable[[TrainState, int], dict[str, float]]


def fit(
    state: TrainState,
    step: Step,
    batches: Batches,
    config: RunConfig,
    evaluate: Evaluate | None = None,
    headline: str = "",
    rate: optax.Schedule | None = None,
    refresh: Callable[[TrainState], TrainState] | None = None,
    signals: "Signals | None" = None,
) -> TrainState:
    """Trains up to ``config.num_steps`` and returns the final state. Resumes a stopped run.

    State and data position are saved together in ``config.workdir``. A run that is killed and
    started again with the same command therefore ends with exactly the same parameters. SIGTERM
    and Ctrl-C save and return early. Of many processes, the first one reads and writes the folder,
    and a signal to one of them stops all at the same step.

    Args:
      state: initial state; the last checkpoint, if there is one, replaces it.
      step: compiled step of :func:`dense_jax.train.step.train_step`.
      batches: training batches on the host; the loop calls :func:`dense_jax.train.step.shard`.
      config: numbers of steps, micro-batches, and the run folder.
      evaluate: (state, step) -> metrics, called every ``eval_every`` steps and at the end.
      headline: name of the metric that decides which checkpoint is the best; higher is better.
      rate: learning rate by step, for the log; None if it is unknown.
      refresh: (state) -> state, called before each evaluation. It recomputes batch statistics that
        evaluation needs and training does not; its result is saved.
      signals: those that arrived before; default: none.

    Raises:
      UserError: the loss is not finite, or a checkpoint cannot be written or does not fit.
    """
    workdir = pathlib.Path(_require_workdir(config))
    CompileCounter.start()
    with contextlib.ExitStack() as stack:
        stack.callback(batches.close)
        checkpoints = None
        if processes.is_first():
            checkpoints = stack.enter_context(Checkpoints(workdir, headline))
        state, position = _resume(checkpoints, state)
        if position is not None:
            batches.set_state(position)
            print(f"resumed {workdir} at step {int(state.step)} of {config.num_steps}")
        start = int(state.step)
        if start > config.num_steps:
            raise UserError(
                f"{workdir} is at step {start}, beyond --num-steps={config.num_steps}: raise "
                "--num-steps, or give another --workdir"
            )
        state = replicate(state)
        writer = None
        if checkpoints:
            is_evaluated = start > 0 and checkpoints.is_evaluated(start)
            writer = MetricsWriter(workdir, start, config.log_every, is_evaluated)
            stack.enter_context(writer)
        bar = stack.enter_context(progress_bar(config.num_steps, start, processes.is_first()))
        signals = signals or stack.enter_context(Signals())
        stack.enter_context(signals.saving())
        stop = _Stop(signals.asked)
        losses = _LossWatch(batches)
        throughput, rate = Throughput(), jax.jit(rate) if rate else None
        scores: dict[str, float] | None = None
        stream, shapes = _ahead(batches, config), set()
        num_shapes = getattr(batches, "num_shapes", 1)
        done, stopping = start, False
        for done, (batch, index, position) in zip(
            range(start + 1, config.num_steps + 1), stream, strict=False
        ):
            programs = CompileCounter.programs
            state, scalars = step(state, batch)
            shape = batch["images"].shape
            is_expected = shape not in shapes and len(shapes) < num_shapes
            if done > start + 2 and CompileCounter.programs > programs and not is_expected:
                bar.write(f"step {done}: the training step was compiled again (a new shape?)")
            shapes.add(shape)
            losses.add(done, scalars["loss"], index)
            throughput.add(config.batch_size)
            bar.update()
            last = done == config.num_steps
            if done % config.log_every == 0 or last:
                row = {k: float(v) for k, v in jax.device_get(scalars).items()}
                losses.check_all()
                if rate:
                    row["learning_rate"] = float(rate(done - 1))
                row["images_per_second"] = throughput.read()
                row["programs_compiled"] = CompileCounter.programs
                if writer:
                    writer.write(done, "train", row)
                bar.set_postfix_str(
                    f"loss {row['loss']:.4g}, {row['images_per_second']:.1f} images/s"
                )
            scores = None
            if evaluate and (done % config.eval_every == 0 or last):
                losses.check_all()
                paused = time.perf_counter()
                state = refresh(state) if refresh else state
                scores = evaluate(state, done)
                if writer:
                    writer.write(done, "eval", scores)
                throughput.pause(time.perf_counter() - paused)
            stopping = stop.is_asked()
            if done % config.save_every == 0 or scores or last or stopping:
                losses.check_all()
                if checkpoints:
                    checkpoints.save(done, state, position, scores)
            if stopping:
                break
        if checkpoints:
            checkpoints.wait()
        processes.wait()
    if stopping:
        print(f"stopped and saved at step {done}; the same command resumes from there")
    return state


def _resume(checkpoints: Checkpoints | None, state: TrainState) -> tuple[TrainState, Any]:
    """Returns the last state, and its data position or None, as the first process reads them."""

    def restore() -> tuple[TrainState, Any] | None:
        if checkpoints is None or checkpoints.latest_step is None:
            return None
        return checkpoints.restore(state)

    found = processes.by_first(restore)
    position = processes.from_first(found and found[1])
    if position is None:
        return state, None
    return processes.arrays_from_first(found[0] if found else state), position


class _Stop:
    """Whether to stop, at the same step in all processes."""

    def __init__(self, asked: threading.Event) -> None:
        self._asked = asked
        self._votes: collections.deque[jax.Array] = collections.deque()
        self._count = eval_step(lambda _, batch: (jnp.sum(batch["votes"]), {}))

    def is_asked(self) -> bool:
        """To be called once in each step; reads the votes two steps late, as losses are read."""
        if not processes.are_many():
            return self._asked.is_set()
        own = np.full(jax.local_device_count(), self._asked.is_set(), np.int32)
        self._votes.append(self._count({}, shard({"votes": own}))[0])
        return len(self._votes) > 2 and int(self._votes.popleft()) > 0


class _LossWatch:
    """Checks each loss two steps late, when reading it no longer makes the device wait."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._pending: collections.deque[tuple[int, jax.Array, np.ndarray]] = collections.deque()

    def add(self, step: int, loss: jax.Array, index: np.ndarray) -> None:
        self._pending.append((step, loss, index))
        while len(self._pending) > 2:
            self._check(*self._pending.popleft())

    def check_all(self) -> None:
        while self._pending:
            self._check(*self._pending.popleft())

    def _check(self, step: int, loss: jax.Array, index: np.ndarray) -> None:
        value = float(loss)
        if np.isfinite(value):
            return
        names = self._batches.names(index)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise UserError(
            f"the loss is {value} at step {step}, in the batch of {shown}: check these images, or "
            "start in another --workdir with a lower --learning-rate or more --warmup-steps"
        )


def _ahead(batches: Batches, config: RunConfig) -> Iterator[tuple[Batch, np.ndarray, Any]]:
    """Keeps two batches on the devices, each with the data position to save after it."""
    queue: collections.deque[tuple[Batch, np.ndarray, Any]] = collections.deque()
    while True:
        while len(queue) < 2:
            batch = next(batches)
            index = batch["index"]
            queue.append((shard(batch, config.accumulate), index, batches.get_state()))
        yield queue.popleft()


class Signals:
    """SIGTERM and Ctrl-C during a training, as a context.

    Inside of `saving`, the first signal sets `asked`, and a second Ctrl-C interrupts at once.
    Before that, Ctrl-C interrupts and sets `asked` too: an interruption inside a callback of JAX is
    lost, and the loop then stops at its first step. In a thread other than the main one, the
    context does nothing.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._is_saving = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        self._handle(signal.SIGINT)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._before.items():
            signal.signal(number, previous)
        self._before.clear()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Context in which a signal ends the loop after a save."""
        self._is_saving = True
        self._handle(signal.SIGTERM)
        try:
            yield
        finally:
            self._is_saving = False

    def _handle(self, number: signal.Signals) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        interrupts = self.asked.is_set() or not self._is_saving
        self.asked.set()
        if interrupts and number == signal.SIGINT:
            raise KeyboardInterrupt


def _require_workdir(config: RunConfig) -> str:
    if config.workdir is None:
        raise UserError("no run folder: give --workdir")
    return config.workdir
