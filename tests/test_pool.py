from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dense_jax.ops.pool import max_pool, max_pool_with_switches, max_unpool, pooled_size


def slow_pool(x, window, stride, padding, ceil):
    """The definition, one window at a time: maxima and row * W + column of the first of each."""
    batch, height, width, channels = x.shape
    rows = pooled_size(height, window, stride, padding, ceil)
    columns = pooled_size(width, window, stride, padding, ceil)
    pooled = np.empty((batch, rows, columns, channels), x.dtype)
    switches = np.empty(pooled.shape, np.int32)
    for b, i, j, c in np.ndindex(*pooled.shape):
        top, left = i * stride - padding, j * stride - padding
        places = [
            (r, q)
            for r in range(max(top, 0), min(top + window, height))
            for q in range(max(left, 0), min(left + window, width))
        ]
        best = max(places, key=lambda place: x[b, *place, c])  # max keeps the first of equals
        pooled[b, i, j, c], switches[b, i, j, c] = x[b, *best, c], best[0] * width + best[1]
    return pooled, switches


def slow_unpool(x, switches, size):
    batch, _, _, channels = x.shape
    image = np.zeros((batch, size[0] * size[1], channels), x.dtype)
    for b, i, j, c in np.ndindex(*x.shape):
        image[b, switches[b, i, j, c], c] += x[b, i, j, c]
    return image.reshape(batch, *size, channels)


def reduce_window(x, window, stride, padding, ceil):
    """XLA's pooling, whose gradient (select-and-scatter) is the reference."""
    counts = [pooled_size(n, window, stride, padding, ceil) for n in x.shape[1:3]]
    pads = [
        (padding, (count - 1) * stride + window - size - padding)
        for count, size in zip(counts, x.shape[1:3], strict=True)
    ]
    if min(min(pads)) < 0:  # floor leaves a rest, which reduce_window drops by itself
        pads = [(lo, max(hi, 0)) for lo, hi in pads]
    shape, step = (1, window, window, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, shape, step, [(0, 0), *pads, (0, 0)])


GEOMETRIES = [  # height, width, window, stride, padding, ceil
    (8, 6, 2, 2, 0, False),
    (7, 9, 2, 2, 0, False),
    (7, 9, 2, 2, 0, True),
    (7, 8, 3, 2, 0, True),
    (7, 8, 3, 2, 1, False),
    (8, 7, 3, 2, 1, True),
    (6, 7, 3, 1, 1, False),
    (9, 8, 2, 3, 0, False),
    (9, 9, 4, 3, 2, True),
]


@pytest.mark.parametrize(
    ("size", "arguments", "expected"),
    [
        (112, (3, 2, 1, False), 56),
        (112, (3, 2, 1, True), 57),
        (7, (2, 2), 3),
        (7, (2, 2, 0, True), 4),
        (4, (2, 2, 1, True), 3),
        (5, (2, 2, 1, True), 3),  # the fourth window would start in the padding
        (4, (1, 2, 0, True), 3),  # Caffe; torch says 2
    ],
)
def test_pooled_size(size, arguments, expected):
    assert pooled_size(size, *arguments) == expected


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pool_and_unpool_match_the_definition(geometry, ties):
    height, width, *arguments = geometry
    window, stride, padding, _ = arguments
    rng = np.random.default_rng(height)
    shape = (2, height, width, 3)
    x: Any = (rng.integers(0, 3, shape) if ties else rng.normal(size=shape)).astype(np.float32)

    expected, expected_switches = slow_pool(x, *arguments)
    # Whole numbers, so that the order of summation does not show.
    values: Any = rng.integers(-9, 9, expected.shape).astype(np.float32)
    grad = rng.integers(-9, 9, x.shape).astype(np.float32)

    @jax.jit
    def found(x, values, grad):
        pooled, switches = max_pool_with_switches(x, *arguments)
        _, pull = jax.vjp(lambda x: max_pool(x, *arguments), x)
        _, reference = jax.vjp(lambda x: reduce_window(x, *arguments), x)
        pooling = pooled, switches, max_pool(x, *arguments), pull(values)[0], reference(values)[0]
        unpooling = []
        for extra in ((window, stride, padding), ()):
            image, pull = jax.vjp(
                lambda v, e=extra: max_unpool(v, switches, (height, width), *e), values
            )
            unpooling += [(image, pull(grad)[0])]
        return pooling, unpooling

    (pooled, switches, again, pulled, reference), unpooling = found(x, values, grad)
    np.testing.assert_array_equal(pooled, expected)
    np.testing.assert_array_equal(switches, expected_switches)
    assert switches.dtype == jnp.int32
    np.testing.assert_array_equal(again, expected)
    # Pooling: the same gradient as XLA's. Unpooling: reading the image's gradient at the switches.
    np.testing.assert_array_equal(pulled, reference)
    flat, image = grad.reshape(2, -1, 3), slow_unpool(values, expected_switches, (height, width))
    read = np.take_along_axis(flat, expected_switches.reshape(2, -1, 3), 1).reshape(pooled.shape)
    for unpooled, gradient in unpooling:
        np.testing.assert_array_equal(unpooled, image)
        np.testing.assert_array_equal(gradient, read)


