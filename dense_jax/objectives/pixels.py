"""Losses of pixels: softmax cross-entropy, and what its sum is divided by.

A loss is {name: (sum, count)}. The training step adds up the counts over all devices and
micro-batches before it divides (`dense_jax.train.step`), so a device that sees only ignored pixels
weighs nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dense_jax.ops.precision import at_least_float32

LossNorm = Literal["valid", "batch", "sum", "weights"]
ClassFrequency = Literal["pixels", "eigen"]


class LossTerm(NamedTuple):
    """One of the losses of a network that scores at several places or resolutions.

    Attributes:
      output: name of the scores [B, h, w, C] among the network's outputs.
      weight: factor of this loss in the sum.
      align_corners: which pixels the units of scores smaller than the labels stand for; see
        `labels_at`.
    """

    output: str = "logits"
    weight: float = 1.0
    align_corners: bool = False


def labels_at(labels: jax.Array, size: tuple[int, int], *, align_corners: bool) -> jax.Array:
    """Returns the labels (or pixel weights) [..., H, W] of the pixels that h x w units stand for.

    Unit i of h stands for pixel floor(i H / h), every eighth at stride 8 (Yu and Koltun,
    arXiv:1511.07122), or with ``align_corners`` for the pixel nearest to i (H - 1) / (h - 1), which
    is every eighth on 8 m + 1 pixels (DeepLab, arXiv:1412.7062). Labels are picked, never mixed.

    Raises:
      ValueError: there are more units than pixels.
    """
    for axis, (units, pixels) in enumerate(zip(size, labels.shape[-2:], strict=True), start=-2):
        if units > pixels:
            raise ValueError(f"Scores of {size} are larger than labels {labels.shape}.")
        if units == pixels:
            continue
        index = np.arange(units)
        if align_corners:  # rounds half up, in integers
            steps = max(units - 1, 1)
            index = (2 * index * (pixels - 1) + steps) // (2 * steps)
        else:
            index = index * pixels // units
        labels = jnp.take(labels, index, axis=axis)
    return labels


def softmax_cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    *,
    ignore_label: int = 255,
    class_weights: jax.Array | None = None,
    pixel_weights: jax.Array | None = None,
) -> jax.Array:
    """Negative log probability of each pixel's label; 0 where the pixel is not scored.

    A pixel is not scored if its label is `ignore_label` or outside [0, C). Ids outside the range
    are a fault of the data, which `dense_jax.data.check` reports by file; here they only must not
    turn into a class by clamping.

    Args:
      logits: [B, H, W, C], any float dtype; the loss is computed in float32 or wider.
      labels: [B, H, W] integer class ids.
      ignore_label: id of pixels without a label.
      class_weights: [C] factor for pixels of each true class, e.g. `median_frequency_weights`.
      pixel_weights: [B, H, W] factor for each pixel.

    Returns:
      [B, H, W] float32 or wider, to be summed and divided by `count_pixels`.

    Raises:
      ValueError: if the shapes do not fit each other.
    """
    num_classes = logits.shape[-1]
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {logits.shape} do not match labels {labels.shape}")
    if class_weights is not None and class_weights.shape != (num_classes,):
        raise ValueError(f"class_weights {class_weights.shape} are not [{num_classes}]")
    if pixel_weights is not None and pixel_weights.shape != labels.shape:
        raise ValueError(f"pixel_weights {pixel_weights.shape} do not match labels {labels.shape}")
    logits, labels = at_least_float32(logits), labels.astype(jnp.int32)
    # A comparison instead of a gather: its gradient is elementwise, the gather's a scatter.
    is_label = labels[..., None] == lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    label_logits = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - label_logits
    if class_weights is not None:
        loss *= jnp.take(class_weights.astype(loss.dtype), labels, mode="clip")
    if pixel_weights is not None:
        loss *= pixel_weights.astype(loss.dtype)
    is_scored = (labels != ignore_label) & (labels >= 0) & (labels < num_classes)
    return jnp.where(is_scored, loss, 0.0)


def count_pixels(
    labels: jax.Array,
    valid: jax.Array,
    norm: LossNorm,
    *,
    ignore_label: int = 255,
    class_weights: jax.Array | None = None,
    pixel_weights: jax.Array | None = None,
) -> jax.Array:
    """What the summed loss of these pixels is divided by.

    Args:
      labels: [B, H, W] integer class ids.
      valid: [B] bool, False for examples that only fill up the batch.
      norm: "valid" counts labelled pixels (padding an image with ignore changes nothing), "batch"
        counts images (FCN's released VGG networks: ``normalize: false`` divides by the batch size,
        which is one there), "sum" divides by one, "weights" sums the weights of labelled pixels.
      ignore_label: id of pixels without a label.
      class_weights: [C], as given to the loss; only "weights" looks at them.
      pixel_weights: shaped as `labels`, as given to the loss; only "weights" looks at them.

    Returns:
      float32 scalar; 0, which divides by one, for "sum".
    """
    if norm == "sum":
        return jnp.zeros((), jnp.float32)
    if norm == "batch":
        return jnp.sum(valid, dtype=jnp.int32).astype(jnp.float32)
    is_scored = (labels != ignore_label) & valid[:, None, None]
    if norm == "valid":  # counted as integers: a float32 sum is inexact above 2**24
        return jnp.sum(is_scored, dtype=jnp.int32).astype(jnp.float32)
    if norm != "weights":
        raise ValueError(f"loss norm {norm!r} is none of {', '.join(get_args(LossNorm))}")
    weights = jnp.where(is_scored, jnp.float32(1), 0.0)
    if class_weights is not None:
        weights *= jnp.take(class_weights.astype(jnp.float32), labels, mode="clip")
    if pixel_weights is not None:
        weights *= pixel_weights.astype(jnp.float32)
    return jnp.sum(weights)


def cross_entropy(
    outputs: Mapping[str, jax.Array],
    batch: Mapping[str, Any],
    *,
    norm: LossNorm = "valid",
    terms: Sequence[LossTerm] = (LossTerm(),),
    class_weights: np.ndarray | None = None,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The softmax losses of a network's outputs, {name of the output: (sum, count)}.

    Args:
      outputs: scores [B, h, w, C] by name.
      batch: "labels" [B, H, W], "valid" [B] and, where pixels are weighted, "weights" [B, H, W].
      norm: what is counted; see `count_pixels`.
      terms: which outputs are compared with the labels.
      class_weights: [C] factor for pixels of each true class, or None.
    """
    weights = None if class_weights is None else jnp.asarray(class_weights, jnp.float32)
    losses = {}
    for term in terms:
        logits = outputs[term.output]
        size = (logits.shape[1], logits.shape[2])
        pixels = {
            name: labels_at(batch[name], size, align_corners=term.align_corners)
            for name in ("labels", "weights")
            if name in batch
        }
        labels, pixel_weights = pixels["labels"], pixels.get("weights")
        pixel_loss = softmax_cross_entropy(
            logits, labels, class_weights=weights, pixel_weights=pixel_weights
        )
        count = count_pixels(
            labels, batch["valid"], norm, class_weights=weights, pixel_weights=pixel_weights
        )
        losses[term.output] = (term.weight * jnp.sum(pixel_loss), count)
    return losses


