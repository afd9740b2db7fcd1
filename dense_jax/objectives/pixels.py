"""Losses of pixels: softmax cross-entropy, and the divisor of its sum.

A loss is {name: (sum, count)}. The training step sums the counts over all devices and micro-batches
before it divides (`dense_jax.train.step`), so a device with only ignored pixels has no weight.
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
    """One of the losses of a network with logits at several depths or resolutions.

    Attributes:
      output: name of the logits [B, h, w, C] among the network's outputs.
      weight: factor of this loss in the sum.
      align_corners: which pixels belong to the units of logits smaller than the labels; see
        `labels_at`.
    """

    output: str = "logits"
    weight: float = 1.0
    align_corners: bool = False


def labels_at(labels: jax.Array, size: tuple[int, int], *, align_corners: bool) -> jax.Array:
    """Picks labels (or pixel weights) [..., H, W] for h x w units, without interpolation.

    Unit i of h gets pixel floor(i H / h): every eighth pixel at stride 8 (Yu and Koltun,
    arXiv:1511.07122). With ``align_corners`` it gets the pixel nearest to i (H - 1) / (h - 1):
    every eighth of 8 m + 1 pixels (DeepLab, arXiv:1412.7062).

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
    """Returns the negative log probability of each pixel's label; 0 for pixels without a score.

    A pixel is not scored if its label is `ignore_label` or outside [0, C). `dense_jax.data.check`
    reports files with ids outside the range; here such ids must not be clamped to a class.

    Args:
      logits: [B, H, W, C], any float dtype; the loss is computed in float32 or wider.
      labels: [B, H, W] integer class ids.
      ignore_label: id of pixels without a label.
      class_weights: [C] factor for pixels of each true class, e.g. `median_frequency_weights`.
      pixel_weights: [B, H, W] factor for each pixel.

    Returns:
      [B, H, W] float32 or wider; divide its sum by `count_pixels`.

    Raises:
      ValueError: the shapes do not match.
    """
    num_classes = logits.shape[-1]
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {logits.shape} do not match labels {labels.shape}")
    if class_weights is not None and class_weights.shape != (num_classes,):
        raise ValueError(f"class_weights {class_weights.shape} are not [{num_classes}]")
    if pixel_weights is not None and pixel_weights.shape != labels.shape:
        raise ValueError(f"pixel_weights {pixel_weights.shape} do not match labels {labels.shape}")
    logits, labels = at_least_float32(logits), labels.astype(jnp.int32)
    # Compare instead of gather: the gradient is elementwise; a gather's would be a scatter.
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
    num_classes: int = 255,
    ignore_label: int = 255,
    class_weights: jax.Array | None = None,
    pixel_weights: jax.Array | None = None,
) -> jax.Array:
    """Returns the divisor of the summed loss of these pixels.

    As in the loss, pixels whose label is `ignore_label` or outside [0, C) do not count.

    Args:
      labels: [B, H, W] integer class ids.
      valid: [B] bool, False for examples that only pad the batch.
      norm: "valid" counts labelled pixels, so padding with the ignore label changes nothing.
        "batch" counts images; FCN's released VGG networks have ``normalize: false``, which divides
        by the batch size, one there. "sum" divides by one. "weights" sums the weights of labelled
        pixels.
      num_classes: C.
      ignore_label: id of pixels without a label.
      class_weights: [C], as in the loss; used by "weights" only.
      pixel_weights: [B, H, W], as in the loss; used by "weights" only.

    Returns:
      float32 scalar; 0, which divides by one, for "sum".
    """
    if norm == "sum":
        return jnp.zeros((), jnp.float32)
    if norm == "batch":
        return jnp.sum(valid, dtype=jnp.int32).astype(jnp.float32)
    is_class = (labels >= 0) & (labels < num_classes) & (labels != ignore_label)
    is_scored = is_class & valid[:, None, None]
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
    """Returns the softmax losses of a network's outputs, {name of the output: (sum, count)}.

    Args:
      outputs: logits [B, h, w, C] by name.
      batch: "labels" [B, H, W], "valid" [B] and, if pixels have weights, "weights" [B, H, W].
      norm: the kind of count; see `count_pixels`.
      terms: the outputs to compare with the labels.
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
            labels,
            batch["valid"],
            norm,
            num_classes=logits.shape[-1],
            class_weights=weights,
            pixel_weights=pixel_weights,
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
    """Returns class weights that balance frequent and rare classes, [C] float32.

    The weight of a class is the median of all frequencies divided by its own frequency. A class
    that no image contains has weight 1 and does not enter the median.

    Args:
      labels: integer [H, W] maps of the training set, of any sizes.
      num_classes: C.
      definition: the frequency of a class. "eigen": its share of the labelled pixels in the images
        that contain it (Eigen and Fergus, ICCV 2015, arXiv:1411.4734, Section 6.3.2). "pixels": its
        share of all labelled pixels, as the text of SegNet says (arXiv:1511.00561, Section 3.1,
        which cites Eigen and Fergus).
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
        is_eigen = definition == "eigen"
        totals = image_pixels if is_eigen else np.broadcast_to(pixels.sum(), num_classes)
        frequency = pixels[present] / totals[present]
        weights[present] = np.median(frequency) / frequency
    return weights
