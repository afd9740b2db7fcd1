"""What every network promises; the test of each calls `check_model`.

The full-size network is only traced. Numbers come from a thin one with parameters from NumPy.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

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


def check_model(
    model: nn.Module,
    *,
    num_params: int,
    image_shape: Sequence[int],
    num_classes: int,
    thin: nn.Module,
    thin_shape: Sequence[int],
    skips: Sequence[str] = (),
) -> None:
    """All that a network promises; see `check_full`, `check_bfloat16` and `check_thin`.

    Args:
      model: the published network.
      num_params: its parameters.
      image_shape: [B, H, W, C] of images for it.
      num_classes: channels of the logits of both networks.
      thin: the same network with few channels and without dropout.
      thin_shape: [2, H, W, C] of images for it, as small as it takes them.
      skips: layers of it with parameters, each of which must change the logits. Skips without
        parameters, which add or concatenate, need a test of their own.
    """
    check_full(model, num_params=num_params, image_shape=image_shape, num_classes=num_classes)
    check_bfloat16(thin, image_shape=thin_shape, num_classes=num_classes)
    check_thin(thin, image_shape=thin_shape, num_classes=num_classes, skips=skips)


def check_full(
    model: nn.Module, *, num_params: int, image_shape: Sequence[int], num_classes: int
) -> None:
    """Exact parameter count; float32 logits at input resolution."""
    outputs, variables = shapes_of(model, image_shape)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count == num_params, f"the network has {count:,} parameters, not {num_params:,}"
    _check_logits(outputs, (*image_shape[:3], num_classes))


def check_bfloat16(model: nn.Module, *, image_shape: Sequence[int], num_classes: int) -> None:
    """Where layers are bfloat16, logits and parameters are float32."""
    outputs, variables = shapes_of(model.clone(dtype=jnp.bfloat16), image_shape)
    _check_logits(outputs, (*image_shape[:3], num_classes), " where layers are bfloat16")
    dtypes = {name: str(output.dtype) for name, output in outputs.items()}
    assert "bfloat16" in dtypes.values(), f"dtype=bfloat16 changes no output: {dtypes}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        name = f"parameter {jax.tree_util.keystr(path)}"
        assert leaf.dtype == jnp.float32, f"{name} is {leaf.dtype} where layers are bfloat16"


def check_thin(
    model: nn.Module, *, image_shape: Sequence[int], num_classes: int, skips: Sequence[str] = ()
) -> None:
    """Values and gradients of a thin network.

    Batch statistics are those of the batch in training, and must then be updated. They make images
    depend on one another, so that what holds for single images is checked on running ones.

    Args:
      model: the network, without dropout so that training is deterministic.
      image_shape: [2, H, W, 3].
      num_classes: channels of the logits.
      skips: layers with parameters, each of which must change the logits.
    """
    rng = np.random.default_rng(1)
    variables = random_variables(model, image_shape)
    params, statistics = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    images = rng.uniform(-1, 1, image_shape).astype(np.float32)
    labels = rng.integers(num_classes, size=image_shape[:3], dtype=np.int32)

    trained = _step(model, statistics, train=True)
    (loss, (logits, new)), grads = trained(params, images, labels)
    _check_logits({"logits": logits}, (*image_shape[:3], num_classes))
    assert np.all(np.isfinite(logits)), "logits are not finite"
    assert np.isfinite(loss), f"the loss is {loss}"
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(grad)), f"the gradient of {name} is not finite"
        assert np.any(grad), f"no gradient reaches {name}"
    for path, same in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(np.array_equal, statistics, new)
    ):
        assert not same, f"training does not update {jax.tree_util.keystr(path)}"
    _check_every_pixel_sees_its_image(logits)

    single = _step(model, statistics, train=False) if statistics else trained
    (_, (logits, _)), _ = single(params, images, labels)
    _check_every_pixel_sees_its_image(logits)
    for skip in skips:
        assert skip in params, f"there is no layer {skip}: {', '.join(sorted(params))}"
        without = {**params, skip: jax.tree.map(np.zeros_like, params[skip])}
        (_, (changed, _)), _ = single(without, images, labels)
        assert np.any(np.abs(changed - logits) > 1e-6), f"{skip} does not matter"

    # An image whose pixels are all ignored may hold anything.
    ignored, other = labels.copy(), images.copy()
    ignored[1] = 255
    other[1] = rng.uniform(-1, 1, image_shape[1:])
    (loss, _), grads = single(params, images, ignored)
    (other_loss, _), other_grads = single(params, other, ignored)
    _check_close(other_loss, loss, "ignored pixels change the loss", rtol=1e-4, atol=1e-5)
    for (path, grad), other_grad in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(other_grads), strict=True
    ):
        words = f"ignored pixels change the gradient of {jax.tree_util.keystr(path)}"
        _check_close(other_grad, grad, words, rtol=1e-4, atol=1e-5)

    if not statistics:
        predicted = jax.jit(functools.partial(_logits, model))(variables, images)
        words = "without dropout or batch statistics, training and prediction give other logits"
        _check_close(predicted, logits, words, rtol=1e-4, atol=1e-4)


def check_without_jit(model: nn.Module, *, image_shape: Sequence[int]) -> None:
    """Predicts step by step what it predicts as one program.

    Not part of `check_model`: each step is then a program of its own, and to compile them all takes
    as long as everything else. SegNet, which has most kinds of steps, is checked.
    """
    variables = random_variables(model, image_shape)
    images = np.random.default_rng(1).uniform(-1, 1, image_shape).astype(np.float32)
    compiled = jax.jit(functools.partial(_logits, model))(variables, images)
    eager = _logits(model, variables, images)
    _check_close(eager, compiled, "jit changes the logits", rtol=1e-4, atol=1e-4)


def _logits(model: nn.Module, variables: Any, images: Any) -> jax.Array:
    return apply(model, variables, images)["logits"]


def _step(model: nn.Module, statistics: Any, *, train: bool) -> Callable[..., Any]:
    """Compiles (params, images, labels) -> ((loss, (logits, new statistics)), gradients)."""

    def loss_fn(params: Any, images: Any, labels: Any) -> Any:
        outputs, new = apply(
            model, {"params": params, **statistics}, images, train, mutable=list(statistics)
        )
        loss = jnp.sum(losses.softmax_cross_entropy(outputs["logits"], labels))
        return loss, (outputs["logits"], new)

    step = jax.value_and_grad(loss_fn, has_aux=True)
    if axis_name := getattr(model, "axis_name", None):  # as on one device
        step = jax.vmap(step, in_axes=None, out_axes=None, axis_name=axis_name, axis_size=1)
    return jax.jit(step)


def _check_logits(outputs: Any, shape: tuple[int, ...], where: str = "") -> None:
    assert "logits" in outputs, f'no output is called "logits": {", ".join(sorted(outputs))}'
    logits = outputs["logits"]
    assert logits.shape == shape, f"logits are of shape {logits.shape}, not {shape}{where}"
    assert logits.dtype == jnp.float32, f"logits are {logits.dtype}, not float32{where}"


def _check_every_pixel_sees_its_image(logits: Any) -> None:
    y, x = np.nonzero(np.all(logits[0] == logits[1], axis=-1))
    where = (
        f"{len(y)} pixels do not depend on the image, the first at y={y[:1]}, x={x[:1]} (in a very "
        "thin network all channels may be zero there: give it more)"
    )
    assert not len(y), where


def _check_close(found: Any, expected: Any, words: str, *, rtol: float, atol: float) -> None:
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=words)
