"""Paired transforms: image, labels and object masks move together.

A transform is called with an example and a NumPy random generator and returns a new example; the
generator belongs to one position of the training order, so (seed, position) fixes the result. A
pipeline is a Python list, in this order: scale and colour (on uint8), `Normalise`, deformation,
crop, flip and rotation. Geometry comes after `Normalise` where it pads, because zero is then the
mean colour. Labels and object masks are only ever resampled by the nearest neighbour.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import scipy.ndimage
from PIL import Image

from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.dataset import Example

Transform = Callable[[Example, np.random.Generator], Example]

Mirror = Literal["reflect", "symmetric"]

_FILL = {"image": 0.0, "label": IGNORE_LABEL, "instances": 0, "weights": 0.0}
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601

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
    "fast_rcnn": ((122.7717, 115.946, 102.9801), (1.0, 1.0, 1.0)),
    "grey": ((127.5,), (64.0,)),  # about unit deviation for pictures of middling contrast
    "grey_image": ((127.5,), (64.0,)),  # only for pictures: each image has its own mean and scale
}
"""Mean and scale by convention. Images stay RGB here: weights trained on BGR are permuted once
when they are imported, which leaves the outputs as they were. The two grey conventions take the
luma of a picture as its only channel; "grey_image" brings every single image to mean 0 and
deviation 1, for microscopes whose brightness says nothing."""


@dataclasses.dataclass(frozen=True)
class Normalise:
    """Turns the uint8 image into float32 (image - mean) / std by a name of `NORMALISATIONS`.

    The result is [H, W, `num_channels` (name)].
    """

    name: str = "torchvision"

    def __post_init__(self):
        _convention(self.name)

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """Returns the example with a float32 image."""
        image, (mean, std) = example["image"], _convention(self.name)
        if len(mean) == 1:
            image = (image @ _LUMA)[..., None]
        if self.name == "grey_image":
            mean, std = image.mean(), max(image.std(), np.float32(1))  # plain grey has no scale
        return {**example, "image": (image - mean) / std}


def num_channels(name: str) -> int:
    """Returns the number of channels of images normalised by a name of `NORMALISATIONS`."""
    return len(_convention(name)[0])


def to_uint8(images: np.ndarray, name: str) -> np.ndarray:
    """Inverts `Normalise`: float [..., C] to uint8 [..., 3], for pictures.

    What "grey_image" had for mean and scale is lost; such pictures come out in middling contrast.
    """
    mean, std = _convention(name)
    images = np.clip(np.asarray(images, np.float32) * std + mean + 0.5, 0, 255).astype(np.uint8)
    return np.broadcast_to(images, (*images.shape[:-1], 3)) if len(mean) == 1 else images


def _convention(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name not in NORMALISATIONS:
        raise ValueError(f"unknown normalisation {name!r}; known: {', '.join(NORMALISATIONS)}")
    mean, std = NORMALISATIONS[name]
    return np.array(mean, np.float32), np.array(std, np.float32)


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Mirrors left and right with the given probability."""

    probability: float = 0.5

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example, mirrored or as it was."""
        if rng.random() >= self.probability:
            return example
        return {**example, **{key: example[key][:, ::-1] for key in _maps(example)}}


@dataclasses.dataclass(frozen=True)
class RandomRotate90:
    """Turns by 0, 90, 180 or 270 degrees; what is not square only by 0 or 180."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the turned example."""
        height, width = example["label"].shape
        turns = int(rng.integers(4)) if height == width else 2 * int(rng.integers(2))
        return {**example, **{key: np.rot90(example[key], turns) for key in _maps(example)}}


@dataclasses.dataclass(frozen=True)
class Resize:
    """Resizes to (height, width): antialiased bilinear for the uint8 image, nearest for the rest.

    For training at another resolution. Scores are taken against labels of the native size.
    """

    size: tuple[int, int]

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """Returns the resized example."""
        return _resize(example, self.size)


