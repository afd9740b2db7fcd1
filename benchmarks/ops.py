"""Times pooling, convolutions and the operators of detectors, forward and backward, against torch.

    python -m benchmarks.ops [--repeats=15] [--only=pool]

Both sides get the same float32 values; torch's tensors are channels_last. The benchmark compares
their results before it times them. A ratio below 1 means that ours is faster. Suppression of boxes,
RoIAlign and mask targets are compared with torchvision's compiled operators, if they are installed.
"""

import dataclasses
import functools
import importlib
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from benchmarks.timing import alternate, import_torch
from dense_jax.infer.pasting import Convention, paste
from dense_jax.layers.conv import conv, up_conv
from dense_jax.ops import roi
from dense_jax.ops.masks import crop_masks
from dense_jax.ops.nms import nms
from dense_jax.ops.pool import max_pool, max_pool_with_switches, max_unpool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The cases to time, and how."""

    repeats: int = 15  # Timed turns of each side; the medians are shown.
    threads: int = 2  # Threads of torch; JAX uses every core of the process.
    only: str = ""  # Run only cases whose name contains this.


class Forward(NamedTuple):
    """A case without a gradient: its name, target ratio, and the call of each side."""

    name: str
    target: float
    ours: Callable[[], Any]
    theirs: Callable[[], Any]


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


def compiled_torchvision(torch):
    """Returns torchvision.ops, or None with a message if its compiled operators are missing."""
    try:
        theirs = importlib.import_module("tests.parity.theirs")
        operators = theirs.import_torchvision(compiled=True).ops
        operators.nms(torch.zeros((1, 4)), torch.zeros(1), 0.5)
        return operators
    except (ImportError, RuntimeError):  # NotImplementedError is one
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


def suppression_cases(torch, torchvision) -> Iterator[Forward]:
    """Yields rows for boxes in clusters of 20 and for a chain."""
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
            boxes = boxes.astype(np.float32)
            arrays = [jax.device_put(x) for x in (boxes, np.ones(num, bool))]
            scores = torch.linspace(1, 0, num)
            keep = jax.jit(functools.partial(nms, threshold=0.7))
            other = functools.partial(torchvision.nms, torch.tensor(boxes), scores, 0.7)

            def kept(other=other, num=num):
                return torch.zeros(num, dtype=torch.bool).index_fill_(0, other(), True)

            mine = functools.partial(keep, *arrays)
            yield Forward(f"NMS of {num} boxes, {kind}", 0.5, mine, kept)


def _discs(rng, num: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns ellipses, bool [N, H, W], and their boxes, float32 [N, 4]."""
    sides = np.exp(rng.normal(np.log(90), 0.6, (num, 2))).clip(8, min(size))
    corners = rng.uniform(0, 1, (num, 2)) * (np.array(size[::-1]) - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    y, x = np.arange(size[0])[:, None] + 0.5, np.arange(size[1]) + 0.5
    x0, y0, x1, y1 = (edge[:, None, None] for edge in boxes.T)
    across, down = (2 * x - x0 - x1) / (x1 - x0), (2 * y - y0 - y1) / (y1 - y0)
    return across**2 + down**2 < 1, boxes


def target_cases(torch, torchvision) -> Iterator[Forward]:
    """Yields a row for the soft targets of masks; torchvision makes them by its RoIAlign."""
    rng = np.random.default_rng(0)
    masks, own = _discs(rng, 20, (320, 320))
    index = rng.integers(0, 20, 128).astype(np.int32)
    moves = rng.uniform(-0.2, 0.2, (128, 4)) * np.tile(own[index, 2:] - own[index, :2], 2)
    boxes = (own[index] + moves).clip(0, 320).astype(np.float32)
    arrays = jax.device_put((masks, boxes, index))
    mine = functools.partial(jax.jit(functools.partial(crop_masks, bins=28)), *arrays)
    images = torch.tensor(masks)[:, None]
    rois = torch.tensor(np.concatenate([index[:, None].astype(np.float32), boxes], axis=1))
    yield Forward(
        "mask targets, 128 boxes of 20",
        1.0,
        mine,
        lambda: torchvision.roi_align(images.float(), rois, 28)[:, 0],
    )


def pasting_cases(torch) -> Iterator[Forward]:
    """Yields rows for 100 masks in 800 x 1333 pixels, cut at one half."""
    rng, size = np.random.default_rng(0), (800, 1333)
    centres, sides = rng.uniform(0, size[::-1], (100, 2)), rng.lognormal(np.log(120), 0.7, (100, 2))
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    boxes = boxes.clip(0, np.tile(size[::-1], 2)).astype(np.float32)
    cells = (np.arange(28) - 13.5) / 14
    discs = 1 / (1 + np.exp(8 * (cells[:, None] ** 2 + cells**2 - 0.8)))
    grids = (discs * rng.uniform(0.8, 1, (100, 1, 1))).astype(np.float32)
    given = torch.tensor(grids), torch.tensor(boxes)
    theirs = {"torchvision": paste_resized, "detectron2": paste_sampled}
    for convention in typing.get_args(Convention):

        def mine(convention=convention):
            each = zip(grids, boxes, strict=True)
            return [paste(*x, size, convention).mask(size) for x in each]

        other = functools.partial(theirs[convention], torch, *given, size)
        yield Forward(f"pasting 100 masks, {convention}", 1.0, mine, other)


def paste_resized(torch, grids, boxes, size: tuple[int, int]):
    """Pastes by torchvision's convention: each grid resized to the whole pixels of its box."""
    pixels = torch.zeros((len(grids), *size), dtype=torch.bool)
    grids = torch.nn.functional.pad(grids, (1, 1, 1, 1))
    middle, half = (boxes[:, 2:] + boxes[:, :2]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5
    half = half * (grids.shape[1] / (grids.shape[1] - 2))
    ends = torch.cat([middle - half, middle + half], dim=1).long().tolist()
    for image, grid, (x0, y0, x1, y1) in zip(pixels, grids, ends, strict=True):
        shape = max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1)
        window = torch.nn.functional.interpolate(
            grid[None, None], size=shape, mode="bilinear", align_corners=False
        )[0, 0]
        top, left = max(y0, 0), max(x0, 0)
        part = window[top - y0 : size[0] - y0, left - x0 : size[1] - x0]
        image[top : top + part.shape[0], left : left + part.shape[1]] = part >= 0.5
    return pixels


def paste_sampled(torch, grids, boxes, size: tuple[int, int]):
    """Pastes by detectron2's convention: each grid read at the centres of pixels."""
    pixels = torch.zeros((len(grids), *size), dtype=torch.bool)
    starts = (boxes[:, :2].floor() - 1).clamp(min=0).long().tolist()
    ends = torch.minimum(boxes[:, 2:].ceil() + 1, torch.tensor(size[::-1])).long().tolist()
    for image, grid, box, (x0, y0), (x1, y1) in zip(
        pixels, grids, boxes, starts, ends, strict=True
    ):
        x = (torch.arange(x0, x1) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (torch.arange(y0, y1) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        window = torch.nn.functional.grid_sample(
            grid[None, None], places[None], mode="bilinear", align_corners=False
        )
        image[y0:y1, x0:x1] = window[0, 0] >= 0.5
    return pixels


def time_forward(config: Config, rows: Iterable[Forward]) -> None:
    """Prints rows of what has no gradient."""
    for row in rows:
        if config.only not in row.name:
            continue
        found, expected = np.asarray(row.ours()), row.theirs().numpy()
        if found.dtype == bool:  # a value at the limit may be rounded to either side
            assert np.mean(found != expected) <= (1e-6 if found.ndim > 1 else 0), row.name
        else:
            np.testing.assert_allclose(found, expected, atol=1e-4)
        mine: Callable = lambda row=row: jax.block_until_ready(row.ours())  # noqa: E731
        result = alternate(mine, row.theirs, config.repeats)
        ms = f"{result.ours * 1e3:9.2f}{result.theirs * 1e3:9.2f}{result.ratio:8.2f}"
        print(f"{row.name:32}{ms}{'':26}   {row.target:.1f}", flush=True)


def main(config: Config) -> None:
    """Prints one row per case."""
    torch = import_torch(config.threads)
    torchvision = compiled_torchvision(torch)
    print(f"{'median ms':32}{'forward':>26}{'forward + backward':>26}   target")
    print(" " * 32 + f"{'ours':>9}{'torch':>9}{'ratio':>8}" * 2)
    rows = cases(torch)
    if torchvision:
        time_forward(config, suppression_cases(torch, torchvision))
        time_forward(config, target_cases(torch, torchvision))
        rows += region_cases(torch, torchvision)
    time_forward(config, pasting_cases(torch))
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
