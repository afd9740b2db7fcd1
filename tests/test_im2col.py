"""The forms of convolution for CPUs, and which of them one takes, against the one call to lax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dense_jax.layers.conv import conv
from dense_jax.ops import im2col, taps
from dense_jax.ops.im2col import Windows

# image (H, W), C, C_out, kernel, strides, dilation, padding, groups
SETTINGS = [
    ((7, 9), 3, 4, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 1),
    ((9, 8), 3, 4, (3, 3), (1, 2), (1, 1), ((0, 0), (-1, 0)), 1),  # no padding
    ((7, 9), 3, 4, (3, 2), (2, 1), (1, 2), ((0, 2), (3, 0)), 1),
    ((8, 6), 2, 5, (3, 3), (2, 2), (2, 2), ((2, 1), (2, 3)), 1),
    ((9, 9), 2, 3, (3, 3), (1, 1), (1, 1), ((-1, 1), (0, -2)), 1),
    ((6, 6), 4, 4, (1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)), 1),
    ((6, 6), 4, 4, (1, 1), (2, 2), (1, 1), ((0, 0), (0, 0)), 1),
    ((2, 2), 3, 64, (7, 7), (1, 1), (1, 1), ((3, 3), (3, 3)), 1),  # almost fully connected
    ((6, 7), 5, 3, (1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)), 1),  # fewer features than channels
    ((5, 4), 256, 256, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 1),  # a kernel above the image
    ((8, 9), 128, 128, (3, 3), (1, 1), (4, 5), ((4, 4), (5, 5)), 1),  # mostly padding
    ((5, 6), 3, 4, (3, 3), (1, 1), (9, 9), ((9, 9), (9, 9)), 1),  # only the centre reads
    ((5, 6), 3, 4, (3, 4), (2, 3), (3, 2), ((5, 1), (2, 7)), 1),
    ((5, 6), 3, 4, (3, 3), (3, 2), (7, 1), ((11, 9), (-2, 0)), 1),  # rows without any
    ((40, 40), 2, 3, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 1),  # several blocks of rows
    ((70, 33), 2, 3, (3, 3), (2, 1), (1, 1), ((1, 1), (1, 1)), 1),  # the last block is not full
    ((6, 7), 4, 6, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 2),
    ((6, 7), 4, 4, (3, 3), (2, 2), (1, 1), ((1, 1), (1, 1)), 4),
    ((9, 8), 5, 5, (3, 4), (1, 1), (2, 1), ((2, 2), (1, 2)), 5),  # depthwise
    ((9, 8), 5, 5, (4, 3), (2, 3), (1, 2), ((-1, 3), (2, 0)), 5),
    ((6, 6), 3, 6, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), 3),  # not quite depthwise
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Images that a test can afford then take several blocks, as large ones do."""
    monkeypatch.setattr(im2col, "_BLOCK", 2**12)
    monkeypatch.setattr(im2col, "_SHARED_BLOCK", 2**11)


