"""The guide's formulas against the layers, and the pictures against the arithmetic."""

import collections
import pathlib
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dense_jax.analysis import arithmetic, arithmetic_tables, figures
from dense_jax.analysis.arithmetic import INSERTED, PADDING, RELATIONSHIPS, Layer
from dense_jax.analysis.drawing import Drawing, mix
from dense_jax.layers.conv import conv
from dense_jax.models.vgg import Grid

ROOT = pathlib.Path(__file__).parent.parent

# The worked example of the guide's first figure.
IMAGE = np.array(
    [[3, 3, 2, 1, 0], [0, 0, 1, 3, 1], [3, 1, 2, 2, 3], [2, 0, 0, 2, 2], [2, 0, 0, 0, 1]],
    np.float32,
)
KERNEL = np.array([[0, 1, 2], [2, 2, 0], [0, 1, 2]], np.float32)
OUTPUT = [[12, 12, 17], [10, 17, 19], [9, 6, 14]]

LAYERS = [
    Layer(size=5, kernel=3),
    Layer(size=5, kernel=3, stride=2, padding=1),
    Layer(size=6, kernel=4, stride=3, padding=2),
    Layer(size=7, kernel=3, dilation=3),
    Layer(size=2, kernel=3, kind="up_conv"),
    Layer(size=3, kernel=3, stride=2, padding=1, remainder=1, kind="up_conv"),
    Layer(size=3, kernel=2, stride=3, remainder=2, kind="up_conv"),
    Layer(size=3, kernel=3, stride=2, padding=1, dilation=2, kind="up_conv"),
]


def name(layer):
    return f"{layer.kind}-i{layer.size}-k{layer.kernel}-s{layer.stride}-d{layer.dilation}"


def image(size):
    return np.arange(1, size * size + 1, dtype=np.float32).reshape(size, size)


def test_the_worked_example_of_the_guide():
    np.testing.assert_array_equal(Layer(size=5, kernel=3).image(IMAGE, KERNEL), OUTPUT)


@pytest.mark.parametrize("row", RELATIONSHIPS, ids=lambda r: f"{r.number}: {r.case}")
def test_relationship_gives_the_size_of_the_layer(row):
    layers = list(arithmetic.layers(row, 5))
    assert len(layers) >= 8
    for layer in layers:
        assert row.size(layer) == layer.output_size, layer
    # Sizes above are traced; the largest of these layers runs as well.
    layer = layers[-1]
    x, kernel = np.ones((1, layer.size, layer.size, 1)), np.ones((layer.kernel,) * 2 + (1, 1))
    y = layer(x.astype(np.float32), kernel.astype(np.float32))
    assert y.shape == (1, row.size(layer), row.size(layer), 1)


def test_there_are_fifteen_relationships():
    assert [row.number for row in RELATIONSHIPS] == list(range(1, 16))


@pytest.mark.parametrize("forward", [Layer(size=i, kernel=3, stride=2, padding=1) for i in (5, 6)])
def test_the_remainder_brings_the_size_back(forward):
    """Fact 2: i = 5 and i = 6 both give 3; a = 0 and a = 1 tell them apart on the way back."""
    assert forward.output_size == 3
    a = (forward.size + 2 * forward.padding - forward.kernel) % forward.stride
    assert a == forward.size - 5
    back = Layer(size=3, kernel=3, stride=2, padding=1, remainder=a, kind="up_conv")
    assert back.output_size == forward.size


def test_first_layer_and_pooling_of_resnet():
    """Fact 1: 224 to 112; a 3/2/1 pooling then gives 56 (57 by ceil, tests/test_pool.py)."""
    assert Layer(size=224, kernel=7, stride=2, padding=3).output_size == 112
    assert Layer(size=112, kernel=3, stride=2, padding=1, kind="max_pool").output_size == 56


