"""What every network promises; each model's test calls both checks.

Full-size networks are only traced. Numbers come from thin ones with parameters from NumPy.
"""

import functools
from collections.abc import Sequence
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.objectives import pixels as losses


def shapes_of(model: nn.Module, image_shape: Sequence[int]):
    """Returns (outputs, variables) as shapes and dtypes; nothing is computed."""
    images = jax.ShapeDtypeStruct(tuple(image_shape), jnp.float32)
    init = functools.partial(model.init_with_output, train=False)
    return jax.eval_shape(init, jax.random.key(0), images)


def apply(model: nn.Module, variables: Any, images: Any, train: bool = False, **options) -> Any:
    """Returns the outputs of a network."""
    return model.apply(variables, images, train=train, **options)


def random_variables(model: nn.Module, image_shape: Sequence[int], seed: int = 0):
    """Returns variables in which nothing is zero: He-scaled kernels, biases around 0.1."""
    rng = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if len(leaf.shape) < 2:
            return np.float32(0.1) + np.float32(0.01) * noise
        return noise * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))

    return jax.tree.map(fill, shapes_of(model, image_shape)[1])


def check_full(
    model: nn.Module, *, num_params: int, image_shape: Sequence[int], num_classes: int
) -> None:
    """Exact parameter count; float32 logits at input resolution, also if layers are bfloat16."""
    outputs, variables = shapes_of(model, image_shape)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == num_params
    assert outputs["logits"].shape == (*image_shape[:3], num_classes)
    assert outputs["logits"].dtype == jnp.float32
    outputs, variables = shapes_of(model.clone(dtype=jnp.bfloat16), image_shape)
    assert outputs["logits"].dtype == jnp.float32
    assert jnp.bfloat16 in [output.dtype for output in outputs.values()]
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}


def check_thin(
    model: nn.Module, *, image_shape: Sequence[int], num_classes: int, skips: Sequence[str] = ()
) -> None:
    """Values and gradients of a thin network.

    Args:
      model: the network, without dropout so that training is deterministic.
      image_shape: [2, H, W, 3].
      num_classes: channels of the logits.
      skips: layers with parameters, each of which must change the logits.
    """
    rng = np.random.default_rng(1)
    variables = random_variables(model, image_shape)
    params = variables["params"]
    images = rng.uniform(-1, 1, image_shape).astype(np.float32)
    labels = rng.integers(num_classes, size=image_shape[:3], dtype=np.int32)
    ignored = labels.copy()
    ignored[1] = 255

    def loss_fn(params, images, labels):
        logits = apply(model, {**variables, "params": params}, images, train=True)["logits"]
        return jnp.sum(losses.softmax_cross_entropy(logits, labels)), logits

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, logits), grads = step(params, images, labels)
    chex.assert_shape(logits, (*image_shape[:3], num_classes))
    chex.assert_tree_all_finite((loss, logits, grads))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.any(grad), f"no gradient reaches {jax.tree_util.keystr(path)}"
    assert np.all(np.any(logits[0] != logits[1], axis=-1)), "a pixel does not depend on the image"

    for skip in skips:
        without = {**params, skip: jax.tree.map(np.zeros_like, params[skip])}
        (_, changed), _ = step(without, images, labels)
        assert np.any(np.abs(changed - logits) > 1e-6), f"{skip} does not matter"

    # An image whose pixels are all ignored may hold anything.
    other = images.copy()
    other[1] = rng.uniform(-1, 1, image_shape[1:])
    (loss, _), grads = step(params, images, ignored)
    (other_loss, _), other_grads = step(params, other, ignored)
    chex.assert_trees_all_close((other_loss, other_grads), (loss, grads), rtol=1e-4, atol=1e-5)

    eager = apply(model, variables, images)["logits"]
    np.testing.assert_allclose(eager, logits, rtol=1e-4, atol=1e-4)
