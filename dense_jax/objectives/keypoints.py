"""The loss of keypoints of Mask R-CNN: each keypoint is in one cell of its box.

Reference: He, Gkioxari, Dollar, Girshick, ICCV 2017, arXiv:1703.06870, Section 5; pytorch/vision:
torchvision/models/detection/roi_heads.py (`keypoints_to_heatmap`, `keypointrcnn_loss`).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dense_jax.objectives.masks import Losses


class KeypointTargets(NamedTuple):
    """Where the keypoints of boxes are.

    Attributes:
      cells: int32 [B, F, K], number of the cell in row-major order; 0 where `valid` is False.
      valid: bool [B, F, K], whether the keypoint is labelled and in the box.
    """

    cells: jax.Array
    valid: jax.Array


def keypoint_targets(
    keypoints: jax.Array, boxes: jax.Array, index: jax.Array, bins: int
) -> KeypointTargets:
    """Returns the cells of the keypoints of boxes.

    A keypoint on the right or lower edge of a box is in its last cell. Those outside do not train.

    Args:
      keypoints: float32 [B, G, K, 3], of the objects: x, y and visibility (0: not labelled).
      boxes: float32 [B, F, 4].
      index: int32 [B, F], the object of each box.
      bins: cells along each side.
    """
    own = jnp.take_along_axis(keypoints, index[..., None, None], axis=1)
    low, high = boxes[:, :, None, :2], boxes[:, :, None, 2:]
    at = own[..., :2]
    cell = jnp.floor((at - low) * (bins / jnp.maximum(high - low, 1e-6)))
    cell = jnp.where(at == high, bins - 1, cell)
    valid = jnp.all((cell >= 0) & (cell < bins), axis=-1) & (own[..., 2] > 0)
    column, row = (jnp.where(valid, cell[..., axis], 0).astype(jnp.int32) for axis in (0, 1))
    return KeypointTargets(row * bins + column, valid)


def keypoint_losses(logits: jax.Array, targets: KeypointTargets, classes: jax.Array) -> Losses:
    """Returns {"keypoint": (sum, count)}: cross entropies over cells, and their number.

    Args:
      logits: [B, F, M, M, K].
      targets: of `keypoint_targets`, for M bins.
      classes: int32 [B, F], 0 for boxes that do not train.
    """
    chex.assert_rank(logits, 5)
    log_p = jax.nn.log_softmax(logits.reshape(*logits.shape[:2], -1, logits.shape[-1]), axis=2)
    losses = -jnp.take_along_axis(log_p, targets.cells[:, :, None], axis=2)[:, :, 0]
    trains = targets.valid & (classes > 0)[..., None]
    return {"keypoint": (jnp.sum(jnp.where(trains, losses, 0.0)), jnp.sum(trains))}
