"""DeepLab v1 and v2: a dilated VGG-16 or ResNet with scores at stride 8 and several image scales.

Behind the third pooling all layers keep the stride of 8 pixels and dilate instead. Poolings are 3x3
with a padding of one. So on images of 8 m + 1 pixels, unit i of each layer is at a pixel (8 i at
stride 8), and corners stay corners when images and scores are resized.

References:
  v1: Chen, Papandreou, Kokkinos, Murphy, Yuille, "Semantic image segmentation with deep
    convolutional nets and fully connected CRFs", ICLR 2015, arXiv:1412.7062, Sections 3 and 4.2.
  v2: the same authors, "DeepLab: semantic image segmentation with deep convolutional nets, atrous
    convolution, and fully connected CRFs", PAMI 2017, arXiv:1606.00915, Sections 3.1, 3.2 and 4.1.
Names are those of the released networks, but fc8 for fc8_voc12 and fc1 for fc1_voc12. The CRF is in
`dense_jax.ops.crf`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dense_jax.layers import init
from dense_jax.layers.conv import Conv
from dense_jax.layers.dropout import Dropout
from dense_jax.models import resnet, vgg
from dense_jax.models.resnet import FirstBlockDilation, StrideIn
from dense_jax.models.vgg import Layer, Stack, scaled
from dense_jax.ops.precision import at_least_float32
from dense_jax.ops.resize import rescaled, resize_bilinear

STRIDE = 8
_new = init.normal(0.01)  # For layers that no pretrained network has.


class Head(NamedTuple):
    """The head on the trunk: one branch for each rate; the branches' scores are summed.

    Attributes:
      kernel: kernel size of the dilated convolution: fc6 of VGG-16, or the classifier of ResNets.
      rates: dilation of this convolution in each branch.
      features: channels of fc6 and fc7, which ResNets do not have.
    """

    kernel: int
    rates: tuple[int, ...]
    features: int = 1024


HeadName = Literal["fc7x7", "fc4x4", "largefov", "aspp_s", "aspp_l"]
HEADS: dict[HeadName, Head] = {
    "fc7x7": Head(7, (4,), 4096),
    "fc4x4": Head(4, (4,), 4096),
    "largefov": Head(3, (12,)),
    "aspp_s": Head(3, (2, 4, 8, 12)),
    "aspp_l": Head(3, (6, 12, 18, 24)),
}


def vgg_layers() -> tuple[Layer, ...]:
    """Returns the table of DeepLab's VGG-16 from conv1_1 to pool5; 14,714,688 parameters."""
    rows = []
    for row in vgg.vgg16_layers():
        if row.name.startswith("pool"):
            row = row._replace(kernel=3, padding=1, stride=1 if row.name in _DENSE else 2)
        elif row.name.startswith("conv5"):
            row = row._replace(padding=2, dilation=2)
        rows.append(row)
    return tuple(row for row in rows if not row.name.startswith("fc"))


_DENSE = ("pool4", "pool5")  # These have no stride here; layers behind pool4 dilate instead.
# The layers with multi-scale features in v1, and the stride from each of them to stride 8.
_TAPS = (("image", 8), ("pool1", 4), ("pool2", 2), ("pool3", 1), ("pool4", 1))


