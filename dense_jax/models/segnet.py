"""SegNet, SegNet-Basic, and the decoders that the paper compares.

Reference: Badrinarayanan, Kendall, Cipolla, "SegNet: a deep convolutional encoder-decoder
architecture for image segmentation", PAMI 39(12), 2017, arXiv:1511.00561: Section 3, Figures 2 and
3, Table 1. Names, biases and initialisation follow the authors' release
(alexgkendall/SegNet-Tutorial: Models/segnet_train.prototxt, segnet_basic_train.prototxt).
Dropout: Kendall, Badrinarayanan, Cipolla, "Bayesian SegNet", BMVC 2017, arXiv:1511.02680; the
layers are those of bayesian_segnet_train.prototxt and bayesian_segnet_basic_train.prototxt.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from dense_jax.layers import init
from dense_jax.layers.conv import Conv, UpConv
from dense_jax.layers.dropout import Dropout
from dense_jax.layers.norm import BatchNorm, LocalResponseNorm
from dense_jax.models.vgg import image_size, scaled
from dense_jax.ops.pool import max_pool_with_switches, max_unpool
from dense_jax.ops.precision import at_least_float32
from dense_jax.ops.resize import resize_bilinear

Decoder = Literal[
    "indices",
    "indices_add",
    "single_channel",
    "bilinear",
    "fcn",
    "fcn_noadd",
    "fcn_nodimred",
    "fcn_noadd_nodimred",
]

# Weights of CamVid's classes, copied from the release's training files. We tried definitions of the
# class frequency, and none gives these numbers.
CAMVID_WEIGHTS = {
    "sky": 0.2595,
    "building": 0.1826,
    "pole": 4.5640,
    "road": 0.1417,
    "pavement": 0.9051,
    "tree": 0.3826,
    "sign": 9.6446,
    "fence": 1.8418,
    "car": 0.6823,
    "pedestrian": 6.2478,
    "bicyclist": 7.3614,
}

_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # Channels and convolutions, VGG-16's.
_FIRST_DROPPED = 3  # Dropout follows this stage and all coarser ones.


def _score(x: jax.Array, num_classes: int, kernel_size: int, dtype, name: str) -> jax.Array:
    """Returns class scores in float32, as all sums of scores are."""
    return at_least_float32(Conv(num_classes, kernel_size, dtype=dtype, name=name)(x))


class _EncoderDecoder(nn.Module):
    """The common base of both networks; maps images [B, H, W, C] to logits [B, H, W, num_classes].

    Sides of the image need at least 2, 3, 5, 9 or 17 pixels for 1 to 5 poolings: a pooling rounds
    up, and the last one needs a window of two units.

    Attributes:
      num_classes: number of classes.
      width: channel multiplier of all layers but the last.
      dropout_rate: dropout rate of the coarse layers; 0.5 in Bayesian SegNet.
      sample_dropout: whether evaluation drops units too, to draw samples; needs a "dropout" key.
      conv_bias: whether convolutions in front of batch normalisation have a bias. The release has
        biases and the paper (Section 3.2) has none; only the number of parameters changes.
      input_lrn: whether to normalise images over neighbouring channels first. The release does so
        in SegNet-Basic; the paper normalises local contrast, which is another operation.
      bn_momentum: decay of the running mean and variance.
      bn_epsilon: constant added to the variance; 1e-9 in the release, 1e-5 in torchvision's
        vgg16_bn.
      axis_name: name of the mapped axis that splits the batch; None outside `pmap`.
      dtype: computation dtype of the layers; logits are float32.
    """

    num_classes: int
    width: float = 1.0
    dropout_rate: float = 0.0
    sample_dropout: bool = False
    conv_bias: bool = True
    input_lrn: bool = False
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-9
    axis_name: str | None = None
    dtype: jax.typing.DTypeLike | None = None

    _min_side = 1

    def padded_side(self, side: int) -> int:
        """Returns the least side, from this one on, of images that the network takes, in pixels."""
        return jax.core.max_dim(side, self._min_side)

    def _input(self, images: jax.Array) -> jax.Array:
        image_size(images)
        return LocalResponseNorm(name="norm")(images) if self.input_lrn else images

    def _block(
        self,
        x: jax.Array,
        window: tuple[int, int],
        name: str,
        *,
        train: bool,
        relu: bool = True,
        groups: int = 1,
    ) -> jax.Array:
        """Applies a convolution (features, kernel), normalisation and, if `relu`, ReLU."""
        features, kernel = window
        conv = Conv(
            features,
            kernel,
            groups=groups,
            use_bias=self.conv_bias,
            dtype=self.dtype,
            name=name,
        )
        norm = BatchNorm(
            use_running_average=not train,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            bias_init=jax.nn.initializers.constant(0.001),
            axis_name=self.axis_name,
            name=f"{name}_bn",
        )
        x = norm(conv(x))
        return nn.relu(x) if relu else x

    def _drop(self, x: jax.Array, stage: int, train: bool) -> jax.Array:
        if stage < _FIRST_DROPPED:
            return x
        dropout = Dropout(self.dropout_rate, self.axis_name)
        return dropout(x, train=train or self.sample_dropout)


class SegNet(_EncoderDecoder):
    """SegNet: the 13 convolutions of VGG-16 and a symmetric decoder; see `_EncoderDecoder`.

    Sides of the image need at least 17 pixels.

    Attributes:
      decoder_relu: whether the decoder has ReLUs; the release has them.
    """

    decoder_relu: bool = True

    _min_side = 17

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits" in float32, and "pool{i}" and the unpooled "unpool{i}" of stages i."""
        x, outputs, memory = self._input(images), {}, []
        for stage, (features, depth) in enumerate(_STAGES, 1):
            window = (scaled(features, self.width), 3)
            for i in range(1, depth + 1):
                x = self._block(x, window, f"conv{stage}_{i}", train=train)
            size = image_size(x)
            x, switches = max_pool_with_switches(x, 2, ceil=True)
            memory.append((switches, size))
            x = outputs[f"pool{stage}"] = self._drop(x, stage, train)

        for stage in range(len(_STAGES), 0, -1):
            features, depth = _STAGES[stage - 1]
            x = outputs[f"unpool{stage}"] = max_unpool(x, *memory[stage - 1], window=2)
            for i in range(depth, 0, -1):
                if (stage, i) == (1, 1):
                    break
                # The last convolution of a stage has the channels of the next finer stage.
                features = _STAGES[stage - 2][0] if i == 1 else features
                window = (scaled(features, self.width), 3)
                name = f"conv{stage}_{i}_D"
                x = self._block(x, window, name, train=train, relu=self.decoder_relu)
            x = self._drop(x, stage, train)
        outputs["logits"] = _score(x, self.num_classes, 3, self.dtype, "conv1_1_D")
        return outputs


