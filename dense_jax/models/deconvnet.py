"""DeconvNet: VGG-16 and its mirror image, joined by the places of the maxima of its pools.

Reference: Noh, Hong, Han, "Learning deconvolution network for semantic segmentation", ICCV 2015,
arXiv:1505.04366: Section 3, Figure 2, Table 2. Names, initialisation and batch normalisation
follow the authors' release (HyeonwooNoh/DeconvNet: stage_1_train.prototxt; its BN layer is in
HyeonwooNoh/caffe). "Deconvolutions" of stride 1 with padding 1 are convolutions whose kernel is
turned around and has input and output swapped; they are convolutions here.
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

# Channels of the convolutions of stages 1 to 5, on the way down and on the way up.
_ENCODER = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_DECODER = ((64, 64), (128, 64), (256, 256, 128), (512, 512, 256), (512, 512, 512))
_STRIDE = 2 ** len(_ENCODER)
# Of all layers that VGG-16 does not have.
_DECODER_INIT = {"gaussian": init.normal(0.01), "he": init.he}


class _OverlapMean(nn.Module):
    """Up-convolution of stride 1 that averages overlapping copies instead of adding them.

    On an image of the network's input size fc7 is one unit and there is nothing to average, as in
    the paper. On a larger image every place is covered by up to kernel_size^2 copies; their mean,
    unlike their sum, has the scale that the following layers know.
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
    """Returns how many of `count` copies of so many taps, one after another, lie on each place."""
    at = jnp.arange(count + length - 1)
    return jnp.minimum(at, count - 1) - jnp.maximum(at - length + 1, 0) + 1


class DeconvNet(nn.Module):
    """DeconvNet; maps images [B, H, W, C], any H, W >= 1, to logits [B, H, W, num_classes].

    It is made for square images of `input_size`. A larger one is seen by fc6 window by window, in
    steps of 32 pixels, and sides are filled up with zeros at the bottom and right to `input_size`
    and to a multiple of 32; the logits are those of the image without the filling.

    Attributes:
      num_classes: number of classes.
      input_size: height and width that fc6 takes in at once, a multiple of 32.
      bn: batch normalisation behind every layer but the last; without it training ends in a poor
        optimum (Section 4.1).
      unpool: "switch" puts a value where the maximum was, "fixed_corner" into the upper left
        corner of its window, "bilinear" enlarges without looking back.
      decoder_init: initial kernels of the layers that VGG-16 does not have: "gaussian" of deviation
        0.01, as released, or "he", whose scale depends on the width as the others' does.
      fc_width: channels of fc6 and fc7.
      width: channel multiplier of all layers, fc6 and fc7 among them.
      bn_momentum: share of the old running statistics kept in a training step.
      bn_epsilon: added to the variance; 1e-9 is the release's, torchvision's vgg16_bn has 1e-5.
      axis_name: the mapped axis over which the batch is split; None outside of `pmap`.
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

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits", float32, and every layer's output by its released name.

        With `train`, the 1x1 maps of fc6 and fc7 are normalised over the batch alone, so that one
        image of `input_size` would always give the same: use two or more.

        Raises:
          ValueError: images are not [B, H, W, C], or `input_size` is not a multiple of 32.
        """
        size, outputs = vgg.image_size(images), {}
        if self.input_size % _STRIDE or self.input_size < _STRIDE:
            raise ValueError(f"The input size is a multiple of {_STRIDE}, not {self.input_size}.")
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
                    bias_init=nn.initializers.constant(0.001),  # as released
                    axis_name=self.axis_name,
                    name=norm_name,
                )
                x = norm(x)
            outputs[name] = nn.relu(x)
            return outputs[name]

        target = [_STRIDE * jax.core.max_dim(fc_kernel, -(-side // _STRIDE)) for side in size]
        x = jnp.pad(images, ((0, 0), (0, target[0] - size[0]), (0, target[1] - size[1]), (0, 0)))
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
        """Doubles the size of [B, H, W, C]."""
        size = (2 * x.shape[1], 2 * x.shape[2])
        if self.unpool == "switch":
            return max_unpool(x, switches, size, window=2)
        if self.unpool == "bilinear":
            return resize_bilinear(x, size, align_corners=False)
        return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 1, 1), (0, 1, 1), (0, 0, 0)])


deconvnet_fc1024 = functools.partial(DeconvNet, fc_width=1024)  # As re-run for the SegNet paper.
