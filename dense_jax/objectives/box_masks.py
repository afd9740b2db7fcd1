"""The loss of masks in boxes: the logistic loss of each box's heat map.

Reference: Hariharan, Arbelaez, Girshick, Malik, CVPR 2015, arXiv:1411.5752, and bharath272/sds.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dense_jax.objectives.pixels import LossNorm


def mask_loss(
    log_probabilities: jax.Array, batch: Mapping[str, Any], norm: LossNorm
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns {"masks": (sum, count)}.

    Args:
      log_probabilities: [B, N, S, S, 2], of a pixel lying outside and inside the object.
      batch: "targets" [B, N, S, S], 1 inside, 0 outside, -1 not scored; "box_weights" [B, N];
        "box_valid" [B, N].
      norm: the count: "batch" counts boxes (the release), "valid" scored pixels, "weights" sums
        the weights of scored pixels, "sum" divides by 1.
    """
    outside, inside = jnp.moveaxis(log_probabilities, -1, 0)
    targets, weights = batch["targets"], batch["box_weights"][..., None, None]
    scored = (targets >= 0).astype(jnp.float32)
    log_p = jnp.where(targets == 1, inside, outside)
    counted = {
        "batch": batch["box_valid"].astype(jnp.float32),
        "valid": scored,
        "weights": scored * weights,
        "sum": jnp.zeros(()),
    }[norm]
    return {"masks": (jnp.sum(-jnp.where(targets >= 0, log_p, 0.0) * weights), jnp.sum(counted))}
