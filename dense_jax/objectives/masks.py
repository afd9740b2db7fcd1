"""The loss of masks of Mask R-CNN.

Reference: He, Gkioxari, Dollar, Girshick, ICCV 2017, arXiv:1703.06870, Section 3; what torchvision
and detectron2 do differently is in `MaskRule`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from dense_jax.ops.masks import crop_cells, crop_masks
from dense_jax.ops.polygons import crop_polygons

Losses = dict[str, tuple[jax.Array, jax.Array]]
MaskTarget = Literal["soft", "bitmap", "polygon"]
MaskLoss = Literal["sigmoid", "softmax"]


@dataclasses.dataclass(frozen=True)
class MaskRule:
    """How masks train.

    Attributes:
      target: "soft": the share of a cell that the object fills (torchvision). "bitmap": whether the
        object fills half of the cell, whose centre is half a pixel from soft ones (detectron2,
        where objects are bitmaps). "polygon": whether the cell is in the object's polygons, drawn
        by COCO's rule (detectron2 and Detectron); objects without any are as with "bitmap".
      loss: "sigmoid": each cell of the object's own class is in the object or not. "softmax": each
        cell has one of all classes (Table 2b).
    """

    target: MaskTarget = "soft"
    loss: MaskLoss = "sigmoid"


def mask_targets(
    objects: Mapping[str, jax.Array],
    boxes: jax.Array,
    index: jax.Array,
    sizes: jax.Array,
    bins: int,
    rule: MaskRule,
) -> jax.Array:
    """Returns what the masks of boxes should be, float32 [B, F, bins, bins].

    Args:
      objects: their masks as "masks" [B, G, H, W], as "cells" [B, G, S, S] and "boxes"
        [B, G, 4], or as "corners" [B, G, P, 2] and "parts" [B, G, P]; see
        `dense_jax.data.detection.PadObjects`.
      boxes: float32 [B, F, 4].
      index: int32 [B, F], the object of each box.
      sizes: int32 [B, 2], height and width of each image without padding.
      bins: cells along each side.
      rule: how masks train.
    """
    if "corners" in objects:
        each = zip(objects["corners"], objects["parts"], boxes, index, strict=True)
        return jnp.stack([crop_polygons(*arrays, bins=bins) for arrays in each])
    is_bitmap = rule.target != "soft"
    options = {"bins": bins, "aligned": is_bitmap}
    if "cells" in objects:
        crop = functools.partial(crop_cells, **options)
        each = zip(objects["cells"], objects["boxes"], boxes, index, strict=True)
    else:
        crop = functools.partial(crop_masks, **options)
        each = zip(objects["masks"], boxes, index, sizes, strict=True)
    found = jnp.stack([crop(*arrays) for arrays in each])
    return (found >= 0.5).astype(jnp.float32) if is_bitmap else found


def mask_losses(
    logits: jax.Array, targets: jax.Array, classes: jax.Array, rule: MaskRule
) -> Losses:
    """Returns {"mask": (sum, count)}; the count is that of the cells of boxes with a class.

    Args:
      logits: [B, F, M, M, K], or 1 in place of K for masks that classes share.
      targets: float [B, F, M, M].
      classes: int32 [B, F], 0 for boxes that do not train.
      rule: how masks train.
    """
    is_object = (classes > 0)[..., None, None]
    if rule.loss == "softmax":
        ids = jnp.where(targets >= 0.5, classes[..., None, None], 0)
        if logits.shape[-1] == 1:
            raise ValueError("A softmax over classes needs a mask for each class.")
        log_p = jax.nn.log_softmax(logits)
        losses = -jnp.take_along_axis(log_p, ids[..., None], axis=-1)[..., 0]
    else:
        own = logits[..., 0]
        if logits.shape[-1] > 1:
            index = classes[..., None, None, None]
            own = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
        losses = jax.nn.softplus(own) - targets * own
    count = jnp.sum(classes > 0) * targets.shape[-1] ** 2
    return {"mask": (jnp.sum(jnp.where(is_object, losses, 0.0)), count)}
