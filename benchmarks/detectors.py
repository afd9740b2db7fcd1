"""Our detectors and torchvision's, with the same parameters and the same image, and their memory.

    python -m benchmarks.train_step --model fasterrcnn_r50_fpn --size 320
    python -m benchmarks.infer --model maskrcnn_r50_fpn --size 320

Batch normalisation and the first two parts of the trunk are frozen on both sides. A step has the
four or five losses on the same sample of anchors and boxes, their gradients, and SGD with momentum.
torchvision needs its compiled operators; see `tests.parity.make`. Called itself, the module makes
two calls of one side, and prints the memory of its process:

    python -m benchmarks.detectors --model maskrcnn_r50_fpn --size 320 --call infer --side torch
"""

import importlib
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import traverse_util

from benchmarks import timing
from dense_jax.data.padded import prepare
from dense_jax.infer.pasting import paste
from dense_jax.objectives import rcnn
from tests.parity import detection, drawn, zoo

MODELS = {
    "fasterrcnn_r50_fpn": "fasterrcnn_resnet50_fpn",
    "maskrcnn_r50_fpn": "maskrcnn_resnet50_fpn",
}
_RATE, _MOMENTUM = 1e-4, 0.9
Call = Literal["infer", "step"]
SideName = Literal["ours", "torch"]


class Found(NamedTuple):
    """The detections of an image, in its pixels; masks of Mask R-CNN alone.

    Attributes:
      boxes: float32 [N, 4].
      scores: float32 [N].
      masks: bool [N, H, W], or [0, H, W].
    """

    boxes: np.ndarray
    scores: np.ndarray
    masks: np.ndarray


class Side(NamedTuple):
    """The functions of one side, and what its step needs.

    Attributes:
      infer: makes detections of a uint8 image, masks in its pixels included.
      forward: makes detections of a normalised image, without pasting; returns their scores.
      gradients: returns the losses, and the norm of the gradient.
      step: makes a training step.
    """

    infer: Callable[[], Found]
    forward: Callable[[], np.ndarray]
    gradients: Callable[[], np.ndarray]
    step: Callable[[], Any]


def image_of(size: int) -> np.ndarray:
    """Returns a square image, uint8 [size, size, 3]."""
    return np.rint(127.5 + 127.5 * drawn.uniform("image", (size, size, 3))).astype(np.uint8)


