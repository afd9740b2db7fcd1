"""Paired transforms: image, labels and objects move together.

A transform is called with an example and a NumPy random generator and returns a new example. The
generator belongs to one position of the training order, so (seed, position) fixes the result. A
pipeline is a Python list in this order: scale and colour (on uint8), `Normalise`, deformation,
crop, flip and rotation. Transforms that pad come after `Normalise`, because zero is then the mean
colour. Labels and object masks are only resampled by nearest neighbour.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import scipy.ndimage
from PIL import Image

from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.dataset import Example
from dense_jax.data.normalise import Normalise, luma
from dense_jax.data.objects import Objects
from dense_jax.ops.resize import resize_uint8

Transform = Callable[[Example, np.random.Generator], Example]

Mirror = Literal["reflect", "symmetric"]

_FILL = {"image": 0.0, "label": IGNORE_LABEL, "instances": 0, "weights": 0.0}


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Flips left and right with the given probability."""

    probability: float = 0.5

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example, flipped or unchanged."""
        if rng.random() >= self.probability:
            return example
        flipped = {key: example[key][:, ::-1] for key in _maps(example)}
        width = example["image"].shape[1]
        return {**example, **flipped, **_objects(example, lambda own: own.flip(width))}


@dataclasses.dataclass(frozen=True)
class RandomRotate90:
    """Rotates by 0, 90, 180 or 270 degrees; an example that is not square by 0 or 180 only."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the rotated example."""
        _refuse_objects(example, self)
        height, width = example["label"].shape
        turns = int(rng.integers(4)) if height == width else 2 * int(rng.integers(2))
        return {**example, **{key: np.rot90(example[key], turns) for key in _maps(example)}}


@dataclasses.dataclass(frozen=True)
class Resize:
    """Resizes to (height, width): antialiased bilinear for the uint8 image, else nearest.

    For training at another resolution. Evaluation uses the labels at their native size.
    """

    size: tuple[int, int]

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """Returns the resized example."""
        return resize_example(example, self.size)

    def size_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns the size of the result for an image of a size."""
        return self.size


@dataclasses.dataclass(frozen=True)
class ResizeBy:
    """Resizes to a size that depends on that of the image; as `Resize`.

    Attributes:
      size_of: (height, width) to (height, width).
      antialias: see `resize_image`.
    """

    size_of: Callable[[tuple[int, int]], tuple[int, int]]
    antialias: bool = True

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """Returns the resized example."""
        size = self.size_of(example["image"].shape[:2])
        return resize_example(example, size, antialias=self.antialias)


@dataclasses.dataclass(frozen=True)
class RandomScale:
    """Resizes a uint8 image and its labels by a factor drawn uniformly from [low, high]."""

    low: float
    high: float

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the rescaled example."""
        factor = rng.uniform(self.low, self.high)
        height, width = example["label"].shape
        return resize_example(
            example, (max(1, round(height * factor)), max(1, round(width * factor)))
        )


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Crops a random window (height, width); a smaller image is placed at random inside it.

    Needs a normalised image: padding is zero, the mean colour, and padded labels are ignored. With
    ``context`` the image, not the label, has that many more pixels on each side, reflected at the
    edges of the image. A network without padding consumes them (U-Net, Ronneberger et al., MICCAI
    2015, arXiv:1505.04597, Figure 2).

    Attributes:
      size: height and width of the label; one number for a square.
      context: extra pixels of the image on each side.
      mirror: "reflect" does not repeat the edge pixel, "symmetric" does.
    """

    size: int | tuple[int, int]
    context: int = 0
    mirror: Mirror = "reflect"

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the cropped example."""
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
    """Returns the index in [0, size) of each integer index, reflected at both ends."""
    if mirror == "symmetric":
        index = index % (2 * size)
        return np.minimum(index, 2 * size - 1 - index)
    period = max(2 * (size - 1), 1)
    index = index % period
    return np.minimum(index, period - index)


@dataclasses.dataclass(frozen=True)
class RandomTranslate:
    """Shifts by up to ``pixels`` in each direction and keeps the size; needs a normalised image.

    Long, Shelhamer and Darrell (CVPR 2015, section 4.3) tried 32 pixels, together with
    `RandomFlip`.
    """

    pixels: int = 32

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the shifted example."""
        top, left = rng.integers(-self.pixels, self.pixels + 1, size=2)
        return window(example, int(top), int(left), example["label"].shape)


@dataclasses.dataclass(frozen=True)
class ColourJitter:
    """Multiplies brightness, contrast and saturation of the uint8 image by 1 +- up to the value."""

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with changed colours."""
        spread = np.array([self.brightness, self.contrast, self.saturation], np.float32)
        brightness, contrast, saturation = 1 + spread * rng.uniform(-1, 1, 3).astype(np.float32)
        image = example["image"] * brightness
        grey = luma(image)
        image = grey[..., None] + saturation * (image - grey[..., None])
        mean = grey.mean()
        image = mean + contrast * (image - mean)
        return {**example, "image": np.clip(image + 0.5, 0, 255).astype(np.uint8)}


