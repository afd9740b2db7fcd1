"""Heads on regions of interest (RoIs): of boxes, masks and keypoints, and their predictors.

Each head maps RoIs [R, P, P, C] to features, which predictors map to classes, boxes and masks.

References: Girshick, "Fast R-CNN", ICCV 2015, arXiv:1504.08083, Section 2 (two dense layers); He,
Gkioxari, Dollar, Girshick, "Mask R-CNN", ICCV 2017, arXiv:1703.06870, Figure 4 (both forms); Li,
Xie, Dollar, He, Girshick, arXiv:2111.11429 (four convolutions); pytorch/vision:
torchvision/models/detection/{faster_rcnn,keypoint_rcnn}.py.
"""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dense_jax.layers import init
from dense_jax.layers.conv import Conv, UpConv
from dense_jax.layers.dropout import Dropout
from dense_jax.models import resnet
from dense_jax.ops.precision import at_least_float32
from dense_jax.ops.resize import resize_bilinear

# A dense layer on [..., h, w, c], whose kernel is [h, w, c, features].
_dense_on_map = functools.partial(
    nn.DenseGeneral, axis=(-3, -2, -1), kernel_init=init.xavier_fan_in
)


class TwoDense(nn.Module):
    """Dense layers fc6 and fc7 with ReLUs; maps [R, P, P, C] to [R, features].

    Attributes:
      features: 1024 on a feature pyramid, 4096 in VGG-16.
      dropout_rate: dropout rate behind both layers, 0.5 in VGG-16.
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      dtype: computation dtype.
    """

    features: int = 1024
    dropout_rate: float = 0.0
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [R, P, P, C] to [R, features]."""
        drop = functools.partial(Dropout, self.dropout_rate, self.axis_name)
        x = nn.relu(_dense_on_map(self.features, dtype=self.dtype, name="fc6")(x))
        x = drop()(x, train=train)
        fc7 = nn.Dense(self.features, kernel_init=init.xavier_fan_in, dtype=self.dtype, name="fc7")
        return drop()(nn.relu(fc7(x)), train=train)


class FourConvsDense(nn.Module):
    """Four 3x3 convolutions with normalisation, and a dense layer; all have ReLUs.

    Attributes:
      norm: function that builds a normalisation: (*, use_running_average, name).
      channels: channels of the convolutions.
      features: channels of the result.
      dtype: computation dtype.
    """

    norm: Callable[..., nn.Module]
    channels: int = 256
    features: int = 1024
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [R, P, P, C] to [R, features]."""
        conv = functools.partial(
            Conv, self.channels, 3, use_bias=False, kernel_init=init.he_fan_out, dtype=self.dtype
        )
        for i in range(1, 5):
            x = conv(name=f"conv{i}")(x)
            x = nn.relu(self.norm(use_running_average=not train, name=f"bn{i}")(x))
        return nn.relu(_dense_on_map(self.features, dtype=self.dtype, name="fc1")(x))


class Res5(nn.Module):
    """The last stage of a ResNet, on RoIs of the stage before; the blocks are "layer4_0", ....

    Attributes:
      norm: function that builds a normalisation: (*, use_running_average, scale_init, name).
      depth: number of blocks.
      inner: channels of the 3x3 convolutions.
      features: channels of the result.
      groups: groups of the 3x3 convolutions.
      stride: 1 on RoIs of 7x7 (the paper's Figure 4) or 2 on RoIs of 14x14 (its released code).
      stride_in: the convolution with the stride; see `dense_jax.models.resnet.ResNet`.
      remat: whether to compute the inside of blocks again for gradients instead of storing it.
      dtype: computation dtype of convolutions.
    """

    norm: Callable[..., nn.Module]
    depth: int = 3
    inner: int = 512
    features: int = 2048
    groups: int = 1
    stride: Literal[1, 2] = 2
    stride_in: resnet.StrideIn = "3x3"
    remat: bool = False
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [R, P, P, C] to [R, P / stride, P / stride, features]."""
        block = functools.partial(
            nn.remat(resnet.Bottleneck) if self.remat else resnet.Bottleneck,
            functools.partial(Conv, use_bias=False, kernel_init=init.he_fan_out, dtype=self.dtype),
            functools.partial(self.norm, use_running_average=not train),
            inner=self.inner,
            features=self.features,
            groups=self.groups,
            stride_in=self.stride_in,
            last_scale_init=jax.nn.initializers.ones,
        )
        return resnet.stage(block, x, 4, self.depth, resnet.Geometry(self.stride))


class MaskConvs(nn.Module):
    """Four 3x3 convolutions with ReLUs, "mask_fcn1" to "mask_fcn4" (Mask R-CNN, Figure 4 right).

    Attributes:
      channels: channels of the convolutions.
      norm: function that builds a normalisation, which then follows each convolution in place of
        its bias: (*, use_running_average, name). None: no normalisation.
      dtype: computation dtype.
    """

    channels: int = 256
    norm: Callable[..., nn.Module] | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [R, P, P, C] to [R, P, P, channels]."""
        conv = functools.partial(
            Conv,
            self.channels,
            3,
            use_bias=self.norm is None,
            kernel_init=init.he_fan_out,
            dtype=self.dtype,
        )
        for i in range(1, 5):
            x = conv(name=f"mask_fcn{i}")(x)
            if self.norm is not None:
                x = self.norm(use_running_average=not train, name=f"bn{i}")(x)
            x = nn.relu(x)
        return x


