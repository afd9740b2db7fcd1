"""Detections merged from several views of an image: other sizes, and its mirror image.

Each view proposes and classifies by itself. The boxes of all views are suppressed together, and the
masks of what is left are means over the views.

References: He, Gkioxari, Dollar, Girshick, "Mask R-CNN", ICCV 2017, arXiv:1703.06870v3, Appendix B
(test-time augmentation); facebookresearch/Detectron: detectron/core/test.py (boxes as by UNION,
masks as by SOFT_AVG).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dense_jax.infer import detections
from dense_jax.infer.detections import DetectionRule, FirstStage, MaskScores
from dense_jax.ops import boxes as box_ops


@dataclasses.dataclass(frozen=True)
class View:
    """One view of the images.

    Attributes:
      scale: factor of the sizes, at most 1.
      is_flipped: whether left and right change places.
    """

    scale: float = 1.0
    is_flipped: bool = False

    def images(self, images: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns what is seen of padded images, [B, H', W', C], and its sizes without padding.

        Args:
          images: [B, H, W, C]; the true images are at their upper left, zeros below and behind.
          sizes: int32 [B, 2].
        """
        if self.scale != 1:
            rows, columns = detections.factors(images.shape[1:3], self.scale)
            images = detections.smaller(images, self.scale)
            scaled = sizes.astype(jnp.float32) * jnp.array([[rows, columns]], jnp.float32)
            sizes = jnp.ceil(scaled - 1e-3).astype(jnp.int32)
        if self.is_flipped:
            free = images.shape[2] - sizes[:, 1]
            images = jax.vmap(lambda image, shift: jnp.roll(image[:, ::-1], -shift, 1))(
                images, free
            )
        return images, sizes

    def inputs(self, inputs: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Returns given proposals [B, R, 4], shares of the images' sides, as they are seen."""
        return tuple(_flip(boxes, 1.0) if self.is_flipped else boxes for boxes in inputs)

    def boxes(self, boxes: jax.Array, size: tuple[int, int], seen: jax.Array) -> jax.Array:
        """Returns boxes [B, ..., 4] of the images as they are seen; the inverse of `in_image`.

        Args:
          boxes: with edges, in pixels of the images.
          size: height and width of the padded images.
          seen: int32 [B, 2], sizes of the view without padding.
        """
        boxes = box_ops.scale(boxes, detections.factors(size, self.scale))
        return self._flipped(boxes, seen)

    def in_image(self, boxes: jax.Array, size: tuple[int, int], seen: jax.Array) -> jax.Array:
        """Returns boxes of the view in pixels of the images; see `boxes`."""
        rows, columns = detections.factors(size, self.scale)
        return box_ops.scale(self._flipped(boxes, seen), (1 / rows, 1 / columns))

    def _flipped(self, boxes: jax.Array, seen: jax.Array) -> jax.Array:
        if not self.is_flipped:
            return boxes
        width = seen[:, 1].astype(boxes.dtype)
        return _flip(boxes, width.reshape(-1, *[1] * (boxes.ndim - 2)))


def _flip(boxes: jax.Array, width: Any) -> jax.Array:
    x0, y0, x1, y1 = (boxes[..., i] for i in range(4))
    return jnp.stack([width - x1, y0, width - x0, y1], axis=-1)


def merged(
    model: nn.Module,
    first: Callable[..., FirstStage],
    rule: DetectionRule,
    views: Sequence[View],
    masks: MaskScores | None = None,
) -> Callable[..., dict[str, jax.Array]]:
    """Returns what `dense_jax.infer.detections.two_stages` does, merged from several views.

    Args:
      model: a `dense_jax.models.rcnn.faster_rcnn.FasterRCNN`.
      first: the result of `first_stage`.
      rule: how detections are chosen from those of all views.
      views: of each image.
      masks: see `two_stages`.
    """
    score = jax.vmap(functools.partial(detections.score_boxes, rule=rule))
    choose = jax.vmap(functools.partial(detections.choose, rule=rule))
    edges, inside = (
        (box_ops.with_edges, box_ops.last_inside) if rule.plus_one else (lambda x: x, lambda x: x)
    )

    def predict(
        variables: Any, images: jax.Array, sizes: jax.Array, *inputs: jax.Array
    ) -> dict[str, jax.Array]:
        apply: Any = functools.partial(model.apply, variables, train=False)
        size: Any = images.shape[1:3]
        stages, found = [], []
        for view in views:
            seen, seen_sizes = view.images(images, sizes)
            levels, _, proposals = first(variables, seen, seen_sizes, *view.inputs(inputs))
            logits, deltas = apply(levels, proposals.boxes, method="classify")
            scores, moved = score(logits, deltas, proposals.boxes, seen_sizes)
            placed = inside(view.in_image(edges(moved), size, seen_sizes))
            stages.append((view, levels, seen_sizes))
            found.append((scores, placed, proposals.valid))
        result = choose(*(jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True)))
        if not masks:
            return result

        def draw(view: View, levels: Any, seen_sizes: jax.Array) -> jax.Array:
            places = view.boxes(result["boxes"], size, seen_sizes)
            logits = apply(levels, inside(places), method="draw")
            drawn = detections.mask_scores(logits, result, masks)
            return drawn[..., ::-1] if view.is_flipped else drawn

        each = [draw(*stage) for stage in stages]
        return result | {"masks": sum(each[1:], each[0]) / jnp.float32(len(each))}

    return predict
