"""Five steps of thin networks by the library's own training step, on batches made of formulas."""

import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from benchmarks import train_step as benchmark
from benchmarks import twins
from dense_jax.objectives.pixels import LossTerm
from dense_jax.tasks import semantic
from dense_jax.train import step as steps
from dense_jax.train.config import RunConfig
from dense_jax.train.schedules import build_optimizer
from dense_jax.train.state import TrainState
from dense_jax.weights import rules
from tests.parity import drawn

REFERENCE = pathlib.Path(__file__).parent / "reference" / "losses.npz"
NUM_STEPS = 5
IGNORED = 255


class Run(NamedTuple):
    """A network and what it is trained with.

    Attributes:
      twin: name of the network and of the same in torch, in `benchmarks.train_step`.
      size: height and width of the images.
      learning_rate: large, so that the loss soon falls.
      stride: pixels between the units that learn.
      align_corners: see `LossTerm`.
      batch: number of images.
    """

    twin: str
    size: tuple[int, int]
    learning_rate: float
    stride: int = 1
    align_corners: bool = False
    batch: int = 2


RUNS = {
    "FCN-8s": Run("fcn8s", (33, 40), 0.01, batch=1),
    "SegNet-Basic": Run("segnet_basic", (33, 42), 0.1),
    "U-Net": Run("unet_same", (32, 48), 0.02),
    "front end + context": Run("dilated_basic_same", (48, 56), 0.02, stride=8),
    "DeepLab-LargeFOV": Run("deeplab_largefov", (41, 49), 0.02, stride=8, align_corners=True),
    "FCN-ResNet50": Run("fcn_resnet50", (57, 66), 0.003),
}


def kept() -> dict[str, np.ndarray]:
    """Returns torch's losses in float64 by name, [5] each."""
    with np.load(REFERENCE) as arrays:
        return {name: arrays[run.twin] for name, run in RUNS.items()}


def apart(losses: Sequence[float], reference: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns the relative differences [5]."""
    return np.abs(np.array(losses) / np.array(reference) - 1)


def config_of(run: Run) -> RunConfig:
    """Returns the settings of SGD; biases learn twice as fast, and kernels decay."""
    return RunConfig(learning_rate=run.learning_rate, momentum=0.9, weight_decay=5e-4, bias_lr=2.0)


def network(run: Run) -> nn.Module:
    """Returns our network, a sixteenth as wide as published, without dropout."""
    model: Any = benchmark.MODELS[run.twin].build(1 / 16, run.size[0])
    options = {"dropout_rate": 0.0} if hasattr(model, "dropout_rate") else {}
    return model.clone(axis_name=steps.AXIS, **options)


def variables(model: nn.Module, dtype: Any = np.float64) -> Any:
    """Returns parameters and batch statistics drawn from their names; nothing is zero."""
    leaves: Any = traverse_util.flatten_dict(rules.template_of(model), sep="/")

    def fill(path: str, shape: tuple[int, ...]) -> np.ndarray:
        values = drawn.uniform(path, shape).astype(dtype)
        if len(shape) > 1:
            return values * np.sqrt(6 / np.prod(shape[:-1])).astype(dtype)
        return 1 + values / 2 if path.endswith(("scale", "var")) else values / 10

    filled = {path: fill(path, leaf.shape) for path, leaf in leaves.items()}
    return traverse_util.unflatten_dict(filled, sep="/")


def batches(run: Run, dtype: Any = np.float64) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields five batches of images [B, H, W, 3] and of labels, which the colours tell."""
    for number in range(NUM_STEPS):
        images = drawn.uniform(f"batch {number}", (run.batch, *run.size, 3))
        labels = ((images[..., 0] + 1) / 2 * benchmark.NUM_CLASSES).astype(np.int32)
        labels[images[..., 1] > 0.6] = IGNORED
        yield images.astype(dtype), labels


@functools.cache
def ours(run: Run, dtype: Any = np.float64) -> tuple[list[float], Any]:
    """Returns the loss of each step and the batch statistics after the last.

    Each image has a device of its own where there are two.
    """
    model, config = network(run), config_of(run)
    term = LossTerm(benchmark.MODELS[run.twin].trained, align_corners=run.align_corners)
    devices = jax.local_devices()[: run.batch]
    is_wide = dtype == np.float64
    with jax.enable_x64(is_wide), jax.numpy_dtype_promotion("standard"):  # flax mixes widths
        model_state = variables(model, dtype)
        params = model_state.pop("params")
        tx = build_optimizer(config)
        state = TrainState.create(
            apply_fn=model.apply,
            params=params,
            tx=tx,
            model_state=model_state,
            ema_params=None,
            seed=jnp.uint32(0),
        )
        loss = semantic.pixel_loss(config.loss_norm, [term])
        step = steps.train_step(loss, devices=devices)
        state, losses = steps.replicate(state, devices), []
        for images, labels in batches(run, dtype):
            batch = {"images": images, "labels": labels, "valid": np.ones(run.batch, bool)}
            state, scalars = step(state, steps.shard(batch, 1, devices))
            losses.append(float(scalars["loss"]))
        return losses, jax.device_get(state.model_state)


def theirs(run: Run, dtype: Any = np.float64) -> tuple[list[float], Any]:
    """Returns the same of torch; batch statistics by path."""
    import torch

    config = config_of(run)
    weights = twins.Weights(variables(network(run), dtype))
    twin: Callable[..., Any] = benchmark.MODELS[run.twin].twin
    groups = {"kernel": (1.0, config.weight_decay), "scale": (1.0, 0.0), "bias": (2.0, 0.0)}
    optimizer = torch.optim.SGD(
        [
            {
                "params": [p for path, p in weights.params.items() if path.endswith(kind)],
                "lr": config.learning_rate * rate,
                "weight_decay": decay,
            }
            for kind, (rate, decay) in groups.items()
        ],
        momentum=config.momentum,
    )
    losses = []
    for images, labels in batches(run, dtype):
        optimizer.zero_grad()
        logits = twin(weights, torch.from_numpy(images).permute(0, 3, 1, 2), True, 0.0)
        seen = torch.from_numpy(labels[:, :: run.stride, :: run.stride]).long()
        loss = torch.nn.functional.cross_entropy(logits, seen, ignore_index=IGNORED)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {path: tensor.numpy() for path, tensor in weights.stats.items()}
