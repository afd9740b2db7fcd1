"""A fully connected CRF behind any prediction: it aligns labels with the edges of the image.

Reference: Kraehenbuehl, Koltun, NeurIPS 2011, arXiv:1210.5644; behind a network as in Chen et al.,
ICLR 2015, arXiv:1412.7062, Section 4.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dense_jax.data.normalise import PixelValues
from dense_jax.errors import UserError
from dense_jax.infer.tiles import PredictFn
from dense_jax.ops import crf
from dense_jax.ops.crf import CrfParams


def with_crf(predict: PredictFn, params: CrfParams, normalisation: str) -> PredictFn:
    """Lets a CRF refine "logits"; it compares the pixels as they were before normalisation.

    Args:
      predict: (variables, images, sizes) -> outputs with "logits" [B, H, W, C].
      params: the CRF.
      normalisation: what `predict`'s images were brought to.

    Returns:
      A prediction whose "logits" are log-probabilities after mean field, and whose "before_crf" are
      the logits of `predict`.
    """

    def refined(variables: Any, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        outputs = predict(variables, images, sizes)
        logits = refine(outputs["logits"], images, sizes, params, normalisation)
        return outputs | {"before_crf": outputs["logits"], "logits": logits}

    return refined


def check_crf(params: CrfParams, normalisation: str) -> None:
    """Refuses a CRF behind a network.

    Raises:
      UserError: a parameter is invalid, or the pixel values of the images are lost.
    """
    for name in ("sxy", "srgb", "sg"):
        if not getattr(params, name) > 0:
            raise UserError(
                f"--crf.{name}={getattr(params, name)}: give a standard deviation above 0"
            )
    if params.self_term == "exclude":
        raise UserError(
            "--crf.self-term=exclude: without a pixel's own message the sums are too small for the "
            "lattice, whose errors then decide labels: use include, as all public code does; "
            "ops.crf.exact_mean_field computes small images exactly"
        )
    if params.iterations < 0:
        raise UserError(f"--crf.iterations={params.iterations}: give 0 or more")
    if normalisation == "grey_image":
        raise UserError(
            "--normalisation=grey_image gives each image its own scale, and a CRF compares "
            "pixels by their brightness: train with --normalisation=grey"
        )


def refine(
    logits: jax.Array,
    images: jax.Array,
    sizes: jax.Array,
    params: CrfParams,
    normalisation: str,
) -> jax.Array:
    """Returns log-probabilities [B, H, W, C] for logits of normalised images [B, H, W, 3 or 1]."""
    rgb = PixelValues(normalisation)(images)
    return crf.mean_field(logits.astype(jnp.float32), rgb, params, sizes)