@pytest.mark.parametrize(("d", "span"), [(1, 3), (2, 5), (3, 7), (12, 25), (24, 49)])
def test_nine_taps_over_the_span(d, span):
    """Fact 3, and the lecture's: a 3x3 kernel dilated by 3 has nine taps over 7x7."""
    layer = Layer(size=span, kernel=3, dilation=d)
    assert layer.span == span
    assert layer.output_size == 1
    reached = arithmetic.copies(layer, np.ones((span, span), np.float32), np.ones((3, 3)))
    rows, columns = np.nonzero(reached[:, :, 0, 0])
    assert len(rows) == 9
    assert set(rows) == set(columns) == {0, d, 2 * d}


@pytest.mark.parametrize("layer", LAYERS, ids=name)
def test_wiring_is_the_formula_of_the_layer(layer):
    """conv reads x[s o + d k - p]; up_conv adds to y[s i + d k - p]."""
    wiring = arithmetic.wiring(layer)
    assert wiring.shape == (layer.output_size,) * 2 + (layer.size,) * 2 + (layer.kernel,) * 2
    o, i, k = np.ogrid[: layer.output_size, : layer.size, : layer.kernel]
    s, p, d = layer.stride, layer.padding, layer.dilation
    axis = i == s * o + d * k - p if layer.kind == "conv" else o == s * i + d * k - p
    np.testing.assert_array_equal(wiring, np.einsum("oik,pjl->opijkl", axis, axis))


def test_wiring_of_pooling_is_its_windows():
    wiring = arithmetic.wiring(Layer(size=5, kernel=3, stride=2, padding=1, kind="max_pool"))
    counts = wiring.sum((2, 3, 4, 5))
    np.testing.assert_array_equal(counts, np.outer([2, 3, 2], [2, 3, 2]))


@pytest.mark.parametrize("layer", LAYERS, ids=name)
def test_direct_form_equals_the_layer(layer):
    """Stretched and padded, an up-convolution is a convolution with a turned kernel."""
    x, kernel = image(layer.size), image(layer.kernel) ** 2
    cells = arithmetic.laid_out(layer)
    values = np.where(cells >= 0, x.ravel()[np.maximum(cells, 0)], 0)
    turned = kernel[::-1, ::-1] if layer.kind == "up_conv" else kernel
    direct = arithmetic.direct(layer)
    np.testing.assert_array_equal(direct.image(values, turned), layer.image(x, kernel))
    # The taps drawn on pixels are those of the layer itself.
    taps = arithmetic.wiring(direct)
    taps = taps[..., ::-1, ::-1] if layer.kind == "up_conv" else taps
    own = arithmetic.wiring(layer)
    for row, column in np.argwhere(cells >= 0):
        i, j = divmod(cells[row, column], layer.size)
        np.testing.assert_array_equal(taps[:, :, row, column], own[:, :, i, j])


def test_inserted_zeros_of_a_fractional_stride():
    cells = arithmetic.laid_out(Layer(size=3, kernel=3, stride=2, padding=1, kind="up_conv"))
    assert cells.shape == (7, 7)
    np.testing.assert_array_equal(cells[1, 1:6], [0, INSERTED, 1, INSERTED, 2])
    assert set(cells[0]) == {PADDING}
    assert np.sum(cells == INSERTED) == 25 - 9


def test_pooling_has_no_direct_form():
    with pytest.raises(ValueError, match="minus infinity"):
        arithmetic.laid_out(Layer(size=4, kernel=2, kind="max_pool"))


@pytest.mark.parametrize("layer", [g for g in LAYERS if g.kind == "conv"], ids=name)
def test_up_conv_has_the_transposed_matrix(layer):
    kernel = image(layer.kernel)
    w = arithmetic.matrix(layer, kernel)
    assert w.shape == (layer.output_size**2, layer.size**2)
    a = (layer.size + 2 * layer.padding - layer.span) % layer.stride
    up = Layer(
        size=layer.output_size,
        kernel=layer.kernel,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        remainder=a,
        kind="up_conv",
    )
    np.testing.assert_array_equal(arithmetic.matrix(up, kernel), w.T)


