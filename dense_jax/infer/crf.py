"""A fully connected CRF behind any prediction: it aligns labels with the edges of the image.

Reference: Kraehenbuehl, Koltun, NeurIPS 2011, arXiv:1210.5644; behind a network as in Chen et al.,
ICLR 2015, arXiv:1412.7062, Section 4.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dense_jax.data.normalise import PixelValues
from dense_jax.errors import UserError
from dense_jax.infer.tiles import PredictFn
from dense_jax.ops import crf
from dense_jax.ops.crf import CrfParams


@dataclasses.dataclass(frozen=True)
class WithCrf:
    """A prediction whose logits are the unary scores of a CRF; see `with_crf`.

    Attributes:
      predict: the prediction without the CRF.
      params: of the CRF.
      normalisation: of the images, a name in `dense_jax.data.normalise.NORMALISATIONS`.
    """

    predict: PredictFn
    params: CrfParams
    normalisation: str

    def __call__(self, variables: Any, images: jax.Array, sizes: jax.Array) -> jax.Array:
        """Returns the log-probabilities after mean field, [B, H, W, C]."""
        return self.before_and_after(variables, images, sizes)[1]

    def before_and_after(
        self, variables: Any, images: jax.Array, sizes: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the logits of one pass of the network, and the log-probabilities of the CRF."""
        logits = self.predict(variables, images, sizes)
        return logits, refine(logits, images, sizes, self.params, self.normalisation)


def with_crf(predict: PredictFn, params: CrfParams, normalisation: str) -> WithCrf:
    """Refines a prediction by a CRF, which compares the pixels from before normalisation.

    Args:
      predict: (variables, images, sizes) -> logits [B, H, W, C]. Its own CRF is removed.
      params: of the CRF.
      normalisation: of the images of `predict`.

    Returns:
      A prediction whose logits are log-probabilities.

    Raises:
      UserError: a parameter is invalid, or the pixel values of the images are lost.
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
    return WithCrf(without_crf(predict), params, normalisation)


def without_crf(predict: PredictFn) -> PredictFn:
    """Returns a prediction without its CRF, if it has one."""
    return predict.predict if isinstance(predict, WithCrf) else predict


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
