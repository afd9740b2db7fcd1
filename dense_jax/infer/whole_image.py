"""The simplest way to use a network on images: one pass over each, at its scale."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dense_jax.ops.resize import rescaled, resize_bilinear

Variables = dict[str, Any]
# (variables, images [B, H, W, C], sizes int32 [B, 2]) -> outputs by name, among them "logits"
# [B, H, W, classes]. Images are normalised; sizes are their heights and widths before the padding
# that made the images of a batch equally large. Variables are those of the network, or a tuple of
# those of several.
PredictFn = Callable[[Any, jax.Array, jax.Array], dict[str, jax.Array]]

ONE_PASS = "none: one pass, no flips, no scales"


def whole_image(
    model: nn.Module,
    scale: float = 1.0,
    rngs: dict[str, jax.Array] | None = None,
    *,
    sized: bool = False,
) -> PredictFn:
    """One pass over the images, which the network sees at ``scale``.

    A network trained on images of half size predicts on images of half size; its logits are then
    enlarged bilinearly, so that labels are never resized. ``rngs`` are for networks that draw,
    and ``sized`` ones are told which part of an image is not padding.
    """

    def predict(variables: Any, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        # Padding is labelled too, and cut off afterwards.
        extra: Any = {"sizes": sizes.astype(jnp.float32) * scale} if sized else {}
        size = (images.shape[1], images.shape[2])
        if scale != 1.0:
            small = [max(1, rescaled(side, scale)) for side in size]
            images = jax.image.resize(images, (images.shape[0], *small, images.shape[3]), "linear")
        outputs: Any = model.apply(variables, images, train=False, rngs=rngs, **extra)
        logits = outputs["logits"]
        if scale != 1.0:
            logits = resize_bilinear(logits, size, align_corners=False)
        return {"logits": logits}

    return predict
