import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops import location_grid


def slow_weights(size, cells):
    """The formula of the release: bilinear weights [size, cells] of all classifiers of an axis."""
    weights = np.zeros((size, cells))
    for y in range(size):
        at = (y + 0.5) * cells / size - 0.5
        lower = int(np.floor(at))
        weights[y, np.clip(lower, 0, cells - 1)] += lower + 1 - at
        weights[y, np.clip(lower + 1, 0, cells - 1)] += at - lower
    return weights


def weights_of(neighbours):
    return np.einsum("yjk,yj->yk", neighbours.picks, neighbours.weights)


@pytest.mark.parametrize(("size", "cells"), [(50, 5), (50, 10), (7, 2), (3, 5), (4, 1), (15, 5)])
def test_grid_weights_are_the_formula(size, cells):
    weights = weights_of(location_grid.neighbours(size, cells))
    np.testing.assert_allclose(weights, slow_weights(size, cells), atol=1e-5)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)


def test_grid_weights_of_50_pixels_and_5_cells():
    """Cell 0 is centred at 4.5, between pixels 4 and 5; rows 0-4 use only cell row 0."""
    weights = weights_of(location_grid.neighbours(50, 5))
    assert np.all(weights[:5, 0] == 1)
    assert not np.any(weights[:5, 1:])
    np.testing.assert_allclose(weights[4:7, :2], [[1, 0], [0.95, 0.05], [0.85, 0.15]], atol=1e-6)
    assert np.all(weights[-5:, 4] == 1)


def test_hard_neighbours_are_the_cells_themselves():
    weights = weights_of(location_grid.neighbours(15, 5, hard=True))
    np.testing.assert_array_equal(weights, np.repeat(np.eye(5), 3, axis=0))


def test_the_grid_spans_the_image_and_not_its_padding():
    padded = location_grid.neighbours(8, 3, extent=jnp.array([8, 6]))
    for extent, row in ((8, 0), (6, 1)):
        found = weights_of(jax.tree.map(lambda x, row=row: x[row], padded))[:extent]
        np.testing.assert_allclose(found, slow_weights(extent, 3), atol=1e-6)


@pytest.mark.parametrize(("cells", "hard"), [(1, False), (2, True), (3, False)])
def test_mixing_is_the_sum_over_all_classifiers(cells, hard):
    rng = np.random.default_rng(0)
    size, coarse, channels = (6, 9), (3, 4), 2
    scores = rng.standard_normal((2, *coarse, cells, cells, channels)).astype(np.float32)
    rows = rng.uniform(size=(size[0], coarse[0])).astype(np.float32)
    columns = rng.uniform(size=(size[1], coarse[1])).astype(np.float32)

    @jax.jit
    def mix(scores):
        high, wide = (location_grid.neighbours(n, cells, hard=hard) for n in size)
        near = location_grid.evaluate(scores, jnp.asarray(rows), jnp.asarray(columns), high, wide)
        log_p = location_grid.mix_probabilities(jax.nn.log_sigmoid(near), high, wide)
        return location_grid.mix_scores(near, high, wide), log_p

    mixed, log_p = mix(scores)
    everywhere = np.einsum("yh,xw,bhwklc->byxklc", rows, columns, scores)
    weights = [slow_weights(n, cells) for n in size]
    if hard:
        # The cell of a pixel's centre, (y + 1/2) K / n rounded down.
        weights = [np.eye(cells)[np.arange(1, 2 * n, 2) * cells // (2 * n)] for n in size]
    expected = np.einsum("byxklc,yk,xl->byxc", everywhere, *weights)
    np.testing.assert_allclose(mixed, expected, rtol=1e-3, atol=1e-4)
    expected = np.einsum("byxklc,yk,xl->byxc", 1 / (1 + np.exp(-everywhere)), *weights)
    np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-3, atol=1e-4)


def test_mixed_probabilities_keep_finite_gradients_where_sigmoids_saturate():
    scores = np.full((4, 4, 2, 2, 1), -200, np.float32)

    @jax.jit
    @jax.value_and_grad
    def total(scores):
        high = location_grid.neighbours(4, 2)
        return jnp.sum(location_grid.mix_probabilities(jax.nn.log_sigmoid(scores), high, high))

    value, grad = total(scores)
    np.testing.assert_allclose(value, -200 * 16, rtol=1e-6)
    assert np.all(np.isfinite(grad))
    np.testing.assert_allclose(np.sum(grad), 16, rtol=1e-5)
