"""DeconvNet: VGG-16 and a symmetric decoder, which unpools by the switches of the poolings.

Reference: Noh, Hong, Han, "Learning deconvolution network for semantic segmentation", ICCV 2015,
arXiv:1505.04366: Section 3, Figure 2, Table 2. Names, initialisation and batch normalisation
follow the authors' release (HyeonwooNoh/DeconvNet: stage_1_train.prototxt; its BN layer is in
HyeonwooNoh/caffe). A "deconvolution" of stride 1 with padding 1 is a convolution whose kernel is
flipped and has input and output channels swapped; here it is a convolution.
"""

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import lax

from dense_jax.layers import init
from dense_jax.layers.conv import Conv, up_conv
from dense_jax.layers.norm import BatchNorm
from dense_jax.models import vgg
from dense_jax.ops.pool import max_pool_with_switches, max_unpool
from dense_jax.ops.precision import at_least_float32
from dense_jax.ops.resize import resize_bilinear

# Channels of the convolutions in stages 1 to 5 of the encoder and of the decoder.
_ENCODER = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_DECODER = ((64, 64), (128, 64), (256, 256, 128), (512, 512, 256), (512, 512, 512))
_STRIDE = 2 ** len(_ENCODER)
# Initial kernels of the layers that VGG-16 does not have.
_DECODER_INIT = {"gaussian": init.normal(0.01), "he": init.he}


