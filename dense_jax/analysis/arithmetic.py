"""Convolution arithmetic, computed with the library's own layers.

`RELATIONSHIPS` lists the guide's fifteen formulas for output sizes and the layers they apply to.
All other functions run `conv`, `up_conv` and `max_pool` on unit images. `wiring` shows which input
pixel reaches which output pixel through which tap. `matrix` returns the dense matrix. `copies`
returns the copies of the kernel that an up-convolution places, and `overlap` counts them on each
pixel. No value is entered by hand, so figures made from them always agree with the layers.

Reference: Dumoulin, Visin, "A guide to convolution arithmetic for deep learning", arXiv:1603.07285.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dense_jax.layers.conv import conv, up_conv
from dense_jax.ops.pool import max_pool

PADDING, INSERTED = -1, -2  # Values of `laid_out` for cells without a pixel.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A square layer: convolution, up-convolution or max pooling.

    Attributes:
      size: input pixels along an axis (i, or i' for an up-convolution).
      kernel: taps along an axis (k).
      stride, padding, dilation: s, p and d. An up-convolution has those of the convolution whose
        transpose it is.
      remainder: rows and columns added at the bottom and right of an up-convolution (a, called
        output_padding in torch).
      kind: the library function that computes the layer.
    """

    size: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    remainder: int = 0
    kind: Literal["conv", "up_conv", "max_pool"] = "conv"

    @property
    def span(self) -> int:
        """Pixels from the first to the last tap, k_e = k + (k - 1)(d - 1)."""
        return self.kernel + (self.kernel - 1) * (self.dilation - 1)

    def __call__(self, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        """Runs the layer on [B, i, i, C] with [k, k, C, F]; returns [B, o, o, F].

        Max pooling uses only the size of the kernel.
        """
        return np.asarray(_run(self, x, kernel))

    def image(self, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        """Runs the layer on one image [i, i] with one filter [k, k]; returns [o, o]."""
        return self(x[None, :, :, None], kernel[:, :, None, None])[0, :, :, 0]

    @property
    @functools.cache  # noqa: B019 (layers are small, and equal layers share an entry)
    def output_size(self) -> int:
        """The output size o, computed by the layer and not by a formula."""
        arguments = (
            jax.ShapeDtypeStruct((1, self.size, self.size, 1), jnp.float32),
            jax.ShapeDtypeStruct((self.kernel, self.kernel, 1, 1), jnp.float32),
        )
        return jax.eval_shape(functools.partial(_run, self), *arguments).shape[1]


@functools.partial(jax.jit, static_argnums=0)
def _run(layer: Layer, x: jax.Array, kernel: jax.Array) -> jax.Array:
    shared = dict(strides=layer.stride, padding=layer.padding, dilation=layer.dilation)
    match layer.kind:
        case "conv":
            return conv(x, kernel, **shared)
        case "up_conv":
            return up_conv(x, kernel, output_padding=layer.remainder, **shared)
    return max_pool(x, layer.kernel, layer.stride, layer.padding)


class Relationship(NamedTuple):
    """One relationship of the guide between input size and output size.

    Attributes:
      number: 1 to 15, in the guide's order.
      case: description of the layers.
      formula: the formula as text.
      kind: kind of the layers.
      holds_for: whether the relationship applies to a layer of this kind.
      size: returns the output size that the formula gives.
    """

    number: int
    case: str
    formula: str
    kind: Literal["conv", "up_conv", "max_pool"]
    holds_for: Callable[[Layer], bool]
    size: Callable[[Layer], int]


def _half(g: Layer) -> bool:
    return g.stride == 1 and g.kernel % 2 == 1 and g.padding == g.kernel // 2


def _full(g: Layer) -> bool:
    return g.stride == 1 and g.padding == g.kernel - 1


def _general(g: Layer) -> int:
    return (g.size + 2 * g.padding - g.span) // g.stride + 1


_ROWS: list[tuple] = [
    (
        "conv",
        "no padding, unit strides",
        "o = i - k + 1",
        lambda g: g.stride == 1 and g.padding == 0,
        lambda g: g.size - g.kernel + 1,
    ),
    (
        "conv",
        "padding, unit strides",
        "o = i - k + 2p + 1",
        lambda g: g.stride == 1,
        lambda g: g.size - g.kernel + 2 * g.padding + 1,
    ),
    ("conv", "half padding, p = floor(k/2), k odd", "o = i", _half, lambda g: g.size),
    (
        "conv",
        "full padding, p = k - 1",
        "o = i + k - 1",
        _full,
        lambda g: g.size + g.kernel - 1,
    ),
    (
        "conv",
        "no padding, strides",
        "o = floor((i - k)/s) + 1",
        lambda g: g.padding == 0,
        lambda g: (g.size - g.kernel) // g.stride + 1,
    ),
    (
        "conv",
        "padding and strides",
        "o = floor((i + 2p - k)/s) + 1",
        lambda g: True,
        _general,
    ),
    (
        "max_pool",
        "pooling",
        "o = floor((i - k)/s) + 1",
        lambda g: g.padding == 0,
        lambda g: (g.size - g.kernel) // g.stride + 1,
    ),
    (
        "up_conv",
        "transposed: no padding, unit strides",
        "o' = i' + k - 1",
        lambda g: g.stride == 1 and g.padding == 0,
        lambda g: g.size + g.kernel - 1,
    ),
    (
        "up_conv",
        "transposed: padding, unit strides",
        "o' = i' + k - 1 - 2p",
        lambda g: g.stride == 1,
        lambda g: g.size + g.kernel - 1 - 2 * g.padding,
    ),
    ("up_conv", "transposed: half padding", "o' = i'", _half, lambda g: g.size),
    (
        "up_conv",
        "transposed: full padding",
        "o' = i' - (k - 1)",
        _full,
        lambda g: g.size - (g.kernel - 1),
    ),
    (
        "up_conv",
        "transposed: no padding, strides; s divides i - k",
        "o' = s(i' - 1) + k",
        lambda g: g.padding == g.remainder == 0,
        lambda g: g.stride * (g.size - 1) + g.kernel,
    ),
    (
        "up_conv",
        "transposed: padding and strides; s divides i + 2p - k",
        "o' = s(i' - 1) + k - 2p",
        lambda g: g.remainder == 0,
        lambda g: g.stride * (g.size - 1) + g.kernel - 2 * g.padding,
    ),
    (
        "up_conv",
        "transposed: any remainder a = (i + 2p - k) mod s",
        "o' = s(i' - 1) + a + k - 2p",
        lambda g: True,
        lambda g: g.stride * (g.size - 1) + g.remainder + g.kernel - 2 * g.padding,
    ),
    (
        "conv",
        "dilation, k_e = k + (k - 1)(d - 1)",
        "o = floor((i + 2p - k_e)/s) + 1",
        lambda g: True,
        _general,
    ),
]
RELATIONSHIPS = tuple(
    Relationship(number, case, formula, kind, holds_for, size)
    for number, (kind, case, formula, holds_for, size) in enumerate(_ROWS, 1)
)


def layers(relationship: Relationship, largest: int) -> Iterator[Layer]:
    """Yields every layer up to `largest` input pixels to which a relationship applies.

    Kernels have up to 4 taps, and strides go up to 3. Dilations go up to 3 in the last relationship
    and are 1 in all others. Remainders are below the stride. Layers without output are skipped.
    """
    dilations = (1, 2, 3) if relationship.number == len(RELATIONSHIPS) else (1,)
    for size, k, s, d in itertools.product(
        range(1, largest + 1), range(1, 5), range(1, 4), dilations
    ):
        remainders = range(s) if relationship.kind == "up_conv" else (0,)
        for p, a in itertools.product(range(k), remainders):
            layer = Layer(
                size=size,
                kernel=k,
                stride=s,
                padding=p,
                dilation=d,
                remainder=a,
                kind=relationship.kind,
            )
            fits = relationship.kind == "up_conv" or size + 2 * p >= layer.span
            if fits and relationship.holds_for(layer) and relationship.size(layer) > 0:
                yield layer


def units(size: int) -> np.ndarray:
    """Returns float32 [size^2, size, size, 1]: for each pixel an image that is 1 only there."""
    return np.eye(size * size, dtype=np.float32).reshape(-1, size, size, 1)


def wiring(layer: Layer) -> np.ndarray:
    """Returns bool [o, o, i, i, k, k]: which input pixel reaches which output through which tap.

    The unit images pass through a filter bank in which each filter has one tap. Max pooling has no
    separate taps: [o, o, i, i, 1, 1] shows which pixels a window contains.
    """
    k = 1 if layer.kind == "max_pool" else layer.kernel
    bank = np.eye(k * k, dtype=np.float32).reshape(k, k, 1, k * k)
    if layer.kind == "max_pool":
        bank = np.ones((layer.kernel, layer.kernel, 1, 1), np.float32)
    answers = layer(units(layer.size), bank)  # [i^2, o, o, k^2]
    _, o, _, _ = answers.shape
    return answers.transpose(1, 2, 0, 3).reshape(o, o, layer.size, layer.size, k, k) == 1


def matrix(layer: Layer, kernel: np.ndarray) -> np.ndarray:
    """Returns the matrix W [o^2, i^2] with layer(x) = W x, for images flattened row by row.

    The kernel is [k, k].
    """
    answers = layer(units(layer.size), kernel[:, :, None, None])
    return answers.reshape(layer.size**2, -1).T


def copies(layer: Layer, x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Returns [i, i, o, o]: what each pixel of x [i, i] adds to the output."""
    answers = layer(units(layer.size) * x.reshape(-1, 1, 1, 1), kernel[:, :, None, None])
    return answers.reshape(layer.size, layer.size, *answers.shape[1:3])


def overlap(layer: Layer) -> np.ndarray:
    """Returns int [o, o]: the number of taps that reach each output pixel.

    The layer maps an image of ones with a kernel of ones.
    """
    ones = np.ones((layer.size, layer.size), np.float32)
    return layer.image(ones, np.ones((layer.kernel, layer.kernel), np.float32)).astype(int)


def laid_out(layer: Layer) -> np.ndarray:
    """Returns int [n, n]: the input with explicit padding and inserted zeros.

    A cell holds the index of a pixel (row i + column), PADDING or INSERTED. INSERTED marks the
    s - 1 zeros that a fractional stride puts between pixels. `direct` computes the layer's output
    from windows that slide over these cells. For an up-convolution these windows have stride 1.

    Raises:
      ValueError: the layer is max pooling, whose padding is not zero.
    """
    if layer.kind == "max_pool":
        raise ValueError("max pooling pads with minus infinity; it has no direct form")
    numbers = np.arange(1, layer.size**2 + 1, dtype=np.float32).reshape(1, layer.size, -1, 1)
    one = np.ones((1, 1, 1, 1), np.float32)
    lo = hi = layer.padding
    if layer.kind == "up_conv":
        numbers = np.asarray(up_conv(jnp.asarray(numbers), jnp.asarray(one), strides=layer.stride))
        lo = hi = layer.span - 1 - layer.padding
        hi += layer.remainder

    def padded(x: np.ndarray) -> np.ndarray:
        edges = ((lo, hi), (lo, hi))
        return np.asarray(conv(jnp.asarray(x), jnp.asarray(one), padding=edges))[0, :, :, 0]

    inside = padded(np.ones_like(numbers)) == 1
    cells = padded(numbers).astype(int)
    return np.where(cells > 0, cells - 1, np.where(inside, INSERTED, PADDING))


def direct(layer: Layer) -> Layer:
    """Returns the convolution without padding that equals the layer on its `laid_out` cells.

    For an up-convolution, its kernel is the layer's kernel rotated by 180 degrees (both axes
    flipped).
    """
    stride = 1 if layer.kind == "up_conv" else layer.stride
    size = len(laid_out(layer))
    return Layer(size=size, kernel=layer.kernel, stride=stride, dilation=layer.dilation)
