"""Dilated front end and context module: dense prediction without loss of resolution.

Reference: Yu, Koltun, "Multi-scale context aggregation by dilated convolutions", ICLR 2016,
arXiv:1511.07122: Sections 3 and 4, Table 1, Equations 4 and 5; networks of 7 and 10 context layers:
Section 5. Names, padding and initialisation follow the authors' release (fyu/dilation: network.py,
models/dilation*_deploy.prototxt).
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dense_jax.layers import init
from dense_jax.layers.conv import Conv, up_conv
from dense_jax.layers.dropout import Dropout
from dense_jax.models import vgg
from dense_jax.models.vgg import Grid, Layer
from dense_jax.ops.pool import max_pool
from dense_jax.ops.precision import at_least_float32

Context = Literal["none", "basic", "large"]
ContextPad = Literal["once_zero", "once_reflect", "per_layer"]
ContextInit = Literal["identity", "identity_noise", "random"]
Pools = Literal["removed", "kept_stride1", "strided"]
Pad = Literal["valid_reflect", "same"]
Upsample = Literal["probabilities", "scores"]

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # Channels and convolutions, VGG-16's.
_FIRST_DENSE = 4  # This pooling and later ones have no stride.
_NOISE = 0.01  # Initial noise of the context module, relative to its identity taps.


def front_end_layers(pools: Pools = "removed") -> tuple[Layer, ...]:
    """Returns the table of VGG-16 without stride in its last two poolings (Section 4).

    Each of these poolings doubles the dilation of the layers behind it, which keeps their receptive
    field: with "kept_stride1", every fourth unit equals one of "strided", the plain VGG-16.
    "removed" has no such poolings. No layer pads.
    """
    rows, dilation = [], 1
    for stage, (features, depth) in enumerate(_STAGES, start=1):
        for i in range(1, depth + 1):
            rows.append(Layer(f"conv{stage}_{i}", 3, features=features, dilation=dilation))
        if stage < _FIRST_DENSE or pools == "strided":
            rows.append(Layer(f"pool{stage}", 2, 2))
            continue
        if pools == "kept_stride1":
            rows.append(Layer(f"pool{stage}", 2, dilation=dilation))
        dilation *= 2
    fc6 = Layer("fc6", 7, features=4096, dilation=dilation)
    return (*rows, fc6, Layer("fc7", features=4096))


def _pool_densely(x: jax.Array, dilation: int, same: bool) -> jax.Array:
    """Takes maxima over 2x2 taps at stride 1; `same` keeps the size and centres the taps."""
    before, after = ((dilation + 1) // 2, dilation // 2) if same else (0, 0)
    edges = [(0, 0, 0), (before, after, 0), (before, after, 0), (0, 0, 0)]
    x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), edges)
    x = jnp.maximum(x[:, :-dilation], x[:, dilation:])
    return jnp.maximum(x[:, :, :-dilation], x[:, :, dilation:])


class FrontEnd(nn.Module):
    """VGG-16 adapted for dense prediction; maps images [B, H, W, 3] to class scores at stride 8.

    Attributes:
      num_classes: number of classes.
      pools: changes pool4 and pool5, see `front_end_layers`; "strided" has stride 32.
      pad: "valid_reflect" pads nothing. Images must have `context` reflected pixels on each side,
        and there are ceil((H - 2 context) / stride) rows of scores. "same" pads images with zeros
        at the bottom and right to a multiple of the stride, pads each layer, and has
        ceil(H / stride) rows.
      width: channel multiplier of the VGG layers.
      dropout_rate: dropout rate behind fc6 and fc7.
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      dtype: computation dtype of the layers; scores are float32.
    """

    num_classes: int
    pools: Pools = "removed"
    pad: Pad = "valid_reflect"
    width: float = 1.0
    dropout_rate: float = 0.5
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    @property
    def grid(self) -> Grid:
        """The positions of the units of an unpadded network on its input.

        With `context` pixels around the image, unit r has its centre (stride - 1) / 2 pixels behind
        pixel r * stride, 3.5 at stride 8. The release nevertheless trains unit r with the label of
        this pixel and reads its scores there, and the weights of the release expect this.
        """
        return vgg.grids(front_end_layers(self.pools))["fc7"]

    @property
    def stride(self) -> int:
        """Pixels between units."""
        return int(self.grid.step)

    @property
    def context(self) -> int:
        """Pixels that unpadded convolutions remove on each side (186; 198 with pools)."""
        return int(self.grid.field - self.grid.step) // 2

    def padded_side(self, side: int) -> int:
        """Returns the side to which the network pads images, in pixels."""
        return -(-side // self.stride) * self.stride if self.pad == "same" else side

    def check_side(self, side: int) -> None:
        """Raises ValueError for images whose units do not stand for every eighth pixel."""
        edge = 2 * self.context if self.pad == "valid_reflect" else 0
        if side <= edge or (side - edge) % self.stride:
            raise ValueError(
                f"a side of {side} pixels does not fit: scores at stride {self.stride} need sides "
                f"of {edge} + {self.stride} m"
            )

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "final", the scores [B, h, w, num_classes], and the layers by name.

        Raises:
          ValueError: images do not have the shape [B, H, W, C], or are not larger than the context.
        """
        same, size = self.pad == "same", vgg.image_size(images)
        if not same and min(size) <= 2 * self.context:
            raise ValueError(
                f"Images of {size} pixels are not larger than their context, {self.context} pixels "
                "on each side."
            )
        edges = ((0, self.padded_side(side) - side) for side in size)
        images = jnp.pad(images, ((0, 0), *edges, (0, 0)))
        x, outputs = images, {}
        for layer in front_end_layers(self.pools):
            if not layer.name.startswith("pool"):
                conv = Conv(
                    vgg.scaled(layer.features, self.width),
                    layer.kernel,
                    padding="same" if same else 0,
                    dilation=layer.dilation,
                    dtype=self.dtype,
                    name=layer.name,
                )
                x = nn.relu(conv(x))
            elif layer.stride == 1:
                x = _pool_densely(x, layer.dilation, same)
            else:
                x = max_pool(x, layer.kernel, layer.stride, ceil=True)
            if layer.name.startswith("fc"):
                x = Dropout(self.dropout_rate, self.axis_name)(x, train=train)
            outputs[layer.name] = x
        final = Conv(
            self.num_classes, 1, kernel_init=init.normal(0.001), dtype=self.dtype, name="final"
        )
        outputs["final"] = at_least_float32(final(x))
        return outputs


