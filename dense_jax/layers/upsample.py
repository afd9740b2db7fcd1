"""Ways to double the size of a feature map, for comparison of their checkerboard artefacts.

An up-convolution places overlapping copies of its kernel. With k taps and stride s, the overlap is
even only if s divides k. Otherwise some outputs get more copies than others, in a pattern that
repeats with the stride. Resizing followed by a convolution with stride 1 has no such pattern.

Reference: Odena, Dumoulin, Olah, "Deconvolution and checkerboard artifacts", Distill 2016,
doi:10.23915/distill.00003; Shi et al., sub-pixel convolution, arXiv:1609.05158.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dense_jax.layers import init
from dense_jax.layers.conv import Conv, UpConv
from dense_jax.ops.resize import resize_bilinear, resize_nearest

Kind = Literal[
    "deconv_k2s2",
    "deconv_k3s2",
    "deconv_k4s2",
    "resize_nearest_conv",
    "resize_bilinear_conv",
    "subpixel",
]

# Kernel size, padding and output padding of up-convolutions that exactly double the size.
_DECONV = {"deconv_k2s2": (2, 0, 0), "deconv_k3s2": (3, 1, 1), "deconv_k4s2": (4, 1, 0)}


def depth_to_space(x: jax.Array, block: int) -> jax.Array:
    """Rearranges [B, H, W, block^2 C] to [B, block H, block W, C] (torch's pixel shuffle).

    Channel (a block + b) C + c of a pixel becomes channel c of pixel (a, b) in its block.
    """
    batch, height, width, channels = x.shape
    if channels % block**2:
        raise ValueError(f"{channels} channels are no multiple of {block} x {block}.")
    x = x.reshape(batch, height, width, block, block, channels // block**2)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height * block, width * block, -1)


class Upsample2x(nn.Module):
    """Doubles height and width, [B, H, W, C] to [B, 2H, 2W, features]; linear, with bias.

    Attributes:
      features: number of output channels.
      kind: deconv_kNs2 is an up-convolution with N x N taps and stride 2. resize_nearest_conv and
        resize_bilinear_conv resize and then apply a 3x3 convolution whose padding repeats the edge.
        subpixel applies a 3x3 convolution to 4 x features channels and then `depth_to_space`.
      dtype: computation dtype. None: that of the input and the parameters.
      kernel_init: initialiser of the kernel.
    """

    features: int
    kind: Kind
    dtype: jax.typing.DTypeLike | None = None
    kernel_init: init.Initializer = init.he

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, 2H, 2W, features].

        Raises:
          ValueError: the kind is not one of `Kind`.
        """
        shared = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        if self.kind in _DECONV:
            size, padding, rest = _DECONV[self.kind]
            layer = UpConv(
                self.features, size, 2, padding=padding, output_padding=rest, name="up", **shared
            )
            return layer(x)
        if self.kind == "subpixel":
            y = Conv(4 * self.features, 3, name="conv", **shared)(x)
            return depth_to_space(y, 2)
        size = (2 * x.shape[1], 2 * x.shape[2])
        if self.kind == "resize_nearest_conv":
            x = resize_nearest(x, size)
        elif self.kind == "resize_bilinear_conv":
            x = resize_bilinear(x, size, align_corners=False)
        else:
            raise ValueError(f"Unknown kind {self.kind!r} of upsampling.")
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        return Conv(self.features, 3, padding=0, name="conv", **shared)(x)
