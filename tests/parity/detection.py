"""What Faster and Mask R-CNN propose, find and lose in one image: torchvision's, and ours."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.infer.pasting import paste
from dense_jax.objectives import rcnn
from dense_jax.ops.proposals import propose
from dense_jax.tasks import rcnn_recipes
from dense_jax.tasks.detection import Detection
from experiments import faster_rcnn, mask_rcnn
from tests.parity import drawn, zoo

REFERENCE = pathlib.Path(__file__).parent / "reference" / "detections.npz"
_HEADS: dict[str, Any] = {"resnet50_fpn": "v1", "resnet50_fpn_v2": "v2"}
NAMES = {
    f"{kind}_{layers}": (script, heads)
    for kind, script in (("fasterrcnn", faster_rcnn), ("maskrcnn", mask_rcnn))
    for layers, heads in _HEADS.items()
}
NUM_CLASSES = 91
PADDED, TRUE = (128, 160), (117, 150)  # height and width with and without padding
BOXES = np.array(
    [[10, 20, 60, 90], [55.5, 8, 149, 100], [100, 80, 117, 95], [1, 1, 8, 9]], np.float32
)
CLASSES = np.array([3, 17, 90, 3])
NUM_PROPOSALS, NUM_ROIS = 256, 128  # of the first stage in evaluation; that train the head
_TIE = 1e-6  # of logits and probabilities
NUM_PASTED = 4  # detections whose masks are compared in pixels
LOSSES = ("rpn_class", "rpn_box", "class", "box", "mask")  # the last of Mask R-CNN alone


def losses_of(name: str) -> tuple[str, ...]:
    """Returns the names of the losses of a network."""
    return LOSSES if name.startswith("mask") else LOSSES[:-1]


def masks_in(height: int, width: int) -> np.ndarray:
    """Returns an ellipse in each of the boxes, bool [4, height, width]; the last is a rectangle."""
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    x0, y0, x1, y1 = (side[:, None, None] for side in BOXES.T)
    across, down = (2 * x - x0 - x1) / (x1 - x0), (2 * y - y0 - y1) / (y1 - y0)
    limit = np.array([1, 1, 1, 2])[:, None, None]
    return (across**2 + down**2 <= limit) & (abs(across) <= 1) & (abs(down) <= 1)


def batch_of(padded: tuple[int, int], true: tuple[int, int] | None = None) -> dict[str, Any]:
    """Returns a batch of one image with zeros below and at its right, and the objects in it."""
    height, width = true or padded
    pixels = drawn.image(*padded)
    pixels[:, height:] = 0
    pixels[:, :, width:] = 0
    valid = np.ones((1, len(BOXES)), bool)
    masks = np.zeros((1, len(BOXES), *padded), bool)
    masks[0, :, :height, :width] = masks_in(height, width)
    return {
        "images": pixels,
        "size": np.array([[height, width]]),
        "index": np.array([0]),
        "objects": {"boxes": BOXES[None], "classes": CLASSES[None], "valid": valid, "masks": masks},
    }


def targets(height: int, width: int) -> list[dict[str, Any]]:
    """Returns the objects of an image of a size as torchvision takes them."""
    import torch

    arrays = {"boxes": BOXES, "labels": CLASSES, "masks": masks_in(height, width).astype(np.uint8)}
    return [{name: torch.from_numpy(array) for name, array in arrays.items()}]


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
    of_detections = [key for key in ("boxes", "classes", "masks") if key in reference]
    losses = [key for key in LOSSES if key in reference]
    result = {key: float(abs(found[key] / reference[key] - 1)) for key in losses}
    for ranks, arrays in {"logits": ["proposals"], "scores": of_detections}.items():
        count = len(reference[arrays[0]])
        assert np.all(found[ranks][count:] == 0) or ranks == "logits"
        gaps = np.abs(np.diff(found[ranks][:count], prepend=np.inf, append=-np.inf))
        is_alone = np.minimum(gaps[1:], gaps[:-1]) > _TIE
        assert is_alone.mean() > 0.9
        for name in arrays:
            ours, theirs = found[name][:count][is_alone], reference[name][is_alone]
            result[name] = zoo.apart(ours, theirs)
    result["scores"] = zoo.apart(found["scores"][: len(reference["scores"])], reference["scores"])
    if "pasted" in reference:
        result["pixels"] = float(np.mean(found["pasted"] != reference["pasted"]))
    return result


def build(name: str, **flags: Any) -> Detection:
    """Returns our task with torchvision's conventions."""
    script, heads = NAMES[name]
    config = dataclasses.replace(script.PRESETS["coco"], heads=heads, **flags)
    build_task: Any = script.build
    return build_task(config, NUM_CLASSES)


def parameters(name: str) -> dict[str, np.ndarray]:
    """Returns a state dict of torchvision's network; logits whose sigmoid counts are smaller.

    torchvision ranks proposals by the sigmoid of logits, which is 1 from about 17 on.
    """
    tensors = drawn.parameters(zoo.kept(name)[0])
    smaller = "rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.mask_predictor.mask_fcn"
    for key, values in tensors.items():
        if key.startswith(smaller):
            tensors[key] = values * np.float32(0.1)
    return tensors


def ours(name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns "proposals" [256, 4] and their "logits", "boxes", "classes", "scores" and losses.

    Of Mask R-CNN also "masks" [100, 28], cells of their diagonals, and "pasted", bool [4, H, W].

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

    found = jax.device_get(run(zoo.loaded(name, tensors, model), batch_of(PADDED, TRUE)))
    if "masks" in found:
        some = zip(found["masks"][:NUM_PASTED], found["boxes"][:NUM_PASTED], strict=True)
        found["pasted"] = np.stack([paste(*x, TRUE, "torchvision").mask(TRUE) for x in some])
        found["masks"] = np.diagonal(found["masks"], axis1=1, axis2=2)
    return found


def given_uniforms(rng: Any, index: jax.Array, count: int) -> jax.Array:
    """Takes the place of `dense_jax.objectives.rcnn.uniforms`."""
    del rng, index
    return jnp.asarray(uniform("anchors", count)[None])


def theirs(name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the same of torchvision, which needs compiled operators; without "logits"."""
    import torch

    from tests.parity.theirs import detector, pasting

    network, lists = detector(name, tensors, NUM_PROPOSALS, NUM_ROIS)
    pixels = torch.from_numpy(batch_of(PADDED, TRUE)["images"]).permute(0, 3, 1, 2)
    images = lists(pixels, [TRUE])
    with torch.inference_mode():
        levels = network.backbone(pixels)
        proposals, _ = network.rpn(images, levels)
        detections, _ = network.roi_heads(levels, proposals, [TRUE])
        found = dict(detections[0])
        if "masks" in found:
            some = found["masks"][:NUM_PASTED], found["boxes"][:NUM_PASTED]
            found["pasted"] = pasting(*some, TRUE)[:, 0] >= 0.5
            found["masks"] = torch.diagonal(found["masks"][:, 0], dim1=1, dim2=2)
        network.rpn.train()
        network.roi_heads.training = True  # its batch normalisation stays as it is
        some, first = network.rpn(images, levels, targets(*TRUE))
        _, second = network.roi_heads(levels, some, [TRUE], targets(*TRUE))
    values = [*first.values(), *second.values()]
    order = "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"
    assert (*first, *second) == order[: len(values)], (first, second)
    result = {"proposals": proposals[0], **dict(zip(losses_of(name), values, strict=True))}
    result |= {**found, "classes": found.pop("labels")}
    return {key: x.numpy() for key, x in result.items()}


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
