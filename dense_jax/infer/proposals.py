"""Labels an image from many boxes in it: crop, score, paste, aggregate.

Boxes are those of `dense_jax.ops.boxes`, with edges on whole pixels. All array shapes are fixed, so
all functions can be compiled.

Reference: Noh, Hong, Han, ICCV 2015, arXiv:1505.04366, Section 5.1; the release's
generate_EDeconvNet_CRF_results.m and preprocess_image_bb.m.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dense_jax.data import crops
from dense_jax.data.dataset import Source
from dense_jax.data.padded import Shapes, cut, padded_shapes, prepare
from dense_jax.infer.crf import refine
from dense_jax.infer.whole_image import ONE_PASS, PredictFn
from dense_jax.ops import boxes as box_ops
from dense_jax.ops.crf import CrfParams

Aggregate = Literal["max", "sum", "mean"]
MaxInit = Literal["zero", "neg_inf"]


def sliding_boxes(sizes: jax.Array) -> jax.Array:
    """Returns the boxes [B, 39, 4] of `dense_jax.data.crops.sliding_windows`, the largest first.

    Args:
      sizes: heights and widths of the images, [B, 2].
    """
    sides = sizes.astype(jnp.int32)[:, jnp.array([1, 0, 1, 0])]
    boxes = (jnp.asarray(crops.relative_windows())[None] * sides[:, None] + 6) // 12
    return boxes.astype(jnp.float32)


def crop_boxes(images: jax.Array, boxes: jax.Array, size: int) -> jax.Array:
    """Crops one box from each image and resizes it, [B, H, W, C] to [B, size, size, C].

    It resizes bilinearly, with antialiasing for boxes that shrink, as Pillow does for training
    images and Matlab in the release. Pixels outside the image are zero, the mean colour of a
    normalised image. A box may extend beyond the image by up to the image's width or height.

    Args:
      images: [B, H, W, C].
      boxes: [B, 4].
      size: height and width of the result.
    """

    def weights(start: jax.Array, stop: jax.Array, length: int) -> jax.Array:
        pixels = jnp.arange(-length, 2 * length, dtype=jnp.float32)
        step = (stop - start) / size
        centres = start + (jnp.arange(size, dtype=jnp.float32) + 0.5) * step - 0.5
        inside = (pixels >= start) & (pixels < stop)
        return _triangle(centres, pixels, step, inside[None])[:, length : 2 * length]

    return _apply(weights, images, boxes, (images.shape[1], images.shape[2]))


def paste_scores(
    scores: jax.Array, boxes: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Resizes scores to their boxes and pastes them into images of `size`.

    Args:
      scores: [B, s, s, C].
      boxes: [B, 4].
      size: height and width of the images.

    Returns:
      [B, H, W, C], zero outside the box, and bool [B, H, W], True inside.
    """

    def weights(start: jax.Array, stop: jax.Array, length: int) -> jax.Array:
        pixels = jnp.arange(length, dtype=jnp.float32)
        step = scores.shape[1] / jnp.maximum(stop - start, 1)
        centres = (pixels + 0.5 - start) * step - 0.5
        inside = (pixels >= start) & (pixels < stop)
        taps = jnp.arange(scores.shape[1], dtype=jnp.float32)
        return _triangle(centres, taps, step, inside[:, None])

    ys, xs = (jnp.arange(n, dtype=jnp.float32)[None] for n in size)
    x0, y0, x1, y1 = (boxes[:, i : i + 1] for i in range(4))
    rows, columns = (ys >= y0) & (ys < y1), (xs >= x0) & (xs < x1)
    return _apply(weights, scores, boxes, size), rows[:, :, None] & columns[:, None, :]