class ContextModule(nn.Module):
    """Dilated 3x3 convolutions (Table 1); maps scores [B, h, w, C] to scores of the same shape.

    Attributes:
      num_layers: 8 as in Table 1, 7 without the largest dilation (KITTI), or 10 with dilations 32
        and 64 (Cityscapes).
      large: whether to multiply channels by 2, 2, 4, 8, 16, 32, 32. The paper has no larger
        factors; with 10 layers the factors double further.
      pad: "once_zero" and "once_reflect" pad the scores once by the sum of the dilations, as the
        VOC model does; "per_layer" pads each layer, as the others do. Outputs that are farther from
        the edge than this sum are equal.
      kernel_init: "identity" passes scores on, except that the first ReLU removes negative ones.
        "identity_noise" adds noise to the other weights; without it the copies of a channel in
        "large" stay equal. "random" (Glorot and Bengio) does not help (Section 3).
      dtype: computation dtype; the result is float32.
    """

    num_layers: Literal[7, 8, 10] = 8
    large: bool = False
    pad: ContextPad = "per_layer"
    kernel_init: ContextInit = "identity"
    dtype: jax.typing.DTypeLike | None = None

    @property
    def dilations(self) -> tuple[int, ...]:
        """Dilations of the 3x3 layers."""
        return (1, 1, *(2**i for i in range(1, self.num_layers - 3)), 1)

    @property
    def multipliers(self) -> tuple[int, ...]:
        """Channels of the 3x3 layers, as multiples of the number of classes."""
        if not self.large:
            return (1,) * len(self.dilations)
        # The factors follow the dilations one layer ahead; the last factor repeats.
        factors = [2 * dilation for dilation in self.dilations[:-1]]
        return (*factors, factors[-1])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the 3x3 layers in the release."""
        inner = (f"ctx_conv{i}_1" for i in range(2, self.num_layers - 2))
        return ("ctx_conv1_1", "ctx_conv1_2", *inner, "ctx_fc1")

    @nn.compact
    def __call__(self, scores: jax.Array) -> dict[str, jax.Array]:
        """Returns "ctx_final" in float32, and the layers by name."""
        num_classes, outputs = scores.shape[-1], {}
        kernel_init = {
            "identity": init.identity(num_classes),
            "identity_noise": init.identity(num_classes, _NOISE),
            "random": init.xavier,
        }[self.kernel_init]
        conv = functools.partial(Conv, dtype=self.dtype, kernel_init=kernel_init)
        x = scores
        if self.pad != "per_layer":
            edge = (sum(self.dilations),) * 2
            mode = "reflect" if self.pad == "once_reflect" else "constant"
            x = jnp.pad(x, ((0, 0), edge, edge, (0, 0)), mode=mode)
        padding = "same" if self.pad == "per_layer" else 0
        for name, dilation, factor in zip(
            self.names, self.dilations, self.multipliers, strict=True
        ):
            layer = conv(factor * num_classes, 3, padding=padding, dilation=dilation, name=name)
            x = outputs[name] = nn.relu(layer(x))
        outputs["ctx_final"] = at_least_float32(conv(num_classes, 1, name="ctx_final")(x))
        return outputs


class Dilated(nn.Module):
    """Front end and context module; maps images [B, H, W, 3] to logits of each pixel.

    With `pad` "same", logits have the size of the images. With "valid_reflect" they are smaller by
    the front end's context on each side.

    Attributes:
      num_classes, pools, pad, width, dropout_rate, axis_name, dtype: see `FrontEnd`.
      context: the context module; "none" is the front end alone.
      context_layers, context_pad, context_init: see `ContextModule`. `context_init` None follows
        the release: noise for "large" and no noise for "basic".
      upsample: how scores become logits, see `enlarge`.
      frozen_front: whether the front end is fixed: no dropout and no gradients.
    """

    num_classes: int
    context: Context = "none"
    context_layers: Literal[7, 8, 10] = 8
    context_pad: ContextPad = "per_layer"
    context_init: ContextInit | None = None
    pools: Pools = "removed"
    pad: Pad = "valid_reflect"
    upsample: Upsample = "probabilities"
    frozen_front: bool = False
    width: float = 1.0
    dropout_rate: float = 0.5
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    def front_end(self) -> FrontEnd:
        """Returns the front end alone; its parameters have the same names in the whole network."""
        return FrontEnd(
            self.num_classes,
            pools=self.pools,
            pad=self.pad,
            width=self.width,
            dropout_rate=self.dropout_rate,
            axis_name=self.axis_name,
            dtype=self.dtype,
            parent=None,
        )

    def finish(
        self, variables: Any, scores: jax.Array, images: jax.Array, sizes: jax.Array
    ) -> jax.Array:
        """Returns logits [B, H, W, C] for scores that the front end gave in another way, in tiles.

        Args:
          variables: of the whole.
          scores: [B, h, w, C], the front end's "final".
          images: normalised, [B, H, W, 3].
          sizes: int [B, 2], heights and widths before padding.
        """
        if self.context != "none":
            outputs: Any = self.context_module().apply(variables, scores)
            scores = outputs["ctx_final"]
        stride = self.front_end().stride
        return enlarge(scores, vgg.image_size(images), stride, self.upsample, sizes)

    def context_module(self) -> ContextModule:
        """Returns the context module alone; its parameters have the same names, too."""
        large = self.context == "large"
        return ContextModule(
            self.context_layers,
            large=large,
            pad=self.context_pad,
            kernel_init=self.context_init or ("identity_noise" if large else "identity"),
            dtype=self.dtype,
            parent=None,
        )

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits", "scores" at the front end's stride, both float32, and layers by name.

        Raises:
          ValueError: images do not have the shape [B, H, W, C], or are not larger than the context.
        """
        front = self.front_end().clone(parent=self)
        nn.share_scope(self, front)
        outputs = front(images, train=train and not self.frozen_front)
        scores = outputs["final"]
        if self.frozen_front:
            scores = lax.stop_gradient(scores)
        if self.context != "none":
            module = self.context_module().clone(parent=self)
            nn.share_scope(self, module)
            outputs |= module(scores)
            scores = outputs["ctx_final"]
        edge = 0 if self.pad == "same" else 2 * front.context
        height, width = (side - edge for side in vgg.image_size(images))
        outputs["scores"] = scores
        outputs["logits"] = enlarge(scores, (height, width), front.stride, self.upsample)
        return outputs


