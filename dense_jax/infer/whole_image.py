"""The simplest prediction: one pass of the network over each whole image."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dense_jax.ops.resize import rescaled, resize_bilinear

Variables = dict[str, Any]
# (variables, images [B, H, W, C], sizes int32 [B, 2]) -> outputs by name, with "logits"
# [B, H, W, classes]. Images are normalised. Sizes are heights and widths before padding to the
# common size of the batch. Variables belong to one network; an ensemble takes a tuple of them.
PredictFn = Callable[[Any, jax.Array, jax.Array], dict[str, jax.Array]]

ONE_PASS = "none: one pass, no flips, no scales"


def padded_side(model: nn.Module, side: int) -> int:
    """Returns the side to which zeros pad images with this side for a network, in pixels.

    Networks that pad images themselves, or do not take all sides, have a method ``padded_side``.
    Zeros up to this side change no label, since the network sees them anyway.
    """
    own = getattr(model, "padded_side", None)
    return side if own is None else own(side)


def whole_image(
    model: nn.Module,
    scale: float = 1.0,
    rngs: dict[str, jax.Array] | None = None,
    *,
    sized: bool = False,
) -> PredictFn:
    """Returns one pass over the images, resized by ``scale`` for the network.

    A network trained on images of half size predicts on images of half size. Its logits are then
    enlarged bilinearly to the size of the images; labels are never resized. Images whose sides the
    network does not take are padded with zeros at the bottom and on the right; see `padded_side`.

    Args:
      model: the network.
      scale: factor for height and width of its images.
      rngs: keys for networks that draw random numbers.
      sized: whether the network takes "sizes", the image sizes without padding.
    """

    def predict(variables: Any, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        # Padding gets labels too; the caller crops them.
        extra: Any = {"sizes": sizes.astype(jnp.float32) * scale} if sized else {}
        size = (images.shape[1], images.shape[2])
        if scale != 1.0:
            small = [max(1, rescaled(side, scale)) for side in size]
            images = jax.image.resize(images, (images.shape[0], *small, images.shape[3]), "linear")
        height, width = images.shape[1], images.shape[2]
        edges = ((0, padded_side(model, side) - side) for side in (height, width))
        images = jnp.pad(images, ((0, 0), *edges, (0, 0)))
        outputs: Any = model.apply(variables, images, train=False, rngs=rngs, **extra)
        logits = outputs["logits"][:, :height, :width]
        if scale != 1.0:
            logits = resize_bilinear(logits, size, align_corners=False)
        return {"logits": logits}

    return predict