@dataclasses.dataclass(frozen=True)
class RandomScale:
    """Resizes a uint8 image and its labels by a factor drawn uniformly from [low, high]."""

    low: float
    high: float

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the rescaled example."""
        factor = rng.uniform(self.low, self.high)
        height, width = example["label"].shape
        return _resize(example, (max(1, round(height * factor)), max(1, round(width * factor))))


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Cuts a window (height, width) at random; where the image is smaller, it lies inside.

    Needs a normalised image: padding is zero, the mean colour, and padded labels are ignored. With
    ``context`` the image, not the label, keeps that many more pixels on each side, mirrored where
    there are none: what a network without padding eats up (U-Net, Ronneberger et al., MICCAI 2015,
    arXiv:1505.04597, Figure 2).

    Attributes:
      size: height and width of the labels; one number for squares.
      context: extra pixels of the image on each side.
      mirror: "reflect" does not repeat the pixel at the edge, "symmetric" does.
    """

    size: int | tuple[int, int]
    context: int = 0
    mirror: Mirror = "reflect"

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the window, of float32 image and labels."""
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        spare = [have - want for have, want in zip(example["label"].shape, size, strict=True)]
        top, left = (int(rng.integers(min(0, s), max(0, s) + 1)) for s in spare)
        cropped = window(example, top, left, size)
        if self.context == 0:
            return cropped
        rows, columns = (
            mirrored(
                np.arange(first - self.context, first + side + self.context), have, self.mirror
            )
            for first, side, have in zip((top, left), size, example["label"].shape, strict=True)
        )
        return {**cropped, "image": example["image"][rows][:, columns]}


def crop_with_context(size: tuple[int, int], context: int) -> RandomCrop:
    """Returns a crop whose images, mirrored context on all sides included, are of one size."""
    return RandomCrop((size[0] - 2 * context, size[1] - 2 * context), context)


def mirrored(index: np.ndarray, size: int, mirror: Mirror) -> np.ndarray:
    """Returns the pixel in [0, size) that a mirror at both ends shows at each integer index."""
    if mirror == "symmetric":
        index = index % (2 * size)
        return np.minimum(index, 2 * size - 1 - index)
    period = max(2 * (size - 1), 1)
    index = index % period
    return np.minimum(index, period - index)


@dataclasses.dataclass(frozen=True)
class RandomTranslate:
    """Shifts by up to ``pixels`` each way and keeps the size; needs a normalised image.

    With `RandomFlip`, the augmentation that Long, Shelhamer and Darrell (CVPR 2015, section 4.3)
    tried with 32 pixels.
    """

    pixels: int = 32

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the shifted example."""
        top, left = rng.integers(-self.pixels, self.pixels + 1, size=2)
        return window(example, int(top), int(left), example["label"].shape)


@dataclasses.dataclass(frozen=True)
class ColourJitter:
    """Changes brightness, contrast and saturation of the uint8 image by factors 1 +- value."""

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with other colours."""
        spread = np.array([self.brightness, self.contrast, self.saturation], np.float32)
        brightness, contrast, saturation = 1 + spread * rng.uniform(-1, 1, 3).astype(np.float32)
        image = example["image"] * brightness
        grey = image @ _LUMA
        image = grey[..., None] + saturation * (image - grey[..., None])
        mean = grey.mean()
        image = mean + contrast * (image - mean)
        return {**example, "image": np.clip(image + 0.5, 0, 255).astype(np.uint8)}


@dataclasses.dataclass(frozen=True)
class GreyJitter:
    """Changes the contrast and brightness of a normalised image, in its standard deviations.

    After `Normalise`, because "grey_image" would undo what came before it.

    Attributes:
      contrast: values are multiplied by a factor from 1 +- contrast.
      brightness: and shifted by a number from +- brightness.
    """

    contrast: float = 0.25
    brightness: float = 0.25

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with other grey values."""
        factor, shift = rng.uniform(-1, 1, 2).astype(np.float32)
        scale, offset = np.float32(self.contrast), np.float32(self.brightness)
        return {**example, "image": example["image"] * (1 + scale * factor) + offset * shift}


@dataclasses.dataclass(frozen=True)
class ElasticDeformation:
    """Bends the picture by a smooth random field; needs a normalised image.

    Displacements are drawn on a coarse grid, whose outer nodes lie on the corners of the picture,
    and interpolated bicubically to every pixel (Ronneberger et al., MICCAI 2015,
    arXiv:1505.04597, Section 3.1). Beyond its edges the picture is mirrored.

    Attributes:
      grid: nodes along each side.
      std: standard deviation of each displacement's two components, in pixels.
      order: the image is sampled linearly (1) or by cubic splines (3), labels and object masks by
        the nearest pixel, weights linearly.
    """

    grid: int = 3
    std: float = 10.0
    order: Literal[1, 3] = 1

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the bent example, of the same size.

        Raises:
          ValueError: the image is not normalised, or larger than its label: bend before cropping.
        """
        height, width = example["label"].shape
        image = example["image"]
        if image.dtype == np.uint8 or image.shape[:2] != (height, width):
            raise ValueError("elastic deformation needs a float image of its label's size")
        nodes = rng.normal(0, self.std, (2, self.grid, self.grid))
        places = np.indices((height, width)) + displacement_field(nodes, (height, width))
        rows, columns = (
            mirrored(np.rint(at).astype(np.int64), side, "reflect")
            for at, side in zip(places, (height, width), strict=True)
        )
        bent = {
            key: example[key][rows, columns] for key in ("label", "instances") if key in example
        }
        channels = [_sample(channel, places, self.order) for channel in np.moveaxis(image, -1, 0)]
        if "weights" in example:
            bent["weights"] = _sample(example["weights"], places, 1)
        return {**example, **bent, "image": np.stack(channels, axis=-1)}


def displacement_field(nodes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Interpolates displacements bicubically from a grid to each pixel.

    Args:
      nodes: [2, n, m] displacements of rows and columns; the grid spans the picture.
      size: height and width.

    Returns:
      [2, *size]. Beyond the grid its outermost nodes are repeated.

    Reference: Keys, "Cubic convolution interpolation for digital image processing", IEEE ASSP
    1981, with a = -1/2.
    """
    rows, columns = (_cubic_weights(n, side) for n, side in zip(nodes.shape[1:], size, strict=True))
    return rows @ nodes @ columns.T


