"""Faster R-CNN: a trunk, proposals from its maps, and heads that classify and move boxes.

The network is in three steps, because what happens to boxes between them depends on training:
`features` computes the maps, `propose` scores and moves the anchors, and `classify` crops boxes
from the maps. Parameters have torchvision's names; the trunk is "backbone", and the rest is "fpn",
"rpn", "box_head" and "box_predictor". Without anchors the network is Fast R-CNN.

References: Girshick, "Fast R-CNN", ICCV 2015, arXiv:1504.08083; Ren, He, Girshick, Sun, "Faster
R-CNN", NIPS 2015, arXiv:1506.01497v3; with a feature pyramid: Lin et al., CVPR 2017,
arXiv:1612.03144, Section 4; as the base of Mask R-CNN: He et al., ICCV 2017, arXiv:1703.06870,
Sections 3 and 4; pytorch/vision: torchvision/models/detection.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dense_jax.errors import refuse
from dense_jax.layers.norm import BatchNorm
from dense_jax.models import resnet, vgg, zf
from dense_jax.models.rcnn.fpn import FeaturePyramid
from dense_jax.models.rcnn.heads import BoxPredictor, FourConvsDense, Res5, TwoDense
from dense_jax.models.rcnn.rpn import Objectness, ProposalHead
from dense_jax.models.vgg import scaled
from dense_jax.ops import roi
from dense_jax.ops.roi import RoiOp

Backbone = Literal[
    "resnet14", "resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d", "vgg16", "zf"
]
Neck = Literal["fpn", "c4", "dc5", "c5"]

_RESNETS = {
    "resnet14": resnet.resnet14,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnext101_32x8d": resnet.resnext101_32x8d,
    "resnext101_64x4d": resnet.resnext101_64x4d,
}


class _Plain(NamedTuple):
    """A trunk that is one stack of layers, with a single map of stride 16.

    Attributes:
      build: (**options of `vgg.Stack`) -> the trunk.
      ends: the last layer of each of its parts.
      features: channels of the map.
      bins: P, bins along each side of an RoI.
    """

    build: Callable[..., nn.Module]
    ends: tuple[str, ...]
    features: int
    bins: int


_PLAIN = {
    "vgg16": _Plain(
        functools.partial(vgg.vgg16, last="conv5_3"),
        ("pool1", "pool2", "pool3", "pool4", "conv5_3"),
        512,
        7,
    ),
    "zf": _Plain(zf.zf, ("pool1", "pool2", "conv3", "conv4", "conv5"), 256, 6),
}
_NUM_PARTS = 5  # of a trunk: conv1 and four stages; of plain ones, what `_Plain.ends` end
MOMENTUM = 0.9


class FasterRCNN(nn.Module):
    """A detector; maps images [B, H, W, C], any H, W >= 1, to scores and boxes in three steps.

    Boxes are (x0, y0, x1, y1) in pixels of the images with their padding. The caller pads H and W
    to multiples of 32, so that strides are exact.

    A subclass can have a trunk of its own (`examples/lite_mask_rcnn.py`): `_trunk` returns a module
    whose outputs hold the stages "layer1" to "layer4", and `frozen` names its parameters.

    Attributes:
      num_classes: K, classes with background, which is class 0.
      backbone: the trunk.
      neck: maps that proposals and RoIs come from. "fpn": a feature pyramid, with RoIs from P2 to
        P5. "c4": layer3, of stride 16; layer4 is the box head. "c5": the last map, of stride 32, or
        16 in VGG-16 and ZF. "dc5": layer4, dilated to stride 16.
      heads: "v1": one convolution in the proposal head, and two dense layers on RoIs. "v2": two
        convolutions, `FourConvsDense`, and normalisation in the pyramid, which it needs
        (torchvision's v2).
      anchor_sizes: square roots of the areas of anchors, in pixels: one for each level of a
        pyramid, or all for the single map. (): no proposals (Fast R-CNN).
      anchor_ratios: heights of anchors over their widths.
      objectness: see `ProposalHead`.
      roi_op: how RoIs are cropped, see `dense_jax.ops.roi`. "pool" (the papers' of Fast and Faster
        R-CNN) and "warp" crop from a single map only.
      roi_reduce: what "align" and "warp" take of the points in a bin.
      roi_samples: points along each side of a bin of "align"; None: one for each cell, at most 4.
      roi_aligned: whether features are in the centres of cells for "align" (detectron2); if not,
        they are at the upper left corners (torchvision, Detectron).
      res5_stride: stride of layer4 as a box head (C4): 1 on RoIs of 7x7, 2 on RoIs of 14x14.
      stride_in: the convolution of residual blocks that has the stride, see `resnet.ResNet`: "1x1"
        in the papers' ResNets (MSRA, Detectron, detectron2), "3x3" in torchvision and in ResNeXts.
      bn: "frozen" freezes the trunk's batch normalisation; the heads' always trains.
      bn_epsilon: constant added to the variance.
      trained_stages: number of parts of the trunk that train, counted from the last, of conv1 with
        bn1, layer1, ..., layer4, of the five blocks of VGG-16, or of ZF's conv1 to conv5. No
        gradient reaches the others. layer4 as a box head always trains.
      trunk_learns: False freezes the trunk and the pyramid as a whole, with their statistics.
      remat: whether to compute the inside of residual blocks again for gradients.
      dropout_rate: dropout rate behind fc6 and fc7 of VGG-16 and ZF.
      width: channel multiplier.
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      dtype: computation dtype of layers; the scores and boxes are float32.
    """

    num_classes: int
    backbone: Backbone = "resnet50"
    neck: Neck = "fpn"
    heads: Literal["v1", "v2"] = "v1"
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    objectness: Objectness = "sigmoid"
    roi_op: RoiOp = "align"
    roi_reduce: roi.Reduce = "mean"
    roi_samples: int | None = 2
    roi_aligned: bool = False
    res5_stride: Literal[1, 2] = 2
    stride_in: resnet.StrideIn = "3x3"
    bn: Literal["frozen", "train"] = "frozen"
    bn_epsilon: float = 1e-5
    trained_stages: Literal[0, 1, 2, 3, 4, 5] = 3
    trunk_learns: bool = True
    remat: bool = False
    dropout_rate: float = 0.5
    width: float = 1.0
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each map that `features` returns and proposals come from."""
        if self.neck == "fpn":
            return (4, 8, 16, 32, 64)
        return (32,) if self.neck == "c5" and self.backbone not in _PLAIN else (16,)

    @property
    def roi_strides(self) -> tuple[int, ...]:
        """Pixels per cell of each map that RoIs come from, the first ones of `strides`."""
        return self.strides[:4]

    @property
    def level_sizes(self) -> tuple[tuple[float, ...], ...]:
        """`anchor_sizes` of each map."""
        if self.neck == "fpn":
            return tuple((size,) for size in self.anchor_sizes)
        return (self.anchor_sizes,)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Regular expressions for the paths of the parameters that no gradient reaches."""
        num_frozen = self._num_frozen
        if self.backbone in _PLAIN:
            return tuple(f"^backbone/conv{i}[_/]" for i in range(1, num_frozen + 1))
        patterns = ["^backbone/(conv1|bn1)/", *(f"^backbone/layer{i}_" for i in range(1, 5))]
        patterns = patterns[: min(num_frozen, 4 if self.neck == "c4" else 5)]
        if self.neck == "fpn" and not self.trunk_learns:
            patterns.append("^fpn/")
        if self.bn == "frozen":
            patterns.append("(^backbone/|/layer4_).*(bn[123]|downsample_1)/")
        return tuple(patterns)

    @property
    def _num_frozen(self) -> int:
        """The number of parts of the trunk that no gradient reaches, counted from the first."""
        return _NUM_PARTS - (self.trained_stages if self.trunk_learns else 0)

    def setup(self) -> None:
        """Builds the parts of the network.

        Raises:
          UserError: the options do not go together.
        """
        self.check()
        norm = functools.partial(
            BatchNorm, momentum=MOMENTUM, epsilon=self.bn_epsilon, axis_name=self.axis_name
        )
        self.trunk = self._trunk()
        if self.neck == "fpn":
            own = functools.partial(norm, frozen=not self.trunk_learns)
            self.fpn = FeaturePyramid(
                scaled(256, self.width), own if self.heads == "v2" else None, self.dtype
            )
        if self.anchor_sizes:
            self.rpn = ProposalHead(
                num_anchors=len(self.level_sizes[0]) * len(self.anchor_ratios),
                features=self._num_features(),
                num_convs=2 if self.heads == "v2" else 1,
                objectness=self.objectness,
                dtype=self.dtype,
            )
        self.box_head = self._box_head(norm)
        self.box_predictor = BoxPredictor(self.num_classes)

    def check(self) -> None:
        """Raises UserError if the options do not go together; `setup` does the same."""
        is_plain, on_pyramid = self.backbone in _PLAIN, self.neck == "fpn"
        refuse(
            is_plain and self.neck != "c5",
            f"{self.backbone} has no {self.neck}: give neck=c5, or a ResNet",
        )
        refuse(
            is_plain and (self.remat or self.stride_in == "1x1"),
            f"{self.backbone} has no residual blocks: leave remat and stride_in out",
        )
        refuse(
            self.heads == "v2" and not on_pyramid,
            f"heads=v2 needs a pyramid, and neck={self.neck} has none: give neck=fpn, or heads=v1",
        )
        refuse(
            on_pyramid and self.roi_op != "align",
            f"roi_op={self.roi_op} crops from a single map: give roi_op=align, or another neck",
        )
        refuse(
            on_pyramid and len(self.anchor_sizes) not in (0, len(self.strides)),
            f"anchor_sizes={self.anchor_sizes}: give {len(self.strides)}, one for each level of "
            "the pyramid",
        )

    def _trunk(self) -> nn.Module:
        options: dict[str, Any] = dict(
            width=self.width, axis_name=self.axis_name, dtype=self.dtype, name="backbone"
        )
        num_frozen = self._num_frozen
        if plain := _PLAIN.get(self.backbone):
            return plain.build(frozen=(None, *plain.ends)[num_frozen], **options)
        build = _RESNETS[self.backbone]
        if self.neck == "c4":
            options["depths"] = build.keywords["depths"][:3]
        return build(
            output_stride=16 if self.neck == "dc5" else 32,
            stride_in=self.stride_in,
            # Behind the stride, the 3x3 convolution reads the finer grid.
            first_block_dilation="new" if self.stride_in == "1x1" else "previous",
            bn=self.bn if self.trunk_learns else "frozen",
            bn_momentum=MOMENTUM,
            bn_epsilon=self.bn_epsilon,
            num_frozen=num_frozen,
            remat=self.remat,
            **options,
        )

    def _num_features(self) -> int:
        """Returns the channels of the maps that `features` returns."""
        features = {"fpn": 256, "c4": 1024, "c5": 2048, "dc5": 2048}[self.neck]
        plain = _PLAIN.get(self.backbone)
        return scaled(plain.features if plain else features, self.width)

    def _box_head(self, norm: Callable[..., nn.Module]) -> nn.Module:
        is_plain = self.backbone in _PLAIN
        features = scaled(4096 if is_plain else 1024, self.width)
        if self.heads == "v2":
            return FourConvsDense(norm, scaled(256, self.width), features, self.dtype)
        if self.neck != "c4":
            rate = self.dropout_rate if is_plain else 0.0
            return TwoDense(features, rate, self.axis_name, self.dtype)
        options = _RESNETS[self.backbone].keywords
        groups, group_width = options.get("groups", 1), options.get("group_width", 64)
        inner, features = resnet.widths(4, groups, group_width, self.width)
        return Res5(
            functools.partial(norm, frozen=self.bn == "frozen"),
            depth=options["depths"][3],
            inner=inner,
            features=features,
            groups=groups,
            stride=self.res5_stride,
            stride_in=self.stride_in,
            remat=self.remat,
            dtype=self.dtype,
        )

    def features(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, ...]:
        """Maps images [B, H, W, C] to maps [B, H / s, W / s, C'] for each s of `strides`.

        Sizes are rounded up; those of ZF may be one larger, since Caffe pads its poolings.
        """
        stages = self.trunk(images, train=train)
        if self.neck == "fpn":
            levels = self.fpn([stages[f"layer{i}"] for i in range(1, 5)], train=train)
            return levels if self.trunk_learns else lax.stop_gradient(levels)
        last = "layer3" if self.neck == "c4" else "layer4"
        plain = _PLAIN.get(self.backbone)
        return (stages[plain.ends[-1] if plain else last],)

    def propose(
        self, features: Sequence[jax.Array], *, train: bool = False
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Maps the maps to logits [B, H W A] and deltas [B, H W A, 4] of the anchors of each.

        Raises:
          ValueError: there are no anchors.
        """
        del train  # the head is the same; a training step calls every method with it
        if not self.anchor_sizes:
            raise ValueError("This network has no anchors, and takes boxes that are given.")
        return self.rpn(features)

    def classify(
        self, features: Sequence[jax.Array], boxes: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Crops boxes from the maps, and returns scores of classes and better boxes.

        Args:
          features: the result of `features`.
          boxes: [B, R, 4] in pixels of the images. No gradient reaches them.
          train: whether to drop units and to update statistics.

        Returns:
          Class logits [B, R, K] and box deltas [B, R, K, 4], see `heads.BoxPredictor`; float32.
        """
        chex.assert_shape(boxes, (len(features[0]), None, 4))
        rois = self._crop(features, boxes)
        logits, deltas = self.box_predictor(self.box_head(rois, train=train))
        return logits.reshape(*boxes.shape[:2], -1), deltas.reshape(*boxes.shape[:2], -1, 4)

    def _crop(
        self, features: Sequence[jax.Array], boxes: jax.Array, bins: int | None = None
    ) -> jax.Array:
        """Returns the RoIs of all images, [B R, P, P, C]; by default those of the box head."""
        if bins is None:
            bins = _PLAIN[self.backbone].bins if self.backbone in _PLAIN else 7
            bins *= self.res5_stride if self.neck == "c4" else 1
        if self.roi_op == "align":
            rois = roi.roi_align(
                features[: len(self.roi_strides)],
                boxes,
                bins=bins,
                strides=self.roi_strides,
                samples=self.roi_samples,
                aligned=self.roi_aligned,
                reduce=self.roi_reduce,
            )
        elif self.roi_op == "warp":
            rois = roi.roi_warp(
                features[0], boxes, bins=bins, stride=self.strides[0], reduce=self.roi_reduce
            )
        else:
            rois = roi.roi_pool(features[0], boxes, bins=bins, stride=self.strides[0])
        return rois.reshape(-1, *rois.shape[2:])

    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Runs all parts, with the whole image as the only box of each; for shapes and summaries.

        Returns:
          The maps, "p2" to "p6" or "c4" or "c5"; "anchor_logits" [B, N] and "anchor_deltas"
          [B, N, 4] over all levels, unless there are no anchors; "class_logits" [B, 1, K] and
          "box_deltas" [B, 1, K, 4].
        """
        height, width = vgg.image_size(images)
        levels = self.features(images, train=train)
        names = [f"p{i}" for i in range(2, 7)] if self.neck == "fpn" else [self.neck[-2:]]
        outputs = dict(zip(names, levels, strict=True))
        if self.anchor_sizes:
            logits, deltas = self.propose(levels)
            outputs["anchor_logits"] = jnp.concatenate(logits, axis=1)
            outputs["anchor_deltas"] = jnp.concatenate(deltas, axis=1)
        whole = jnp.array([0, 0, width, height], jnp.float32)
        boxes = jnp.broadcast_to(whole, (len(images), 1, 4))
        return outputs | self._branches(levels, boxes, train=train)

    def _branches(
        self, levels: Sequence[jax.Array], boxes: jax.Array, *, train: bool
    ) -> dict[str, jax.Array]:
        """Returns what the network says of boxes, by name."""
        logits, deltas = self.classify(levels, boxes, train=train)
        return {"class_logits": logits, "box_deltas": deltas}


fasterrcnn_resnet50_fpn = FasterRCNN
fasterrcnn_resnet50_fpn_v2 = functools.partial(FasterRCNN, heads="v2", bn="train")
# The paper's (Section 3.3); on COCO it adds anchors of 64 pixels.
faster_rcnn_vgg16 = functools.partial(
    FasterRCNN,
    backbone="vgg16",
    neck="c5",
    anchor_sizes=(128, 256, 512),
    objectness="softmax",
    roi_op="pool",
)
fast_rcnn_vgg16 = functools.partial(faster_rcnn_vgg16, anchor_sizes=())
