"""Times forward pass and training step of our networks against the same networks in torch.

    python -m benchmarks.train_step --model fcn8s
    python -m benchmarks.train_step --model segnet --width 0.25 --size 128 --batch 4
    python -m benchmarks.train_step --model fasterrcnn_r50_fpn --size 320

Both sides have the same weights. The benchmark compares their logits and gradients before it times
them, in turns in one process, torch on two threads with channels last. A step is a forward pass
with dropout and batch statistics, mean softmax cross-entropy over the labelled pixels (or units, if
the network learns at a coarser stride), a backward pass, and SGD with momentum.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import detectors, dilation_twins, timing, twins
from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.models import (
    deconvnet,
    deeplab,
    deeplabv3,
    dilated,
    fcn,
    hypercolumns,
    resnet,
    segnet,
    unet,
    vgg,
)
from dense_jax.objectives import pixels

NUM_CLASSES = 21
LEARNING_RATE = 1e-4
MOMENTUM = 0.9
_RATE = 0.5  # Dropout rate of the networks that have dropout.


class Model(NamedTuple):
    """A network and its twin.

    Attributes:
      build: (width, size of the images) -> our network.
      twin: the same network in torch.
      trained: name of the output for the loss; the twin returns this output in training.
    """

    build: Callable[[float, int], nn.Module]
    twin: twins.Twin
    trained: str = "logits"


class Side(NamedTuple):
    """The functions of our network, or of the twin.

    Attributes:
      forward: returns logits [B, H, W, C] with running statistics.
      gradients: returns the loss gradients by path, in torch's layout, without dropout.
      step: makes a training step, which changes the parameters.
    """

    forward: Callable[[], np.ndarray]
    gradients: Callable[[], dict[str, np.ndarray]]
    step: Callable[[], None]


def _by_width(build: Callable[..., nn.Module], twin: twins.Twin, trained: str = "logits") -> Model:
    return Model(lambda width, size: build(num_classes=NUM_CLASSES, width=width), twin, trained)


def _unet(build: Callable[..., nn.Module], padding: int) -> Model:
    def thin(width: float, size: int) -> nn.Module:
        return build(NUM_CLASSES, width=vgg.scaled(64, width))

    return Model(thin, twins.unet(padding))


_VGG = vgg.vgg16_layers(first_padding=100)
_RESNET50, _RESNET101 = (3, 4, 6, 3), (3, 4, 23, 3)
MODELS = {
    "fcn32s": _by_width(fcn.fcn32s, twins.fcn(_VGG, (), (64, 32, 19))),
    "fcn16s": _by_width(fcn.fcn16s, twins.fcn(_VGG, (("pool4", 5),), (32, 16, 27))),
    "fcn8s": _by_width(fcn.fcn8s, twins.fcn(_VGG, (("pool4", 5), ("pool3", 9)), (16, 8, 31))),
    "fcn_alexnet": _by_width(fcn.fcn_alexnet, twins.fcn(fcn.ALEXNET_LAYERS, (), (63, 32, 18))),
    "hypercolumns": _by_width(hypercolumns.Hypercolumns, twins.hypercolumns),
    "segnet": _by_width(segnet.SegNet, twins.segnet),
    "segnet_basic": _by_width(segnet.SegNetBasic, twins.segnet_basic),
    "deconvnet": Model(
        lambda width, size: deconvnet.DeconvNet(NUM_CLASSES, input_size=size, width=width),
        twins.deconvnet,
    ),
    # Dilated networks without "same" take images with a margin of 186 pixels on each side.
    "front_end": _by_width(dilated.front_end, dilation_twins.dilated(), "scores"),
    "dilated_basic": _by_width(
        dilated.dilated_basic, dilation_twins.dilated(context=True), "scores"
    ),
    "dilated_large": _by_width(
        dilated.dilated_large, dilation_twins.dilated(context=True, pad_once=True), "scores"
    ),
    "dilated_basic_same": _by_width(
        partial(dilated.dilated_basic, pad="same"),
        dilation_twins.dilated(context=True, same=True),
        "scores",
    ),
    "deeplab_largefov": _by_width(
        deeplab.deeplab_vgg_largefov, dilation_twins.deeplab_vgg((12,)), "scores"
    ),
    "deeplab_aspp": _by_width(
        deeplab.deeplab_vgg_aspp_l, dilation_twins.deeplab_vgg((6, 12, 18, 24)), "scores"
    ),
    "deeplab_resnet101": _by_width(
        partial(deeplab.deeplab_resnet101, scales=(1.0,)),
        dilation_twins.deeplab_resnet(_RESNET101, (6, 12, 18, 24)),
        "scores",
    ),
    "deeplab_resnet101_msc": _by_width(
        deeplab.deeplab_resnet101,
        dilation_twins.deeplab_resnet(_RESNET101, (6, 12, 18, 24), (1.0, 0.75, 0.5)),
        "scores",
    ),
    "deeplabv3_resnet50": _by_width(
        deeplabv3.deeplabv3_resnet50, dilation_twins.segmenter("deeplabv3", _RESNET50)
    ),
    "fcn_resnet50": _by_width(deeplabv3.fcn_resnet50, dilation_twins.segmenter("fcn", _RESNET50)),
    "deeplabv3_resnet101": _by_width(
        deeplabv3.deeplabv3_resnet101, dilation_twins.segmenter("deeplabv3", _RESNET101)
    ),
    "fcn_resnext101_32x8d": _by_width(
        partial(deeplabv3.ResNetSegmenter, head="fcn", trunk=resnet.resnext101_32x8d),
        dilation_twins.segmenter("fcn", _RESNET101, groups=32),
    ),
    "unet": _unet(unet.unet, padding=0),
    "unet_same": _unet(unet.unet_same, padding=1),
}


def random_variables(model: nn.Module, images: np.ndarray) -> dict[str, Any]:
    """Returns random variables for a comparison.

    Kernels have the variance 2 / fan-in, those of score layers too, so logits are not zero. Biases
    and means are about 0, scales and variances about 1.
    """
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(leaf.shape, np.float32)
        if len(leaf.shape) > 1:
            return values * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
        middle = 1 if path[-1].key in ("scale", "var") else 0
        return np.float32(middle) + np.float32(0.1) * np.clip(values, -3, 3)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def build_ours(
    model: nn.Module,
    variables: dict[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    trained: str = "logits",
) -> Side:
    """Returns the functions of our network; each first call compiles. See `Model.trained`."""
    optimizer = optax.sgd(LEARNING_RATE, MOMENTUM)
    without = model.clone(dropout_rate=0.0) if hasattr(model, "dropout_rate") else model

    def loss_fn(params, stats, images, labels, model: nn.Module):
        outputs: Any
        outputs, stats = model.apply(
            {"params": params, **stats},
            images,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=list(stats),
        )
        loss = pixels.softmax_cross_entropy(outputs[trained], labels)
        return jnp.sum(loss) / jnp.sum(labels != IGNORE_LABEL), stats

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(params, stats, opt_state, images, labels):
        grad_fn = jax.grad(partial(loss_fn, model=model), has_aux=True)
        grads, stats = grad_fn(params, stats, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), stats, opt_state

    @jax.jit
    def apply(params, stats, images) -> jax.Array:
        outputs: Any = model.apply({"params": params, **stats}, images, train=False)
        return outputs["logits"]

    grad_fn = jax.jit(jax.grad(partial(loss_fn, model=without), has_aux=True))
    params = variables["params"]
    stats = {name: tree for name, tree in variables.items() if name != "params"}
    state = jax.device_put((params, stats, optimizer.init(params)))
    data = jax.device_put((images, labels))

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(update(*state, *data))

    return Side(
        lambda: np.asarray(apply(*state[:2], data[0])),
        lambda: twins.flat(grad_fn(*state[:2], *data)[0]),
        step,
    )


def build_theirs(
    twin: twins.Twin, variables: dict[str, Any], images: np.ndarray, labels: np.ndarray
) -> Side:
    """Returns the functions of the twin."""
    import torch

    weights = twins.Weights(variables)
    optimizer = torch.optim.SGD(weights.params.values(), LEARNING_RATE, MOMENTUM)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    y = torch.from_numpy(labels).long()

    def forward() -> np.ndarray:
        with torch.no_grad():
            return twin(weights, x, False, _RATE).permute(0, 2, 3, 1).numpy()

    def backward(dropout_rate: float) -> None:
        optimizer.zero_grad()
        logits = twin(weights, x, True, dropout_rate)
        torch.nn.functional.cross_entropy(logits, y, ignore_index=IGNORE_LABEL).backward()

    def gradients() -> dict[str, np.ndarray]:
        old = {path: tensor.clone() for path, tensor in weights.stats.items()}
        backward(0.0)
        for path, tensor in old.items():  # only steps may change the running statistics
            weights.stats[path].copy_(tensor)
        return {
            path: (torch.zeros_like(tensor) if tensor.grad is None else tensor.grad).numpy().copy()
            for path, tensor in weights.params.items()  # frozen parameters have no gradient
        }

    def step() -> None:
        backward(_RATE)
        optimizer.step()

    return Side(forward, gradients, step)


def logits_differ(ours: Side, theirs: Side) -> float:
    """Returns the largest difference of the logits, divided by the largest logit."""
    logits, their_logits = ours.forward(), theirs.forward()
    return float(np.abs(logits - their_logits).max() / np.abs(their_logits).max())


def gradients_differ(
    model: nn.Module,
    twin: twins.Twin,
    variables: dict[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    trained: str = "logits",
) -> float:
    """Returns the norm of the difference of all gradients, divided by their norm, in float64.

    In float32, rounding alone would make several percent. Batch statistics of a few values divide
    by small numbers, and a tie in a maximum or a ReLU can send a gradient elsewhere.
    """
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda array: array.astype(np.float64), variables)
        images = images.astype(np.float64)
        ours = build_ours(model, variables, images, labels, trained).gradients()
        theirs = build_theirs(twin, variables, images, labels).gradients()
    if ours.keys() != theirs.keys():
        raise ValueError(f"Parameters of one side only: {ours.keys() ^ theirs.keys()}.")
    difference = sum(float(np.sum((ours[k] - theirs[k]) ** 2)) for k in theirs)
    return float(np.sqrt(difference / sum(float(np.sum(g**2)) for g in theirs.values())))


def main(
    model: str = "fcn8s",
    width: float = 1.0,
    size: int = 224,
    batch: int = 2,
    repeats: int = 5,
    gradients: bool = True,
) -> None:
    """Compares one model with its torch twin.

    Args:
      model: a name in MODELS, or in `benchmarks.detectors.MODELS`, whose width and batch are 1.
      width: channel multiplier of the trunk.
      size: height and width of the images in pixels.
      batch: number of images.
      repeats: timed turns of each side; the medians are shown. 0 only compares.
      gradients: also compare the gradients; this takes longer than a few steps.
    """
    if model not in (*MODELS, *detectors.MODELS):
        known = ", ".join((*MODELS, *detectors.MODELS))
        sys.exit(f"error: no model {model!r}: choose one of {known}")
    timing.import_torch(threads=2)
    if model in detectors.MODELS:
        detectors.compare(model, size, repeats)
        return
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, size, size, 3), np.float32)
    build, twin, trained = MODELS[model]
    network = build(width, size)
    try:
        variables = random_variables(network, images)
    except ValueError as error:
        sys.exit(f"error: --size {size}: {error}")
    outputs: Any = jax.eval_shape(partial(network.apply, train=False), variables, images)
    labels = rng.integers(NUM_CLASSES, size=outputs[trained].shape[:3], dtype=np.int32)
    labels[:, : labels.shape[1] // 8] = IGNORE_LABEL
    ours = build_ours(network, variables, images, labels, trained)
    theirs = build_theirs(twin, variables, images, labels)

    difference = logits_differ(ours, theirs)
    if not difference < 1e-3:
        sys.exit(f"error: logits differ by {difference:.1e} of the largest: not the same network")
    account = f"logits differ by {difference:.1e}"
    if gradients:  # with two images at most, to save memory
        difference = gradients_differ(network, twin, variables, images[:2], labels[:2], trained)
        if not difference < 1e-5:
            sys.exit(f"error: gradients differ by {difference:.1e}: not the same network")
        account += f", gradients by {difference:.1e}"
    print(f"{model}, width {width}, {batch} x {size} x {size}: {account}")
    if not repeats:
        return
    calls = (("forward", ours.forward, theirs.forward), ("step", ours.step, theirs.step))
    for name, our_call, their_call in calls:
        result = timing.alternate(our_call, their_call, repeats, warmup=1)
        print(
            f"{name:8} ours {result.ours:7.3f} s   torch {result.theirs:7.3f} s   "
            f"ratio {result.ratio:5.2f}"
        )


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.train_step")