def _triangle(centres: jax.Array, at: jax.Array, step: jax.Array, inside: jax.Array) -> jax.Array:
    """Returns triangular weights [N, M] of the values at `at` for the outputs at `centres`.

    Rows sum to 1, or to 0 where no value is inside.
    """
    distance = jnp.abs(centres[:, None] - at[None]) / jnp.maximum(step, 1)
    weights = jnp.where(inside, jnp.maximum(1 - distance, 0), 0)
    total = jnp.sum(weights, axis=1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def _apply(weights: Callable, x: jax.Array, boxes: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Applies the `weights` of each box to the rows and columns of its x, [B, h, w, C]."""
    height, width = size
    rows = jax.vmap(lambda box: weights(box[1], box[3], height))(boxes)
    columns = jax.vmap(lambda box: weights(box[0], box[2], width))(boxes)
    x = jnp.einsum("buh,bhwc->buwc", rows, x.astype(jnp.float32), precision="highest")
    return jnp.einsum("bvw,buwc->buvc", columns, x, precision="highest")


def aggregate(
    score_fn: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    boxes: jax.Array,
    valid: jax.Array,
    *,
    size: int,
    how: Aggregate = "max",
    max_init: MaxInit = "zero",
) -> jax.Array:
    """Aggregates the scores of boxes to scores of images, one box of every image at a time.

    Args:
      score_fn: the network, [B, size, size, C] to scores [B, size, size, classes].
      images: [B, H, W, C].
      boxes: [B, N, 4].
      valid: bool [B, N], whether to use a box.
      size: height and width of the network's input.
      how: elementwise maximum, sum or mean over the boxes that cover a pixel.
      max_init: "zero" starts the maximum at zero, as the release does, so no score is negative;
        "neg_inf" takes the maximum of the scores alone.

    Returns:
      Float32 [B, H, W, classes]. Pixels without a box have zeros: their label is the first class.
    """
    image_size = (images.shape[1], images.shape[2])
    crop = jax.ShapeDtypeStruct((images.shape[0], size, size, images.shape[3]), jnp.float32)
    num_classes = jax.eval_shape(score_fn, crop).shape[-1]
    start = -jnp.inf if how == "max" and max_init == "neg_inf" else 0.0

    def add(total: jax.Array, count: jax.Array, box: jax.Array, is_valid: jax.Array) -> tuple:
        scores = score_fn(crop_boxes(images, box, size))
        pasted, inside = paste_scores(scores, box, image_size)
        inside &= is_valid.reshape(-1, 1, 1)
        new = jnp.maximum(total, pasted) if how == "max" else total + pasted
        return jnp.where(inside[..., None], new, total), count + inside.astype(jnp.int32)

    def step(carry: tuple, item: tuple) -> tuple[tuple, None]:
        box, is_valid = item
        return lax.cond(jnp.any(is_valid), add, lambda *args: args[:2], *carry, box, is_valid), None

    carry = (
        jnp.full((images.shape[0], *image_size, num_classes), start, jnp.float32),
        jnp.zeros((images.shape[0], *image_size), jnp.int32),
    )
    (total, count), _ = lax.scan(step, carry, (boxes.swapaxes(0, 1), valid.T))
    if how == "mean":
        total /= jnp.maximum(count, 1)[..., None].astype(jnp.float32)
    return jnp.where(count[..., None] > 0, total, 0)


@dataclasses.dataclass(frozen=True)
class BoxScores:
    """Scores images from the scores of boxes in them.

    Attributes:
      model: the network for boxes resized to ``size``.
      size: height and width of the resized boxes.
      aggregate: see `aggregate`.
      max_init: see `aggregate`.
      num: largest number of boxes for an image.
      min_side: boxes with a side shorter than this, in pixels, are not used.
    """

    model: nn.Module
    size: int
    aggregate: Aggregate
    max_init: MaxInit
    num: int
    min_side: int

    def score(
        self, variables: Any, images: jax.Array, boxes: jax.Array, valid: jax.Array
    ) -> jax.Array:
        """Returns aggregated scores [B, H, W, C] of images from boxes [B, N, 4], valid [B, N]."""

        def network(inputs: jax.Array) -> jax.Array:
            outputs: Any = self.model.apply(variables, inputs, train=False)
            return outputs["logits"]

        how = dict(size=self.size, how=self.aggregate, max_init=self.max_init)
        return aggregate(network, images, boxes, valid, **how)

    def forward(self, source: str) -> tuple[PredictFn | None, str]:
        """Returns the way to label images without known boxes, and its description.

        Args:
          source: "none" returns None, for one pass over the image; "whole" takes the image as one
            box; any other value takes the largest sliding windows.
        """
        if source == "none":
            return None, ONE_PASS
        is_whole = source == "whole"

        def predict(variables: Any, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
            boxes = sliding_boxes(sizes)[:, : 1 if is_whole else self.num]
            valid = box_ops.min_side(boxes) >= (1 if is_whole else self.min_side)
            return {"logits": self.score(variables, images, boxes, valid)}

        if is_whole:
            return predict, f"the image as one box of {self.size}x{self.size}"
        return predict, (
            f"sliding windows, the largest {self.num}, shorter side at least {self.min_side} "
            f"pixels, joined by {self.aggregate} from {self.max_init}"
        )


def label_images(
    score: Callable[..., jax.Array],
    variables: Any,
    source: Source,
    boxes: Sequence[Sequence[crops.Box]],
    *,
    normalisation: str,
    num: int,
    min_side: int,
    crf: CrfParams | None = None,
    shapes: Shapes = "exact",
) -> Iterator[np.ndarray]:
    """Yields the labels [H, W] of every image, from the image's own boxes.

    Args:
      score: (variables, images [1, H, W, C], boxes [1, num, 4], valid [1, num]) -> scores.
      variables: the network's variables.
      source: the images.
      boxes: the boxes of each image, best first.
      normalisation: a name in `dense_jax.data.normalise.NORMALISATIONS`.
      num: largest number of boxes for an image, after `min_side`.
      min_side: boxes with a side shorter than this, in pixels, are not used.
      crf: refines the scores; None does not.
      shapes: of the images; see `dense_jax.data.padded`.
    """

    @jax.jit
    def label(
        variables: Any, images: jax.Array, boxes: jax.Array, valid: jax.Array, sizes: jax.Array
    ) -> jax.Array:
        scores = score(variables, images, boxes, valid)
        if crf is not None:
            scores = refine(scores, images, sizes, crf, normalisation)
        return jnp.argmax(scores[0], axis=-1)

    sizes = [source.size(i) for i in range(len(source))]
    shape_of = padded_shapes(sizes, shapes)
    for index, size in enumerate(sizes):
        own = np.array(boxes[index], np.float32).reshape(-1, 4)
        own = own[box_ops.min_side(own) >= min_side][:num]
        padded = np.zeros((1, num, 4), np.float32)
        padded[0, : len(own)] = own
        valid = np.arange(num)[None] < len(own)
        images, image_sizes = prepare(source[index]["image"], normalisation, shape_of[size])
        yield cut(label(variables, images, padded, valid, image_sizes), size)
