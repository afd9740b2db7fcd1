import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.layers.conv import conv
from dense_jax.models import deeplab, vgg
from dense_jax.models.deeplab import DeepLab
from dense_jax.models.vgg import Stack
from dense_jax.ops.resize import resize_bilinear
from tests import contract

BN_SCALES_AND_BIASES = 105_344  # of ResNet-101; without gradient
PUBLISHED = {
    "v1 7x7": (deeplab.deeplab_7x7, 134_346_581),
    "v1 4x4": (deeplab.deeplab_4x4, 65_140_565),
    "v1 MSc-LargeFOV": (deeplab.deeplab_msc_largefov, 21_711_445),
    "v2 ASPP-S": (deeplab.deeplab_vgg_aspp_s, 37_877_652),
    "v2 ASPP-L": (deeplab.deeplab_vgg_aspp_l, 37_877_652),
    "v2 ResNet-101 ASPP": (  # at one scale: three take long to trace
        functools.partial(deeplab.deeplab_resnet101, scales=(1.0,)),
        43_943_188 + BN_SCALES_AND_BIASES,
    ),
    "v2 ResNet-101 LargeFOV": (
        deeplab.deeplab_resnet101_largefov,
        42_781_909 + BN_SCALES_AND_BIASES,
    ),
}
thin = functools.partial(DeepLab, num_classes=3, width=1 / 64, dropout_rate=0.0)
thin_resnet = functools.partial(thin, backbone="resnet50", width=1 / 32)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, images):
    return contract.apply(model, variables, images)


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("build", "num_params"), PUBLISHED.values(), ids=PUBLISHED)
def test_full_size(build, num_params):
    contract.check_full(
        build(num_classes=21), num_params=num_params, image_shape=(1, 321, 321, 3), num_classes=21
    )


def test_parts_have_the_published_sizes():
    """LargeFOV's three layers, each of ResNet's four branches, and the trunk they share."""
    params = contract.shapes_of(deeplab.deeplab_largefov(num_classes=21), (1, 9, 9, 3))[1]["params"]
    sizes = {name: sum(x.size for x in layer.values()) for name, layer in params.items()}
    assert (sizes["fc6"], sizes["fc7"], sizes["fc8"]) == (4_719_616, 1_049_600, 21_525)
    assert sum(n for name, n in sizes.items() if name.startswith("conv")) == 14_714_688
    model = thin_resnet(num_classes=21, head="aspp_l", width=1.0)
    params = contract.shapes_of(model, (1, 9, 9, 3))[1]["params"]
    branches = [sum(x.size for x in params[f"fc1_c{i}"].values()) for i in range(4)]
    assert branches == [387_093] * 4


@pytest.mark.parametrize("backbone", ["vgg16", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_sizes_of_the_paper(backbone):
    model = DeepLab(21, backbone=backbone, scales=(1.0, 0.75, 0.5))
    outputs, _ = contract.shapes_of(model, (1, 321, 321, 3))
    names = {
        "vgg16": ["conv1_1", "pool1", "pool2", "pool3", "pool5"],
        "resnet50": ["conv1", "pool1", "layer2", "layer3", "layer4"],
    }[backbone]
    sizes = [outputs[name].shape[1] for name in names]
    assert sizes == {"vgg16": [321, 161, 81, 41, 41], "resnet50": [161, 81, 41, 41, 41]}[backbone]
    scales = [outputs[f"scores_x{scale}"].shape for scale in ("1", "0.75", "0.5")]
    assert scales == [(1, 41, 41, 21), (1, 31, 31, 21), (1, 21, 21, 21)]  # of 321, 241, 161
    outputs, _ = contract.shapes_of(model.clone(scales=(1.0,)), (1, 513, 513, 3))
    assert outputs["scores"].shape == (1, 65, 65, 21)


def test_unit_i_sits_on_pixel_8i():
    grids = vgg.grids(deeplab.vgg_layers())
    assert grids["pool5"] == vgg.Grid(first=0, step=8, field=227)
    assert all(grid.first == 0 for grid in grids.values())


def column_mean(leaf):
    """A kernel that averages its rows and channels; no bias."""
    if len(leaf.shape) == 1:
        return np.zeros(leaf.shape, leaf.dtype)
    return np.full(leaf.shape, 1 / (leaf.shape[0] * leaf.shape[2]), leaf.dtype)


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (thin(head="largefov", pool5a=True), 435),
        (thin(head="largefov"), 419),
        (thin(head="fc7x7"), 419),
        (thin(head="largefov", rates=(6,)), 323),
        (thin(head="largefov", rates=(18,)), 515),
        (thin(head="aspp_l"), 611),
    ],
    ids=["LargeFOV v1", "LargeFOV", "7x7", "rate 6", "rate 18", "ASPP-L"],
)
def test_receptive_field_is_the_support_of_the_gradient(model, field):
    """All weights are positive and brightness rises, so maxima lie at the far end of windows."""
    rows, unit = 641, 40
    shapes = contract.shapes_of(model, (1, rows, 1, 3))[1]
    variables = jax.tree.map(column_mean, shapes)

    @jax.jit
    def reached(image):
        def score(image):
            return contract.apply(model, variables, image)["scores"][0, unit, 0, 0]

        return jnp.any(jax.grad(score)(image) != 0, axis=(0, 2, 3))

    rising = np.linspace(1, 2, rows, dtype=np.float32).reshape(1, rows, 1, 1)
    rising = np.repeat(rising, 3, axis=3)
    last = np.flatnonzero(reached(rising)).max()
    first = np.flatnonzero(reached(rising[:, ::-1])).min()
    assert (first + last) / 2 == 8 * unit
    assert last - first + 1 == field


