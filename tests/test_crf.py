"""The CRF against sums over all pairs written in NumPy, and what must hold of any CRF."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dense_jax.ops import permutohedral
from dense_jax.ops.crf import CrfParams, exact_mean_field, mean_field

NORMS = ("after", "symmetric", "none")
VARIANTS = list(itertools.product(NORMS, ("include", "exclude")))
SMALL = CrfParams(w1=0.7, sxy=4.0, srgb=20.0, w2=0.4, sg=1.5, iterations=3)


def problem(height, width, channels, seed=0):
    """Returns logits and an image with two regions and noise."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(height, width, channels)).astype(np.float32)
    image = np.where(np.arange(width)[None, :, None] < width / 2, 80, 150)
    image = np.clip(image + rng.normal(0, 12, (height, width, 3)), 0, 255)
    return logits, image.astype(np.float32)


def pairs_mean_field(logits, image, params):
    """Mean field as in the papers, in float64."""
    height, width, channels = logits.shape
    places = np.indices((height, width)).reshape(2, -1).T.astype(float)
    colours = image.reshape(-1, 3).astype(float)
    unary = logits.reshape(-1, channels).astype(float)

    def gaussian(*features):
        f = np.concatenate(features, axis=1)
        k = np.exp(-np.sum((f[:, None] - f[None]) ** 2, axis=-1) / 2)
        if params.self_term == "exclude":
            np.fill_diagonal(k, 0)
        sums = k.sum(axis=1)
        if params.norm == "after":
            return k / sums[:, None]
        return k / np.sqrt(sums[:, None] * sums) if params.norm == "symmetric" else k

    k = params.w1 * gaussian(places / params.sxy, colours / params.srgb)
    k = k + params.w2 * gaussian(places / params.sg)
    q = special.softmax(unary, axis=1)
    for _ in range(params.iterations):
        q = special.softmax(unary + k @ q, axis=1)
    return np.log(q).reshape(logits.shape)


@pytest.mark.parametrize(("norm", "self_term"), VARIANTS)
def test_exact_mean_field_is_the_papers(norm, self_term):
    params = dataclasses.replace(SMALL, norm=norm, self_term=self_term, w1=0.05, w2=0.05)
    logits, image = problem(9, 11, 4)
    ours = exact_mean_field(jnp.asarray(logits), jnp.asarray(image), params)
    np.testing.assert_allclose(ours, pairs_mean_field(logits, image, params), atol=1e-4)


@pytest.mark.parametrize(("norm", "self_term"), VARIANTS)
def test_fast_is_close_to_exact(norm, self_term):
    weight = 0.02 if norm == "none" else 2.0
    params = CrfParams(
        weight, 12.0, 30.0, weight, 2.0, iterations=4, norm=norm, self_term=self_term
    )
    logits, image = map(jnp.asarray, problem(16, 18, 5))
    found = np.exp(mean_field(logits[None], image[None], params)[0])
    wanted = np.exp(exact_mean_field(logits, image, params))
    # On a small image the lattice's sums are too low near the border; dividing by them cures it.
    assert np.abs(found - wanted).mean() < (0.04 if norm == "none" else 0.01)
    assert np.mean(found.argmax(-1) == wanted.argmax(-1)) > (0.9 if norm == "none" else 0.98)


def test_padding_has_no_influence():
    logits, images = np.zeros((2, 9, 10, 3), np.float32), np.zeros((2, 9, 10, 3), np.float32)
    sizes = np.array([[9, 10], [6, 7]], np.int32)
    for i, (h, w) in enumerate(sizes):
        logits[i, :h, :w], images[i, :h, :w] = problem(h, w, 3, seed=i)
    noise = np.random.default_rng(5).uniform(0, 255, images.shape).astype(np.float32)
    beyond = np.ones(images.shape, bool)
    for i, (h, w) in enumerate(sizes):
        beyond[i, :h, :w] = False
    solve = jax.jit(lambda a, b: mean_field(a, b, SMALL, jnp.asarray(sizes)))
    found = solve(logits, images)
    other = solve(np.where(beyond, noise, logits), np.where(beyond, noise, images))
    for i, (h, w) in enumerate(sizes):
        part, image = (jnp.asarray(a[i : i + 1, :h, :w]) for a in (logits, images))
        alone = mean_field(part, image, SMALL)[0]
        np.testing.assert_allclose(found[i, :h, :w], alone, atol=1e-4)
        np.testing.assert_allclose(found[i, :h, :w], other[i, :h, :w], atol=1e-4)


