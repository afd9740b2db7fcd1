"""The losses of Faster R-CNN: of its proposals and of its boxes.

Reference: Ren, He, Girshick, Sun, "Faster R-CNN", NIPS 2015, arXiv:1506.01497, Equation 1;
Girshick, "Fast R-CNN", ICCV 2015, arXiv:1504.08083, Equations 1 to 3. Attributes of `AnchorRule`
and `RoiRule` are what torchvision, detectron2 and the releases in Caffe do differently.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from dense_jax.objectives import targets
from dense_jax.objectives.keypoints import keypoint_losses, keypoint_targets
from dense_jax.objectives.masks import Losses, MaskRule, mask_losses, mask_targets
from dense_jax.ops import boxes as box_ops
from dense_jax.ops.proposals import (
    HEAD_WEIGHTS,
    RPN_WEIGHTS,
    AnchorsOf,
    ProposalRule,
    Proposals,
    propose_each,
    whole_grid,
)

Batch = dict[str, Any]
LossFn = Callable[[Callable[..., Any], Batch, jax.Array], Losses]


@dataclasses.dataclass(frozen=True)
class AnchorRule:
    """Which anchors train, and how their losses are divided.

    Attributes:
      foreground, background: IoU from which an anchor stands for an object, and below which it
        stands for none.
      sample: number of anchors drawn from an image.
      max_foreground: largest number of them that stand for an object.
      beta: width of the quadratic part of the smooth L1 loss; 0 is the L1 loss.
      inside: anchors that cross the edge of the image do not train (py-faster-rcnn, Detectron).
      fixed_count: divides by `sample` times the number of images (detectron2), not by the number
        of anchors drawn.
      plus_one: as in py-faster-rcnn; see `dense_jax.ops.boxes`. The anchors are `last_inside` then.
      box_weight: factor of the box loss.
    """

    foreground: float = 0.7
    background: float = 0.3
    sample: int = 256
    max_foreground: int = 128
    beta: float = 1 / 9
    inside: bool = False
    fixed_count: bool = False
    plus_one: bool = False
    box_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class RoiRule:
    """Which proposals train the box head.

    Attributes:
      foreground: IoU from which a proposal has the class of an object.
      background: proposals with an IoU in [low, high) are background.
      sample: number of proposals drawn from an image.
      max_foreground: largest number of them with a class.
      beta: width of the quadratic part of the smooth L1 loss; 0 is the L1 loss.
      plus_one: as in py-faster-rcnn. The boxes of `sample_rois`, which gets proposals that are
        `last_inside`, are so too.
      class_weight, box_weight: factors of the two losses.
      hinge: the loss of classes is the sum of max(0, 1 - y s) over the classes, with y = 1 for the
        class of a box and -1 for others: support vector machines, one against the rest.
    """

    foreground: float = 0.5
    background: tuple[float, float] = (0.0, 0.5)
    sample: int = 512
    max_foreground: int = 128
    beta: float = 1 / 9
    plus_one: bool = False
    class_weight: float = 1.0
    box_weight: float = 1.0
    hinge: bool = False


def smooth_l1(errors: jax.Array, beta: float) -> jax.Array:
    """Returns 0.5 x^2 / beta where |x| < beta, else |x| - beta / 2, of each error."""
    size = jnp.abs(errors)
    if beta == 0:
        return size
    return jnp.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)


def match_anchors(
    anchors: jax.Array, boxes: jax.Array, valid: jax.Array, size: jax.Array, rule: AnchorRule
) -> targets.Matches:
    """Returns the object of each anchor of an image; the best ones of an object are forced.

    Args:
      anchors: [N, 4].
      boxes: [G, 4], of the objects, at least one or padding.
      valid: bool [G].
      size: int32 [2], height and width of the image before padding.
      rule: which anchors train.
    """
    candidates = None
    boxes = box_ops.last_inside(boxes) if rule.plus_one else boxes
    if rule.inside:
        height, width = size.astype(anchors.dtype)
        candidates = box_ops.inside(anchors, (height, width), plus_one=rule.plus_one)
    return targets.match(
        box_ops.iou(anchors, boxes, plus_one=rule.plus_one),
        valid,
        foreground=rule.foreground,
        background=rule.background,
        force=True,
        candidates=candidates,
    )


def anchor_losses(
    logits: jax.Array,
    deltas: jax.Array,
    anchors: jax.Array,
    objects: dict[str, jax.Array],
    sizes: jax.Array,
    uniform: jax.Array,
    rule: AnchorRule,
) -> Losses:
    """Returns {"rpn_class": (sum, count), "rpn_box": (sum, count)} of a batch.

    Args:
      logits: [B, N], of all levels in turn.
      deltas: [B, N, 4].
      anchors: [N, 4].
      objects: "boxes" [B, G, 4] and "valid" [B, G].
      sizes: int32 [B, 2], height and width of the images before padding.
      uniform: [B, N], random numbers in [0, 1).
      rule: which anchors train.
    """
    chex.assert_rank([logits, deltas, anchors, uniform], [2, 3, 2, 2])
    chex.assert_equal_shape([logits, uniform])
    anchors = jnp.asarray(anchors)

    def one(
        logits: jax.Array,
        deltas: jax.Array,
        boxes: jax.Array,
        valid: jax.Array,
        size: jax.Array,
        uniform: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        matches = match_anchors(anchors, boxes, valid, size, rule)
        drawn = targets.sample(matches.label, uniform, rule.sample, rule.max_foreground)
        own = logits[drawn.index]
        entropy = jax.nn.softplus(jnp.where(drawn.foreground, -own, own))
        own_boxes = box_ops.last_inside(boxes) if rule.plus_one else boxes
        wanted = box_ops.encode(
            own_boxes[matches.index[drawn.index]],
            anchors[drawn.index],
            weights=RPN_WEIGHTS,
            plus_one=rule.plus_one,
        )
        wanted = jnp.where(drawn.foreground[:, None], wanted, 0.0)
        errors = smooth_l1(deltas[drawn.index] - wanted, rule.beta)
        return (
            jnp.sum(jnp.where(drawn.filled, entropy, 0.0)),
            jnp.sum(jnp.where(drawn.foreground[:, None], errors, 0.0)) * rule.box_weight,
            jnp.sum(drawn.filled),
        )

    classes, boxes, counts = jax.vmap(one)(
        logits, deltas, objects["boxes"], objects["valid"], sizes, uniform
    )
    count = jnp.sum(counts)
    if rule.fixed_count:
        count = jnp.asarray(rule.sample * logits.shape[0])
    return {"rpn_class": (jnp.sum(classes), count), "rpn_box": (jnp.sum(boxes), count)}


class RoiTargets(NamedTuple):
    """The sampled proposals of a batch and what the box head should say of them.

    Attributes:
      boxes: float32 [B, S, 4].
      classes: int32 [B, S], 0 is the background.
      deltas: float32 [B, S, 4], from the box to its object; 0 for the background.
      object_index: int32 [B, S], the object of each box.
      filled: bool [B, S], False for empty slots.
    """

    boxes: jax.Array
    classes: jax.Array
    deltas: jax.Array
    object_index: jax.Array
    filled: jax.Array


def sample_rois(
    proposals: Proposals, objects: dict[str, jax.Array], uniform: jax.Array, rule: RoiRule
) -> RoiTargets:
    """Draws the proposals that train the box head; boxes of objects take part as proposals.

    The proposals are constants: no gradient flows into them.

    Args:
      proposals: boxes [B, R, 4] and valid [B, R].
      objects: "boxes" [B, G, 4], "classes" [B, G] and "valid" [B, G].
      uniform: [B, R + G], random numbers in [0, 1).
      rule: which proposals train.
    """

    def one(
        boxes: jax.Array,
        ok: jax.Array,
        truth: jax.Array,
        classes: jax.Array,
        valid: jax.Array,
        uniform: jax.Array,
    ) -> RoiTargets:
        truth = box_ops.last_inside(truth) if rule.plus_one else truth
        boxes = jnp.concatenate([boxes, truth])
        matches = targets.match(
            box_ops.iou(boxes, truth, plus_one=rule.plus_one),
            valid,
            foreground=rule.foreground,
            background=rule.background,
            candidates=jnp.concatenate([ok, valid]),
        )
        drawn = targets.sample(matches.label, uniform, rule.sample, rule.max_foreground)
        index = matches.index[drawn.index]
        deltas = box_ops.encode(
            truth[index], boxes[drawn.index], weights=HEAD_WEIGHTS, plus_one=rule.plus_one
        )
        return RoiTargets(
            jnp.where(drawn.filled[:, None], boxes[drawn.index], 0.0),
            jnp.where(drawn.foreground, classes[index], 0),
            jnp.where(drawn.foreground[:, None], deltas, 0.0),
            index,
            drawn.filled,
        )

    fixed = lax.stop_gradient(proposals)
    return jax.vmap(one)(
        fixed.boxes, fixed.valid, objects["boxes"], objects["classes"], objects["valid"], uniform
    )


def roi_losses(logits: jax.Array, deltas: jax.Array, wanted: RoiTargets, rule: RoiRule) -> Losses:
    """Returns {"class": (sum, count), "box": (sum, count)}; both counts are the sampled boxes.

    Args:
      logits: [B, S, K], class 0 is the background.
      deltas: [B, S, K, 4].
      wanted: of `sample_rois`.
      rule: the one of `sample_rois`.
    """
    chex.assert_rank([logits, deltas], [3, 4])
    if rule.hinge:
        signs = 2 * jax.nn.one_hot(wanted.classes, logits.shape[-1]) - 1
        losses = jnp.sum(jax.nn.relu(1 - signs * logits)[..., 1:], axis=-1)
    else:
        log_p = jax.nn.log_softmax(logits)
        losses = -jnp.take_along_axis(log_p, wanted.classes[..., None], axis=-1)[..., 0]
    own = jnp.take_along_axis(deltas, wanted.classes[..., None, None], axis=2)[..., 0, :]
    errors = smooth_l1(own - wanted.deltas, rule.beta)
    count = jnp.sum(wanted.filled)
    is_object = (wanted.classes > 0)[..., None]
    return {
        "class": (rule.class_weight * jnp.sum(jnp.where(wanted.filled, losses, 0.0)), count),
        "box": (rule.box_weight * jnp.sum(jnp.where(is_object, errors, 0.0)), count),
    }


def uniforms(rng: jax.Array, index: jax.Array, count: int) -> jax.Array:
    """Returns random numbers in [0, 1), [B, count], of each image: a function of (rng, index).

    Args:
      rng: key of the step.
      index: int32 [B], the images' numbers in their split.
      count: numbers for each image.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, index)
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)