class _OverlapMean(nn.Module):
    """Up-convolution of stride 1 that averages overlapping copies of the kernel.

    An up-convolution adds the copies. On an image of the network's input size fc7 is one unit, so
    no copies overlap, as in the paper. On a larger image up to kernel_size^2 copies cover a
    position. Their mean, unlike their sum, has the scale that the following layers expect.
    """

    features: int
    kernel_size: int
    kernel_init: init.Initializer
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H + kernel_size - 1, W + kernel_size - 1, features]."""
        k = self.kernel_size
        kernel = self.param("kernel", self.kernel_init, (k, k, x.shape[3], self.features))
        bias = self.param("bias", init.zero, (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        rows, columns = (_num_copies(n, k) for n in x.shape[1:3])
        copies = rows.reshape(1, -1, 1, 1) * columns.reshape(1, 1, -1, 1)
        y = up_conv(x, kernel, strides=1) / copies.astype(x.dtype)
        return y + bias.reshape(1, 1, 1, -1)


def _num_copies(count: int, length: int) -> jax.Array:
    """Returns the number of copies at each position for `count` copies of `length` taps, step 1."""
    at = jnp.arange(count + length - 1)
    return jnp.minimum(at, count - 1) - jnp.maximum(at - length + 1, 0) + 1


class DeconvNet(nn.Module):
    """DeconvNet; maps images [B, H, W, C], any H, W >= 1, to logits [B, H, W, num_classes].

    The network is made for square images of `input_size`. On a larger image fc6 slides in steps of
    32 pixels. Zeros pad images at the bottom and right to at least `input_size` and to a multiple
    of 32; the logits are cropped to the image.

    Attributes:
      num_classes: number of classes.
      input_size: height and width of the window of fc6, a multiple of 32.
      bn: whether batch normalisation follows each layer but the last; without it training ends in a
        poor optimum (Section 4.1).
      unpool: "switch" puts a value at the position of the maximum, "fixed_corner" in the upper left
        corner of the window; "bilinear" interpolates without switches.
      decoder_init: initial kernels of the layers that VGG-16 does not have: "gaussian" with a
        standard deviation of 0.01, as in the release, or "he", whose scale depends on the width.
      fc_width: channels of fc6 and fc7.
      width: channel multiplier of all layers, also of fc6 and fc7.
      bn_momentum: decay of the running statistics.
      bn_epsilon: constant added to the variance; 1e-9 in the release, 1e-5 in torchvision's
        vgg16_bn.
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      dtype: computation dtype; the logits are float32.
    """

    num_classes: int
    input_size: int = 224
    bn: bool = True
    unpool: Literal["switch", "fixed_corner", "bilinear"] = "switch"
    decoder_init: Literal["gaussian", "he"] = "gaussian"
    fc_width: int = 4096
    width: float = 1.0
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-9
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    def padded_side(self, side: int) -> int:
        """Returns the side to which the network pads images, in pixels."""
        return _STRIDE * jax.core.max_dim(self.input_size // _STRIDE, -(-side // _STRIDE))

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits" in float32, and the output of each layer by its name in the release.

        With `train`, normalisation of the 1x1 maps of fc6 and fc7 averages over the batch alone,
        and refuses one image of `input_size`.

        Raises:
          ValueError: images do not have the shape [B, H, W, C], or `input_size` is not a multiple
            of 32.
        """
        size, outputs = vgg.image_size(images), {}
        if self.input_size % _STRIDE or self.input_size < _STRIDE:
            raise ValueError(
                f"The input size must be a multiple of {_STRIDE}, not {self.input_size}."
            )
        fc_kernel = self.input_size // _STRIDE
        scaled = functools.partial(vgg.scaled, width=self.width)
        conv = functools.partial(Conv, dtype=self.dtype)
        decoder_init = _DECODER_INIT[self.decoder_init]
        deconv = functools.partial(conv, kernel_init=decoder_init)

        def finish(name: str, norm_name: str, x: jax.Array) -> jax.Array:
            if self.bn:
                norm = BatchNorm(
                    use_running_average=not train,
                    momentum=self.bn_momentum,
                    epsilon=self.bn_epsilon,
                    bias_init=nn.initializers.constant(0.001),  # as in the release
                    axis_name=self.axis_name,
                    name=norm_name,
                )
                x = norm(x)
            outputs[name] = nn.relu(x)
            return outputs[name]

        edges = ((0, self.padded_side(side) - side) for side in size)
        x = jnp.pad(images, ((0, 0), *edges, (0, 0)))
        switches = []
        for stage, features in enumerate(_ENCODER, 1):
            for i, channels in enumerate(features, 1):
                layer = conv(scaled(channels), 3, name=f"conv{stage}_{i}")
                x = finish(f"conv{stage}_{i}", f"bn{stage}_{i}", layer(x))
            x, places = max_pool_with_switches(x, 2)
            outputs[f"pool{stage}"] = x
            switches.append(places)

        x = conv(scaled(self.fc_width), fc_kernel, padding=0, name="fc6")(x)
        x = finish("fc6", "bnfc6", x)
        x = finish("fc7", "bnfc7", conv(scaled(self.fc_width), 1, name="fc7")(x))
        layer = _OverlapMean(
            scaled(_DECODER[-1][0]), fc_kernel, decoder_init, self.dtype, name="fc6-deconv"
        )
        x = finish("fc6-deconv", "fc6-deconv-bn", layer(x))

        for stage, features in reversed(list(enumerate(_DECODER, 1))):
            x = outputs[f"unpool{stage}"] = self._unpool(x, switches[stage - 1])
            for i, channels in enumerate(features, 1):
                layer = deconv(scaled(channels), 3, name=f"deconv{stage}_{i}")
                x = finish(f"deconv{stage}_{i}", f"debn{stage}_{i}", layer(x))
        scores = deconv(self.num_classes, 1, name="seg-score")(x)
        outputs["logits"] = at_least_float32(scores[:, : size[0], : size[1]])
        return outputs

    def _unpool(self, x: jax.Array, switches: jax.Array) -> jax.Array:
        """Doubles height and width of [B, H, W, C]."""
        size = (2 * x.shape[1], 2 * x.shape[2])
        if self.unpool == "switch":
            return max_unpool(x, switches, size, window=2)
        if self.unpool == "bilinear":
            return resize_bilinear(x, size, align_corners=False)
        return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 1, 1), (0, 1, 1), (0, 0, 0)])


deconvnet_fc1024 = functools.partial(DeconvNet, fc_width=1024)  # The SegNet paper trains this one.
