"""What Faster R-CNN proposes, finds and loses in one image: torchvision's, and ours."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.objectives import rcnn
from dense_jax.ops.proposals import propose
from dense_jax.tasks import rcnn_recipes
from dense_jax.tasks.detection import Detection
from experiments import faster_rcnn as script
from tests.parity import drawn, zoo

REFERENCE = pathlib.Path(__file__).parent / "reference" / "detections.npz"
NAMES: dict[str, Any] = {"fasterrcnn_resnet50_fpn": "v1", "fasterrcnn_resnet50_fpn_v2": "v2"}
NUM_CLASSES = 91
PADDED, TRUE = (128, 160), (117, 150)  # height and width with and without padding
BOXES = np.array(
    [[10, 20, 60, 90], [55.5, 8, 149, 100], [100, 80, 117, 95], [1, 1, 8, 9]], np.float32
)
CLASSES = np.array([3, 17, 90, 3])
NUM_PROPOSALS, NUM_ROIS = 256, 128  # of the first stage in evaluation; that train the head
_TIE = 1e-6  # of logits and probabilities
LOSSES = ("rpn_class", "rpn_box", "class", "box")


def batch_of(padded: tuple[int, int], true: tuple[int, int] | None = None) -> dict[str, Any]:
    """Returns a batch of one image with zeros below and at its right, and the objects in it."""
    height, width = true or padded
    pixels = drawn.image(*padded)
    pixels[:, height:] = 0
    pixels[:, :, width:] = 0
    valid = np.ones((1, len(BOXES)), bool)
    return {
        "images": pixels,
        "size": np.array([[height, width]]),
        "index": np.array([0]),
        "objects": {"boxes": BOXES[None], "classes": CLASSES[None], "valid": valid},
    }


def targets() -> list[dict[str, Any]]:
    """Returns the objects as torchvision takes them."""
    import torch

    return [{"boxes": torch.from_numpy(BOXES), "labels": torch.from_numpy(CLASSES)}]


def uniform(name: str, count: int) -> np.ndarray:
    """Returns random numbers in [0, 1) that decide which anchors or boxes train, [count]."""
    return np.float32(0.5) + drawn.uniform(name, (count,)) / np.float32(2.001)


def numbers_of(boxes: Any) -> Any:
    """Returns numbers in [0, 1) that decide which of some boxes train, by their places.

    Not by their ranks: of two scores that are nearer than a rounding error, either may come first.

    Args:
      boxes: [..., R, 4], NumPy's or traced.
    """
    cells = (boxes + 1) // 8
    return (cells @ np.array([73, 179, 283, 419], np.float32)) % 997 / 997


def sample_by_place(proposals: Any, objects: Any, uniform: Any, rule: Any) -> Any:
    """Takes the place of `dense_jax.objectives.rcnn.sample_rois`."""
    boxes = jnp.concatenate([proposals.boxes, objects["boxes"]], axis=1)
    chex.assert_equal_shape([boxes[..., 0], uniform])
    return _sample_rois(proposals, objects, numbers_of(boxes), rule)


_sample_rois = rcnn.sample_rois


def kept(name: str) -> dict[str, np.ndarray]:
    """Returns what `theirs` gave."""
    with np.load(REFERENCE) as arrays:
        return {key[len(name) + 1 :]: arrays[key] for key in arrays if key.startswith(f"{name}/")}


def keep(outputs: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Stores what `kept` returns, by name."""
    flat: Any = {f"{name}/{key}": x for name, some in outputs.items() for key, x in some.items()}
    np.savez_compressed(REFERENCE, **flat)