@dataclasses.dataclass(frozen=True)
class GreyJitter:
    """Changes the contrast and brightness of a normalised image.

    Comes after `Normalise`, because "grey_image" would undo an earlier change.

    Attributes:
      contrast: values are multiplied by 1 +- up to this.
      brightness: +- up to this is added, in standard deviations of the normalisation.
    """

    contrast: float = 0.25
    brightness: float = 0.25

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with changed grey values."""
        factor, shift = rng.uniform(-1, 1, 2).astype(np.float32)
        scale, offset = np.float32(self.contrast), np.float32(self.brightness)
        return {**example, "image": example["image"] * (1 + scale * factor) + offset * shift}


@dataclasses.dataclass(frozen=True)
class ElasticDeformation:
    """Deforms the image by a smooth random field; needs a normalised image.

    Displacements are drawn on a coarse grid whose outer nodes lie on the corners of the image.
    Bicubic interpolation gives the displacement of each pixel (Ronneberger et al., MICCAI 2015,
    arXiv:1505.04597, Section 3.1). The image is reflected at its edges.

    Attributes:
      grid: nodes along each side.
      std: standard deviation of both components of a displacement, in pixels.
      order: 1 samples the image linearly, 3 by cubic splines. Labels and object masks take the
        nearest pixel; weights are sampled linearly.
    """

    grid: int = 3
    std: float = 10.0
    order: Literal[1, 3] = 1

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the deformed example, of the same size.

        Raises:
          ValueError: the image is not normalised or larger than its label: deform before cropping.
        """
        _refuse_objects(example, self)
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
      nodes: [2, n, m] displacements of rows and columns; the grid spans the image.
      size: height and width.

    Returns:
      [2, *size]. Beyond the grid, its outermost nodes are repeated.

    Reference: Keys, "Cubic convolution interpolation for digital image processing", IEEE ASSP
    1981, with a = -1/2.
    """
    rows, columns = (_cubic_weights(n, side) for n, side in zip(nodes.shape[1:], size, strict=True))
    return rows @ nodes @ columns.T


def _cubic_weights(nodes: int, size: int) -> np.ndarray:
    """Returns the weight of each node at each pixel, [size, nodes]."""
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
    """Samples [H, W] at real coordinates [2, H, W]."""
    return scipy.ndimage.map_coordinates(values, places, order=order, mode="mirror")


@dataclasses.dataclass(frozen=True)
class RandomPixelKeep:
    """Ignores each pixel with probability 1 - keep, so that the loss is taken on a sample.

    Long, Shelhamer and Darrell (CVPR 2015, section 4.3, Figure 5) found no gain per image.
    """

    keep: float

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the example with fewer labelled pixels."""
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
    """Returns the usual training transforms for whole images or for crops.

    Args:
      normalisation: a name in `dense_jax.data.normalise.NORMALISATIONS`.
      scale: factor by which images are resized.
      augment: "none", or any other value to flip left and right; "mirror_scale" also resizes.
      crop: height and width; None takes whole images.
      zoom: smallest and largest factor of this.
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
    """Returns the window of ``size`` with its corner at (top, left); it may leave the image.

    Raises:
      ValueError: the image is not normalised, so zero would be black and not the mean colour.
    """
    if example["image"].dtype == np.uint8:
        raise ValueError("crops and shifts pad with zero, the mean colour: put Normalise first")
    cut = {key: _cut(example[key], top, left, size, _FILL[key]) for key in _maps(example)}
    return {**example, **cut, **_objects(example, lambda own: own.window(top, left, size))}


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
    """Returns the keys with one value or one colour for each pixel."""
    return [key for key in _FILL if key in example]


def _objects(example: Example, move: Callable[[Objects], Objects]) -> dict[str, Objects]:
    """Returns "objects" and "proposals", moved, unless they are arrays of slots by now."""
    found = {key: example.get(key) for key in ("objects", "proposals")}
    return {key: move(own) for key, own in found.items() if isinstance(own, Objects)}


def _refuse_objects(example: Example, transform: Transform) -> None:
    if "objects" in example:
        raise ValueError(f"{type(transform).__name__} moves no boxes: put it before ReadObjects")


def resize_image(image: np.ndarray, size: tuple[int, int], *, antialias: bool = True) -> np.ndarray:
    """Resizes a uint8 image [H, W, 3] to `size` (height, width) by linear interpolation.

    Args:
      image: the image.
      size: the size.
      antialias: see `dense_jax.ops.resize.resize_uint8`.

    Raises:
      ValueError: the image is normalised already.
    """
    if image.dtype != np.uint8:
        raise ValueError("images are resized as uint8: put Normalise after Resize or RandomScale")
    if image.shape[:2] == size:
        return image
    if not antialias:
        return resize_uint8(image[None], size, antialias=False)[0]
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


def resize_example(example: Example, size: tuple[int, int], *, antialias: bool = True) -> Example:
    """Resizes the image by `resize_image`, its maps to the nearest pixel, and its objects."""
    old = example["image"].shape[:2]
    resized = {"image": resize_image(example["image"], size, antialias=antialias)}
    resized |= _objects(example, lambda own: own.resize(old, size))
    if example["label"].shape == size:
        return example
    for key in set(_maps(example)) - {"image"}:
        nearest = Image.fromarray(example[key]).resize(size[::-1], Image.Resampling.NEAREST)
        resized[key] = np.asarray(nearest)
    return {**example, **resized}
