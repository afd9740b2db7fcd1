"""ResNet-50 and 101 and ResNeXt-101 as feature extractors of any output stride.

Every stage is returned by name. Parameters have torchvision's names with "_" in front of block
numbers: `layer1.0.downsample.1.weight` is "layer1_0/downsample_1/scale".

A stage that is to keep the size of its input takes stride 1 and dilates its 3x3 convolutions
instead. Its first block still reads the previous, finer grid: where the 3x3 convolution strides
(torchvision), it keeps the dilation of the stage before; where the 1x1 convolution in front strides
(He et al.'s release), the 3x3 convolution lies behind the stride and takes the new dilation. These
two pairs see the same pixels as the strided network, at more places; the other two do not.

Reference: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016,
arXiv:1512.03385, Table 1; Xie et al., "Aggregated residual transformations for deep neural
networks", CVPR 2017, arXiv:1611.05431, Table 1; dilation as in Chen et al. (DeepLab v2),
arXiv:1606.00915, Section 3.1, and pytorch/vision: torchvision/models/resnet.py.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dense_jax.layers import init
from dense_jax.layers.conv import Conv
from dense_jax.layers.norm import BatchNorm
from dense_jax.models.vgg import image_size, scaled
from dense_jax.ops.pool import max_pool
from dense_jax.ops.precision import at_least_float32

StrideIn = Literal["3x3", "1x1"]
FirstBlockDilation = Literal["previous", "new"]

# Variance 2 / fan-out, as torchvision initialises residual networks.
_HE_FAN_OUT = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_PLANES = (64, 128, 256, 512)  # Channels inside the blocks of each stage; outside four times these.
_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; [B, H, W, C] to [B, H / s, W / s, features].

    The shortcut is a 1x1 convolution, "downsample_0" and "downsample_1", where asked for.

    Attributes:
      conv: builds a convolution without bias: (features, kernel_size, *, strides, ..., name).
      norm: builds a normalisation: (*, scale_init, name).
      inner: channels of the 3x3 convolution.
      features: channels of the result.
      stride: s, of the convolution that `stride_in` names and of the shortcut.
      dilation: of the 3x3 convolution.
      groups: of the 3x3 convolution (ResNeXt's cardinality).
      stride_in: the convolution that strides; see `ResNet`.
      has_downsample: whether the shortcut is a convolution.
      last_scale_init: initial scale of the last normalisation.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    inner: int
    features: int
    stride: int
    dilation: int
    groups: int
    stride_in: StrideIn
    has_downsample: bool
    last_scale_init: init.Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, features], rounded up."""
        conv, norm = self.conv, self.norm
        first, middle = (self.stride, 1) if self.stride_in == "1x1" else (1, self.stride)
        shortcut = x
        if self.has_downsample:
            shortcut = conv(self.features, 1, strides=self.stride, name="downsample_0")(x)
            shortcut = norm(name="downsample_1")(shortcut)
        y = conv(self.inner, 1, strides=first, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(
            self.inner,
            3,
            strides=middle,
            dilation=self.dilation,
            groups=self.groups,
            name="conv2",
        )(y)
        y = nn.relu(norm(name="bn2")(y))
        y = conv(self.features, 1, name="conv3")(y)
        y = norm(scale_init=self.last_scale_init, name="bn3")(y)
        return nn.relu(y + shortcut)


class ResNet(nn.Module):
    """A residual network; maps images [B, H, W, C], any H, W >= 1, to its stages by name.

    Attributes:
      depths: blocks of the four stages.
      groups: groups of the 3x3 convolutions.
      group_width: channels of each group in the first stage; doubled from stage to stage.
      output_stride: of layer4, in pixels; 16 dilates layer4, 8 layer3 and layer4.
      stride_in: the convolution of a block that strides: "3x3" (torchvision) or the "1x1" in front
        of it (He et al.'s release, MSRA's, in Caffe).
      first_block_dilation: of the first block of a dilated stage: that of the stage before, or the
        new one; see the top of this file. torchvision is ("3x3", "previous"), DeepLab v2 ("1x1",
        "new").
      pool_ceil: pooling sizes are rounded up, as in Caffe, rather than down, as in torch.
      pool_padding: of the pooling, in pixels; 0 in He et al.'s release.
      bn: "frozen" keeps batch statistics, scales and biases as they are, in training too.
      bn_momentum: decay of the running averages.
      bn_epsilon: added to the variance.
      zero_init_residual: whether each block starts as its shortcut, by a zero scale of bn3.
      num_classes: ImageNet's classifier of these classes on top, "fc"; None for none.
      width: channel multiplier.
      axis_name: the mapped axis over which the batch is split; None outside of `pmap`.
      dtype: computation dtype of convolutions; normalisation is computed in float32 or wider.
    """

    depths: tuple[int, int, int, int]
    groups: int = 1
    group_width: int = 64
    output_stride: Literal[32, 16, 8] = 32
    stride_in: StrideIn = "3x3"
    first_block_dilation: FirstBlockDilation = "previous"
    pool_ceil: bool = False
    pool_padding: int = 1
    bn: Literal["train", "frozen"] = "train"
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-5
    zero_init_residual: bool = False
    num_classes: int | None = None
    width: float = 1.0
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "conv1" (after ReLU), "pool1", "layer1" to "layer4" and, if asked for, "fc".

        "fc" [B, num_classes] are scores of whole images, float32.

        Raises:
          ValueError: images are not [B, H, W, C], or the output stride is none of 32, 16, 8.
        """
        image_size(images)
        conv = functools.partial(Conv, use_bias=False, dtype=self.dtype, kernel_init=_HE_FAN_OUT)
        norm = functools.partial(
            BatchNorm,
            use_running_average=not train,
            frozen=self.bn == "frozen",
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            axis_name=self.axis_name,
        )
        x = conv(scaled(64, self.width), 7, strides=2, name="conv1")(images)
        outputs = {"conv1": nn.relu(norm(name="bn1")(x))}
        x = max_pool(outputs["conv1"], 3, 2, self.pool_padding, ceil=self.pool_ceil)
        outputs["pool1"] = x
        last_scale_init = init.zero if self.zero_init_residual else jax.nn.initializers.ones
        for stage, (planes, depth, geometry) in enumerate(
            zip(_PLANES, self.depths, self._geometry(), strict=True), start=1
        ):
            inner = planes * self.group_width * self.groups // 64
            for i in range(depth):
                x = Bottleneck(
                    conv,
                    norm,
                    inner=scaled(inner, self.width, self.groups),
                    features=scaled(_EXPANSION * planes, self.width),
                    stride=geometry.stride if i == 0 else 1,
                    dilation=geometry.first_dilation if i == 0 else geometry.dilation,
                    groups=self.groups,
                    stride_in=self.stride_in,
                    has_downsample=i == 0,
                    last_scale_init=last_scale_init,
                    name=f"layer{stage}_{i}",
                )(x)
            outputs[f"layer{stage}"] = x
        if self.num_classes is not None:
            pooled = jnp.mean(at_least_float32(x), (1, 2))
            outputs["fc"] = nn.Dense(self.num_classes, name="fc")(pooled)
        return outputs

    def _geometry(self) -> list["_Geometry"]:
        """Returns the geometry of the four stages."""
        if self.output_stride not in (32, 16, 8):
            raise ValueError(f"The output stride is 32, 16 or 8; received {self.output_stride}.")
        stages, stride, dilation = [_Geometry(1, 1, 1)], 4, 1
        for _ in range(3):
            previous, is_dilated = dilation, stride == self.output_stride
            if is_dilated:
                dilation *= 2
            else:
                stride *= 2
            first = previous if self.first_block_dilation == "previous" else dilation
            stages.append(_Geometry(1 if is_dilated else 2, first, dilation))
        return stages


class _Geometry(NamedTuple):
    """Stride of the first block of a stage, and dilations of its 3x3 convolutions."""

    stride: int
    first_dilation: int
    dilation: int


resnet50 = functools.partial(ResNet, depths=(3, 4, 6, 3))
resnet101 = functools.partial(ResNet, depths=(3, 4, 23, 3))
resnext101_32x8d = functools.partial(ResNet, depths=(3, 4, 23, 3), groups=32, group_width=8)
resnext101_64x4d = functools.partial(ResNet, depths=(3, 4, 23, 3), groups=64, group_width=4)
