"""ResNet-20 for CIFAR-10 from a PyTorch state dict: batch statistics, shortcuts without kernels.

    python -m examples.resnet20_cifar --weights=resnet20-12fca82f.th --data-dir=/data/VOCdevkit

What to learn: running averages of batch normalisation go to "batch_stats" (`rules.batch_norm`). The
reader removes the prefix "module." that DataParallel adds to all names. An account cannot check
layers without parameters, here the shortcuts: compare with a known output.

The weights are from akamaster/pytorch_resnet_cifar10 (BSD 2-clause, Y. Idelbayev; test error
8.27 %). The network is from Section 4.2 of He, Zhang, Ren, Sun, CVPR 2016, arXiv:1512.03385, with
option A shortcuts. The command classifies objects of PASCAL VOC, which is not its training data.
"""

import pathlib
from typing import Any
from xml.etree import ElementTree

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

from dense_jax.data.datasets import voc2012
from dense_jax.data.normalise import Normalise
from dense_jax.errors import UserError
from dense_jax.layers.conv import Conv
from dense_jax.layers.norm import BatchNorm
from dense_jax.metrics import semantic as metrics
from dense_jax.train import cli
from dense_jax.weights import files, rules
from dense_jax.weights.account import Account

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
)  # fmt: skip
# VOC's names of these classes; VOC has no deer, frog and truck.
VOC_NAMES = {
    "aeroplane": "airplane",
    "bird": "bird",
    "boat": "ship",
    "car": "automobile",
    "cat": "cat",
    "dog": "dog",
    "horse": "horse",
}
MIN_SIDE = 48  # In pixels; smaller objects have too little detail.
_SIDES = ("xmin", "ymin", "xmax", "ymax")


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; maps [B, H, W, C] to [B, H / s, W / s, features].

    If the size changes, the shortcut takes every second pixel and adds channels of zeros evenly on
    both sides (option A).
    """

    features: int
    strides: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / strides, W / strides, features]."""

        def norm(x: jax.Array, name: str) -> jax.Array:
            return BatchNorm(use_running_average=not self.train, momentum=0.9, name=name)(x)

        y = Conv(self.features, 3, self.strides, padding=1, use_bias=False, name="conv1")(x)
        y = nn.relu(norm(y, "bn1"))
        y = norm(Conv(self.features, 3, use_bias=False, name="conv2")(y), "bn2")
        new = (self.features - x.shape[-1]) // 2
        shortcut = jnp.pad(
            x[:, :: self.strides, :: self.strides], ((0, 0), (0, 0), (0, 0), (new, new))
        )
        return nn.relu(y + shortcut)


class ResNet20(nn.Module):
    """Maps images [B, 32, 32, 3] with the normalisation "torchvision" to "logits" [B, 10]."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits" and the stages "layer1" to "layer3"."""
        x = Conv(16, 3, use_bias=False, name="conv1")(images)
        x = nn.relu(BatchNorm(use_running_average=not train, momentum=0.9, name="bn1")(x))
        outputs = {}
        for stage, features in enumerate((16, 32, 64), start=1):
            for block in range(3):
                strides = 2 if stage > 1 and block == 0 else 1
                x = Block(features, strides, train, name=f"layer{stage}_{block}")(x)
            outputs[f"layer{stage}"] = x
        outputs["logits"] = nn.Dense(len(CLASSES), name="linear")(x.mean((1, 2)))
        return outputs


RULES = (
    *rules.conv("conv1", "conv1"),
    *rules.batch_norm("bn1", "bn1"),
    *rules.conv("layer{s}.{b}.conv{i}", "layer{s}_{b}/conv{i}"),
    *rules.batch_norm("layer{s}.{b}.bn{i}", "layer{s}_{b}/bn{i}"),
    *rules.dense("linear", "linear"),
)


def load(path: pathlib.Path) -> tuple[dict[str, Any], Account]:
    """Returns the variables, and an account of all tensors of the file.

    Raises:
      UserError: the file belongs to another network.
    """
    template = rules.template_of(ResNet20())
    return rules.load(template, files.read(path).tensors, RULES, path=str(path))


@jax.jit
def apply(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Returns the outputs for normalised images [B, 32, 32, 3]."""
    outputs: Any = ResNet20().apply(variables, images, train=False)
    return outputs


def objects(data_dir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns crops of VOC's objects in the shared classes, averaged down to 32x32.

    Returns:
      Images, uint8 [N, 32, 32, 3], and labels, int32 [N], indices into `CLASSES`.

    Raises:
      UserError: the folder does not hold VOC, or its boxes are missing or damaged.
    """
    images, labels = [], []
    for pair in voc2012.find(data_dir).pairs:
        path = pair.image.parents[1] / "Annotations" / f"{pair.name}.xml"
        try:
            root = ElementTree.parse(path)
        except (OSError, ElementTree.ParseError) as error:
            raise UserError(f"{path} cannot be read ({error}): unpack VOC again") from error
        with Image.open(pair.image) as picture:
            for thing in root.iterfind("object"):
                label = VOC_NAMES.get(thing.findtext("name") or "")
                # VOC counts pixels from 1, and its boxes include both corners.
                sides = [float(thing.findtext(f"bndbox/{side}") or 0) for side in _SIDES]
                left, top, right, bottom = (round(side) for side in sides)
                if label is None or min(right - left, bottom - top) < MIN_SIDE:
                    continue
                crop = picture.crop((left - 1, top - 1, right, bottom))
                images.append(np.asarray(crop.resize((32, 32), Image.Resampling.BOX)))
                labels.append(CLASSES.index(label))
    return np.stack(images), np.array(labels, np.int32)


def main(weights: pathlib.Path, data_dir: pathlib.Path) -> None:
    """Measures the network's accuracy on objects of PASCAL VOC in its classes.

    Args:
      weights: resnet20-12fca82f.th.
      data_dir: folder of VOC 2012, with Annotations.
    """
    variables, account = load(weights)
    print(account.summary())
    images, labels = objects(data_dir)
    logits = apply(variables, Normalise("torchvision")({"image": images})["image"])["logits"]
    confusion = metrics.confusion_counts(labels, jnp.argmax(logits, -1), num_classes=len(CLASSES))
    scores = metrics.summarise(np.asarray(confusion), CLASSES)
    print(f"{scores['pixel_accuracy']:.1%} of {len(labels)} objects get the right class")


if __name__ == "__main__":
    with cli.exit_on_user_error():
        tyro.cli(main, prog="python -m examples.resnet20_cifar")
