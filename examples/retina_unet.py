"""A U-Net for the vessels of the retina, trained with Keras 1 on Theano: kernels are flipped.

    python -m examples.retina_unet --weights=test_best_weights.h5 --reference=reference_io.npz

What to learn: Theano computes true convolution, so its kernels must be flipped in height and width
("conv+flip" in the table). Nothing in the file says so, and on pictures of eyes the output without
the flip looks almost right: compare with a known output.

The network is from orobix/retina-unet (MIT licence, D. Cortinovis, Orobix Srl), trained on 48x48
patches of DRIVE, whose terms forbid copies of its images. Patches are grey, with equalised contrast
(CLAHE), gamma 1.2 and values in 0..1.
"""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from dense_jax.errors import UserError
from dense_jax.layers.conv import Conv
from dense_jax.ops.pool import max_pool
from dense_jax.ops.resize import resize_nearest
from dense_jax.train import cli
from dense_jax.weights import files, rules
from dense_jax.weights.account import Account
from dense_jax.weights.rules import Rule


class RetinaUNet(nn.Module):
    """Maps grey images [B, H, W, 1] in 0..1 to "logits" [B, H, W, 2]; class 1 is vessels.

    H and W are multiples of 4. The dropout of the published training is left out.
    """

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        """Returns "logits", which are at least 0: a ReLU precedes the softmax."""
        del train

        def convs(x: jax.Array, first: int, width: int) -> jax.Array:
            for i in (first, first + 1):
                x = nn.relu(Conv(width, 3, name=f"convolution2d_{i}")(x))
            return x

        fine = convs(images, 1, 32)
        coarse = convs(max_pool(fine, 2), 3, 64)
        x = convs(max_pool(coarse, 2), 5, 128)
        for skip, first, width in ((coarse, 7, 64), (fine, 9, 32)):
            x = resize_nearest(x, (skip.shape[1], skip.shape[2]))
            x = convs(jnp.concatenate([x, skip], axis=-1), first, width)
        return {"logits": nn.relu(Conv(2, 1, name="convolution2d_11")(x))}


RULES = (
    Rule("convolution2d_{n}.W", "params/convolution2d_{n}/kernel", "conv+flip"),
    Rule("convolution2d_{n}.b", "params/convolution2d_{n}/bias"),
)


def load(path: pathlib.Path) -> tuple[dict[str, Any], Account]:
    """Returns the variables, and an account of all tensors of the file.

    Raises:
      UserError: the file belongs to another network.
    """
    template = rules.template_of(RetinaUNet(), num_channels=1)
    return rules.load(template, files.read(path).tensors, RULES, path=str(path))


@jax.jit
def apply(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Returns the outputs for images [B, H, W, 1]."""
    outputs: Any = RetinaUNet().apply(variables, images, train=False)
    return outputs


def unflipped(variables: Any) -> Any:
    """Returns the variables of a reader that does not flip the kernels."""
    return jax.tree.map(lambda x: np.flip(x, (0, 1)) if x.ndim == 4 else x, variables)


def main(weights: pathlib.Path, reference: pathlib.Path) -> None:
    """Compares the network with a known output, with flipped kernels and without.

    Args:
      weights: test_best_weights.h5.
      reference: .npz with input_nchw [N, 1, H, W] and softmax_nchw [N, 2, H, W].
    """
    variables, account = load(weights)
    print(account.summary())
    known = files.read(reference).tensors
    if not {"input_nchw", "softmax_nchw"} <= set(known):
        raise UserError(f"{reference} has no input_nchw and softmax_nchw: give the known output")
    images = known["input_nchw"].transpose(0, 2, 3, 1)
    expected = known["softmax_nchw"][:, 1]
    for name, tree in (("flipped", variables), ("not flipped", unflipped(variables))):
        vessel = np.asarray(jax.nn.softmax(apply(tree, images)["logits"])[..., 1])
        correlation = np.corrcoef(vessel.ravel(), expected.ravel())[0, 1]
        largest = np.abs(vessel - expected).max()
        print(f"kernels {name}: largest difference {largest:.2g}, correlation {correlation:.4f}")


if __name__ == "__main__":
    with cli.exit_on_user_error():
        tyro.cli(main, prog="python -m examples.retina_unet")
