"""Mask R-CNN: Faster R-CNN with branches that draw a mask or find keypoints in each box.

The parameters are those of Faster R-CNN (`dense_jax.models.rcnn.faster_rcnn`), "mask_head" and
"mask_predictor", "keypoint_head" and "keypoint_predictor", with torchvision's names.

References: He, Gkioxari, Dollar, Girshick, "Mask R-CNN", ICCV 2017, arXiv:1703.06870v3, Section 3,
and Section 5 for keypoints; pytorch/vision: torchvision/models/detection/{mask_rcnn,
keypoint_rcnn}.py; with layer4 as the head of boxes and masks:
facebookresearch/detectron2: detectron2/modeling/roi_heads/roi_heads.py (`Res5ROIHeads`).
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax

from dense_jax.errors import refuse
from dense_jax.layers.norm import BatchNorm
from dense_jax.models.rcnn.faster_rcnn import MOMENTUM, FasterRCNN
from dense_jax.models.rcnn.heads import (
    KeypointConvs,
    KeypointPredictor,
    MaskConvs,
    MaskDense,
    MaskPredictor,
)
from dense_jax.models.vgg import scaled

MaskLayers = Literal["fcn", "mlp", "mlp3"]
MaskClass = Literal["specific", "agnostic"]


class MaskRCNN(FasterRCNN):
    """A detector that also draws masks, finds keypoints, or both; see `FasterRCNN`.

    Attributes:
      draws_masks: whether there is a branch for masks.
      mask_layers: "fcn": convolutions on RoIs of 14x14 and an up-convolution to masks of 28x28; in
        C4, the up-convolution alone, from layer4's maps of 7x7 to masks of 14x14. "mlp", "mlp3":
        two or three dense layers in place of convolutions (Table 2e).
      mask_class: whether each class has a mask of its own, or all share one.
      num_keypoints: keypoints of each box, which classes share; 0: there is no branch for them.
    """

    draws_masks: bool = True
    mask_layers: MaskLayers = "fcn"
    mask_class: MaskClass = "specific"
    num_keypoints: int = 0

    @property
    def mask_bins(self) -> int:
        """M, cells along each side of a mask."""
        return 14 if self.neck == "c4" else 28

    def setup(self) -> None:
        """Builds the parts of the network."""
        super().setup()
        if self.num_keypoints:
            self.keypoint_head = KeypointConvs(scaled(512, self.width), dtype=self.dtype)
            self.keypoint_predictor = KeypointPredictor(self.num_keypoints, self.dtype)
        if not self.draws_masks:
            return
        num_masks = 1 if self.mask_class == "agnostic" else self.num_classes
        channels = scaled(256, self.width)
        if self.mask_layers != "fcn":
            self.mask_predictor = MaskDense(
                num_masks,
                bins=self.mask_bins,
                num_layers=3 if self.mask_layers == "mlp3" else 2,
                features=scaled(1024, self.width),
                dtype=self.dtype,
            )
            return
        if self.neck != "c4":
            norm = functools.partial(
                BatchNorm, momentum=MOMENTUM, epsilon=self.bn_epsilon, axis_name=self.axis_name
            )
            norms = norm if self.heads == "v2" else None
            self.mask_convs = MaskConvs(channels, norms, self.dtype, name="mask_head")
        self.mask_predictor = MaskPredictor(num_masks, channels, self.dtype)

    def check(self) -> None:
        """Raises UserError if the options do not go together; `setup` does the same."""
        super().check()
        refuse(
            self.neck == "c4" and self.mask_layers != "fcn",
            f"mask_layers={self.mask_layers} needs RoIs of its own, and c4 shares layer4: give "
            "mask_layers=fcn, or another neck",
        )

    def classify_and_draw(
        self, features: Sequence[jax.Array], boxes: jax.Array, num_masks: int, *, train: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns what `classify` does, and the masks of the first boxes of each image.

        Args:
          features: the result of `features`.
          boxes: [B, R, 4] in pixels of the images. No gradient reaches them.
          num_masks: N, how many boxes get a mask.
          train: whether to update statistics.

        Returns:
          Class logits [B, R, K], box deltas [B, R, K, 4], and mask logits [B, N, M, M, K] (or 1 in
          place of K for masks that classes share).
        """
        if self.neck != "c4":
            return (
                *self.classify(features, boxes, train=train),
                self.draw(features, boxes[:, :num_masks], train=train),
            )
        maps = self.box_head(self._crop(features, boxes), train=train)
        logits, deltas = self.box_predictor(maps)
        own = maps.reshape(*boxes.shape[:2], *maps.shape[1:])[:, :num_masks]
        masks = self.mask_predictor(own.reshape(-1, *maps.shape[1:]))
        return (
            logits.reshape(*boxes.shape[:2], -1),
            deltas.reshape(*boxes.shape[:2], -1, 4),
            masks.reshape(*own.shape[:2], *masks.shape[1:]),
        )

    def draw(
        self, features: Sequence[jax.Array], boxes: jax.Array, *, train: bool = False
    ) -> jax.Array:
        """Returns mask logits [B, R, M, M, K] of boxes [B, R, 4]; see `classify_and_draw`."""
        if self.neck == "c4":
            x = self.box_head(self._crop(features, boxes), train=train)
        else:
            x = self._crop(features, boxes, bins=14)
            x = self.mask_convs(x, train=train) if self.mask_layers == "fcn" else x
        masks = self.mask_predictor(x)
        return masks.reshape(*boxes.shape[:2], *masks.shape[1:])

    def locate(
        self, features: Sequence[jax.Array], boxes: jax.Array, *, train: bool = False
    ) -> jax.Array:
        """Returns keypoint logits [B, R, 56, 56, num_keypoints] of the cells of boxes [B, R, 4]."""
        del train  # the head is the same; a training step calls every method with it
        logits = self.keypoint_predictor(self.keypoint_head(self._crop(features, boxes, bins=14)))
        return logits.reshape(*boxes.shape[:2], *logits.shape[1:])

    def _branches(
        self, levels: Sequence[jax.Array], boxes: jax.Array, *, train: bool
    ) -> dict[str, jax.Array]:
        """Returns what the network says of boxes, by name: "mask_logits", "keypoint_logits"."""
        if self.draws_masks:
            names = ("class_logits", "box_deltas", "mask_logits")
            found = self.classify_and_draw(levels, boxes, boxes.shape[1], train=train)
            outputs = dict(zip(names, found, strict=True))
        else:
            outputs = super()._branches(levels, boxes, train=train)
        if self.num_keypoints:
            outputs["keypoint_logits"] = self.locate(levels, boxes)
        return outputs


maskrcnn_resnet50_fpn = MaskRCNN
maskrcnn_resnet50_fpn_v2 = functools.partial(MaskRCNN, heads="v2", bn="train")
keypointrcnn_resnet50_fpn = functools.partial(MaskRCNN, draws_masks=False, num_keypoints=17)
