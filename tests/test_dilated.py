import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.layers import init
from dense_jax.layers.conv import conv
from dense_jax.models import dilated, vgg
from dense_jax.models.dilated import ContextModule, Dilated, FrontEnd
from tests import contract, members

thin = functools.partial(Dilated, width=1 / 64, dropout_rate=0.0)
thin_front = functools.partial(FrontEnd, 2, width=1 / 64)


def apply(model, variables, images):
    return jax.jit(functools.partial(contract.apply, model))(variables, images)


def apply_context(module, variables, scores):
    return jax.jit(module.apply)(variables, scores)


def num_parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def full_shapes(build, num_classes, side=900):
    return contract.shapes_of(build(num_classes), (1, side, side, 3))


def context_kernels(module, num_classes, seed=0):
    """Initial parameters."""
    return jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, 8, 8, num_classes)))


@pytest.mark.parametrize(
    ("side", "units"), [(900, 66), (628, 32), (500, 16), (852, 60), (1100, 91), (1640, 159)]
)
def test_fact_1_sizes(side, units):
    """The last one, KITTI's, is what Caffe's pooling makes of a size that is not 8 m + 372."""
    outputs, _ = full_shapes(Dilated, 21, side)
    assert outputs["scores"].shape == (1, units, units, 21)
    assert outputs["logits"].shape == (1, side - 372, side - 372, 21)


def test_layers_of_the_release():
    outputs, variables = full_shapes(Dilated, 21)
    sizes = {name: x.shape[1] for name, x in outputs.items()}
    assert sizes == {
        "conv1_1": 898, "conv1_2": 896, "pool1": 448, "conv2_1": 446, "conv2_2": 444, "pool2": 222,
        "conv3_1": 220, "conv3_2": 218, "conv3_3": 216, "pool3": 108,
        "conv4_1": 106, "conv4_2": 104, "conv4_3": 102, "conv5_1": 98, "conv5_2": 94,
        "conv5_3": 90, "fc6": 66, "fc7": 66, "final": 66, "scores": 66, "logits": 528,
    }  # fmt: skip
    counts = {name: num_parameters(layer) for name, layer in variables["params"].items()}
    assert counts == {
        "conv1_1": 1_792, "conv1_2": 36_928, "conv2_1": 73_856, "conv2_2": 147_584,
        "conv3_1": 295_168, "conv3_2": 590_080, "conv3_3": 590_080, "conv4_1": 1_180_160,
        "conv4_2": 2_359_808, "conv4_3": 2_359_808, "conv5_1": 2_359_808, "conv5_2": 2_359_808,
        "conv5_3": 2_359_808, "fc6": 102_764_544, "fc7": 16_781_312, "final": 86_037,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("build", "num_classes", "num_params"),
    [
        (dilated.front_end, 21, 134_346_581),
        (dilated.dilated_basic, 21, 134_374_973),
        (dilated.dilated_large, 21, 141_149_720),
        (dilated.dilation8, 11, 134_313_443),
        (dilated.dilation7, 11, 134_312_343),
        (dilated.dilation10, 19, 134_368_179),
    ],
)
def test_fact_2_parameters(build, num_classes, num_params):
    _, variables = full_shapes(build, num_classes)
    assert num_parameters(variables) == num_params


@pytest.mark.parametrize(
    ("large", "num_classes", "num_params"),
    [
        (False, 21, 28_392),
        (False, 11, 7_832),
        (False, 19, 23_256),
        (True, 21, 6_803_139),
        (True, 19, 5_569_185),
    ],
)
def test_fact_2_parameters_of_the_context_module(large, num_classes, num_params):
    scores = jnp.zeros((1, 8, 8, num_classes))
    shapes = jax.eval_shape(ContextModule(large=large).init, jax.random.key(0), scores)
    assert num_parameters(shapes) == num_params
    counts = [num_parameters(shapes["params"][name]) for name in ContextModule().names]
    if (large, num_classes) == (True, 21):
        assert counts == [7_980, 15_918, 31_836, 127_176, 508_368, 2_032_800, 4_064_928]
        assert num_parameters(shapes["params"]["ctx_final"]) == 14_133
    if (large, num_classes) == (False, 21):
        assert counts == [3_990] * 7
        assert num_parameters(shapes["params"]["ctx_final"]) == 462


