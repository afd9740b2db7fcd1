"""Heads on regions of interest (RoIs): box heads, and the predictor of classes and boxes.

Each box head maps RoIs [R, P, P, C] to features.

References: Girshick, "Fast R-CNN", ICCV 2015, arXiv:1504.08083, Section 2 (two dense layers); He,
Gkioxari, Dollar, Girshick, "Mask R-CNN", ICCV 2017, arXiv:1703.06870, Figure 4 (both forms); Li,
Xie, Dollar, He, Girshick, arXiv:2111.11429 (four convolutions); pytorch/vision:
torchvision/models/detection/faster_rcnn.py.
"""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dense_jax.layers import init
from dense_jax.layers.conv import Conv
from dense_jax.layers.dropout import Dropout
from dense_jax.models import resnet
from dense_jax.ops.precision import at_least_float32

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
      remat: whether to compute the inside of blocks again for gradients instead of storing it.
      dtype: computation dtype of convolutions.
    """

    norm: Callable[..., nn.Module]
    depth: int = 3
    inner: int = 512
    features: int = 2048
    groups: int = 1
    stride: Literal[1, 2] = 2
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
            stride_in="3x3",
            last_scale_init=jax.nn.initializers.ones,
        )
        return resnet.stage(block, x, 4, self.depth, resnet.Geometry(self.stride))


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
