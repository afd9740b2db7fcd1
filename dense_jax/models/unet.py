"""U-Net: a contracting and an expanding path with skips, as in the paper, the release, or padded.

Reference: Ronneberger, Fischer, Brox, "U-Net: convolutional networks for biomedical image
segmentation", MICCAI 2015, arXiv:1505.04597, Figure 1 and Section 2. Names are those of the
authors' release (phseg_v5): conv_d0a-b maps d0a to d0b, upconv_d4c_u3a maps d4c to u3a.
"""

import functools
import itertools
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dense_jax.layers import init
from dense_jax.layers.conv import Conv, UpConv
from dense_jax.layers.dropout import Dropout
from dense_jax.layers.norm import BatchNorm
from dense_jax.models.vgg import image_size
from dense_jax.ops.pool import max_pool
from dense_jax.ops.precision import at_least_float32
from dense_jax.ops.resize import resize_bilinear, resize_nearest

Up = Literal["upconv", "bilinear_conv", "nearest_conv"]

_scaling = jax.nn.initializers.variance_scaling
# Pixels that one level removes from each side, for each kind of upsampling: a 3x3 convolution
# removes one, and bilinear interpolation has one that it can only guess at the edge.
_UP_LOSS = {"upconv": 0, "nearest_conv": 1, "bilinear_conv": 2}


def _kernel_init(name: str, fan_in_share: float = 1.0) -> init.Initializer:
    """Returns an initialiser of variance 2 / N (paper, Section 3) or 1 / N (Caffe's "xavier").

    N is the number of incoming connections.

    Args:
      name: "he" or "xavier".
      fan_in_share: share of the kernel's taps that reach one output; a quarter in an up-convolution
        of 2x2 taps and stride 2.
    """
    if name == "he":
        return _scaling(2.0 / fan_in_share, "fan_in", "truncated_normal")
    return _scaling(1.0 / fan_in_share, "fan_in", "uniform")


