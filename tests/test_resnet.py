"""Counts, names, sizes and dilation of ResNets; values against torch are in test_resnet_torch."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dense_jax.layers.conv import Conv
from dense_jax.models import resnet
from tests import contract
from tests.torchvision_names import num_keys, torch_shapes

DEPTHS = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3)}
# With a classifier of 1000 classes: parameters, running values, keys of torch's state dict.
PUBLISHED = {
    "resnet50": (resnet.resnet50, 25_557_032, 53_120, 320),
    "resnet101": (resnet.resnet101, 44_549_160, 105_344, 626),
    "resnext101_32x8d": (resnet.resnext101_32x8d, 88_791_336, 202_880, 626),
    "resnext101_64x4d": (resnet.resnext101_64x4d, 83_455_272, 202_880, 626),
}
thin = functools.partial(resnet.ResNet, depths=(1, 2, 2, 2), width=1 / 16)
msra = functools.partial(thin, stride_in="1x1", first_block_dilation="new", pool_ceil=True)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def run(model, variables, images):
    """Outputs in evaluation."""
    return jax.device_get(jax.jit(functools.partial(contract.apply, model))(variables, images))


def random_images(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


# Counts and names.


@functools.cache
def full_size(name, num_classes=1000):
    return contract.shapes_of(PUBLISHED[name][0](num_classes=num_classes), (1, 224, 224, 3))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    _, num_params, num_running, keys = PUBLISHED[name]
    _, variables = full_size(name)
    assert size(variables["params"]) == num_params
    assert size(variables["batch_stats"]) == num_running
    assert num_keys(torch_shapes(variables)) == keys
    blocks = sum(DEPTHS["50" if name == "resnet50" else "101"])
    assert keys == 1 + 5 + blocks * (3 + 15) + 4 * 6 + 2
    assert len(jax.tree.leaves(variables["params"])) == keys - 3 * (1 + 3 * blocks + 4)


@pytest.mark.parametrize(
    ("name", "trunk", "convs"),
    [("resnet50", 23_508_032, None), ("resnet101", 42_500_160, 42_394_816)],
)
def test_counts_of_the_trunk_alone(name, trunk, convs):
    _, variables = full_size(name, None)
    assert size(variables["params"]) == trunk
    kernels = [leaf for leaf in jax.tree.leaves(variables["params"]) if leaf.ndim == 4]
    assert convs is None or size(kernels) == convs


def norm_names(name):
    return {f"{name}.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")}


@pytest.mark.parametrize("name", ["resnet50", "resnext101_32x8d"])
def test_names_are_torchvisions(name):
    expected = {"conv1.weight", "fc.weight", "fc.bias"} | norm_names("bn1")
    for stage, depth in enumerate(DEPTHS["50" if name == "resnet50" else "101"], 1):
        first = f"layer{stage}.0.downsample"
        expected |= {f"{first}.0.weight"} | norm_names(f"{first}.1")
        for block in range(depth):
            for i in (1, 2, 3):
                expected.add(f"layer{stage}.{block}.conv{i}.weight")
                expected |= norm_names(f"layer{stage}.{block}.bn{i}")
    assert set(torch_shapes(full_size(name)[1])) == expected


def test_shapes_of_grouped_kernels():
    wide, narrow = (
        torch_shapes(full_size(name)[1]) for name in ("resnext101_32x8d", "resnext101_64x4d")
    )
    assert wide["layer1.0.conv2.weight"] == (256, 8, 3, 3)
    assert narrow["layer1.0.conv2.weight"] == (256, 4, 3, 3)
    assert wide["layer4.2.conv2.weight"] == (2048, 64, 3, 3)
    assert narrow["layer4.2.conv2.weight"] == (2048, 32, 3, 3)
    assert wide["fc.weight"] == (1000, 2048)


# Sizes.


def sizes(model, side):
    outputs, variables = contract.shapes_of(model, (1, side, side, 3))
    names = ("conv1", "pool1", "layer1", "layer2", "layer3", "layer4")
    return [outputs[name].shape[1] for name in names], variables


@pytest.mark.parametrize(
    ("build", "side", "stride", "expected"),
    [
        (thin, 224, 32, [112, 56, 56, 28, 14, 7]),
        (thin, 224, 16, [112, 56, 56, 28, 14, 14]),
        (thin, 224, 8, [112, 56, 56, 28, 28, 28]),
        (thin, 513, 8, [257, 129, 129, 65, 65, 65]),
        (msra, 224, 32, [112, 57, 57, 29, 15, 8]),
        (functools.partial(msra, pool_padding=0), 224, 32, [112, 56, 56, 28, 14, 7]),  # as released
        (msra, 321, 8, [161, 81, 81, 41, 41, 41]),
        (msra, 1, 8, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_sizes(build, side, stride, expected):
    assert sizes(build(output_stride=stride), side)[0] == expected


@pytest.mark.slow
def test_parameters_do_not_depend_on_the_output_stride():
    trees = [sizes(resnet.resnet50(output_stride=stride), 64)[1] for stride in (32, 16, 8)]
    assert trees[0] == trees[1] == trees[2]
    wrong: Any = 4
    with pytest.raises(ValueError, match="received 4"):
        sizes(thin(output_stride=wrong), 64)


# Dilation instead of striding.


@functools.cache
def strided(stride_in):
    model, images = thin(stride_in=stride_in), random_images(2, 75, 92, 3)
    variables = contract.random_variables(model, images.shape)
    return images, variables, run(model, variables, images)


@pytest.mark.parametrize(
    ("stride_in", "first_block_dilation", "output_stride", "is_equal"),
    [
        ("3x3", "previous", 16, True),
        ("3x3", "previous", 8, True),
        ("1x1", "new", 16, True),
        ("1x1", "new", 8, True),
        ("3x3", "new", 8, False),
        ("1x1", "previous", 8, False),
    ],
)
def test_dense_features_at_strided_places_are_the_strided_features(
    stride_in, first_block_dilation, output_stride, is_equal
):
    """With the same weights; sides are divided by no stride."""
    images, variables, expected = strided(stride_in)
    model = thin(
        stride_in=stride_in,
        first_block_dilation=first_block_dilation,
        output_stride=output_stride,
    )
    dense, finer = run(model, variables, images), 32 // output_stride
    assert dense["layer4"].shape[1] == -(-75 // output_stride)
    sampled, features = dense["layer4"][:, ::finer, ::finer], expected["layer4"]
    assert features.std() > 0.01
    assert np.allclose(sampled, features, rtol=1e-4, atol=1e-5) == is_equal


# Strides, dilations and fields.


def windows(model):
    """{"layer3_0/conv2": (kernel size, stride, dilation)} of all convolutions, in order."""
    rows: dict[str, Any] = {}

    def record(call, args, options, context):
        layer = context.module
        if isinstance(layer, Conv):
            rows["/".join(layer.path)] = (layer.kernel_size, layer.strides, layer.dilation)
        return call(*args, **options)

    with nn.intercept_methods(record):
        contract.shapes_of(model, (1, 64, 64, 3))
    return rows


@pytest.mark.parametrize(
    ("stride", "rule", "expected"),
    [
        (32, "previous", {3: [1] * 6, 4: [1] * 3}),
        (32, "new", {3: [1] * 6, 4: [1] * 3}),
        (16, "previous", {3: [1] * 6, 4: [1, 2, 2]}),
        (8, "previous", {3: [1] + [2] * 5, 4: [2, 4, 4]}),
        (16, "new", {3: [1] * 6, 4: [2] * 3}),
        (8, "new", {3: [2] * 6, 4: [4] * 3}),
    ],
)
def test_dilations_of_the_3x3_convolutions(stride, rule, expected):
    rows = windows(resnet.resnet50(output_stride=stride, first_block_dilation=rule))
    for stage in (1, 2, 3, 4):
        found = [
            dilation
            for name, (_, _, dilation) in rows.items()
            if name.startswith(f"layer{stage}_") and name.endswith("conv2")
        ]
        assert found == expected.get(stage, [1] * len(found))
    others = [dilation for name, (_, _, dilation) in rows.items() if not name.endswith("conv2")]
    assert set(others) == {1}


@pytest.mark.parametrize(("stride_in", "strided"), [("3x3", "conv2"), ("1x1", "conv1")])
def test_where_blocks_stride(stride_in, strided):
    for output_stride, stages in ((32, (2, 3, 4)), (16, (2, 3)), (8, (2,))):
        model = resnet.resnet50(output_stride=output_stride, stride_in=stride_in)
        found = {name for name, (_, stride, _) in windows(model).items() if stride == 2}
        layers = {f"layer{i}_0/{name}" for i in stages for name in (strided, "downsample_0")}
        assert found == {"conv1"} | layers


@pytest.mark.parametrize("output_stride", [32, 16, 8])
@pytest.mark.parametrize(
    ("build", "stride_in", "rule", "field"),
    [
        (resnet.resnet50, "3x3", "previous", 427),
        pytest.param(resnet.resnet101, "3x3", "previous", 971, marks=pytest.mark.slow),
        (resnet.resnet50, "1x1", "new", 483),
        pytest.param(resnet.resnet101, "1x1", "new", 1027, marks=pytest.mark.slow),
    ],
)
def test_receptive_fields_do_not_depend_on_the_output_stride(
    build, stride_in, rule, field, output_stride
):
    """Araujo, Norris, Sim, Distill 2019: a layer adds (k - 1) d times its input's stride."""
    model = build(stride_in=stride_in, first_block_dilation=rule, output_stride=output_stride)
    rows = {k: v for k, v in windows(model).items() if "downsample" not in k}
    found, step = 1, 1
    for name, (kernel, stride, dilation) in rows.items():
        found, step = found + (kernel - 1) * dilation * step, step * stride
        if name == "conv1":
            found, step = found + 2 * step, step * 2  # 3x3 pooling
    assert (found, step) == (field, output_stride)


