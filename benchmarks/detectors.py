"""Times our detectors against torchvision's, with the same parameters and the same image.

    python -m benchmarks.train_step --model fasterrcnn_r50_fpn --size 320

    python -m benchmarks.train_step --model maskrcnn_r50_fpn --size 320

Batch normalisation and the first two parts of the trunk are frozen on both sides. A step has the
four or five losses on the same sample of anchors and boxes, their gradients, and SGD with momentum.
torchvision needs its compiled operators; see `tests.parity.make`.
"""

import importlib
import re
import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

from benchmarks import timing
from dense_jax.objectives import rcnn
from tests.parity import detection, zoo

MODELS = {
    "fasterrcnn_r50_fpn": "fasterrcnn_resnet50_fpn",
    "maskrcnn_r50_fpn": "maskrcnn_resnet50_fpn",
}
_RATE, _MOMENTUM = 1e-4, 0.9


class Side(NamedTuple):
    """The functions of one side, and what its step needs.

    Attributes:
      forward: returns the scores of the detections.
      gradients: returns the losses, and the norm of the gradient.
      step: makes a training step.
      memory: returns bytes that a step takes besides the parameters, or 0 before the first step.
    """

    forward: Callable[[], np.ndarray]
    gradients: Callable[[], np.ndarray]
    step: Callable[[], Any]
    memory: Callable[[], float]


def ours(name: str, tensors: dict[str, np.ndarray], size: int) -> Side:
    """Returns the functions of our network."""
    task = detection.build(name)
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
    state = jax.device_put((params, optimizer.init(params)))
    data = jax.device_put(batch)
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*state, data).compile()

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(*state, data))

    def detect() -> np.ndarray:
        given = {"params": state[0], "batch_stats": stats}
        return np.asarray(forward(given, data["images"], data["size"])["scores"][0])

    def memory() -> float:
        account: Any = compiled.memory_analysis()
        return float(account.temp_size_in_bytes)

    return Side(detect, lambda: np.asarray(differentiate(state[0], data)), step, memory)


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
    batch, peak = detection.batch_of((size, size)), 0.0
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
        nonlocal peak
        before = _peak()
        backward()
        optimizer.step()
        peak = max(peak, _peak() - before)

    return Side(detect, differentiate, step, lambda: peak)


def _peak() -> float:
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compare(model: str, size: int, repeats: int) -> None:
    """Prints how far both sides are apart, and their times.

    Args:
      model: a name in MODELS.
      size: height and width of the image, a multiple of 32 pixels.
      repeats: timed turns of each side.
    """
    name = MODELS[model]
    tensors = detection.parameters(name)
    rcnn.uniforms, rcnn.sample_rois = detection.given_uniforms, detection.sample_by_place
    other = torchvisions(name, tensors, size)
    other.step()  # its peak of memory, before ours has taken any
    other = torchvisions(name, tensors, size)._replace(memory=other.memory)
    own = ours(name, tensors, size)
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
        result = timing.alternate(our_call, their_call, repeats, warmup=1)
        used = [_processor_seconds(call) for call in (our_call, their_call)]
        print(
            f"{title:8} ours {result.ours:7.3f} s   torch {result.theirs:7.3f} s   "
            f"ratio {result.ratio:5.2f}   processor time {used[0]:.2f} s, {used[1]:.2f} s"
        )
    print(f"memory of a step: ours {own.memory() / 2**20:.0f} MiB of temporary arrays;", end=" ")
    print(f"torch {other.memory() / 2**20:.0f} MiB more in the process at its peak")


def _processor_seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
