"""Twins: our networks in torch with our parameters, for comparisons of results and time.

A twin is a function (weights, images, training, dropout rate) -> logits; images and logits are
torch tensors [B, C, H, W]. In training it returns the output for the loss, for some networks the
scores at a coarser stride, and batch normalisation uses the statistics of the batch. Dilated and
residual networks are in `benchmarks.dilation_twins`.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import traverse_util

from dense_jax.layers import init
from dense_jax.models import vgg

_UP_CONV = re.compile("up|fc6-deconv")  # Layers whose kernel torch stores as [in, out, h, w].
_EPSILON = 1e-9  # For the batch normalisation of SegNet and DeconvNet.


class Weights:
    """The variables of one of our networks as torch tensors.

    Attributes:
      params: trained tensors by path, such as "conv1_1/kernel".
      stats: running means and variances by path.
    """

    def __init__(self, variables: dict[str, Any]) -> None:
        import torch

        def tensors(tree: dict[str, Any]) -> dict[str, Any]:
            arrays = flat(tree)
            # Copy: jax.Array is read-only, and the optimiser writes.
            return {path: torch.tensor(array) for path, array in arrays.items()}

        self.params = tensors(variables["params"])
        self.stats = tensors(variables.get("batch_stats", {}))
        for path, tensor in self.params.items():
            if tensor.ndim == 4:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            self.params[path] = tensor.requires_grad_()

    def conv(
        self,
        name: str,
        x: Any,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        dilation: int = 1,
    ) -> Any:
        """Convolves with the kernel of a layer, and adds its bias if it has one."""
        from torch.nn import functional

        kernel, bias = self.params[f"{name}/kernel"], self.params.get(f"{name}/bias")
        return functional.conv2d(x, kernel, bias, stride, padding, dilation, groups)

    def up_conv(self, name: str, x: Any, stride: int) -> Any:
        """Convolves with a fractional stride."""
        from torch.nn import functional

        kernel, bias = self.params[f"{name}/kernel"], self.params.get(f"{name}/bias")
        return functional.conv_transpose2d(x, kernel, bias, stride)

    def norm(
        self,
        name: str,
        x: Any,
        training: bool,
        epsilon: float = _EPSILON,
        frozen: bool = False,
    ) -> Any:
        """Normalises over the batch; if frozen, by running statistics, and without learning."""
        from torch.nn import functional

        mean, var = self.stats[f"{name}/mean"], self.stats[f"{name}/var"]
        scale, bias = self.params[f"{name}/scale"], self.params[f"{name}/bias"]
        if frozen:
            training, scale, bias = False, scale.detach(), bias.detach()
        return functional.batch_norm(x, mean, var, scale, bias, training, 0.1, epsilon)


def flat(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns our arrays by path, with kernels in torch's layout."""

    def torch_layout(path: str, array: Any) -> np.ndarray:
        array = np.asarray(array)
        if array.ndim != 4:
            return array
        axes = (2, 3, 0, 1) if _UP_CONV.match(path) else (3, 2, 0, 1)
        return array.transpose(axes)

    leaves = traverse_util.flatten_dict(tree, sep="/")
    return {path: torch_layout(path, array) for path, array in leaves.items()}


Twin = Callable[[Weights, Any, bool, float], Any]


def fcn(
    layers: tuple[vgg.Layer, ...],
    skips: tuple[tuple[str, int], ...],
    last: tuple[int, int, int],
) -> Twin:
    """Returns an FCN with fixed bilinear up-convolutions.

    Args:
      layers: table of the trunk.
      skips: layers to add to the scores, finest last, each with the offset of its crop. Offsets are
        from the authors' release; our networks compute theirs.
      last: kernel, stride and crop of the last up-convolution.
    """

    def bilinear(x: Any, kernel: int, stride: int) -> Any:
        import torch

        taps = torch.from_numpy(init.bilinear_taps(kernel)).to(x.dtype)
        weight = torch.outer(taps, taps).expand(x.shape[1], 1, kernel, kernel)
        groups = x.shape[1]
        return torch.nn.functional.conv_transpose2d(x, weight, stride=stride, groups=groups)

    def crop(x: Any, offset: int, size: Any) -> Any:
        return x[:, :, offset : offset + size[0], offset : offset + size[1]]

    def forward(weights: Weights, images: Any, training: bool, dropout_rate: float) -> Any:
        outputs = stack(layers, weights, images, training, dropout_rate, ceil=True)
        x = weights.conv("score_fr", outputs["fc7"])
        for name, offset in skips:
            x = bilinear(x, 4, 2)
            x = x + crop(weights.conv(f"score_{name}", outputs[name]), offset, x.shape[2:])
        return crop(bilinear(x, *last[:2]), last[2], images.shape[2:])

    return forward


def stack(
    layers: tuple[vgg.Layer, ...],
    weights: Weights,
    x: Any,
    training: bool,
    dropout_rate: float,
    *,
    ceil: bool,
) -> dict[str, Any]:
    """Returns the outputs of a plain network by layer."""
    from torch.nn import functional

    outputs = {}
    for name, kernel, stride, padding, _, groups, dilation in layers:
        if name.startswith("pool"):
            x = functional.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
        elif name.startswith("norm"):
            x = functional.local_response_norm(x, 5, 1e-4, 0.75, 1.0)
        else:
            x = functional.relu(weights.conv(name, x, stride, padding, groups, dilation))
        if name.startswith("fc"):
            x = functional.dropout(x, dropout_rate, training)
        outputs[name] = x
    return outputs