def enlarge(
    scores: jax.Array,
    size: tuple[int, int],
    stride: int,
    how: Upsample,
    sizes: jax.Array | None = None,
) -> jax.Array:
    """Enlarges scores [B, h, w, C] to logits [B, *size, C].

    Args:
      scores: one unit for each `stride` pixels.
      size: height and width of the result.
      stride: pixels between units.
      how: "probabilities" interpolates softmax probabilities, with unit r at pixel r * stride, and
        returns their logarithms, as the release's test code does. That code reads a neighbour of
        the last unit even if there is none; here the last unit repeats. "scores" is a bilinear
        up-convolution with a kernel of 2 * stride, which puts unit r in the middle of its pixels;
        the release trains through it for Cityscapes.
      sizes: [B, 2] heights and widths of images before padding, at most `size`. Units behind the
        last unit of an image have no effect. None: all images have `size`.
    """
    if how == "scores":
        if sizes is not None:
            scores = jax.vmap(functools.partial(_clear_padding, stride=stride))(scores, sizes)
        kernel = init.bilinear()(None, (2 * stride, 2 * stride, 1, scores.shape[-1]))
        scores = up_conv(
            scores, kernel, strides=stride, padding=stride // 2, groups=scores.shape[-1]
        )
        return scores[:, : size[0], : size[1]]
    interpolate = functools.partial(_interpolate, size=size, stride=stride)
    x = jax.nn.softmax(scores)
    if sizes is None:
        x = jax.vmap(functools.partial(interpolate, within=jnp.array(size)))(x)
    else:
        x = jax.vmap(interpolate)(x, within=sizes)
    return jnp.log(jnp.maximum(x, jnp.finfo(jnp.float32).tiny))


