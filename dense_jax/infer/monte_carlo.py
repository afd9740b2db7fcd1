"""Prediction by a stochastic network: the mean of many passes and their variance.

Reference: Gal, Ghahramani, "Dropout as a Bayesian approximation", ICML 2016, arXiv:1506.02142;
Kendall, Badrinarayanan, Cipolla, "Bayesian SegNet", BMVC 2017, arXiv:1511.02680, Section 4.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from dense_jax.infer.whole_image import whole_image


@dataclasses.dataclass(frozen=True)
class MonteCarlo:
    """The mean class probabilities of many passes; called as any other prediction.

    Every image gets the same random draws, those of a batch of one, so its result does not depend
    on its batch or on the number of devices.

    Attributes:
      one_pass: (variables, images [B, H, W, C], sizes [B, 2], key) -> logits [B, H, W, classes].
      num_samples: number of passes.
      seed: of the random keys.
    """

    one_pass: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
    num_samples: int
    seed: int = 0

    @property
    def words(self) -> str:
        """What it does, for the protocol card."""
        return f"mean probabilities of {self.num_samples} passes with dropout; no flips, no scales"

    def __call__(self, variables: Any, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        """Returns "logits", the logarithm of the mean probabilities, and "variance" [B, H, W]."""
        mean, variance = self.mean_and_variance(variables, images, sizes)
        return {"logits": _log(mean), "variance": variance}

    def mean_and_variance(
        self, variables: Any, images: jax.Array, sizes: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns mean probabilities [B, H, W, classes] and their uncertainty [B, H, W], float32.

        The uncertainty is the variance of each class's probability over the passes, averaged over
        the classes, from 0 to 1 / 4.
        """

        def probabilities(key: jax.Array) -> jax.Array:
            def of_one(image: jax.Array, size: jax.Array) -> jax.Array:
                return self.one_pass(variables, image[None], size[None], key)[0]

            return jax.nn.softmax(jax.vmap(of_one)(images, sizes).astype(jnp.float32))

        keys = jax.random.split(jax.random.key(self.seed), self.num_samples)

        def add(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            # Welford's update: no difference of large sums, never negative.
            mean, squares = carry
            count, step = i.astype(jnp.float32), probabilities(keys[i]) - mean
            return mean + step / (count + 1), squares + step**2 * (count / (count + 1))

        zero = jnp.zeros(jax.eval_shape(probabilities, keys[0]).shape, jnp.float32)
        mean, squares = lax.fori_loop(0, self.num_samples, add, (zero, zero))
        return mean, jnp.mean(squares, axis=-1) / self.num_samples


def monte_carlo(model: nn.Module, scale: float, num_samples: int, seed: int) -> MonteCarlo:
    """The mean of many passes of a network that drops when predicting too (``sample_dropout``)."""
    drawing = model.clone(sample_dropout=True, axis_name=None)

    def one_pass(variables: Any, images: jax.Array, sizes: jax.Array, key: jax.Array) -> jax.Array:
        return whole_image(drawing, scale, {"dropout": key})(variables, images, sizes)["logits"]

    return MonteCarlo(one_pass, num_samples, seed)


def _log(probabilities: jax.Array) -> jax.Array:
    """Returns the logarithm, finite even where a probability is zero, so that losses are finite."""
    return jnp.log(jnp.maximum(probabilities, jnp.finfo(jnp.float32).tiny))