def test_fov_of_the_papers_tables():
    """Their column is 8 (k - 1) r + 32: the head's window alone, on units of 32 pixels."""
    fov = {
        (name, head.rates[0]): 8 * (head.kernel - 1) * head.rates[0] + 32
        for name, head in deeplab.HEADS.items()
    }
    assert fov["fc7x7", 4] == fov["largefov", 12] == 224
    assert fov["fc4x4", 4] == 128
    assert 8 * (deeplab.HEADS["fc4x4"].kernel - 1) * 8 + 32 == 224


def test_a_dilated_kernel_is_a_large_one_with_holes():
    kernel, image = noise(3, 3, 2, 4), noise(1, 30, 27, 2)
    large = np.zeros((25, 25, 2, 4), np.float32)
    large[::12, ::12] = kernel
    assert len(large) == 3 + (3 - 1) * (12 - 1)
    assert np.count_nonzero(np.any(large, axis=(2, 3))) == 9
    dilated, dense = (
        conv(jnp.asarray(image), jnp.asarray(kernel), padding=12, dilation=12),
        conv(jnp.asarray(image), jnp.asarray(large), padding=12),
    )
    np.testing.assert_allclose(dilated, dense, rtol=1e-4, atol=1e-4)


def test_dense_features_sampled_are_the_strided_features():
    """A stride of 2 in pool4 instead of dilation behind it, up to conv5_3; same weights."""
    dense = Stack(deeplab.vgg_layers()[:-1], width=1 / 32)
    rows = [
        row._replace(stride=2)
        if row.name == "pool4"
        else row._replace(padding=1, dilation=1)
        if row.name.startswith("conv5")
        else row
        for row in dense.layers
    ]
    images = noise(1, 81, 49, 3)
    variables = contract.random_variables(dense, images.shape)
    fine = apply(dense, variables, images)["conv5_3"]
    coarse = apply(dense.clone(layers=tuple(rows)), variables, images)["conv5_3"]
    assert (fine.shape[1:3], coarse.shape[1:3]) == ((11, 7), (6, 4))
    np.testing.assert_allclose(fine[:, ::2, ::2], coarse, rtol=1e-4, atol=1e-5)


def test_aspp_with_one_branch_that_scores_is_largefov():
    images = noise(1, 41, 41, 3)
    model = thin(head="aspp_s")
    params = contract.random_variables(model, images.shape)["params"]
    for name in ("fc8_1", "fc8_2", "fc8_3"):
        params[name] = jax.tree.map(np.zeros_like, params[name])
    scores = apply(model, {"params": params}, images)["scores"]

    # LargeFOV's dilation, 12, is that of ASPP-S's last branch.
    params |= {layer: params[f"{layer}_4"] for layer in ("fc6", "fc7", "fc8")}
    alone = apply(thin(head="largefov"), {"params": params}, images)["scores"]
    np.testing.assert_allclose(scores, alone, rtol=1e-5, atol=1e-6)
    assert np.std(alone) > 1e-3


def test_branches_are_summed():
    images = noise(1, 33, 33, 3)
    model = thin(head="aspp_l")
    outputs = apply(model, contract.random_variables(model, images.shape), images)
    branches = [outputs[f"fc8_{i}"] for i in range(1, 5)]
    np.testing.assert_allclose(outputs["scores"], sum(branches[1:], branches[0]), rtol=1e-6)
    assert len({float(np.sum(branch)) for branch in branches}) == 4


