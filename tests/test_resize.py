import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dense_jax.layers import init
from dense_jax.layers.conv import up_conv
from dense_jax.ops.resize import resize_bilinear, resize_nearest, resize_uint8

SIZES = [
    ((5, 7), (10, 14)),
    ((5, 7), (13, 9)),
    ((8, 9), (3, 4)),
    ((4, 3), (1, 1)),
    ((1, 1), (3, 2)),
]


def image(height: int, width: int, seed: int = 0) -> Any:  # NumPy where JAX arrays are taken
    return np.random.default_rng(seed).normal(size=(2, height, width, 3)).astype(np.float32)


def slow_bilinear(x, size, align_corners):
    """The definition, pixel by pixel."""
    out = np.empty((len(x), *size, x.shape[3]), np.float32)
    for u, v in np.ndindex(*size):
        place = []
        for j, n, m in zip((u, v), x.shape[1:3], size, strict=True):
            at = j * (n - 1) / max(m - 1, 1) if align_corners else (j + 0.5) * n / m - 0.5
            at = min(max(at, 0), n - 1)
            low = min(int(at), max(n - 2, 0))
            place.append((low, min(low + 1, n - 1), at - low))
        (top, bottom, a), (left, right, b) = place
        upper = (1 - b) * x[:, top, left] + b * x[:, top, right]
        lower = (1 - b) * x[:, bottom, left] + b * x[:, bottom, right]
        out[:, u, v] = (1 - a) * upper + a * lower
    return out


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_bilinear_matches_the_definition(before, after, align_corners):
    x = image(*before)
    y = resize_bilinear(jnp.asarray(x), after, align_corners=align_corners)
    np.testing.assert_allclose(y, slow_bilinear(x, after, align_corners), atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [*SIZES, ((37, 211), (36, 20)), ((9, 9), (9, 30))])
def test_antialiased_is_pillows_to_the_last_bit(before, after):
    x = np.random.default_rng(0).integers(0, 256, (2, *before, 3), np.uint8)
    for height_first in (False, True):
        between = (after[0], before[1]) if height_first else (before[0], after[1])
        expected = x
        for size in (between, after):
            pictures = [
                Image.fromarray(own).resize(size[::-1], Image.Resampling.BILINEAR)
                for own in expected
            ]
            expected = np.stack([np.asarray(own) for own in pictures])
        resize = functools.partial(resize_uint8, size=after, height_first=height_first)
        np.testing.assert_array_equal(jax.jit(resize)(x), expected)
        np.testing.assert_array_equal(resize(x), expected)


@pytest.mark.parametrize(("before", "after"), [*SIZES, ((37, 211), (36, 20)), ((9, 9), (9, 30))])
def test_without_antialiasing_bytes_are_the_bilinear_ones_rounded(before, after):
    x = np.random.default_rng(0).integers(0, 256, (2, *before, 3), np.uint8)
    resize = functools.partial(resize_uint8, size=after, antialias=False)
    found, expected = resize(x), slow_bilinear(x.astype(np.float32), after, align_corners=False)
    # Columns are rounded before rows are weighed.
    assert np.abs(found.astype(np.float32) - expected).max() <= 1.0
    np.testing.assert_array_equal(jax.jit(resize)(x), found)


def test_only_bytes_are_resized_to_bytes():
    with pytest.raises(ValueError, match="Expected uint8, received float32"):
        resize_uint8(jnp.zeros((1, 2, 2, 3)), (1, 1))


@pytest.mark.parity
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_resize_matches_torch(before, after, align_corners):
    functional = pytest.importorskip("torch.nn.functional")
    torch = pytest.importorskip("torch")
    x, grad = image(*before), image(*after, seed=1)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = functional.interpolate(theirs, after, mode="bilinear", align_corners=align_corners)
    expected.backward(torch.tensor(grad.transpose(0, 3, 1, 2)))
    y, pull = jax.vjp(lambda x: resize_bilinear(x, after, align_corners=align_corners), x)
    np.testing.assert_allclose(y.transpose(0, 3, 1, 2), expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(pull(grad)[0].transpose(0, 3, 1, 2), theirs.grad, atol=1e-5)
    nearest = functional.interpolate(theirs.detach(), after, mode="nearest").numpy()
    np.testing.assert_array_equal(resize_nearest(x, after).transpose(0, 3, 1, 2), nearest)


@pytest.mark.parametrize("stride", [2, 4])
def test_bilinear_up_convolution_is_half_pixel_resizing(stride):
    """True for even strides away from the border, where the filter k = 2s lies inside."""
    x = jnp.asarray(image(6, 5))
    kernel = init.bilinear()(None, (2 * stride, 2 * stride, 1, 3))
    up = up_conv(x, kernel, strides=stride, padding=stride // 2, groups=3)
    resized = resize_bilinear(x, (6 * stride, 5 * stride), align_corners=False)
    inner = slice(stride // 2, -(stride // 2))
    np.testing.assert_allclose(up[:, inner, inner], resized[:, inner, inner], atol=1e-5)


def test_nearest_keeps_labels_whole():
    labels = jnp.array([[0, 255], [3, 7]], jnp.int32).reshape(1, 2, 2, 1)
    grown = resize_nearest(labels, (4, 2))
    assert grown.dtype == jnp.int32
    np.testing.assert_array_equal(grown[0, ..., 0], [[0, 255], [0, 255], [3, 7], [3, 7]])


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"received \(4, 4\)"):
        resize_bilinear(jnp.zeros((4, 4)), (2, 2), align_corners=False)