@pytest.mark.parity
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pool_matches_torch(geometry):
    torch = pytest.importorskip("torch")
    height, width, window, stride, padding, ceil = geometry
    x: Any = np.random.default_rng(0).integers(0, 4, (2, height, width, 3)).astype(np.float32)
    pooled, switches = max_pool_with_switches(x, window, stride, padding, ceil)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = torch.nn.functional.max_pool2d(
        theirs, window, stride, padding, ceil_mode=ceil, return_indices=True
    )
    for ours, value in zip((pooled, switches), expected, strict=True):
        np.testing.assert_array_equal(ours.transpose(0, 3, 1, 2), value.detach().numpy())
    expected[0].pow(2).sum().backward()
    grad = jax.grad(lambda x: jnp.sum(max_pool(x, window, stride, padding, ceil) ** 2))(x)
    np.testing.assert_allclose(grad.transpose(0, 3, 1, 2), theirs.grad.numpy(), atol=1e-5)


def test_unpool_by_hand():
    # 1 5 2      windows 2x2, ceil:  5 2     5 is at 0 * 3 + 1, the lower 7 at 2 * 3 + 0
    # 3 4 2                          7 6
    # 7 0 6
    image = jnp.array([[1.0, 5, 2], [3, 4, 2], [7, 0, 6]]).reshape(1, 3, 3, 1)
    pooled, switches = max_pool_with_switches(image, 2, ceil=True)
    chex.assert_trees_all_equal(pooled.reshape(2, 2), jnp.array([[5.0, 2], [7, 6]]))
    chex.assert_trees_all_equal(switches.reshape(2, 2), jnp.array([[1, 2], [6, 8]]))
    back = max_unpool(pooled, switches, (3, 3), 2)
    expected = jnp.array([[0.0, 5, 2], [0, 0, 0], [7, 0, 6]])
    chex.assert_trees_all_equal(back.reshape(3, 3), expected)


@settings(max_examples=8)  # each shape compiles
@given(st.integers(2, 9), st.integers(2, 9), st.booleans(), st.integers(0, 99))
def test_pooling_what_was_unpooled_gives_it_back(height, width, ceil, seed):
    x: Any = np.random.default_rng(seed).uniform(1, 2, (1, height, width, 2)).astype(np.float32)

    @jax.jit
    def there_and_back(x):
        pooled, switches = max_pool_with_switches(x, 2, ceil=ceil)
        back = max_unpool(pooled, switches, (height, width), 2)
        return pooled, back, max_pool(back, 2, ceil=ceil)

    pooled, back, again = there_and_back(x)
    assert back.shape == x.shape
    np.testing.assert_array_equal(again, pooled)


def test_a_window_of_minus_infinity_takes_its_first_pixel_and_none_of_the_padding():
    x = np.full((1, 4, 5, 1), -np.inf, np.float32)
    for arguments in ((3, 2, 1, False), (4, 3, 2, True)):
        _, switches = max_pool_with_switches(jnp.asarray(x), *arguments)
        np.testing.assert_array_equal(switches, slow_pool(x, *arguments)[1])


def test_pool_in_other_dtypes_and_under_jit():
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    for dtype in (jnp.bfloat16, jnp.float16):
        grad = jax.jit(jax.grad(lambda x: jnp.sum(max_pool(x, 2))))(x.astype(dtype))
        assert grad.dtype == dtype
        assert float(jnp.sum(grad)) == 8


def test_bad_shapes_are_named():
    x = jnp.zeros((1, 4, 4, 1))
    with pytest.raises(ValueError, match=r"received \(4, 4\)"):
        max_pool(jnp.zeros((4, 4)), 2)
    with pytest.raises(ValueError, match="does not fit 4 pixels"):
        max_pool(x, 5)
    with pytest.raises(ValueError, match="below the window"):
        max_pool(x, 2, padding=2)
    with pytest.raises(ValueError, match="is empty"):
        max_pool(x, 1, 2, ceil=True)
    pooled, switches = max_pool_with_switches(x, 2)
    with pytest.raises(ValueError, match="does not give"):
        max_unpool(pooled, switches, (7, 7), 2)
