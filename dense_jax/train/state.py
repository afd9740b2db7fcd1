"""The training state: parameters, optimiser state and batch statistics of one step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from flax.training import train_state

from dense_jax.errors import UserError


class TrainState(train_state.TrainState):
    """Parameters, optimiser and batch statistics. It has no device axis.

    Attributes:
      model_state: variable collections other than the parameters (batch statistics).
      ema_params: running average of the parameters, or None if it is off.
      seed: every random draw of a step is a function of (seed, step, micro-batch).
    """

    model_state: Any
    ema_params: Any
    seed: jax.Array

    @classmethod
    def init(
        cls,
        model: nn.Module,
        tx: optax.GradientTransformation,
        image_shape: tuple[int, int, int],
        *,
        seed: int = 0,
        ema: bool = False,
    ) -> "TrainState":
        """Draws the parameters of ``model`` for images of ``image_shape`` [H, W, C]."""
        # One program instead of one for each parameter. It runs once, and on a CPU its many random
        # draws compile four times as fast without optimisation.
        options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}
        draw = functools.partial(cls.draw, model, tx, image_shape, ema=ema)
        return jax.jit(draw, compiler_options=options)(np.uint32(seed))

    @classmethod
    def draw(
        cls,
        model: nn.Module,
        tx: optax.GradientTransformation,
        image_shape: tuple[int, int, int],
        seed: jax.Array,
        *,
        ema: bool,
    ) -> "TrainState":
        """Does what `init` does, operation by operation; can be compiled."""
        images = jnp.zeros((1, *image_shape), jnp.float32)
        model_state = dict(model.init(jax.random.key(seed), images, train=False))
        params = model_state.pop("params")
        return cls(
            step=jnp.zeros((), jnp.int32),
            apply_fn=model.apply,
            params=params,
            tx=tx,
            opt_state=tx.init(params),
            model_state=model_state,
            ema_params=params if ema else None,
            seed=seed,
        )

    def eval_variables(self) -> dict[str, Any]:
        """The variables to evaluate, with the averaged parameters if there are any."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, **self.model_state}


def num_parameters(params: Any) -> int:
    """Number of values in a tree of parameters."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))


def load_matching(
    params: dict[str, Any], source: dict[str, Any], say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Copies each parameter of equal name and shape from ``source``; lists all the others.

    Staged training uses it: FCN-16s starts from an FCN-32s with the same parameter names.

    Args:
      params: parameters of the new network.
      source: parameters of the other run.
      say: receives each line of the list.

    Raises:
      UserError: no kernel matches, so the source belongs to another network.
    """
    new: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    old: dict[str, Any] = traverse_util.flatten_dict(source, sep="/")
    matched = {k for k in new if k in old and new[k].shape == old[k].shape}
    if not any(new[k].ndim > 1 for k in matched):  # biases alone agree by chance
        raise UserError(
            "--init: no kernel of the other run has the name and shape of one in this network "
            f"(first names: {sorted(old)[:2]} there, {sorted(new)[:2]} here): give a related run, "
            "or published weights with --init=file:PATH"
        )
    reshaped = sorted(k for k in new if k in old and k not in matched)
    say(f"init: {len(matched)} of {len(new)} parameters copied")
    for title, names in (
        ("new here", sorted(set(new) - set(old))),
        ("of another shape, kept as initialised", reshaped),
        ("only in the other run", sorted(set(old) - set(new))),
    ):
        if names:  # the prefix "params/" would only repeat itself
            say(f"init: {title}: {', '.join(name.removeprefix('params/') for name in names)}")
    # Copy: a training step overwrites its arrays, and these may be views of a file.
    copied = {k: jnp.array(old[k], new[k].dtype) if k in matched else new[k] for k in new}
    return traverse_util.unflatten_dict(copied, sep="/")
