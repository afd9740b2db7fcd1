import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.layers import init
from dense_jax.layers.conv import up_conv
from dense_jax.models import fcn, vgg
from dense_jax.ops.pool import pooled_size
from tests import contract, members

PUBLISHED = {
    "fcn32s": (fcn.fcn32s, 134_346_581),
    "fcn16s": (fcn.fcn16s, 134_357_354),
    "fcn8s_at_once": (fcn.fcn8s_at_once, 134_362_751),
}
thin = functools.partial(fcn.FCN, num_classes=3, width=1 / 64, dropout_rate=0.0)


def apply(model, variables, images):
    return jax.jit(functools.partial(contract.apply, model))(variables, images)


def bilinear_up(x, stride):
    kernel = init.bilinear()(None, (2 * stride, 2 * stride, 1, x.shape[-1]))
    return up_conv(x, kernel, strides=stride, padding=stride // 2, groups=x.shape[-1])


@pytest.mark.parametrize(("build", "num_params"), PUBLISHED.values(), ids=PUBLISHED)
def test_full_size(build, num_params):
    contract.check_full(
        build(num_classes=21), num_params=num_params, image_shape=(1, 500, 500, 3), num_classes=21
    )


@pytest.mark.parametrize(
    ("build", "num_classes", "num_params"),
    [(fcn.fcn8s, 19, 134_353_017), (fcn.fcn32s, 40, 134_424_424)],
)
def test_parameters_for_other_numbers_of_classes(build, num_classes, num_params):
    _, variables = contract.shapes_of(build(num_classes=num_classes), (1, 32, 32, 3))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == num_params


def test_names_are_those_of_the_release_and_coarser_nets_share_them():
    trees = [
        contract.shapes_of(build(num_classes=21), (1, 64, 64, 3))[1]["params"]
        for build in (fcn.fcn32s, fcn.fcn16s, fcn.fcn8s)
    ]
    convs = [f"conv{s}_{i}" for s, n in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, n + 1)]
    assert set(trees[0]) == {*convs, "fc6", "fc7", "score_fr"}
    assert set(trees[1]) - set(trees[0]) == {"score_pool4"}
    assert set(trees[2]) - set(trees[1]) == {"score_pool3"}
    for coarse, fine in itertools.pairwise(trees):
        assert {name: fine[name] for name in coarse} == coarse


@pytest.mark.slow
def test_sizes_of_the_published_figures():
    outputs, _ = contract.shapes_of(fcn.fcn8s(num_classes=21), (1, 500, 500, 3))
    sizes = {"conv1_1": 698, "pool1": 349, "pool2": 175, "pool3": 88, "pool4": 44, "pool5": 22}
    assert {name: outputs[name].shape[1] for name in sizes} == sizes
    assert outputs["fc7"].shape == (1, 16, 16, 4096)
    nyud, _ = contract.shapes_of(fcn.fcn32s(num_classes=40), (1, 425, 560, 3))
    assert nyud["fc7"].shape[1:3] == (14, 18)
    assert nyud["logits"].shape == (1, 425, 560, 40)
    alexnet, _ = contract.shapes_of(fcn.fcn_alexnet(num_classes=21), (1, 500, 500, 3))
    names = ("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5", "fc6", "fc7")
    found = [alexnet[name].shape[1] for name in names]
    assert found == [173, 86, 86, 43, 43, 43, 43, 21, 16, 16]


def sizes_and_grids(layers, size):
    """Returns {layer: (number of units, grid)} by the formulas, with pools rounded up."""
    sizes, grids = {}, vgg.grids(layers)
    for layer in layers:
        is_pool = layer.name.startswith("pool")
        size = (
            pooled_size(size, layer.kernel, layer.stride, 0, ceil=True)
            if is_pool
            else (size + 2 * layer.padding - layer.kernel) // layer.stride + 1
        )
        sizes[layer.name] = (size, grids[layer.name])
    return sizes


def enlarge(place, kernel, stride):
    size, grid = place
    return (size - 1) * stride + kernel, grid.up_conv(kernel, stride)


