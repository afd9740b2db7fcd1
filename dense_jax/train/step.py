"""The only pmap: one training step and one evaluation step over all devices.

The state has no device axis: it goes in with ``in_axes=None`` and comes out with
``out_axes=None``, so whatever leaves a step must be equal on all devices, that is, it has passed
``psum`` or ``pmean``. JAX does not check this; the tests compare the shards.

Every loss is a numerator over a denominator. The denominator (scored pixels, say) is summed over
all devices and micro-batches *before* anything is divided by it. Each device then returns its
share of the loss, and the step adds up shares. The mean of per-device means would be another
loss wherever devices see different numbers of ignored pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dense_jax.train.state import TrainState

AXIS = "devices"

StateT = TypeVar("StateT")

Batch = dict[str, Any]
# (params, model_state, batch, denominator, rng) -> (share of the loss, (model_state, scalars)).
# Scalars are shares too: the step adds them up over devices and micro-batches.
LossFn = Callable[
    [Any, Any, Batch, jax.Array, jax.Array],
    tuple[jax.Array, tuple[Any, dict[str, jax.Array]]],
]


def train_step(
    loss_fn: LossFn,
    denominator_fn: Callable[[Batch], jax.Array],
    *,
    ema_decay: float = 0.0,
    devices: Sequence[jax.Device] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the compiled step ``(state, batch) -> (state, scalars)``.

    Batch leaves are [devices, micro-batches, images, ...] (see :func:`shard`). The state that
    goes in is donated: use the one that comes out.

    Args:
      loss_fn: share of the loss of one micro-batch; see ``LossFn``.
      denominator_fn: local sum of what the loss is divided by, over any leading axes.
      ema_decay: decay of the parameter average, applied once per step however many
        micro-batches it took; it starts smaller, min(decay, (1 + t) / (10 + t)).
      devices: what to run on; all local devices by default.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        denominator = lax.psum(denominator_fn(batch), AXIS)
        step_rng = jax.random.fold_in(jax.random.key(state.seed), state.step)

        def micro_step(model_state: Any, xs: tuple[jax.Array, Batch]) -> Any:
            index, micro_batch = xs
            rng = jax.random.fold_in(step_rng, index)
            (loss, (model_state, scalars)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.params, model_state, micro_batch, denominator, rng
            )
            return model_state, (grads, {"loss": loss, **scalars})

        accumulate = jax.tree.leaves(batch)[0].shape[0]
        if accumulate == 1:
            first = jax.tree.map(lambda x: x[0], batch)
            model_state, sums = micro_step(state.model_state, (jnp.int32(0), first))
        else:
            model_state, sums = _scan_sum(micro_step, state.model_state, batch, accumulate)
        grads, scalars = lax.psum(sums, AXIS)
        state = state.apply_gradients(grads=grads, model_state=lax.pmean(model_state, AXIS))
        if state.ema_params is not None:
            state = state.replace(ema_params=_average(state, ema_decay))
        return state, scalars

    return jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices)


def eval_step(
    counts_fn: Callable[[Any, Batch], tuple[Any, Any]],
) -> Callable[[Any, Batch], tuple[Any, Any]]:
    """Builds ``(variables, batch) -> (sums, per_image)`` over all devices.

    Args:
      counts_fn: (variables, batch) -> (sums, per_image). ``sums`` are added up over the devices;
        ``per_image`` keeps its leading axes [devices, images].
    """

    def step(variables: Any, batch: Batch) -> tuple[Any, Any]:
        sums, per_image = counts_fn(variables, batch)
        return lax.psum(sums, AXIS), per_image

    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=(None, 0))


def shard(
    batch: dict[str, np.ndarray],
    accumulate: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Batch:
    """Splits a host batch [B, ...] over the devices and sends it to them.

    Args:
      batch: arrays with the same leading size B, a multiple of devices times micro-batches.
      accumulate: number of micro-batches; None leaves that axis out (evaluation).
      devices: as given to the step.

    Returns:
      Arrays [devices, (accumulate,) B / (devices * accumulate), ...] on the devices. Micro-batch m
      holds the m-th part of the batch however many devices share it, so that dropout, which
      knows an image by its place in the micro-batch, draws the same on any number of them.
    """
    count = jax.local_device_count() if devices is None else len(devices)
    lead = (count,) if accumulate is None else (accumulate, count)
    batch = {k: v.reshape(*lead, -1, *v.shape[1:]) for k, v in batch.items()}
    if accumulate is not None:
        batch = {k: v.swapaxes(0, 1) for k, v in batch.items()}
    if jax.process_count() > 1:  # pmap itself puts together what each process has
        return batch
    return jax.device_put(batch, _sharding(devices, AXIS))


def replicate(state: StateT, devices: Sequence[jax.Device] | None = None) -> StateT:
    """Sends a host state to where a step leaves it; else the second step would compile again."""
    return state if jax.process_count() > 1 else jax.device_put(state, _sharding(devices))


def _sharding(devices: Sequence[jax.Device] | None, *axes: str) -> NamedSharding:
    devices = jax.local_devices() if devices is None else devices
    return NamedSharding(jax.sharding.Mesh(np.asarray(devices), (AXIS,)), PartitionSpec(*axes))


def _scan_sum(micro_step: Any, model_state: Any, batch: Batch, accumulate: int) -> Any:
    """Runs the micro-batches in turn, carrying batch statistics and adding up the rest."""
    xs = (jnp.arange(accumulate), batch)
    first = jax.tree.map(lambda x: x[0], xs)
    shapes = jax.eval_shape(micro_step, model_state, first)[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(carry: Any, x: Any) -> tuple[Any, None]:
        model_state, sums = carry
        model_state, terms = micro_step(model_state, x)
        return (model_state, jax.tree.map(jnp.add, sums, terms)), None

    return lax.scan(body, (model_state, zeros), xs)[0]


def _average(state: TrainState, decay: float) -> Any:
    """Moves the averaged parameters towards the new ones (``state.step`` has been counted)."""
    step = jnp.asarray(state.step, jnp.float32)
    rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + rate * (p - e), state.ema_params, state.params)
