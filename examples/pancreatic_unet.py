"""A U-Net for stem cells in phase contrast, from a Keras 2 model with transposed convolutions.

    python -m examples.pancreatic_unet --weights=unet_pancreatic_cell_segmentation.h5 \
        --image=exampleImage.npy --expected=resultImage.npy

What to learn: Keras's Conv2DTranspose stores its kernels as [h, w, out, in]; Conv2D stores
[h, w, in, out], like this library. A network may combine this library's layers with plain JAX (ELU,
average pooling).

The model is example "unet2d_keras_tf" of bioimage-io/spec-bioimage-io (BSD 2-clause,
I. Arganda-Carreras, DeepImageJ: E. Gomez-de-Mariscal et al., 2019), trained on PhC-C2DL-PSC of the
Cell Tracking Challenge (V. Ulman et al., Nature Methods 14, 2017).
"""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dense_jax.errors import UserError
from dense_jax.layers.conv import Conv, UpConv
from dense_jax.metrics import semantic as metrics
from dense_jax.train import cli
from dense_jax.weights import files, rules
from dense_jax.weights.account import Account
from dense_jax.weights.rules import Rule

_GRID = 8  # Three poolings.


def mean_pool(x: jax.Array) -> jax.Array:
    """Returns the mean of each 2x2 window, [B, H, W, C] to [B, H / 2, W / 2, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


class PancreaticUNet(nn.Module):
    """Maps images [B, H, W, 1] in 0..1 to "logits" [B, H, W, 1] of cells.

    H and W are multiples of 8. The dropout of the published training is left out.
    """

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits", whose sigmoid is the probability of a cell."""
        del train

        def convs(x: jax.Array, first: int, width: int) -> jax.Array:
            for i in (first, first + 1):
                x = nn.elu(Conv(width, 3, name=f"conv2d_{i}")(x))
            return x

        x, skips = images, []
        for first, width in ((16, 16), (18, 32), (20, 64)):
            skips.append(convs(x, first, width))
            x = mean_pool(skips[-1])
        x = convs(x, 22, 128)
        for i, (first, width) in enumerate(((24, 64), (26, 32), (28, 16)), start=4):
            x = UpConv(width, 2, 2, name=f"conv2d_transpose_{i}")(x)
            x = convs(jnp.concatenate([x, skips.pop()], axis=-1), first, width)
        return {"logits": Conv(1, 1, name="conv2d_30")(x)}


# Keras numbered the layers when it built the model.
RULES = (
    Rule("conv2d_{n}.kernel", "params/conv2d_{n}/kernel"),
    Rule("conv2d_{n}.bias", "params/conv2d_{n}/bias"),
    Rule("conv2d_transpose_{n}.kernel", "params/conv2d_transpose_{n}/kernel", "up_conv_hwoi"),
    Rule("conv2d_transpose_{n}.bias", "params/conv2d_transpose_{n}/bias"),
)


def load(path: pathlib.Path) -> tuple[dict[str, Any], Account]:
    """Returns the variables, and an account of all tensors of the file.

    Raises:
      UserError: the file belongs to another network.
    """
    template = rules.template_of(PancreaticUNet(), num_channels=1)
    return rules.load(template, files.read(path).tensors, RULES, path=str(path))


def scaled(image: np.ndarray) -> np.ndarray:
    """Scales the lowest value to 0 and the highest to 1, as in training."""
    image = image.astype(np.float32)
    return (image - image.min()) / (image.max() - image.min())


@jax.jit
def apply(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Returns the outputs for images [B, H, W, 1]."""
    outputs: Any = PancreaticUNet().apply(variables, images, train=False)
    return outputs


def main(weights: pathlib.Path, image: pathlib.Path, expected: pathlib.Path) -> None:
    """Labels the cells of a picture and compares them with the expected labels.

    Args:
      weights: unet_pancreatic_cell_segmentation.h5.
      image: the picture, .npy [1, H, W, 1].
      expected: the expected labels, .npy [1, H, W, 1] of 0 and 1.
    """
    variables, account = load(weights)
    print(account.summary())
    picture, labels = _read(image), _read(expected)
    if picture.shape != labels.shape:
        raise UserError(
            f"{expected} is {labels.shape} and {image} is {picture.shape}: give the labels of "
            "this picture"
        )
    logits = apply(variables, scaled(picture))["logits"]
    predicted = (logits > 0).astype(np.uint8)  # a probability above 0.5
    confusion = np.asarray(metrics.confusion_counts(labels, predicted, num_classes=2))
    different = int(confusion.sum() - np.trace(confusion))
    scores = metrics.summarise(confusion, ("background", "cell"))
    print(f"{different} of {labels.size} pixels differ; mean IoU {scores['mean_iou']:.4f}")


def _read(path: pathlib.Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): give a .npy array") from error
    shape = getattr(array, "shape", ())
    if len(shape) != 4 or shape[0] != 1 or shape[3] != 1 or shape[1] % _GRID or shape[2] % _GRID:
        raise UserError(
            f"{path} is {shape}: give an array [1, H, W, 1], H and W multiples of {_GRID}"
        )
    return array


if __name__ == "__main__":
    with cli.exit_on_user_error():
        tyro.cli(main, prog="python -m examples.pancreatic_unet")
