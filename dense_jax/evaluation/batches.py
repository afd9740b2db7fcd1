"""Batches with every image of a split once, normalised and padded, and a task's predictions.

Predictions of an image depend on the image alone: not on the other images of its split, nor, on
CPUs, on the size of the batch, to the last bit.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax import lax

from dense_jax.data import pipeline
from dense_jax.data.dataset import Source
from dense_jax.data.normalise import Normalise
from dense_jax.data.padded import Shapes, Size
from dense_jax.data.transforms import ResizeBy
from dense_jax.train import processes
from dense_jax.train.config import RunConfig
from dense_jax.train.step import Batch, eval_step, replicate, shard


class Predicts(Protocol):
    """The part of a task that evaluation needs."""

    @property
    def config(self) -> RunConfig:
        """How images are normalised and batched."""
        ...

    def input_size(self, size: Size) -> Size:
        """Returns the size to which an image is resized."""
        ...

    @property
    def antialias(self) -> bool:
        """How images are resized; see `dense_jax.data.transforms.resize_image`."""
        ...

    def padded_side(self, side: int) -> int:
        """Returns the side to which zeros may pad images without an effect."""
        ...

    def predict(self, variables: Any, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        """Returns the network's outputs for a batch, by name; see `dense_jax.tasks.task.Task`."""
        ...


def eval_batches(
    source: Source, task: Predicts, shapes: Shapes | None = None
) -> pipeline.EvalBatches:
    """Returns normalised batches with every image of a split once, for all devices."""
    config, devices = task.config, jax.local_device_count()
    # A multiple of the devices; the end of the last batch is padding.
    size = -(-config.eval_batch_size // jax.device_count()) * devices
    return pipeline.eval_batches(
        source,
        [ResizeBy(task.input_size, task.antialias), Normalise(config.normalisation)],
        size,
        shapes=shapes or config.eval_shapes,
        padded_side=task.padded_side,
        devices=devices,
    )


def predict_each(
    task: Predicts, variables: Any, images: jax.Array, sizes: jax.Array, *inputs: jax.Array
) -> dict[str, jax.Array]:
    """Returns a task's outputs for a batch, image by image on CPUs; can be compiled.

    On CPUs the order of the sums in a convolution depends on the size of the batch, and a batch is
    hardly faster than its images one by one. A task whose predictions need other inputs takes them
    behind the sizes.
    """
    predict: Any = task.predict
    if jax.default_backend() != "cpu":
        return predict(variables, images, sizes, *inputs)

    def alone(own: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        outputs = predict(variables, *(x[None] for x in own))
        return {name: x[0] for name, x in outputs.items()}

    return lax.map(alone, (images, sizes, *inputs))


def predict_split(
    task: Predicts, variables: Any, source: Source, shapes: Shapes | None = None
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields the index and the outputs [H, W, ...] of every image of a split, in any order.

    Each process yields all of them.
    """

    def outputs_of(variables: Any, batch: Batch) -> tuple[Any, Any]:
        return {}, predict_each(task, variables, batch["images"], batch["size"])

    step, variables = eval_step(outputs_of), replicate(variables)
    for batch in eval_batches(source, task, shapes):
        arrays = {k: batch[k] for k in ("images", "size")}
        outputs = jax.device_get(step(variables, shard(arrays))[1])
        outputs = {name: x.reshape(-1, *x.shape[2:]) for name, x in outputs.items()}
        places = processes.gather({key: batch[key] for key in ("index", "size")})
        outputs = processes.gather(outputs)
        for i, index in enumerate(places["index"]):
            if index >= 0:
                height, width = places["size"][i]
                yield int(index), {name: x[i, :height, :width] for name, x in outputs.items()}
