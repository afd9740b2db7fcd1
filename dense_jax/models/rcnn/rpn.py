"""The head of the region proposal network.

Reference: Ren, He, Girshick, Sun, "Faster R-CNN", NIPS 2015, arXiv:1506.01497v3, Section 3.1;
shared by the levels of a pyramid: Lin et al., CVPR 2017, arXiv:1612.03144, Section 4.1.
"""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax

from dense_jax.layers import init
from dense_jax.layers.conv import Conv
from dense_jax.ops.precision import at_least_float32

Objectness = Literal["sigmoid", "softmax"]


class ProposalHead(nn.Module):
    """Scores the anchors of each location, and predicts boxes from them; shared by all levels.

    Attributes:
      num_anchors: A, anchors at each location.
      features: channels of the 3x3 convolutions.
      num_convs: number of 3x3 convolutions, each behind a ReLU.
      objectness: "sigmoid": one logit of each anchor. "softmax": two scores, all backgrounds before
        all objects, whose difference is the logit (the paper's footnote 3, py-faster-rcnn).
      dtype: computation dtype of convolutions.
    """

    num_anchors: int
    features: int = 256
    num_convs: int = 1
    objectness: Objectness = "sigmoid"
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(
        self, levels: Sequence[jax.Array]
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """Maps levels [B, H, W, C] to logits [B, H W A] and deltas [B, H W A, 4] of each level.

        Both are float32. Locations are in row-major order, and the anchors of one are neighbours.
        """

        def conv(features: int, kernel_size: int, name: str) -> Conv:
            kernel_init = init.normal(0.01)
            return Conv(features, kernel_size, kernel_init=kernel_init, dtype=self.dtype, name=name)

        scores_per_anchor = {"sigmoid": 1, "softmax": 2}[self.objectness]
        convs = [conv(self.features, 3, f"conv{i}") for i in range(1, self.num_convs + 1)]
        classify = conv(scores_per_anchor * self.num_anchors, 1, "cls_logits")
        regress = conv(4 * self.num_anchors, 1, "bbox_pred")
        logits, deltas = [], []
        for x in levels:
            for hidden in convs:
                x = nn.relu(hidden(x))
            scores = at_least_float32(classify(x))
            if self.objectness == "softmax":
                scores = scores[..., self.num_anchors :] - scores[..., : self.num_anchors]
            logits.append(scores.reshape(len(x), -1))
            deltas.append(at_least_float32(regress(x)).reshape(len(x), -1, 4))
        return tuple(logits), tuple(deltas)
