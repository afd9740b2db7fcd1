"""A published U-Net for nuclei, trained with PyTorch: from its file to its IoU, in one page.

    python -m examples.nuclei_unet --weights=tensors.npz --data-dir=/data/dsb2018_nuclei

To import your own weights, write three things: a module whose layers have the names of the file
(with "_" instead of "."), a table of rules from tensors of the file to parameters, and `load`,
which raises an error if a tensor or a parameter remains.

The network is the example model "unet2d_nuclei_broad" of bioimage.io, by C. Pape and
F. Beuttenmueller (bioimage-io/spec-bioimage-io, MIT licence), after Ronneberger, Fischer, Brox,
MICCAI 2015, arXiv:1505.04597; `tensors.npz` holds the initializers of its ONNX file under their own
names. It was trained on images of the 2018 Data Science Bowl.
"""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dense_jax.data import dataset as datasets
from dense_jax.data.dataset import Source
from dense_jax.layers.conv import Conv
from dense_jax.metrics import semantic as metrics
from dense_jax.ops.pool import max_pool
from dense_jax.ops.resize import resize_bilinear
from dense_jax.train import cli
from dense_jax.weights import files, rules
from dense_jax.weights.account import Account

_GRID = 8  # Three poolings.


class NucleiUNet(nn.Module):
    """Maps images [B, H, W, 1] to "logits" [B, H, W, 1] of nuclei.

    Images have mean 0 and standard deviation 1. H and W are multiples of 8.
    """

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits", whose sigmoid is the probability of a nucleus."""
        del train  # the network is the same in training

        def level(x: jax.Array, name: str, width: int) -> jax.Array:
            x = Conv(width, 3, name=f"{name}_0")(x)  # No ReLU between the two.
            return nn.relu(Conv(width, 3, name=f"{name}_1")(x))

        x, widths, skips = images, (16, 32, 64), []
        for i, width in enumerate(widths):
            skips.append(level(x, f"encoders_{i}", width))
            x = max_pool(skips[-1], 2)
        x = level(x, "base", 128)
        for i, (skip, width) in enumerate(zip(reversed(skips), reversed(widths), strict=True)):
            x = resize_bilinear(x, (skip.shape[1], skip.shape[2]), align_corners=False)
            x = Conv(width, 1, name=f"upsamplers_{i}_1")(x)
            x = level(jnp.concatenate([skip, x], axis=-1), f"decoders_{i}", width)
        return {"logits": Conv(1, 1, name="output")(x)}


RULES = (
    *rules.conv("encoders.{level}.{i}", "encoders_{level}_{i}"),
    *rules.conv("base.{i}", "base_{i}"),
    *rules.conv("upsamplers.{level}.1", "upsamplers_{level}_1"),
    *rules.conv("decoders.{level}.{i}", "decoders_{level}_{i}"),
    *rules.conv("output", "output"),
)


def load(path: pathlib.Path) -> tuple[dict[str, Any], Account]:
    """Returns the variables, and an account of all tensors of the file.

    Raises:
      UserError: the file belongs to another network.
    """
    template = rules.template_of(NucleiUNet(), num_channels=1)
    return rules.load(template, files.read(path).tensors, RULES, path=str(path))


@jax.jit
def apply(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Returns the outputs for images [B, H, W, 1]."""
    outputs: Any = NucleiUNet().apply(variables, images, train=False)
    return outputs


def standardise(image: np.ndarray) -> np.ndarray:
    """Scales an image to mean 0 and standard deviation 1, as in training."""
    image = image.astype(np.float32)
    return (image - image.mean()) / (image.std() + np.float32(1e-6))


def foreground_iou(variables: Any, source: Source) -> np.ndarray:
    """Returns the IoU of nuclei and prediction for each grey image of a split, [N].

    Images are padded by reflection at the bottom and right.
    """
    ious = []
    for i in range(len(source)):
        example = source[i]
        image, label = example["image"], example["label"]
        if np.any(image != image[:, :, :1]):
            continue  # stained tissue in colour, which is not in the training data
        height, width = label.shape
        grey = np.pad(
            standardise(image[:, :, 0]), ((0, -height % _GRID), (0, -width % _GRID)), "reflect"
        )
        logits = apply(variables, grey[None, :, :, None])["logits"][0, :height, :width, 0]
        predicted = (logits > 0).astype(np.uint8)  # a probability above 0.5
        counts = metrics.confusion_counts(label, predicted, num_classes=2)
        ious.append(metrics.summarise(np.asarray(counts))["per_class"][1]["iou"])
    return np.array(ious)


def main(weights: pathlib.Path, data_dir: pathlib.Path, split: str = "val") -> None:
    """Measures the network on the grey images of the 2018 Data Science Bowl.

    Args:
      weights: the model's tensors.npz.
      data_dir: folder of the dataset "nuclei".
      split: train or val.
    """
    variables, account = load(weights)
    print(account.summary())
    ious = foreground_iou(variables, datasets.load("nuclei", data_dir).split(split))
    print(f"IoU of the foreground, mean over {len(ious)} grey images: {ious.mean():.4f}")


if __name__ == "__main__":
    with cli.exit_on_user_error():
        tyro.cli(main, prog="python -m examples.nuclei_unet")
