"""Mean field in a fully connected CRF as a layer whose weights are learned with the network's.

Reference: Zheng et al., "Conditional random fields as recurrent neural networks", ICCV 2015,
arXiv:1502.03240, Sections 4 and 5.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.ops import crf
from dense_jax.ops.crf import CrfParams


class CrfRnn(nn.Module):
    """Refines logits by mean field; [B, H, W, C] to log-probabilities [B, H, W, C].

    In each step the messages of either kernel are weighted class by class, added up and mixed by
    the compatibility of classes (Section 4.2), all of which is learned; deviations are not. The
    start is the CRF of `params`, with a compatibility of one for equal and zero for other labels:
    the paper's, one for unequal labels and subtracted, is the same up to a constant.

    Attributes:
      params: where learning starts, and the rest of the CRF.
      train_iterations: steps of mean field in training, `params.iterations` being those of
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
          ValueError: the shapes do not belong together.
        """
        params, num_classes = self.params, logits.shape[-1]

        def weights(name: str, start: float) -> jax.Array:
            return self.param(name, nn.initializers.constant(start), (num_classes,))

        bilateral = weights("bilateral_weights", params.w1)
        spatial = weights("spatial_weights", params.w2)
        compatibility = self.param(
            "compatibility", lambda _: jnp.eye(num_classes, dtype=jnp.float32)
        )
        # Row = label that sends, column = label that receives.
        learned: dict[str, Any] = {
            "w1": bilateral[:, None] * compatibility,
            "w2": spatial[:, None] * compatibility,
            "iterations": self.train_iterations if train else params.iterations,
        }
        return crf.mean_field(logits, images, dataclasses.replace(params, **learned), sizes)


class WithCrfRnn(nn.Module):
    """A network whose "logits" a `CrfRnn` refines; its own are kept as "unary".

    Parameters of the network keep their names, so that it can be trained alone before.

    Attributes:
      network: outputs "logits", of the size of the images or smaller, cut out of their middle.
      mean: of the images' normalisation, three numbers, RGB from 0 to 255.
      std: their deviations, likewise.
      params, train_iterations: see `CrfRnn`.
    """

    network: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
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
        """Returns what the CRF makes of logits that the network gave in another way, as in tiles.

        Args:
          variables: of the whole.
          logits: [B, H, W, C].
          images: normalised RGB [B, H, W, 3].
          sizes: int [B, 2], heights and widths in front of padding.
        """
        own, colours = {"params": variables["params"]["crf_rnn"]}, self._colours(images)
        refined: Any = self._crf_rnn().apply(own, logits, colours, sizes, train=False)
        return refined

    def _crf_rnn(self) -> CrfRnn:
        return CrfRnn(self.params, self.train_iterations, name="crf_rnn", parent=None)

    def _colours(self, images: jax.Array) -> jax.Array:
        """Undoes the normalisation; integers come out as the integers that they were."""
        mean, std = (np.array(x, np.float32).reshape(1, 1, 1, 3) for x in (self.mean, self.std))
        return jnp.clip(jnp.round(images.astype(jnp.float32) * std + mean), 0, 255)

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, sizes: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns the network's outputs and "unary".

        Args:
          images: normalised RGB [B, H, W, 3].
          train: whether to train.
          sizes: [B, 2] heights and widths in front of padding, where the logits are of the size of
            the images.
        """
        network: Any = self.network.clone(parent=self, name=None)
        nn.share_scope(self, network)
        outputs = network(images, train=train)
        unary = outputs["logits"]
        height, width = unary.shape[1:3]
        top, left = ((a - b) // 2 for a, b in zip(images.shape[1:3], (height, width), strict=True))
        seen = self._colours(images)[:, top : top + height, left : left + width]
        if sizes is not None:
            sizes = jnp.round(sizes).astype(jnp.int32)
        refined = self._crf_rnn().clone(parent=self)(unary, seen, sizes, train=train)
        return outputs | {"unary": unary, "logits": refined}
