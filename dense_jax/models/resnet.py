"""ResNet-14, 50 and 101 and ResNeXt-101 as feature extractors of any output stride.

The network returns each stage by name. Parameters have torchvision's names with "_" in front of
block numbers: `layer1.0.downsample.1.weight` is "layer1_0/downsample_1/scale".

A stage that keeps the size of its input has stride 1 and dilates its 3x3 convolutions instead. Its
first block needs care, because its input has the finer grid of the stage before. If the 3x3
convolution has the stride (torchvision), it keeps the dilation of the stage before. If the 1x1
convolution in front has the stride (the release of He et al.), the 3x3 convolution is behind the
stride and takes the new dilation. With these two pairs, units read the same pixels as in the
strided network, at more positions; with the other two pairs they do not.

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
from jax import lax

from dense_jax.layers import init
from dense_jax.layers.conv import Conv
from dense_jax.layers.norm import BatchNorm
from dense_jax.models.vgg import image_size, scaled
from dense_jax.ops.pool import max_pool
from dense_jax.ops.precision import at_least_float32

StrideIn = Literal["3x3", "1x1"]
FirstBlockDilation = Literal["previous", "new"]

_PLANES = (64, 128, 256, 512)  # Channels inside the blocks of each stage; outputs have four times.
_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; [B, H, W, C] to [B, H / s, W / s, features].

    The shortcut is the identity, or a 1x1 convolution "downsample_0" and its normalisation
    "downsample_1".

    Attributes:
      conv: function that builds a convolution without bias: (features, kernel_size, *, strides,
        ..., name).
      norm: function that builds a normalisation: (*, scale_init, name).
      inner: channels of the 3x3 convolution.
      features: channels of the result.
      stride: s, the stride of the shortcut and of the convolution that `stride_in` names.
      dilation: dilation of the 3x3 convolution.
      groups: groups of the 3x3 convolution (ResNeXt's cardinality).
      stride_in: the convolution with the stride; see `ResNet`.
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


class Geometry(NamedTuple):
    """Stride of the first block of a stage, and dilations of its 3x3 convolutions."""

    stride: int
    first_dilation: int = 1
    dilation: int = 1


def widths(number: int, groups: int, group_width: int, width: float) -> tuple[int, int]:
    """Returns the channels inside the blocks of a stage, and of its result; see `ResNet`.

    Args:
      number: 1 to 4.
      groups: groups of the 3x3 convolutions.
      group_width: channels of each group in the first stage.
      width: channel multiplier.
    """
    planes = _PLANES[number - 1]
    inner = planes * group_width * groups // 64
    return scaled(inner, width, groups), scaled(_EXPANSION * planes, width)


def stage(
    block: Callable[..., nn.Module], x: jax.Array, number: int, depth: int, geometry: Geometry
) -> jax.Array:
    """Maps [B, H, W, C] to the output of the blocks "layer<number>_0", ... of the caller.

    Args:
      block: function that builds a `Bottleneck`: (*, stride, dilation, has_downsample, name).
      x: [B, H, W, C].
      number: 1 to 4.
      depth: number of blocks.
      geometry: stride and dilations.
    """
    for i in range(depth):
        x = block(
            stride=geometry.stride if i == 0 else 1,
            dilation=geometry.first_dilation if i == 0 else geometry.dilation,
            has_downsample=i == 0,
            name=f"layer{number}_{i}",
        )(x)
    return x


class ResNet(nn.Module):
    """A residual network; maps images [B, H, W, C], any H, W >= 1, to its stages by name.

    Attributes:
      depths: blocks of the four stages, or of the first ones for a network that ends earlier.
      groups: groups of the 3x3 convolutions.
      group_width: channels of each group in the first stage; each later stage doubles them.
      output_stride: stride of layer4 in pixels; 16 dilates layer4, 8 dilates layer3 and layer4.
      stride_in: the convolution of a block that has the stride: "3x3" (torchvision) or the "1x1" in
        front of it (MSRA's release by He et al. in Caffe).
      first_block_dilation: dilation of the first block of a dilated stage: that of the stage
        before, or the new one; see the top of this file. torchvision is ("3x3", "previous"),
        DeepLab v2 ("1x1", "new").
      pool_ceil: whether pooling rounds sizes up, as in Caffe, or down, as in torch.
      pool_padding: padding of the pooling in pixels; 0 in the release of He et al.
      bn: "frozen" does not change batch statistics, scales and biases, not even in training.
      bn_momentum: decay of the running averages.
      bn_epsilon: constant added to the variance.
      zero_init_residual: whether bn3 of each block has an initial scale of zero, so that the block
        starts as its shortcut.
      num_classes: number of classes of the classifier "fc" on top; None for no classifier.
      num_frozen: number of parts that no gradient reaches, of conv1 with bn1, layer1, ..., layer4.
      remat: whether to compute the inside of blocks again for gradients instead of storing it.
      width: channel multiplier.
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      dtype: computation dtype of convolutions; normalisation uses float32 or wider.
    """

    depths: tuple[int, ...]
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
    num_frozen: int = 0
    remat: bool = False
    width: float = 1.0
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "conv1" (behind ReLU), "pool1", "layer1" to "layer4" and, with classes, "fc".

        "fc" [B, num_classes] holds scores of whole images in float32.

        Raises:
          ValueError: images do not have the shape [B, H, W, C], or the output stride is not 32, 16
            or 8.
        """
        image_size(images)
        conv = functools.partial(
            Conv, use_bias=False, dtype=self.dtype, kernel_init=init.he_fan_out
        )
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
        if self.num_frozen > 0:
            x = lax.stop_gradient(x)
        outputs["pool1"] = x
        last_scale_init = init.zero if self.zero_init_residual else jax.nn.initializers.ones
        for number, (depth, geometry) in enumerate(
            zip(self.depths, self._geometry(), strict=False), start=1
        ):
            inner, features = widths(number, self.groups, self.group_width, self.width)
            block = functools.partial(
                nn.remat(Bottleneck) if self.remat else Bottleneck,
                conv,
                norm,
                inner=inner,
                features=features,
                groups=self.groups,
                stride_in=self.stride_in,
                last_scale_init=last_scale_init,
            )
            x = stage(block, x, number, depth, geometry)
            if self.num_frozen > number:
                x = lax.stop_gradient(x)
            outputs[f"layer{number}"] = x
        if self.num_classes is not None:
            pooled = jnp.mean(at_least_float32(x), (1, 2))
            outputs["fc"] = nn.Dense(self.num_classes, name="fc")(pooled)
        return outputs

    def _geometry(self) -> list[Geometry]:
        """Returns the geometry of the four stages."""
        if self.output_stride not in (32, 16, 8):
            raise ValueError(
                f"The output stride must be 32, 16 or 8; received {self.output_stride}."
            )
        stages, stride, dilation = [Geometry(1, 1, 1)], 4, 1
        for _ in range(3):
            previous, is_dilated = dilation, stride == self.output_stride
            if is_dilated:
                dilation *= 2
            else:
                stride *= 2
            first = previous if self.first_block_dilation == "previous" else dilation
            stages.append(Geometry(1 if is_dilated else 2, first, dilation))
        return stages


# Not in the paper: a small one for trials, which compiles in a quarter of the time.
resnet14 = functools.partial(ResNet, depths=(1, 1, 1, 1))
resnet50 = functools.partial(ResNet, depths=(3, 4, 6, 3))
resnet101 = functools.partial(ResNet, depths=(3, 4, 23, 3))
resnext101_32x8d = functools.partial(ResNet, depths=(3, 4, 23, 3), groups=32, group_width=8)
resnext101_64x4d = functools.partial(ResNet, depths=(3, 4, 23, 3), groups=64, group_width=4)
