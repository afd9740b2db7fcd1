"""VGG-16 as a fully convolutional network, and the layer tables of plain networks.

A plain network is one table of layers. `Stack` builds the network from the table. `grids` gives the
position of each layer's units on the image, and models derive crops and receptive fields from it.

Reference: Simonyan, Zisserman, "Very deep convolutional networks for large-scale image
recognition", ICLR 2015, arXiv:1409.1556, Table 1 column D. Long, Shelhamer, Darrell, CVPR 2015,
arXiv:1411.4038, Section 3.1 turns its fully connected layers into convolutions.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
from jax import lax

from dense_jax.layers.conv import Conv
from dense_jax.layers.dropout import Dropout
from dense_jax.layers.norm import LocalResponseNorm
from dense_jax.ops.pool import max_pool


class Grid(NamedTuple):
    """Positions of a layer's units on the image along one axis, in image pixels.

    Attributes:
      first: centre of unit 0. Pixel centres are whole numbers; padding makes it negative.
      step: distance between neighbouring units.
      field: size of the receptive field of one unit.
    """

    first: float = 0.0
    step: float = 1.0
    field: float = 1.0

    def conv(self, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> "Grid":
        """Returns the grid behind a convolution or a pooling."""
        extent = (kernel - 1) * dilation
        return Grid(
            first=self.first + (extent / 2 - padding) * self.step,
            step=self.step * stride,
            field=self.field + extent * self.step,
        )

    def up_conv(self, kernel: int, stride: int, padding: int = 0) -> "Grid":
        """Returns the grid behind an up-convolution, whose fractional stride is 1 / stride."""
        step = self.step / stride
        return Grid(
            first=self.first - ((kernel - 1) / 2 - padding) * step,
            step=step,
            field=self.field + (-(-kernel // stride) - 1) * self.step,
        )

    def index_of(self, other: "Grid") -> int:
        """Returns the index of the unit at the position of unit 0 of another grid of equal step.

        Raises:
          ValueError: there is no unit at this position, or the steps differ.
        """
        index = (other.first - self.first) / self.step
        if self.step != other.step or index < 0 or index != int(index):
            raise ValueError(f"No unit of {self} is at unit 0 of {other}.")
        return int(index)


class Layer(NamedTuple):
    """One row of a layer table; the name says conv* or fc* (convolution, ReLU), pool* or norm*."""

    name: str
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    features: int = 0  # For convolutions.
    groups: int = 1
    dilation: int = 1  # For convolutions.


def grids(layers: tuple[Layer, ...]) -> dict[str, Grid]:
    """Returns the grid of each layer by name."""
    grid, result = Grid(), {}
    for layer in layers:
        grid = grid.conv(layer.kernel, layer.stride, layer.padding, layer.dilation)
        result[layer.name] = grid
    return result


def image_size(images: jax.Array) -> tuple[int, int]:
    """Returns (H, W) of images [B, H, W, C]; raises `ValueError` for other shapes."""
    if images.ndim != 4:
        raise ValueError(f"Expected images [B, H, W, C], received {images.shape}.")
    return images.shape[1], images.shape[2]


def scaled(features: int, width: float, groups: int = 1) -> int:
    """Returns features * width, rounded to a multiple of `groups`, at least `groups`."""
    return groups * max(1, round(features * width / groups))


class Stack(nn.Module):
    """A plain network; maps [B, H, W, C] to the output of every layer by name, [B, H', W', C'].

    Attributes:
      layers: the table, from the first layer to the last.
      width: channel multiplier, see `scaled`.
      ceil: whether pooling rounds sizes up, as in Caffe, or down, as in torch.
      dropout_rate: dropout rate behind fc6 and fc7.
      norm: builds the layers norm*: (*, name).
      frozen: name of the last layer that no gradient reaches; None if gradients reach all layers.
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      dtype: computation dtype; None computes in the dtype of the parameters, float32.
    """

    layers: tuple[Layer, ...]
    width: float = 1.0
    ceil: bool = True
    dropout_rate: float = 0.5
    norm: Callable[..., nn.Module] = LocalResponseNorm
    frozen: str | None = None
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns the output of each layer, behind ReLU and, for fc6 and fc7, behind dropout.

        Raises:
          ValueError: images do not have the shape [B, H, W, C], or are too small for the table.
        """
        image_size(images)
        groups = max(layer.groups for layer in self.layers)
        x, outputs = images, {}
        for layer in self.layers:
            name, window = layer.name, (layer.kernel, layer.stride, layer.padding)
            if name.startswith("pool"):
                x = max_pool(x, *window, ceil=self.ceil)
            elif name.startswith("norm"):
                x = self.norm(name=name)(x)
            else:
                features = scaled(layer.features, self.width, groups)
                conv = Conv(
                    features, *window, layer.dilation, layer.groups, dtype=self.dtype, name=name
                )
                x = nn.relu(conv(x))
            if name.startswith("fc"):
                x = Dropout(self.dropout_rate, self.axis_name)(x, train=train)
            if name == self.frozen:
                x = lax.stop_gradient(x)
            outputs[name] = x
        return outputs


def vgg16_layers(first_padding: int = 1, fc6_padding: int = 0) -> tuple[Layer, ...]:
    """Returns the table of VGG-16 from conv1_1 to fc7, with the names of the release."""
    rows, padding = [], first_padding
    for stage, (features, depth) in enumerate(
        [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], start=1
    ):
        for i in range(1, depth + 1):
            rows.append(Layer(f"conv{stage}_{i}", 3, 1, padding, features))
            padding = 1
        rows.append(Layer(f"pool{stage}", 2, 2))
    rows += [Layer("fc6", 7, 1, fc6_padding, 4096), Layer("fc7", 1, 1, 0, 4096)]
    return tuple(rows)


def vgg16(
    *,
    padding: Literal["caffe", "same"] = "caffe",
    first_padding: int = 1,
    last: str = "fc7",
    **options,
) -> Stack:
    """Returns VGG-16 up to fc7, with 134,260,544 parameters.

    Args:
      padding: "caffe" rounds pooling sizes up and does not pad fc6. "same" rounds them down and
        pads fc6 by 3; then an image of 32 h x 32 w pixels gives h x w units in fc7.
      first_padding: padding of conv1_1 (100 in FCN).
      last: name of the last layer, for networks that end earlier.
      **options: width, dropout_rate, frozen, axis_name, dtype of `Stack`.
    """
    caffe = padding == "caffe"
    layers = vgg16_layers(first_padding, 0 if caffe else 3)
    end = [layer.name for layer in layers].index(last) + 1
    return Stack(layers[:end], ceil=caffe, **options)
