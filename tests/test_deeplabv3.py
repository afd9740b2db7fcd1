"""Counts, names and promises of torchvision's heads; values against torch: test_resnet_torch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.models import deeplabv3, resnet
from tests import contract
from tests.torchvision_names import num_keys, torch_shapes

# With 21 classes and the auxiliary head: parameters, running values, keys of torch's state dict.
PUBLISHED = {
    "fcn_resnet50": (deeplabv3.fcn_resnet50, 35_322_218, 54_656, 334),
    "fcn_resnet101": (deeplabv3.fcn_resnet101, 54_314_346, 106_880, 640),
    "deeplabv3_resnet50": (deeplabv3.deeplabv3_resnet50, 42_004_074, 57_216, 370),
    "deeplabv3_resnet101": (deeplabv3.deeplabv3_resnet101, 60_996_202, 109_440, 676),
}
WITHOUT_AUX = {
    "fcn_resnet50": (32_957_013, 54_144, 326),
    "deeplabv3_resnet101": (58_630_997, 108_928, 668),
}
AUX = 2_365_205  # parameters of the auxiliary head
thin = functools.partial(
    deeplabv3.ResNetSegmenter,
    num_classes=3,
    trunk=functools.partial(resnet.ResNet, depths=(1, 1, 1, 1)),
    width=1 / 16,
    dropout_rate=0.0,
)


@functools.cache
def shapes(name, aux):
    model = PUBLISHED[name][0](num_classes=21, aux=aux)
    outputs, variables = contract.shapes_of(model, (1, 65, 97, 3))
    return outputs, variables, torch_shapes(variables)


def counts(name, aux):
    _, variables, names = shapes(name, aux)
    sums = (
        sum(leaf.size for leaf in jax.tree.leaves(variables[kind]))
        for kind in ("params", "batch_stats")
    )
    return (*sums, num_keys(names))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    assert counts(name, aux=True) == PUBLISHED[name][1:]


@pytest.mark.parametrize("name", WITHOUT_AUX)
def test_published_counts_without_the_auxiliary_head(name):
    assert counts(name, aux=False) == WITHOUT_AUX[name]
    assert PUBLISHED[name][1] - WITHOUT_AUX[name][0] == 2_365_205


def norm_shapes(name, channels):
    kinds = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{kind}": (channels,) for kind in kinds}


def fcn_shapes(name, channels):
    inner = channels // 4
    return {
        f"{name}.0.weight": (inner, channels, 3, 3),
        **norm_shapes(f"{name}.1", inner),
        f"{name}.4.weight": (21, inner, 1, 1),
        f"{name}.4.bias": (21,),
    }


def test_names_and_shapes_of_the_heads_are_torchvisions():
    aspp = "classifier.0"
    deeplab = {
        f"{aspp}.convs.4.1.weight": (256, 2048, 1, 1),
        **norm_shapes(f"{aspp}.convs.4.2", 256),
        f"{aspp}.project.0.weight": (256, 1280, 1, 1),
        **norm_shapes(f"{aspp}.project.1", 256),
        "classifier.1.weight": (256, 256, 3, 3),
        **norm_shapes("classifier.2", 256),
        "classifier.4.weight": (21, 256, 1, 1),
        "classifier.4.bias": (21,),
    }
    for i, side in enumerate((1, 3, 3, 3)):
        deeplab[f"{aspp}.convs.{i}.0.weight"] = (256, 2048, side, side)
        deeplab |= norm_shapes(f"{aspp}.convs.{i}.1", 256)
    assert num_keys(deeplab) == 44
    aux = fcn_shapes("aux_classifier", 1024)
    assert num_keys(aux) == 8
    for name, head in (
        ("deeplabv3_resnet101", deeplab),
        ("fcn_resnet50", fcn_shapes("classifier", 2048)),
    ):
        found = shapes(name, aux=True)[2]
        trunk = {k: v for k, v in found.items() if k.startswith("backbone.")}
        assert {k: v for k, v in found.items() if k not in trunk} == head | aux
        assert num_keys(trunk) == {"deeplabv3_resnet101": 624, "fcn_resnet50": 318}[name]


def test_sizes_and_types():
    outputs, _, _ = shapes("deeplabv3_resnet50", aux=True)
    assert outputs["scores"].shape == outputs["aux_scores"].shape == (1, 9, 13, 21)
    assert outputs["logits"].shape == outputs["aux_logits"].shape == (1, 65, 97, 21)
    for height, width in [(1, 1), (1, 70), (31, 33)]:
        for head in ("deeplabv3", "fcn"):
            small = contract.shapes_of(thin(head=head), (1, height, width, 3))[0]
            assert small["logits"].shape == (1, height, width, 3)
            assert "aux_logits" not in small


def test_full_size_in_float32_and_bfloat16():
    contract.check_full(
        deeplabv3.fcn_resnet50(num_classes=21),
        num_params=PUBLISHED["fcn_resnet50"][1] - AUX,
        image_shape=(1, 65, 97, 3),
        num_classes=21,
    )


def test_contract():
    contract.check_model(
        deeplabv3.deeplabv3_resnet50(num_classes=21),
        num_params=PUBLISHED["deeplabv3_resnet50"][1] - AUX,
        image_shape=(1, 65, 97, 3),
        num_classes=21,
        thin=thin(num_classes=21, axis_name="devices"),
        thin_shape=(2, 17, 26, 3),
        skips=["classifier_1"],
    )


def test_rates_see_as_many_pixels_at_every_stride():
    for output_stride, rates in ((8, (12, 24, 36)), (16, (6, 12, 18)), (32, (3, 6, 9))):
        found = []

        def record(call, args, options, context, found=found):
            if isinstance(context.module, deeplabv3.ASPP) and context.method_name == "__call__":
                found.append(context.module.rates)
            return call(*args, **options)

        with nn.intercept_methods(record):
            contract.shapes_of(thin(output_stride=output_stride), (1, 64, 64, 3))
        assert found == [rates]


def test_dropout_is_torchvisions_where_none_is_given():
    images = jnp.ones((1, 33, 33, 3))
    rates = {}

    def record(call, args, options, context):
        if type(context.module).__name__ == "Dropout":
            rates.setdefault(head, []).append(context.module.rate)
        return call(*args, **options)

    for head in ("deeplabv3", "fcn"):
        model = thin(head=head, aux=True, dropout_rate=None)
        with nn.intercept_methods(record):
            contract.shapes_of(model, images.shape)
    assert rates == {"deeplabv3": [0.5, 0.1], "fcn": [0.1, 0.1]}


def test_a_frozen_trunk_leaves_the_heads_to_learn():
    model, rng = thin(bn="frozen", aux=True), np.random.default_rng(0)
    images = rng.standard_normal((2, 33, 42, 3), np.float32)
    variables = contract.random_variables(model, images.shape)

    @jax.jit
    def new_statistics(variables):
        return contract.apply(model, variables, images, True, mutable=["batch_stats"])[1]

    before, after = variables["batch_stats"], new_statistics(variables)["batch_stats"]
    for part in before:
        is_same = jax.tree.map(np.array_equal, before[part], jax.device_get(after[part]))
        assert all(jax.tree.leaves(is_same)) == (part == "backbone"), part