def test_without_weights_nothing_changes():
    logits, image = problem(6, 7, 3)
    params = dataclasses.replace(SMALL, w1=0.0, w2=0.0)
    found = mean_field(jnp.asarray(logits)[None], jnp.asarray(image)[None], params)[0]
    np.testing.assert_allclose(found, special.log_softmax(logits, axis=-1), atol=1e-5)


def test_uniform_image_and_unary_stay_uniform():
    logits = np.broadcast_to(np.array([0.3, -0.2, 1.0], np.float32), (8, 9, 3))
    params = dataclasses.replace(SMALL, norm="after")
    found = np.asarray(
        mean_field(jnp.asarray(logits)[None], jnp.full((1, 8, 9, 3), 90.0), params)[0]
    )
    np.testing.assert_allclose(found, np.broadcast_to(found[:1, :1], found.shape), atol=1e-5)


def lattice_matrix(features):
    """Returns the filter as a matrix: what it makes of each unit vector."""
    return np.asarray(
        permutohedral.with_filter(
            jnp.asarray(features), lambda f: f(jnp.eye(len(features), dtype=jnp.float32))
        )
    )


@pytest.mark.slow
def test_lattice_is_nearly_gaussian_where_points_are_dense():
    places = np.indices((18, 18)).reshape(2, -1).T.astype(np.float32) / 3
    middle = np.all((places >= 2.4) & (places <= 3.4), axis=1)
    matrix = lattice_matrix(places)
    wanted = np.exp(-np.sum((places[:, None] - places[None]) ** 2, axis=-1) / 2)
    assert np.abs(matrix - wanted)[middle].sum() < 0.2 * wanted[middle].sum()
    own = permutohedral.self_weights(jnp.asarray(places))[:, 0]
    np.testing.assert_allclose(own[middle], np.diag(matrix)[middle], rtol=1e-4)


@pytest.mark.slow
def test_gradient_of_the_lattice_is_its_transpose():
    rng = np.random.default_rng(1)
    features = rng.uniform(0, 2, (30, 5)).astype(np.float32)
    weights = rng.normal(size=(30, 30)).astype(np.float32)
    value = jax.jit(
        jax.grad(
            lambda v: jnp.sum(
                weights * permutohedral.with_filter(jnp.asarray(features), lambda f: f(v))
            )
        )
    )(jnp.zeros((30, 30)))
    np.testing.assert_allclose(value, lattice_matrix(features).T @ weights, rtol=1e-4, atol=1e-4)


def test_constant_divided_by_response_to_ones_is_constant():
    features = jnp.asarray(np.random.default_rng(2).uniform(0, 2, (30, 5)).astype(np.float32))
    ratio = permutohedral.with_filter(
        features, lambda f: f(jnp.full((30, 1), 7.0)) / f(jnp.ones((30, 1)))
    )
    np.testing.assert_allclose(ratio, 7.0, rtol=1e-5)


def test_gradients_are_those_of_differences():
    logits, image = problem(6, 7, 3)
    rng = np.random.default_rng(3)
    towards, weights = rng.normal(size=(2, 6, 7, 3)).astype(np.float32)

    @jax.jit
    def loss(step):
        params = dataclasses.replace(SMALL, w1=0.7 + 0.3 * step, w2=0.4 - 0.2 * step)
        moved = (jnp.asarray(logits) + step * towards)[None]
        return jnp.sum(jnp.exp(mean_field(moved, jnp.asarray(image)[None], params)[0]) * weights)

    slope = (loss(1e-2) - loss(-1e-2)) / 2e-2
    np.testing.assert_allclose(jax.grad(loss)(0.0), slope, rtol=2e-2)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="Expected logits"):
        mean_field(jnp.zeros((1, 4, 5, 3)), jnp.zeros((1, 4, 6, 3)), SMALL)
    with pytest.raises(ValueError, match="Expected sizes"):
        mean_field(jnp.zeros((1, 4, 5, 3)), jnp.zeros((1, 4, 5, 3)), SMALL, jnp.zeros((2, 2)))
