"""Times pooling, convolutions and the operators of detectors, forward and backward, against torch.

    python -m benchmarks.ops [--repeats=15] [--only=pool]

Both sides get the same float32 values; torch's tensors are channels_last. The benchmark compares
their results before it times them. A ratio below 1 means that ours is faster. Suppression of boxes
and RoIAlign are compared with torchvision's compiled operators, if they are installed.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
import numpy as np
import tyro

from benchmarks.timing import alternate, import_torch
from dense_jax.layers.conv import conv, up_conv
from dense_jax.ops import roi
from dense_jax.ops.nms import nms
from dense_jax.ops.pool import max_pool, max_pool_with_switches, max_unpool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The cases to time, and how."""

    repeats: int = 15  # Timed turns of each side; the medians are shown.
    threads: int = 2  # Threads of torch; JAX uses every core of the process.
    only: str = ""  # Run only cases whose name contains this.


def cases(torch):
    """Returns rows (name, target ratio, ours, arrays, theirs, tensors); arrays are [B, H, W, C]."""
    rng = np.random.default_rng(0)
    functional = torch.nn.functional

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def tensor(x: np.ndarray):
        return torch.tensor(x).permute(0, 3, 1, 2)  # a view, channels_last

    rows: list[tuple[str, float, Callable, list, Callable, list]] = []
    for name, shape, window, stride, padding in (
        ("max pool 2x2", (4, 176, 240, 64), 2, 2, 0),
        ("max pool 3x3 stride 2", (4, 88, 120, 96), 3, 2, 1),
    ):
        x = normal(*shape)
        ours = lambda x, g=(window, stride, padding): max_pool(x, *g)  # noqa: E731
        theirs = lambda x, g=(window, stride, padding): functional.max_pool2d(x, *g)  # noqa: E731
        rows.append((name, 1.0, ours, [x], theirs, [tensor(x)]))

    image = normal(4, 176, 240, 64)
    pooled, switches = max_pool_with_switches(jax.device_put(image), 2)
    indices = tensor(np.asarray(switches)).long()
    rows.append(
        (
            "unpool 2x2",
            1.0,
            lambda x: max_unpool(x, switches, (176, 240), 2),
            [np.asarray(pooled)],
            lambda x: functional.max_unpool2d(x, indices, 2),
            [tensor(np.asarray(pooled))],
        )
    )
    for name, shape, k, d, p, features, groups in (
        ("conv k7, depthwise 16", (4, 180, 240, 16), 7, 1, 3, 16, 16),
        ("conv k3, 64, large map", (2, 128, 128, 64), 3, 1, 1, 64, 1),
        ("conv k3, 128, no padding", (1, 202, 202, 128), 3, 1, 0, 128, 1),
        ("conv k3, 512, small map", (2, 16, 16, 512), 3, 1, 1, 512, 1),
        ("conv k3, rate 12, 2048 to 256", (2, 17, 17, 2048), 3, 12, 12, 256, 1),
        ("conv k3, rate 24, 2048 to 256", (2, 17, 17, 2048), 3, 24, 24, 256, 1),
    ):
        x, kernel = normal(*shape), normal(k, k, shape[3] // groups, features)
        weight = torch.tensor(kernel).permute(3, 2, 0, 1).contiguous()
        g = {"padding": p, "dilation": d, "groups": groups}
        ours = lambda x, w, g=g: conv(x, w, **g)  # noqa: E731
        theirs = lambda x, w, g=g: functional.conv2d(x, w, **g)  # noqa: E731
        rows.append((name, 1.2, ours, [x, kernel], theirs, [tensor(x), weight]))
    for name, shape, k, s, p, features, groups in (
        ("up-conv k2 s2, 256 to 128", (2, 64, 64, 256), 2, 2, 0, 128, 1),
        ("up-conv k4 s2, 256 to 128", (2, 64, 64, 256), 4, 2, 1, 128, 1),
        ("up-conv k4 s2, depthwise 21", (2, 56, 56, 21), 4, 2, 1, 21, 21),
        ("up-conv k16 s8, depthwise 21", (2, 28, 28, 21), 16, 8, 4, 21, 21),
        ("up-conv k64 s32, depthwise 21", (2, 7, 7, 21), 64, 32, 16, 21, 21),
    ):
        x, kernel = normal(*shape), normal(k, k, shape[3] // groups, features)
        # Our kernel is [kh, kw, C_in / groups, C_out]; torch's is [C_in, C_out / groups, kh, kw]
        # (here with one group, or depthwise).
        axes = (3, 2, 0, 1) if groups > 1 else (2, 3, 0, 1)
        weight = torch.tensor(kernel).permute(axes).contiguous(memory_format=torch.channels_last)
        g = {"padding": p, "groups": groups}
        ours = lambda x, w, s=s, g=g: up_conv(x, w, strides=s, **g)  # noqa: E731
        theirs = lambda x, w, s=s, g=g: functional.conv_transpose2d(x, w, stride=s, **g)  # noqa: E731
        rows.append((name, 1.2, ours, [x, kernel], theirs, [tensor(x), weight]))
    return rows


def compiled_torchvision():
    """Returns torchvision.ops, or None with a message if its compiled operators are missing."""
    try:
        return importlib.import_module("torchvision.ops")
    except (ImportError, RuntimeError):
        print("torchvision with compiled operators is not installed: no rows of boxes and regions")
        return None


def region_cases(torch, torchvision):
    """Returns one row like those of `cases`: 1000 boxes on a pyramid of a 320 x 320 image."""
    rng = np.random.default_rng(0)
    strides = (4, 8, 16, 32)
    maps = [rng.normal(size=(1, 320 // s, 320 // s, 256)).astype(np.float32) for s in strides]
    centres = rng.uniform(0, 320, (1000, 2))
    sides = np.exp(rng.normal(np.log(60), 0.7, (1000, 2)))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], 1).clip(0, 320)
    boxes = jax.device_put(boxes.astype(np.float32))
    levels = np.asarray(roi.assign_levels(boxes)) - 2
    where = [torch.tensor(np.flatnonzero(levels == i)) for i in range(4)]
    each = [torch.tensor(np.asarray(boxes))[some] for some in where]

    def ours(*maps):
        return roi.roi_align(maps, boxes[None], bins=7)[0]

    def theirs(*maps):
        y = torch.empty((1000, 256, 7, 7))
        for x, stride, some, own in zip(maps, strides, where, each, strict=True):
            y[some] = torchvision.roi_align(x, [own], 7, 1 / stride, sampling_ratio=2)
        return y

    # The compiled kernels work on contiguous NCHW.
    tensors = [torch.tensor(x).permute(0, 3, 1, 2).contiguous() for x in maps]
    return [("RoIAlign 7x7, 1000 boxes, 256", 0.5, ours, maps, theirs, tensors)]


def time_suppression(config: Config, torch, torchvision) -> None:
    """Prints a row for boxes in clusters of 20 and for a chain, which has no gradient."""
    rng = np.random.default_rng(0)
    for num in (1000, 2000):
        objects = rng.uniform(0, 1000, (num // 20, 2)).repeat(20, 0)
        sides = rng.uniform(30, 200, (num // 20, 2)).repeat(20, 0)
        corners = objects + 0.1 * sides * rng.normal(size=sides.shape)
        clusters = np.concatenate(
            [corners, corners + sides * rng.uniform(0.8, 1.2, sides.shape)], 1
        )
        left, zeros = np.arange(num) * 2.0, np.zeros(num)
        chain = np.stack([left, zeros, left + 16, zeros + 1], 1)  # IoU 7/9 with the next box
        for kind, boxes in (("clusters", rng.permutation(clusters)), ("a chain", chain)):
            name = f"NMS of {num} boxes, {kind}"
            if config.only not in name:
                continue
            boxes = boxes.astype(np.float32)
            arrays = [jax.device_put(x) for x in (boxes, np.ones(num, bool))]
            scores = torch.linspace(1, 0, num)
            mine = jax.jit(functools.partial(nms, threshold=0.7))
            other = functools.partial(torchvision.nms, torch.tensor(boxes), scores, 0.7)
            kept = np.flatnonzero(mine(*arrays))
            np.testing.assert_array_equal(kept, other().numpy())
            result = alternate(
                lambda f=mine, a=arrays: jax.block_until_ready(f(*a)), other, config.repeats
            )
            ms = f"{result.ours * 1e3:9.2f}{result.theirs * 1e3:9.2f}{result.ratio:8.2f}"
            print(f"{name:32}{ms}{'':26}   0.5")


def main(config: Config) -> None:
    """Prints one row per case."""
    torch = import_torch(config.threads)
    torchvision = compiled_torchvision()
    print(f"{'median ms':32}{'forward':>26}{'forward + backward':>26}   target")
    print(" " * 32 + f"{'ours':>9}{'torch':>9}{'ratio':>8}" * 2)
    rows = cases(torch)
    if torchvision:
        time_suppression(config, torch, torchvision)
        rows += region_cases(torch, torchvision)
    for name, target, ours, arrays, theirs, tensors in rows:
        if config.only not in name:
            continue
        arrays = [jax.device_put(a) for a in arrays]
        tensors = [t.requires_grad_() for t in tensors]
        expected = theirs(*tensors)
        grad = torch.randn(expected.shape).contiguous(memory_format=torch.channels_last)
        array_grad = jax.device_put(grad.permute(0, 2, 3, 1).numpy())

        def both(arrays, grad, ours=ours):
            y, pull = jax.vjp(ours, *arrays)
            return y, pull(grad)

        forward, both = jax.jit(ours), jax.jit(both)

        def torch_both(theirs=theirs, tensors=tensors, grad=grad):
            y = theirs(*tensors)
            return y, torch.autograd.grad(y, tensors, grad)  # both sides return both

        y, (x_grad, *_) = both(arrays, array_grad)
        for value, other in ((y, expected.detach()), (x_grad, torch_both()[1][0])):
            other = other.permute(0, 2, 3, 1).numpy()
            np.testing.assert_allclose(value, other, atol=1e-4 * float(np.abs(other).max()))

        def torch_forward(theirs=theirs, tensors=tensors):
            with torch.no_grad():
                return theirs(*tensors)

        print(f"{name:32}", end="", flush=True)
        for mine, other in (
            (lambda f=forward, a=arrays: jax.block_until_ready(f(*a)), torch_forward),
            (lambda f=both, a=arrays, g=array_grad: jax.block_until_ready(f(a, g)), torch_both),
        ):
            result = alternate(mine, other, config.repeats)
            print(
                f"{result.ours * 1e3:9.2f}{result.theirs * 1e3:9.2f}{result.ratio:8.2f}",
                end="",
                flush=True,
            )
        print(f"   {target:.1f}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__, prog="python -m benchmarks.ops"))
