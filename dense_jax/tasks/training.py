"""Trains any task: opens its data, makes its state, runs the loop and writes the run folder."""

import contextlib
import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from dense_jax import runs, start
from dense_jax.data import dataset as datasets
from dense_jax.data import pipeline
from dense_jax.data.dataset import Dataset, Source
from dense_jax.data.transforms import Transform
from dense_jax.errors import UserError
from dense_jax.evaluation import report
from dense_jax.tasks.task import Task
from dense_jax.train import cli, processes
from dense_jax.train.checkpoint import has_checkpoint
from dense_jax.train.config import RunConfig
from dense_jax.train.loop import Signals, fit
from dense_jax.train.schedules import build_optimizer, build_schedule
from dense_jax.train.state import TrainState, load_matching, num_parameters
from dense_jax.train.step import Batch, Losses, LossFn, eval_step, replicate, shard, train_step

ConfigT = TypeVar("ConfigT", bound=RunConfig)

_STATISTICS_BATCHES = 500  # as in DeconvNet's release
_NUM_WARNINGS = 5  # lines of the label doctor shown before training


def main(
    build: Callable[[ConfigT, int], Task], presets: Mapping[str, ConfigT], doc: str | None
) -> None:
    """Runs a script from the command line: ``PRESET --flag=value ...``.

    Args:
      build: (configuration, number of classes) -> task.
      presets: configurations by name; each preset's fields are its flags' defaults.
      doc: the script's docstring, shown by ``--help``.
    """
    cli.run(lambda config: run(build, config), presets, doc, adapt=_follow_weights)


def run(build: Callable[[ConfigT, int], Task], config: ConfigT) -> TrainState:
    """Trains, evaluates and reports each stage of a configuration; returns the last state."""
    dataset = load_dataset(config)
    for stage in config.each_stage():
        state = train(build(stage, dataset.classes.num_classes), dataset)
        if int(state.step) < stage.num_steps:  # stopped by a signal; the next call resumes here
            break
    return state