def test_crops_are_those_of_the_release_and_fit_every_size():
    for size in [500, *range(1, 2001)]:
        places = sizes_and_grids(vgg.vgg16_layers(100), size)
        alexnet = enlarge(sizes_and_grids(fcn.ALEXNET_LAYERS, size)["fc7"], 63, 32)
        up32 = enlarge(places["fc7"], 64, 32)
        up2 = enlarge(places["fc7"], 4, 2)
        up16 = enlarge(up2, 32, 16)
        up_pool4 = enlarge(up2, 4, 2)
        up8 = enlarge(up_pool4, 16, 8)
        crops = [
            (alexnet, (size, vgg.Grid()), 18),
            (up32, (size, vgg.Grid()), 19),
            (places["pool4"], up2, 5),
            (up16, (size, vgg.Grid()), 27),
            (places["pool3"], up_pool4, 9),
            (up8, (size, vgg.Grid()), 31),
        ]
        for (available, grid), (wanted, target), offset in crops:
            assert grid.index_of(target) == offset
            assert offset + wanted <= available
        if size == 500:
            assert (alexnet[0], up32[0], up16[0], up8[0]) == (543, 544, 560, 568)
        if size in (425, 560):  # NYUDv2
            assert up32[0] == {425: 480, 560: 608}[size]


def test_too_little_padding_cannot_be_cropped():
    grid = vgg.grids(vgg.vgg16_layers(first_padding=80))["fc7"].up_conv(64, 32)
    with pytest.raises(ValueError, match="No unit"):
        grid.index_of(vgg.Grid())


def test_alexnet_field_and_centre():
    assert vgg.grids(fcn.ALEXNET_LAYERS)["fc7"] == vgg.Grid(13.0, 32, 355)


@pytest.mark.slow
@pytest.mark.parametrize("pad_mode", ["100", "same"])
@pytest.mark.parametrize("stride", members([32, 16, 8], [8]))
def test_every_image_size_is_kept(pad_mode, stride):
    for height, width in [(1, 1), (1, 70), (31, 33), (64, 96), (225, 2)]:
        outputs, _ = contract.shapes_of(
            thin(stride=stride, pad_mode=pad_mode), (1, height, width, 3)
        )
        assert outputs["logits"].shape == (1, height, width, 3)


@pytest.mark.slow
def test_alexnet_keeps_every_image_size():
    for height, width in [(1, 1), (31, 33), (225, 2)]:
        outputs, _ = contract.shapes_of(fcn.fcn_alexnet(num_classes=3), (1, height, width, 3))
        assert outputs["logits"].shape == (1, height, width, 3)


def test_contract():
    contract.check_model(
        fcn.fcn8s(num_classes=21),
        num_params=134_362_751,
        image_shape=(1, 500, 500, 3),
        num_classes=21,
        thin=thin(num_classes=21, stride=8),
        thin_shape=(2, 19, 26, 3),
        skips=["score_fr", "score_pool4", "score_pool3"],
    )


@pytest.mark.slow  # FCN-8s, with fewer layers
def test_contract_of_alexnet():
    contract.check_model(
        fcn.fcn_alexnet(num_classes=21),
        num_params=56_954_261,
        image_shape=(1, 500, 500, 3),
        num_classes=21,
        thin=fcn.fcn_alexnet(num_classes=21, width=1 / 32, dropout_rate=0.0),
        thin_shape=(2, 19, 26, 3),
        skips=["score_fr"],
    )


VARIANTS = {
    "8s same learned": (
        thin(stride=8, pad_mode="same", upsample="learned_all", skip_scale=(0.01, 0.0001)),
        (2, 33, 40, 3),
        ["score_fr", "score_pool4", "upscore2", "upscore_pool4", "upscore8"],
    ),
    "pool4 alone": (
        thin(stride=16, pad_mode="same", single_skip="pool4"),
        (2, 32, 48, 3),
        ["score_pool4"],
    ),
}


@pytest.mark.parametrize("name", members(VARIANTS, ()))
def test_contract_of_variants(name):
    model, image_shape, skips = VARIANTS[name]
    contract.check_thin(model, image_shape=image_shape, num_classes=3, skips=skips)


@jax.jit
def initial_scores(key):
    """Initial score layers by kind; the rest of the initialisation is dropped by the compiler."""
    scores = {}
    for kind in ("zero", "normal"):
        model = thin(pad_mode="same", score_init=kind)
        params = model.init(key, jnp.zeros((1, 32, 32, 3)), train=False)["params"]
        scores[kind] = {name: leaf for name, leaf in params.items() if name.startswith("score")}
    return scores


