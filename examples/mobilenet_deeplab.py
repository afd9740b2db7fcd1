"""DeepLabv3 on MobileNetV2 at half width: from TensorFlow Lite's tensors to its mean IoU on VOC.

    python -m examples.mobilenet_deeplab --weights=tensors.npz --data-dir=/data/VOCdevkit

What to learn: TensorFlow Lite stores kernels as [out, h, w, in] ("conv_ohwi") and depthwise kernels
as [1, h, w, channels] ("depthwise_1hwc"), with batch normalisation folded into kernels and biases.
Its padding "SAME" puts an odd pixel at the end, and its resizing aligns corners. Constants that are
no weights need rules too. `examples/finetune_camvid.py` trains this network further.

The model is TensorFlow's for segmentation on phones (Apache 2.0), from shaqian/flutter_tflite;
`tensors.npz` holds its constants under their own names. Chen et al.,
"Rethinking atrous convolution for semantic image segmentation", arXiv:1706.05587; Sandler et al.,
"MobileNetV2", CVPR 2018, arXiv:1801.04381, Table 2.
"""

import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

from dense_jax.data import dataset as datasets
from dense_jax.data.dataset import Source
from dense_jax.layers.conv import Conv
from dense_jax.metrics import semantic as metrics
from dense_jax.ops.resize import resize_bilinear
from dense_jax.train import cli
from dense_jax.weights import files, rules
from dense_jax.weights.account import Account
from dense_jax.weights.rules import Rule

SIDE = 257  # Height and width of the released network's images, in pixels.
_OUTPUT_STRIDE = 8
_EXPANSION = 6
# Channels at full width, blocks, stride of the first of them.
_STAGES = (
    (16, 1, 1), (24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)
)  # fmt: skip


def same_padding(size: int, kernel_size: int, strides: int, dilation: int) -> tuple[int, int]:
    """Returns TensorFlow's padding "SAME": ceil(size / strides) outputs, odd pixel at the end."""
    outputs = -(-size // strides)
    total = max(0, (outputs - 1) * strides + dilation * (kernel_size - 1) + 1 - size)
    return total // 2, total - total // 2


def _conv(
    x: jax.Array, features: int, size: int, strides: int = 1, dilation: int = 1, **options: Any
) -> jax.Array:
    pads = [same_padding(side, size, strides, dilation) for side in x.shape[1:3]]
    padding = (pads[0], pads[1])
    return Conv(features, size, strides, padding=padding, dilation=dilation, **options)(x)


class InvertedResidual(nn.Module):
    """A depthwise 3x3 convolution between 1x1 ones; maps [B, H, W, C] to [B, H', W', features].

    Attributes:
      features: channels of the result.
      expansion: factor of the channels for the depthwise convolution.
      strides, dilation: stride and dilation of the depthwise convolution.
      dtype: computation dtype.

    Reference: arXiv:1801.04381, Figure 4d.
    """

    features: int
    expansion: int
    strides: int
    dilation: int
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), features]."""
        y, channels = x, self.expansion * x.shape[-1]
        if self.expansion > 1:
            y = nn.relu6(_conv(y, channels, 1, dtype=self.dtype, name="expand"))
        y = _conv(
            y, channels, 3, self.strides, self.dilation,
            groups=channels, dtype=self.dtype, name="depthwise",
        )  # fmt: skip
        y = _conv(nn.relu6(y), self.features, 1, dtype=self.dtype, name="project")
        return x + y if y.shape == x.shape else y


class MobileNetDeepLab(nn.Module):
    """Maps RGB images [B, H, W, 3] of 0 to 255 to "logits" [B, H, W, num_classes], float32.

    H and W may have any value; 8 m + 1 aligns the corners of map and image.

    Attributes:
      num_classes: number of classes; 21 as released, 0 = background.
      width: channel multiplier of the trunk; 0.5 as released.
      dtype: computation dtype of convolutions.
    """

    num_classes: int = 21
    width: float = 0.5
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits", and "scores" [B, H / 8, W / 8, num_classes], rounded up."""
        del train
        conv = functools.partial(_conv, dtype=self.dtype)
        x = nn.relu6(conv(images / 127.5 - 1, int(32 * self.width), 3, 2, name="Conv"))
        x = self._trunk(x)
        # This release's pyramid has two branches: the mean of the map, and a 1x1 convolution.
        mean = nn.relu(conv(x.mean((1, 2), keepdims=True), 256, 1, name="image_pooling"))
        local = nn.relu(conv(x, 256, 1, name="aspp0"))
        x = jnp.concatenate([jnp.broadcast_to(mean, local.shape), local], axis=-1)
        x = nn.relu(conv(x, 256, 1, name="concat_projection"))
        scores = conv(x, self.num_classes, 1, name="semantic").astype(jnp.float32)
        size = (images.shape[1], images.shape[2])
        return {"scores": scores, "logits": resize_bilinear(scores, size, align_corners=True)}

    def _trunk(self, x: jax.Array) -> jax.Array:
        """Applies MobileNetV2's blocks; beyond output stride 8 they dilate instead of striding."""
        total_stride, dilation, index = 2, 1, 0
        for channels, repeats, first_stride in _STAGES:
            for strides in (first_stride, *[1] * (repeats - 1)):
                is_dilated = strides > 1 and total_stride == _OUTPUT_STRIDE
                x = InvertedResidual(
                    int(channels * self.width),
                    expansion=_EXPANSION if index else 1,
                    strides=1 if is_dilated else strides,
                    dilation=dilation,
                    dtype=self.dtype,
                    name=f"expanded_conv_{index}" if index else "expanded_conv",
                )(x)
                # If a block omits its stride, the blocks after it dilate by it.
                dilation *= strides if is_dilated else 1
                total_stride *= 1 if is_dilated else strides
                index += 1
        return x