def _cubic_weights(nodes: int, size: int) -> np.ndarray:
    """Returns [size, nodes]: how much of each node reaches each pixel."""
    at = np.linspace(0, nodes - 1, size)
    first = np.floor(at).astype(np.int64)
    weights = np.zeros((size, nodes))
    for tap in range(-1, 3):
        t = np.abs(at - (first + tap))
        near, far = (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2
        value = np.where(t <= 1, near, np.where(t < 2, far, 0))
        np.add.at(weights, (np.arange(size), np.clip(first + tap, 0, nodes - 1)), value)
    return weights


def _sample(values: np.ndarray, places: np.ndarray, order: int) -> np.ndarray:
    """Samples [H, W] at real places [2, H, W]."""
    return scipy.ndimage.map_coordinates(values, places, order=order, mode="mirror")


@dataclasses.dataclass(frozen=True)
class RandomPixelKeep:
    """Ignores each pixel with probability 1 - keep, which samples the loss.

    Long, Shelhamer and Darrell (CVPR 2015, section 4.3, Figure 5) found no gain per image.
    """

    keep: float

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with labels thinned out."""
        kept = rng.random(example["label"].shape, np.float32) < self.keep
        return {**example, "label": np.where(kept, example["label"], np.uint8(IGNORE_LABEL))}


def chosen(*steps: Transform | bool) -> list[Transform]:
    """Returns the transforms among the steps; False stands for one that a flag leaves out."""
    return [step for step in steps if not isinstance(step, bool)]


def whole_images(
    normalisation: str,
    scale: float,
    augment: str,
    crop: int | tuple[int, int] | None,
    zoom: tuple[float, float] = (0.75, 1.5),
) -> list[Transform]:
    """Returns the usual transforms of training on whole images or crops of them.

    Args:
      normalisation: a name of `NORMALISATIONS`.
      scale: images are resized by this.
      augment: "none"; anything else flips left and right, and "mirror_scale" also resizes.
      crop: height and width; None takes whole images.
      zoom: least and greatest factor of that.
    """
    low, high = zoom if augment == "mirror_scale" else (1.0, 1.0)
    transforms: list[Transform] = []
    if (low * scale, high * scale) != (1.0, 1.0):
        transforms.append(RandomScale(low * scale, high * scale))
    transforms.append(Normalise(normalisation))
    if crop:
        transforms.append(RandomCrop(crop))
    if augment != "none":
        transforms.append(RandomFlip())
    return transforms


def window(example: Example, top: int, left: int, size: tuple[int, int]) -> Example:
    """Returns the window of ``size`` whose corner is at (top, left), which may lie outside.

    Raises:
      ValueError: the image is not normalised yet, so that zero is black and not the mean colour.
    """
    if example["image"].dtype == np.uint8:
        raise ValueError("crops and shifts pad with zero, the mean colour: put Normalise first")
    return {
        **example,
        **{key: _cut(example[key], top, left, size, _FILL[key]) for key in _maps(example)},
    }


def _cut(array: np.ndarray, top: int, left: int, size: tuple[int, int], fill: float) -> np.ndarray:
    rows, columns = size
    inner = array[max(top, 0) : max(top + rows, 0), max(left, 0) : max(left + columns, 0)]
    if inner.shape[:2] == size:
        return inner
    result = np.full(size + array.shape[2:], fill, array.dtype)
    y, x = max(-top, 0), max(-left, 0)
    result[y : y + inner.shape[0], x : x + inner.shape[1]] = inner
    return result


def _maps(example: Example) -> list[str]:
    """The keys that hold one value or one colour for each pixel."""
    return [key for key in _FILL if key in example]


def _resize(example: Example, size: tuple[int, int]) -> Example:
    if example["image"].dtype != np.uint8:
        raise ValueError("images are resized as uint8: put Normalise after Resize or RandomScale")
    if example["label"].shape == size:
        return example
    resized = {}
    for key in _maps(example):
        method = Image.Resampling.BILINEAR if key == "image" else Image.Resampling.NEAREST
        resized[key] = np.asarray(Image.fromarray(example[key]).resize(size[::-1], method))
    return {**example, **resized}