def test_zero_scores_give_zero_logits_and_loss_ln_c():
    images = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    model = thin(pad_mode="same")
    params = contract.random_variables(model, images.shape)["params"]
    scores = initial_scores(jax.random.key(0))["zero"]
    assert len(scores) == 3
    logits = apply(model, {"params": {**params, **scores}}, images)["logits"]
    assert not np.any(logits)
    np.testing.assert_allclose(-jax.nn.log_softmax(logits), np.log(3), rtol=1e-6)


def test_normal_scores_have_the_deviation_of_caffe():
    for layer in initial_scores(jax.random.key(0))["normal"].values():
        assert 0.003 < np.std(layer["kernel"]) < 0.03
        assert not np.any(layer["bias"])


@pytest.mark.slow
@pytest.mark.parametrize("fuse", ["sum", "max"])
def test_16s_joins_the_scores_of_32s_with_those_of_pool4(fuse):
    """From 32s with a new, zero score_pool4: the same coarse scores, enlarged in two steps."""
    images = np.random.default_rng(0).standard_normal((1, 64, 96, 3)).astype(np.float32)
    coarse = thin(stride=32, pad_mode="same")
    params = contract.random_variables(coarse, images.shape)["params"]
    scores = apply(coarse, {"params": params}, images)["score_fr"]

    model = thin(stride=16, pad_mode="same", fuse=fuse, score_init="normal")
    fresh = contract.random_variables(model, images.shape)["params"]["score_pool4"]
    for score_pool4 in (jax.tree.map(np.zeros_like, fresh), fresh):
        outputs = apply(model, {"params": {**params, "score_pool4": score_pool4}}, images)
        np.testing.assert_array_equal(outputs["score_fr"], scores)
        join = {"sum": jnp.add, "max": jnp.maximum}[fuse]
        fused = join(bilinear_up(scores, 2), outputs["score_pool4"])
        np.testing.assert_allclose(outputs["logits"], bilinear_up(fused, 16), rtol=1e-5, atol=1e-5)


def test_skip_scale_multiplies_the_pools_before_scoring():
    images = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    model = thin(pad_mode="same", skip_scale=(0.5, 0.25))
    variables = contract.random_variables(model, images.shape)
    outputs = apply(model, variables, images)
    for name, factor in (("pool4", 0.5), ("pool3", 0.25)):
        score = variables["params"][f"score_{name}"]
        expected = factor * outputs[name] @ score["kernel"][0, 0] + score["bias"].reshape(
            1, 1, 1, 3
        )
        np.testing.assert_allclose(outputs[f"score_{name}"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("upsample", "extra"), [("fixed", 0), ("learned_inner", 21 * 32), ("learned_all", 6048)]
)
def test_learned_upsampling_is_depthwise(upsample, extra):
    _, variables = contract.shapes_of(fcn.fcn8s(num_classes=21, upsample=upsample), (1, 8, 8, 3))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 134_362_751 + extra


def test_pool4_alone_needs_its_stride():
    with pytest.raises(ValueError, match="stride 16"):
        contract.shapes_of(thin(stride=8, single_skip="pool4"), (1, 32, 32, 3))


def test_shifting_the_image_by_the_stride_shifts_the_logits():
    wide = np.random.default_rng(0).standard_normal((1, 32, 864, 3)).astype(np.float32)
    images = np.concatenate([wide[:, :, 32:], wide[:, :, :-32]])
    model = thin(pad_mode="same")
    logits = apply(model, contract.random_variables(model, images.shape), images)["logits"]
    inner = logits[0, :, 300:500]
    np.testing.assert_allclose(logits[1, :, 332:532], inner, rtol=1e-4, atol=1e-5)
    assert np.std(inner) > 1e-3


def test_bilinear_kernels():
    np.testing.assert_array_equal(init.bilinear_taps(4), [0.25, 0.75, 0.75, 0.25])
    assert init.bilinear()(None, (64, 64, 1, 1)).sum() == 1024
    constant = bilinear_up(jnp.ones((1, 3, 4, 2)), 32)
    np.testing.assert_allclose(constant[:, 16:-16, 16:-16], 1, rtol=1e-6)