class SegNetBasic(_EncoderDecoder):
    """SegNet-Basic: four 7x7 convolutions of 64 channels and a decoder; see `_EncoderDecoder`.

    Sides of the image need at least 9 pixels. Where the paper and the release do not describe a
    decoder of Table 1, the number of parameters here is as close as possible to the table's.

    Attributes:
      decoder: how to enlarge the coarse map by two, four times:
        "indices": unpooling by switches, then 7x7 convolution and normalisation (SegNet-Basic);
        "indices_add": the same, and adds the encoder's map in front of pooling (EncoderAddition);
        "single_channel": "indices" with depthwise convolutions (SingleChannelDecoder);
        "bilinear": bilinear interpolation of the scores, without parameters
          (Bilinear-Interpolation);
        "fcn": learned 8x8 up-convolutions of the scores with bilinear initialisation, and adds
          scores of the encoder's maps (FCN-Basic); "fcn_noadd" does not add them;
        "fcn_nodimred": the same with the maps in place of scores, and scores at the end
          (FCN-Basic-NoDimReduction); "fcn_noadd_nodimred" does not add the maps. These decoders
          have no normalisation: on the dataset "shapes", "fcn_nodimred" diverges with SGD at a rate
          of 0.1 and learns at 0.01.
      decoder_relu: whether the convolutions of the decoder have ReLUs; the release has none.
    """

    decoder: Decoder = "indices"
    decoder_relu: bool = False

    _min_side = 9

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits" in float32, and "pool{i}" and the enlarged "dec{i}" of stages i."""
        features = scaled(64, self.width)
        x, outputs, maps, switches = self._input(images), {}, [], []
        for stage in range(1, 5):
            x = self._block(x, (features, 7), f"conv{stage}", train=train)
            maps.append(x)
            x, places = max_pool_with_switches(x, 2, ceil=True)
            switches.append(places)
            x = outputs[f"pool{stage}"] = self._drop(x, stage, train)

        if scores_first := self.decoder in _SCORES_FIRST:
            x = _score(x, self.num_classes, 1, self.dtype, "conv_classifier")
        for stage in range(4, 0, -1):
            x = self._enlarge(x, maps[stage - 1], switches[stage - 1], stage, train)
            outputs[f"dec{stage}"] = x
        if not scores_first:
            x = _score(x, self.num_classes, 1, self.dtype, "conv_classifier")
        outputs["logits"] = x
        return outputs

    def _enlarge(
        self, x: jax.Array, encoded: jax.Array, switches: jax.Array, stage: int, train: bool
    ) -> jax.Array:
        """Enlarges the coarse map to the size of the encoder's map in front of pooling."""
        if self.decoder == "bilinear":
            doubled = (2 * x.shape[1], 2 * x.shape[2])
            return _cut(resize_bilinear(x, doubled, align_corners=False), encoded)
        if self.decoder.startswith("fcn"):
            return self._fcn_step(x, encoded, stage)
        features = encoded.shape[-1]
        x = max_unpool(x, switches, image_size(encoded), window=2)
        x = self._block(
            x,
            (features, 7),
            f"conv_decode{stage}",
            train=train,
            relu=self.decoder_relu,
            groups=features if self.decoder == "single_channel" else 1,
        )
        return self._drop(x + encoded if self.decoder == "indices_add" else x, stage, train)

    def _fcn_step(self, x: jax.Array, encoded: jax.Array, stage: int) -> jax.Array:
        up = UpConv(
            x.shape[-1],
            8,
            2,
            padding=3,
            use_bias=False,
            dtype=x.dtype,
            kernel_init=_interpolate,
            name=f"upsample{stage}",
        )
        x = _cut(up(x), encoded)
        if "noadd" in self.decoder:
            return x
        if self.decoder == "fcn":
            encoded = _score(encoded, self.num_classes, 1, self.dtype, f"score{stage}")
        return x + encoded


_SCORES_FIRST = ("bilinear", "fcn", "fcn_noadd")  # Bilinear upsampling commutes with scoring.


def _interpolate(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Returns a bilinear filter of 8 taps, scaled for stride 2 so that constant maps do not change.

    The unscaled filter suits stride 4. At stride 2 it multiplies the map by 4, and four times by
    256; then training at the paper's rate of 0.1 diverges within four steps.
    """
    return init.bilinear()(key, shape, dtype) / 4


def _cut(x: jax.Array, like: jax.Array) -> jax.Array:
    """Removes the row and the column that pooling added when it rounded up."""
    return x[:, : like.shape[1], : like.shape[2]]