def test_names_are_those_of_the_release_and_contexts_share_the_front_end():
    front = full_shapes(Dilated, 21)[1]["params"]
    names = {
        7: ["ctx_conv1_1", "ctx_conv1_2", "ctx_conv2_1", "ctx_conv3_1", "ctx_conv4_1", "ctx_fc1"],
    }
    names[8] = [*names[7], "ctx_conv5_1"]
    names[10] = [*names[8], "ctx_conv6_1", "ctx_conv7_1"]
    for layers, added in names.items():
        build = functools.partial(dilated.dilated_basic, context_layers=layers)
        tree = contract.shapes_of(build(21), (1, 381, 381, 3))[1]["params"]
        assert set(tree) - set(front) == {*added, "ctx_final"}
        assert {name: tree[name] for name in front} == front


@pytest.mark.parametrize(
    ("layers", "fields", "image_field"),
    [
        (8, [3, 5, 9, 17, 33, 65, 67], 908),
        (7, [3, 5, 9, 17, 33, 35], 652),
        (10, [3, 5, 9, 17, 33, 65, 129, 257, 259], 2444),
    ],
)
def test_facts_3_and_8_fields_of_the_context_module(layers, fields, image_field):
    dilations = ContextModule(layers).dilations
    assert [1 + 2 * n for n in itertools.accumulate(dilations)] == fields
    grid = FrontEnd(21).grid
    for dilation in dilations:
        grid = grid.conv(3, dilation=dilation)
    assert (grid.field, grid.step) == (image_field, 8)


def positive(shapes):
    """Kernels with which every unit sees all that it can see."""
    return jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.3 / leaf.shape[-1] * (len(leaf.shape) > 1), np.float32),
        shapes,
    )


def points(side, places):
    """One black image for each place, with one white pixel on the diagonal."""
    images = np.zeros((len(places), side, side, 3), np.float32)
    for image, place in zip(images, places, strict=True):
        image[place, place] = 1
    return images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pools", "field", "stride", "context"),
    [("removed", 380, 8, 186), ("kept_stride1", 404, 8, 198), ("strided", 404, 32, 186)],
)
def test_fact_3_field_and_place_of_the_front_end(pools, field, stride, context):
    """Unit r sees the pixels from r * stride on; with the context it is centred in its block."""
    model = thin_front(pools=pools)
    assert (model.grid.field, model.stride, model.context) == (field, stride, context)
    assert model.grid.first - model.context == (stride - 1) / 2  # 3.5 at stride 8
    side = field + 2 * stride
    places = sorted({0, stride - 1, stride, 2 * stride - 1, field - 1, field, side - 1})
    _, shapes = contract.shapes_of(model, (1, side, side, 3))
    seen = apply(model, positive(shapes), points(side, places))["final"]
    seen = np.diagonal(seen[..., 0], axis1=1, axis2=2) > 0
    rows = np.arange(3) * stride
    expected = [(rows <= place) & (place < rows + field) for place in places]
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.slow
def test_fact_3_field_of_both_is_908():
    side, places = 372 + 8 * 69, [7, 8, 915, 916]
    model = thin(1, context="basic", context_pad="per_layer", context_init="random")
    _, shapes = contract.shapes_of(model, (1, side, side, 3))
    scores = apply(model, positive(shapes), points(side, places))["scores"]
    seen = [bool(x[34, 34, 0] > 0) for x in scores]  # the unit whose field starts at pixel 8
    assert seen == [False, True, True, False]


@pytest.mark.parametrize(
    ("large", "pad"),
    [(False, "once_zero"), (False, "per_layer"), (True, "once_reflect"), (True, "per_layer")],
)
def test_fact_4_identity(large, pad):
    """Sums of copies are exact for numbers of few digits; negative scores are cut off."""
    scores = np.random.default_rng(0).integers(-50, 100, (2, 9, 7, 3)).astype(np.float32) / 16
    scores[0] = np.abs(scores[0])
    module = ContextModule(large=large, pad=pad)
    outputs = apply_context(module, context_kernels(ContextModule(large=large), 3), scores)
    np.testing.assert_array_equal(outputs["ctx_final"], np.maximum(scores, 0))
    np.testing.assert_array_equal(outputs["ctx_final"][0], scores[0])
    shares = [1 / 2, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 32] if large else [1] * 7
    if pad == "per_layer":
        for name, share in zip(module.names, shares, strict=True):
            expected = np.repeat(scores[:1] * share, round(1 / share), axis=-1)
            np.testing.assert_array_equal(outputs[name][:1], expected)