def _rules(source: str, target: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{source}/weights", f"params/{target}/kernel", "conv_ohwi"),
        Rule(f"{source}/Conv2D_bias", f"params/{target}/bias"),
    )


def _block_rules(source: str, target: str) -> tuple[Rule, ...]:
    depthwise = f"{source}/depthwise/depthwise"
    return (
        *_rules(f"{source}/expand", f"{target}/expand"),
        Rule(f"{depthwise}_weights", f"params/{target}/depthwise/kernel", "depthwise_1hwc"),
        Rule(f"{depthwise}_bias", f"params/{target}/depthwise/bias"),
        *_rules(f"{source}/project", f"{target}/project"),
    )


RULES = (
    *_rules("MobilenetV2/Conv", "Conv"),
    *_block_rules("MobilenetV2/expanded_conv", "expanded_conv"),
    *_block_rules("MobilenetV2/expanded_conv_{n}", "expanded_conv_{n}"),
    *_rules("image_pooling", "image_pooling"),
    *_rules("aspp{n}", "aspp{n}"),
    *_rules("concat_projection", "concat_projection"),
    *_rules("logits/semantic", "semantic"),
    Rule("ResizeBilinear_{n}/size", None),  # sizes of maps, no weights
    Rule("strided_slice_{n}", None),
)


def load(path: pathlib.Path) -> tuple[dict[str, Any], Account]:
    """Returns the variables, and an account of all tensors of the file.

    Raises:
      UserError: the file belongs to another network.
    """
    template = rules.template_of(MobileNetDeepLab())
    return rules.load(template, files.read(path).tensors, RULES, path=str(path))


@jax.jit
def apply(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Returns the outputs of the released network for images [B, H, W, 3] of 0 to 255."""
    outputs: Any = MobileNetDeepLab().apply(variables, images, train=False)
    return outputs


def squeeze(image: np.ndarray) -> np.ndarray:
    """Resizes an image to 257x257, uint8, whatever its proportions."""
    resized = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def confusion(variables: Any, source: Source) -> np.ndarray:
    """Returns the confusion matrix [21, 21] of a split.

    Images are resized to 257x257; nearest-neighbour resizing returns the labels to their size.
    """
    total = None
    for i in range(len(source)):
        example = source[i]
        images = squeeze(example["image"])[None].astype(np.float32)
        classes = np.asarray(apply(variables, images)["logits"][0].argmax(-1), np.uint8)
        size = example["label"].shape
        predicted = np.asarray(
            Image.fromarray(classes).resize(size[::-1], Image.Resampling.NEAREST)
        )
        counts = metrics.confusion_counts(example["label"], predicted, num_classes=21)
        total = metrics.add(total, counts)
    assert total is not None  # no dataset has an empty split
    return total


def main(weights: pathlib.Path, data_dir: pathlib.Path, split: str = "val") -> None:
    """Measures the network on PASCAL VOC.

    Args:
      weights: the model's tensors.npz.
      data_dir: folder of the dataset "voc2012".
      split: train or val.
    """
    variables, account = load(weights)
    print(account.summary())
    dataset = datasets.load("voc2012", data_dir)
    source = dataset.split(split)
    scores = metrics.summarise(confusion(variables, source), dataset.classes.names)
    print(f"{len(source)} images: mean IoU {scores['mean_iou']:.4f}, "
          f"pixel accuracy {scores['pixel_accuracy']:.4f}")  # fmt: skip


if __name__ == "__main__":
    with cli.exit_on_user_error():
        tyro.cli(main, prog="python -m examples.mobilenet_deeplab")
