"""torchvision's networks, ours beside them, and which of their layers are the same."""

import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dense_jax.models import deeplabv3, resnet, segnet, vgg
from dense_jax.models.rcnn import faster_rcnn, mask_rcnn
from dense_jax.releases import catalogue
from dense_jax.weights import rules
from tests.parity import drawn

REFERENCE = pathlib.Path(__file__).parent / "reference"
_NUM_VALUES = 400  # kept of each stage


def _forward(model: nn.Module, variables: Any, images: jax.Array) -> Any:
    return model.apply(variables, images, train=False)


class Network(NamedTuple):
    """One of torchvision's networks.

    Attributes:
      build: ours.
      size: height and width of the image; odd ones tell poolings and paddings apart.
      stages: our output -> name of torchvision's module, "" for the network itself; None for
        detectors, whose parts `theirs` calls one by one.
      run: function from ours, its variables and images to its outputs.
    """

    build: Callable[[], nn.Module]
    size: tuple[int, int]
    stages: Mapping[str, str | None]
    run: Callable[[nn.Module, Any, jax.Array], Any] = _forward


_TRUNK = {
    "conv1": "relu",
    "pool1": "maxpool",
    **{f"layer{i}": f"layer{i}" for i in range(1, 5)},
}
_RESNET = {**_TRUNK, "fc": ""}
_SEGMENTER = {
    **{ours: f"backbone.{theirs}" for ours, theirs in _TRUNK.items()},
    "scores": "classifier",
    "aux_scores": "aux_classifier",
    "logits": "out",
    "aux_logits": "aux",
}
# Behind each stage's pooling; fc6 and fc7 behind their ReLUs.
_VGG = {f"pool{i}": f"features.{n}" for i, n in enumerate((4, 9, 16, 23, 30), 1)}
_VGG_BN = {f"pool{i}": f"features.{n}" for i, n in enumerate((6, 13, 23, 33, 43), 1)}


# Boxes in an image of 128x160, from both of the levels that its boxes may have, P2 and P3.
BOXES = np.array(
    [[3.5, 10, 40, 31.25], [0, 0, 160, 128], [64, 32, 112, 96], [13, 2, 150.5, 120]], np.float32
)
_LEVELS = tuple(f"p{i}" for i in range(2, 7))
_PROPOSALS = ("anchor_logits", "anchor_deltas")
_DETECTIONS = ("class_logits", "box_deltas", "mask_logits")  # the last of Mask R-CNN alone


def _detect(model: nn.Module, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    def steps(detector: Any) -> dict[str, jax.Array]:
        levels = detector.features(images, train=False)
        proposals = [jnp.concatenate(parts, axis=1) for parts in detector.propose(levels)]
        boxes = jnp.asarray(BOXES[None])
        detections = detector.classify(levels, boxes, train=False)
        if hasattr(detector, "draw"):
            detections = (*detections, detector.draw(levels, boxes))
        names = (*_LEVELS, *_PROPOSALS, *_DETECTIONS)
        return dict(zip(names, (*levels, *proposals, *detections), strict=False))

    return nn.apply(steps, model)(variables)


def _detector(heads: Literal["v1", "v2"], *, masks: bool = False) -> Network:
    kind = mask_rcnn.MaskRCNN if masks else faster_rcnn.FasterRCNN
    build = functools.partial(kind, 91, heads=heads)
    stages = dict.fromkeys((*_LEVELS, *_PROPOSALS, *_DETECTIONS[: 3 if masks else 2]))
    return Network(build, (128, 160), stages, _detect)


def _resnet(name: str) -> Network:
    return Network(functools.partial(getattr(resnet, name), num_classes=1000), (95, 122), _RESNET)


def _segmenter(name: str) -> Network:
    return Network(functools.partial(getattr(deeplabv3, name), 21, aux=True), (75, 98), _SEGMENTER)


NETWORKS = {
    # torchvision pools whatever it gets to 7x7 units; these come from 224 pixels, as published.
    "vgg16": Network(vgg.vgg16, (224, 224), {**_VGG, "fc6": "classifier.1", "fc7": "classifier.4"}),
    # Multiples of 32 pixels: ours rounds the sizes of poolings up, theirs down.
    "vgg16_bn": Network(functools.partial(segnet.SegNet, 12, bn_epsilon=1e-5), (96, 128), _VGG_BN),
    **{
        name: _resnet(name)
        for name in ("resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d")
    },
    **{
        name: _segmenter(name)
        for name in ("fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101")
    },
    "fasterrcnn_resnet50_fpn": _detector("v1"),
    "fasterrcnn_resnet50_fpn_v2": _detector("v2"),
    "maskrcnn_resnet50_fpn": _detector("v1", masks=True),
    "maskrcnn_resnet50_fpn_v2": _detector("v2", masks=True),
}


def thinned(values: np.ndarray) -> np.ndarray:
    """Returns every k-th value of [B, H, W, C]; k and C share no factor, so channels take turns."""
    step = max(1, values.size // _NUM_VALUES)
    while math.gcd(step, values.shape[-1]) > 1:
        step += 1
    return values.reshape(-1)[::step]


def kept(name: str) -> tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
    """Returns the shapes of torchvision's state dict and the thinned stages, both as stored."""
    with np.load(REFERENCE / f"{name}.npz") as arrays:
        stages = {stage: arrays[stage] for stage in NETWORKS[name].stages}
        lines = bytes(arrays["state_dict"]).decode().splitlines()
    names_and_shapes = (line.split(" ") for line in lines)
    return {key: tuple(map(int, shape)) for key, *shape in names_and_shapes}, stages


def keep(name: str, shapes: Mapping[str, Sequence[int]], stages: Mapping[str, np.ndarray]) -> None:
    """Stores what `kept` returns; stages are given whole."""
    lines = "\n".join(" ".join(map(str, [key, *shape])) for key, shape in shapes.items())
    state_dict = np.frombuffer(lines.encode(), np.uint8)
    thin: Any = {stage: thinned(values) for stage, values in stages.items()}
    np.savez_compressed(REFERENCE / f"{name}.npz", state_dict=state_dict, **thin)


def loaded(name: str, tensors: Mapping[str, np.ndarray], model: nn.Module) -> Any:
    """Returns the variables of our network, from torchvision's tensors.

    They come in by the rules that `import-weights` goes by; whatever these do not explain raises
    `UserError`, but for the decoder of SegNet, which is zero.
    """
    template = rules.template_of(model)
    release = rules.choose(catalogue.releases(), template, rules.outline(tensors))
    required = release.trunk if name == "vgg16_bn" else ("*",)
    found, _ = rules.load(template, tensors, release.rules, required=required)
    leaves: Any = traverse_util.flatten_dict(template)
    zeros = {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict({**zeros, **traverse_util.flatten_dict(found)})


def ours(
    name: str,
    tensors: Mapping[str, np.ndarray],
    model: nn.Module | None = None,
    until: str | None = None,
) -> dict[str, np.ndarray]:
    """Returns the stages of our network, whole, with torchvision's tensors.

    Args:
      name: of the network.
      tensors: a state dict of torchvision's.
      model: another network in place of ours.
      until: the last stage to compute. Default: all of them.
    """
    network = NETWORKS[name]
    model, stages = model or network.build(), list(network.stages)
    stages = stages[: stages.index(until) + 1] if until else stages

    # Without optimisation, which takes longer than it saves.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        outputs = network.run(model, variables, images)
        return {stage: outputs[stage] for stage in stages}

    return jax.device_get(run(loaded(name, tensors, model), drawn.image(*network.size)))


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Returns the largest difference of two arrays over the largest magnitude of the second."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