def test_identity_kernels_of_equation_5():
    """Of 2 classes: channels a, a, b, b to a, a, a, a, b, b, b, b, a quarter each."""
    kernel = np.array(init.identity(2)(jax.random.key(0), (3, 3, 4, 8)))
    centre = [[0.25] * 4 + [0] * 4] * 2 + [[0] * 4 + [0.25] * 4] * 2
    np.testing.assert_array_equal(kernel[1, 1], centre)
    kernel[1, 1] = 0
    assert not kernel.any()
    noisy = np.asarray(init.identity(2, 0.01)(jax.random.key(0), (3, 3, 64, 128)))
    taps = np.asarray(init.identity(2)(jax.random.key(0), (3, 3, 64, 128))) > 0
    np.testing.assert_array_equal(noisy[taps], np.float32(2 / 128))
    np.testing.assert_allclose(noisy[~taps].std(), 0.01 * 2 / 128, rtol=0.02)
    assert abs(noisy[~taps].mean()) < 0.01 * 2 / 128 / 100
    for shape, message in [((3, 3, 4, 5), "multiples"), ((2, 2, 4, 4), "no centre")]:
        with pytest.raises(ValueError, match=message):
            init.identity(2)(jax.random.key(0), shape)


def test_copies_of_a_class_are_told_apart_by_noise_only():
    scores = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (1, 8, 8, 2)), jnp.float32)
    shapes = [(3, 3, 2, 4), (3, 3, 4, 4), (1, 1, 4, 2)]

    @functools.partial(jax.jit, static_argnums=0)
    def gradient_of_the_first_kernel(noise):
        keys = jax.random.split(jax.random.key(0), len(shapes))
        first, second, last = map(init.identity(2, noise), keys, shapes)

        def loss(first):
            x = conv(nn.relu(conv(nn.relu(conv(scores, first)), second)), last)
            return jnp.sum(jnp.square(x - 1))

        return jax.grad(loss)(first)

    alike = gradient_of_the_first_kernel(0.0)
    np.testing.assert_array_equal(alike[..., 0], alike[..., 1])
    apart = gradient_of_the_first_kernel(0.01)
    assert np.max(np.abs(apart[..., 0] - apart[..., 1])) > 0.01 * np.max(np.abs(apart))


def test_starts_of_the_context_module_by_default():
    assert dilated.dilated_basic(3).context_module().kernel_init == "identity"
    assert dilated.dilated_large(3).context_module().kernel_init == "identity_noise"
    asked = dilated.dilated_large(3, context_init="random").context_module()
    assert asked.kernel_init == "random"


def test_fact_5_fields_of_stacked_dilations():
    x = jnp.zeros((1, 40, 1, 1)).at[0, 20].set(1)
    for n, field in enumerate([3, 7, 15, 31], start=1):
        x = conv(x, jnp.ones((3, 1, 1, 1)), dilation=2 ** (n - 1))
        assert int(jnp.count_nonzero(x)) == field == 2 ** (n + 1) - 1


