"""Hypercolumns: the units above a pixel in several layers describe the pixel.

A linear classifier of the concatenated, upsampled layers is a sum of one classifier per layer, and
each of them commutes with upsampling. So a small convolution scores each tapped layer at its own
resolution, and the scores are enlarged and added. No network here builds the 4736 or more values
per pixel; only `hypercolumns` does, for tests and figures.

`Hypercolumns` is for semantic segmentation of whole images. `BoxHypercolumns` is the authors'
release: one mask for each box and category.

Reference: Hariharan, Arbelaez, Girshick, Malik, "Hypercolumns for object segmentation and
fine-grained localization", CVPR 2015, arXiv:1411.5752; names, constants and initialisation of the
box network follow the first author's later code (bharath272/sds, on Fast R-CNN features).
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dense_jax.layers import init
from dense_jax.layers.conv import Conv
from dense_jax.layers.dropout import Dropout
from dense_jax.layers.norm import BatchNorm
from dense_jax.models import vgg
from dense_jax.models.fcn import ALEXNET_LAYERS
from dense_jax.models.vgg import Grid, Stack
from dense_jax.ops import location_grid
from dense_jax.ops.box_upsample import box_interpolation, box_upsample, interpolation
from dense_jax.ops.pool import max_pool
from dense_jax.ops.precision import at_least_float32

Taps = Literal["fc7", "fc7_pool2", "fc7_conv4", "pool2_conv4", "all"]
TapScale = Literal["none", "fixed", "l2", "bn"]
Mix = Literal["after_prob", "before_prob"]
Joint = Literal["end_to_end", "independent_cells"]
Kernels = tuple[int, int, int]

_LEVELS = ("pool2", "conv4", "fc7")
# VGG-16 has three layers conv4; this is the last one. The release taps pool3 and pool4 instead.
_LAYERS = {
    "vgg16": {"pool2": "pool2", "conv4": "conv4_3", "fc7": "fc7"},
    "alexnet": {"pool2": "pool2", "conv4": "conv4", "fc7": "fc7"},
    "sds_vgg": {"pool2": "pool3", "conv4": "pool4", "fc7": "fc7"},
}
# The release has factors for pool3 and pool4; pool2 and conv4_3 take those of their neighbours.
_FACTORS = {"pool2": 0.0027, "conv4": 0.063, "fc7": 1.0}
_HEADS = {"pool2": "conv_pool3", "conv4": "conv_pool4", "fc7": "fcfc7"}  # Names of the release.


def _levels(taps: Taps) -> tuple[str, ...]:
    return _LEVELS if taps == "all" else tuple(taps.split("_"))


class TapScaling(nn.Module):
    """Scales a tapped layer [B, H, W, C], so that one learning rate suits all taps.

    Attributes:
      kind: "none"; "fixed" multiplies by `factor`; "l2" scales the values of each unit to a root
        mean square of 1; "bn" normalises each channel over the batch, without a learned scale and
        bias, because a linear classifier follows.
      momentum: decay of the running averages of "bn".
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      factor: factor of "fixed".
    """

    kind: TapScale
    momentum: float
    axis_name: str | None
    factor: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H, W, C]."""
        if self.kind == "fixed":
            return x * self.factor
        if self.kind == "l2":
            square = jnp.mean(jnp.square(at_least_float32(x)), axis=-1, keepdims=True)
            return x * jax.lax.rsqrt(square + 1e-6).astype(x.dtype)
        if self.kind == "bn":
            return BatchNorm(
                use_running_average=not train,
                momentum=self.momentum,
                use_bias=False,
                use_scale=False,
                axis_name=self.axis_name,
                name="norm",
            )(x)
        return x


def _matrix(grid: Grid, units: int, pixels: int) -> jax.Array:
    """Returns the matrix [pixels, units] that interpolates a layer's units at the pixels."""
    at = (jnp.arange(pixels, dtype=jnp.float32) - grid.first) / grid.step
    return interpolation(at, units)


