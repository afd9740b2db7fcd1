"""Two networks' opinions of one image as one.

Reference: Noh, Hong, Han, ICCV 2015, arXiv:1505.04366, Section 5.2: DeconvNet and FCN-8s.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def mean_probabilities(logits: Sequence[jax.Array]) -> jax.Array:
    """The mean of the networks' class probabilities, as in the paper.

    Args:
      logits: one array [..., C] for each network, all of one shape.

    Returns:
      Float32 [..., C], the logarithm of the mean: logits of the mean probabilities.
    """
    each = jnp.stack([jax.nn.log_softmax(x.astype(jnp.float32)) for x in logits])
    return jax.nn.logsumexp(each, axis=0) - jnp.log(jnp.float32(len(logits)))


def product_scores(deconv_scores: jax.Array, fcn_scores: jax.Array) -> jax.Array:
    """The product of the scores themselves, as in the release (generate_EDeconvNet_CRF_results.m).

    Args:
      deconv_scores: [..., C], aggregated by a maximum that starts at zero and so not negative.
      fcn_scores: [..., C]; negative ones count as zero.

    Returns:
      Float32 [..., C], of which the release takes the softmax. Where FCN favours no class, all
      are zero, and the first class, background, is the label.
    """
    return deconv_scores.astype(jnp.float32) * jax.nn.relu(fcn_scores.astype(jnp.float32))