class VGGScores(nn.Module):
    """DeepLab on VGG-16; maps images [B, 8 m + 1, 8 n + 1, C] to scores [B, m + 1, n + 1, classes].

    Attributes: see `DeepLab`.
    """

    num_classes: int
    head: Head
    pool5a: bool = False
    msc_features: bool = False
    width: float = 1.0
    dropout_rate: float = 0.5
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "scores" in float32, the scores of each branch (fc8) and the layers by name."""
        trunk = Stack(vgg_layers(), width=self.width, dtype=self.dtype)
        nn.share_scope(self, trunk)  # The release has all names on one level.
        outputs = trunk(images, train=train)
        x = outputs["pool5"]
        if self.pool5a:  # The mean includes the zeros beyond the border.
            total = nn.pool(x, 0.0, lax.add, (3, 3), (1, 1), ((1, 1), (1, 1)))
            x = outputs["pool5a"] = total / 9.0
        taps = self._multi_scale_features({**outputs, "image": images}) if self.msc_features else []

        drop = functools.partial(Dropout(self.dropout_rate, self.axis_name), train=train)
        features, branches = scaled(self.head.features, self.width), []
        for number, rate in enumerate(self.head.rates, start=1):
            mark = f"_{number}" if len(self.head.rates) > 1 else ""
            y = self._conv(x, f"fc6{mark}", features, self.head.kernel, dilation=rate)
            outputs[f"fc6{mark}"] = y = drop(y)
            outputs[f"fc7{mark}"] = y = drop(self._conv(y, f"fc7{mark}", features, 1))
            y = jnp.concatenate([y, *taps], axis=-1) if taps else y
            outputs[f"fc8{mark}"] = _classify(y, self.num_classes, f"fc8{mark}", dtype=self.dtype)
            branches.append(outputs[f"fc8{mark}"])
        outputs["scores"] = sum(branches[1:], start=branches[0])
        return outputs

    def _conv(self, x: jax.Array, name: str, features: int, kernel: int, **options) -> jax.Array:
        return nn.relu(Conv(features, kernel, dtype=self.dtype, name=name, **options)(x))

    def _multi_scale_features(self, layers: dict[str, jax.Array]) -> list[jax.Array]:
        """Applies two small layers to the image and to each of four poolings (v1, Section 4.2).

        The paper does not say how finer maps reach stride 8. Here the first of the two layers has
        the stride, so that its units are at the positions of the coarse map.
        """
        features, maps = scaled(128, self.width), []
        for layer, stride in _TAPS:
            name, options = f"msc_{layer}", dict(kernel_init=_new)
            y = layers[layer]
            y = self._conv(y, f"{name}_1", features, 3, strides=stride, padding=1, **options)
            maps.append(self._conv(y, f"{name}_2", features, 1, **options))
        return maps


def _classify(
    x: jax.Array, num_classes: int, name: str, kernel: int = 1, dilation: int = 1, dtype=None
) -> jax.Array:
    """Returns class scores in float32, as all sums of scores are."""
    conv = Conv(num_classes, kernel, dilation=dilation, kernel_init=_new, dtype=dtype, name=name)
    return at_least_float32(conv(x))


Backbone = Literal["vgg16", "resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d"]
RESIDUAL = {
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnext101_32x8d": resnet.resnext101_32x8d,
    "resnext101_64x4d": resnet.resnext101_64x4d,
}
SCALES = (1.0, 0.75, 0.5)  # Multi-scale inputs (v2, Section 4.1.2).
# Dilation of the first block of a dilated stage; others would read other pixels.
_FIRST_BLOCK: dict[StrideIn, FirstBlockDilation] = {"1x1": "new", "3x3": "previous"}


def torchvision_trunk(
    backbone: Backbone, stride_in: Literal["published", "1x1", "3x3"] = "published"
) -> Callable[..., resnet.ResNet]:
    """Returns what builds torchvision's ResNet, as published or striding like DeepLab v2's."""
    if stride_in != "1x1":
        return RESIDUAL[backbone]
    options = dict(stride_in=stride_in, first_block_dilation=_FIRST_BLOCK[stride_in])
    return functools.partial(RESIDUAL[backbone], **options)


class ResNetScores(nn.Module):
    """DeepLab on a residual network; the shapes are those of `VGGScores`.

    Each branch is one dilated convolution to the scores (v2, Section 4.1.2).

    Attributes: see `DeepLab`.
    """

    num_classes: int
    backbone: Backbone
    head: Head
    stride_in: StrideIn = "1x1"
    bn: Literal["frozen", "train"] = "frozen"
    bn_momentum: float = 0.9
    width: float = 1.0
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "scores" in float32, the scores of each branch (fc1) and the stages by name."""
        trunk = RESIDUAL[self.backbone](
            output_stride=STRIDE,
            stride_in=self.stride_in,
            first_block_dilation=_FIRST_BLOCK[self.stride_in],
            bn=self.bn,
            bn_momentum=self.bn_momentum,
            width=self.width,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        nn.share_scope(self, trunk)
        outputs = trunk(images, train=train)
        x, branches = outputs["layer4"], []
        for number, rate in enumerate(self.head.rates):
            name = f"fc1_c{number}" if len(self.head.rates) > 1 else "fc1"
            y = _classify(x, self.num_classes, name, self.head.kernel, rate, self.dtype)
            outputs[name] = y
            branches.append(y)
        outputs["scores"] = sum(branches[1:], start=branches[0])
        return outputs


def _padded(side: int, scale: float = 1.0) -> int:
    """Returns the padded side, 8 m + 1, of a scaled image; m is rounded after scaling."""
    return rescaled(-(-(side - 1) // STRIDE), scale) * STRIDE + 1


def max_fusion(scores: Sequence[jax.Array]) -> jax.Array:
    """Returns the elementwise maximum of maps [B, h, w, C], after resizing to the finest map.

    The corners of all maps are the same points of the image (v2, Section 4.1.2).
    """
    size = (max(s.shape[1] for s in scores), max(s.shape[2] for s in scores))
    resized = (
        s if s.shape[1:3] == size else resize_bilinear(s, size, align_corners=True) for s in scores
    )
    return functools.reduce(jnp.maximum, resized)


class DeepLab(nn.Module):
    """DeepLab; maps images [B, H, W, C], any H, W >= 1, to logits [B, H, W, num_classes].

    Zeros, the mean colour, pad images at the bottom and right to 8 m + 1 pixels. Scaled images are
    resized with aligned corners to the 8 m + 1 pixels that are closest to the scaled size.

    Attributes:
      num_classes: number of classes.
      backbone: the trunk.
      head: the branches (v1, Table 1 b; v2, Figure 7). ResNets take heads of 3x3 convolutions.
      rates: dilations of the branches; None for those of the head.
      pool5a: whether VGG-16's trunk ends in a 3x3 average pooling, as in the release of v1.
      msc_features: whether VGG-16's classifier also reads the image and four poolings (v1, Section
        4.2).
      scales: scale factors of the image; the maximum over the scales gives the scores.
      upsample: how to enlarge the scores. "half_pixel" shifts them by up to half a unit at the
        corners; it shows the cost of the usual resizing in this network.
      stride_in: the convolutions of ResNets with the stride: "1x1" (the release of He et al., as in
        the paper) or "3x3" (torchvision). It decides the dilation (`dense_jax.models.resnet`).
      bn: whether batch normalisation of ResNets is trained or keeps the loaded values.
      bn_momentum: decay of the running averages.
      width: channel multiplier of all layers but the last.
      dropout_rate: dropout rate behind fc6 and fc7.
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      dtype: computation dtype of the layers; sums and upsampling of scores use float32.
    """

    num_classes: int
    backbone: Backbone = "vgg16"
    head: HeadName = "largefov"
    rates: tuple[int, ...] | None = None
    pool5a: bool = False
    msc_features: bool = False
    scales: tuple[float, ...] = (1.0,)
    upsample: Literal["align_corners", "half_pixel"] = "align_corners"
    stride_in: StrideIn = "1x1"
    bn: Literal["frozen", "train"] = "frozen"
    bn_momentum: float = 0.9
    width: float = 1.0
    dropout_rate: float = 0.5
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    def padded_side(self, side: int) -> int:
        """Returns the side to which the network pads images, in pixels: 8 m + 1."""
        return _padded(side)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits" in float32, the "scores" at stride 8 and the layers by name.

        "scores_x0.5" holds the scores of scale 0.5 before fusion, at stride 8 of the smaller image.
        The layers are those of the largest scale.
        """
        size = vgg.image_size(images)
        whole = (self.padded_side(size[0]), self.padded_side(size[1]))
        edges = ((0, 0), (0, whole[0] - size[0]), (0, whole[1] - size[1]), (0, 0))
        images = jnp.pad(images, edges)
        net = self._network()
        nn.share_scope(self, net)
        outputs: dict[str, jax.Array] = {}
        for scale in sorted(self.scales):
            seen = (_padded(size[0], scale), _padded(size[1], scale))
            x = images if seen == whole else resize_bilinear(images, seen, align_corners=True)
            outputs |= net(x, train=train)
            outputs[f"scores_x{scale:g}"] = outputs["scores"]
        fused = max_fusion([outputs[f"scores_x{scale:g}"] for scale in self.scales])
        aligned = self.upsample == "align_corners"
        logits = resize_bilinear(fused, whole, align_corners=aligned)
        return {**outputs, "scores": fused, "logits": logits[:, : size[0], : size[1]]}

    def _network(self) -> nn.Module:
        head = HEADS[self.head]
        if self.rates is not None:
            head = head._replace(rates=self.rates)
        shared = dict(width=self.width, axis_name=self.axis_name, dtype=self.dtype)
        if self.backbone == "vgg16":
            return VGGScores(
                self.num_classes,
                head,
                pool5a=self.pool5a,
                msc_features=self.msc_features,
                dropout_rate=self.dropout_rate,
                **shared,
            )
        if head.kernel != 3 or self.pool5a or self.msc_features:
            raise ValueError(
                f"A ResNet takes heads of 3x3 convolutions without pool5a and msc_features; "
                f"received {self.head}, {self.pool5a}, {self.msc_features}."
            )
        return ResNetScores(
            self.num_classes,
            self.backbone,
            head,
            stride_in=self.stride_in,
            bn=self.bn,
            bn_momentum=self.bn_momentum,
            **shared,
        )


# Version 1: Tables 1 and 2. Version 2 has no pool5a: Tables 1 to 4.
deeplab_7x7 = functools.partial(DeepLab, head="fc7x7", pool5a=True)
deeplab_4x4 = functools.partial(DeepLab, head="fc4x4", pool5a=True)
deeplab_largefov = functools.partial(DeepLab, head="largefov", pool5a=True)
deeplab_msc_largefov = functools.partial(deeplab_largefov, msc_features=True)
deeplab_vgg_largefov = functools.partial(DeepLab, head="largefov")
deeplab_vgg_aspp_s = functools.partial(DeepLab, head="aspp_s")
deeplab_vgg_aspp_l = functools.partial(DeepLab, head="aspp_l")
deeplab_resnet101_largefov = functools.partial(DeepLab, backbone="resnet101", head="largefov")
deeplab_resnet101 = functools.partial(DeepLab, backbone="resnet101", head="aspp_l", scales=SCALES)
