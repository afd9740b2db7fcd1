"""Overlap counts, the spectral measure, and the layers that are compared."""

import dataclasses
import json
from typing import Any, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.analysis import checkerboard, decoders
from dense_jax.analysis.checkerboard_figures import levels
from dense_jax.errors import UserError
from dense_jax.layers.upsample import Kind, Upsample2x, depth_to_space
from experiments import conv_arithmetic

KINDS = get_args(Kind)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filled(kind, features, channels):
    """A layer with parameters from NumPy, and its variables."""
    layer = Upsample2x(features, kind)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 4, 4, channels)))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    values = [rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    return layer, jax.tree.unflatten(tree, values)


@pytest.mark.parametrize(
    ("kernel", "stride", "counts"),
    [
        (3, 2, [1, 1, 2, 1, 2, 1, 2, 1, 1]),
        (4, 2, [1, 1, 2, 2, 2, 2, 2, 2, 1, 1]),
        (2, 2, [1] * 8),
        (2, 3, [1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1]),
    ],
)
def test_overlap_map(kernel, stride, counts):
    """Fact 5, with what happens at the edges."""
    got = checkerboard.overlap_map(kernel, stride, 4)
    np.testing.assert_array_equal(got, np.outer(counts, counts))


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 6])
def test_overlap_is_even_iff_the_stride_divides_the_kernel(kernel, stride):
    counts = checkerboard.inner_counts(kernel, stride)
    axis = [sum((x - j) % stride == 0 for j in range(kernel)) for x in range(stride)]
    np.testing.assert_array_equal(counts, np.outer(axis, axis))
    assert (len(np.unique(counts)) == 1) == (kernel % stride == 0)


def test_overlap_of_two_dimensions_multiplies():
    assert sorted(checkerboard.inner_counts(3, 2).ravel()) == [1, 2, 2, 4]


@pytest.mark.parametrize("period", [2, 3, 4])
def test_energy_of_a_known_pattern(period):
    """1 + e cos(2 pi x / s): a share of e^2 / (2 + e^2); twice that for s = 2, of one line."""
    x = np.arange(96)
    wave = np.cos(2 * np.pi * x / period)
    images = np.stack([np.full((96, 96, 1), 5.0), np.zeros((96, 96, 1))])
    images[1] = np.broadcast_to((1 + 0.1 * wave)[:, None, None], (96, 96, 1))
    power = 0.01 if period == 2 else 0.005
    share = checkerboard.energy_share(images, period)
    np.testing.assert_allclose(share, [0, power / (1 + power)], rtol=1e-3, atol=1e-9)


def test_energy_of_smooth_images_is_elsewhere():
    rows, columns = np.mgrid[:64, :64] / 64
    ramp = (rows + 2 * columns + np.sin(2 * np.pi * rows))[None, :, :, None]
    smooth = checkerboard.energy_share(ramp)
    assert checkerboard.decibels(smooth)[0] < -60  # although opposite edges differ
    pattern = ramp * (1 + 0.05 * (-1) ** np.arange(64)[:, None, None])
    # The pattern follows the image's brightness, so its energy is 0.05^2 of the image's.
    np.testing.assert_allclose(checkerboard.energy_share(pattern), 0.05**2, rtol=0.01)
    assert checkerboard.energy_share(np.zeros((1, 32, 32, 1))) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_upsampling_doubles_and_is_local(kind):
    layer, variables = filled(kind, 5, 3)
    x = normal(1, 6, 6, 3)
    run: Any = jax.jit(layer.apply)
    y = run(variables, x)
    chex.assert_shape(y, (1, 12, 12, 5))
    # Pixel (2, 3) of the input lies at (4..5, 6..7) of the output and reaches two pixels further.
    other = x.copy()
    other[0, 2, 3] += 1
    changed = np.any(np.abs(run(variables, other) - y) > 1e-3, axis=(0, 3))
    rows, columns = np.nonzero(changed)
    assert changed[4:6, 6:8].all()
    assert rows.min() >= 2
    assert rows.max() <= 7
    assert columns.min() >= 4
    assert columns.max() <= 9


@pytest.mark.parametrize(
    ("kind", "taps"), [*zip(KINDS, (4, 9, 16, 9, 9, 36), strict=True)], ids=KINDS
)
def test_parameters(kind, taps):
    """Resizing then a 3x3 convolution holds as much as a 3x3 up-convolution."""
    _, variables = filled(kind, 5, 3)
    bias = 20 if kind == "subpixel" else 5
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 15 * taps + bias


@pytest.mark.parametrize("kind", KINDS)
def test_which_kinds_show_a_pattern_on_a_constant_image(kind):
    layer, variables = filled(kind, 3, 2)
    y: Any = layer.apply(variables, jnp.ones((1, 24, 24, 2)))
    level = checkerboard.decibels(checkerboard.energy_share(checkerboard.interior(y, 4)))
    if kind.startswith("resize"):
        assert level < -90  # whatever the weights are
    else:
        assert level > -20  # random weights


def test_edges_of_a_resized_constant_stay_constant():
    """The padding comes before the convolution and repeats the edge."""
    for kind in ("resize_nearest_conv", "resize_bilinear_conv"):
        layer, variables = filled(kind, 3, 2)
        y = np.asarray(layer.apply(variables, jnp.ones((1, 5, 5, 2))))
        np.testing.assert_allclose(y, np.broadcast_to(y[:, :1, :1], y.shape), rtol=1e-5)


