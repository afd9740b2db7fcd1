"""From the outputs of a detector to its detections, in arrays of fixed sizes.

Everything here works on one image; use `jax.vmap` for a batch. Boxes are those of
`dense_jax.ops.boxes`, in pixels of the padded image; the true image is at its upper left.

Reference: Ren, He, Girshick, Sun, "Faster R-CNN", NIPS 2015, arXiv:1506.01497; pytorch/vision:
torchvision/models/detection/roi_heads.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dense_jax.data.padded import BUCKET
from dense_jax.ops import boxes as box_ops
from dense_jax.ops.nms import nms
from dense_jax.ops.proposals import (
    HEAD_WEIGHTS,
    AnchorsOf,
    ProposalRule,
    Proposals,
    propose_each,
    whole_grid,
)
from dense_jax.ops.resize import rescaled, resize_bilinear

ProposalsOf = Callable[..., Proposals]
"""(apply of the network, maps, size of the padded images, sizes of the images [B, 2], *inputs) ->
the proposals of a batch."""

MaskScores = Literal["sigmoid", "softmax"]
"""How logits of masks become probabilities; see `dense_jax.objectives.masks.MaskRule`."""

_LEAST_DETECTION = 1e-2  # pixels, of both sides
_SUITABLE_SIDE = 224  # pixels of a box, as of ImageNet's images


@dataclasses.dataclass(frozen=True)
class DetectionRule:
    """How detections are chosen.

    Attributes:
      count: D, the largest number of detections of an image.
      min_score: detections have a probability above this.
      max_iou: of two detections of a class with a larger IoU the lower score is dropped.
      candidates: number of pairs of a box and a class, of the highest scores, that take part.
      min_side: detections with a shorter side than this, in pixels, are dropped.
      plus_one: as in py-faster-rcnn; see `dense_jax.ops.boxes`. The proposals are `last_inside`
        then; detections have edges, as always.
      is_moved: False leaves the proposals where they are (Fast R-CNN, Table 6).
      one_against_rest: scores are sigmoids of each class's own logit, as of support vector
        machines, and no softmax.
    """

    count: int = 100
    min_score: float = 0.05
    max_iou: float = 0.5
    candidates: int = 1000
    min_side: float = _LEAST_DETECTION
    plus_one: bool = False
    is_moved: bool = True
    one_against_rest: bool = False


def detect(
    logits: jax.Array,
    deltas: jax.Array,
    boxes: jax.Array,
    valid: jax.Array,
    size: jax.Array,
    rule: DetectionRule,
) -> dict[str, jax.Array]:
    """Returns "boxes" [D, 4], "classes" int32 [D], "scores" [D] and "valid" bool [D].

    The detections have the highest scores first. Also returns "overflow", bool: whether more pairs
    had a score above the limit than take part, and fewer than D of those survived; only then could
    a larger `DetectionRule.candidates` give other detections.

    Args:
      logits: [R, K], class 0 is the background.
      deltas: [R, K, 4], of each class.
      boxes: [R, 4], the proposals.
      valid: bool [R].
      size: int32 [2], height and width of the true image.
      rule: how to choose.
    """
    scores, moved = score_boxes(logits, deltas, boxes, size, rule)
    return choose(scores, moved, valid, rule)


def score_boxes(
    logits: jax.Array, deltas: jax.Array, boxes: jax.Array, size: jax.Array, rule: DetectionRule
) -> tuple[jax.Array, jax.Array]:
    """Returns the score of each class but the background, [R, K - 1], and its box, [R, K - 1, 4].

    The arguments are those of `detect`.
    """
    scores = jax.nn.sigmoid(logits) if rule.one_against_rest else jax.nn.softmax(logits, axis=-1)
    scores = scores[:, 1:]
    one, limits = rule.plus_one, tuple(size.astype(boxes.dtype))
    if rule.is_moved:
        moved = box_ops.decode_inside(
            deltas[:, 1:], boxes[:, None], limits, weights=HEAD_WEIGHTS, plus_one=one
        )
    else:
        moved = box_ops.clip(boxes, limits, plus_one=one)[:, None]
        moved = jnp.broadcast_to(moved, (*scores.shape, 4))
    return scores, moved


def choose(
    scores: jax.Array, moved: jax.Array, valid: jax.Array, rule: DetectionRule
) -> dict[str, jax.Array]:
    """Returns what `detect` does, of the results of `score_boxes`; valid is bool [R]."""
    one, num_classes = rule.plus_one, scores.shape[1]
    good = valid[:, None] & (scores > rule.min_score)
    good &= box_ops.min_side(moved, plus_one=one) >= rule.min_side
    good &= jnp.all(jnp.isfinite(moved), axis=-1)
    ranked = jnp.where(good, scores, -jnp.inf).ravel()
    top, index = lax.top_k(ranked, min(rule.candidates, ranked.shape[0]))
    places, classes = moved.reshape(-1, 4)[index], index % num_classes + 1
    takes_part = top > -jnp.inf
    kept = nms(places, takes_part, rule.max_iou, groups=classes, plus_one=one)
    places = box_ops.with_edges(places) if one else places
    best, order = lax.top_k(jnp.where(kept, top, -jnp.inf), min(rule.count, top.shape[0]))
    is_kept = best > -jnp.inf
    free = rule.count - best.shape[0]

    def slots(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, free)] + [(0, 0)] * (x.ndim - 1))

    left_out = jnp.sum(good) > top.shape[0]
    return {
        "boxes": slots(jnp.where(is_kept[:, None], places[order], 0.0)),
        "classes": slots(jnp.where(is_kept, classes[order], 0).astype(jnp.int32)),
        "scores": slots(jnp.where(is_kept, best, 0.0)),
        "valid": slots(is_kept),
        "overflow": left_out & (jnp.sum(kept) < rule.count),
    }


class FirstStage(NamedTuple):
    """What the first stage makes of a batch of images.

    Attributes:
      levels: the maps, [B, H_l, W_l, C] each.
      anchors: of all levels in turn, [N, 4].
      proposals: [B, R, ...].
    """

    levels: Sequence[jax.Array]
    anchors: jax.Array
    proposals: Proposals


def from_network(anchors_of: AnchorsOf, rule: ProposalRule) -> ProposalsOf:
    """Returns the proposals of the network's own anchors (Faster R-CNN), as `ProposalsOf`."""

    def proposals_of(
        apply: Callable[..., Any], levels: Sequence[jax.Array], size: Any, sizes: jax.Array
    ) -> Proposals:
        logits, deltas = apply(levels, method="propose")
        anchors = anchors_of(size, [level.shape[1:3] for level in levels])
        return propose_each(logits, deltas, anchors, sizes, rule)

    return proposals_of


