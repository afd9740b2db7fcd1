"""Batch normalisation against formulas; the networks that use it compare with torch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.layers.norm import BatchNorm


def f32(*values):
    return np.array(values, np.float32)


NOISE = np.random.default_rng(0).standard_normal((8, 3, 5, 4), np.float32)
X = NOISE * f32(1, 2, 3, 4) + f32(0, 1, -2, 30)
VARIABLES = {
    "params": {"scale": f32(1, 2, 0.5, -1), "bias": f32(0, 1, 2, 3)},
    "batch_stats": {"mean": f32(1, 0, -1, 5), "var": f32(1, 4, 9, 0.25)},
}


def apply(x, train, variables=VARIABLES, **options):
    norm = BatchNorm(use_running_average=not train, **options)
    return norm.apply(variables, x, mutable=["batch_stats"])


def formula(x, mean, var, epsilon=1e-5):
    params = VARIABLES["params"]
    return params["scale"] * (x - mean) / np.sqrt(var + epsilon) + params["bias"]


def test_training_normalises_by_the_batch_and_keeps_averages():
    y, state = apply(X, True, momentum=0.75, epsilon=1e-3)
    mean, var = X.mean((0, 1, 2)), X.var((0, 1, 2))
    np.testing.assert_allclose(y, formula(X, mean, var, 1e-3), rtol=1e-4, atol=1e-4)
    for name, batch in (("mean", mean), ("var", var)):
        expected = 0.75 * VARIABLES["batch_stats"][name] + 0.25 * batch
        chex.assert_trees_all_close(state["batch_stats"][name], expected, rtol=1e-4)


@pytest.mark.parametrize(("frozen", "train"), [(False, False), (True, False), (True, True)])
def test_evaluation_and_frozen_layers_use_the_averages_and_leave_them(frozen, train):
    y, state = apply(X, train, frozen=frozen)
    np.testing.assert_allclose(y, formula(X, **VARIABLES["batch_stats"]), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(state["batch_stats"], VARIABLES["batch_stats"])


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_layers_pass_gradients_on_but_take_none(frozen):
    def loss(params, x):
        y, _ = apply(x, True, {**VARIABLES, "params": params}, frozen=frozen)
        return jnp.sum(y**3)

    params_grad, x_grad = jax.grad(loss, argnums=(0, 1))(VARIABLES["params"], X)
    assert np.any(x_grad)
    for grad in params_grad.values():
        assert np.all(grad == 0) if frozen else np.all(grad != 0)


def test_bfloat16_goes_in_and_out_but_is_not_computed_in():
    x = jnp.asarray(X, jnp.bfloat16)
    y, state = apply(x, True)
    exact, exact_state = apply(x.astype(jnp.float32), True)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(y, exact.astype(jnp.bfloat16))
    chex.assert_trees_all_equal(state, exact_state)


@pytest.mark.parametrize("frozen", [False, True])
def test_starts_as_the_identity_of_normal_values(frozen):
    norm = BatchNorm(use_running_average=False, frozen=frozen)
    variables = norm.init(jax.random.key(0), X)
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    expected = {
        "params": {"scale": ones, "bias": zeros},
        "batch_stats": {"mean": zeros, "var": ones},
    }
    chex.assert_trees_all_equal(variables, expected)