def _units(within: jax.Array, stride: int) -> jax.Array:
    """Returns the number of units for `within` pixels, at least one."""
    return jnp.maximum(-(-within // stride), 1)


def _clear_padding(x: jax.Array, within: jax.Array, stride: int) -> jax.Array:
    """Sets units [h, w, C] to zero behind an image of height and width `within` [2]."""
    rows, columns = (
        jnp.arange(n) < count for n, count in zip(x.shape, _units(within, stride), strict=False)
    )
    return jnp.where(rows[:, None, None] & columns[None, :, None], x, 0)


def _interpolate(
    x: jax.Array, within: jax.Array, *, size: tuple[int, int], stride: int
) -> jax.Array:
    """Interpolates units [h, w, C], unit r at pixel r * stride, to [*size, C]."""

    def weights(axis: int) -> jax.Array:
        last = (_units(within[axis], stride) - 1).astype(x.dtype)
        at = jnp.minimum(jnp.arange(size[axis], dtype=x.dtype) / stride, last)
        units = jnp.arange(x.shape[axis], dtype=x.dtype)
        # The hat function: 1 - distance for the two nearest units, 0 for all others.
        return jnp.maximum(1 - jnp.abs(at[:, None] - units[None]), 0)

    x = jnp.einsum("uh,hwc->uwc", weights(0), x, precision="highest")
    return jnp.einsum("vw,uwc->uvc", weights(1), x, precision="highest")


front_end = functools.partial(Dilated, context="none")
dilated_basic = functools.partial(Dilated, context="basic")
dilated_large = functools.partial(Dilated, context="large", context_pad="once_zero")  # VOC
dilation7 = functools.partial(Dilated, context="basic", context_layers=7)  # KITTI
dilation8 = dilated_basic  # CamVid
dilation10 = functools.partial(  # Cityscapes
    Dilated, context="basic", context_layers=10, upsample="scores"
)