def from_grid(anchors_of: AnchorsOf, *, plus_one: bool = False) -> ProposalsOf:
    """Returns all anchors, without a network, as `ProposalsOf`."""

    def proposals_of(
        apply: Callable[..., Any], levels: Sequence[jax.Array], size: Any, sizes: jax.Array
    ) -> Proposals:
        del apply
        anchors = anchors_of(size, [level.shape[1:3] for level in levels])
        return whole_grid(anchors, sizes, plus_one=plus_one)

    return proposals_of


def from_input(
    apply: Callable[..., Any],
    levels: Sequence[jax.Array],
    size: Any,
    sizes: jax.Array,
    given: jax.Array,
    *,
    plus_one: bool = False,
) -> Proposals:
    """Returns given proposals (Fast R-CNN); boxes without an area stand for none.

    Args:
      apply: not used, as `levels` and `size`.
      levels: not used.
      size: not used.
      sizes: int32 [B, 2], heights and widths of the true images.
      given: float32 [B, R, 4], x0 y0 x1 y1 as shares of the width and height of the true image.
      plus_one: whether the network takes boxes that are `last_inside`.
    """
    del apply, levels, size
    sides = sizes[:, jnp.array([1, 0, 1, 0])].astype(given.dtype)
    boxes = jnp.clip(given, 0.0, 1.0) * sides[:, None, :]
    valid = box_ops.min_side(boxes) > 0
    boxes = box_ops.last_inside(boxes) if plus_one else boxes
    return Proposals(boxes, jnp.zeros(valid.shape, boxes.dtype), valid)