def train(
    task: Task,
    dataset: Dataset | None = None,
    *,
    loss: LossFn | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
    """Trains a task and writes a run folder with metrics, pictures and a report.

    Args:
      task: the task to train.
      dataset: trains on its "train" split and evaluates on its "val" split. Default: the dataset
        of the task's configuration.
      loss: replaces the task's own loss: (apply, batch, rng) -> {name: (sum, count)}; see
        `dense_jax.train.step.LossFn`.
      optimizer: replaces the one of the configuration, whose optimisation flags then do nothing.

    Returns:
      The final state.

    Raises:
      UserError: the batch does not split evenly over the devices, or the folder belongs to another
        run.
    """
    config = task.config
    dataset = task.training_data(dataset or load_dataset(config))
    tx = optimizer or build_optimizer(config, task.groups)
    _check_same_everywhere(config, dataset)
    own = {"loss": loss, "optimizer": optimizer}
    notes = {
        f"own_{name}": getattr(x, "__qualname__", type(x).__name__) for name, x in own.items() if x
    }
    if not _is_as_built(task, dataset.classes.num_classes):
        notes["own_model"] = type(task.model).__name__
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        workdir, batches, state = _begin(task, dataset, tx, notes, stack)
        with processes.first_goes_first():  # it may count the classes
            own_loss = _checked(loss) if loss else task.loss(dataset)
        step = train_step(own_loss, ema_decay=config.ema_decay)
        evaluate_on_val = task.evaluator(dataset, "val")
        card: dict[str, Any] = {"input_shape": list(batches.example["images"].shape[1:])}
        refresh = None
        if task.posthoc_batch_stats:
            card["batch_statistics"] = "averaged over the training split after training"
            train_split = dataset.split("train")
            refresh = posthoc_statistics(task.model, train_split, task.transforms, config)

        def evaluate(state: TrainState, step: int) -> dict[str, float]:
            record = evaluate_on_val(state.eval_variables(), step == config.num_steps)
            record = dataclasses.replace(record, protocol={**record.protocol, **card, **notes})
            processes.by_first(lambda: record.write(workdir, step))
            record.tell(step)
            return record.row()

        rate = None if optimizer else build_schedule(config)
        state = fit(state, step, batches, config, evaluate, task.headline, rate, refresh, signals)
        if int(state.step) >= config.num_steps:
            task.after_training(jax.device_get(state.eval_variables()), dataset)
        if path := processes.by_first(lambda: report.write_report(workdir)):
            print(f"report: {path}")
        return state


def _check_same_everywhere(config: RunConfig, dataset: Dataset) -> None:
    """Refuses flags or data that differ between processes that train together."""
    own = {**config.to_json(), "data": dataset.fingerprint, "process_id": None}
    own = json.loads(json.dumps(own))  # as it comes from the first process
    theirs = processes.from_first(own)
    if changed := [name for name in own if own[name] != theirs[name]]:
        name = changed[0]
        raise UserError(
            f"process {jax.process_index()} has another {name} than the first one ({own[name]!r}, "
            f"not {theirs[name]!r}): start the same command in each, with the same files"
        )


def _is_as_built(task: Task, num_classes: int) -> bool:
    """Whether the ``build`` beside the configuration's class makes the network of the task."""
    build = getattr(sys.modules[type(task.config).__module__], "build", None)
    if not callable(build):
        return True  # `dense_jax.load` asks for the task anyway
    # Functions inside a network compare by identity, and differ between two builds; as text they
    # differ by an address alone.
    made, own = (
        re.sub(r" at 0x[0-9a-f]+", "", repr(model))
        for model in (build(task.config, num_classes).model, task.model)
    )
    return made == own


def _checked(loss: LossFn) -> LossFn:
    """Refuses what a user's loss returns if it is not {name: (sum, count)}."""

    def checked(apply: Callable[..., Any], batch: Batch, rng: jax.Array) -> Losses:
        losses = loss(apply, batch, rng)
        is_right = isinstance(losses, Mapping) and all(
            isinstance(pair, tuple) and len(pair) == 2 for pair in losses.values()
        )
        if not is_right:
            raise UserError(
                f"the loss returns {type(losses).__name__}: return {{name: (sum, count)}}, scalars "
                "of a micro-batch, which are added over devices before the division"
            )
        return losses

    return checked


def load_dataset(config: RunConfig) -> Dataset:
    """Opens the dataset of a configuration after a check of its files and labels.

    Raises:
      UserError: files or labels are wrong; the message names the first and the remedy.
    """
    with processes.first_goes_first():
        dataset = datasets.load(config.dataset, config.data_dir, **config.data_options)
    for line in dataset.warnings[:_NUM_WARNINGS]:
        print(f"check-data: {line}")
    if (more := len(dataset.warnings) - _NUM_WARNINGS) > 0:
        print(f"check-data: and {more} more; python -m dense_jax check-data lists them")
    return dataset


def _begin(
    task: Task,
    dataset: Dataset,
    tx: optax.GradientTransformation,
    notes: Mapping[str, Any],
    stack: contextlib.ExitStack,
) -> tuple[pathlib.Path, pipeline.TrainBatches, TrainState]:
    """Makes the run folder, the training batches and the initial state.

    ``stack`` holds the lock of the folder.

    Raises:
      UserError: the batch does not split evenly over the devices, or the folder belongs to another
        run.
    """
    config = task.config
    if config.batch_size % (jax.device_count() * config.accumulate):
        raise UserError(
            f"--batch-size={config.batch_size} cannot be shared by {jax.device_count()} devices "
            f"in {config.accumulate} micro-batches: give a multiple of their product"
        )
    source = dataset.split("train")
    dataset.split("val")  # if it is missing, fail now and not after hours of training
    batches = pipeline.train_batches(
        source,
        task.transforms,
        config.batch_size // jax.process_count(),
        config.seed,
        num_threads=config.num_threads,
        num_workers=config.num_workers,
        shape_of=task.train_size,
    )
    shape = batches.example["images"].shape[1:]
    state = TrainState.init(task.model, tx, shape, seed=config.seed, ema=config.ema_decay > 0)
    is_alone = "batch_stats" in state.model_state and getattr(task.model, "axis_name", None) is None
    if is_alone and jax.device_count() > 1:
        print(
            f"warning: {type(task.model).__name__} has batch statistics and no axis_name: unless "
            "its layers name one, each device normalises by its own images only; pass "
            "axis_name=dense_jax.train.step.AXIS"
        )
    if config.init and not has_checkpoint(pathlib.Path(config.workdir or "")):
        state = _initialise_from(config.init, state, tx, config.normalisation)
    workdir = pathlib.Path(config.workdir or "")

    def prepare() -> None:  # last: all other checks have passed
        stack.enter_context(runs.writing(workdir))
        runs.prepare(config, dataset, notes)

    processes.by_first(prepare)
    size = f"{num_parameters(state.params):,} parameters"
    print(f"{type(task.model).__name__}: {size}; run in {workdir}")
    return workdir, batches, state


def posthoc_statistics(
    model: nn.Module, source: Source, transforms: Sequence[Transform], config: RunConfig
) -> Callable[[TrainState], TrainState]:
    """Returns (state) -> state with batch statistics averaged over ``source``.

    It makes one pass of at most 500 batches in training mode and averages the mean and variance of
    the batches, with equal weights. Training itself does not use the result. The network must have
    an attribute ``bn_momentum``.

    Reference: SegNet, Badrinarayanan et al., PAMI 2017, arXiv:1511.00561; the authors' release
    keeps no running averages.
    """
    own = model.clone(bn_momentum=0.0)  # the new statistics are then those of the batch

    def statistics(variables: Any, batch: Batch) -> tuple[Any, Any]:
        _, new = own.apply(
            variables,
            batch["images"],
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return jax.tree.map(lambda x: x / jax.device_count(), new["batch_stats"]), {}

    step = eval_step(statistics)

    def refresh(state: TrainState) -> TrainState:
        size = config.batch_size // config.accumulate
        num_batches = min(max(1, len(source) // size), _STATISTICS_BATCHES)
        batches = pipeline.train_batches(
            source,
            transforms,
            size // jax.process_count(),
            config.seed,
            num_threads=config.num_threads,
            num_workers=config.num_workers,
        )
        total = None
        with contextlib.closing(batches):
            for batch, _ in zip(batches, range(num_batches), strict=False):
                arrays = {"images": batch["images"]}
                sums, _ = jax.device_get(step(state.eval_variables(), shard(arrays)))
                sums = jax.tree.map(lambda x: x.astype(np.float64), sums)
                total = sums if total is None else jax.tree.map(np.add, total, sums)
        mean = jax.tree.map(lambda x: (x / num_batches).astype(np.float32), total)
        return replicate(state.replace(model_state={**state.model_state, "batch_stats": mean}))

    return refresh


def _follow_weights(config: ConfigT) -> ConfigT:
    """Sets the normalisation to that of the ``--init`` weights, or of the run to resume."""
    if not config.init or cli.is_given("--normalisation"):
        return config
    workdir = pathlib.Path(next(config.each_stage()).workdir or "")
    if has_checkpoint(workdir):
        expected = start.normalisation_of(f"run:{workdir}")
    else:
        expected = start.normalisation_of(config.init or "")
    if expected in (None, config.normalisation):
        return config
    config = dataclasses.replace(config, normalisation=expected)
    print(f"init: --normalisation={expected}, as these weights expect images")
    return config


def _initialise_from(source: str, state: TrainState, tx: Any, normalisation: str) -> TrainState:
    """Copies parameters and batch statistics of equal name and shape from ``--init``."""
    ours = {"params": dict(state.params), **state.model_state}
    theirs, expected = start.initial(source, ours)
    if expected not in (None, normalisation):
        print(
            f"init: warning: these weights expect --normalisation={expected}, and this run has "
            f"--normalisation={normalisation}"
        )
    variables = load_matching(ours, theirs)
    params = variables.pop("params")
    ema = None if state.ema_params is None else jax.tree.map(jnp.copy, params)
    return state.replace(
        params=params, model_state=variables, ema_params=ema, opt_state=tx.init(params)
    )