def ours(name: str, tensors: dict[str, np.ndarray], size: int) -> Side:
    """Returns the functions of our network."""
    task = detection.build(name, short_side=(size,), max_side=size)
    model: Any = task.model.clone(axis_name=None)
    batch = detection.batch_of((size, size))
    variables = zoo.loaded(name, tensors, model)
    params, stats = variables["params"], variables["batch_stats"]
    paths: Any = traverse_util.flatten_dict(params, sep="/")
    frozen = {path: any(re.search(p, path) for p in model.frozen) for path in paths}
    labels = traverse_util.unflatten_dict(frozen, sep="/")
    optimizer = optax.multi_transform(
        {False: optax.sgd(_RATE, _MOMENTUM), True: optax.set_to_zero()}, labels
    )

    def loss(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        def apply(*inputs: Any, **options: Any) -> Any:
            given = {"params": params, "batch_stats": stats}
            return model.apply(given, *inputs, **{"train": True, **options})

        found = task.objective(apply, batch, jax.random.key(0))
        values = {key: value / count for key, (value, count) in found.items()}
        return sum(values.values(), jnp.zeros(())), values

    @jax.jit
    def differentiate(params: Any, batch: Any) -> jax.Array:
        (_, values), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        losses = [values[key] for key in detection.losses_of(name)]
        return jnp.stack([*losses, optax.global_norm(grads)])

    def update(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(loss, has_aux=True)(params, batch)[0]
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    forward = jax.jit(task.forward)
    compiled = jax.jit(update, donate_argnums=(0, 1))
    params, data = jax.device_put((params, batch))
    momenta, image = None, image_of(size)

    def step() -> None:
        nonlocal params, momenta
        momenta = optimizer.init(params) if momenta is None else momenta
        params, momenta = jax.block_until_ready(compiled(params, momenta, data))

    def detect() -> np.ndarray:
        given = {"params": params, "batch_stats": stats}
        return np.asarray(forward(given, data["images"], data["size"])["scores"][0])

    def infer() -> Found:
        given = {"params": params, "batch_stats": stats}
        arrays = prepare(image, task.config.normalisation, image.shape[:2])
        answers = jax.device_get(forward(given, *arrays))
        found = task.in_image({key: x[0] for key, x in answers.items()}, image.shape[:2])
        masks = np.zeros((len(found.get("masks", ())), *image.shape[:2]), bool)
        for i, mask in enumerate(found.get("masks", ())):
            window = paste(mask, found["boxes"][i], image.shape[:2], "torchvision")
            masks[i] = window.mask(image.shape[:2])
        return Found(found["boxes"], found["scores"], masks)

    return Side(infer, detect, lambda: np.asarray(differentiate(params, data)), step)


def torchvisions(name: str, tensors: dict[str, np.ndarray], size: int) -> Side:
    """Returns the functions of torchvision's network."""
    torch = importlib.import_module("torch")
    theirs = importlib.import_module("tests.parity.theirs")
    network, lists = theirs.detector(name, tensors)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.requires_grad_(False)
    for part in ("conv1", "layer1"):
        getattr(network.backbone.body, part).requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, _RATE, _MOMENTUM)
    batch, image = detection.batch_of((size, size)), image_of(size)
    network.transform.min_size, network.transform.max_size = (size,), size
    pixels = torch.from_numpy(batch["images"]).permute(0, 3, 1, 2)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    sizes = [(size, size)]
    targets = detection.targets(size, size)

    def run(train: bool) -> Any:
        network.rpn.training = network.roi_heads.training = train
        levels = network.backbone(pixels)
        given = targets if train else None
        proposals, first = network.rpn(lists(pixels, sizes), levels, given)
        found, second = network.roi_heads(levels, proposals, sizes, given)
        return found, [*first.values(), *second.values()]

    def detect() -> np.ndarray:
        with torch.inference_mode():
            return run(False)[0][0]["scores"].numpy()

    def backward() -> Any:
        optimizer.zero_grad()
        losses = run(True)[1]
        torch.stack(losses).sum().backward()
        return losses

    def differentiate() -> np.ndarray:
        losses = [float(loss.detach()) for loss in backward()]
        squares = [float((p.grad**2).sum()) for p in trained if p.grad is not None]
        return np.array([*losses, np.sqrt(sum(squares))])

    def step() -> None:
        backward()
        optimizer.step()

    def infer() -> Found:
        network.rpn.training = network.roi_heads.training = False
        with torch.inference_mode():
            (found,) = network([torch.from_numpy(image).permute(2, 0, 1) / 255])
        masks = found.get("masks", torch.zeros((0, 1, size, size)))[:, 0] >= 0.5
        return Found(found["boxes"].numpy(), found["scores"].numpy(), masks.numpy())

    return Side(infer, detect, differentiate, step)


def sides(model: str, size: int) -> dict[SideName, Callable[[], Side]]:
    """Returns functions that make the sides, which draw the same anchors and boxes.

    Args:
      model: a name in MODELS.
      size: height and width of the image, a multiple of 32 pixels.
    """
    name = MODELS[model]
    tensors = detection.parameters(name)
    rcnn.uniforms, rcnn.sample_rois = detection.given_uniforms, detection.sample_by_place
    return {
        "ours": lambda: ours(name, tensors, size),
        "torch": lambda: torchvisions(name, tensors, size),
    }


def memory(model: str, size: int, call: Call, side: SideName) -> tuple[int, int]:
    """Returns the memory of a process of its own, in MiB: before the first of two calls, at most.

    It begins with what this process had at most, so call it before anything large is made.
    """
    flags = [f"--model={model}", f"--size={size}", f"--call={call}", f"--side={side}"]
    command = [sys.executable, "-m", "benchmarks.detectors", *flags]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    before, most = map(int, text.split()[-2:])
    return before, most


def print_memory(model: str, size: int, call: Call) -> None:
    """Prints the memory of both sides, one after the other."""
    own, other = (memory(model, size, call, side) for side in ("ours", "torch"))
    print(f"memory of a process, before the first {call} and at most (with compilation):", end=" ")
    print(f"ours {own[0]} and {own[1]} MiB, torch {other[0]} and {other[1]} MiB")


def compare(model: str, size: int, repeats: int) -> None:
    """Prints how far both sides are apart, and their times.

    Args:
      model: a name in MODELS.
      size: height and width of the image, a multiple of 32 pixels.
      repeats: timed turns of each side.
    """
    print_memory(model, size, "step")
    own, other = (make() for make in sides(model, size).values())
    scores = [side.forward() for side in (own, other)]
    count = min(len(x) for x in scores)
    apart = np.abs(scores[0][:count] - scores[1][:count]).max()
    found, expected = own.gradients(), other.gradients()
    differences = np.abs(found / expected - 1)
    print(f"{model}, 1 x {size} x {size}: scores differ by {apart:.1e}, losses by")
    print(f"  {differences[:-1].max():.1e}, the norm of the gradient by {differences[-1]:.1e}")
    if not max(apart, differences.max()) < 1e-3:
        raise SystemExit("error: not the same network")
    calls = (("forward", own.forward, other.forward), ("step", own.step, other.step))
    for title, our_call, their_call in calls:
        print_times(title, our_call, their_call, repeats)


def print_times(
    title: str, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int
) -> None:
    """Times both sides in turns, and prints a line."""
    result = timing.alternate(ours, theirs, repeats, warmup=1)
    used = [_processor_seconds(call) for call in (ours, theirs)]
    print(
        f"{title:8} ours {result.ours:7.3f} s   torch {result.theirs:7.3f} s   "
        f"ratio {result.ratio:5.2f}   processor time {used[0]:.2f} s, {used[1]:.2f} s"
    )


def _processor_seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main(model: str, size: int, call: Call, side: SideName) -> None:
    """Makes two calls of one side; prints MiB of the process before them, and at most."""
    if side == "torch":
        timing.import_torch(threads=2)
    made = sides(model, size)[side]()
    before = _most()
    for _ in range(2):
        getattr(made, call)()
    print(before, _most())


def _most() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.detectors")
