"""The only pmap: one training step and one evaluation step over all devices.

The state has no device axis: it goes in with ``in_axes=None`` and comes out with
``out_axes=None``. The outputs of a step must therefore be equal on all devices, that is, they
have passed ``psum`` or ``pmean``. JAX does not check this; the tests compare the shards.

A loss is {name: (sum, count)}: a sum and its divisor, such as the number of scored pixels. Counts
are summed over all devices and micro-batches *before* the division, so a device with only ignored
pixels has no weight. A mean of per-device means would be another loss if devices have different
numbers of ignored pixels.
"""

import functools
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
Losses = dict[str, tuple[jax.Array, jax.Array]]
# (apply, batch, rng) -> losses of one micro-batch; a count of 0 means a division by 1. `apply`
# calls the network in training mode: it takes the network's arguments, images first, and returns
# its outputs; ``method=`` calls another method of the network.
LossFn = Callable[[Callable[..., Any], Batch, jax.Array], Losses]


def train_step(
    loss_fn: LossFn, *, ema_decay: float = 0.0, devices: Sequence[jax.Device] | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Builds the compiled step ``(state, batch) -> (state, scalars)``.

    The step minimises the total of all losses, each of them its sum divided by its count. Scalars
    are "loss", the total, and each loss by its name if there are several. Batch leaves are
    [devices, micro-batches, images, ...] (see :func:`shard`). The input state is donated: use the
    returned one.

    Args:
      loss_fn: losses of one micro-batch; see ``LossFn``. No gradient flows through counts.
      ema_decay: decay of the parameter average, applied once per step whatever the number of
        micro-batches; the first steps use a smaller one, min(decay, (1 + t) / (10 + t)).
      devices: devices to run on; by default all local ones.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        step_rng = jax.random.fold_in(jax.random.key(state.seed), state.step)

        def losses_of(params: Any, model_state: Any, xs: Any) -> tuple[Losses, Any]:
            index, micro_batch = xs
            rng = jax.random.fold_in(step_rng, index)
            new_state = model_state

            def apply(*inputs: Any, **options: Any) -> Any:
                nonlocal new_state
                options = {"train": True, "rngs": {"dropout": rng}} | options
                variables = {"params": params, **new_state}
                outputs, new_state = state.apply_fn(
                    variables, *inputs, mutable=list(model_state), **options
                )
                return outputs

            return loss_fn(apply, micro_batch, rng), new_state

        def total_of(losses: Losses, counts: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
            each = {
                name: value / jnp.where(counts[name] > 0, counts[name], 1).astype(value.dtype)
                for name, (value, _) in losses.items()
            }
            total = functools.reduce(jnp.add, each.values())
            return total, {"loss": total} | (each if len(each) > 1 else {})

        def micro_step(counts: dict[str, jax.Array] | None, model_state: Any, xs: Any) -> Any:
            def share(params: Any) -> tuple[jax.Array, Any]:
                losses, new_state = losses_of(params, model_state, xs)
                known = lax.psum(_counts(losses), AXIS) if counts is None else counts
                total, scalars = total_of(losses, known)
                return total, (new_state, scalars)

            grads, (new_state, scalars) = jax.grad(share, has_aux=True)(state.params)
            return new_state, (grads, scalars)

        accumulate = jax.tree.leaves(batch)[0].shape[0]
        if accumulate == 1:
            first = jax.tree.map(lambda x: x[0], batch)
            model_state, sums = micro_step(None, state.model_state, (jnp.int32(0), first))
        else:
            # A first pass counts over all micro-batches. If the counts depend on the batch alone,
            # the compiler drops the network from this pass.
            def count(model_state: Any, xs: Any) -> Any:
                losses, new_state = losses_of(state.params, model_state, xs)
                return new_state, _counts(losses)

            _, counts = _scan_sum(count, state.model_state, batch, accumulate)
            counted = functools.partial(micro_step, lax.psum(counts, AXIS))
            model_state, sums = _scan_sum(counted, state.model_state, batch, accumulate)
        grads, scalars = lax.psum(sums, AXIS)
        state = state.apply_gradients(grads=grads, model_state=lax.pmean(model_state, AXIS))
        if state.ema_params is not None:
            state = state.replace(ema_params=_average(state, ema_decay))
        return state, scalars

    return jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices)


def _counts(losses: Losses) -> dict[str, jax.Array]:
    return {name: lax.stop_gradient(jnp.asarray(count)) for name, (_, count) in losses.items()}


def eval_step(
    counts_fn: Callable[[Any, Batch], tuple[Any, Any]],
) -> Callable[[Any, Batch], tuple[Any, Any]]:
    """Builds ``(variables, batch) -> (sums, per_image)`` over all devices.

    Args:
      counts_fn: (variables, batch) -> (sums, per_image). ``sums`` are summed over the devices;
        ``per_image`` keeps its leading axes [devices, images].
    """

    def step(variables: Any, batch: Batch) -> tuple[Any, Any]:
        sums, per_image = counts_fn(variables, batch)
        return lax.psum(sums, AXIS), per_image

    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=(None, 0))


def shard(
    batch: Batch,
    accumulate: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Batch:
    """Splits a host batch [B, ...] over the devices of this process and sends it to them.

    Args:
      batch: arrays with the same leading size B, a multiple of devices times micro-batches.
      accumulate: number of micro-batches; None leaves that axis out (evaluation).
      devices: the devices of the step.

    Returns:
      Arrays [devices, (accumulate,) B / (devices * accumulate), ...] on the devices. Micro-batch m
      holds the m-th part of the batch whatever the number of devices. Dropout identifies an image
      by its index in the micro-batch, so its draws do not depend on the number of devices.
    """
    count = jax.local_device_count() if devices is None else len(devices)
    lead = (count,) if accumulate is None else (accumulate, count)
    batch = jax.tree.map(lambda x: x.reshape(*lead, -1, *x.shape[1:]), batch)
    if accumulate is not None:
        batch = jax.tree.map(lambda x: x.swapaxes(0, 1), batch)
    return jax.device_put(batch, _sharding(devices, AXIS))


def replicate(state: StateT, devices: Sequence[jax.Device] | None = None) -> StateT:
    """Sends a host state to the devices with a step's sharding, so that no step compiles twice."""
    return jax.device_put(state, _sharding(devices))


def _sharding(devices: Sequence[jax.Device] | None, *axes: str) -> NamedSharding:
    devices = jax.local_devices() if devices is None else devices
    return NamedSharding(jax.sharding.Mesh(np.asarray(devices), (AXIS,)), PartitionSpec(*axes))


def _scan_sum(micro_step: Any, model_state: Any, batch: Batch, accumulate: int) -> Any:
    """Runs the micro-batches in turn, carries batch statistics and sums all other outputs."""
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
    """Moves the averaged parameters towards the new ones; ``state.step`` includes this step."""
    step = jnp.asarray(state.step, jnp.float32)
    rate = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + rate * (p - e), state.ema_params, state.params)
