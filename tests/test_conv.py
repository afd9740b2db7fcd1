"""Every row of the mapping between frameworks, and the lecture's three views, in float64."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from dense_jax.layers import init
from dense_jax.layers.conv import Conv, UpConv, conv, up_conv
from dense_jax.train.log import CompileCounter


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normal(*shape: int, seed: int = 0) -> Any:  # NumPy where JAX arrays are taken
    return np.random.default_rng(seed).normal(size=shape)


def stock_up_conv(x, kernel, stride, padding, output_padding=0, dilation=1, groups=1):
    """The form of the textbook: a convolution over the input stretched by zeros."""
    reach = dilation * (kernel.shape[0] - 1) - padding
    return lax.conv_general_dilated(  # noqa: TID251 (the reference)
        x,
        jnp.flip(kernel, (0, 1)),
        window_strides=(1, 1),
        padding=[(reach, reach + output_padding)] * 2,
        lhs_dilation=(stride, stride),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def matrix(function, size, channels=1):
    """The dense matrix of a linear function of images: columns are responses to unit images."""
    units = np.eye(size * size * channels).reshape(-1, size, size, channels)
    return np.asarray(function(units)).reshape(len(units), -1).T


def test_the_three_views_of_the_lecture():
    kernel, x, y = normal(3, 3, 1, 1), normal(1, 4, 4, 1, seed=1), normal(1, 2, 2, 1, seed=2)

    # W, 4 x 16: row (i, j) holds the kernel at the place where the window (i, j) lies.
    w = np.zeros((2, 2, 4, 4))
    for i, j in np.ndindex(2, 2):
        w[i, j, i : i + 3, j : j + 3] = kernel[..., 0, 0]
    w = w.reshape(4, 16)
    np.testing.assert_array_equal(matrix(lambda x: conv(x, kernel, padding=0), 4), w)
    np.testing.assert_allclose(conv(x, kernel, padding=0).ravel(), w @ x.ravel(), atol=1e-12)

    # The 2x2 -> 4x4 up-convolution is its transpose ...
    np.testing.assert_array_equal(matrix(lambda y: up_conv(y, kernel, strides=1), 2), w.T)
    up = np.asarray(up_conv(y, kernel, strides=1))
    np.testing.assert_allclose(up.ravel(), w.T @ y.ravel(), atol=1e-12)

    # ... and places weighted copies of the kernel, summing where they overlap.
    copies = np.zeros((4, 4))
    for i, j in np.ndindex(2, 2):
        copies[i : i + 3, j : j + 3] += y[0, i, j, 0] * kernel[..., 0, 0]
    np.testing.assert_allclose(up[0, ..., 0], copies, atol=1e-12)


def test_strided_matrix_view_and_overlap_counts():
    kernel = normal(3, 3, 1, 1)
    w = matrix(lambda x: conv(x, kernel, strides=2, padding=1), 5)
    up = matrix(lambda y: up_conv(y, kernel, strides=2, padding=1), 3)
    np.testing.assert_allclose(up, w.T, atol=1e-12)

    # Ones on ones count the copies over a pixel: uneven (the checkerboard) unless s divides k.
    for size, counts in ((3, [1, 1, 2, 1, 2, 1, 2, 1, 1]), (4, [1, 1, 2, 2, 2, 2, 2, 2, 1, 1])):
        overlap = up_conv(jnp.ones((1, 4, 4, 1)), jnp.ones((size, size, 1, 1)), strides=2)
        np.testing.assert_array_equal(overlap[0, :, :, 0], np.outer(counts, counts))


# kernel, stride, padding, output padding, dilation, groups
UP_CONVS = [
    (2, 2, 0, 0, 1, 1),
    (4, 2, 1, 0, 1, 1),
    (3, 2, 1, 1, 1, 1),
    (3, 2, 0, 1, 2, 2),
    (5, 3, 2, 2, 1, 4),
    (2, 3, 0, 0, 1, 2),
    (3, 1, 1, 0, 2, 1),
    (1, 2, 0, 1, 1, 1),
    (3, 1, 3, 0, 1, 1),  # padding beyond the kernel's reach crops
    (8, 4, 2, 0, 1, 4),
]


@pytest.mark.parametrize("setting", UP_CONVS)
def test_up_conv_and_its_gradients_equal_the_stock_form(setting):
    k, s, p, op, d, g = setting
    x, kernel = normal(2, 5, 4, 4), normal(k, k, 4 // g, 8, seed=1)

    def ours(x, kernel):
        return up_conv(x, kernel, strides=s, padding=p, output_padding=op, dilation=d, groups=g)

    y, pull = jax.vjp(jax.jit(ours), x, kernel)
    expected, reference = jax.vjp(lambda x, w: stock_up_conv(x, w, s, p, op, d, g), x, kernel)
    size = [(n - 1) * s - 2 * p + d * (k - 1) + op + 1 for n in (5, 4)]
    chex.assert_shape(y, (2, *size, 8))
    np.testing.assert_allclose(y, expected, atol=1e-12)
    grad = normal(*y.shape, seed=2)
    chex.assert_trees_all_close(pull(grad), reference(grad), atol=1e-11)


@pytest.mark.parametrize(
    ("batch", "padding"), [(0, 0), (2, ((4, 5), (0, 0))), (2, ((0, 0), (6, 0)))]
)
@pytest.mark.parametrize("groups", [1, 4])
def test_up_conv_to_nothing(batch, padding, groups):
    """No image, or one of which all rows or columns are cropped."""
    x, kernel = normal(batch, 5, 4, 4), normal(3, 3, 4 // groups, 4, seed=1)

    def ours(x, kernel):
        return up_conv(x, kernel, strides=1, padding=padding, groups=groups)

    y, pull = jax.vjp(jax.jit(ours), x, kernel)
    assert y.size == 0
    grads = pull(y)
    chex.assert_trees_all_equal(grads, (jnp.zeros_like(x), jnp.zeros_like(kernel)))


@pytest.mark.parity
@pytest.mark.parametrize("setting", UP_CONVS[:3] + UP_CONVS[4:6] + UP_CONVS[-1:])
def test_up_conv_matches_torch(setting):
    torch = pytest.importorskip("torch")
    k, s, p, op, d, g = setting
    x, weight = normal(2, 4, 5, 4), normal(4, 8 // g, k, k, seed=1)  # torch: [C_in, C_out / g, ...]
    kernel = weight.reshape(g, 4 // g, 8 // g, k, k).transpose(3, 4, 1, 0, 2)
    kernel = kernel.reshape(k, k, 4 // g, 8)
    ours = up_conv(
        x.transpose(0, 2, 3, 1),
        kernel,
        strides=s,
        padding=p,
        output_padding=op,
        dilation=d,
        groups=g,
    )
    theirs = torch.nn.functional.conv_transpose2d(
        torch.tensor(x), torch.tensor(weight), None, s, p, op, g, d
    )
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), theirs.numpy(), atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("setting", [(3, 1, 1, 1, 1), (3, 2, 1, 1, 2), (4, 3, 2, 2, 4)])
def test_conv_matches_torch(setting):
    torch = pytest.importorskip("torch")
    k, s, p, d, g = setting
    x, weight = normal(2, 4, 9, 10), normal(8, 4 // g, k, k, seed=1)
    ours = conv(
        x.transpose(0, 2, 3, 1),
        weight.transpose(2, 3, 1, 0),
        strides=s,
        padding=p,
        dilation=d,
        groups=g,
    )
    theirs = torch.nn.functional.conv2d(torch.tensor(x), torch.tensor(weight), None, s, p, d, g)
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), theirs.numpy(), atol=1e-12)


@pytest.mark.parametrize(("k", "s"), [(1, 2), (2, 2), (2, 3), (3, 2), (4, 2), (7, 2), (5, 3)])
def test_same_padding_of_tensorflow(k, s):
    """TensorFlow's conv2d_transpose, SAME: the gradient of a SAME convolution of s * i pixels."""
    y, kernel = normal(1, 4, 4, 3), normal(k, k, 2, 3, seed=1)  # TensorFlow: [h, w, C_out, C_in]
    image = jnp.zeros((1, 4 * s, 4 * s, 2))
    _, pull = jax.vjp(
        lambda x: lax.conv_general_dilated(  # noqa: TID251 (the reference)
            x, kernel, (s, s), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        image,
    )
    # A SAME convolution pads max(k - s, 0) in all, the smaller half first; below k = s the
    # windows leave a rest, which the up-convolution fills with zeros (a negative crop).
    lo = max(k - s, 0) // 2
    edges = (lo, k - s - lo)
    up = up_conv(y, kernel.swapaxes(2, 3), strides=s, padding=(edges, edges))
    np.testing.assert_allclose(up, pull(y)[0], atol=1e-12)
    same = lax.conv_transpose(y, kernel, (s, s), "SAME", transpose_kernel=True)
    np.testing.assert_allclose(up, same, atol=1e-12)


@pytest.mark.parametrize(("k", "s"), [(3, 2), (1, 2), (2, 3)])
def test_kernels_of_flax(k, s):
    x, kernel = normal(1, 4, 5, 3), normal(k, k, 3, 2, seed=1)
    rest = max(s - k, 0)  # VALID has s pixels for each input, even where the kernel is smaller
    ours = up_conv(x, kernel[::-1, ::-1], strides=s, output_padding=rest)
    for transposed, stored in ((False, kernel), (True, kernel[::-1, ::-1].swapaxes(2, 3))):
        layer = nn.ConvTranspose(
            2, (k, k), (s, s), "VALID", use_bias=False, transpose_kernel=transposed
        )
        theirs: Any = layer.apply({"params": {"kernel": stored}}, x)
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize(("k", "size", "pads"), [(3, 8, (0, 1)), (7, 8, (2, 3)), (3, 9, (1, 1))])
def test_same_of_a_strided_convolution_pads_less_in_front(k, size, pads):
    """Why padding is explicit here: torch's (1, 1) and (3, 3) see other pixels."""
    x, kernel = normal(1, size, size, 2), normal(k, k, 2, 3, seed=1)
    theirs = lax.conv_general_dilated(  # noqa: TID251 (the reference)
        x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    ours = conv(x, kernel, strides=2, padding=(pads, pads))
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_same_in_torch_and_tensorflow_differ_by_one_pixel():
    x, kernel = normal(1, 4, 4, 1), normal(3, 3, 1, 1, seed=1)
    whole = up_conv(x, kernel, strides=2)
    tensorflow = up_conv(x, kernel, strides=2, padding=((0, 1), (0, 1)))
    torch = up_conv(x, kernel, strides=2, padding=1, output_padding=1)
    np.testing.assert_array_equal(tensorflow, whole[:, :-1, :-1])
    np.testing.assert_array_equal(torch, whole[:, 1:, 1:])


def test_zero_stuffed_unpooling():
    x = normal(1, 3, 3, 2)
    stuffed = up_conv(x, jnp.ones((1, 1, 1, 2)), strides=2, output_padding=1, groups=2)
    expected = np.zeros((1, 6, 6, 2))
    expected[:, ::2, ::2] = x
    np.testing.assert_array_equal(stuffed, expected)


@settings(max_examples=12)  # each setting compiles
@given(
    k=st.integers(1, 5),
    s=st.integers(1, 3),
    d=st.integers(1, 2),
    g=st.sampled_from([1, 2]),
    size=st.integers(5, 8),
    data=st.data(),
)
def test_up_conv_is_the_adjoint_of_conv(k, s, d, g, size, data):
    """<conv(x), y> = <x, up_conv(y)>, whatever the floor in the output size drops."""
    p = data.draw(st.integers(0, (d * (k - 1) + 1) // 2))
    spare = size + 2 * p - d * (k - 1) - 1
    if spare < 0:
        return
    geometry = {"strides": s, "padding": p, "dilation": d, "groups": g}
    x, kernel = normal(1, size, size, 4), normal(k, k, 4 // g, 2 * g, seed=1)
    y = normal(1, spare // s + 1, spare // s + 1, 2 * g, seed=2)
    # Inputs and outputs change places within each group.
    swapped = kernel.reshape(k, k, 4 // g, g, 2).transpose(0, 1, 4, 3, 2).reshape(k, k, 2, 4)

    @jax.jit
    def both(x, y):
        return conv(x, kernel, **geometry), up_conv(
            y, swapped, output_padding=spare % s, **geometry
        )

    forth, back = both(x, y)
    assert back.shape == x.shape
    assert np.vdot(forth, y) == pytest.approx(np.vdot(x, back), abs=1e-9)


@pytest.mark.parametrize(
    ("i", "k", "s", "p", "d", "o"),
    [
        (224, 7, 2, 3, 1, 112),
        (5, 3, 2, 1, 1, 3),
        (6, 3, 2, 1, 1, 3),
        (30, 3, 1, 0, 12, 6),  # spans 25
        (50, 3, 1, 0, 24, 2),  # spans 49
        (9, 3, 1, "same", 4, 9),
        (9, 5, 1, 4, 1, 13),  # full padding
    ],
)
def test_output_sizes(i, k, s, p, d, o):
    def forward(x, kernel):
        return conv(x, kernel, strides=s, padding=p, dilation=d)

    y = jax.eval_shape(forward, jnp.zeros((1, i, i, 1)), jnp.zeros((k, k, 1, 1)))
    assert y.shape == (1, o, o, 1)


@pytest.mark.parametrize("function", [conv, functools.partial(up_conv, strides=2)])
def test_gradients_outside_of_jit_compile_once(function):
    gradient = jax.grad(lambda kernel: jnp.sum(function(normal(1, 5, 5, 2), kernel)))
    gradient(normal(3, 3, 2, 2))
    CompileCounter.start()
    before = CompileCounter.programs
    gradient(normal(3, 3, 2, 2, seed=1))
    assert CompileCounter.programs == before


@pytest.mark.slow
def test_gradients_in_bfloat16_stay_close():
    x, kernel = normal(1, 6, 6, 4), normal(4, 4, 4, 4, seed=1)

    def loss(x, kernel):
        return jnp.sum(up_conv(x, kernel, strides=2, padding=1).astype(jnp.float32) ** 2)

    low = [jnp.asarray(a, jnp.bfloat16) for a in (x, kernel)]
    grads = jax.grad(loss, argnums=(0, 1))(*low)
    expected = jax.grad(loss, argnums=(0, 1))(*(a.astype(jnp.float32) for a in low))
    for grad, exact in zip(grads, expected, strict=True):
        assert grad.dtype == jnp.bfloat16
        scale = float(jnp.max(jnp.abs(exact)))
        np.testing.assert_allclose(grad.astype(jnp.float32), exact, atol=0.02 * scale)


def test_modules_hold_what_they_say():
    x = jnp.asarray(normal(1, 5, 5, 4), jnp.float32)
    key = jax.random.key(0)
    y, variables = Conv(6, (3, 1), groups=2, dtype=jnp.bfloat16).init_with_output(key, x)
    chex.assert_shape(y, (1, 5, 5, 6))
    assert y.dtype == jnp.bfloat16
    shapes = jax.tree.map(lambda p: (p.shape, str(p.dtype)), variables["params"])
    assert shapes == {"kernel": ((3, 1, 2, 6), "float32"), "bias": ((6,), "float32")}

    y, variables = UpConv(3, 2, 2, use_bias=False).init_with_output(key, x)
    chex.assert_shape(y, (1, 10, 10, 3))
    assert jax.tree.map(jnp.shape, variables["params"]) == {"kernel": (2, 2, 4, 3)}

    fixed = UpConv(
        4, 4, 2, padding=1, groups=4, use_bias=False, trainable=False, kernel_init=init.bilinear()
    )
    y, variables = fixed.init_with_output(key, x)
    assert not variables
    # Half-pixel interpolation: pixel (3, 4) of the output lies at (1.25, 1.75) of the input.
    near = np.asarray(x[0, 1:3, 1:3, 0])
    np.testing.assert_allclose(y[0, 3, 4, 0], [0.75, 0.25] @ near @ [0.25, 0.75], rtol=1e-5)


def test_bad_arguments_are_named():
    x = jnp.zeros((1, 4, 4, 3))
    with pytest.raises(ValueError, match="not whole for a kernel that spans 2 x 2"):
        conv(x, jnp.zeros((2, 2, 3, 1)))
    with pytest.raises(ValueError, match=r"received \(4, 4, 3\)"):
        conv(x[0], jnp.zeros((3, 3, 3, 1)))
    with pytest.raises(ValueError, match=r"in 2 groups does not fit an input \(1, 4, 4, 3\)"):
        up_conv(x, jnp.zeros((3, 3, 1, 2)), strides=2, groups=2)
