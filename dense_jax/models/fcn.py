"""Fully convolutional networks FCN-32s, 16s, 8s and FCN-AlexNet.

Reference: Long, Shelhamer, Darrell, "Fully convolutional networks for semantic segmentation", CVPR
2015, arXiv:1411.4038: Sections 3 and 4, Figure 3. Padding, crops, names and initialisation follow
the authors' release (shelhamer/fcn.berkeleyvision.org: voc-fcn32s, 16s, 8s, alexnet net.py,
surgery.py). The release has dense up-convolutions with zeros between classes; ours are depthwise.
"""

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dense_jax.layers import init
from dense_jax.layers.conv import Conv, UpConv
from dense_jax.models import vgg
from dense_jax.models.vgg import Grid, Layer, Stack
from dense_jax.ops.precision import at_least_float32

_IMAGE = Grid()
# The layer that each fusion adds, and the up-convolution that enlarges the coarser scores to it.
_SKIPS = (("pool4", "upscore2"), ("pool3", "upscore_pool4"))
_SCORE = {"fc7": "score_fr", "pool4": "score_pool4", "pool3": "score_pool3"}
_LAST = {32: "upscore", 16: "upscore16", 8: "upscore8"}
_SCORE_INIT = {"zero": init.zero, "normal": init.normal(0.01)}  # Caffe's usual standard deviation.


def _score(x: jax.Array, num_classes: int, kernel_init: str, dtype, name: str) -> jax.Array:
    """Scores each unit by a 1x1 convolution, in float32, as all sums of scores are."""
    conv = Conv(num_classes, 1, kernel_init=_SCORE_INIT[kernel_init], dtype=dtype, name=name)
    return at_least_float32(conv(x))


def _upsample(
    scores: jax.Array, grid: Grid, window: tuple[int, int, int], trainable: bool, name: str
) -> tuple[jax.Array, Grid]:
    """Enlarges the map of each class by an up-convolution of `window` (kernel, stride, padding)."""
    num_classes = scores.shape[-1]
    layer = UpConv(
        num_classes,
        *window,
        groups=num_classes,
        use_bias=False,
        trainable=trainable,
        kernel_init=init.bilinear(),
        name=name,
    )
    return layer(scores), grid.up_conv(*window)


def _crop(x: jax.Array, offset: int, size: tuple[int, int]) -> jax.Array:
    return x[:, offset : offset + size[0], offset : offset + size[1]]


