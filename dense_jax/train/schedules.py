"""Learning-rate schedules, and optimisers with a learning rate for each parameter."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from dense_jax.errors import UserError
from dense_jax.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class ParamGroup:
    """Parameters whose path (such as "conv1_1/kernel") contains a match of ``pattern``.

    Attributes:
      pattern: regular expression; the first group that matches a parameter decides.
      lr: multiplier of the learning rate; 0 freezes the parameters (and stores no moments).
      decay: multiplier of the weight decay.
    """

    pattern: str
    lr: float = 1.0
    decay: float = 1.0


def own_rate(layers: str, lr: float, bias_lr: float) -> list[ParamGroup]:
    """Returns groups for layers with their own learning rate; their biases are not decayed.

    Args:
      layers: regular expression for the path of a layer.
      lr: multiplier of the layer's learning rate.
      bias_lr: further multiplier for its biases, like ``--bias-lr`` for other layers.
    """
    bias = ParamGroup(f"{layers}/bias$", lr=lr * bias_lr, decay=0.0)
    return [bias, ParamGroup(f"{layers}/kernel$", lr=lr)]


def build_schedule(config: RunConfig) -> optax.Schedule:
    """Returns the learning rate as a function of the step, by ``config.schedule``."""
    peak = config.learning_rate
    steps = max(config.num_steps - config.warmup_steps, 1)
    schedule = {
        "constant": lambda: optax.constant_schedule(peak),
        "poly": lambda: optax.polynomial_schedule(peak, 0.0, config.poly_power, steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps),
        "step": lambda: optax.piecewise_constant_schedule(
            peak, {round(f * config.num_steps) - config.warmup_steps: 0.1 for f in config.step_at}
        ),
    }[config.schedule]()
    if not config.warmup_steps:
        return schedule
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps - 1)
    return optax.join_schedules([warmup, schedule], [config.warmup_steps])


def build_optimizer(
    config: RunConfig, groups: Sequence[ParamGroup] = ()
) -> optax.GradientTransformation:
    """Returns SGD with momentum (Caffe's order) or AdamW, with a rate and decay per parameter.

    Caffe adds the decay to the gradient, multiplies by the learning rate, then applies momentum.
    At a constant rate this equals ``v = m v + (g + wd w); w -= lr v``, the form used here.
    Biases and the parameters of normalisation layers are not decayed unless a group says so.

    Args:
      config: rates, momentum, decay and schedule.
      groups: exceptions; the first match decides. A group for ``config.bias_lr`` follows them.

    Raises:
      UserError: (at ``init``) a group matches no parameter.
    """
    groups = (
        *groups,
        ParamGroup(r"/bias$", lr=config.bias_lr, decay=0.0),
        ParamGroup(r"/scale$", decay=0.0),
    )
    required = groups[:-2]

    def scaled_by(field: str) -> optax.GradientTransformation:
        def scale(updates: Any, params: Any) -> Any:
            factors = _per_parameter(updates, groups, field)
            if field == "lr":
                return jax.tree.map(lambda u, f: u * jnp.asarray(f, u.dtype), updates, factors)
            return jax.tree.map(
                lambda u, p, f: u + jnp.asarray(f * config.weight_decay, u.dtype) * p,
                updates,
                params,
                factors,
            )

        return optax.stateless(scale)

    inner = {
        "sgd": (scaled_by("decay"), optax.trace(config.momentum)),
        "adamw": (optax.scale_by_adam(), scaled_by("decay")),
    }[config.optimizer]
    rate = optax.scale_by_learning_rate(build_schedule(config))
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    trained = optax.chain(*clip, *inner, scaled_by("lr"), rate)

    def labels(params: Any) -> Any:
        _check_groups(params, required)
        factors = _per_parameter(params, groups, "lr")
        return jax.tree.map(lambda f: "trained" if f else "frozen", factors)

    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def _per_parameter(tree: Any, groups: Sequence[ParamGroup], field: str) -> Any:
    """A tree like ``tree`` with the value of ``field`` of the first matching group, else 1."""

    def value(path: tuple[jax.tree_util.DictKey, ...], _: object) -> float:
        name = "/".join(str(key.key) for key in path)
        matches = (g for g in groups if re.search(g.pattern, name))
        return getattr(next(matches, ParamGroup("")), field)

    return jax.tree_util.tree_map_with_path(value, tree)


def _check_groups(params: Any, groups: Sequence[ParamGroup]) -> None:
    names = list(traverse_util.flatten_dict(params, sep="/"))
    for group in groups:
        if not any(re.search(group.pattern, name) for name in names):
            raise UserError(
                f"parameter group {group.pattern!r} matches none of the network's "
                f"{len(names)} parameters ({names[0]}, ...): correct the pattern"
            )