class Hypercolumns(nn.Module):
    """The fully convolutional form; maps images [B, H, W, 3] to logits [B, H, W, num_classes].

    Images have any H, W >= 1. For VGG-16, zeros pad them at the bottom and right to a multiple of
    32, so that all layers align. AlexNet's first layer pads by 100, as in `FCNAlexNet`.

    Attributes:
      num_classes: number of classes.
      backbone: "vgg16" taps pool2, conv4_3 and fc7; "alexnet" pool2, conv4 and fc7.
      taps: which of the three layers are tapped; the backbone ends at the last of them.
      tap_kernels: kernel sizes of the classifiers of pool2, conv4 and fc7.
      tap_scale: how to scale the tapped layers, see `TapScaling`.
      grid: K; K x K classifiers share the image, and 1 is an ordinary classifier.
      mix: whether a pixel averages its neighbouring classifiers after (the paper) or before the
        softmax.
      joint: "independent_cells" trains each classifier on the pixels of its own cell alone (the
        paper's simple scheme); evaluation averages all the same.
      width: channel multiplier of the backbone.
      dropout_rate: dropout rate behind fc6 and fc7.
      bn_momentum: decay of the running averages of tap_scale="bn".
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      dtype: computation dtype of backbone and score layers; sums of scores use float32.
    """

    num_classes: int
    backbone: Literal["vgg16", "alexnet"] = "vgg16"
    taps: Taps = "all"
    tap_kernels: Kernels = (1, 1, 1)
    tap_scale: TapScale = "none"
    grid: int = 1
    mix: Mix = "after_prob"
    joint: Joint = "end_to_end"
    width: float = 1.0
    dropout_rate: float = 0.5
    bn_momentum: float = 0.9
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    def padded_side(self, side: int) -> int:
        """Returns the side to which the network pads images, in pixels."""
        return -(-side // 32) * 32 if self.backbone == "vgg16" else side

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, sizes: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns "logits" in float32, the taps' scores and the backbone's layers by name.

        Args:
          images: [B, H, W, 3].
          train: whether to drop units and to update statistics.
          sizes: [B, 2] heights and widths without padding, which the grid of classifiers covers;
            None: images have no padding.
        """
        size, cells = vgg.image_size(images), self.grid
        trunk = self._trunk()
        nn.share_scope(self, trunk)
        edges = ((0, self.padded_side(side) - side) for side in size)
        images = jnp.pad(images, ((0, 0), *edges, (0, 0)))
        outputs, grids = trunk(images, train=train), vgg.grids(trunk.layers)

        extents = (None, None) if sizes is None else jnp.moveaxis(sizes, -1, 0)
        hard = train and self.joint == "independent_cells"
        high, wide = (
            location_grid.neighbours(pixels, cells, extent=extent, hard=hard)
            for pixels, extent in zip(size, extents, strict=True)
        )
        scaling = functools.partial(TapScaling, self.tap_scale, self.bn_momentum, self.axis_name)
        conv = functools.partial(Conv, kernel_init=init.normal(0.01), dtype=self.dtype)
        features, total = self.num_classes * cells * cells, jnp.zeros(())
        for level in _levels(self.taps):
            layer, kernel = _LAYERS[self.backbone][level], self.tap_kernels[_LEVELS.index(level)]
            x = scaling(_FACTORS[level], name=f"{layer}_scale")(outputs[layer], train=train)
            scores = at_least_float32(conv(features, kernel, name=f"score_{layer}")(x))
            outputs[f"score_{layer}"] = scores
            batch, *units = scores.shape[:3]
            rows, columns = (_matrix(grids[layer], n, m) for n, m in zip(units, size, strict=True))
            scores = scores.reshape(batch, *units, cells, cells, self.num_classes)
            total += location_grid.evaluate(scores, rows, columns, high, wide)
        if self.mix == "after_prob" and cells > 1:
            total = jax.nn.log_softmax(total)
            outputs["logits"] = location_grid.mix_probabilities(total, high, wide)
        else:
            outputs["logits"] = location_grid.mix_scores(total, high, wide)
        return outputs

    def _trunk(self) -> Stack:
        """Returns the layers up to the last tap."""
        names = [_LAYERS[self.backbone][level] for level in _levels(self.taps)]
        table = ALEXNET_LAYERS if self.backbone == "alexnet" else vgg.vgg16_layers(1, 3)
        end = max(i for i, layer in enumerate(table, 1) if layer.name in names)
        return Stack(
            table[:end],
            ceil=self.backbone == "alexnet",
            width=self.width,
            dropout_rate=self.dropout_rate,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )


def hypercolumns(
    outputs: dict[str, jax.Array],
    grids: dict[str, Grid],
    layers: Sequence[str],
    size: tuple[int, int],
) -> jax.Array:
    """Returns the hypercolumns of all pixels: the layers, upsampled bilinearly and concatenated.

    Args:
      outputs: layers by name, [B, h, w, C].
      grids: positions of their units on the image.
      layers: names of the layers to use.
      size: height and width of the image.

    Returns:
      [B, *size, sum of C].
    """
    columns = []
    for layer in layers:
        x = outputs[layer]
        rows, cols = (_matrix(grids[layer], n, m) for n, m in zip(x.shape[1:3], size, strict=True))
        columns.append(jnp.einsum("yh,xw,bhwc->byxc", rows, cols, x, precision="highest"))
    return jnp.concatenate(columns, axis=-1)


class BoxHypercolumns(nn.Module):
    """The released SDS-VGG16: a mask for each box and category.

    The network scores the taps once for the whole image, and enlarges the scores in each box to the
    size of the heat map. fc7 is computed for each box and gives one constant score per classifier.

    Attributes:
      num_categories: number of categories without background.
      taps: as in `Hypercolumns`, with pool3 and pool4 in place of pool2 and conv4.
      tap_kernels: kernel sizes of the classifiers of pool3, pool4 and fc7; that of fc7 is 1.
      tap_scale: how to scale the tapped layers; "fixed" in the release.
      grid: K; 5 in the release, 10 in the paper.
      mix: whether to average neighbouring classifiers after (the paper) or before the sigmoid.
      joint, width, dropout_rate, bn_momentum, axis_name: as in `Hypercolumns`.
      heatmap: height and width of the heat map.
      dtype: computation dtype of trunk and score layers.

    The release rounds boxes to whole units of conv5_3 and pools them. Here bilinear interpolation
    crops boxes to 14 x 14 without rounding, and 2 x 2 pooling follows. The release divides
    inclusive corners by the image's sides less one, (x0 - 1/2, x1 + 1/2) / (W - 1). Here edges are
    divided by sides, which differs by half a pixel at most.
    """

    num_categories: int
    taps: Taps = "all"
    tap_kernels: Kernels = (3, 1, 1)
    tap_scale: TapScale = "fixed"
    grid: int = 5
    mix: Mix = "after_prob"
    joint: Joint = "end_to_end"
    heatmap: int = 50
    width: float = 1.0
    dropout_rate: float = 0.5
    bn_momentum: float = 0.9
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        boxes: jax.Array | None = None,
        categories: jax.Array | None = None,
        *,
        train: bool,
    ) -> dict[str, jax.Array]:
        """Predicts the masks of objects.

        Args:
          images: [B, H, W, 3].
          boxes: [B, N, 4], (x0, y0, x1, y1) in pixels, the outer edges; default: one box, the
            image.
          categories: [B, N] integers in [0, num_categories); default: 0.
          train: whether to drop units and to update statistics.

        Returns:
          "log_probabilities", float32 [B, N, heatmap, heatmap, 2], that a pixel is outside and
          inside the object; also the scores and the trunk's layers.

        Raises:
          ValueError: images or boxes have another shape, or the kernel size of fc7 is not 1.
        """
        height, width = vgg.image_size(images)
        if boxes is None or categories is None:
            whole = jnp.array([0, 0, width, height], jnp.float32).reshape(1, 1, 4)
            boxes = jnp.broadcast_to(whole, (images.shape[0], 1, 4))
            categories = jnp.zeros((images.shape[0], 1), jnp.int32)
        if boxes.shape != (images.shape[0], *categories.shape[1:], 4):
            raise ValueError(
                f"Expected boxes [B, N, 4] and categories [B, N] for images {images.shape}, "
                f"received {boxes.shape} and {categories.shape}."
            )
        if self.tap_kernels[2] != 1:
            raise ValueError(
                f"fc7 of a box is one unit: its kernel size is 1, not {self.tap_kernels[2]}."
            )
        levels = _levels(self.taps)
        last = "conv5_3" if "fc7" in levels else _LAYERS["sds_vgg"][levels[-1]]
        trunk = vgg.vgg16(padding="same", last=last, width=self.width, dtype=self.dtype)
        nn.share_scope(self, trunk)
        # As whole multiples, which sizes left open stay.
        edges = ((0, -(-side // 16) * 16 - side) for side in (height, width))
        images = jnp.pad(images, ((0, 0), *edges, (0, 0)))
        outputs = trunk(images, train=train)
        padded = jnp.array(vgg.image_size(images)[::-1] * 2, jnp.float32)
        boxes = boxes / padded.reshape(1, 1, 4)
        x0, y0, x1, y1 = jnp.moveaxis(boxes, -1, 0)

        chosen = jax.nn.one_hot(categories, self.num_categories)
        hard = train and self.joint == "independent_cells"
        high = wide = location_grid.neighbours(self.heatmap, self.grid, hard=hard)
        scaling = functools.partial(TapScaling, self.tap_scale, self.bn_momentum, self.axis_name)
        conv = functools.partial(Conv, kernel_init=init.normal(0.01), dtype=self.dtype)
        per_category = (self.num_categories, self.grid, self.grid)
        total = jnp.zeros(())
        for level in levels:
            layer, kernel = _LAYERS["sds_vgg"][level], self.tap_kernels[_LEVELS.index(level)]
            if level == "fc7":
                outputs["fc7"] = self._box_features(outputs["conv5_3"], boxes, train)
            x = scaling(_FACTORS[level], name=f"{layer}_scale")(outputs[layer], train=train)
            scores = conv(math.prod(per_category), kernel, name=_HEADS[level])(x)
            outputs[_HEADS[level]] = scores = at_least_float32(scores)
            if level == "fc7":  # One unit for each box, constant over the box.
                scores = scores.reshape(*categories.shape, 1, 1, *per_category)
                scores = jnp.einsum("bnhwckl,bnc->bnhwkl", scores, chosen, precision="highest")
            else:
                scores = scores.reshape(*scores.shape[:3], *per_category)
                scores = jnp.einsum("bhwckl,bnc->bnhwkl", scores, chosen, precision="highest")
            rows = box_interpolation(y0, y1, self.heatmap, scores.shape[2])
            columns = box_interpolation(x0, x1, self.heatmap, scores.shape[3])
            total += location_grid.evaluate(scores[..., None], rows, columns, high, wide)
        if self.mix == "after_prob":
            log_p = location_grid.mix_probabilities(_log_sigmoids(total), high, wide)
        else:
            log_p = _log_sigmoids(location_grid.mix_scores(total, high, wide))
        outputs["log_probabilities"] = log_p
        return outputs

    def _box_features(self, x: jax.Array, boxes: jax.Array, train: bool) -> jax.Array:
        """Maps conv5_3 and boxes [B, N, 4], fractions of the image, to fc7, [B N, 1, 1, C]."""
        x = box_upsample(x, boxes, (14, 14))
        x = max_pool(x.reshape(-1, *x.shape[2:]), 2, 2)
        features = vgg.scaled(4096, self.width)
        for name, kernel in (("fc6", 7), ("fc7", 1)):
            x = nn.relu(Conv(features, kernel, padding=0, dtype=self.dtype, name=name)(x))
            x = Dropout(self.dropout_rate, self.axis_name)(x, train=train)
        return x


def _log_sigmoids(scores: jax.Array) -> jax.Array:
    """Returns the logarithms of (1 - p, p), [..., 2], for scores [..., 1]."""
    return jnp.concatenate([jax.nn.log_sigmoid(-scores), jax.nn.log_sigmoid(scores)], axis=-1)


sds_vgg = functools.partial(BoxHypercolumns, num_categories=20)
