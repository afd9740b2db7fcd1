"""The dilation family and residual networks written in torch; see `benchmarks.twins`.

The first two families learn at stride 8: in training their twins return scores of that stride.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.twins import Twin, Weights, stack
from dense_jax.models import deeplab as deeplab_lib
from dense_jax.models import dilated as dilated_lib

_CONTEXT_LAYERS = (
    ("ctx_conv1_1", 1),
    ("ctx_conv1_2", 1),
    ("ctx_conv2_1", 2),
    ("ctx_conv3_1", 4),
    ("ctx_conv4_1", 8),
    ("ctx_conv5_1", 16),
    ("ctx_fc1", 1),
)
_MARGIN = 186  # Pixels on each side by which the front end shrinks images.
_EPSILON = 1e-5  # For batch normalisation.
_TINY = float(np.finfo(np.float32).tiny)


def dilated(*, context: bool = False, pad_once: bool = False, same: bool = False) -> Twin:
    """Returns the front end without pool4 and pool5, and optionally the context module.

    Args:
      context: whether to add a context module of eight layers, basic or large by its weights.
      pad_once: pads the scores once before the context module, not in each of its layers.
      same: pads the front end's layers; otherwise images must include their margin.
    """
    layers = dilated_lib.front_end_layers()
    if same:
        padded = (row._replace(padding=(row.kernel - 1) * row.dilation // 2) for row in layers)
        layers = tuple(
            row if row.name.startswith("pool") else new
            for row, new in zip(layers, padded, strict=True)
        )

    def forward(weights: Weights, images: Any, training: bool, dropout_rate: float) -> Any:
        from torch.nn import functional

        height, width = (side - (0 if same else 2 * _MARGIN) for side in images.shape[2:])
        x = functional.pad(images, (0, -width % 8, 0, -height % 8)) if same else images
        x = stack(layers, weights, x, training, dropout_rate, ceil=True)["fc7"]
        x = weights.conv("final", x)
        if context:
            x = functional.pad(x, [sum(d for _, d in _CONTEXT_LAYERS)] * 4) if pad_once else x
            for name, dilation in _CONTEXT_LAYERS:
                padding = 0 if pad_once else dilation
                x = weights.conv(name, x, padding=padding, dilation=dilation).relu()
            x = weights.conv("ctx_final", x)
        if training:
            return x
        # Unit r lies at pixel 8 r; the last unit is repeated.
        x = functional.pad(x.softmax(1), (0, 1, 0, 1), mode="replicate")
        size = tuple(8 * (side - 1) + 1 for side in x.shape[2:])
        x = functional.interpolate(x, size, mode="bilinear", align_corners=True)
        return x[:, :, :height, :width].clamp_min(_TINY).log()

    return forward


Scores = Callable[[Weights, Any, bool, float], Any]


def _aligned(scores: Scores, scales: Sequence[float] = (1.0,)) -> Twin:
    """Wraps a network as DeepLab: pads images to 8 m + 1 pixels, fuses scales, enlarges scores."""

    def forward(weights: Weights, images: Any, training: bool, dropout_rate: float) -> Any:
        import torch
        from torch.nn import functional

        def resize(x: Any, size: tuple[int, ...]) -> Any:
            return functional.interpolate(x, size, mode="bilinear", align_corners=True)

        height, width = images.shape[2:]
        units = [-(-(side - 1) // 8) for side in (height, width)]
        whole = tuple(8 * n + 1 for n in units)
        images = functional.pad(images, (0, whole[1] - width, 0, whole[0] - height))
        fused = None
        for scale in sorted(scales, reverse=True):
            scaled = tuple(8 * int(n * scale + 0.5) + 1 for n in units)
            x = images if scaled == whole else resize(images, scaled)
            x = scores(weights, x, training, dropout_rate)
            fused = x if fused is None else torch.maximum(fused, resize(x, fused.shape[2:]))
        assert fused is not None
        return fused if training else resize(fused, whole)[:, :, :height, :width]

    return forward


def deeplab_vgg(rates: Sequence[int]) -> Twin:
    """Returns DeepLab on VGG-16 with branches of 3x3 convolutions of these dilations."""

    def scores(weights: Weights, images: Any, training: bool, dropout_rate: float) -> Any:
        from torch.nn import functional

        table = deeplab_lib.vgg_layers()
        x = stack(table, weights, images, training, dropout_rate, ceil=True)["pool5"]
        total = 0
        for number, rate in enumerate(rates, 1):
            mark = f"_{number}" if len(rates) > 1 else ""
            y = weights.conv(f"fc6{mark}", x, padding=rate, dilation=rate).relu()
            y = functional.dropout(y, dropout_rate, training)
            y = weights.conv(f"fc7{mark}", y).relu()
            y = functional.dropout(y, dropout_rate, training)
            total = total + weights.conv(f"fc8{mark}", y)
        return total

    return _aligned(scores)


def deeplab_resnet(
    depths: Sequence[int], rates: Sequence[int], scales: Sequence[float] = (1.0,)
) -> Twin:
    """Returns DeepLab on a ResNet of He et al.'s form, whose batch normalisation is frozen."""

    def scores(weights: Weights, images: Any, training: bool, dropout_rate: float) -> Any:
        x = _resnet(weights, images, training, depths, msra=True, frozen=True)
        return sum(
            weights.conv(f"fc1_c{i}", x, padding=rate, dilation=rate)
            for i, rate in enumerate(rates)
        )

    return _aligned(scores, scales)