def test_average_pooling_counts_the_zeros_around():
    images = noise(1, 17, 25, 3)
    model = thin(pool5a=True)
    outputs = apply(model, contract.random_variables(model, images.shape), images)
    padded = np.pad(outputs["pool5"], ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    expected = windows.sum(axis=(-2, -1)) / 9
    np.testing.assert_allclose(outputs["pool5a"], expected, rtol=1e-5, atol=1e-6)


def test_max_fusion_does_not_ask_for_the_order_and_leaves_one_scale_alone():
    maps = [jnp.asarray(noise(2, *size, 3)) for size in ((5, 9), (3, 5), (2, 3))]
    fused = deeplab.max_fusion(maps)
    np.testing.assert_array_equal(deeplab.max_fusion(maps[::-1]), fused)
    np.testing.assert_array_equal(deeplab.max_fusion(maps[:1]), maps[0])
    larger = [resize_bilinear(m, (5, 9), align_corners=True) for m in maps]
    np.testing.assert_array_equal(fused, np.max(larger, axis=0))


@pytest.mark.slow
def test_scales_see_the_image_resized_and_share_their_weights():
    images = noise(1, 41, 36, 3)
    model = thin(scales=(1.0, 0.75, 0.5))
    variables = contract.random_variables(model, images.shape)
    outputs = apply(model, variables, images)
    whole = jnp.pad(images, ((0, 0), (0, 0), (0, 5), (0, 0)))  # 8 m + 1
    # 0.75 x 5 units are rounded to 4, so that all corners are units.
    for scale, side in (("1", 41), ("0.75", 33), ("0.5", 25)):
        seen = resize_bilinear(whole, (side, side), align_corners=True)
        alone = apply(thin(), variables, seen)["scores"]
        np.testing.assert_allclose(outputs[f"scores_x{scale}"], alone, rtol=1e-4, atol=1e-5)
    fused = deeplab.max_fusion([outputs[f"scores_x{scale}"] for scale in ("0.5", "1", "0.75")])
    np.testing.assert_allclose(outputs["scores"], fused, rtol=1e-6)


@pytest.mark.parametrize("size", [(33, 41), (32, 38)])
def test_every_eighth_pixel_has_the_score_of_its_unit(size):
    images = noise(1, *size, 3)
    variables = contract.random_variables(thin(), images.shape)
    outputs = apply(thin(), variables, images)
    at_units = outputs["logits"][:, ::8, ::8]
    units = outputs["scores"][:, : at_units.shape[1], : at_units.shape[2]]
    np.testing.assert_allclose(at_units, units, rtol=1e-5, atol=1e-5)
    half = apply(thin(upsample="half_pixel"), variables, images)
    np.testing.assert_array_equal(half["scores"], outputs["scores"])
    assert np.max(np.abs(half["logits"][:, ::8, ::8] - units)) > 1e-3


@pytest.mark.slow
def test_every_image_size_is_kept():
    for height, width in [(1, 1), (1, 70), (9, 2), (31, 33)]:
        for model in (thin(scales=(1.0, 0.5)), thin(msc_features=True)):
            outputs, _ = contract.shapes_of(model, (1, height, width, 3))
            assert outputs["logits"].shape == (1, height, width, 3)


def test_shifting_the_image_by_a_unit_shifts_the_scores():
    """Also with the features of the image and all poolings, which thus belong to one place."""
    wide = noise(1, 33, 1001, 3)
    images = np.concatenate([wide[:, :, 8:], wide[:, :, :-8]])
    model = thin(msc_features=True, pool5a=True)
    scores = apply(model, contract.random_variables(model, images.shape), images)["scores"]
    np.testing.assert_allclose(scores[1, :, 51:71], scores[0, :, 50:70], rtol=1e-4, atol=1e-5)
    assert np.std(scores[0, :, 50:70]) > 1e-3


def test_contract():
    contract.check_model(
        deeplab.deeplab_largefov(num_classes=21),
        num_params=20_505_429,
        image_shape=(1, 321, 321, 3),
        num_classes=21,
        thin=thin(num_classes=21, rates=(1,), width=1 / 32),
        thin_shape=(2, 9, 12, 3),
        skips=["fc6"],
    )


@pytest.mark.slow
def test_every_multi_scale_feature_is_used_and_learned():
    images, model = noise(2, 17, 17, 3), thin(rates=(1,), msc_features=True, width=1 / 32)
    params = contract.random_variables(model, images.shape)["params"]

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(jnp.sin(contract.apply(model, {"params": params}, images)["scores"]))

    grads = gradient(params)
    layers = [
        f"msc_{tap}_{i}" for tap in ("image", "pool1", "pool2", "pool3", "pool4") for i in (1, 2)
    ]
    assert set(layers) == {name for name in params if name.startswith("msc")}
    for layer in layers:
        assert all(np.any(leaf) for leaf in grads[layer].values()), layer
    assert params["fc8"]["kernel"].shape[2] == params["fc7"]["kernel"].shape[3] + 5 * 4


def test_resnet_is_frozen_unless_it_is_to_be_trained():
    _, variables = contract.shapes_of(thin_resnet(), (1, 17, 17, 3))
    images = jax.ShapeDtypeStruct((1, 17, 17, 3), jnp.float32)

    def statistics_of(model):
        step = functools.partial(contract.apply, model, train=True, mutable=["batch_stats"])
        jaxpr = jax.make_jaxpr(step)(variables, images)
        return {str(variable) for variable in jaxpr.jaxpr.outvars} & {
            str(variable) for variable in jaxpr.jaxpr.invars
        }

    num_values = len(jax.tree.leaves(variables["batch_stats"]))
    assert len(statistics_of(thin_resnet())) == num_values  # handed through
    assert not statistics_of(thin_resnet(bn="train"))


@pytest.mark.slow
def test_resnet_of_the_paper_strides_in_1x1_convolutions():
    """The first convolution of a block sees the stride, and the whole stage the new dilation."""
    images = noise(1, 33, 33, 3)
    model = thin_resnet(rates=(1,))
    variables = contract.random_variables(model, images.shape)
    outputs = [apply(model.clone(stride_in=k), variables, images) for k in ("1x1", "3x3")]
    np.testing.assert_allclose(outputs[0]["layer1"], outputs[1]["layer1"], rtol=1e-6)
    for layer in ("layer2", "layer3", "layer4"):
        assert outputs[0][layer].shape == outputs[1][layer].shape
        assert np.max(np.abs(outputs[0][layer] - outputs[1][layer])) > 1e-3


@pytest.mark.parametrize(
    "model",
    [thin_resnet(head="fc7x7"), thin_resnet(pool5a=True), thin_resnet(msc_features=True)],
    ids=["7x7", "pool5a", "msc"],
)
def test_resnets_have_no_fc6(model):
    with pytest.raises(ValueError, match="3x3 convolutions"):
        contract.shapes_of(model, (1, 17, 17, 3))


def test_new_layers_start_at_a_deviation_of_one_hundredth():
    @jax.jit
    def init(key):  # the rest is dropped by the compiler
        params = thin(msc_features=True).init(key, jnp.zeros((1, 9, 9, 3)), train=False)["params"]
        return params["fc8"], params["msc_pool4_1"]

    for layer in init(jax.random.key(0)):
        assert 0.005 < np.std(layer["kernel"]) < 0.02
        assert not np.any(layer["bias"])


@pytest.mark.parity
def test_equals_torch():
    """ASPP behind pool5a on three scales, the weights being the same."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    images, model = noise(1, 49, 65, 3), thin(head="aspp_s", pool5a=True, scales=deeplab.SCALES)
    variables = contract.random_variables(model, images.shape)
    weights = {
        name: [torch.tensor(layer["kernel"].transpose(3, 2, 0, 1)), torch.tensor(layer["bias"])]
        for name, layer in variables["params"].items()
    }

    def network(x):
        for stage, (depth, stride) in enumerate([(2, 2), (2, 2), (3, 2), (3, 1), (3, 1)], 1):
            dilation = 2 if stage == 5 else 1
            for i in range(1, depth + 1):
                layer = weights[f"conv{stage}_{i}"]
                x = functional.conv2d(x, *layer, padding=dilation, dilation=dilation).relu()
            x = functional.max_pool2d(x, 3, stride, 1, ceil_mode=True)
        x, total = functional.avg_pool2d(x, 3, 1, 1), 0
        for number, rate in enumerate((2, 4, 8, 12), 1):
            fc6, fc7, fc8 = (weights[f"{layer}_{number}"] for layer in ("fc6", "fc7", "fc8"))
            y = functional.conv2d(x, *fc6, padding=rate, dilation=rate).relu()
            total = total + functional.conv2d(functional.conv2d(y, *fc7).relu(), *fc8)
        return total

    resize = functools.partial(functional.interpolate, mode="bilinear", align_corners=True)
    x = torch.tensor(images.transpose(0, 3, 1, 2))
    sizes = (49, 65), (41, 49), (25, 33)  # 0.75 x 6 units are rounded to 5
    scores = torch.stack([resize(network(resize(x, size)), (7, 9)) for size in sizes]).amax(0)
    expected = resize(scores, (49, 65)).numpy().transpose(0, 2, 3, 1)
    logits = apply(model, variables, images)["logits"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert np.std(expected) > 1e-3
