"""Images of any size in arrays of a few shapes: prepare an image, run a network, cut the result.

A network is compiled once for each shape. So images are padded at the bottom and on the right to
one of a few shapes, with zeros, which is the mean colour after normalisation; results are cut to
the size of the image.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dense_jax.data.dataset import Example
from dense_jax.data.normalise import normalise
from dense_jax.data.transforms import resize_image, window

Size = tuple[int, int]

SIZE_MULTIPLE = 32  # Padded heights and widths, in pixels: the stride of most networks.
MAX_SHAPES = 4


def padded_shapes(
    sizes: Iterable[Size], multiple: int = SIZE_MULTIPLE, max_shapes: int = MAX_SHAPES
) -> dict[Size, Size]:
    """Returns the padded shape of each size (height, width).

    Sizes are rounded up to multiples. While there are too many shapes, the two are joined whose
    union adds the fewest pixels over all images.

    Args:
      sizes: of the images, each as often as it occurs.
      multiple: padded heights and widths are multiples of this, in pixels.
      max_shapes: the largest number of shapes.
    """
    counts = Counter(sizes)
    shape_of = {
        (h, w): (-(-h // multiple) * multiple, -(-w // multiple) * multiple) for h, w in counts
    }
    while len(shapes := sorted(set(shape_of.values()))) > max_shapes:
        num = {s: sum(counts[k] for k, v in shape_of.items() if v == s) for s in shapes}

        def added(pair: tuple[Size, Size], num: dict[Size, int] = num) -> int:
            area = math.prod(_union(*pair))
            return sum(num[shape] * (area - math.prod(shape)) for shape in pair)

        pair = min(itertools.combinations(shapes, 2), key=added)
        shape_of = {k: _union(*pair) if v in pair else v for k, v in shape_of.items()}
    return shape_of


def scaled(size: Size, scale: float) -> Size:
    """Returns the size of an image of `size` that is resized by `scale`, at least 1 x 1."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def prepare(
    image: np.ndarray, normalisation: str, shape: Size, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes, normalises and pads one image.

    Args:
      image: uint8 RGB [H, W, 3].
      normalisation: a name in `dense_jax.data.normalise.NORMALISATIONS`.
      shape: height and width after padding, not less than those of the resized image.
      scale: factor of the image's height and width.

    Returns:
      A batch of one: float32 [1, *shape, C], and int32 [1, 2], height and width before padding.
    """
    height, width = scaled(image.shape[:2], scale)
    inputs = normalise(resize_image(image, (height, width)), normalisation)
    return pad({"image": inputs}, shape)["image"][None], np.array([[height, width]], np.int32)


def pad(example: Example, shape: Size) -> Example:
    """Pads a normalised example: zeros for the image, ignored pixels for the label."""
    return window(example, 0, 0, shape)


def cut(values: np.ndarray | jax.Array, size: Size) -> np.ndarray:
    """Returns the part of [H, W, ...] that belongs to an image of `size`.

    On the host: on a device, a cut is compiled for each size.
    """
    return np.asarray(values)[: size[0], : size[1]]


def run_padded(
    fn: Callable[[jax.Array, jax.Array], Any],
    images: jax.Array,
    multiple: int = SIZE_MULTIPLE,
) -> Any:
    """Calls a function on padded images and cuts its results; traced, even with sizes left open.

    Args:
      fn: (images [B, H', W', C], sizes int32 [B, 2] before padding) to a tree of arrays.
      images: normalised [B, H, W, C], all of one size.
      multiple: H' and W' are multiples of this, in pixels.

    Returns:
      The tree; arrays [B, H', W', ...] are cut to [B, H, W, ...], others are as they were.
    """
    batch, height, width, _ = images.shape
    # As whole multiples, from which sizes further on follow even where a side is left open.
    rows, columns = (-(-side // multiple) * multiple - side for side in (height, width))
    size = jnp.array([height, width], jnp.int32)
    sizes = jnp.broadcast_to(size.reshape(1, 2), (batch, 2))
    padded = _extend(images, rows, columns)

    def cut(x: jax.Array) -> jax.Array:
        is_map = x.shape[1:3] == padded.shape[1:3]
        return _extend(x, -rows, -columns) if is_map else x

    return jax.tree.map(cut, fn(padded, sizes))


def _extend(x: jax.Array, rows: int, columns: int) -> jax.Array:
    """Adds zeros at the bottom and on the right of [B, H, W, ...]; negative numbers cut."""
    edges = [(0, 0, 0), (0, rows, 0), (0, columns, 0)] + [(0, 0, 0)] * (x.ndim - 3)
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


def _union(a: Size, b: Size) -> Size:
    return max(a[0], b[0]), max(a[1], b[1])
