"""Times forward pass and training step of our networks against the same networks in torch.

    python -m benchmarks.train_step --model fcn8s
    python -m benchmarks.train_step --model fcn32s --width 0.25 --size 128 --batch 4

Both sides hold the same weights, and their logits are compared before any timing. They take turns
in one process on two threads, torch with channels last. A step is a forward pass with dropout, mean
softmax cross entropy over the labelled pixels, a backward pass and SGD with momentum.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import timing
from dense_jax import losses
from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.layers import init
from dense_jax.models import fcn, vgg

NUM_CLASSES = 21
LEARNING_RATE = 1e-4
MOMENTUM = 0.9

# (forward pass that returns logits [B, H, W, C], training step)
Pair = tuple[Callable[[], np.ndarray], Callable[[], None]]


def torch_fcn(
    layers: tuple[vgg.Layer, ...],
    skips: tuple[tuple[str, int], ...],
    last: tuple[int, int, int],
    params: dict[str, Any],
):
    """Returns an FCN for torch: (forward, parameters) with forward(images, training) -> logits.

    Args:
      layers: table of the trunk.
      skips: layers that are added to the scores, finest last, and the offset of each one's crop.
        Offsets are those of the authors' release; our networks derive theirs.
      last: kernel, stride and crop of the last up-convolution.
      params: parameters of our network.
    """
    import torch
    from torch.nn import functional

    weights = {
        name: (
            # A copy: jax.Array is read-only, and the optimizer writes.
            torch.tensor(np.transpose(param["kernel"], (3, 2, 0, 1)))
            .contiguous(memory_format=torch.channels_last)
            .requires_grad_(),
            torch.tensor(np.asarray(param["bias"])).requires_grad_(),
        )
        for name, param in params.items()
    }

    def bilinear(x, kernel: int, stride: int):
        taps = torch.from_numpy(init.bilinear_taps(kernel)).float()
        weight = torch.outer(taps, taps).expand(x.shape[1], 1, kernel, kernel)
        return functional.conv_transpose2d(x, weight, stride=stride, groups=x.shape[1])

    def crop(x, offset: int, size):
        return x[:, :, offset : offset + size[0], offset : offset + size[1]]

    def forward(images, training: bool):
        x, outputs = images, {}
        for name, kernel, stride, padding, _, groups in layers:
            if name.startswith("pool"):
                x = functional.max_pool2d(x, kernel, stride, ceil_mode=True)
            elif name.startswith("norm"):
                x = functional.local_response_norm(x, 5, 1e-4, 0.75, 1.0)
            else:
                x = functional.relu(
                    functional.conv2d(x, *weights[name], stride, padding, 1, groups)
                )
            if name.startswith("fc"):
                x = functional.dropout(x, 0.5, training)
            outputs[name] = x
        x = functional.conv2d(x, *weights["score_fr"])
        for name, offset in skips:
            x = bilinear(x, 4, 2)
            skip = functional.conv2d(outputs[name], *weights[f"score_{name}"])
            x = x + crop(skip, offset, x.shape[2:])
        return crop(bilinear(x, *last[:2]), last[2], images.shape[2:])

    return forward, [tensor for pair in weights.values() for tensor in pair]


_VGG = vgg.vgg16_layers(first_padding=100)
# Per name: what builds our network, and what builds torch's from our parameters.
MODELS: dict[str, tuple[Callable[..., nn.Module], Callable[[dict[str, Any]], Any]]] = {
    "fcn32s": (fcn.fcn32s, partial(torch_fcn, _VGG, (), (64, 32, 19))),
    "fcn16s": (fcn.fcn16s, partial(torch_fcn, _VGG, (("pool4", 5),), (32, 16, 27))),
    "fcn8s": (fcn.fcn8s, partial(torch_fcn, _VGG, (("pool4", 5), ("pool3", 9)), (16, 8, 31))),
    "fcn_alexnet": (fcn.fcn_alexnet, partial(torch_fcn, fcn.ALEXNET_LAYERS, (), (63, 32, 18))),
}


def random_params(model: nn.Module, images: np.ndarray) -> dict[str, Any]:
    """Returns kernels of variance 2 / fan-in, scores included so that logits are not zero."""
    build = partial(model.init, train=False)
    shapes = jax.eval_shape(build, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = np.sqrt(2 / np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 0
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(scale)

    return jax.tree.map(fill, shapes)


def build_ours(
    model: nn.Module, params: dict[str, Any], images: np.ndarray, labels: np.ndarray
) -> Pair:
    """Returns our two functions; the first call of each compiles."""
    optimizer = optax.sgd(LEARNING_RATE, MOMENTUM)

    def logits_of(params, images, **options) -> jax.Array:
        outputs: Any = model.apply({"params": params}, images, **options)
        return outputs["logits"]

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, images, labels):
        def loss_fn(params):
            logits = logits_of(params, images, train=True, rngs={"dropout": jax.random.key(0)})
            loss = losses.softmax_cross_entropy(logits, labels)
            return jnp.sum(loss) / jnp.sum(labels != IGNORE_LABEL)

        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    apply = jax.jit(partial(logits_of, train=False))
    state = jax.device_put((params, optimizer.init(params)))
    data = jax.device_put((images, labels))

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(update(*state, *data))

    return lambda: np.asarray(apply(state[0], data[0])), step


def build_theirs(network, images: np.ndarray, labels: np.ndarray) -> Pair:
    """Returns the same for torch, given (forward, parameters)."""
    import torch

    apply, params = network
    optimizer = torch.optim.SGD(params, LEARNING_RATE, MOMENTUM)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(labels).long()

    def forward() -> np.ndarray:
        with torch.no_grad():
            return apply(x, False).permute(0, 2, 3, 1).numpy()

    def step() -> None:
        optimizer.zero_grad()
        logits = apply(x, True)
        torch.nn.functional.cross_entropy(logits, y, ignore_index=IGNORE_LABEL).backward()
        optimizer.step()

    return forward, step


def main(
    model: str = "fcn8s", width: float = 1.0, size: int = 224, batch: int = 2, repeats: int = 5
) -> None:
    """Compares one model with its torch twin.

    Args:
      model: a name in MODELS.
      width: channel multiplier of the trunk.
      size: height and width of the images in pixels.
      batch: number of images.
      repeats: timed calls of each side; the median counts.
    """
    if model not in MODELS:
        sys.exit(f"error: no model {model!r}: choose one of {', '.join(MODELS)}")
    timing.import_torch(threads=2)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, size, size, 3), np.float32)
    labels = rng.integers(NUM_CLASSES, size=(batch, size, size), dtype=np.int32)
    labels[:, : size // 8] = IGNORE_LABEL
    build, build_twin = MODELS[model]
    network = build(num_classes=NUM_CLASSES, width=width)
    params = random_params(network, images)
    ours = build_ours(network, params, images, labels)
    theirs = build_theirs(build_twin(params), images, labels)

    logits, their_logits = ours[0](), theirs[0]()
    difference = np.abs(logits - their_logits).max() / np.abs(their_logits).max()
    if not difference < 1e-3:
        sys.exit(f"error: logits differ by {difference:.1e} of the largest: not the same network")
    print(f"{model}, width {width}, {batch} x {size} x {size}: logits differ by {difference:.1e}")
    for name, our_call, their_call in zip(("forward", "step"), ours, theirs, strict=True):
        result = timing.alternate(our_call, their_call, repeats, warmup=1)
        print(
            f"{name:8} ours {result.ours:7.3f} s   torch {result.theirs:7.3f} s   "
            f"ratio {result.ratio:5.2f}"
        )


if __name__ == "__main__":
    tyro.cli(main)
