"""Proposals of a region proposal network, in arrays of fixed sizes.

`propose` works on one image, `propose_each` and `whole_grid` on a batch. Boxes are those of
`dense_jax.ops.boxes`, in pixels of the padded image; the true image is at its upper left.

Reference: Ren, He, Girshick, Sun, "Faster R-CNN", NIPS 2015, arXiv:1506.01497; per level: Lin et
al., "Feature pyramid networks", CVPR 2017, arXiv:1612.03144; pytorch/vision:
torchvision/models/detection/rpn.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dense_jax.ops import boxes as box_ops
from dense_jax.ops.nms import nms

RPN_WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the deltas of anchors; see `dense_jax.ops.boxes.encode`
HEAD_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the deltas of the box head
AnchorsOf = Callable[[Any, Sequence[Any]], Sequence[jax.Array]]
"""(size of the padded images, sizes of the maps) -> anchors of each map, [N_l, 4]."""
_LEAST_PROPOSAL = 1e-3  # pixels, of both sides


class Proposals(NamedTuple):
    """The R proposals of an image, the highest score first.

    Attributes:
      boxes: float32 [R, 4], inside of the true image.
      scores: float32 [R], logits.
      valid: bool [R], False for empty slots.
    """

    boxes: jax.Array
    scores: jax.Array
    valid: jax.Array


@dataclasses.dataclass(frozen=True)
class ProposalRule:
    """How proposals are chosen.

    Attributes:
      candidates: number of anchors of the highest scores that each level keeps.
      count: R.
      max_iou: of two proposals of a level with a larger IoU the lower score is dropped.
      min_side: proposals with a shorter side than this, in pixels, are dropped.
      plus_one: as in py-faster-rcnn; see `dense_jax.ops.boxes`. The boxes are `last_inside` then.
      is_ranked: False takes anchors by random numbers in place of their scores, the same ones for
        every image, and suppresses none (Ren et al., Section 4.1, "no cls").
      is_moved: False takes the anchors themselves ("no reg").
    """

    candidates: int
    count: int
    max_iou: float = 0.7
    min_side: float = _LEAST_PROPOSAL
    plus_one: bool = False
    is_ranked: bool = True
    is_moved: bool = True


def propose(
    logits: Sequence[jax.Array],
    deltas: Sequence[jax.Array],
    anchors: Sequence[jax.Array],
    size: jax.Array,
    rule: ProposalRule,
) -> Proposals:
    """Returns the proposals of an image.

    Each level keeps its best anchors, moves them, cuts them at the edges of the true image, drops
    tiny ones and suppresses; then the best of all levels are taken. Logits decide the order: their
    sigmoid is 1 in float32 from about 17 on.

    Args:
      logits: of each level, [N_l].
      deltas: of each level, [N_l, 4].
      anchors: of each level, [N_l, 4].
      size: int32 [2], height and width of the true image.
      rule: how to choose.
    """
    boxes, scores, valid, levels = [], [], [], []
    for level, (own, moves, places) in enumerate(zip(logits, deltas, anchors, strict=True)):
        if not rule.is_ranked:
            own = jax.random.uniform(jax.random.key(level), own.shape, own.dtype)
        if not rule.is_moved:
            moves = jnp.zeros_like(moves)
        best, index = lax.top_k(own, min(rule.candidates, own.shape[0]))
        moved = box_ops.decode_inside(
            moves[index],
            jnp.asarray(places)[index],
            tuple(size.astype(moves.dtype)),
            weights=RPN_WEIGHTS,
            plus_one=rule.plus_one,
        )
        boxes.append(moved)
        scores.append(best)
        finite = jnp.isfinite(best) & jnp.all(jnp.isfinite(moved), axis=-1)
        sides = box_ops.min_side(moved, plus_one=rule.plus_one)
        valid.append(finite & (sides >= rule.min_side))
        levels.append(jnp.full(best.shape, level, jnp.int32))
    kept = [
        nms(own, ok, rule.max_iou if rule.is_ranked else 1.0, plus_one=rule.plus_one)
        for own, ok in zip(boxes, valid, strict=True)
    ]
    every = jnp.concatenate(scores)
    ranked = jnp.where(jnp.concatenate(kept), every, -jnp.inf)
    top, index = lax.top_k(ranked, min(rule.count, ranked.shape[0]))
    chosen = Proposals(jnp.concatenate(boxes)[index], every[index], top > -jnp.inf)
    free = rule.count - top.shape[0]
    return Proposals(*(jnp.pad(x, [(0, free)] + [(0, 0)] * (x.ndim - 1)) for x in chosen))


def propose_each(
    logits: Sequence[jax.Array],
    deltas: Sequence[jax.Array],
    anchors: Sequence[jax.Array],
    sizes: jax.Array,
    rule: ProposalRule,
) -> Proposals:
    """Returns the proposals of a batch: those of `propose` for each image, on the same anchors."""
    each = jax.vmap(functools.partial(propose, rule=rule), (0, 0, None, 0))
    return each(logits, deltas, anchors, sizes)


def whole_grid(
    anchors: Sequence[jax.Array], sizes: jax.Array, *, plus_one: bool = False
) -> Proposals:
    """Returns all anchors as the proposals of each image, cut at its edges, with scores of 0.

    This is sliding windows, as of one-stage detectors (Ren et al., Section 4.1, Table 10).

    Args:
      anchors: of each level, [N_l, 4].
      sizes: int32 [B, 2], heights and widths of the true images.
      plus_one: whether x1 and y1 of the anchors are inside them.
    """
    every = jnp.concatenate([jnp.asarray(own) for own in anchors])

    def cut(size: jax.Array) -> jax.Array:
        return box_ops.clip(every, tuple(size.astype(every.dtype)), plus_one=plus_one)

    boxes = jax.vmap(cut)(sizes)
    valid = box_ops.min_side(boxes, plus_one=plus_one) >= _LEAST_PROPOSAL
    return Proposals(boxes, jnp.zeros(valid.shape, boxes.dtype), valid)
