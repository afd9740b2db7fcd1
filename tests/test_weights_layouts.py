"""Layouts of files, each against the product that its axes stand for, and constants in files."""

import chex
import jax
import numpy as np
import pytest

from dense_jax.errors import UserError
from dense_jax.weights import layouts, rules
from dense_jax.weights.rules import Rule

# How a file's kernel, its axes named, meets a patch [h, w, i].
LAYOUTS = {
    "conv": ("oihw,hwi->o", (2, 3)),
    "conv_ohwi": ("ohwi,hwi->o", (1, 2)),
    "up_conv": ("iohw,hwi->o", (2, 3)),
    "up_conv_hwoi": ("hwoi,hwi->o", (0, 1)),
    "dense": ("oi,i->o", ()),
}
SIZES = {"h": 3, "w": 2, "i": 4, "o": 5}


@pytest.mark.parametrize(("layout", "equation", "axes"), [(k, *v) for k, v in LAYOUTS.items()])
def test_layouts_say_which_axis_is_which(layout, equation, axes):
    theirs, patch = (
        np.random.default_rng(i).standard_normal([SIZES[axis] for axis in axes_of])
        for i, axes_of in enumerate(equation.split("->")[0].split(","))
    )
    ours, back = both_ways(theirs, layout, (*patch.shape, 5))
    want = np.einsum(equation, theirs, patch)
    axis_names = "hwi" if axes else "i"
    np.testing.assert_allclose(np.einsum(f"{axis_names}o,{axis_names}->o", ours, patch), want)
    np.testing.assert_array_equal(back, theirs)
    if axes:  # true convolution, then images in BGR
        flipped, back = both_ways(theirs, f"{layout}+flip", ours.shape)
        np.testing.assert_array_equal(flipped, ours[::-1, ::-1])
        np.testing.assert_array_equal(back, theirs)
        turned, _ = both_ways(theirs, f"{layout}+bgr", ours.shape)
        got = np.einsum("hwio,hwi->o", turned, patch[:, :, ::-1])
        np.testing.assert_allclose(got, want)


def both_ways(theirs, layout, shape):
    """The kernel of this shape here, and the file's made of it again."""
    table = [Rule("a", "params/a", layout)]
    template = {"params": {"a": jax.ShapeDtypeStruct(shape, theirs.dtype)}}
    tree, _ = rules.load(template, {"a": theirs}, table)
    return tree["params"]["a"], rules.unload(tree, table)["a"]


def test_a_dense_layer_on_a_map_flattened_channels_first_is_a_kernel():
    patch = np.random.default_rng(0).standard_normal((3, 2, 4))
    theirs = np.random.default_rng(1).standard_normal((5, 24))
    ours, back = both_ways(theirs, "dense_chw", (3, 2, 4, 5))
    want = theirs @ patch.transpose(2, 0, 1).ravel()
    np.testing.assert_allclose(np.einsum("hwio,hwi->o", ours, patch), want)
    np.testing.assert_array_equal(back, theirs)


@pytest.mark.parametrize(
    ("layout", "shape"), [("depthwise", (3, 2, 4, 1)), ("depthwise_1hwc", (1, 3, 2, 4))]
)
def test_depthwise_kernels_keep_one_filter_a_channel(layout, shape):
    theirs = np.arange(24.0).reshape(shape)
    ours, back = both_ways(theirs, layout, (3, 2, 1, 4))
    np.testing.assert_array_equal(ours[:, :, 0], theirs.reshape(3, 2, 4))
    np.testing.assert_array_equal(back, theirs)


KERNEL = np.arange(1.0, 121).reshape(5, 4, 3, 2)  # [o, i, h, w]