class MaskPredictor(nn.Module):
    """An up-convolution "conv5_mask" to twice the side, a ReLU, and "mask_fcn_logits".

    Attributes:
      num_masks: masks of each RoI: one for each class, with background, or 1.
      channels: channels of the up-convolution.
      dtype: computation dtype of the up-convolution; logits are float32.
    """

    num_masks: int
    channels: int = 256
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [R, P, P, C] to logits [R, 2 P, 2 P, num_masks]."""
        up = UpConv(
            self.channels, 2, 2, kernel_init=init.he_fan_out, dtype=self.dtype, name="conv5_mask"
        )
        x = at_least_float32(nn.relu(up(x)))
        return Conv(self.num_masks, 1, kernel_init=init.he_fan_out, name="mask_fcn_logits")(x)


class MaskDense(nn.Module):
    """Dense layers in place of convolutions (Mask R-CNN, Table 2e, MLP).

    Attributes:
      num_masks: as in `MaskPredictor`.
      bins: M, cells along each side of a mask.
      num_layers: hidden layers.
      features: their channels.
      dtype: computation dtype of the hidden layers; logits are float32.
    """

    num_masks: int
    bins: int = 28
    num_layers: int = 2
    features: int = 1024
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [R, P, P, C] to logits [R, M, M, num_masks]."""
        x = nn.relu(_dense_on_map(self.features, dtype=self.dtype, name="fc1")(x))
        dense = functools.partial(
            nn.Dense, self.features, kernel_init=init.xavier_fan_in, dtype=self.dtype
        )
        for i in range(2, self.num_layers + 1):
            x = nn.relu(dense(name=f"fc{i}")(x))
        shape = (self.bins, self.bins, self.num_masks)
        x = at_least_float32(x)
        return nn.DenseGeneral(shape, kernel_init=init.normal(0.001), name="mask_logits")(x)


class KeypointConvs(nn.Module):
    """3x3 convolutions with ReLUs, "conv_fcn1", ... (Mask R-CNN, Section 5).

    Attributes:
      channels: channels of the convolutions.
      num_convs: their number.
      dtype: computation dtype.
    """

    channels: int = 512
    num_convs: int = 8
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [R, P, P, C] to [R, P, P, channels]."""
        for i in range(1, self.num_convs + 1):
            x = nn.relu(
                Conv(
                    self.channels,
                    3,
                    kernel_init=init.he_fan_out,
                    dtype=self.dtype,
                    name=f"conv_fcn{i}",
                )(x)
            )
        return x


class KeypointPredictor(nn.Module):
    """An up-convolution "kps_score_lowres" to twice the side, and interpolation to twice that.

    Attributes:
      num_keypoints: K.
      dtype: computation dtype of the up-convolution; logits are float32.
    """

    num_keypoints: int
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [R, P, P, C] to logits [R, 4 P, 4 P, K] of the cell of each keypoint."""
        up = UpConv(self.num_keypoints, 4, 2, padding=1, dtype=self.dtype, name="kps_score_lowres")
        x = at_least_float32(up(x))
        return resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=False)


class BoxPredictor(nn.Module):
    """Two dense layers, "cls_score" and "bbox_pred"; both compute in float32.

    Attributes:
      num_classes: K, classes with background, which is class 0.
    """

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps features [R, F], or maps [R, P, P, F] by their means, to logits and box deltas.

        Returns:
          Logits [R, K] of the softmax over classes, and deltas [R, K, 4] of the box of each class.
          Those of background have no use.
        """
        x = at_least_float32(x)
        if x.ndim == 4:
            x = jnp.mean(x, (1, 2))
        # Small weights (Fast R-CNN, Section 2.3): at first, all classes are equally likely and no
        # box moves.
        logits = nn.Dense(self.num_classes, kernel_init=init.normal(0.01), name="cls_score")(x)
        deltas = nn.Dense(4 * self.num_classes, kernel_init=init.normal(0.001), name="bbox_pred")(x)
        return logits, deltas.reshape(len(x), self.num_classes, 4)
