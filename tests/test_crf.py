"""The CRF against sums over all pairs written in NumPy, and what must hold of any CRF."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dense_jax.ops.crf import CrfParams, exact_mean_field

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
