"""The convolutions of Zeiler and Fergus's network, the small trunk of Faster R-CNN.

References: Zeiler, Fergus, "Visualizing and understanding convolutional networks", ECCV 2014,
arXiv:1311.2901, Figure 3; as in Ren, He, Girshick, Sun, "Faster R-CNN", NIPS 2015,
arXiv:1506.01497, Section 3.3; rbgirshick/py-faster-rcnn: models/pascal_voc/ZF.
"""

from dense_jax.layers.norm import LocalResponseNormInChannel
from dense_jax.models.vgg import Layer, Stack

LAYERS = (
    Layer("conv1", 7, 2, 3, 96),
    Layer("norm1"),
    Layer("pool1", 3, 2, 1),
    Layer("conv2", 5, 2, 2, 256),
    Layer("norm2"),
    Layer("pool2", 3, 2, 1),
    Layer("conv3", 3, 1, 1, 384),
    Layer("conv4", 3, 1, 1, 384),
    Layer("conv5", 3, 1, 1, 256),
)  # fmt: skip


def zf(**options) -> Stack:
    """Returns the network up to conv5, of stride 16, with 3,726,464 parameters.

    Args:
      **options: width, frozen, axis_name, dtype of `Stack`.
    """
    return Stack(LAYERS, norm=LocalResponseNormInChannel, **options)