def arrays(size, channels, features, kernel_size, groups, dtype=np.float64):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, channels))
    kernel = rng.standard_normal((*kernel_size, channels // groups, features))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def stock(x, kernel, w, groups=1):
    return lax.conv_general_dilated(  # noqa: TID251  (the reference)
        x,
        kernel,
        w.strides,
        w.padding,
        rhs_dilation=w.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_conv_and_its_gradients_equal_one_call_to_lax(setting):
    size, channels, features, kernel_size, strides, dilation, padding, groups = setting
    with jax.enable_x64(True):
        x, kernel = arrays(size, channels, features, kernel_size, groups)
        w = Windows(kernel_size, strides, dilation, padding)

        def ours(x, kernel):
            return conv(
                x, kernel, strides=strides, padding=padding, dilation=dilation, groups=groups
            )

        expected, pull = jax.vjp(lambda x, kernel: stock(x, kernel, w, groups), x, kernel)
        actual, ours_pull = jax.vjp(jax.jit(ours), x, kernel)
        np.testing.assert_allclose(actual, expected, atol=1e-12)
        grad = jnp.asarray(np.random.default_rng(1).standard_normal(expected.shape))
        for mine, other in zip(jax.jit(ours_pull)(grad), pull(grad), strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-10)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s[-1] == 1], ids=str)
def test_matrix_forms_equal_one_call_to_lax(setting):
    size, channels, features, kernel_size, strides, dilation, padding, _ = setting
    with jax.enable_x64(True):
        x, kernel = arrays(size, channels, features, kernel_size, 1)
        w = Windows(kernel_size, strides, dilation, padding)

        @jax.jit  # one program compiles faster than each form's operations one by one
        def values(x, kernel, grad):
            expected, pull = jax.vjp(lambda x, kernel: stock(x, kernel, w), x, kernel)
            x_grad, kernel_grad = pull(grad)
            # The transpose takes `grad` for its input, and `x` for the gradient of its output.
            swapped, swapped_grad = im2col.transposed_gradients(grad, kernel.swapaxes(2, 3), x, w)
            return {
                "output": (expected, im2col.convolve(x, kernel, w), taps.convolve(x, kernel, w)),
                "output of the transpose": (expected, swapped),
                "gradient of the input": (
                    x_grad,
                    im2col.input_gradient(grad, kernel, size, w),
                    taps.input_gradient(grad, kernel, size, w),
                ),
                "gradient of the kernel": (
                    kernel_grad,
                    im2col.kernel_gradient(x, grad, w),
                    taps.kernel_gradient(x, grad, w),
                    swapped_grad.swapaxes(2, 3),
                ),
            }

        shape = (2, *w.counts(size), features)
        grad = jnp.asarray(np.random.default_rng(1).standard_normal(shape))
        for name, (expected, *forms) in values(x, kernel, grad).items():
            atol = 1e-10 if "kernel" in name else 1e-11 if "input" in name else 1e-12
            for form in forms:
                np.testing.assert_allclose(form, expected, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_share_of_reads_inside_the_image_is_what_counting_gives(setting):
    size, _, _, kernel_size, strides, dilation, padding, _ = setting
    w = Windows(kernel_size, strides, dilation, padding)
    with jax.enable_x64(True):
        image, kernel = jnp.ones((1, *size, 1)), jnp.ones((*kernel_size, 1, 1))
        inside = np.mean(np.asarray(stock(image, kernel, w))) / np.prod(kernel_size)
    assert taps.share_inside(size, w) == pytest.approx(inside)


@pytest.mark.parametrize(("dilation", "form"), [(1, "convolution"), (6, "dot_general")])
def test_dilated_windows_that_mostly_read_padding_are_products_on_a_cpu(dilation, form):
    x, kernel = arrays((17, 17), 128, 128, (3, 3), 1, np.float32)
    traced = jax.jit(functools.partial(conv, dilation=dilation)).trace(x, kernel)
    program = traced.lower(lowering_platforms=("cpu",)).as_text()
    used = {f for f in ("convolution", "dot_general") if f"stablehlo.{f}" in program}
    assert used == {form}


def test_columns_of_a_hand_worked_image():
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    w = Windows((2, 2), (1, 1), (1, 1), ((0, 0), (0, 0)))
    columns = im2col.im2col(x, w)
    assert columns.shape == (1, 2, 2, 4)
    np.testing.assert_array_equal(columns[0, 0, 0], [0, 1, 3, 4])
    np.testing.assert_array_equal(columns[0, 1, 1], [4, 5, 7, 8])
    # Adding the windows back counts how many windows hold each pixel.
    counts = im2col.col2im(jnp.ones_like(columns), (3, 3), w)[0, :, :, 0]
    np.testing.assert_array_equal(counts, [[1, 2, 1], [2, 4, 2], [1, 2, 1]])


@pytest.mark.parametrize("channels", [1, 2])  # 2: depthwise
def test_gradients_keep_bfloat16_but_add_in_float32(channels):
    """Ones summed one by one in bfloat16 stay at 256."""
    x = jnp.ones((512, 1, 1, channels), jnp.bfloat16)
    kernel = jnp.ones((1, 1, 1, channels), jnp.bfloat16)
    pull = jax.vjp(functools.partial(conv, groups=channels), x, kernel)[1]
    x_grad, kernel_grad = jax.jit(pull)(x)
    assert x_grad.dtype == kernel_grad.dtype == jnp.bfloat16
    assert float(kernel_grad[0, 0, 0, 0]) == 512


def test_each_operation_is_one_call_where_it_is_lowered_for_an_accelerator():
    x, kernel = arrays((2, 2), 3, 64, (7, 7), 1, np.float32)
    program = jax.jit(conv).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("stablehlo.convolution") == 1
    assert "dot_general" not in program
    program = jax.jit(conv).trace(x, kernel).lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.convolution" not in program