def segmenter(head: str, depths: Sequence[int], groups: int = 1) -> Twin:
    """Returns torchvision's network of output stride 8 with the head "deeplabv3" or "fcn"."""

    def forward(weights: Weights, images: Any, training: bool, dropout_rate: float) -> Any:
        import torch
        from torch.nn import functional

        def unit(name: str, x: Any, number: int = 0, dilation: int | None = None) -> Any:
            padding = dilation or 0
            x = weights.conv(f"{name}_{number}", x, padding=padding, dilation=dilation or 1)
            x = weights.norm(f"{name}_{number + 1}", x, training, _EPSILON)
            return functional.relu(x, inplace=True)

        x = _resnet(weights, images, training, depths, prefix="backbone/", groups=groups)
        if head == "deeplabv3":
            aspp = "classifier_0"
            branches = [unit(f"{aspp}/convs_0", x)]
            for i, rate in enumerate((12, 24, 36), 1):
                branches.append(unit(f"{aspp}/convs_{i}", x, dilation=rate))
            mean = unit(f"{aspp}/convs_4", functional.adaptive_avg_pool2d(x, 1), 1)
            branches.append(mean.expand(-1, -1, *x.shape[2:]))
            x = unit(f"{aspp}/project", torch.cat(branches, 1))
            x = functional.dropout(x, dropout_rate, training)
            x = unit("classifier", x, 1, dilation=1)
        else:
            x = functional.dropout(unit("classifier", x, dilation=1), dropout_rate, training)
        x = weights.conv("classifier_4", x)
        size = images.shape[2:]
        return functional.interpolate(x, size, mode="bilinear", align_corners=False)

    return forward


def _resnet(
    weights: Weights,
    x: Any,
    training: bool,
    depths: Sequence[int],
    *,
    prefix: str = "",
    groups: int = 1,
    msra: bool = False,
    frozen: bool = False,
) -> Any:
    """Returns the last stage of a ResNet with output stride 8.

    Strides are in 3x3 convolutions, and the first block of a dilated stage has the dilation of the
    stage before, as in torchvision. With `msra`, strides are in the first 1x1 convolutions, and the
    first block has the new dilation. With `frozen`, batch normalisation does not learn and uses
    running statistics.
    """
    from torch.nn import functional

    def unit(name: str, number: int, x: Any, **options: int) -> Any:
        return norm(f"{name}bn{number}", weights.conv(f"{prefix}{name}conv{number}", x, **options))

    def norm(name: str, x: Any) -> Any:
        return weights.norm(prefix + name, x, training, _EPSILON, frozen)

    def relu(x: Any) -> Any:
        return functional.relu(x, inplace=True)

    x = relu(unit("", 1, x, stride=2, padding=3))
    x = functional.max_pool2d(x, 3, 2, 1)
    geometry = ((1, 1, 1), (2, 1, 1), (1, 2 if msra else 1, 2), (1, 4 if msra else 2, 4))
    for stage, (depth, (stride, first, dilation)) in enumerate(
        zip(depths, geometry, strict=True), 1
    ):
        for i in range(depth):
            name, s, d = f"layer{stage}_{i}/", *((1, dilation) if i else (stride, first))
            shortcut = x
            if i == 0:
                shortcut = weights.conv(f"{prefix}{name}downsample_0", x, stride=s)
                shortcut = norm(f"{name}downsample_1", shortcut)
            y = relu(unit(name, 1, x, stride=s if msra else 1))
            s = 1 if msra else s
            y = relu(unit(name, 2, y, stride=s, padding=d, groups=groups, dilation=d))
            x = relu(unit(name, 3, y) + shortcut)
    return x
