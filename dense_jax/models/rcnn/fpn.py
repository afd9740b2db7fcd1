"""The feature pyramid: maps with equally many channels, at strides of 4 to 64 pixels.

Reference: Lin, Dollar, Girshick, He, Hariharan, Belongie, "Feature pyramid networks for object
detection", CVPR 2017, arXiv:1612.03144, Section 3 and Figure 3; pytorch/vision:
torchvision/ops/feature_pyramid_network.py.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from dense_jax.layers import init
from dense_jax.layers.conv import Conv
from dense_jax.ops.resize import resize_nearest


class FeaturePyramid(nn.Module):
    """Maps the stages (C2, C3, C4, C5) of a network to the levels (P2, ..., P6), finest first.

    A 1x1 convolution of each stage is added to the coarser sum, enlarged by repeating pixels; a 3x3
    convolution of the sum is the level. There are no ReLUs. P6 is every second pixel of P5.

    Attributes:
      features: channels of the levels.
      norm: function that builds a normalisation behind each convolution, (*, use_running_average,
        name), in place of biases (torchvision's v2); None for no normalisation.
      dtype: computation dtype of convolutions.
    """

    features: int = 256
    norm: Callable[..., nn.Module] | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(
        self, stages: Sequence[jax.Array], *, train: bool = False
    ) -> tuple[jax.Array, ...]:
        """Maps [B, H_i, W_i, C_i] to [B, H_i, W_i, features], and adds a level of half the size."""
        conv = functools.partial(
            Conv,
            self.features,
            use_bias=self.norm is None,
            kernel_init=init.xavier_fan_in,
            dtype=self.dtype,
        )

        def layer(x: jax.Array, kernel_size: int, kind: str, level: int) -> jax.Array:
            x = conv(kernel_size, name=f"{kind}_blocks_{level}")(x)
            if self.norm is None:
                return x
            return self.norm(use_running_average=not train, name=f"{kind}_norms_{level}")(x)

        levels: list[jax.Array] = []
        above = None
        for i, stage in reversed(list(enumerate(stages))):
            total = layer(stage, 1, "inner", i)
            if above is not None:
                total = total + resize_nearest(above, (total.shape[1], total.shape[2]))
            levels.insert(0, layer(total, 3, "layer", i))
            above = total
        return (*levels, levels[-1][:, ::2, ::2])
