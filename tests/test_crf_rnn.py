"""CRF-RNN against its formulas in NumPy; it starts as the CRF, and learns."""

import dataclasses
import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dense_jax.data.normalise import PixelValues, normalise_batch
from dense_jax.layers.conv import Conv
from dense_jax.layers.crf_rnn import CrfRnn, WithCrfRnn
from dense_jax.ops import crf, permutohedral
from dense_jax.ops.crf import CrfParams
from tests.contract import apply

PARAMS = CrfParams(w1=2.0, sxy=3.0, srgb=30.0, w2=1.0, sg=1.0, iterations=3, norm="after")
SHAPE = (2, 6, 7, 3)


def problem(seed=0):
    """Returns logits and images of one size."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=SHAPE).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(rng.integers(0, 256, SHAPE), jnp.float32)


@pytest.fixture
def exact(monkeypatch):
    """Sums over all pairs instead of the lattice, whose programs take long to compile."""

    def mean_field(logits, images, params, sizes=None):
        del sizes  # all images are whole
        one = functools.partial(crf.exact_mean_field, params=params)
        return jax.vmap(one)(logits, images)

    monkeypatch.setattr(crf, "mean_field", mean_field)


def zheng(logits, image, bilateral, spatial, compatibility, iterations):
    """Algorithm 1 of the paper in float64, with the compatibility that is subtracted."""
    height, width, channels = logits.shape
    places = np.indices((height, width)).reshape(2, -1).T.astype(float)
    colours = np.asarray(image, float).reshape(-1, 3)
    unary = np.asarray(logits, float).reshape(-1, channels)
    matrices = []
    for parts in ([places / PARAMS.sxy, colours / PARAMS.srgb], [places / PARAMS.sg]):
        f = np.concatenate(parts, axis=1)
        k = np.exp(-np.sum((f[:, None] - f[None]) ** 2, axis=-1) / 2)
        matrices.append(k / k.sum(axis=1, keepdims=True))
    q = special.softmax(unary, axis=1)
    for _ in range(iterations):
        messages = bilateral * (matrices[0] @ q) + spatial * (matrices[1] @ q)
        penalty = np.stack(
            [sum(compatibility[i, j] * messages[:, i] for i in range(channels))
             for j in range(channels)], axis=1,
        )  # fmt: skip
        q = special.softmax(unary - penalty, axis=1)
    return q.reshape(logits.shape)


def test_it_starts_as_the_crf(exact):
    logits, images = problem()
    layer = CrfRnn(PARAMS, train_iterations=1)
    variables = layer.init(jax.random.key(0), logits, images, train=False)
    chex.assert_trees_all_equal_shapes(
        variables["params"],
        {"bilateral_weights": np.zeros(3), "spatial_weights": np.zeros(3),
         "compatibility": np.zeros((3, 3))},
    )  # fmt: skip
    for train, iterations in ((False, 3), (True, 1)):
        found: Any = layer.apply(variables, logits, images, train=train)
        fixed = dataclasses.replace(PARAMS, iterations=iterations)
        np.testing.assert_allclose(found, crf.mean_field(logits, images, fixed), atol=1e-4)


def test_learned_weights_are_the_papers(exact):
    logits, images = problem()
    rng = np.random.default_rng(1)
    bilateral, spatial = rng.uniform(0.5, 2, (2, 3)).astype(np.float32)
    compatibility = rng.normal(0, 1, (3, 3)).astype(np.float32)  # not even symmetric
    params = {
        "bilateral_weights": bilateral,
        "spatial_weights": spatial,
        "compatibility": -compatibility,
    }
    layer = CrfRnn(PARAMS)
    found = jax.jit(lambda p: layer.apply({"params": p}, logits, images, train=False))(params)
    for i in range(len(logits)):
        wanted = zheng(logits[i], images[i], bilateral, spatial, compatibility, 3)
        np.testing.assert_allclose(np.exp(found[i]), wanted, atol=1e-5)
    # The paper's own start, a penalty of one between unequal labels, is ours.
    ones = params | {"compatibility": np.eye(3, dtype=np.float32)}
    potts = params | {"compatibility": np.eye(3, dtype=np.float32) - 1}
    chex.assert_trees_all_close(
        *(layer.apply({"params": p}, logits, images, train=False) for p in (ones, potts)), atol=1e-4
    )


def test_gradients_are_those_of_differences(exact):
    logits, images = problem()
    layer = CrfRnn(PARAMS, train_iterations=2)
    rng = np.random.default_rng(2)
    params = layer.init(jax.random.key(0), logits, images, train=True)["params"]
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
    weights = rng.normal(size=SHAPE).astype(np.float32)
    towards = rng.normal(size=SHAPE).astype(np.float32)

    @jax.jit
    def loss(step):
        moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
        refined: Any = layer.apply({"params": moved}, logits + step * towards, images, train=True)
        return jnp.sum(jnp.exp(refined) * weights)

    step = 1e-2
    slope = (loss(step) - loss(-step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(loss)(0.0), slope, rtol=2e-2)


class Unary(nn.Module):
    """A network without padding: its logits are two pixels smaller."""

    @nn.compact
    def __call__(self, images, *, train):
        del train
        return {"logits": Conv(3, 3, padding=0, name="score")(images)}


@pytest.mark.slow
def test_a_network_is_refined_and_its_parameters_keep_their_names(exact):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (2, 8, 9, 3)).astype(np.float32)
    images = normalise_batch(jnp.asarray(pixels), "torchvision")
    model = WithCrfRnn(Unary(), PixelValues("torchvision"), PARAMS)
    variables = model.init(jax.random.key(0), images, train=False)
    assert set(variables["params"]) == {"score", "crf_rnn"}
    alone = {"params": {"score": variables["params"]["score"]}}
    outputs: Any = model.apply(variables, images, train=False)
    unary = apply(Unary(), alone, images, train=False)["logits"]
    np.testing.assert_array_equal(outputs["unary"], unary)
    wanted = crf.mean_field(unary, jnp.asarray(pixels[:, 1:-1, 1:-1]), PARAMS)
    np.testing.assert_allclose(outputs["logits"], wanted, atol=1e-3)
    # The network's logits may come from elsewhere, for images of their size.
    sizes = jnp.array([[6, 7]] * 2)
    refined = model.refine(variables, unary, images[:, 1:-1, 1:-1], sizes)
    np.testing.assert_allclose(refined, outputs["logits"], atol=1e-3)

    def loss(params):
        logits: Any = model.apply({"params": params}, images, train=True)
        return -jnp.mean(logits["logits"][..., 0])

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.any(grad), f"no gradient reaches {jax.tree_util.keystr(path)}"
        assert np.all(np.isfinite(grad))


@pytest.mark.slow
def test_sizes_keep_padding_out_and_the_lattice_hands_gradients_on(monkeypatch):
    monkeypatch.setattr(permutohedral, "_SHARES", (1,))  # one program to compile, not five

    class Identity(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            del train
            return {"logits": images / 40}

    rng = np.random.default_rng(4)
    images = rng.normal(0, 40, (1, 7, 8, 3)).astype(np.float32)
    other = images.copy()
    other[:, 5:], other[:, :, 6:] = 0, 0
    model = WithCrfRnn(Identity(), PixelValues("caffe"), PARAMS)
    variables = model.init(jax.random.key(0), images, train=False)
    sizes = jnp.array([[5.0, 6.0]])

    def refined(params, x):
        outputs: Any = model.apply({"params": params}, x, train=False, sizes=sizes)
        logits = outputs["logits"][:, :5, :6]
        return jnp.sum(logits[..., 0]), logits

    step = jax.jit(jax.value_and_grad(refined, argnums=(0, 1), has_aux=True))
    ((_, logits), (grads, slopes)) = step(variables["params"], images)
    (_, changed), _ = step(variables["params"], other)
    np.testing.assert_allclose(changed, logits, atol=1e-5)
    chex.assert_tree_all_finite((grads, slopes))
    assert all(np.any(grad) for grad in jax.tree.leaves(grads))
    assert not np.any(slopes[:, 5:])
    assert not np.any(slopes[:, :, 6:])