def first_stage(
    model: nn.Module, anchors_of: AnchorsOf, proposals_of: ProposalsOf
) -> Callable[..., FirstStage]:
    """Returns (variables, images [B, H, W, C], sizes [B, 2], *inputs) -> maps, anchors, proposals.

    Args:
      model: a `dense_jax.models.rcnn.faster_rcnn.FasterRCNN`.
      anchors_of: the anchors, for those who want to see them.
      proposals_of: the proposals, such as `from_network`.
    """

    def run(variables: Any, images: jax.Array, sizes: jax.Array, *inputs: jax.Array) -> FirstStage:
        apply, size = functools.partial(model.apply, variables), images.shape[1:3]
        levels: Any = apply(images, train=False, method="features")
        anchors = anchors_of(size, [level.shape[1:3] for level in levels])
        proposals = proposals_of(apply, levels, size, sizes, *inputs)
        return FirstStage(levels, jnp.concatenate(anchors), proposals)

    return run


def with_edges(first: Callable[..., FirstStage], plus_one: bool) -> Callable[..., FirstStage]:
    """Returns a first stage whose proposals have edges, for those who look at them.

    Args:
      first: the result of `first_stage`.
      plus_one: whether its proposals are `last_inside`.
    """

    def run(*arguments: Any) -> FirstStage:
        stage = first(*arguments)
        boxes = box_ops.with_edges(stage.proposals.boxes)
        return stage._replace(proposals=stage.proposals._replace(boxes=boxes))

    return run if plus_one else first


def proposals_alone(
    first: Callable[..., FirstStage], count: int
) -> Callable[..., dict[str, jax.Array]]:
    """Returns (variables, images, sizes, *inputs) -> the best proposals as arrays of `detect`.

    All are of class 1, with the sigmoids of their logits as scores.

    Args:
      first: the result of `first_stage`, `with_edges`.
      count: D, their largest number for an image.
    """

    def predict(
        variables: Any, images: jax.Array, sizes: jax.Array, *inputs: jax.Array
    ) -> dict[str, jax.Array]:
        found = first(variables, images, sizes, *inputs).proposals

        def slots(x: jax.Array) -> jax.Array:
            free = max(0, count - x.shape[1])
            return jnp.pad(x[:, :count], [(0, 0), (0, free)] + [(0, 0)] * (x.ndim - 2))

        valid = slots(found.valid)
        return {
            "boxes": slots(jnp.where(found.valid[..., None], found.boxes, 0.0)),
            "classes": valid.astype(jnp.int32),
            "scores": jnp.where(valid, jax.nn.sigmoid(slots(found.scores)), 0.0),
            "valid": valid,
            "overflow": jnp.zeros(len(images), bool),
        }

    return predict


def two_stages(
    model: nn.Module,
    first: Callable[..., FirstStage],
    rule: DetectionRule,
    scales: Sequence[float] = (1.0,),
    masks: MaskScores | None = None,
    keypoints: bool = False,
) -> Callable[..., dict[str, jax.Array]]:
    """Returns (variables, images [B, H, W, C], sizes [B, 2], *inputs) -> arrays of `detect`.

    The arrays are [B, ...]. With masks there is also "masks", float32 [B, D, M, M], the probability
    that a cell of the box is in the object; with keypoints, "keypoint_logits" [B, D, M', M', K] of
    the cell of each; see `dense_jax.infer.keypoints`.

    Args:
      model: a `dense_jax.models.rcnn.faster_rcnn.FasterRCNN`.
      first: the result of `first_stage`.
      rule: how detections are chosen.
      scales: factors, at most 1, of the sizes of images from which boxes are classified; see
        `classify_at_scales`.
      masks: how the logits of a `dense_jax.models.rcnn.mask_rcnn.MaskRCNN` become probabilities;
        None leaves masks out.
      keypoints: whether the network finds keypoints.
    """

    def boxes_of(found: dict[str, jax.Array]) -> jax.Array:
        return box_ops.last_inside(found["boxes"]) if rule.plus_one else found["boxes"]

    def locate(apply: Any, levels: Any, found: dict[str, jax.Array]) -> jax.Array:
        logits = apply(levels, boxes_of(found), method="locate")
        return jnp.where(found["valid"][..., None, None, None], logits, 0.0)

    def draw(apply: Any, levels: Any, found: dict[str, jax.Array]) -> jax.Array:
        return mask_scores(apply(levels, boxes_of(found), method="draw"), found, masks or "sigmoid")

    def predict(
        variables: Any, images: jax.Array, sizes: jax.Array, *inputs: jax.Array
    ) -> dict[str, jax.Array]:
        levels, _, proposals = first(variables, images, sizes, *inputs)
        apply: Any = functools.partial(model.apply, variables, train=False)
        scores, moves = classify_at_scales(apply, images, levels, proposals.boxes, scales)
        choose = functools.partial(detect, rule=rule)
        found = jax.vmap(choose)(scores, moves, proposals.boxes, proposals.valid, sizes)
        branches = {"masks": draw(apply, levels, found)} if masks else {}
        if keypoints:
            branches["keypoint_logits"] = locate(apply, levels, found)
        return found | branches

    return predict