# What channels, batch statistics and devices do.


def test_rgb_and_bgr_swap():
    """A reversed first kernel on reversed channels; how BGR weights are imported."""
    images, variables, expected = strided("3x3")
    kernel = variables["params"]["conv1"]["kernel"]
    swapped = {**variables["params"], "conv1": {"kernel": kernel[:, :, ::-1]}}
    outputs = run(thin(), {**variables, "params": swapped}, images[..., ::-1])
    for name in ("conv1", "layer4"):
        np.testing.assert_allclose(outputs[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_frozen_normalisation_trains_kernels_alone():
    model, images = thin(depths=(1, 1, 1, 1), bn="frozen"), random_images(2, 33, 46, 3)
    variables = contract.random_variables(model, images.shape)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        all_variables = {**variables, "params": params}
        outputs, state = contract.apply(model, all_variables, images, True, mutable=["batch_stats"])
        return jnp.sum(outputs["layer4"] ** 2), (outputs["layer4"], state)

    grads, (features, state) = gradient(variables["params"])
    expected = run(model, variables, images)["layer4"]
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(state["batch_stats"], variables["batch_stats"])
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(grads)
    for path, grad in flat.items():
        assert np.any(grad) == (path[-1] == "kernel"), path


def gradient_of(model, variables, images) -> tuple[dict[str, Any], str]:
    """The gradient of a network's last stage by path, and its program."""

    def loss(params):
        all_variables = {**variables, "params": params}
        outputs, _ = contract.apply(model, all_variables, images, True, mutable=["batch_stats"])
        return jnp.sum(list(outputs.values())[-1] ** 2)

    program = jax.make_jaxpr(jax.grad(loss))(variables["params"])
    grads: Any = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(variables["params"]), sep="/")
    return grads, str(program)


@pytest.mark.slow
def test_a_network_may_end_early_and_its_first_parts_may_be_frozen():
    images = random_images(2, 33, 46, 3)
    model = thin(depths=(1, 1, 1), num_frozen=2)
    variables = contract.random_variables(model, images.shape)
    assert not any(name.startswith("layer4") for name in variables["params"])
    grads, program = gradient_of(model, variables, images)
    for path, grad in grads.items():
        assert np.any(grad) == path.startswith(("layer2_", "layer3_")), path
    whole = gradient_of(model.clone(num_frozen=0), variables, images)
    assert program.count("conv_general_dilated") < whole[1].count("conv_general_dilated")
    for path, grad in whole[0].items():
        assert np.any(grad), path
        if path.startswith(("layer2_", "layer3_")):
            np.testing.assert_allclose(grads[path], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_blocks_computed_again_give_the_same_gradients():
    model, images = thin(depths=(1, 1), bn="frozen"), random_images(2, 33, 46, 3)
    variables = contract.random_variables(model, images.shape)
    stored, program = gradient_of(model, variables, images)
    again, other_program = gradient_of(model.clone(remat=True), variables, images)
    assert "remat" not in program
    assert other_program.count("remat") == 2
    assert stored.keys() == again.keys()
    for path, grad in stored.items():
        np.testing.assert_allclose(again[path], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_training_does_not_depend_on_the_number_of_devices():
    images = random_images(4, 33, 46, 3)
    variables = contract.random_variables(thin(), images.shape)

    def train(axis_name, images):
        model = thin(axis_name=axis_name)
        outputs, state = contract.apply(model, variables, images, True, mutable=["batch_stats"])
        return outputs["layer4"], state

    features, state = jax.jit(functools.partial(train, None))(images)
    spread = jax.jit(jax.vmap(functools.partial(train, "devices"), axis_name="devices"))
    parts, states = spread(images.reshape(2, 2, *images.shape[1:]))
    np.testing.assert_allclose(np.reshape(parts, features.shape), features, rtol=1e-3, atol=1e-4)
    first = jax.tree.map(lambda leaf: leaf[0], states)
    chex.assert_trees_all_close(first, state, rtol=1e-3, atol=1e-4)
    before = jax.tree.leaves(variables["batch_stats"])
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(state), before, strict=True))


def test_blocks_may_start_as_their_shortcuts():
    @jax.jit
    def init(key):  # what is not returned is not computed
        params = [
            thin(zero_init_residual=zero).init(key, random_images(1, 32, 32, 3), train=False)
            for zero in (True, False)
        ]
        return [p["params"]["layer2_1"] for p in params]

    zero, usual = init(jax.random.key(0))
    for block, scale in ((zero, 0), (usual, 1)):
        assert np.all(block["bn3"]["scale"] == scale)
        assert np.all(block["bn2"]["scale"] == 1)