def differences(
    found: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Returns how far we are from torchvision, relative to the largest magnitude.

    What is ranked must be in the same order, but where our scores are nearer than a rounding error.
    """
    result = {name: float(abs(found[name] / reference[name] - 1)) for name in LOSSES}
    for ranks, arrays in {"logits": ("proposals",), "scores": ("boxes", "classes")}.items():
        count = len(reference[arrays[0]])
        assert np.all(found[ranks][count:] == 0) or ranks == "logits"
        gaps = np.abs(np.diff(found[ranks][:count], prepend=np.inf, append=-np.inf))
        is_alone = np.minimum(gaps[1:], gaps[:-1]) > _TIE
        assert is_alone.mean() > 0.9
        for name in arrays:
            ours, theirs = found[name][:count][is_alone], reference[name][is_alone]
            result[name] = zoo.apart(ours, theirs)
    result["scores"] = zoo.apart(found["scores"][: len(reference["scores"])], reference["scores"])
    return result


def build(name: str, **flags: Any) -> Detection:
    """Returns our task with torchvision's conventions."""
    config = dataclasses.replace(script.PRESETS["coco"], heads=NAMES[name], **flags)
    return script.build(config, NUM_CLASSES)


def parameters(name: str) -> dict[str, np.ndarray]:
    """Returns a state dict of torchvision's network, with smaller scores and moves of anchors.

    torchvision ranks proposals by the sigmoid of logits, which is 1 from about 17 on.
    """
    tensors = drawn.parameters(zoo.kept(name)[0])
    for key, values in tensors.items():
        if key.startswith(("rpn.head.cls_logits", "rpn.head.bbox_pred")):
            tensors[key] = values * np.float32(0.1)
    return tensors


def ours(name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns "proposals" [256, 4] and their "logits", "boxes", "classes", "scores" and losses.

    Args:
      name: of torchvision's network.
      tensors: its state dict.
    """
    task = build(name, bn="train", test_proposals=NUM_PROPOSALS, rois_per_image=NUM_ROIS)
    model: Any = task.model
    recipe = rcnn_recipes.RECIPES["torchvision"]

    def losses(variables: Any, batch: dict[str, Any]) -> dict[str, jax.Array]:
        def apply(*inputs: Any, **options: Any) -> Any:
            return model.clone(axis_name=None).apply(variables, *inputs, train=False, **options)

        found = task.objective(apply, batch, jax.random.key(0))
        return {key: value / jnp.float32(count) for key, (value, count) in found.items()}

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(variables: Any, batch: dict[str, Any]) -> dict[str, jax.Array]:
        images, sizes = batch["images"], batch["size"]
        levels = model.apply(variables, images, train=False, method="features")
        logits, deltas = model.apply(variables, levels, method="propose")
        grids = [level.shape[1:3] for level in levels]
        anchors = rcnn_recipes.anchors(model, recipe.anchors, PADDED, grids)
        first, moves = ([x[0] for x in some] for some in (logits, deltas))
        rule = dataclasses.replace(recipe.test, count=NUM_PROPOSALS)
        proposals = propose(first, moves, anchors, sizes[0], rule)
        found = {key: value[0] for key, value in task.forward(variables, images, sizes).items()}
        outputs = {"proposals": proposals.boxes, "logits": proposals.scores, **found}
        return outputs | losses(variables, batch)

    return jax.device_get(run(zoo.loaded(name, tensors, model), batch_of(PADDED, TRUE)))


def given_uniforms(rng: Any, index: jax.Array, count: int) -> jax.Array:
    """Takes the place of `dense_jax.objectives.rcnn.uniforms`."""
    del rng, index
    return jnp.asarray(uniform("anchors", count)[None])


def theirs(name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the same of torchvision, which needs compiled operators; without "logits"."""
    import torch

    from tests.parity.theirs import detector

    network, lists = detector(name, tensors, NUM_PROPOSALS, NUM_ROIS)
    pixels = torch.from_numpy(batch_of(PADDED, TRUE)["images"]).permute(0, 3, 1, 2)
    images = lists(pixels, [TRUE])
    with torch.inference_mode():
        levels = network.backbone(pixels)
        proposals, _ = network.rpn(images, levels)
        detections, _ = network.roi_heads(levels, proposals, [TRUE])
        network.rpn.train()
        network.roi_heads.training = True  # its batch normalisation stays as it is
        some, first = network.rpn(images, levels, targets())
        _, second = network.roi_heads(levels, some, [TRUE], targets())
    values = [*first.values(), *second.values()]
    order = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
    assert (*first, *second) == (*order[:2], *order[2:]), (first, second)
    result = {"proposals": proposals[0], **dict(zip(LOSSES, values, strict=True))}
    result |= {key: detections[0][key] for key in ("boxes", "scores")}
    return {key: x.numpy() for key, x in {**result, "classes": detections[0]["labels"]}.items()}


class Sampler:
    """Takes the place of torchvision's `BalancedPositiveNegativeSampler`: smallest numbers win."""

    def __init__(self, size: int, max_foreground: int) -> None:
        self._size, self._max, self._numbers = size, max_foreground, None

    def set_boxes(self, boxes: np.ndarray) -> None:
        """Takes the numbers of boxes, in place of those of anchors."""
        self._numbers = numbers_of(boxes)

    def __call__(self, labels: Any) -> Any:
        """Returns which are taken of positive and of negative labels, of each image."""
        import torch

        (own,) = labels
        numbers = uniform("anchors", len(own)) if self._numbers is None else self._numbers
        taken = []
        for wanted, limit in ((own >= 1, self._max), (own == 0, self._size)):
            which = torch.where(wanted)[0].numpy()
            limit = min(limit, self._size - sum(int(x.sum()) for x in taken))
            mask = torch.zeros(len(own), dtype=torch.uint8)
            mask[which[np.argsort(numbers[which], kind="stable")][:limit]] = 1
            taken.append(mask)
        return [taken[0]], [taken[1]]
