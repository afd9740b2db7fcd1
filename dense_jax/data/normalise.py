"""Normalisation of images, both ways, for NumPy arrays and for traced JAX arrays.

| | NumPy | JAX |
|---|---|---|
| pixels to network inputs | `normalise`, the transform `Normalise` | `normalise_batch` |
| network inputs to pixels | `to_uint8` | `PixelValues` |
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.data.dataset import Example

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # name: (mean, standard deviation) of R, G, B, or of the one grey channel, on the scale 0..255.
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # SegNet subtracts nothing
    "torchvision": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "torchvision_vgg16_features": ((123.0, 117.0, 104.0), (1.0, 1.0, 1.0)),
    "caffe": ((122.679, 116.669, 104.007), (1.0, 1.0, 1.0)),  # FCN, DeconvNet, DeepLab
    "dilation_voc": ((116.52, 111.36, 102.93), (1.0, 1.0, 1.0)),  # fyu/dilation's four models
    "dilation_camvid": ((105.412, 108.778, 110.703), (1.0, 1.0, 1.0)),
    "dilation_kitti": ((91.347, 95.551, 96.194), (1.0, 1.0, 1.0)),
    "dilation_cityscapes": ((73.16, 82.91, 72.39), (1.0, 1.0, 1.0)),
    "fast_rcnn": ((122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0)),  # and Detectron
    "detectron2": ((123.675, 116.28, 103.53), (1.0, 1.0, 1.0)),
    "efficientnet_lite": ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
    "grey": ((127.5,), (64.0,)),  # about unit standard deviation for images of medium contrast
    "grey_image": ((127.5,), (64.0,)),  # only for `to_uint8`: each image has its own mean and scale
}
"""Mean and standard deviation by name. Images stay RGB: weights trained on BGR are permuted once
when they are imported, which does not change the outputs. The two grey conventions take the luma of
an image as its only channel. "grey_image" gives each image mean 0 and standard deviation 1, for
microscopes whose brightness carries no information."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


@dataclasses.dataclass(frozen=True)
class Normalise:
    """The transform that normalises the image of an example; see `normalise`.

    Attributes:
      name: a name in `NORMALISATIONS`.
    """

    name: str = "torchvision"

    def __post_init__(self):
        _statistics(self.name)

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """Returns the example with a float32 image [H, W, `num_channels` (name)]."""
        return {**example, "image": normalise(example["image"], self.name)}


def num_channels(name: str) -> int:
    """Returns the number of channels of images normalised by a name in `NORMALISATIONS`."""
    return len(_statistics(name)[0])


def luma(image: np.ndarray) -> np.ndarray:
    """Returns the brightness [..., H, W] of an RGB image [..., H, W, 3], float32."""
    return image @ _LUMA


def normalise(image: np.ndarray, name: str) -> np.ndarray:
    """Returns (image - mean) / standard deviation.

    Args:
      image: uint8 RGB [H, W, 3].
      name: a name in `NORMALISATIONS`.

    Returns:
      float32 [H, W, `num_channels` (name)].

    Raises:
      ValueError: the name is unknown.
    """
    mean, std = _statistics(name)
    if len(mean) == 1:
        image = luma(image)[..., None]
    if name == "grey_image":
        mean, std = image.mean(), max(image.std(), np.float32(1))  # a constant image has no scale
    return (image - mean) / std


def normalise_batch(images: jax.Array, name: str) -> jax.Array:
    """Does to a batch, traced, what `normalise` does to an image.

    The results differ in the last bits, because JAX sums and divides in another order.

    Args:
      images: RGB [B, H, W, 3], integers or floats from 0 to 255.
      name: a name in `NORMALISATIONS`.

    Returns:
      float32 [B, H, W, `num_channels` (name)].
    """
    images = images.astype(jnp.float32)
    mean, std = (values.reshape(1, 1, 1, -1) for values in _statistics(name))
    if mean.size == 1:
        images = jnp.sum(images * _LUMA.reshape(1, 1, 1, 3), axis=-1, keepdims=True)
    if name == "grey_image":
        mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
        std = jnp.maximum(jnp.std(images, axis=(1, 2, 3), keepdims=True), 1)
    return (images - mean) / std


def to_uint8(images: np.ndarray, name: str) -> np.ndarray:
    """Inverts `normalise` for display: float [..., C] to uint8 [..., 3].

    The mean and scale that "grey_image" took from an image are lost: such images come out with
    medium contrast.
    """
    mean, std = _statistics(name)
    images = np.clip(np.asarray(images, np.float32) * std + mean + 0.5, 0, 255).astype(np.uint8)
    return np.broadcast_to(images, (*images.shape[:-1], 3)) if len(mean) == 1 else images


@dataclasses.dataclass(frozen=True)
class PixelValues:
    """Inverts `normalise` for a CRF: float [B, H, W, C] to RGB [B, H, W, 3], 0 to 255.

    Integer pixels come back as the same integers, so a CRF does the same behind every
    normalisation. Padding becomes the mean colour. A class and not a function, so that networks
    that hold one compare equal.

    Attributes:
      name: a name in `NORMALISATIONS`.

    Raises:
      ValueError: the name is unknown, or "grey_image", whose pixel values are lost.
    """

    name: str

    def __post_init__(self):
        _statistics(self.name)
        if self.name == "grey_image":
            raise ValueError("the pixel values behind normalisation 'grey_image' are lost")

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the pixel values, float32."""
        mean, std = (values.reshape(1, 1, 1, -1) for values in _statistics(self.name))
        rgb = jnp.clip(jnp.round(images.astype(jnp.float32) * std + mean), 0, 255)
        return jnp.broadcast_to(rgb, (*rgb.shape[:3], 3))


def _statistics(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation, float32 [C] each."""
    if name not in NORMALISATIONS:
        raise ValueError(f"unknown normalisation {name!r}; known: {', '.join(NORMALISATIONS)}")
    mean, std = NORMALISATIONS[name]
    return np.array(mean, np.float32), np.array(std, np.float32)