def test_copies_are_weighted_kernels_that_sum_to_the_output():
    layer = Layer(size=2, kernel=3, stride=2, kind="up_conv")
    x, kernel = image(2), image(3)
    copies = arithmetic.copies(layer, x, kernel)
    for i, j in np.ndindex(2, 2):
        expected = np.zeros((5, 5))
        expected[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] = x[i, j] * kernel
        np.testing.assert_array_equal(copies[i, j], expected)
    np.testing.assert_array_equal(copies.sum((0, 1)), layer.image(x, kernel))
    overlap = arithmetic.overlap(layer)
    np.testing.assert_array_equal(overlap, np.outer([1, 1, 2, 1, 1], [1, 1, 2, 1, 1]))
    np.testing.assert_array_equal(overlap, np.sum(copies > 0, (0, 1)))


def seen_by_the_centre(dilations):
    """The gradient of one output of 3x3 mean filters in a row with respect to their input."""
    size = 2 * sum(dilations) + 5
    kernel = jnp.full((3, 3, 1, 1), 1 / 9, jnp.float32)

    def centre(x):
        for dilation in dilations:
            x = conv(x, kernel, dilation=dilation)
        return x[0, size // 2, size // 2, 0]

    return np.asarray(jax.grad(centre)(jnp.zeros((1, size, size, 1))))[0, :, :, 0]


@pytest.mark.parametrize(("dilations", "field"), [((1, 2, 4), 15), ((1, 1, 2, 4, 8, 16), 65)])
def test_receptive_field_of_dilated_layers(dilations, field):
    """Fact 6: without gaps, and not a pixel more."""
    seen = seen_by_the_centre(dilations) > 0
    assert np.sum(seen) == field**2
    np.testing.assert_array_equal(np.flatnonzero(seen.any(0)), np.arange(field) + 2)


def test_gradient_of_uniform_layers_spreads_by_the_root_of_their_number():
    """Fact 7: ten layers see 21 pixels; the variance is 10 (9 - 1) / 12."""
    share = seen_by_the_centre((1,) * 10).sum(0)
    place = np.arange(len(share)) - len(share) // 2
    assert np.count_nonzero(share) == 21
    assert np.sum(share) == pytest.approx(1, rel=1e-5)
    assert np.sum(share * place**2) == pytest.approx(20 / 3, rel=1e-5)


def test_receptive_field_of_resnet_101():
    """Fact 8, with the stride in the first 1x1 layer; that of VGG-16 is in tests/test_vgg.py."""
    grid = Grid().conv(7, 2, 3).conv(3, 2, 1)
    for stage, depth in enumerate((3, 4, 23, 3)):
        for block in range(depth):
            stride = 2 if stage and block == 0 else 1
            grid = grid.conv(1, stride).conv(3, 1, 1).conv(1)
    assert grid == Grid(0, 32, 1027)


@pytest.fixture(scope="module")
def drawn():
    """Every figure as (SVG text, its strings counted)."""
    svgs = {name: build().svg() for name, build in figures.FIGURES.items()}
    return {name: (svg, strings(svg)) for name, svg in svgs.items()}


def strings(svg):
    root = ElementTree.fromstring(svg)
    return collections.Counter(e.text for e in root.iter() if e.tag.endswith("text"))


@pytest.mark.slow
@pytest.mark.parametrize("name", figures.FIGURES)
def test_figure_is_compact_alone_and_the_one_in_the_documentation(name, drawn):
    svg, _ = drawn[name]
    assert len(svg) < 60_000
    assert not any(word in svg.replace("http://www.w3.org/2000/svg", "") for word in ("http", "<a"))
    documented = ROOT / "docs" / "figures" / f"{name}.svg"
    assert documented.read_text() == svg, "run: python -m experiments.conv_arithmetic figures"
    assert f"figures/{name}.svg" in (ROOT / "docs" / "conv_arithmetic.md").read_text()


def test_figures_show_the_sizes_and_sums_of_the_layers(drawn):
    _, words = drawn["no_padding"]
    products = "0*3 + 1*3 + 2*2 + 2*0 + 2*0 + 0*1 + 0*3 + 1*1 + 2*2 = 12"
    assert words[products.replace("*", "\u00b7")] == 1
    assert words["o = i - k + 1;   i = 5, k = 3, s = 1, p = 0:   o = 3"] == 1
    _, words = drawn["fractional_stride"]
    assert words["input 3 x 3, 1 zero between pixels, padding k - 1 - p = 1"] == 2
    assert words["output 5 x 5"] == 2
    _, words = drawn["dilation"]
    assert all(words[f"d = {d}: 9 taps over {2 * d + 1} x {2 * d + 1}"] == 1 for d in (1, 2, 3))
    _, words = drawn["weight_matrix"]
    assert all(words[str(tap)] >= 1 + 4 + 4 for tap in range(1, 10))  # kernel, W, W^T
    _, words = drawn["weighted_copies"]
    assert words["12"] == 1  # 2 x 2 + 8: the kernel's corner under two copies


def test_inserted_zeros_are_drawn_apart_from_padding(drawn):
    svg, _ = drawn["fractional_stride"]
    dashed = [line for line in svg.splitlines() if "dasharray" in line and "#94a3b8" in line]
    assert sum(line.count("z") for line in dashed) == 2 * (49 - 25)
    # Two windows with 16 inserted zeros, of which 3 x 3 windows cover some in another colour.
    plain = [line for line in svg.splitlines() if 'fill="#eef1f5"' in line]
    assert 0 < sum(line.count("z") for line in plain) < 2 * 16


def test_animation_shows_every_output():
    frames = figures.animation("transposed_full")
    assert len(frames) == 9
    assert {frame.dtype.name for frame in frames} == {"uint8"}
    assert all(np.any(frame != frames[0]) for frame in frames[1:])


@pytest.mark.slow
def test_figures_are_saved_as_svg_png_and_gif(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {"wiring": figures.FIGURES["wiring"]})
    monkeypatch.setattr(figures, "ANIMATIONS", ("transposed_full",))
    figures.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"wiring.svg", "wiring.png"}
    figures.save(tmp_path, animate=True)
    with Image.open(tmp_path / "transposed_full.gif") as gif:
        assert getattr(gif, "n_frames", 1) == 9
    drawing = figures.FIGURES["wiring"]()
    assert (tmp_path / "wiring.svg").read_text() == drawing.svg()
    with Image.open(tmp_path / "wiring.png") as png:
        np.testing.assert_array_equal(np.asarray(png), drawing.picture())


