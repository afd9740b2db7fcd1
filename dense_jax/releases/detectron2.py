"""Published weights of Faster and Mask R-CNN in detectron2.

Background is the last class there, and has neither boxes nor masks. Images are BGR.

References: facebookresearch/detectron2: MODEL_ZOO.md; configs/Base-RCNN-{FPN,C4,DilatedC5}.yaml;
detectron2/modeling/backbone/{resnet,fpn}.py, proposal_generator/rpn.py and roi_heads; with all
names of a network in an issue: facebookresearch/detectron2#4172.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from dense_jax.models.rcnn.faster_rcnn import FasterRCNN
from dense_jax.models.rcnn.mask_rcnn import MaskRCNN
from dense_jax.releases import faster_rcnn, resnet
from dense_jax.releases.catalogue import Network
from dense_jax.weights import rules
from dense_jax.weights.rules import Release, Rule

TRUNK = (*faster_rcnn.TRUNK, "*/box_head/layer4_*")
_STAGES = range(2, 6)  # res2 is layer1 here


def _trunk(source: str, target: str, layout: str, last: tuple[str, str] | None) -> list[Rule]:
    """Returns rules for a residual network.

    Args:
      source: what stands in front of its names there.
      target: and here.
      layout: of the first kernel.
      last: the same two for the last stage.
    """
    stem = f"{source}stem.conv1"
    table = [rules.conv(stem, f"{target}conv1", layout)[0]]
    table += rules.batch_norm(f"{stem}.norm", f"{target}bn1")
    for number in _STAGES:
        theirs, ours = last if last and number == _STAGES[-1] else (source, target)
        theirs, ours = f"{theirs}res{number}.{{b}}", f"{ours}layer{number - 1}_{{b}}"
        table += rules.conv(f"{theirs}.conv{{i}}", f"{ours}/conv{{i}}")[:1]
        table += rules.batch_norm(f"{theirs}.conv{{i}}.norm", f"{ours}/bn{{i}}")
        table += rules.conv(f"{theirs}.shortcut", f"{ours}/downsample_0")[:1]
        table += rules.batch_norm(f"{theirs}.shortcut.norm", f"{ours}/downsample_1")
    return table


def _rows(source: str, target: str, rows: str, layout: str) -> tuple[Rule, Rule]:
    """Returns rules for a layer with other rows than here, in the kernel and in the bias."""
    kernel, bias = rules.conv(source, target, f"{rows}+{layout}")
    return kernel, bias._replace(layout=rows)


def _detector(neck: str) -> tuple[Rule, ...]:
    """Returns rules for Faster and Mask R-CNN; see `FasterRCNN.neck`."""
    trunk = "backbone.bottom_up." if neck == "fpn" else "backbone."
    last = ("roi_heads.", "box_head/") if neck == "c4" else None
    table = _trunk(trunk, "backbone/", "conv+bgr", last)
    if neck == "fpn":
        for number in _STAGES:
            for theirs, ours in (("lateral", "inner"), ("output", "layer")):
                table += rules.conv(
                    f"backbone.fpn_{theirs}{number}", f"fpn/{ours}_blocks_{number - 2}"
                )
    table += rules.conv("proposal_generator.rpn_head.conv", "rpn/conv1")
    for theirs, ours, rows in (
        ("objectness_logits", "cls_logits", "ratios_inner"),
        ("anchor_deltas", "bbox_pred", "ratios_inner_boxes"),
    ):
        names = f"proposal_generator.rpn_head.{theirs}", f"rpn/{ours}"
        # A level of a pyramid has one size.
        table += rules.conv(*names) if neck == "fpn" else _rows(*names, rows, "conv")
    if neck != "c4":
        table += rules.conv("roi_heads.box_head.fc1", "box_head/fc6", "dense_chw")
        table += rules.dense("roi_heads.box_head.fc2", "box_head/fc7")
    for name, rows in (("cls_score", "background_last"), ("bbox_pred", "object_boxes")):
        theirs = f"roi_heads.box_predictor.{name}"
        table += _rows(theirs, f"box_predictor/{name}", rows, "dense")
    for i in range(1, 5):
        table += rules.conv(f"roi_heads.mask_head.mask_fcn{i}", f"mask_head/mask_fcn{i}")
    table += rules.conv("roi_heads.mask_head.deconv", "mask_predictor/conv5_mask", "up_conv")
    table += _rows(
        "roi_heads.mask_head.predictor", "mask_predictor/mask_fcn_logits", "objects", "conv"
    )
    for name in ("pixel_mean", "pixel_std"):
        table.append(Rule(name, None, reason="--normalisation has it"))
    anchors = "proposal_generator.anchor_generator.cell_anchors.{level}"
    table.append(Rule(anchors, None, reason="--anchor-sizes and --anchor-ratios have it"))
    return tuple(table)


def is_grouped(name: str) -> Callable[[Mapping[str, Any]], bool]:
    """Returns a `Release.sign`: whether a kernel there, [o, i, h, w], is of a ResNeXt."""

    def sign(tensors: Mapping[str, Any]) -> bool:
        shape = tensors[name].shape if name in tensors else ()
        return len(shape) == 4 and shape[1] < shape[0]

    return sign


def _detectors(neck: str, name: str) -> tuple[Release, Release]:
    """Returns the releases on ResNets, whose pixels are not scaled, and on ResNeXts."""
    table = _detector(neck)
    first_block = table[0].source.replace("stem.conv1", "res2.0.conv2")
    release = functools.partial(Release, rules=table, trunk=TRUNK)
    return (
        release(
            f"detectron2's R-CNN on ResNet-{name}",
            normalisation="detectron2",
            needs="--recipe=detectron2 --stride-in=1x1",
        ),
        release(
            f"detectron2's R-CNN on ResNeXt-{name}",
            normalisation="torchvision",
            needs="--recipe=detectron2 --stride-in=3x3",
            sign=is_grouped(first_block),
        ),
    )


DETECTORS = tuple(
    release
    for neck, name in (("fpn", "FPN"), ("c4", "C4"), ("dc5", "DC5"))
    for release in _detectors(neck, name)
)
# What detectron2 makes of torchvision's files, tools/convert-torchvision-to-d2.py: for RGB images.
TORCHVISION = Release(
    "detectron2's form of torchvision's ResNet",
    (*_trunk("", "", "conv", None), *rules.dense("stem.fc", "fc")),
    resnet.TRUNK,
    normalisation="torchvision",
    needs="--stride-in=3x3, the default but in DeepLab v2 and the paper presets of Mask R-CNN",
)

RELEASES = (*DETECTORS, TORCHVISION, *resnet.of_detectors(TORCHVISION, ""))
_BACKBONES: dict[str, dict[str, Any]] = {
    "R_50": dict(backbone="resnet50", stride_in="1x1"),
    "R_101": dict(backbone="resnet101", stride_in="1x1"),
    "X_101_32x8d": dict(backbone="resnext101_32x8d"),
    "X_101_64x4d": dict(backbone="resnext101_64x4d"),  # Detectron's alone
}
NETWORKS = {  # background and COCO's 80 classes
    f"{kind}_rcnn_{name}_{neck.upper()}": Network(
        functools.partial(build, neck=neck, roi_aligned=True, roi_samples=None, **options),
        num_classes=81,
    )
    for kind, build in (("faster", FasterRCNN), ("mask", MaskRCNN))
    for name, options in _BACKBONES.items()
    for neck in ("c4", "dc5", "fpn")
}
