"""Masks of objects as a mask head is trained on them: cropped by boxes, resized to a grid.

Masks are [G, H, W], boxes those of `dense_jax.ops.boxes`, in pixels of the masks' images.

References: He, Gkioxari, Dollar, Girshick, "Mask R-CNN", ICCV 2017, arXiv:1703.06870, Section 3;
pytorch/vision: torchvision/models/detection/roi_heads.py (`project_masks_on_boxes`);
facebookresearch/detectron2: detectron2/structures/masks.py (`BitMasks.crop_and_resize`).
"""

import jax
import jax.numpy as jnp
from jax import lax

from dense_jax.ops.roi import axis_points


def crop_masks(
    masks: jax.Array,
    boxes: jax.Array,
    index: jax.Array,
    size: jax.Array | None = None,
    *,
    bins: int,
    aligned: bool = False,
    max_samples: int | None = None,
) -> jax.Array:
    """Returns the share of each bin of a box that its object fills, float32 [R, bins, bins].

    This is RoIAlign of the mask at its full resolution, with one sample for each pixel of a bin. A
    bilinear sample is a product of one weight of its row and one of its column, so that all samples
    of a box are two products of matrices.

    Args:
      masks: bool or float [G, H, W].
      boxes: float [R, 4].
      index: int32 [R], the mask of each box.
      size: int32 [2], height and width of the image, in the upper left of the masks; the rest is
        padding, which is not read: boxes that end at the image's edge repeat its last pixel. None:
        all of it.
      bins: number of bins along each side.
      aligned: see `dense_jax.ops.roi.roi_align`; True in detectron2, False in torchvision.
      max_samples: largest number of samples along each side of a bin. None: as many as the whole
        image would need. With 4, soft targets differ by 6e-5 on average.
    """
    height, width = masks.shape[1:]
    size = jnp.array([height, width], jnp.int32) if size is None else size.astype(jnp.int32)
    max_samples = max_samples or -(-max(height, width) // bins)

    def one(box_and_index: tuple[jax.Array, jax.Array]) -> jax.Array:
        box, which = box_and_index
        rows = _shares(box[1], box[3], size[0], height, bins, aligned, max_samples)
        columns = _shares(box[0], box[2], size[1], width, bins, aligned, max_samples)
        mask = masks[which].astype(jnp.float32)
        return jnp.einsum("uh,hw,vw->uv", rows, mask, columns, precision="highest")

    return lax.map(one, (lax.stop_gradient(boxes), index))


def _shares(
    low: jax.Array,
    high: jax.Array,
    end: jax.Array,
    length: int,
    bins: int,
    aligned: bool,
    max_samples: int,
) -> jax.Array:
    """Returns what each cell of an axis adds to each bin, float32 [bins, length]."""
    offset = 0.5 if aligned else 0.0
    cells, weights, exists = (
        x[0]
        for x in axis_points(
            (low - offset)[None],
            (high - offset)[None],
            end[None],
            bins=bins,
            samples=None,
            max_samples=max_samples,
            widen=not aligned,
        )
    )
    count = jnp.maximum(exists.sum(-1), 1).astype(jnp.float32)
    weights = weights / count[:, None, None]
    bin_ = jnp.broadcast_to(jnp.arange(bins, dtype=jnp.int32)[:, None, None], cells.shape)
    return jnp.zeros((bins, length), jnp.float32).at[bin_, cells].add(weights)