def mask_scores(logits: jax.Array, found: Mapping[str, jax.Array], masks: MaskScores) -> jax.Array:
    """Returns the probabilities [B, D, M, M] of the masks of detections; 0 where there is none.

    Args:
      logits: [B, D, M, M, K], or 1 in place of K for masks that classes share.
      found: the detections' "classes" and "valid", [B, D].
      masks: how logits become probabilities.
    """
    own = found["classes"][..., None, None, None] if logits.shape[-1] > 1 else 0
    whole = jax.nn.softmax(logits) if masks == "softmax" else jax.nn.sigmoid(logits)
    index = jnp.broadcast_to(own, (*logits.shape[:-1], 1))
    drawn = jnp.take_along_axis(whole, index, axis=-1)[..., 0]
    return jnp.where(found["valid"][..., None, None], drawn, 0.0)


def classify_at_scales(
    apply: Callable[..., Any],
    images: jax.Array,
    levels: Sequence[jax.Array],
    boxes: jax.Array,
    scales: Sequence[float],
) -> tuple[jax.Array, jax.Array]:
    """Returns logits [B, R, K] and deltas [B, R, K, 4] of boxes, each from the size that suits it.

    A box is classified where its area is closest to 224 x 224 pixels.

    Args:
      apply: (*inputs, method) -> output of the network's method.
      images: [B, H, W, C], with their padding.
      levels: the maps of the images, which serve for a factor of 1.
      boxes: [B, R, 4], in pixels of the images.
      scales: factors of the sizes, at most 1; images are resized by linear interpolation.

    Reference: Girshick, "Fast R-CNN", ICCV 2015, arXiv:1504.08083, Section 2.4; He, Zhang, Ren,
    Sun, "Spatial pyramid pooling", ECCV 2014, arXiv:1406.4729, Section 4.1.
    """
    size: Any = images.shape[1:3]
    outputs, distances = [], []
    for scale in scales:
        if scale == 1:
            outputs.append(apply(levels, boxes, method="classify"))
            distances.append(_unsuitable(boxes))
            continue
        own = box_ops.scale(boxes, factors(size, scale))
        maps = apply(smaller(images, scale), method="features")
        outputs.append(apply(maps, own, method="classify"))
        distances.append(_unsuitable(own))
    if len(outputs) == 1:
        return outputs[0]
    best = jnp.argmin(jnp.stack(distances), axis=0)[None]

    def chosen(each: Sequence[jax.Array]) -> jax.Array:
        stacked = jnp.stack(each)
        index = best.reshape(*best.shape, *[1] * (stacked.ndim - best.ndim))
        return jnp.take_along_axis(stacked, index, axis=0)[0]

    logits, deltas = zip(*outputs, strict=True)
    return chosen(logits), chosen(deltas)


def smaller(images: jax.Array, scale: float) -> jax.Array:
    """Returns images [B, H, W, C] of another size, padded at their ends to multiples of 32."""
    size = _rescaled(images.shape[1:3], scale)
    edges = [(0, -side % BUCKET) for side in size]
    resized = resize_bilinear(images, size, align_corners=False)
    return jnp.pad(resized, [(0, 0), *edges, (0, 0)])


def factors(size: Any, scale: float) -> tuple[float, float]:
    """Returns by what `smaller` changes height and width, which it rounds."""
    height, width = _rescaled(size, scale)
    return height / size[0], width / size[1]


def _rescaled(size: Any, scale: float) -> tuple[int, int]:
    height, width = (max(1, rescaled(side, scale)) for side in size)
    return height, width


def _unsuitable(boxes: jax.Array) -> jax.Array:
    """Returns how far the areas of boxes are from the suitable one, in pixels, [...]."""
    return jnp.abs(box_ops.area(boxes) - _SUITABLE_SIDE**2)