def test_subpixel_is_an_up_convolution():
    """Depth to space is the k = s = 2 up-convolution that puts each channel at its place."""
    x = normal(2, 3, 4, 8)
    y = depth_to_space(jnp.asarray(x), 2)
    chex.assert_shape(y, (2, 6, 8, 2))
    for a, b in np.ndindex(2, 2):
        block = 2 * (2 * a + b)
        np.testing.assert_array_equal(y[:, a::2, b::2], x[..., block : block + 2])
    with pytest.raises(ValueError, match="6 channels"):
        depth_to_space(jnp.zeros((1, 2, 2, 6)), 2)


@pytest.mark.parity
def test_depth_to_space_matches_torch():
    torch = pytest.importorskip("torch")
    x = normal(2, 3, 4, 8)
    # torch counts channels (c, a, b), we (a, b, c).
    ours = x.reshape(2, 3, 4, 2, 2, 2).transpose(0, 5, 3, 4, 1, 2).reshape(2, 8, 3, 4)
    theirs = torch.nn.functional.pixel_shuffle(torch.tensor(ours), 2).numpy()
    got = depth_to_space(jnp.asarray(x), 2)
    np.testing.assert_array_equal(got, theirs.transpose(0, 2, 3, 1))


def test_gradient_of_a_strided_convolution_is_the_overlap_map():
    gradient = checkerboard.gradient_map("conv", 3, 2, 9, seed=None)
    np.testing.assert_array_equal(gradient[0, :, :, 0], checkerboard.overlap_map(3, 2, 4))


@pytest.mark.slow
def test_gradients_that_show_a_pattern():
    levels = checkerboard.gradient_levels(2)
    ones = {name: ones for name, (_, ones) in levels.items() if ones is not None}
    for name, level in ones.items():
        assert (level < -90) == (name in ("conv k2 s2", "conv k4 s2"))  # even overlap
    random = {name: level for name, (level, _) in levels.items()}
    assert all(level > -12 for name, level in random.items() if name.startswith("conv"))
    # Pooling's are high, but spread over all frequencies.
    assert random["max pool k2 s2"] < random["conv k3 s2"]


def test_unknown_kind_is_named():
    kind: Any = "magic"
    with pytest.raises(ValueError, match="'magic'"):
        Upsample2x(2, kind).init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))


def test_probes_hold_no_detail():
    for name, x in checkerboard.probes().items():
        assert np.abs(x).max() <= 1
        assert checkerboard.decibels(checkerboard.energy_share(x)).max() < -50, name


def test_plot_has_a_dot_for_each_level():
    svg = levels({"a": [(-10.0, -50.0), (-12.0, -60.0)], "b": [(-1.0, -2.0)]}, ("one", "two")).svg()
    dots = sum(line.count("z") for line in svg.splitlines() if 'stroke="#ffffff"' in line)
    assert dots == 2 * 3 + 2  # and the legend
    assert all(f">{word}</text>" in svg for word in ("a", "b", "one", "two", "-20 dB"))


def test_pictures_are_reduced_by_means():
    images = np.random.default_rng(0).integers(256, size=(2, 8, 12, 3), dtype=np.uint8)
    small, large = decoders.pictures(list(images))
    chex.assert_shape((small, large), [(2, 2, 3, 3), (2, 8, 12, 3)])
    np.testing.assert_allclose(large, images / 255 - 0.5, atol=1e-6)
    np.testing.assert_allclose(small[1, 1, 2], large[1, 4:8, 8:].mean((0, 1)), atol=1e-6)


@pytest.mark.slow  # the smoke preset, whose parts are tried above
def test_comparison_leaves_table_plot_and_pictures(tmp_path, capsys):
    config = dataclasses.replace(
        conv_arithmetic.COMMANDS["smoke"][1],
        workdir=str(tmp_path / "new" / "folder"),
        figures=False,
        upsample=("deconv_k3s2", "resize_nearest_conv"),
        num_seeds=2,
    )
    with jax.numpy_dtype_promotion("standard"):  # Adam counts its steps in integers
        conv_arithmetic.main(config)
    folder = tmp_path / "new" / "folder"
    record = json.loads((folder / "checkerboard.json").read_text())
    assert record["config"]["num_steps"] == 2
    rows = {(row["upsample"], row["seed"]): row for row in record["rows"]}
    assert set(rows) == {(kind, seed) for kind in config.upsample for seed in (0, 1)}
    for (kind, _), row in rows.items():
        for state in ("untrained", "trained"):
            assert (row[f"{state}_constant"] < -80) == kind.startswith("resize")
    assert rows["deconv_k3s2", 0] != rows["deconv_k3s2", 1]
    table = (folder / "checkerboard.md").read_text()
    assert table in capsys.readouterr().out
    assert "| deconv_k3s2 | 519 | " in table
    for name in ("checkerboard.svg", "checkerboard.png", "checkerboard_outputs.png"):
        assert (folder / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"num_seeds": 0}, "--num-seeds=0"),
        ({"width": 0}, "--width=0"),
        ({"learning_rate": 0.0}, "--learning-rate=0"),
        ({"upsample": ()}, "--upsample is empty"),
    ],
)
def test_impossible_flags_name_themselves(flags, match):
    with pytest.raises(UserError, match=match):
        conv_arithmetic.Config(**flags)
