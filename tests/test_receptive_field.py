"""Receptive fields against gradients, against brute force and against the literature."""

import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dense_jax.analysis import receptive_field as rf
from dense_jax.analysis import receptive_field_figures as figures
from dense_jax.analysis.reach_rules import Seen
from dense_jax.commands import receptive_field as command
from dense_jax.errors import UserError
from dense_jax.layers import init
from dense_jax.layers.conv import Conv, UpConv
from dense_jax.models import (
    deconvnet,
    deeplab,
    dilated,
    fcn,
    hypercolumns,
    resnet,
    segnet,
    unet,
    vgg,
)
from dense_jax.ops.pool import max_pool
from dense_jax.ops.resize import resize_bilinear, resize_nearest
from tests import contract, members

# ---------------------------------------------------------------- the literature's numbers

VGG = {"pool1": 6, "pool2": 16, "pool3": 44, "pool4": 100, "pool5": 212}


@functools.cache
def analyse(build, **options):
    return rf.analyse(build(**options))


def assert_field(build, name, size, stride, first, **options):
    field = analyse(build, **options).field(name)
    assert field.rows == field.columns == rf.Axis(size, stride, first, True)


@pytest.mark.parametrize("number", range(1, 6))
def test_vgg_poolings(number):
    assert_field(
        vgg.vgg16, f"pool{number}", VGG[f"pool{number}"], 2**number, 2 ** (number - 1) - 0.5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "options", "name", "size", "stride", "first"),
    [
        (vgg.vgg16, {}, "conv5_3", 196, 16, 7.5),
        (vgg.vgg16, {"padding": "same"}, "fc7", 404, 32, 15.5),
        (fcn.fcn8s, {"num_classes": 21}, "fc7", 404, 32, 12.5),
        (fcn.fcn8s, {"num_classes": 21}, "logits", 468, 1, 0),
        (fcn.fcn_alexnet, {"num_classes": 21}, "pool5", 195, 32, -67),
        (fcn.fcn_alexnet, {"num_classes": 21}, "fc6", 355, 32, 13),
        (unet.unet, {"num_classes": 2}, "d4c", 140, 16, 69.5),
        (unet.unet, {"num_classes": 2}, "logits", 204, 1, 92),
        (segnet.SegNetBasic, {"num_classes": 11}, "pool4", 106, 16, 7.5),
        (dilated.front_end, {"num_classes": 21}, "final", 380, 8, 189.5),
        (dilated.dilated_large, {"num_classes": 21}, "scores", 908, 8, 189.5),
        (dilated.dilation7, {"num_classes": 19}, "scores", 652, 8, 189.5),
        (dilated.dilation10, {"num_classes": 19}, "scores", 2444, 8, 189.5),
        (deeplab.deeplab_vgg_largefov, {"num_classes": 21}, "pool5", 227, 8, 0),
        (deeplab.deeplab_largefov, {"num_classes": 21}, "scores", 435, 8, 0),
        (deeplab.deeplab_vgg_aspp_l, {"num_classes": 21}, "scores", 611, 8, 0),
        (resnet.resnet50, {}, "layer4", 427, 32, 0),
        (resnet.resnet50, {"output_stride": 8}, "layer4", 427, 8, 0),
        pytest.param(resnet.resnet101, {}, "layer4", 971, 32, 0, marks=pytest.mark.slow),
        (resnet.resnet50, {"stride_in": "1x1"}, "layer4", 483, 32, 0),
        pytest.param(
            resnet.resnet101,
            {"stride_in": "1x1", "output_stride": 8, "first_block_dilation": "new"},
            "layer4",
            1027,
            8,
            0,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_published_sizes(build, options, name, size, stride, first):
    assert_field(build, name, size, stride, first, **options)


class Layers(nn.Module):
    """Convolutions one behind the other; "out" is the last."""

    dilations: tuple[int, ...]
    features: int = 1

    @nn.compact
    def __call__(self, images, *, train):
        x = images
        for dilation in self.dilations:
            x = Conv(self.features, 3, dilation=dilation)(x)
        return {"out": x}


@pytest.mark.parametrize(
    ("dilations", "size"),
    [
        ((1,), 3),
        ((1, 2), 7),
        ((1, 2, 4), 15),
        ((1, 1, 2, 4, 8, 16), 65),
        ((1, 1, 2, 4, 8, 16, 1), 67),
        ((1, 1, 2, 4, 8, 16, 32, 64, 1), 259),
        ((1,) * 10, 21),
        ((1000,), 2001),  # On a small image the outer taps would never meet a pixel.
    ],
)
def test_stacks_of_dilated_convolutions(dilations, size):
    assert analyse(Layers, dilations=dilations).field("out").rows == rf.Axis(size, 1, 0, True)


# ---------------------------------------------------------------- against brute force

SIZE = (15, 13)


class Chain(nn.Module):
    """Layers by their names in turn, each of one channel."""

    layers: tuple

    @nn.compact
    def __call__(self, images, *, train):
        x = images
        for kind, *numbers in self.layers:
            x = LAYERS[kind](x, *numbers)
        return {"out": x}


def _conv(x, kernel, stride, padding, dilation):
    return Conv(1, kernel, stride, padding, dilation)(x)


def _up_conv(x, kernel, stride, padding):
    return UpConv(1, kernel, stride, min(padding, kernel - 1))(x)


def _pool(x, window, stride, ceil):
    return max_pool(x, window, min(stride, window), window // 2 if ceil else 0, ceil)


def _resize(x, numerator, align_corners):
    size = (max(1, x.shape[1] * numerator // 2), max(1, x.shape[2] * numerator // 2))
    return resize_bilinear(x, size, align_corners=align_corners)


def _branches(x, dilation, axis):
    wide = Conv(1, 3, dilation=dilation)(x)
    if axis == 0:
        return wide + Conv(1, (1, 3))(x)
    return Conv(1, 1)(jnp.concatenate([x, wide, jnp.flip(x, axis)], axis=-1))


LAYERS = {
    "conv": _conv,
    "up_conv": _up_conv,
    "pool": _pool,
    "resize": _resize,
    "nearest": lambda x, n: resize_nearest(x, (n * x.shape[1], n * x.shape[2])),
    "branches": _branches,
    "move": lambda x, k: jnp.pad(jnp.flip(x, 1)[:, k:, :-1], ((0, 0), (0, 0), (k, 1), (0, 0))),
    "mean": lambda x, axis: x + jnp.mean(x, axis, keepdims=True),
}
SMALL = st.integers(1, 3)
LAYER = st.one_of(
    st.tuples(st.just("conv"), SMALL, SMALL, st.integers(0, 2), SMALL),
    st.tuples(st.just("up_conv"), st.integers(2, 4), st.integers(1, 2), st.integers(0, 1)),
    st.tuples(st.just("pool"), st.integers(2, 3), SMALL, st.booleans()),
    st.tuples(st.just("resize"), SMALL, st.booleans()),
    st.tuples(st.just("nearest"), st.integers(1, 2)),
    st.tuples(st.just("branches"), SMALL, st.integers(0, 2)),
    st.tuples(st.just("move"), SMALL),
    st.tuples(st.just("mean"), st.integers(1, 2)),
)


def poked(model, variables):
    """Returns bool [h, w, H, W]: which pixel, made huge, is felt by which unit.

    Weights are positive, so that nothing cancels, and a huge pixel wins every maximum.
    """
    images = 1e6 * np.eye(SIZE[0] * SIZE[1], dtype=np.float32).reshape(-1, *SIZE, 1)
    out = np.asarray(model.apply(variables, images, train=False)["out"])[..., 0]
    return (out > 0).reshape(*SIZE, *out.shape[1:]).transpose(2, 3, 0, 1)


def positive(model, size, channels=1):
    """Returns variables without negative weights, scaled to keep the signal's size."""

    def fill(path, leaf):
        name = path[-1].key
        if len(leaf.shape) > 1:
            return np.full(leaf.shape, 1 / np.prod(leaf.shape[:-1]), np.float32)
        return np.full(leaf.shape, float(name in ("scale", "var")), np.float32)

    shapes = contract.shapes_of(model, (1, *size, channels))[1]
    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.mark.slow
@settings(max_examples=10)
@given(st.lists(LAYER, min_size=1, max_size=4))
def test_every_unit_of_a_random_network_against_brute_force(layers):
    model = Chain(tuple(layers))
    try:
        variables = positive(model, SIZE)
    except (ValueError, TypeError):  # The image has become too small.
        return
    felt = poked(model, variables)
    (value,) = rf._trace(model, variables, SIZE, 1)[1].outputs
    assert isinstance(value, Seen)
    lines = [rf._line(bounds) for bounds in value]
    for unit in np.ndindex(felt.shape[:2]):
        pixels = np.argwhere(felt[unit])
        ends = [
            (low[min(i, len(low) - 1)], high[min(i, len(low) - 1)])
            for (low, high), i in zip(lines, unit, strict=True)
        ]
        if len(pixels):
            assert ends == list(zip(pixels.min(0), pixels.max(0), strict=True)), (layers, unit)
        else:
            assert any(low > high for low, high in ends), (layers, unit)


# ---------------------------------------------------------------- against gradients


def spread_out(x, switches, output_size, window, strides=None):
    """Stands for unpooling: a value goes to all places of its window, not to its switch alone."""
    x = jnp.repeat(jnp.repeat(x, window, 1), window, 2)
    return x[:, : output_size[0], : output_size[1]]


def support(model, size, output, unit):
    """Returns the pixels that a gradient reaches.

    Of each window a maximum passes its gradient to one pixel. On a ramp that falls to the right and
    downwards this is the upper left pixel in every layer, as weights are positive, and on one that
    rises the lower right.
    """
    variables = positive(model, size, 3)
    down, right = np.ogrid[: size[0], : size[1]]
    ramp = (down / size[0] + right / size[1]).astype(np.float32)
    images = np.stack([3 - ramp, 1 + ramp])[..., None] * np.ones(3, np.float32)

    @jax.jit
    def gradient(images):
        def total(images):
            out = model.apply(variables, images, train=False)[output]
            return jnp.sum(out[:, unit[0], unit[1]])

        return jax.grad(total)(images)

    pixels = np.argwhere(np.asarray(gradient(images)).any((0, 3)))
    return rf.Box(*pixels.min(0), *pixels.max(0))


ZOO = {
    "fcn8s": (fcn.fcn8s(num_classes=2, width=1 / 64, score_init="normal"), "logits", (512, 544)),
    "fcn32s": (
        fcn.fcn32s(num_classes=2, width=1 / 64, score_init="normal", pad_mode="same"),
        "logits",
        (480, 512),
    ),
    "alexnet": (
        fcn.fcn_alexnet(num_classes=2, width=1 / 48, score_init="normal"),
        "logits",
        (450, 421),
    ),
    "unet": (unet.unet(num_classes=2, width=2), "logits", (220, 236)),
    "unet_bilinear": (
        unet.unet_same(num_classes=2, width=2, up="bilinear_conv"),
        "logits",
        (256, 272),
    ),
    "unet_nearest": (unet.unet(num_classes=2, width=2, up="nearest_conv"), "logits", None),
    "segnet": (segnet.SegNet(num_classes=2, width=1 / 64), "logits", (480, 512)),
    "segnet_basic": (segnet.SegNetBasic(num_classes=2, width=1 / 32), "logits", (240, 256)),
    "segnet_bilinear": (
        segnet.SegNetBasic(num_classes=2, width=1 / 32, decoder="bilinear"),
        "logits",
        (240, 256),
    ),
    "deconvnet": (deconvnet.DeconvNet(num_classes=2, width=1 / 64), "logits", (832, 864)),
    "hypercolumns": (hypercolumns.Hypercolumns(num_classes=2, width=1 / 64), "logits", (480, 512)),
    "resnet50": (resnet.resnet50(width=1 / 16, output_stride=8), "layer4", (480, 496)),
}


FAST = ("fcn8s", "segnet_basic")


@pytest.mark.parametrize("name", members(ZOO, FAST))
def test_a_box_is_the_support_of_the_gradient(name, monkeypatch):
    model, output, size = ZOO[name]
    monkeypatch.setattr(segnet, "max_unpool", spread_out)
    monkeypatch.setattr(deconvnet, "max_unpool", spread_out)
    if size is None:
        size = (rf.fitting_side(model, 300),) * 2
    shape = contract.shapes_of(model, (1, *size, 3))[0][output].shape
    unit = (shape[1] // 2 + 1, shape[2] // 2 - 2)
    box = rf.box(model, size, unit, output=output)
    assert 0 < box.top < box.bottom < size[0] - 1
    assert 0 < box.left < box.right < size[1] - 1
    assert support(model, size, output, unit) == box


# ---------------------------------------------------------------- where branches meet


def offsets(model):
    return [m.offset for m in rf.analyse(model).meetings]


@pytest.mark.slow
def test_fcn_crops_are_right():
    for stride, number in ((32, 0), (16, 1), (8, 2)):
        model = fcn.FCN(num_classes=21, stride=stride)
        assert offsets(model) == [(0, 0)] * number
    assert offsets(fcn.fcn8s(num_classes=21, fuse="max")) == [(0, 0)] * 2
    assert offsets(fcn.fcn8s(num_classes=21, pad_mode="same")) == [(0, 0)] * 2


@pytest.mark.parametrize(
    ("wrong", "expected", "first"),
    [
        (0, [(16, 0), (0, 0)], 0),  # The crop of pool4, whose units are 16 pixels apart.
        (1, [(0, 0), (8, 0)], 0),
        (2, [(0, 0), (0, 0)], 1),  # The logits' own: a shift against the labels.
    ],
)
def test_a_crop_one_unit_off_is_found(monkeypatch, wrong, expected, first):
    crop, calls = fcn._crop, []

    def shifted(x, offset, size):
        calls.append(None)
        if (len(calls) - 1) % 3 != wrong:
            return crop(x, offset, size)
        return x[:, offset + 1 : offset + 1 + size[0], offset : offset + size[1]]

    monkeypatch.setattr(fcn, "_crop", shifted)
    found = rf.analyse(fcn.fcn8s(num_classes=21))
    assert [m.offset for m in found.meetings] == expected
    assert [m.is_aligned() for m in found.meetings] == [e == (0, 0) for e in expected]
    logits = found.field("logits")
    assert (logits.rows.first, logits.columns.first) == (first, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        unet.unet(num_classes=2, width=4),
        segnet.SegNetBasic(num_classes=11, width=1 / 16, decoder="fcn"),
        hypercolumns.Hypercolumns(num_classes=21, width=1 / 16),
        pytest.param(resnet.resnet50(output_stride=16), marks=pytest.mark.slow),
    ],
    ids=lambda model: type(model).__name__,
)
def test_branches_of_the_other_networks_are_aligned(model):
    meetings = rf.analyse(model).meetings
    assert meetings
    assert all(m.is_aligned() for m in meetings)


def test_a_bilinear_kernel_of_odd_size_is_half_a_pixel_off():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            x = max_pool(images, 2)
            up = UpConv(1, 3, 2, padding=1, output_padding=1, name="up")(x)
            return {"out": up + Conv(1, 1)(images)}

    (meeting,) = rf.analyse(Odd()).meetings
    assert meeting.primitive == "add"
    assert meeting.offset == (-0.5, -0.5)
    assert not meeting.is_aligned()


def test_torchvision_enlarges_half_a_unit_off_and_aligned_corners_do_not():
    class Enlarged(nn.Module):
        align_corners: bool

        @nn.compact
        def __call__(self, images, *, train):
            x = Conv(1, 3, 8, padding=1)(images)  # Unit i at pixel 8i, as in ResNet.
            return {"out": resize_bilinear(x, images.shape[1:3], align_corners=self.align_corners)}

    half, corners = (rf.analyse(Enlarged(a)) for a in (False, True))
    assert half.field("out").rows == rf.Axis(11, 1, -3.5, True)
    assert corners.side == half.side + 1  # Aligned corners are even on 8m + 1 pixels.
    assert corners.field("out").rows == rf.Axis(11, 1, 0, True)


# ---------------------------------------------------------------- limits


class Odds(nn.Module):
    """A local map, one normalised over the whole image, a sum over the rows above, a number."""

    @nn.compact
    def __call__(self, images, *, train):
        x = Conv(4, 3)(images)
        whole = nn.GroupNorm(2)(x)
        return {
            "local": x,
            "whole": whole,
            "above": jnp.cumsum(x, 1),
            "behind": 2 * jnp.cumsum(x, 1),
            "switch": jnp.argmax(x, -1),
            "number": jnp.mean(x, (1, 2)),
        }


def test_whole_images_and_unknown_operations():
    found = rf.analyse(Odds())
    assert found.field("local").rows.size == 3
    assert found.field("whole").columns.size is None
    assert found.field("number").rows.size is None
    assert found.fields["above"] == found.fields["behind"] == "cumsum"
    assert "switch" not in found.fields  # No gradient passes.
    with pytest.raises(UserError, match="'behind' is unknown, because the operation 'cumsum'"):
        found.field("behind")
    with pytest.raises(UserError, match="no map 'logits': it has local, whole"):
        found.field("logits")
    with pytest.raises(UserError, match="no map 'logits'"):
        rf.box(Odds(), (32, 32))


def test_a_loop_is_walked_through():
    class Loop(nn.Module):
        def __call__(self, images, *, train):
            def grow(x, weight):
                return jnp.pad(x[:, 2:], ((0, 0), (0, 2), (0, 0), (0, 0))) * weight + x, x[:, :, :1]

            x, items = jax.lax.scan(grow, images, jnp.arange(1.0, 4.0))
            return {"out": x, "edge": items[-1]}

    assert rf.box(Loop(), (40, 40), (5, 5), output="out") == rf.Box(5, 5, 11, 5)
    found = rf.analyse(Loop())
    assert found.field("out").rows == rf.Axis(7, 1, 3, True)
    assert found.field("edge").rows == rf.Axis(5, 1, 2, True)
    assert found.field("edge").columns.size == 1


def test_a_loop_reads_its_constants_and_may_run_backwards():
    class Loop(nn.Module):
        def __call__(self, images, *, train):
            def shift(x, scale):
                moved = jnp.pad(x[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
                return moved, scale * (moved + images)  # A constant of the loop is the image.

            x, items = jax.lax.scan(shift, images, jnp.arange(1.0, 4.0), reverse=True)
            return {"out": x, "last": items[0], "first": items[-1]}

    model = Loop()
    assert rf.box(model, (40, 40), (5, 5), output="out") == rf.Box(8, 5, 8, 5)
    assert rf.box(model, (40, 40), (5, 5), output="last") == rf.Box(5, 5, 8, 5)
    assert rf.box(model, (40, 40), (5, 5), output="first") == rf.Box(5, 5, 6, 5)


def test_a_checkpoint_is_walked_through():
    class Checkpoint(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            return {"out": nn.remat(Conv)(1, 3)(jax.checkpoint(lambda x: x[:, 1:-1])(images))}

    assert rf.analyse(Checkpoint()).field("out").rows == rf.Axis(3, 1, 1, True)


def test_a_network_that_takes_no_such_image():
    class Picky(nn.Module):
        def __call__(self, images, *, train):
            raise ValueError("images have 28 pixels")

    with pytest.raises(UserError, match=r"no image of 1024 to 1087 pixels fits .*: images have 28"):
        rf.analyse(Picky())


# ---------------------------------------------------------------- effective fields


def test_ten_uniform_layers_have_the_variance_of_ten_boxes():
    model, images = Layers((1,) * 10), np.zeros((1, 41, 45, 1), np.float32)
    field = rf.effective_field(model, positive(model, (41, 45)), images, (20, 21), output="out")
    found = rf.spread(np.sqrt(field))  # The gradient itself is a Gaussian; `spread` squares.
    np.testing.assert_allclose(found.centre, (20, 21), atol=1e-4)
    np.testing.assert_allclose(np.square(found.deviation), 10 * (3**2 - 1) / 12, rtol=1e-4)
    rows = np.flatnonzero(field.any(1))
    assert (rows[0], rows[-1]) == (10, 30)  # 21 pixels are seen, most of them hardly.
    assert rf.box(model, (41, 45), (20, 21), output="out", channels=1) == rf.Box(10, 11, 30, 31)


@pytest.mark.parametrize("dilations", [(1, 2, 4), (1, 1, 2, 4, 8)])
def test_random_weights_spread_squares_as_even_ones_spread_values(dilations):
    model, size, rng = Layers(dilations, features=4), (64, 64), np.random.default_rng(0)
    image, squares = np.zeros((1, *size, 1), np.float32), np.zeros(size)
    shapes = positive(model, size)
    for seed in range(60):
        variables = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
        squares += rf.effective_field(model, variables, image, output="out", seed=seed) ** 2
    variance = sum(d**2 for d in dilations) * (3**2 - 1) / 12
    found = rf.spread(np.sqrt(squares))
    np.testing.assert_allclose(np.square(found.deviation), variance, rtol=0.1)


def test_signs_keep_channels_from_hiding_one_another():
    class Opposite(nn.Module):
        def __call__(self, images, *, train):
            return {"logits": jnp.concatenate([images, -images], axis=-1)}

    images = np.ones((8, 5, 5, 1), np.float32)
    field = rf.effective_field(Opposite(), {}, images)
    assert field[2, 2] > 0
    assert field.sum() == field[2, 2]


def test_the_sizes_of_a_gaussian():
    y, x = np.mgrid[-60:61, -60:61]
    found = rf.spread(np.exp(-(y**2) / (2 * 8**2) - x**2 / (2 * 6**2)))
    np.testing.assert_allclose(np.multiply(found.deviation, np.sqrt(2)), (8, 6), rtol=1e-3)
    # 4.55 % of the maximum is reached at sqrt(-2 ln 0.0455) = 2.486 deviations.
    np.testing.assert_allclose(found.side, np.sqrt(np.pi * 8 * 6) * 2.486, rtol=0.01)
    with pytest.raises(ValueError, match="no gradient"):
        rf.spread(np.zeros((3, 3)))


def test_kernels_that_start_at_zero_are_drawn():
    class Zero(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            return {"logits": Conv(2, 3, kernel_init=init.zero, name="score")(images)}

    params = rf.random_variables(Zero(), (8, 8))["params"]["score"]
    assert np.all(params["kernel"])
    assert not np.any(params["bias"])


# ---------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_prints_the_table_and_draws(tmp_path, capsys):
    picture, photo = tmp_path / "field.png", tmp_path / "photo.png"
    Image.fromarray(np.full((40, 80, 3), 128, np.uint8)).save(photo)
    command.run(
        script="experiments.segnet",
        preset="smoke",
        num_classes=2,
        output=("pool1",),
        effective=True,
        image=(photo,),
        out=picture,
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["map", "size", "stride", "centre", "of", "unit", "0"]
    assert lines[1].split() == ["pool1", "8", "2", "0.5"]
    assert "pool1, random weights: sees 8 x 8" in lines[-2]
    assert lines[-1] == f"picture: {picture}"
    drawn = np.asarray(Image.open(picture))
    assert drawn.shape == (360 + 44, 360, 3)
    assert np.any(drawn[44:] == 255)


def test_the_table_names_shifts_and_what_is_not_known():
    axis = rf.Axis(5, 2, 0.5, True)
    field, other = rf.Field(axis, axis), rf.Field(axis._replace(size=9), axis)
    uneven = rf.Field(axis._replace(is_even=False, first=1 / 3), axis)
    whole = rf.Field(axis._replace(size=None), axis)
    fields = {"a": field, "b": other, "c": uneven, "d": whole, "e": "cumsum"}
    meetings = [
        rf.Meeting("add", "", (field, other), (0, 0)),
        rf.Meeting("concatenate", "Net", (field, other), (0, -1.5)),
    ]
    analysis = rf.Analysis(64, fields, meetings)
    assert command.format_analysis(analysis).splitlines() == [
        "map               size  stride  centre of unit 0",
        "a                    5       2               0.5",
        "b                9 x 5       2               0.5",
        "c                    5  ~2 x 2   ~0.333333 x 0.5",
        "d          whole image",
        "e    not known: cumsum",
        "branches meet at 2 places, aligned at 1",
        "shifted by 0 down, -1.5 right: concatenate of fields of 5 and 9 in Net",
    ]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"out": pathlib.Path("a.jpg")}, "ends in .png"),
        ({"num_noise": 0}, "--num-noise=0"),
        ({"preset": "smoke", "output": ("nothing",)}, "no map 'nothing': it has conv1_1"),
        ({"preset": "nothing"}, "has no preset nothing: give paper"),
    ],
)
def test_mistakes_on_the_command_line(options, match):
    with pytest.raises(UserError, match=match):
        command.run(**options)


def test_the_picture_of_growth():
    drawn = figures.growth([(1,), (2, 2)], size=15, num_images=2)
    assert drawn.shape == (300 + 44, 2 * 300 + 12, 3)
    assert drawn.dtype == np.uint8