def objective(
    anchors_of: AnchorsOf,
    anchor_rule: AnchorRule | None,
    proposal_rule: ProposalRule,
    roi_rule: RoiRule | None,
    mask_rule: MaskRule | None = None,
    keypoints: bool = False,
) -> LossFn:
    """Returns the losses of end-to-end training: "rpn_class", "rpn_box", "class" and "box".

    With masks and keypoints, there are also "mask" and "keypoint".

    In alternating training (Ren et al., Section 3.2), the proposals or the head learn alone.

    The network is a `dense_jax.models.rcnn.faster_rcnn.FasterRCNN`. Batches have "images", "index",
    "objects" (see `dense_jax.data.detection.PadObjects`) and, where images are padded, "size".

    Args:
      anchors_of: (size of the padded images, sizes of the maps) -> anchors of each map, [N_l, 4].
      anchor_rule: which anchors train; None: proposals do not learn.
      proposal_rule: which of them become proposals.
      roi_rule: which proposals train the box head; None: it does not learn.
      mask_rule: how masks train, of a `dense_jax.models.rcnn.mask_rcnn.MaskRCNN`; None: not at all.
      keypoints: whether its keypoints train.
    """

    def losses(apply: Callable[..., Any], batch: Batch, rng: jax.Array) -> Losses:
        objects, sizes = batch["objects"], _sizes(batch)
        levels = apply(batch["images"], method="features")
        logits, deltas = apply(levels, method="propose")
        anchors = anchors_of(batch["images"].shape[1:3], [level.shape[1:3] for level in levels])
        for_anchors, for_rois = jax.random.split(rng)
        result = {}
        if anchor_rule is not None:
            all_anchors = jnp.concatenate(anchors)
            uniform = uniforms(for_anchors, batch["index"], len(all_anchors))
            all_logits, all_deltas = (jnp.concatenate(x, axis=1) for x in (logits, deltas))
            result = anchor_losses(
                all_logits, all_deltas, all_anchors, objects, sizes, uniform, anchor_rule
            )
        if roi_rule is None:
            return result
        fixed = lax.stop_gradient((logits, deltas))
        proposals = propose_each(*fixed, anchors, sizes, proposal_rule)
        of_head = _head_losses(
            apply, levels, proposals, batch, for_rois, roi_rule, mask_rule, keypoints
        )
        return result | of_head

    return losses


