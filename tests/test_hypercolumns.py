import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.models import vgg
from dense_jax.models.fcn import ALEXNET_LAYERS
from dense_jax.models.hypercolumns import BoxHypercolumns, Hypercolumns, hypercolumns, sds_vgg
from tests import contract

THIN = dict(width=1 / 64, dropout_rate=0.0)
thin = functools.partial(Hypercolumns, num_classes=3, **THIN)
thin_box = functools.partial(BoxHypercolumns, num_categories=2, heatmap=6, grid=2, **THIN)
BOXES = np.array([[[2, 3, 20, 30], [0, 0, 33, 40]], [[5, 5, 9, 9], [-4, 10, 28, 44]]], np.float32)
CATEGORIES = np.array([[0, 1], [1, 0]], np.int32)


def num_params(model, size=32):
    params = contract.shapes_of(model, (1, size, size, 3))[1]["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def random_images(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(model, variables, inputs, train=False):
    return model.apply(variables, *inputs, train=train)


def test_parameters_of_the_semantic_version():
    assert 134_360_063 == 134_260_544 + 2_709 + 10_773 + 86_037
    assert num_params(Hypercolumns(21, tap_kernels=(3, 1, 1))) == 134_360_063 - 2_709 + 24_213
    grid = Hypercolumns(21, grid=5)
    assert num_params(grid) == 134_260_544 + 25 * 99_519


def test_alexnet_hypercolumn_has_4736_values():
    model = Hypercolumns(21, backbone="alexnet")
    outputs, _ = contract.shapes_of(model, (1, 97, 131, 3))
    grids = vgg.grids(ALEXNET_LAYERS)
    build = functools.partial(
        hypercolumns, grids=grids, layers=("pool2", "conv4", "fc7"), size=(97, 131)
    )
    assert jax.eval_shape(build, outputs).shape == (1, 97, 131, 4736)
    assert [outputs[name].shape[-1] for name in ("pool2", "conv4", "fc7")] == [256, 384, 4096]
    assert outputs["logits"].shape == (1, 97, 131, 21)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vgg16", "alexnet"])
def test_split_classifiers_equal_one_classifier_of_the_concatenation(backbone):
    model = thin(backbone=backbone)
    images = random_images((2, 35, 50, 3))
    variables = contract.random_variables(model, images.shape)
    outputs = apply(model, variables, (images,))
    layers = ("pool2", "conv4_3" if backbone == "vgg16" else "conv4", "fc7")
    table = vgg.vgg16_layers(1, 3) if backbone == "vgg16" else ALEXNET_LAYERS
    columns = hypercolumns(outputs, vgg.grids(table), layers, (35, 50))
    scores = [variables["params"][f"score_{layer}"] for layer in layers]
    kernel = np.concatenate([score["kernel"][0, 0] for score in scores])
    bias = np.sum([score["bias"] for score in scores], axis=0)
    np.testing.assert_allclose(
        outputs["logits"], columns @ kernel + bias.reshape(1, 1, 1, -1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_upsampling_puts_units_where_they_lie_on_the_image():
    """A unit of pool2 is the mean position of 4 x 4 pixels: half-pixel bilinear resizing."""
    x = random_images((1, 8, 8, 2))
    found = hypercolumns({"pool2": x}, vgg.grids(vgg.vgg16_layers(1, 3)), ["pool2"], (32, 32))
    expected = jax.image.resize(x, (1, 32, 32, 2), "linear")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("taps", "scores"),
    [
        ("fc7", {"fc7"}),
        ("fc7_pool2", {"fc7", "pool2"}),
        ("fc7_conv4", {"fc7", "conv4_3"}),
        ("pool2_conv4", {"pool2", "conv4_3"}),
        ("all", {"fc7", "conv4_3", "pool2"}),
    ],
)
def test_taps_and_nothing_behind_them(taps, scores):
    outputs, variables = contract.shapes_of(thin(taps=taps), (1, 33, 17, 3))
    heads = {name for name in variables["params"] if name.startswith("score_")}
    assert heads == {f"score_{layer}" for layer in scores}
    assert ("conv5_1" in variables["params"]) == ("fc7" in scores)
    assert outputs["logits"].shape == (1, 33, 17, 3)


@pytest.mark.slow  # FCN's and SegNet's are fast
def test_contract():
    contract.check_model(
        Hypercolumns(21),
        num_params=134_360_063,
        image_shape=(1, 500, 375, 3),
        num_classes=21,
        thin=thin(num_classes=21, tap_kernels=(3, 1, 1), tap_scale="l2", grid=2),
        thin_shape=(2, 19, 26, 3),
        skips=["score_pool2", "score_conv4_3", "score_fc7"],
    )


@pytest.mark.slow  # four networks; test_contract has one of the scales
def test_tap_scales():
    images = random_images((2, 32, 32, 3))
    plain, fixed, l2, bn = (
        thin(taps="pool2_conv4", tap_scale=kind) for kind in ("none", "fixed", "l2", "bn")
    )
    variables = contract.random_variables(plain, images.shape)
    outputs = apply(plain, variables, (images,))
    kernel, bias = (variables["params"]["score_pool2"][k] for k in ("kernel", "bias"))
    pool2 = np.asarray(outputs["pool2"])

    def check(scores, x):
        np.testing.assert_allclose(scores, x @ kernel[0, 0] + bias.reshape(1, 1, 1, -1), atol=1e-4)

    check(apply(fixed, variables, (images,))["score_pool2"], 0.0027 * pool2)
    rms = np.sqrt(np.mean(pool2**2, axis=-1, keepdims=True) + 1e-6)
    check(apply(l2, variables, (images,))["score_pool2"], pool2 / rms)

    stats = contract.random_variables(bn, images.shape)["batch_stats"]
    outputs: Any = bn.apply({**variables, "batch_stats": stats}, images, train=True, mutable=True)
    trained, new = outputs
    check(
        trained["score_pool2"],
        (pool2 - pool2.mean((0, 1, 2), keepdims=True))
        / np.sqrt(pool2.var((0, 1, 2), keepdims=True) + 1e-5),
    )
    old, mean = (s["pool2_scale"]["norm"]["mean"] for s in (stats, new["batch_stats"]))
    np.testing.assert_allclose(mean, 0.9 * old + 0.1 * pool2.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)


def shared_grid(params, cells):
    """The parameters of a grid in which all classifiers equal that of K = 1."""
    return {
        name: jax.tree.map(lambda x: np.tile(x, cells * cells), leaf)
        if name.startswith(("score_", "conv_pool", "fcfc"))
        else leaf
        for name, leaf in params.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["after_prob", "before_prob"])
@pytest.mark.parametrize("cells", [2, 5])
def test_equal_classifiers_do_not_depend_on_the_grid(cells, mix):
    """And K = 1 is an ordinary classifier, whose logits are the sum of the enlarged scores."""
    images = random_images((2, 35, 40, 3))
    one = thin(taps="pool2_conv4")
    params = contract.random_variables(one, images.shape)["params"]
    logits = apply(one, {"params": params}, (images,))["logits"]
    grid = one.clone(grid=cells, mix=mix)
    found = apply(grid, {"params": shared_grid(params, cells)}, (images,))["logits"]
    if mix == "after_prob":
        logits = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_independent_cells_train_each_classifier_on_its_own_cell():
    """The classifier of the upper left quarter sees no pixel of another, unlike end to end."""
    images = random_images((1, 32, 32, 3))
    reached = {}
    for joint in ("independent_cells", "end_to_end"):
        model = thin(taps="pool2_conv4", grid=2, joint=joint)
        params = contract.random_variables(model, images.shape)["params"]

        @functools.partial(jax.jit, static_argnums=1)
        def change(bias, train, model=model, params=params):
            new = {**params, "score_pool2": {**params["score_pool2"], "bias": bias}}
            return contract.apply(model, {"params": new}, images, train)["logits"]

        bias = params["score_pool2"]["bias"]  # [row, column, class] flattened
        other = bias + np.repeat([1, 0, 0, 0], 3).astype(np.float32) * np.tile([0, 1, 2], 4)
        for train in (True, False):
            moved = np.any(change(bias, train) != change(other.astype(np.float32), train), axis=-1)
            reached[joint, train] = moved[0]
    quarter = np.zeros((32, 32), bool)
    quarter[:16, :16] = True
    np.testing.assert_array_equal(reached["independent_cells", True], quarter)
    assert reached["end_to_end", True][20, 10]
    np.testing.assert_array_equal(reached["independent_cells", False], reached["end_to_end", False])


@pytest.mark.slow
def test_the_grid_spans_the_true_size_of_a_padded_image():
    images = random_images((2, 32, 64, 3))
    model = thin(taps="pool2_conv4", grid=2)
    variables = contract.random_variables(model, images.shape)
    run = jax.jit(functools.partial(model.apply, train=False))
    logits = run(variables, images)["logits"]
    full = run(variables, images, sizes=jnp.array([[32, 64], [32, 64]]))["logits"]
    np.testing.assert_allclose(full, logits, rtol=1e-5, atol=1e-5)
    # The right half as padding: the left half has both columns of classifiers for itself.
    half = run(variables, images, sizes=jnp.array([[32, 64], [32, 32]]))["logits"]
    np.testing.assert_allclose(half[0], logits[0], rtol=1e-5, atol=1e-5)
    assert np.all(np.any(half[1, :, 8:46] != logits[1, :, 8:46], axis=-1))


@pytest.mark.slow
def test_parameters_of_the_release():
    trunk, features = 14_714_688, 119_545_856
    for cells, heads in ((5, 3_457_500), (10, 13_830_000)):
        assert num_params(sds_vgg(grid=cells)) == trunk + features + heads
    assert trunk + features + 3_457_500 == 137_718_044
    outputs, variables = contract.shapes_of(sds_vgg(), (1, 600, 1000, 3))
    heads = {
        name: sum(x.size for x in jax.tree.leaves(variables["params"][name]))
        for name in ("conv_pool3", "conv_pool4", "fcfc7")
    }
    assert heads == {"conv_pool3": 1_152_500, "conv_pool4": 256_500, "fcfc7": 2_048_500}
    assert outputs["log_probabilities"].shape == (1, 1, 50, 50, 2)
    assert outputs["pool3"].shape == (1, 76, 126, 256)


def slow_box_network(model, outputs, image, box, category, hard=False):
    """Masks of one box from the scored maps, by the release's formulas."""
    size = model.heatmap
    padded = [-(-side // 16) * 16 for side in image.shape[:2]]
    x0, y0, x1, y1 = box / np.array([padded[1], padded[0]] * 2)
    total = np.zeros((size, size, model.grid, model.grid))
    per_category = (model.num_categories, model.grid, model.grid)
    for name in ("conv_pool3", "conv_pool4"):
        maps = outputs[name].reshape(*outputs[name].shape[:2], *per_category)[:, :, category]
        for y, x in np.ndindex(size, size):
            at = [
                ((y + 0.5) * (y1 - y0) / size + y0) * maps.shape[0] - 0.5,
                ((x + 0.5) * (x1 - x0) / size + x0) * maps.shape[1] - 0.5,
            ]
            low = np.floor(at)
            for i, j in np.ndindex(2, 2):
                row, column = low[0] + i, low[1] + j
                weight = (1 - abs(at[0] - row)) * (1 - abs(at[1] - column))
                row = int(np.clip(row, 0, maps.shape[0] - 1))
                column = int(np.clip(column, 0, maps.shape[1] - 1))
                total[y, x] += weight * maps[row, column]
    total += outputs["fcfc7"].reshape(per_category)[category]
    probability = np.zeros((size, size))
    for y, x, k, j in np.ndindex(total.shape):
        weight = 1.0
        for pixel, cell in ((y, k), (x, j)):
            at = (pixel + 0.5) * model.grid / size - 0.5
            weight *= max(0, 1 - abs(np.clip(at, 0, model.grid - 1) - cell))
        if hard:
            weight = (y * model.grid // size, x * model.grid // size) == (k, j)
        probability[y, x] += weight / (1 + np.exp(-total[y, x, k, j]))
    return probability


@pytest.mark.slow
@pytest.mark.parametrize("hard", [False, True])
def test_box_network_against_the_formulas(hard):
    """Also when each classifier is trained on its own cell."""
    model = thin_box(joint="independent_cells" if hard else "end_to_end")
    images = random_images((2, 40, 33, 3))
    variables = contract.random_variables(model, images.shape)
    outputs = jax.tree.map(np.asarray, apply(model, variables, (images, BOXES, CATEGORIES), hard))
    log_p = outputs["log_probabilities"]
    np.testing.assert_allclose(np.exp(log_p).sum(axis=-1), 1, rtol=1e-5)
    outputs["fcfc7"] = outputs["fcfc7"].reshape(2, 2, -1)
    for b, n in np.ndindex(2, 2):
        own = {name: outputs[name][b] for name in ("conv_pool3", "conv_pool4")}
        own["fcfc7"] = outputs["fcfc7"][b, n]
        expected = slow_box_network(model, own, images[b], BOXES[b, n], CATEGORIES[b, n], hard)
        np.testing.assert_allclose(np.exp(log_p[b, n, ..., 1]), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_box_network_gives_gradients_to_all_parameters():
    model = thin_box(tap_scale="none")
    images = random_images((2, 40, 33, 3))
    variables = contract.random_variables(model, images.shape)

    @jax.jit
    def grads(variables):
        def loss(variables):
            outputs: Any = model.apply(variables, images, BOXES, CATEGORIES, train=True)
            return jnp.sum(outputs["log_probabilities"][..., 1])

        return jax.grad(loss)(variables)

    for path, grad in jax.tree_util.tree_leaves_with_path(grads(variables)):
        assert np.all(np.isfinite(grad))
        assert np.any(grad), f"no gradient reaches {jax.tree_util.keystr(path)}"


@pytest.mark.slow
def test_box_grid_with_equal_classifiers_is_one_classifier():
    images = random_images((2, 32, 32, 3))
    one = thin_box(grid=1, tap_kernels=(1, 1, 1), taps="pool2_conv4", heatmap=10)
    params = contract.random_variables(one, images.shape)["params"]
    expected = apply(one, {"params": params}, (images, BOXES, CATEGORIES))["log_probabilities"]
    for mix in ("after_prob", "before_prob"):
        grid = one.clone(grid=5, mix=mix)
        # Channels are [category, row, column].
        shared = {
            name: jax.tree.map(lambda x: np.repeat(x, 25, axis=-1), leaf)
            if name.startswith("conv_pool")
            else leaf
            for name, leaf in params.items()
        }
        found = apply(grid, {"params": shared}, (images, BOXES, CATEGORIES))["log_probabilities"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_box_mask_is_that_of_its_category():
    model = thin_box(taps="pool2_conv4")
    images, boxes = random_images((1, 32, 32, 3)), np.repeat(BOXES[:1, :1], 2, axis=1)
    variables = contract.random_variables(model, images.shape)
    outputs = apply(model, variables, (images, boxes, np.array([[0, 1]], np.int32)))
    swapped = apply(model, variables, (images, boxes, np.array([[1, 0]], np.int32)))
    first, second = outputs["log_probabilities"][0]
    assert np.any(first != second)
    np.testing.assert_array_equal(swapped["log_probabilities"][0], np.stack([second, first]))


def test_wrong_boxes_are_named():
    model = thin_box()
    images = jnp.zeros((2, 32, 32, 3))
    with pytest.raises(ValueError, match="boxes"):
        jax.eval_shape(
            lambda: model.init(jax.random.key(0), images, BOXES[:1], CATEGORIES, train=False)
        )
    with pytest.raises(ValueError, match="fc7"):
        contract.shapes_of(thin_box(tap_kernels=(1, 1, 3)), (1, 32, 32, 3))
