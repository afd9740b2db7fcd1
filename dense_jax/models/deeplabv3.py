"""torchvision's segmentation networks: a ResNet with the head of DeepLabv3 or a small FCN head.

Parameters have torchvision's names with "_" in front of numbers: `classifier.0.convs.1.0.weight`
is "classifier_0/convs_1_0/kernel", and `backbone.layer1.0.conv1.weight` is
"backbone/layer1_0/conv1/kernel".

Reference: Chen, Papandreou, Schroff, Adam, "Rethinking atrous convolution for semantic image
segmentation", arXiv:1706.05587, Section 3.3 and Figure 5; Long, Shelhamer, Darrell, CVPR 2015,
arXiv:1411.4038; pytorch/vision: torchvision/models/segmentation.
"""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dense_jax.layers.conv import Conv
from dense_jax.layers.dropout import Dropout
from dense_jax.layers.norm import BatchNorm
from dense_jax.models import resnet
from dense_jax.models.vgg import image_size, scaled
from dense_jax.ops.precision import at_least_float32
from dense_jax.ops.resize import resize_bilinear

# Uniform in +-1 / sqrt(fan-in): torch's initialisation of convolutions.
_TORCH = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_RATES = (12, 24, 36)  # At output stride 8; the paper has 6, 12, 18 at output stride 16.


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling; maps [B, H, W, C] to [B, H, W, features].

    The branches are a 1x1 convolution, three dilated 3x3 convolutions and the mean of the map; each
    has a normalisation. A 1x1 convolution, "project", follows on the concatenated branches.

    Attributes:
      conv: function that builds a convolution without bias: (features, kernel_size, *, dilation,
        name).
      norm: function that builds a normalisation: (*, name).
      features: channels of each branch and of the result.
      rates: dilations of the 3x3 convolutions, in units of the map.

    Reference: arXiv:1706.05587, Section 3.3.
    """

    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    features: int
    rates: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, within: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H, W, features].

        Args:
          x: the map.
          within: int [B, 2], rows and columns to take the mean of, without those of padding; None:
            all.
        """

        def unit(x: jax.Array, name: str, kernel_size: int = 1, rate: int = 1, first: int = 0):
            conv = self.conv(self.features, kernel_size, dilation=rate, name=f"{name}_{first}")
            return nn.relu(self.norm(name=f"{name}_{first + 1}")(conv(x)))

        branches = [unit(x, "convs_0")]
        for i, rate in enumerate(self.rates, start=1):
            branches.append(unit(x, f"convs_{i}", 3, rate))
        mean = _mean(x, within)
        # In torchvision the pooling is number 0.
        mean = unit(mean, f"convs_{len(branches)}", first=1)
        branches.append(jnp.broadcast_to(mean, branches[0].shape))
        return unit(jnp.concatenate(branches, axis=-1), "project")


def _mean(x: jax.Array, within: jax.Array | None) -> jax.Array:
    """Returns the mean [B, 1, 1, C] of rows and columns within; sums narrow dtypes in float32."""
    if within is None:
        return jnp.mean(x, (1, 2), keepdims=True)
    rows, columns = (
        jnp.arange(n)[None] < within[:, axis, None] for axis, n in enumerate(x.shape[1:3])
    )
    is_inside = (rows[:, :, None] & columns[:, None])[..., None]
    count = jnp.maximum(jnp.sum(is_inside, (1, 2), keepdims=True, dtype=jnp.int32), 1)
    total = jnp.sum(jnp.where(is_inside, at_least_float32(x), 0), (1, 2), keepdims=True)
    return (total / count.astype(total.dtype)).astype(x.dtype)