def _crop(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Crops the same number of pixels from opposite sides, to [B, *size, C]."""
    top, left = (x.shape[1] - size[0]) // 2, (x.shape[2] - size[1]) // 2
    return x[:, top : top + size[0], left : left + size[1]]


class UNet(nn.Module):
    """U-Net; maps images [B, H, W, C] to logits [B, H - 2 context, W - 2 context, num_classes].

    Attributes:
      num_classes: number of classes.
      variant: "release" differs from the paper's figure: it has ReLUs behind up-convolutions, and
        its last up-convolution has twice the channels.
      padding: "valid" as published: each receptive field lies in the image, and H and W are
        `min_side` or larger by a multiple of `grid`. "same" pads with zeros and takes multiples of
        `grid`.
      up: the upsampling: an up-convolution of 2x2 taps and stride 2, or a resize by 2 and a 3x3
        convolution, which needs more context.
      depth: number of poolings.
      width: channels of the first level; each pooling doubles them.
      norm: normalisation behind the 3x3 convolutions, which then have no bias. "group" (up to 32
        groups) averages over the whole tile, so that neighbouring tiles do not agree.
      dropout_rate: dropout rate on the last two levels of the contracting path.
      kernel_init: "he" as in the paper, or "xavier" as in the release.
      bn_momentum: decay of the running averages.
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      dtype: computation dtype; logits are float32.
    """

    num_classes: int
    variant: Literal["paper", "release"] = "paper"
    padding: Literal["valid", "same"] = "valid"
    up: Up = "upconv"
    depth: int = 4
    width: int = 64
    norm: Literal["none", "batch", "group"] = "none"
    dropout_rate: float = 0.5
    kernel_init: Literal["he", "xavier"] = "he"
    bn_momentum: float = 0.9
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    @property
    def grid(self) -> int:
        """Stride of the deepest level; a shift of the image by it shifts the logits by it."""
        return 2**self.depth

    @property
    def context(self) -> int:
        """Pixels by which an image is larger than its logits on each side; 92 as published."""
        if self.padding == "same":
            return 0
        return 6 * self.grid - 4 + _UP_LOSS[self.up] * (self.grid - 1)

    @property
    def min_side(self) -> int:
        """The smallest image side; 188 as published. Larger sides add multiples of `grid`."""
        if self.padding == "same":
            return self.grid
        return 2 * self.context + 1 + (-4 - 2 * self.context - 1) % self.grid

    def padded_side(self, side: int) -> int:
        """Returns the least side, from this one on, of images that the network takes, in pixels."""
        steps = jax.core.max_dim(0, -((self.min_side - side) // self.grid))
        return self.min_side + steps * self.grid

    def check_side(self, side: int) -> None:
        """Raises ValueError with the nearest valid sides if `side` is not valid."""
        steps, rest = divmod(side - self.min_side, self.grid)
        if steps < 0 or rest:
            below, above = (
                self.min_side + max(0, step) * self.grid for step in (steps, steps + bool(rest))
            )
            raise ValueError(
                f"A side of {side} pixels does not fit: with {self.padding} convolutions and "
                f"{self.depth} poolings sides are {self.min_side} + {self.grid} m; the nearest are "
                + (f"{below} and {above}." if below < above else f"{above} and up.")
            )

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits" in float32, and the layers by name: d0b, d0c, ..., d4c, u3a, ..., u0d.

        Raises:
          ValueError: images do not have the shape [B, H, W, C], or H or W is not a valid side.
        """
        for side in image_size(images):
            self.check_side(side)
        x, outputs = images, {}
        padding = 0 if self.padding == "valid" else 1
        conv3 = functools.partial(
            Conv, kernel_size=3, padding=padding, kernel_init=_kernel_init(self.kernel_init),
            dtype=self.dtype,
        )  # fmt: skip

        def convs(x: jax.Array, level: str, features: int, blobs: str) -> jax.Array:
            """Applies the level's two convolutions; ``blobs`` names input, middle and output."""
            for first, second in itertools.pairwise(blobs):
                use_bias = self.norm == "none"
                x = conv3(features, use_bias=use_bias, name=f"conv_{level}{first}-{second}")(x)
                x = nn.relu(self._norm(x, f"bn_{level}{second}", train))
                outputs[level + second] = x
            return x

        for level in range(self.depth + 1):
            if level > 0:
                x = max_pool(x, 2, 2)
            x = convs(x, f"d{level}", self.width * 2**level, "abc")
            if level >= self.depth - 1:
                x = outputs[f"d{level}c"] = Dropout(self.dropout_rate, self.axis_name)(
                    x, train=train
                )

        source = f"d{self.depth}c"
        for level in reversed(range(self.depth)):
            features = self.width * 2**level
            keeps_all = self.variant == "release" and level == 0
            x = self._enlarge(x, features * (2 if keeps_all else 1), f"upconv_{source}_u{level}a")
            x = nn.relu(x) if self.variant == "release" else x
            outputs[f"u{level}a"] = x
            skip = _crop(outputs[f"d{level}c"], image_size(x))
            x = convs(jnp.concatenate([x, skip], axis=-1), f"u{level}", features, "bcd")
            source = f"u{level}d"

        score = Conv(
            self.num_classes,
            1,
            kernel_init=_kernel_init(self.kernel_init),
            dtype=self.dtype,
            name="conv_u0d-score",
        )
        outputs["logits"] = at_least_float32(score(x))
        return outputs

    def _norm(self, x: jax.Array, name: str, train: bool) -> jax.Array:
        if self.norm == "batch":
            return BatchNorm(
                use_running_average=not train,
                momentum=self.bn_momentum,
                axis_name=self.axis_name,
                name=name,
            )(x)
        if self.norm == "group":
            groups = math.gcd(32, x.shape[-1])
            return nn.GroupNorm(groups, epsilon=1e-5, dtype=self.dtype, name=name)(x)
        return x

    def _enlarge(self, x: jax.Array, features: int, name: str) -> jax.Array:
        """Doubles height and width, and sets the number of channels."""
        if self.up == "upconv":
            kernel_init = _kernel_init(self.kernel_init, fan_in_share=1 / 4)
            return UpConv(features, 2, 2, kernel_init=kernel_init, dtype=self.dtype, name=name)(x)
        size, valid = (2 * x.shape[1], 2 * x.shape[2]), self.padding == "valid"
        if self.up == "nearest_conv":
            x = resize_nearest(x, size)
        else:
            x = resize_bilinear(x, size, align_corners=False)
            x = _crop(x, (size[0] - 2, size[1] - 2)) if valid else x  # the edge is extrapolated
        kernel_init = _kernel_init(self.kernel_init)
        padding = 0 if valid else 1
        conv = Conv(
            features, 3, padding=padding, kernel_init=kernel_init, dtype=self.dtype, name=name
        )
        return conv(x)


unet = UNet
unet_release = functools.partial(UNet, variant="release", kernel_init="xavier")
unet_same = functools.partial(UNet, padding="same")
