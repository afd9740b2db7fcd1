"""torchvision's networks, run by torch."""

import importlib
import inspect
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tests.parity import drawn, zoo

_declared: list[Any] = []  # torch forgets an operator with the library that declared it


def import_torchvision(*, compiled: bool = False) -> Any:
    """Returns torchvision; built for another torch, it lacks operators, which are declared.

    Args:
      compiled: whether its operators are needed: its own, or else those of the library that
        `DENSE_JAX_TORCHVISION_OPS` names.
    """
    path = os.environ.get("DENSE_JAX_TORCHVISION_OPS")
    try:
        if compiled and path:
            torch.ops.load_library(path)
            for name in ("torchvision.extension", "torchvision.ops.roi_align"):
                module: Any = importlib.import_module(name)
                module._has_ops = lambda: True
        return importlib.import_module("torchvision")
    except RuntimeError:  # operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        return importlib.import_module("torchvision")


def build(name: str) -> torch.nn.Module:
    """Returns a network of torchvision, its tensors without memory yet."""
    models = import_torchvision().models
    with torch.device("meta"):
        if "rcnn" in name:
            build = getattr(models.detection, name)
            return build(weights=None, weights_backbone=None)
        if "_resnet" in name:
            build = getattr(models.segmentation, name)
            return build(weights=None, weights_backbone=None, aux_loss=True)
        return getattr(models, name)(weights=None)


def shapes_of(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a network's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def stages(name: str, network: torch.nn.Module, tensors: Mapping[str, np.ndarray]):
    """Returns the stages of a network of torchvision, [B, H, W, C] or [B, C], by our names."""
    state_dict = {key: torch.from_numpy(values) for key, values in tensors.items()}
    network.load_state_dict(state_dict, strict=True, assign=True)
    network.eval()
    images = torch.from_numpy(drawn.image(*zoo.NETWORKS[name].size)).permute(0, 3, 1, 2)
    if "rcnn" in name:
        with torch.inference_mode():
            return _detected(name, network, images)
    seen: dict[str, Any] = {}

    def keep(ours: str):
        return lambda module, inputs, output: seen.update({ours: output.clone()})

    for ours, module in zoo.NETWORKS[name].stages.items():
        if module and module not in ("out", "aux"):
            network.get_submodule(module).register_forward_hook(keep(ours))
    with torch.inference_mode():
        result = network(images)
    for ours, module in zoo.NETWORKS[name].stages.items():
        if ours not in seen:
            seen[ours] = result[module] if module else result
    return {
        ours: np.moveaxis(output.numpy(), 1, -1) if output.ndim == 4 else output.numpy()
        for ours, output in seen.items()
    }


def _detected(name: str, network: Any, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Returns what the parts of a detector give, without choosing proposals or detections."""
    rpn = importlib.import_module("torchvision.models.detection.rpn")
    # Without compiled operators, torchvision would compile its form in Python, which warns.
    roi_align: Any = importlib.import_module("torchvision.ops.roi_align")
    roi_align._roi_align = inspect.unwrap(roi_align._roi_align)
    levels, boxes = network.backbone(images), torch.from_numpy(zoo.BOXES)
    proposals = rpn.concat_box_prediction_layers(*network.rpn.head(list(levels.values())))
    rois = network.roi_heads.box_roi_pool(levels, [boxes], [tuple(images.shape[2:])])
    logits, deltas = network.roi_heads.box_predictor(network.roi_heads.box_head(rois))
    outputs = [np.moveaxis(level.numpy(), 1, -1) for level in levels.values()]
    outputs += [proposals[0].reshape(1, -1).numpy(), proposals[1].reshape(1, -1, 4).numpy()]
    outputs += [logits[None].numpy(), deltas.reshape(1, len(boxes), -1, 4).numpy()]
    if network.roi_heads.has_mask():
        rois = network.roi_heads.mask_roi_pool(levels, [boxes], [tuple(images.shape[2:])])
        masks = network.roi_heads.mask_predictor(network.roi_heads.mask_head(rois))
        outputs.append(np.moveaxis(masks.numpy(), 1, -1)[None])
    return dict(zip(zoo.NETWORKS[name].stages, outputs, strict=True))


def pasting(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Returns torchvision's probabilities of the pixels of an image, [N, 1, H, W]."""
    heads: Any = importlib.import_module("torchvision.models.detection.roi_heads")
    return heads.paste_masks_in_image(masks, boxes, size)


def detector(
    name: str, tensors: Mapping[str, np.ndarray], num_proposals: int = 1000, num_rois: int = 512
) -> tuple[Any, Any]:
    """Returns a detector of torchvision in evaluation, and its class of lists of images.

    Its samples of anchors follow from `detection.uniform`, and those of boxes from
    `detection.numbers_of`. It needs compiled operators.
    """
    from tests.parity import detection

    torchvision = import_torchvision(compiled=True)
    network: Any = build(name)
    state_dict = {key: torch.from_numpy(values) for key, values in tensors.items()}
    network.load_state_dict(state_dict, strict=True, assign=True)
    network.eval()
    network.rpn.fg_bg_sampler = detection.Sampler(256, 128)
    network.rpn._post_nms_top_n["testing"] = num_proposals
    sampler = network.roi_heads.fg_bg_sampler = detection.Sampler(num_rois, num_rois // 4)
    add = network.roi_heads.add_gt_proposals

    def add_objects(proposals: Any, objects: Any) -> Any:
        (boxes,) = add(proposals, objects)
        sampler.set_boxes(boxes.numpy())
        return [boxes]

    network.roi_heads.add_gt_proposals = add_objects
    return network, torchvision.models.detection.image_list.ImageList