def head_objective(
    rule: RoiRule,
    anchors_of: AnchorsOf | None = None,
    mask_rule: MaskRule | None = None,
    keypoints: bool = False,
) -> LossFn:
    """Returns the losses of Fast R-CNN, whose proposals no network makes: "class" and "box".

    Args:
      rule: which proposals train the box head.
      anchors_of: as in `objective`; all anchors are proposals then. None: batches have "proposals",
        see `dense_jax.data.detection.PadProposals`.
      mask_rule: as in `objective`.
      keypoints: as in `objective`.
    """

    def losses(apply: Callable[..., Any], batch: Batch, rng: jax.Array) -> Losses:
        levels = apply(batch["images"], method="features")
        if anchors_of is None:
            boxes, valid = batch["proposals"]["boxes"], batch["proposals"]["valid"]
            boxes = box_ops.last_inside(boxes) if rule.plus_one else boxes
            proposals = Proposals(boxes, jnp.zeros(valid.shape, boxes.dtype), valid)
        else:
            grids = [level.shape[1:3] for level in levels]
            anchors = anchors_of(batch["images"].shape[1:3], grids)
            proposals = whole_grid(anchors, _sizes(batch), plus_one=rule.plus_one)
        return _head_losses(apply, levels, proposals, batch, rng, rule, mask_rule, keypoints)

    return losses