@pytest.mark.slow
@pytest.mark.parametrize("pools", members(["removed", "kept_stride1", "strided"], ["removed"]))
@pytest.mark.parametrize("pad", ["valid_reflect", "same"])
def test_fact_6_units_cover_images_of_every_size(pools, pad):
    model = thin(3, pools=pools, pad=pad)
    front = model.front_end()
    edge = 2 * front.context if pad == "valid_reflect" else 0
    for height, width in [(1, 1), (7, 8), (9, 33), (64, 100), (375, 500)]:
        outputs, _ = contract.shapes_of(model, (1, height + edge, width + edge, 3))
        assert outputs["logits"].shape == (1, height, width, 3)
        units = (-(-height // front.stride), -(-width // front.stride))
        assert outputs["scores"].shape[1:3] == units
    if edge:
        with pytest.raises(ValueError, match=f"not larger than their context, {edge // 2} pixels"):
            contract.shapes_of(model, (1, edge, edge + 8, 3))


def test_fact_7_a_tile_of_cityscapes():
    outputs, _ = full_shapes(dilated.dilation10, 19, 1396)
    assert outputs["scores"].shape == (1, 128, 128, 19)
    assert outputs["logits"].shape == (1, 1024, 1024, 19)


def test_fact_9_centre_taps_know_no_dilation():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 9, 9, 2)), jnp.float32)
    kernel = jnp.zeros((3, 3, 2, 4)).at[1, 1].set(jnp.asarray(rng.standard_normal((2, 4))))
    results = [conv(x, kernel, dilation=dilation) for dilation in (1, 2, 16)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.slow
def test_both_paddings_differ_only_near_the_edge():
    layers, reach = 7, 17
    scores = np.random.default_rng(0).uniform(0, 1, (1, 45, 40, 2)).astype(np.float32)
    variables = context_kernels(ContextModule(layers, kernel_init="random"), 2)
    results = {}
    for pad in ("once_zero", "once_reflect", "per_layer"):
        module = ContextModule(layers, pad=pad)
        assert sum(module.dilations) == reach
        results[pad] = np.asarray(apply_context(module, variables, scores)["ctx_final"])
    inner = (slice(None), slice(reach, -reach), slice(reach, -reach))
    for pad in ("once_zero", "once_reflect"):
        difference = np.abs(results[pad] - results["per_layer"])
        assert np.max(difference[inner]) < 1e-6
        assert np.max(difference) > 1e-3
    assert np.std(results["per_layer"][inner]) > 1e-3


def test_what_is_padded_once_is_run_without_padding():
    scores = np.random.default_rng(0).uniform(0, 1, (1, 6, 8, 2)).astype(np.float32)
    module = ContextModule(7, pad="once_reflect", kernel_init="random")
    variables = context_kernels(module, 2)

    @jax.jit
    def by_hand(x, params):
        x = jnp.pad(x, ((0, 0), (17, 17), (17, 17), (0, 0)), mode="reflect")
        for name, dilation in zip(module.names, (1, 1, 2, 4, 8, 1), strict=True):
            x = nn.relu(conv(x, params[name]["kernel"], padding=0, dilation=dilation))
        return x @ params["ctx_final"]["kernel"][0, 0]

    expected = by_hand(scores, variables["params"])
    found = apply_context(module, variables, scores)["ctx_final"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_dense_pooling_is_vgg_at_every_fourth_place():
    """Same weights: dense units, sampled, and those of the plain table of VGG-16."""
    plain = tuple(layer._replace(padding=0) for layer in vgg.vgg16_layers())
    assert dilated.front_end_layers("strided") == plain
    images = np.random.default_rng(0).standard_normal((1, 436, 468, 3)).astype(np.float32)
    model = thin_front(pools="kept_stride1")
    variables = contract.random_variables(model, images.shape)
    dense = apply(model, variables, images)["fc7"]
    strided = apply(vgg.Stack(plain, width=1 / 64), variables, images)["fc7"]
    assert dense.shape[1:3] == (5, 9)
    np.testing.assert_allclose(dense[:, ::4, ::4], strided, rtol=1e-4)
    assert np.std(strided) > 1e-3


@pytest.mark.slow
def test_dense_pooling_keeps_the_size_where_layers_are_padded():
    x = np.zeros((1, 5, 5, 1), np.float32)
    x[0, 2, 2] = 1
    assert not dilated._pool_densely(jnp.asarray(-1 - x), 2, same=True).max() > -1
    first = dilated._pool_densely(jnp.asarray(x), 1, same=True)[0, ..., 0]
    np.testing.assert_array_equal(np.argwhere(first), [[2, 2], [2, 3], [3, 2], [3, 3]])
    second = dilated._pool_densely(jnp.asarray(x), 2, same=True)[0, ..., 0]
    np.testing.assert_array_equal(np.argwhere(second), [[1, 1], [1, 3], [3, 1], [3, 3]])


enlarge = jax.jit(dilated.enlarge, static_argnums=(1, 2, 3))


def by_hand(probabilities, height, width):
    """The release's interpolation of [h, w, C], in loops, with the last unit repeated."""
    rows, columns, _ = probabilities.shape
    result = np.zeros((height, width, probabilities.shape[2]))
    for i, j in np.ndindex(height, width):
        up, left = i // 8, j // 8
        down, right = min(up + 1, rows - 1), min(left + 1, columns - 1)
        di, dj = i / 8 - up, j / 8 - left
        above = (1 - dj) * probabilities[up, left] + dj * probabilities[up, right]
        below = (1 - dj) * probabilities[down, left] + dj * probabilities[down, right]
        result[i, j] = (1 - di) * above + di * below
    return result


def test_probabilities_are_interpolated_with_unit_r_at_pixel_8r():
    scores = np.random.default_rng(0).standard_normal((1, 3, 4, 2)).astype(np.float32)
    logits = enlarge(scores, (22, 32), 8, "probabilities")
    probabilities = np.asarray(jax.nn.softmax(scores[0]), np.float64)
    np.testing.assert_allclose(np.exp(logits[0]), by_hand(probabilities, 22, 32), rtol=1e-5)
    np.testing.assert_allclose(np.exp(logits[0, ::8, ::8]), probabilities, rtol=1e-5)


@pytest.mark.parametrize("how", ["probabilities", "scores"])
def test_units_behind_an_image_do_not_matter(how):
    scores = np.random.default_rng(0).standard_normal((2, 3, 4, 2)).astype(np.float32)
    sizes = jnp.array([[9, 24], [24, 32]])
    both = enlarge(scores, (24, 32), 8, how, sizes)
    alone = enlarge(jnp.asarray(scores[:1, :2, :3]), (9, 24), 8, how)
    np.testing.assert_allclose(both[:1, :9, :24], alone, rtol=1e-5, atol=1e-6)
    whole = enlarge(jnp.asarray(scores[1:]), (24, 32), 8, how)
    np.testing.assert_allclose(both[1:], whole, rtol=1e-5, atol=1e-6)
    assert np.isfinite(enlarge(scores, (24, 32), 8, how, 0 * sizes)).all()


def test_scores_are_enlarged_around_the_middle_of_their_pixels():
    scores = jnp.asarray(np.arange(6).reshape(1, 6, 1, 1) * np.ones((1, 1, 6, 2)), jnp.float32)
    enlarged = enlarge(scores, (48, 45), 8, "scores")
    assert enlarged.shape == (1, 48, 45, 2)
    middle = (np.arange(48) - 3.5) / 8
    np.testing.assert_allclose(enlarged[0, 4:44, 20, 1], middle[4:44], rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # FCN's and SegNet's are fast
def test_contract():
    contract.check_model(
        dilated.dilated_basic(21, pad="same"),
        num_params=134_374_973,
        image_shape=(1, 500, 375, 3),
        num_classes=21,
        thin=thin(
            21,
            context="basic",
            context_layers=7,
            pools="kept_stride1",
            pad="same",
            upsample="scores",
        ),
        thin_shape=(2, 25, 40, 3),
        skips=["final", "ctx_conv1_1", "ctx_conv4_1", "ctx_fc1", "ctx_final"],
    )


def test_units_that_see_no_padding_are_those_of_the_network_without():
    """Unit 24 of the padded one sees from pixel 24 * 8 - 186 = 6 on."""
    images = np.random.default_rng(0).standard_normal((1, 408, 408, 3)).astype(np.float32)
    same = thin_front(pad="same")
    variables = contract.random_variables(same, images.shape)
    padded = apply(same, variables, images)["fc7"][:, 24:27, 24:27]
    valid = apply(thin_front(), variables, images[:, 6:, 6:])["fc7"][:, :3, :3]
    np.testing.assert_allclose(padded, valid, rtol=1e-4, atol=1e-6)
    assert np.std(valid) > 1e-3


def test_a_frozen_front_end_neither_learns_nor_drops():
    images = np.random.default_rng(0).standard_normal((1, 24, 24, 3)).astype(np.float32)
    model = Dilated(
        2, context="basic", pad="same", frozen_front=True, width=1 / 64, dropout_rate=0.5
    )
    variables = contract.random_variables(model, images.shape)

    @jax.jit
    def scores_and_gradients(variables, key):
        def loss(variables):
            outputs = contract.apply(model, variables, images, True, rngs={"dropout": key})
            return jnp.sum(jnp.square(outputs["scores"])), outputs["scores"]

        return jax.grad(loss, has_aux=True)(variables)

    (grads, scores), (_, others) = (
        scores_and_gradients(variables, jax.random.key(seed)) for seed in (0, 1)
    )
    np.testing.assert_array_equal(scores, others)
    for name, grad in grads["params"].items():
        assert np.any(grad["kernel"]) == name.startswith("ctx_")
