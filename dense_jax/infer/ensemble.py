"""Combines the predictions of several networks for one image.

Reference: Noh, Hong, Han, ICCV 2015, arXiv:1505.04366, Section 5.2: DeconvNet and FCN-8s.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def mean_probabilities(logits: Sequence[jax.Array]) -> jax.Array:
    """Returns the mean of the networks' class probabilities, as in the paper.

    Args:
      logits: one array [..., C] for each network, all of one shape.

    Returns:
      Float32 [..., C], the logarithm of the mean: logits of the mean probabilities.
    """
    each = jnp.stack([jax.nn.log_softmax(x.astype(jnp.float32)) for x in logits])
    return jax.nn.logsumexp(each, axis=0) - jnp.log(jnp.float32(len(logits)))


def product_scores(deconv_scores: jax.Array, fcn_scores: jax.Array) -> jax.Array:
    """Returns the product of the scores, as the release does (generate_EDeconvNet_CRF_results.m).

    Args:
      deconv_scores: [..., C], not negative, because they are a maximum that starts at zero.
      fcn_scores: [..., C]; negative scores count as zero.

    Returns:
      Float32 [..., C]; the release takes their softmax. Where FCN has no positive score, all are
      zero, so the label is the first class, background.
    """
    return deconv_scores.astype(jnp.float32) * jax.nn.relu(fcn_scores.astype(jnp.float32))
