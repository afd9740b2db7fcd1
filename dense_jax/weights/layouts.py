"""The layouts of tensors in files by name, and how to convert them to ours and back.

Kernels here are [h, w, i, o], for cross-correlation and RGB images. "same" changes nothing:

  conv            [o, i, h, w]: torch, Caffe, Theano; any number of groups
  conv_ohwi       [o, h, w, i]: TensorFlow Lite
  up_conv         [i, o, h, w]: torch's ConvTranspose2d and Caffe's Deconvolution, of one group
  up_conv_hwoi    [h, w, o, i]: TensorFlow's conv2d_transpose, Keras's Conv2DTranspose
  depthwise       [h, w, i, 1]: TensorFlow's and Keras's depthwise convolution, of multiplier 1
  depthwise_1hwc  [1, h, w, i]: TensorFlow Lite's
  dense           [o, i]: torch's Linear, Caffe's InnerProduct
  dense_chw       [o, c h w]: a dense layer on a map [c, h, w]; here a kernel of the map's size

Behind one of these, joined by "+":

  flip            flips a kernel that is stored for true convolution
  bgr             reverses the input channels of a kernel that reads BGR images

In front of one of these, or alone:

  ones            removes axes of length 1 that ours lacks: old Caffe's [1, 1, 1, o]
  rows            reshapes kernels stored as dense layers, [o, c h w] or [1, 1, o, c h w], to
                  [o, c, h, w]; leaves kernels as they are
  diagonal        reduces [c, c, h, w], zero between different channels, to [c, 1, h, w]
  minus           changes the sign
  background_last rows of classes, the last one background, which is first here
  objects         rows of classes without background, which is a row of zeros here; a single row is
                  for all classes
  object_boxes    the same with four rows for each class
  ratios_inner    rows of anchors of three ratios for each size; here, sizes for each ratio
  ratios_inner_boxes  the same with four rows for each anchor
  half            divides by two: the layer's input was dropped without a scale in training
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dense_jax.weights.account import Shape

_NUM_RATIOS = 3  # heights over widths of anchors in all releases


class UnfitError(ValueError):
    """These values do not suit the layout; the message says why."""


class _Step(NamedTuple):
    """One conversion: its name, the function for our layout and shape, and its inverse."""

    name: str
    load: Callable[[np.ndarray, Shape], np.ndarray]
    unload: Callable[[np.ndarray], np.ndarray]


def _permuted(*axes: int) -> _Step:
    back = tuple(int(axis) for axis in np.argsort(axes))
    return _Step("permuted", lambda x, _: x.transpose(axes), lambda x: x.transpose(back))


def _reversed(name: str, *axes: int) -> _Step:
    return _Step(name, lambda x, _: np.flip(x, axes), lambda x: np.flip(x, axes))


def _itself(x: np.ndarray) -> np.ndarray:
    return x


def _split(x: np.ndarray, shape: Shape) -> np.ndarray:
    height, width, channels, features = shape
    if x.shape != (features, channels * height * width):
        raise ValueError("the rows have another length")
    return x.reshape(features, channels, height, width).transpose(2, 3, 1, 0)


def _join(x: np.ndarray) -> np.ndarray:
    return x.transpose(3, 2, 0, 1).reshape(x.shape[3], -1)


def _without_ones(x: np.ndarray, shape: Shape) -> np.ndarray:
    if x.ndim <= len(shape):
        return x
    longer = [size for size in x.shape if size != 1]
    return x.reshape([1] * (len(shape) - len(longer)) + longer)


def _kernels_of_rows(x: np.ndarray, shape: Shape) -> np.ndarray:
    height, width, channels, features = shape
    is_rows = x.shape[-2:] == (features, channels * height * width)
    if x.shape[2:] == (height, width) or not is_rows:
        return x
    return x.reshape(features, channels, height, width)


def _diagonal(x: np.ndarray, shape: Shape) -> np.ndarray:
    if x.ndim != 4 or x.shape[0] != x.shape[1]:
        return x
    own = np.einsum("iihw->ihw", x)[:, None]
    if np.count_nonzero(x) > np.count_nonzero(own):
        raise UnfitError("it mixes channels, and this layer keeps them separate")
    return own


def _on_diagonal(x: np.ndarray) -> np.ndarray:
    return x * np.eye(len(x), dtype=x.dtype)[:, :, None, None]


def _background(rows: int) -> _Step:
    """Adds rows of zeros for background in front; nothing reads them."""

    def load(x: np.ndarray, shape: Shape) -> np.ndarray:
        is_shared = x.shape[:1] == shape[-1:] == (rows,)  # one mask for all classes
        return x if is_shared else np.concatenate([np.zeros((rows, *x.shape[1:]), x.dtype), x])

    name = "background added"
    return _Step(name, load, lambda x: x if len(x) == rows else x[rows:])


def _anchors(rows: int) -> _Step:
    """Changes the order of anchors between sizes outside and ratios outside."""

    def swap(x: np.ndarray, *, outer: int, inner: int) -> np.ndarray:
        if x.size % (_NUM_RATIOS * rows):
            raise UnfitError(f"the anchors have other than {_NUM_RATIOS} ratios")
        apart = x.reshape(outer, inner, rows, *x.shape[1:])
        return apart.swapaxes(0, 1).reshape(x.shape)

    return _Step(
        "anchors permuted",
        lambda x, _: swap(x, outer=-1, inner=_NUM_RATIOS),
        lambda x: swap(x, outer=_NUM_RATIOS, inner=-1),
    )


LAYOUTS: dict[str, _Step] = {
    "conv": _permuted(2, 3, 1, 0),
    "conv_ohwi": _permuted(1, 2, 3, 0),
    "up_conv": _permuted(2, 3, 0, 1),
    "up_conv_hwoi": _permuted(0, 1, 3, 2),
    "depthwise": _permuted(0, 1, 3, 2),
    "depthwise_1hwc": _permuted(1, 2, 0, 3),
    "dense": _permuted(1, 0),
    "dense_chw": _Step("reshaped", _split, _join),
    "flip": _reversed("flipped", 0, 1),
    "bgr": _reversed("channels reversed", 2),
    "ones": _Step("reshaped", _without_ones, _itself),
    "rows": _Step("reshaped", _kernels_of_rows, _itself),
    "diagonal": _Step("reshaped", _diagonal, _on_diagonal),
    "background_last": _Step(
        "background first", lambda x, _: np.roll(x, 1, 0), lambda x: np.roll(x, -1, 0)
    ),
    "objects": _background(1),
    "object_boxes": _background(4),
    "ratios_inner": _anchors(1),
    "ratios_inner_boxes": _anchors(4),
    "minus": _Step("negated", lambda x, _: -x, np.negative),
    "half": _Step("halved", lambda x, _: x / 2, lambda x: x * 2),
}


def load(tensor: np.ndarray, layout: str, shape: Shape) -> np.ndarray:
    """Returns a tensor of a file in our layout, as a view where possible.

    Args:
      tensor: the tensor in the layout of the file.
      layout: "same", a name of `LAYOUTS`, or several joined by "+" and applied from left to right.
      shape: shape of the parameter here.

    Raises:
      ValueError: the shape of the tensor does not suit the layout.
      UnfitError: its values do not.
    """
    for step in _steps(layout):
        tensor = step.load(tensor, shape)
    return tensor


def unload(values: np.ndarray, layout: str) -> np.ndarray:
    """Returns a parameter in the layout of a file: the inverse of `load`."""
    for step in reversed(_steps(layout)):
        values = step.unload(values)
    return values


def changes(tensor: np.ndarray, layout: str, shape: Shape) -> list[str]:
    """Returns the names of the conversions with which `load` changes a tensor."""
    names = []
    for step in _steps(layout):
        before, tensor = tensor, step.load(tensor, shape)
        if tensor is not before:
            names.append(step.name)
    return names


def _steps(layout: str) -> list[_Step]:
    return [] if layout == "same" else [LAYOUTS[name] for name in layout.split("+")]
