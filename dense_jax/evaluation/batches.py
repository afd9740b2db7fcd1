"""Batches with every image of a split once, normalised and padded, and a task's predictions."""

from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np

from dense_jax.data import pipeline
from dense_jax.data.dataset import Source
from dense_jax.data.normalise import Normalise
from dense_jax.train.config import RunConfig
from dense_jax.train.step import Batch, eval_step, replicate, shard


class Predicts(Protocol):
    """The part of a task that evaluation needs."""

    @property
    def config(self) -> RunConfig:
        """How images are normalised and batched."""
        ...

    def predict(self, variables: Any, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        """Returns the network's outputs for a batch, by name; see `dense_jax.tasks.task.Task`."""
        ...


def eval_batches(source: Source, config: RunConfig) -> pipeline.EvalBatches:
    """Returns normalised batches with every image of a split once, for all devices."""
    devices = jax.local_device_count()
    # A multiple of the devices; the end of the last batch is padding.
    size = -(-config.eval_batch_size // devices) * devices
    return pipeline.eval_batches(source, [Normalise(config.normalisation)], size)


def predict_split(
    task: Predicts, variables: Any, source: Source
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields the index and the outputs [H, W, ...] of every image of a split, in any order."""

    def outputs_of(variables: Any, batch: Batch) -> tuple[Any, Any]:
        return {}, task.predict(variables, batch["images"], batch["size"])

    step, variables = eval_step(outputs_of), replicate(variables)
    for batch in eval_batches(source, task.config):
        arrays = {k: batch[k] for k in ("images", "size")}
        outputs = jax.device_get(step(variables, shard(arrays))[1])
        outputs = {name: x.reshape(-1, *x.shape[2:]) for name, x in outputs.items()}
        for i, index in enumerate(batch["index"]):
            if index >= 0:
                height, width = batch["size"][i]
                yield int(index), {name: x[i, :height, :width] for name, x in outputs.items()}