def median_frequency_weights(
    labels: Iterable[np.ndarray],
    num_classes: int,
    *,
    definition: ClassFrequency = "eigen",
    ignore_label: int = 255,
) -> np.ndarray:
    """Class weights that balance frequent and rare classes, [C] float32.

    The weight of a class is the median of all frequencies over its own. A class that no image
    contains has weight 1 and does not enter the median.

    Args:
      labels: integer [H, W] maps of the training set, of any sizes.
      num_classes: C.
      definition: what the frequency of a class is: "eigen", its share of the labelled pixels of
        those images that contain it (Eigen and Fergus, ICCV 2015, arXiv:1411.4734, Section 6.3.2);
        "pixels", its share of all labelled pixels (as SegNet's text reads, arXiv:1511.00561,
        Section 3.1, which cites the former).
      ignore_label: id of pixels without a label.

    Raises:
      ValueError: the definition is neither.
    """
    if definition not in get_args(ClassFrequency):
        raise ValueError(f"definition {definition!r} is none of {get_args(ClassFrequency)}")
    pixels = np.zeros(num_classes, np.int64)
    image_pixels = np.zeros(num_classes, np.int64)
    for label in labels:
        scored = label[(label != ignore_label) & (label >= 0) & (label < num_classes)]
        counts = np.bincount(scored.astype(np.int64), minlength=num_classes)
        pixels += counts
        image_pixels += np.where(counts > 0, counts.sum(), 0)
    weights = np.ones(num_classes, np.float32)
    present = pixels > 0
    if present.any():
        of = image_pixels if definition == "eigen" else np.broadcast_to(pixels.sum(), num_classes)
        frequency = pixels[present] / of[present]
        weights[present] = np.median(frequency) / frequency
    return weights
