"""Mean field in a fully connected CRF as a layer with weights that are trained with the network.

Reference: Zheng et al., "Conditional random fields as recurrent neural networks", ICCV 2015,
arXiv:1502.03240, Sections 4 and 5.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dense_jax.ops import crf
from dense_jax.ops.crf import CrfParams


class CrfRnn(nn.Module):
    """Refines logits by mean field; [B, H, W, C] to log-probabilities [B, H, W, C].

    Each step multiplies the messages of each kernel by a weight for each class, adds them, and
    multiplies them by the compatibility matrix of the classes (Section 4.2). The weights and the
    matrix are learned, but the standard deviations are not. Initially the layer equals the CRF of
    `params`, with a compatibility of one for equal and zero for unequal labels. The paper subtracts
    a compatibility of one for unequal labels, which is the same up to a constant.

    Attributes:
      params: initial weights, and the fixed options of the CRF.
      train_iterations: number of mean field steps in training; `params.iterations` is for
        evaluation (Section 6: 5 and 10).
    """

    params: CrfParams = CrfParams()
    train_iterations: int = 5

    @nn.compact
    def __call__(
        self,
        logits: jax.Array,
        images: jax.Array,
        sizes: jax.Array | None = None,
        *,
        train: bool,
    ) -> jax.Array:
        """Returns float32 log-probabilities; see `dense_jax.ops.crf.mean_field` for the arguments.

        Raises:
          ValueError: the shapes do not match.
        """
        params, num_classes = self.params, logits.shape[-1]

        def weights(name: str, start: float) -> jax.Array:
            return self.param(name, nn.initializers.constant(start), (num_classes,))

        bilateral = weights("bilateral_weights", params.w1)
        spatial = weights("spatial_weights", params.w2)
        compatibility = self.param(
            "compatibility", lambda _: jnp.eye(num_classes, dtype=jnp.float32)
        )
        # Row = label of the sender, column = label of the receiver.
        learned: dict[str, Any] = {
            "w1": bilateral[:, None] * compatibility,
            "w2": spatial[:, None] * compatibility,
            "iterations": self.train_iterations if train else params.iterations,
        }
        return crf.mean_field(logits, images, dataclasses.replace(params, **learned), sizes)


class WithCrfRnn(nn.Module):
    """A network whose "logits" are refined by a `CrfRnn`; "unary" are the logits before.

    The network's parameters keep their names, so that the network can be trained alone first.

    Attributes:
      network: a network with output "logits", of the size of the images or of their centre crop.
      pixel_values: undoes the normalisation of images, to RGB [B, H, W, 3] from 0 to 255.
      params, train_iterations: see `CrfRnn`.
    """

    network: nn.Module
    pixel_values: Callable[[jax.Array], jax.Array]
    params: CrfParams = CrfParams()
    train_iterations: int = 5

    def front_end(self) -> Any:
        """Returns the front end of a network that has one, to be used in tiles."""
        network: Any = self.network
        return network.front_end()

    def finish(
        self, variables: Any, scores: jax.Array, images: jax.Array, sizes: jax.Array
    ) -> jax.Array:
        """Returns refined logits for scores of the front end; see `refine` for the arguments."""
        network: Any = self.network
        logits = network.finish(variables, scores, images, sizes)
        return self.refine(variables, logits, images, sizes)

    def refine(
        self, variables: Any, logits: jax.Array, images: jax.Array, sizes: jax.Array
    ) -> jax.Array:
        """Returns refined logits, for logits that were computed in another way, such as in tiles.

        Args:
          variables: variables of this module.
          logits: [B, H, W, C].
          images: normalised [B, H, W, C].
          sizes: int [B, 2], heights and widths before padding.
        """
        own, colours = {"params": variables["params"]["crf_rnn"]}, self.pixel_values(images)
        refined: Any = self._crf_rnn().apply(own, logits, colours, sizes, train=False)
        return refined

    def _crf_rnn(self) -> CrfRnn:
        return CrfRnn(self.params, self.train_iterations, name="crf_rnn", parent=None)

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, sizes: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns the network's outputs and "unary".

        Args:
          images: normalised [B, H, W, C].
          train: whether to train.
          sizes: [B, 2], heights and widths before padding, if the logits have the size of the
            images.
        """
        network: Any = self.network.clone(parent=self, name=None)
        nn.share_scope(self, network)
        outputs = network(images, train=train)
        unary = outputs["logits"]
        height, width = unary.shape[1:3]
        top, left = ((a - b) // 2 for a, b in zip(images.shape[1:3], (height, width), strict=True))
        seen = self.pixel_values(images)[:, top : top + height, left : left + width]
        if sizes is not None:
            sizes = jnp.round(sizes).astype(jnp.int32)
        refined = self._crf_rnn().clone(parent=self)(unary, seen, sizes, train=train)
        return outputs | {"unary": unary, "logits": refined}