def test_drawing_writes_the_same_shapes_as_svg_and_pixels():
    drawing = Drawing(40, 30, "a < b")
    drawing.rectangle(10, 5, 20, 10, fill="#ff0000")
    drawing.rectangle(10, 15, 20, 10, fill="#ff0000")
    drawing.polygon([(0, 29), (40, 29)], stroke="#0000ff", width=2, dashed=True)
    svg = drawing.svg()
    assert "<title>a &lt; b</title>" in svg
    assert 'd="M10 5h20v10h-20zM10 15h20v10h-20z"' in svg  # like shapes share one element
    picture = drawing.picture(2)
    assert picture.shape == (60, 80, 3)
    assert picture[20, 30].tolist() == picture[40, 30].tolist() == [255, 0, 0]
    assert picture[20, 70].tolist() == [255, 255, 255]
    blue = np.all(picture[57] == [0, 0, 255], axis=1)
    assert 0 < blue.sum() < 80  # dashes
    assert mix("#000000", "#ff8000", 0.5) == "#804000"


def test_sizes_table_has_every_relationship():
    table = arithmetic_tables.sizes()
    assert all(f"| {row.number} | {row.case} |" in table for row in RELATIONSHIPS)
    assert table in (ROOT / "docs" / "conv_arithmetic.md").read_text()
