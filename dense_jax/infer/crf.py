"""A fully connected CRF behind any prediction: labels end where the picture's colours do.

Reference: Kraehenbuehl, Koltun, NeurIPS 2011, arXiv:1210.5644; behind a network as in Chen et al.,
ICLR 2015, arXiv:1412.7062, Section 4.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.data.transforms import NORMALISATIONS
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
      UserError: a parameter that no CRF can have, or images whose pixel values are lost.
    """
    for name in ("sxy", "srgb", "sg"):
        if not getattr(params, name) > 0:
            raise UserError(
                f"--crf.{name}={getattr(params, name)}: give a standard deviation above 0"
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
    rgb = pixel_values(images, normalisation)
    return crf.mean_field(logits.astype(jnp.float32), rgb, params, sizes)


def pixel_values(images: jax.Array, normalisation: str) -> jax.Array:
    """Undoes a normalisation: float [B, H, W, 3 or 1] to RGB [B, H, W, 3] from 0 to 255.

    Integers come out as the integers that they were, so that a CRF is the same behind every
    normalisation. Padding becomes the mean colour. "grey_image" cannot be undone.
    """
    mean, std = (
        np.array(values, np.float32).reshape(1, 1, 1, -1)
        for values in NORMALISATIONS[normalisation]
    )
    rgb = jnp.clip(jnp.round(images.astype(jnp.float32) * std + mean), 0, 255)
    return jnp.broadcast_to(rgb, (*rgb.shape[:3], 3))
