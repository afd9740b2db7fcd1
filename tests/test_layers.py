"""Initialisers, dropout and normalisation."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.layers import init
from dense_jax.layers.dropout import Dropout
from dense_jax.layers.norm import LocalResponseNorm, LocalResponseNormInChannel


@pytest.mark.parametrize(
    ("size", "taps"),
    [
        (1, [1]),
        (2, [0.5, 0.5]),
        (3, [0.5, 1, 0.5]),
        (4, [0.25, 0.75, 0.75, 0.25]),
        (6, [1 / 6, 3 / 6, 5 / 6, 5 / 6, 3 / 6, 1 / 6]),
        (7, [0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25]),
    ],
)
def test_bilinear_taps(size, taps):
    np.testing.assert_allclose(init.bilinear_taps(size), taps, atol=1e-12)


def test_bilinear_kernels():
    depthwise = init.bilinear()(None, (64, 64, 1, 3))
    np.testing.assert_allclose(jnp.sum(depthwise, (0, 1, 2)), 1024, rtol=1e-6)
    dense = init.bilinear()(None, (4, 4, 3, 3))
    np.testing.assert_array_equal(dense[..., 1, 1], init.bilinear()(None, (4, 4, 1, 1))[..., 0, 0])
    assert jnp.count_nonzero(dense) == 3 * 16
    with pytest.raises(ValueError, match=r"not \(4, 4, 2, 3\)"):
        init.bilinear()(None, (4, 4, 2, 3))


def test_random_initialisers_have_their_variance():
    shape, key = (3, 3, 64, 128), jax.random.key(0)
    assert float(jnp.var(init.he(key, shape))) == pytest.approx(2 / (9 * 64), rel=0.05)
    assert float(jnp.var(init.xavier(key, shape))) == pytest.approx(2 / (9 * 192), rel=0.05)
    assert float(jnp.std(init.normal(0.01)(key, shape))) == pytest.approx(0.01, rel=0.05)
    assert not jnp.any(init.zero(key, shape))


def test_dropout_scales_what_it_keeps():
    x, rngs = jnp.ones((4, 50, 50, 2)), {"dropout": jax.random.key(3)}
    y: Any = Dropout(0.3).apply({}, x, train=True, rngs=rngs)
    assert float(jnp.mean(y)) == pytest.approx(1, abs=0.03)
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-6)
    assert not jnp.array_equal(y[0], y[1])
    chex.assert_trees_all_equal(Dropout(0.3).apply({}, x, train=False), x)
    with pytest.raises(ValueError, match=r"received 1\.0"):
        Dropout(1.0).apply({}, x, train=True, rngs=rngs)


@pytest.mark.parametrize("devices", [2, 4])
def test_dropout_does_not_depend_on_the_number_of_devices(devices):
    x, key = jnp.ones((8, 5, 5, 3)), jax.random.key(0)
    whole = Dropout(0.5).apply({}, x, train=True, rngs={"dropout": key})
    # vmap with a name has the same collectives as pmap.
    spread: Any = jax.vmap(
        lambda x: Dropout(0.5, "devices").apply({}, x, train=True, rngs={"dropout": key}),
        axis_name="devices",
    )(x.reshape(devices, -1, 5, 5, 3))
    np.testing.assert_array_equal(spread.reshape(x.shape), whole)


def test_local_response_norm():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 7)).astype(np.float32)
    slow = np.empty_like(x)
    for c in range(7):
        squares = (x[..., max(c - 2, 0) : c + 3] ** 2).sum(-1)
        slow[..., c] = x[..., c] / (2 + 0.1 / 5 * squares) ** 0.75
    np.testing.assert_allclose(
        LocalResponseNorm(5, 0.1, 0.75, 2.0)(jnp.asarray(x)), slow, rtol=1e-5
    )
    with pytest.raises(ValueError, match="received 4"):
        LocalResponseNorm(4)(jnp.asarray(x))


def test_local_response_norm_in_a_channel():
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
    slow = np.empty_like(x)
    for i, j in np.ndindex(5, 4):
        window = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        slow[:, i, j] = x[:, i, j] / (1 + 0.9 * (window**2).sum((1, 2)) / 9) ** 0.75
    found = LocalResponseNormInChannel(3, 0.9)(jnp.asarray(x))
    np.testing.assert_allclose(found, slow, rtol=1e-5)
    with pytest.raises(ValueError, match="received 4"):
        LocalResponseNormInChannel(4)(jnp.asarray(x))


@pytest.mark.parity
def test_local_response_norm_matches_torch():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 8)).astype(np.float32)
    theirs = torch.nn.LocalResponseNorm(5)(torch.tensor(x.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(
        LocalResponseNorm()(jnp.asarray(x)).transpose(0, 3, 1, 2), theirs.numpy(), rtol=1e-5
    )
