"""Images of any size in arrays of a few shapes: prepare an image, run a network, cut the result.

A network is compiled once for each shape. By default an image has the shape of its own size, so
that its labels depend on nothing else. Where sizes are many, images can share a few larger shapes.
They are then padded at the bottom and on the right with zeros, which is the mean colour after
normalisation; results are cut to the size of the image. Zeros are what most layers see beyond an
image too, but behind the first layer they are no longer zeros, so labels and objects near these two
edges, and of networks that pool over the whole image all labels, can differ.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dense_jax.data.dataset import Example
from dense_jax.data.normalise import normalise
from dense_jax.data.transforms import resize_image, window

Size = tuple[int, int]
Shapes = Literal["exact", "buckets"]
"""exact: each image has a shape of its own size; buckets: all images share at most four shapes."""

BUCKET = 32  # Heights and widths of shared shapes are multiples of this, in pixels.
MAX_BUCKETS = 4
_MANY = 16  # Shapes, from which on compiling takes longer than a user expects.
_MAX_CANDIDATES = 64  # Of shapes to join: the search takes the third power of their number.


def padded_shapes(
    sizes: Iterable[Size],
    how: Shapes = "exact",
    padded_side: Callable[[int], int] = lambda side: side,
    max_buckets: int = MAX_BUCKETS,
) -> dict[Size, Size]:
    """Returns the padded shape of each size (height, width).

    Args:
      sizes: of the images, each as often as it occurs.
      how: "exact" gives each size the shape to which the network pads it. The shape of an image
        does not depend on the other images. "buckets" joins shapes until they are few: each time
        the two whose union adds the fewest pixels over all images.
      padded_side: the side to which the network pads a side of an image; used by "exact".
      max_buckets: the largest number of shapes of "buckets".
    """
    counts = Counter(sizes)
    if how == "exact":
        return {(h, w): (padded_side(h), padded_side(w)) for h, w in counts}
    # The sizes in each shape. Very many are rounded more coarsely before they are joined.
    step, groups = BUCKET, _grouped(counts, BUCKET)
    while len(groups) > max(_MAX_CANDIDATES, max_buckets):
        step *= 2
        groups = _grouped(counts, step)
    while len(groups) > max_buckets:
        num = {shape: sum(counts[size] for size in members) for shape, members in groups.items()}

        def added(pair: tuple[Size, Size], num: dict[Size, int] = num) -> int:
            area = math.prod(_union(*pair))
            return sum(num[shape] * (area - math.prod(shape)) for shape in pair)

        pair = min(itertools.combinations(sorted(groups), 2), key=added)
        members = groups.pop(pair[0]) + groups.pop(pair[1])
        groups[_union(*pair)] = groups.get(_union(*pair), []) + members
    least = {
        shape: _rounded((max(h for h, _ in members), max(w for _, w in members)), BUCKET)
        for shape, members in groups.items()
    }
    return {size: least[shape] for shape, members in groups.items() for size in members}


def tell_if_many(shape_of: Mapping[Size, Size], how: Shapes) -> None:
    """Prints a line if there are very many shapes to compile."""
    if how == "exact" and (count := len(set(shape_of.values()))) > _MANY:
        print(
            f"{count} image sizes, and the network is compiled for each; --eval-shapes=buckets "
            f"compiles it for {MAX_BUCKETS}, and changes results near the lower and right edges"
        )


def in_words(shapes: Iterable[Size]) -> str:
    """Returns the shapes of a network's inputs in words; of many, the first and the last."""
    words = [f"{height}x{width}" for height, width in sorted(shapes)]
    if len(words) > 8:
        words = [*words[:4], f"{len(words) - 5} more", words[-1]]
    return f"computed at {', '.join(words)}" if words else "nothing computed"


def multiple_of(side: int, multiple: int) -> int:
    """Returns the next multiple, from which sizes further on follow even for a side left open."""
    return -(-side // multiple) * multiple


def _rounded(size: Size, multiple: int) -> Size:
    return multiple_of(size[0], multiple), multiple_of(size[1], multiple)


def _grouped(sizes: Iterable[Size], multiple: int) -> dict[Size, list[Size]]:
    groups: dict[Size, list[Size]] = {}
    for size in sizes:
        groups.setdefault(_rounded(size, multiple), []).append(size)
    return groups


def prepare(
    image: np.ndarray,
    normalisation: str,
    shape: Size,
    size: Size | None = None,
    *,
    antialias: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Resizes, normalises and pads one image.

    Args:
      image: uint8 RGB [H, W, 3].
      normalisation: a name in `dense_jax.data.normalise.NORMALISATIONS`.
      shape: height and width after padding, not less than those of the resized image.
      size: height and width to which the image is resized; None keeps its own.
      antialias: see `dense_jax.data.transforms.resize_image`.

    Returns:
      A batch of one: float32 [1, *shape, C], and int32 [1, 2], height and width before padding.
    """
    height, width = size or image.shape[:2]
    inputs = normalise(resize_image(image, (height, width), antialias=antialias), normalisation)
    return pad({"image": inputs}, shape)["image"][None], np.array([[height, width]], np.int32)


def pad(example: Example, shape: Size) -> Example:
    """Pads a normalised example: zeros for the image and masks, ignored pixels for the label."""
    padded, objects = window(example, 0, 0, shape), example.get("objects")
    if isinstance(objects, dict) and "masks" in objects:  # in slots already
        height, width = objects["masks"].shape[1:]
        edges = (0, 0), (0, shape[0] - height), (0, shape[1] - width)
        padded["objects"] = {**objects, "masks": np.pad(objects["masks"], edges)}
    return padded


def cut(values: np.ndarray | jax.Array, size: Size) -> np.ndarray:
    """Returns the part of [H, W, ...] that belongs to an image of `size`.

    On the host: on a device, a cut is compiled for each size.
    """
    return np.asarray(values)[: size[0], : size[1]]


def run_padded(
    fn: Callable[[jax.Array, jax.Array], Any],
    images: jax.Array,
    padded_side: Callable[[int], int] = lambda side: side,
) -> Any:
    """Calls a function on padded images and cuts its results; traced, even with sizes left open.

    Args:
      fn: (images [B, H', W', C], sizes int32 [B, 2] before padding) to a tree of arrays.
      images: normalised [B, H, W, C], all of one size.
      padded_side: maps H to H' and W to W'.

    Returns:
      The tree; arrays [B, H', W', ...] are cut to [B, H, W, ...], others are as they were.
    """
    batch, height, width, _ = images.shape
    rows, columns = (padded_side(side) - side for side in (height, width))
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