class ResNetSegmenter(nn.Module):
    """A ResNet and a head; maps images [B, H, W, C], any H, W >= 1, to logits of their size.

    Attributes:
      num_classes: number of classes.
      head: "deeplabv3": `ASPP`, a 3x3 convolution and scores; "fcn": a 3x3 convolution to a
        quarter of the channels and scores.
      trunk: function that builds the trunk, such as `functools.partial(resnet50,
        stride_in="1x1")`.
      aux: whether an FCN head scores layer3 too, for a second loss (weight 0.5).
      output_stride: stride of the scores in pixels. `ASPP` has rates 12, 24, 36 at stride 8; at 16
        and 32 its rates cover as many pixels.
      bn: "frozen" freezes the trunk's batch normalisation; the heads' always trains.
      bn_momentum: decay of the running averages.
      dropout_rate: dropout rate in front of the scores of FCN heads and behind `ASPP`; None for 0.1
        and 0.5.
      width: channel multiplier.
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      dtype: computation dtype of convolutions; upsampling of scores uses float32.
    """

    num_classes: int
    head: Literal["deeplabv3", "fcn"] = "deeplabv3"
    trunk: Callable[..., nn.Module] = resnet.resnet50
    aux: bool = False
    output_stride: Literal[32, 16, 8] = 8
    bn: Literal["train", "frozen"] = "train"
    bn_momentum: float = 0.9
    dropout_rate: float | None = None
    width: float = 1.0
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, sizes: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns "logits" and, with `aux`, "aux_logits" in float32, and the trunk's stages.

        Logits are the "scores" and "aux_scores" at the output stride after bilinear upsampling.

        Args:
          images: [B, H, W, C].
          train: whether to drop units and to update statistics.
          sizes: [B, 2] heights and widths without padding, which the mean of `ASPP` is of; None:
            images have no padding.
        """
        size = image_size(images)
        outputs = self.trunk(
            output_stride=self.output_stride,
            bn=self.bn,
            bn_momentum=self.bn_momentum,
            width=self.width,
            axis_name=self.axis_name,
            dtype=self.dtype,
            name="backbone",
        )(images, train=train)
        conv = functools.partial(Conv, use_bias=False, dtype=self.dtype, kernel_init=_TORCH)
        norm = functools.partial(
            BatchNorm,
            use_running_average=not train,
            momentum=self.bn_momentum,
            axis_name=self.axis_name,
        )

        def drop(x: jax.Array, published: float) -> jax.Array:
            rate = published if self.dropout_rate is None else self.dropout_rate
            return Dropout(rate, self.axis_name)(x, train=train)

        def hidden(x: jax.Array, features: int, name: str, number: int) -> jax.Array:
            x = conv(features, 3, name=f"{name}_{number}")(x)
            return nn.relu(norm(name=f"{name}_{number + 1}")(x))

        def fcn(x: jax.Array, name: str) -> jax.Array:
            return drop(hidden(x, max(1, x.shape[-1] // 4), name, 0), 0.1)

        def deeplabv3(x: jax.Array, name: str) -> jax.Array:
            features = scaled(256, self.width)
            rates = tuple(rate * 8 // self.output_stride for rate in _RATES)
            within = (
                None if sizes is None else jnp.ceil(sizes / self.output_stride).astype(jnp.int32)
            )
            x = ASPP(conv, norm, features, rates, name=f"{name}_0")(x, within)
            return hidden(drop(x, 0.5), features, name, 1)

        def classify(x: jax.Array, name: str, prefix: str) -> None:
            scores = conv(self.num_classes, 1, use_bias=True, name=f"{name}_4")(x)
            outputs[f"{prefix}scores"] = scores = at_least_float32(scores)
            outputs[f"{prefix}logits"] = resize_bilinear(scores, size, align_corners=False)

        head = {"deeplabv3": deeplabv3, "fcn": fcn}[self.head]
        classify(head(outputs["layer4"], "classifier"), "classifier", "")
        if self.aux:
            classify(fcn(outputs["layer3"], "aux_classifier"), "aux_classifier", "aux_")
        return outputs


fcn_resnet50 = functools.partial(ResNetSegmenter, head="fcn", trunk=resnet.resnet50)
fcn_resnet101 = functools.partial(ResNetSegmenter, head="fcn", trunk=resnet.resnet101)
deeplabv3_resnet50 = functools.partial(ResNetSegmenter, trunk=resnet.resnet50)
deeplabv3_resnet101 = functools.partial(ResNetSegmenter, trunk=resnet.resnet101)
