import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.ops import box_upsample as ops

box_upsample = jax.jit(ops.box_upsample, static_argnums=2)
BOXES = np.array(
    [[[0, 0, 1, 1], [0.2, 0.1, 0.7, 0.95]], [[-0.2, 0.5, 0.3, 1.4], [0.4, 0.4, 0.4, 0.4]]],
    np.float32,
)


def maps(height, width, channels=2, seed=0):
    shape = (2, height, width, channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def slow_box_upsample(maps, boxes, size):
    """The layer of the release, value by value: indices are clamped, weights are not."""
    batch, height, width, channels = maps.shape
    out = np.zeros((batch, boxes.shape[1], *size, channels))
    for b, n, y, x in np.ndindex(out.shape[:4]):
        x0, y0, x1, y1 = boxes[b, n].astype(np.float64)
        at_y = ((y + 0.5) * (y1 - y0) / size[0] + y0) * height - 0.5
        at_x = ((x + 0.5) * (x1 - x0) / size[1] + x0) * width - 0.5
        for row in (np.floor(at_y), np.floor(at_y) + 1):
            for column in (np.floor(at_x), np.floor(at_x) + 1):
                weight = 1 - abs(at_y - row), 1 - abs(at_x - column)
                place = int(np.clip(row, 0, height - 1)), int(np.clip(column, 0, width - 1))
                out[b, n, y, x] += weight[0] * weight[1] * maps[b, *place]
    return out


@pytest.mark.parametrize("size", [(5, 4), (1, 1), (9, 12)])
def test_box_upsample_is_the_layer_of_the_release(size):
    x = maps(6, 7)
    expected = slow_box_upsample(x, BOXES, size)
    np.testing.assert_allclose(box_upsample(x, BOXES, size), expected, rtol=1e-4, atol=1e-5)


def test_full_image_box_at_the_maps_own_size_is_the_identity():
    x = maps(6, 7)
    boxes = np.tile(np.array([0, 0, 1, 1], np.float32), (2, 1, 1))
    np.testing.assert_allclose(box_upsample(x, boxes, (6, 7))[:, 0], x, rtol=1e-5, atol=1e-6)


def test_box_upsample_by_hand():
    """The right half of 0 1 2 3, from 1.5 to 3.5 in edges: four places, half a value apart."""
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 4, 1)
    box = np.array([[[0.5, 0, 1, 1]]], np.float32)
    np.testing.assert_allclose(
        box_upsample(x, box, (1, 4))[0, 0, 0, :, 0], [1.75, 2.25, 2.75, 3.0], rtol=1e-6
    )


def test_gradient_of_box_upsample():
    x, boxes = maps(4, 5), BOXES[:, :1]
    cotangent = np.random.default_rng(1).standard_normal((2, 1, 3, 3, 2)).astype(np.float32)
    grad = jax.grad(lambda x: jnp.sum(box_upsample(x, boxes, (3, 3)) * cotangent))(x)
    expected = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        one = np.zeros_like(x)
        one[index] = 1
        expected[index] = np.sum(slow_box_upsample(one, boxes, (3, 3)) * cotangent)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)


def test_box_upsample_names_wrong_shapes():
    with pytest.raises(ValueError, match=r"boxes \[B, N, 4\]"):
        ops.box_upsample(jnp.zeros((1, 4, 4, 2)), jnp.zeros((2, 1, 4)), (2, 2))