class FCN(nn.Module):
    """FCN on VGG-16; maps images [B, H, W, 3], any H, W >= 1, to logits [B, H, W, num_classes].

    Attributes:
      num_classes: number of classes.
      stride: stride of the finest scores in pixels. 32 uses fc7 alone, 16 adds pool4, 8 adds pool3.
      pad_mode: "100" pads conv1_1 by 100 and crops, as the release does. "same" pads images with
        zeros at the bottom and right to a multiple of 32; then all layers align without crops.
      upsample: which bilinear up-convolutions learn: none, all but the last, all (Section 4.3).
      fuse: how to fuse scores of two strides (Section 4.2).
      single_skip: "pool4" scores pool4 alone, without the layers above; it needs stride 16.
      skip_scale: factors of pool4 and pool3 in front of the score layers. The release has
        (0.01, 0.0001) in the 8s network that trains all strides at once, and 1 in the others.
      score_init: initial kernels of the score layers.
      width: channel multiplier of the VGG layers.
      dropout_rate: dropout rate behind fc6 and fc7.
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      dtype: computation dtype of trunk and score layers; fusion and upsampling use float32.
    """

    num_classes: int
    stride: Literal[32, 16, 8] = 8
    pad_mode: Literal["100", "same"] = "100"
    upsample: Literal["fixed", "learned_inner", "learned_all"] = "fixed"
    fuse: Literal["sum", "max"] = "sum"
    single_skip: Literal["none", "pool4"] = "none"
    skip_scale: tuple[float, float] = (1.0, 1.0)
    score_init: Literal["zero", "normal"] = "zero"
    width: float = 1.0
    dropout_rate: float = 0.5
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    def padded_side(self, side: int) -> int:
        """Returns the side to which the network pads images, in pixels."""
        return -(-side // 32) * 32 if self.pad_mode == "same" else side

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits" in float32, the uncropped score maps and the trunk's layers by name."""
        if self.single_skip != "none" and self.stride != 16:
            raise ValueError(f"Scores of pool4 alone need stride 16; received {self.stride}.")
        size = vgg.image_size(images)
        first, skips = "fc7", _SKIPS[: {32: 0, 16: 1, 8: 2}[self.stride]]
        if self.single_skip != "none":
            first, skips = self.single_skip, ()
        same = self.pad_mode == "same"
        edges = ((0, self.padded_side(side) - side) for side in size)
        images = jnp.pad(images, ((0, 0), *edges, (0, 0)))

        trunk = vgg.vgg16(
            padding="same" if same else "caffe",
            first_padding=1 if same else 100,
            last=first,
            width=self.width,
            dropout_rate=self.dropout_rate,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        nn.share_scope(self, trunk)  # The release has conv1_1 and score_fr on one level.
        outputs, grids = trunk(images, train=train), vgg.grids(trunk.layers)

        scale = {"fc7": 1.0, "pool4": self.skip_scale[0], "pool3": self.skip_scale[1]}

        def score(layer: str) -> jax.Array:
            name, x = _SCORE[layer], outputs[layer] * scale[layer]
            outputs[name] = _score(x, self.num_classes, self.score_init, self.dtype, name)
            return outputs[name]

        def window(stride: int) -> tuple[int, int, int]:
            return 2 * stride, stride, stride // 2 if same else 0

        scores, grid = score(first), grids[first]
        for layer, name in skips:
            scores, grid = _upsample(scores, grid, window(2), self.upsample != "fixed", name)
            skip = _crop(score(layer), grids[layer].index_of(grid), vgg.image_size(scores))
            scores = jnp.maximum(scores, skip) if self.fuse == "max" else scores + skip
        name, trainable = _LAST[self.stride], self.upsample == "learned_all"
        scores, grid = _upsample(scores, grid, window(self.stride), trainable, name)
        outputs["logits"] = _crop(scores, grid.index_of(_IMAGE), size)
        return outputs


ALEXNET_LAYERS = (
    Layer("conv1", 11, 4, 100, 96),
    Layer("pool1", 3, 2),
    Layer("norm1"),
    Layer("conv2", 5, 1, 2, 256, groups=2),
    Layer("pool2", 3, 2),
    Layer("norm2"),
    Layer("conv3", 3, 1, 1, 384),
    Layer("conv4", 3, 1, 1, 384, groups=2),
    Layer("conv5", 3, 1, 1, 256, groups=2),
    Layer("pool5", 3, 2),
    Layer("fc6", 6, 1, 0, 4096),
    Layer("fc7", 1, 1, 0, 4096),
)


class FCNAlexNet(nn.Module):
    """FCN-32s on Caffe's AlexNet; maps images [B, H, W, 3], any H, W >= 1, to logits of their size.

    Attributes: see `FCN`. Grouped layers of thin networks have an even number of channels.

    Reference: Krizhevsky, Sutskever, Hinton, NIPS 2012. As in Caffe's bvlc_reference_caffenet, some
    convolutions have two groups, and pooling comes before normalisation.
    """

    num_classes: int
    score_init: Literal["zero", "normal"] = "zero"
    width: float = 1.0
    dropout_rate: float = 0.5
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits" in float32, "score_fr" and the trunk's layers by name."""
        size = vgg.image_size(images)
        trunk = Stack(
            ALEXNET_LAYERS,
            width=self.width,
            dropout_rate=self.dropout_rate,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        nn.share_scope(self, trunk)
        outputs, grid = trunk(images, train=train), vgg.grids(ALEXNET_LAYERS)["fc7"]
        outputs["score_fr"] = scores = _score(
            outputs["fc7"], self.num_classes, self.score_init, self.dtype, "score_fr"
        )
        scores, grid = _upsample(scores, grid, (63, 32, 0), False, "upscore")
        outputs["logits"] = _crop(scores, grid.index_of(_IMAGE), size)
        return outputs


fcn32s = functools.partial(FCN, stride=32)
fcn16s = functools.partial(FCN, stride=16)
fcn8s = functools.partial(FCN, stride=8)
AT_ONCE = (0.01, 0.0001)  # `skip_scale` of the network that trains all strides at once.
fcn8s_at_once = functools.partial(FCN, stride=8, skip_scale=AT_ONCE)
fcn_alexnet = FCNAlexNet
