"""Paired transforms: image, labels and object masks move together.

A transform is called with an example and a NumPy random generator and returns a new example; the
generator belongs to one position of the training order, so (seed, position) fixes the result. A
pipeline is a Python list, in this order: scale and colour (on uint8), `Normalise`, crop, flip.
Geometry comes after `Normalise` where it pads, because zero is then the mean colour.
Labels and object masks are only ever resampled by the nearest neighbour.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image

from dense_jax.data.classes import IGNORE_LABEL
from dense_jax.data.dataset import Example

Transform = Callable[[Example, np.random.Generator], Example]

_FILL = {"image": 0.0, "label": IGNORE_LABEL, "instances": 0}

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # name: (mean, standard deviation) of R, G, B on the scale 0..255.
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # SegNet subtracts nothing
    "torchvision": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "torchvision_vgg16_features": ((123.0, 117.0, 104.0), (1.0, 1.0, 1.0)),
    "caffe": ((122.679, 116.669, 104.007), (1.0, 1.0, 1.0)),  # FCN, DeconvNet, DeepLab
    "dilation_voc": ((116.52, 111.36, 102.93), (1.0, 1.0, 1.0)),  # fyu/dilation, VOC model
    "fast_rcnn": ((122.7717, 115.946, 102.9801), (1.0, 1.0, 1.0)),
}
"""Mean and scale by convention. Images stay RGB here: weights trained on BGR are permuted once
when they are imported, which leaves the outputs as they were."""


@dataclasses.dataclass(frozen=True)
class Normalise:
    """Turns the uint8 image into float32 (image - mean) / std by a name of `NORMALISATIONS`."""

    name: str = "torchvision"

    def __post_init__(self):
        _convention(self.name)

    def __call__(self, example: Example, rng: np.random.Generator | None = None) -> Example:
        """Returns the example with a float32 image."""
        mean, std = _convention(self.name)
        return {**example, "image": (example["image"] - mean) / std}


def num_channels(name: str) -> int:
    """Returns the number of channels of images normalised by a name of `NORMALISATIONS`."""
    return len(NORMALISATIONS[name][0])


def to_uint8(images: np.ndarray, name: str) -> np.ndarray:
    """Inverts `Normalise`: float [..., 3] to uint8 [..., 3], for pictures."""
    mean, std = _convention(name)
    return np.clip(np.asarray(images, np.float32) * std + mean + 0.5, 0, 255).astype(np.uint8)


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

    Needs a normalised image: padding is zero, the mean colour, and padded labels are ignored.
    """

    size: int | tuple[int, int]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns the window, of float32 image and labels."""
        size = (self.size, self.size) if isinstance(self.size, int) else self.size
        spare = [have - want for have, want in zip(example["label"].shape, size, strict=True)]
        top, left = (int(rng.integers(min(0, s), max(0, s) + 1)) for s in spare)
        return window(example, top, left, size)


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
        grey = image @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601 luma
        image = grey[..., None] + saturation * (image - grey[..., None])
        mean = grey.mean()
        image = mean + contrast * (image - mean)
        return {**example, "image": np.clip(image + 0.5, 0, 255).astype(np.uint8)}


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