def hypercolumns(weights: Weights, images: Any, training: bool, dropout_rate: float) -> Any:
    """Hypercolumns of pool2, conv4_3 and fc7 with one classifier each; sides multiples of 32."""
    from torch.nn import functional

    table = vgg.vgg16_layers(1, 3)
    outputs = stack(table, weights, images, training, dropout_rate, ceil=False)
    total = 0
    for name in ("pool2", "conv4_3", "fc7"):
        scores = weights.conv(f"score_{name}", outputs[name])
        size = images.shape[2:]
        total = total + functional.interpolate(scores, size, mode="bilinear", align_corners=False)
    return total


def _block(
    weights: Weights,
    x: Any,
    names: tuple[str, str],
    training: bool,
    padding: int,
    relu: bool = True,
) -> Any:
    """Applies convolution, batch normalisation (by their names) and optionally ReLU."""
    x = weights.norm(names[1], weights.conv(names[0], x, padding=padding), training)
    return x.relu() if relu else x


def segnet(weights: Weights, images: Any, training: bool, dropout_rate: float) -> Any:
    """SegNet as released, without dropout: the rate has no effect."""
    from torch.nn import functional

    depths, memory, x = (2, 2, 3, 3, 3), [], images

    def block(name: str, x: Any) -> Any:
        return _block(weights, x, (name, f"{name}_bn"), training, padding=1)

    for stage, depth in enumerate(depths, 1):
        for i in range(1, depth + 1):
            x = block(f"conv{stage}_{i}", x)
        size = x.shape[2:]
        x, indices = functional.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        memory.append((indices, size))
    for stage in range(len(depths), 0, -1):
        indices, size = memory[stage - 1]
        x = functional.max_unpool2d(x, indices, (2, 2), output_size=size)
        for i in range(depths[stage - 1], 1 if stage == 1 else 0, -1):
            x = block(f"conv{stage}_{i}_D", x)
    return weights.conv("conv1_1_D", x, padding=1)


def segnet_basic(weights: Weights, images: Any, training: bool, dropout_rate: float) -> Any:
    """SegNet-Basic with unpooling by indices, also without dropout."""
    from torch.nn import functional

    memory, x = [], images
    for stage in range(1, 5):
        x = _block(weights, x, (f"conv{stage}", f"conv{stage}_bn"), training, padding=3)
        size = x.shape[2:]
        x, indices = functional.max_pool2d(x, 2, ceil_mode=True, return_indices=True)
        memory.append((indices, size))
    for stage in range(4, 0, -1):
        indices, size = memory[stage - 1]
        x = functional.max_unpool2d(x, indices, (2, 2), output_size=size)
        names = (f"conv_decode{stage}", f"conv_decode{stage}_bn")
        x = _block(weights, x, names, training, padding=3, relu=False)
    return weights.conv("conv_classifier", x)


def deconvnet(weights: Weights, images: Any, training: bool, dropout_rate: float) -> Any:
    """DeconvNet on images of its input size, where fc6 has one unit; it has no dropout."""
    from torch.nn import functional

    depths, memory, x = (2, 2, 3, 3, 3), [], images

    def block(name: str, norm: str, x: Any, padding: int) -> Any:
        return _block(weights, x, (name, norm), training, padding)

    for stage, depth in enumerate(depths, 1):
        for i in range(1, depth + 1):
            x = block(f"conv{stage}_{i}", f"bn{stage}_{i}", x, 1)
        x, indices = functional.max_pool2d(x, 2, return_indices=True)
        memory.append(indices)
    x = block("fc7", "bnfc7", block("fc6", "bnfc6", x, 0), 0)
    x = weights.norm("fc6-deconv-bn", weights.up_conv("fc6-deconv", x, 1), training).relu()
    for stage in range(len(depths), 0, -1):
        x = functional.max_unpool2d(x, memory[stage - 1], (2, 2))
        for i in range(1, depths[stage - 1] + 1):
            x = block(f"deconv{stage}_{i}", f"debn{stage}_{i}", x, 1)
    return weights.conv("seg-score", x)


def unet(padding: int) -> Twin:
    """Returns the U-Net of the paper's figure, depth 4, with convolutions of this padding."""

    def crop(x: Any, size: Any) -> Any:
        top, left = (x.shape[2] - size[0]) // 2, (x.shape[3] - size[1]) // 2
        return x[:, :, top : top + size[0], left : left + size[1]]

    def forward(weights: Weights, images: Any, training: bool, dropout_rate: float) -> Any:
        import torch
        from torch.nn import functional

        def convs(x: Any, level: str, blobs: str) -> Any:
            for first, second in itertools.pairwise(blobs):
                x = weights.conv(f"conv_{level}{first}-{second}", x, padding=padding).relu()
            return x

        skips, x = [], images
        for level in range(5):
            x = functional.max_pool2d(x, 2) if level else x
            x = convs(x, f"d{level}", "abc")
            x = functional.dropout(x, dropout_rate, training) if level >= 3 else x
            skips.append(x)
        source = "d4c"
        for level in range(3, -1, -1):
            x = weights.up_conv(f"upconv_{source}_u{level}a", x, 2)
            x = torch.cat([x, crop(skips[level], x.shape[2:])], dim=1)
            x = convs(x, f"u{level}", "bcd")
            source = f"u{level}d"
        return weights.conv("conv_u0d-score", x)

    return forward