def _head_losses(
    apply: Callable[..., Any],
    levels: Sequence[jax.Array],
    proposals: Proposals,
    batch: Batch,
    rng: jax.Array,
    rule: RoiRule,
    mask_rule: MaskRule | None,
    keypoints: bool,
) -> Losses:
    objects = batch["objects"]
    count = proposals.boxes.shape[1] + objects["boxes"].shape[1]
    wanted = sample_rois(proposals, objects, uniforms(rng, batch["index"], count), rule)
    # Boxes with a class come first.
    num = min(rule.max_foreground, wanted.boxes.shape[1])
    first = jax.tree.map(lambda x: x[:, :num], wanted)
    boxes = box_ops.with_edges(first.boxes) if rule.plus_one else first.boxes
    if mask_rule is None:
        scores, moves = apply(levels, wanted.boxes, method="classify")
        result = {}
    else:
        scores, moves, masks = apply(levels, wanted.boxes, num, method="classify_and_draw")
        index, sizes, bins = first.object_index, _sizes(batch), masks.shape[2]
        drawn = mask_targets(objects, boxes, index, sizes, bins, mask_rule)
        result = mask_losses(masks, drawn, first.classes, mask_rule)
    if keypoints:
        logits = apply(levels, first.boxes, method="locate")
        cells = keypoint_targets(objects["keypoints"], boxes, first.object_index, logits.shape[2])
        result |= keypoint_losses(logits, cells, first.classes)
    return roi_losses(scores, moves, wanted, rule) | result


def _sizes(batch: Batch) -> jax.Array:
    """Returns the heights and widths of the images before padding, int32 [B, 2]."""
    images = batch["images"]
    sizes = batch.get("size")
    if sizes is None:
        sizes = jnp.broadcast_to(jnp.array(images.shape[1:3], jnp.int32), (len(images), 2))
    return sizes