@pytest.mark.parametrize(
    ("layout", "theirs", "ours", "changes"),
    [
        ("ones", np.ones((1, 1, 1, 5)), np.ones(5), ["reshaped"]),
        ("ones", np.ones((1, 5, 1, 1)), np.ones(5), ["reshaped"]),
        ("ones", np.ones((1, 1, 1, 1)), np.ones(1), ["reshaped"]),
        ("ones", np.ones(5), np.ones(5), []),
        ("ones+minus", np.ones((1, 5)), -np.ones(5), ["reshaped", "negated"]),
        ("ones+dense", np.ones((1, 1, 5, 4)), np.ones((4, 5)), ["reshaped", "permuted"]),
        ("rows+conv", KERNEL, KERNEL.transpose(2, 3, 1, 0), ["permuted"]),
        *(
            (
                "rows+conv",
                KERNEL.reshape(*ones, 5, -1),
                KERNEL.transpose(2, 3, 1, 0),
                ["reshaped", "permuted"],
            )
            for ones in ((), (1, 1))
        ),
    ],
)
def test_caffes_layouts(layout, theirs, ours, changes):
    np.testing.assert_array_equal(layouts.load(theirs, layout, ours.shape), ours)
    assert layouts.changes(theirs, layout, ours.shape) == changes
    back = layouts.unload(ours, layout)  # in the form of today
    np.testing.assert_array_equal(layouts.load(back, layout, ours.shape), ours)


def test_rows_are_those_of_the_kernel():
    table = [Rule("a", "params/a", "rows+conv")]
    template = {"params": {"a": jax.ShapeDtypeStruct((3, 2, 4, 5), np.float32)}}
    for wrong in (np.ones((24, 5)), np.ones((1, 1, 24, 5)), np.ones((2, 1, 5, 12)), np.ones(120)):
        with pytest.raises(UserError, match="1 mismatch"):
            rules.load(template, {"a": wrong}, table)
    table = [Rule("a", "params/a", "dense_chw")]
    with pytest.raises(UserError, match=r"\(24, 5\) does not become \(3, 2, 4, 5\)"):
        rules.load(template, {"a": np.ones((24, 5))}, table)


FILTER = np.arange(1.0, 5, dtype=np.float32).reshape(1, 2, 2)


def up(mixing, taps=FILTER) -> dict[str, np.ndarray]:
    """Kernels of an up-convolution of three classes as FCN's files have them, [i, o, h, w]."""
    return {"up.0": np.asarray(mixing, np.float32)[:, :, None, None] * taps}


def built_in(shape):
    assert shape == (2, 2, 1, 3)
    return FILTER.transpose(1, 2, 0)[..., None] * np.ones(3)


UP = (Rule("up.0", "params/up/kernel", "diagonal+conv", constant=built_in),)


def test_dense_kernels_of_single_channels_are_depthwise():
    template = {"params": {"up": {"kernel": jax.ShapeDtypeStruct((2, 2, 1, 3), np.float32)}}}
    tensors = up(np.diag([1, 2, 3]))
    tree, account = rules.load(template, tensors, UP)
    want = FILTER.transpose(1, 2, 0)[..., None] * np.arange(1, 4)
    np.testing.assert_array_equal(tree["params"]["up"]["kernel"], want)
    assert account.rows[0].note == "reshaped, permuted"
    np.testing.assert_array_equal(rules.unload(tree, UP)["up.0"], tensors["up.0"])
    grouped = {"up.0": tensors["up.0"].sum(1, keepdims=True)}
    chex.assert_trees_all_equal(rules.load(template, grouped, UP)[0], tree)
    mixing = np.eye(3)
    mixing[0, 1] = 0.5
    with pytest.raises(UserError, match=r"up\.0 \(it mixes channels"):
        rules.load(template, up(mixing), UP)


def test_what_is_built_in_is_compared():
    tree, account = rules.load({"params": {}}, up(np.eye(3)), UP)
    assert tree == {}
    row = account.rows[0]
    assert (row.status, row.note) == ("ignored", "equal to the fixed values of this layer")
    others = {"more": up(np.eye(3) * 1.01), "mixed": up(np.ones((3, 3)))}
    others["size"] = {"up.0": np.ones((3, 3, 1, 1), np.float32)}
    for tensors in (others["more"], others["mixed"]):
        with pytest.raises(UserError, match=r"1 mismatch: up\.0 \((its values differ|it mixes)"):
            rules.load({"params": {}}, tensors, UP)
        _, account = rules.load({"params": {}}, tensors, UP, required=("*/conv/*",))
        assert account.rows[0].status == "ignored"
