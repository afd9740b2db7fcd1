import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.models import unet
from tests import contract

PUBLISHED = {  # (network, channels, number of parameters)
    "1 to 2": (unet.unet(num_classes=2), 1, 31_030_658),
    "3 to 21": (unet.unet(num_classes=21), 3, 31_033_045),
    "1 to 21": (unet.unet(num_classes=21), 1, 31_031_893),
    "release": (unet.unet_release(num_classes=2), 1, 31_100_354),
    "batch": (unet.unet(num_classes=21, norm="batch"), 3, 31_038_933),
    "group": (unet.unet(num_classes=21, norm="group"), 3, 31_038_933),
}
thin = functools.partial(unet.UNet, num_classes=3, width=2, depth=3, dropout_rate=0.0)


def apply(model, variables, images):
    return jax.jit(functools.partial(contract.apply, model))(variables, images)


@functools.cache
def full_outputs():
    outputs, _ = contract.shapes_of(unet.unet(num_classes=2), (1, 572, 572, 1))
    return outputs


@pytest.mark.parametrize(("model", "channels", "num_params"), PUBLISHED.values(), ids=PUBLISHED)
def test_fact_2_parameters(model, channels, num_params):
    _, variables = contract.shapes_of(model, (1, 188, 188, channels))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == num_params


@pytest.mark.slow
def test_same_padding_keeps_size_and_parameters():
    model = unet.unet_same(num_classes=21)
    contract.check_model(
        model,
        num_params=31_033_045,
        image_shape=(1, 224, 256, 3),
        num_classes=21,
        thin=thin(num_classes=21, padding="same", depth=2),
        thin_shape=(2, 8, 12, 3),
        skips=["upconv_d2c_u1a"],
    )


def test_fact_1_sizes_and_sizes_that_must_raise():
    model = unet.unet(num_classes=2)
    assert (model.context, model.grid, model.min_side) == (92, 16, 188)
    assert full_outputs()["logits"].shape == (1, 388, 388, 2)
    for side, out in [(188, 4), (204, 20), (700, 516)]:
        outputs, _ = contract.shapes_of(model, (1, side, 188, 1))
        assert outputs["logits"].shape == (1, out, 4, 2)
    for side in range(180, 230):
        if side in (188, 204, 220):
            model.check_side(side)
        else:
            with pytest.raises(ValueError, match=f"A side of {side} pixels"):
                model.check_side(side)
    with pytest.raises(ValueError, match="188 \\+ 16 m; the nearest are 556 and 572"):
        contract.shapes_of(model, (1, 572, 571, 1))
    with pytest.raises(ValueError, match="the nearest are 188 and up"):
        contract.shapes_of(model, (1, 100, 572, 1))
    with pytest.raises(ValueError, match="16 \\+ 16 m; the nearest are 48 and 64"):
        contract.shapes_of(unet.unet_same(num_classes=2), (1, 50, 64, 1))


def test_sizes_and_channels_of_figure_1():
    found = {name: (x.shape[1], x.shape[3]) for name, x in full_outputs().items()}
    assert found == {
        "d0b": (570, 64), "d0c": (568, 64), "d1b": (282, 128), "d1c": (280, 128),
        "d2b": (138, 256), "d2c": (136, 256), "d3b": (66, 512), "d3c": (64, 512),
        "d4b": (30, 1024), "d4c": (28, 1024),
        "u3a": (56, 512), "u3c": (54, 512), "u3d": (52, 512),
        "u2a": (104, 256), "u2c": (102, 256), "u2d": (100, 256),
        "u1a": (200, 128), "u1c": (198, 128), "u1d": (196, 128),
        "u0a": (392, 64), "u0c": (390, 64), "u0d": (388, 64), "logits": (388, 2),
    }  # fmt: skip


def test_fact_3_crops():
    sizes = {name: x.shape[1] for name, x in full_outputs().items()}
    crops = [(sizes[f"d{level}c"] - sizes[f"u{level}a"]) / 2 for level in (3, 2, 1, 0)]
    assert crops == [4, 16, 40, 88]


def test_names_are_those_of_the_release():
    _, variables = contract.shapes_of(unet.unet_release(num_classes=2), (1, 188, 188, 1))
    down = [f"conv_d{i}{ab}" for i in range(5) for ab in ("a-b", "b-c")]
    up = [f"conv_u{i}{bc}" for i in range(4) for bc in ("b-c", "c-d")]
    upconvs = ["upconv_d4c_u3a", "upconv_u3d_u2a", "upconv_u2d_u1a", "upconv_u1d_u0a"]
    assert set(variables["params"]) == {*down, *up, *upconvs, "conv_u0d-score"}
    assert variables["params"]["upconv_u1d_u0a"]["kernel"].shape == (2, 2, 128, 128)


@pytest.mark.parametrize("up", ["upconv", "bilinear_conv", "nearest_conv"])
@pytest.mark.parametrize("depth", [3, 4, 5])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_context_is_what_valid_convolutions_take(padding, depth, up):
    model = unet.UNet(num_classes=2, width=2, depth=depth, up=up, padding=padding)
    if (padding, up) == ("valid", "upconv"):
        assert model.context == {3: 44, 4: 92, 5: 188}[depth]
    for side in (model.min_side, model.min_side + 3 * model.grid):
        outputs, _ = contract.shapes_of(model, (1, side, side, 1))
        assert outputs["logits"].shape[1] == side - 2 * model.context
    assert model.min_side - 2 * model.context <= model.grid
    with pytest.raises(ValueError, match="does not fit"):
        model.check_side(model.min_side - model.grid)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_width_is_that_of_the_first_level(width):
    outputs, _ = contract.shapes_of(unet.UNet(num_classes=2, width=width), (1, 188, 188, 1))
    assert outputs["d0c"].shape[3] == width
    assert outputs["d4c"].shape[3] == 16 * width


class Mirrored(nn.Module):
    """A valid network with the size of its images, for the checks that all networks pass."""

    net: unet.UNet

    @nn.compact
    def __call__(self, images, *, train):
        nn.share_scope(self, self.net)
        edge = (self.net.context, self.net.context)
        images = jnp.pad(images, ((0, 0), edge, edge, (0, 0)), mode="reflect")
        return self.net(images, train=train)


CONTRACTS = {
    "paper": (
        Mirrored(thin(depth=2, width=4)),
        (2, 12, 12, 3),
        ["upconv_d2c_u1a", "upconv_u1d_u0a"],
    ),
    "release": (
        thin(variant="release", padding="same", up="bilinear_conv", norm="group", width=4, depth=2),
        (2, 12, 8, 3),
        ["conv_d0a-b", "upconv_d2c_u1a", "upconv_u1d_u0a"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "image_shape", "skips"), CONTRACTS.values(), ids=CONTRACTS)
def test_contract_of_variants(model, image_shape, skips):
    contract.check_thin(model, image_shape=image_shape, num_classes=3, skips=skips)


def test_every_skip_reaches_the_output():
    """Cutting the encoder's half of each concatenation changes the logits, from both sources."""
    images = np.random.default_rng(0).standard_normal((1, 16, 16, 3)).astype(np.float32)
    model = thin(padding="same", depth=2, width=4)
    params = contract.random_variables(model, images.shape)["params"]
    run = jax.jit(functools.partial(contract.apply, model))
    logits = run({"params": params}, images)["logits"]
    for level in range(2):
        name, features = f"conv_u{level}b-c", 4 * 2**level
        for half in (slice(features), slice(features, None)):
            kernel = params[name]["kernel"].copy()
            kernel[:, :, half] = 0
            cut = {**params, name: {**params[name], "kernel": kernel}}
            changed = run({"params": cut}, images)["logits"]
            assert np.abs(changed - logits).max() > 1e-4


def test_batch_norm_uses_its_batch_in_training_and_its_average_afterwards():
    images = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    model = thin(padding="same", norm="batch", bn_momentum=0.0, depth=2)
    variables = contract.random_variables(model, images.shape)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    outputs, new = jax.jit(train)(variables, images)
    np.testing.assert_allclose(
        apply(model, {**variables, **new}, images)["logits"],
        outputs["logits"],
        rtol=1e-3,
        atol=1e-3,
    )
    mean = new["batch_stats"]["bn_d0b"]["mean"]
    assert not np.allclose(mean, variables["batch_stats"]["bn_d0b"]["mean"], atol=1e-2)


@pytest.mark.slow
def test_dropout_is_on_the_last_two_levels_of_the_contracting_path():
    images = np.ones((1, 16, 16, 3), np.float32)
    model = thin(padding="same", dropout_rate=0.5, width=8, depth=2)
    variables = contract.random_variables(model, images.shape)

    @jax.jit
    def zeros(key):
        outputs = contract.apply(model, variables, images, train=True, rngs={"dropout": key})
        return {name: jnp.mean(outputs[name] == 0.0) for name in ("d0c", "d1c", "d2c")}

    outputs: Any = apply(model, variables, images)
    still = {name: np.mean(x == 0) for name, x in outputs.items()}
    shares = jax.tree.map(np.asarray, zeros(jax.random.key(0)))
    assert shares["d0c"] == still["d0c"]
    for name in ("d1c", "d2c"):
        assert shares[name] > still[name] + 0.2 * (1 - still[name])


def test_fact_8_he_keeps_the_second_moment():
    model = unet.UNet(num_classes=2, width=16)
    images = np.random.default_rng(0).standard_normal((1, 188, 188, 1)).astype(np.float32)

    @jax.jit
    def moments(key):
        params = model.init(key, jnp.asarray(images), train=False)
        outputs = contract.apply(model, params, images)
        return {name: jnp.mean(x**2) for name, x in outputs.items() if name.startswith("d")}

    found = jax.device_get(moments(jax.random.key(0)))
    assert 0.5 < found["d0b"] < 2
    for level in range(5):
        assert 0.5 < found[f"d{level}c"] / found[f"d{level}b"] < 2
    for level in range(1, 5):  # convolution and ReLU, and the pooling before them
        assert 0.6 < found[f"d{level}b"] / found[f"d{level - 1}c"] < 5
    assert 4 < found["d4c"] < 20


@pytest.mark.parametrize(("kernel_init", "gain"), [("he", 2), ("xavier", 1)])
def test_kernels_start_at_a_variance_over_their_incoming_connections(kernel_init, gain):
    @jax.jit
    def kernels(key):
        model = thin(kernel_init=kernel_init, depth=1, width=32)
        params = model.init(key, jnp.zeros((1, 20, 20, 3)), train=False)["params"]
        return {name: params[name]["kernel"] for name in ("conv_d1b-c", "upconv_d1c_u0a")}

    convolution, upconv = kernels(jax.random.key(0)).values()
    np.testing.assert_allclose(np.var(convolution), gain / (9 * 64), rtol=0.05)
    np.testing.assert_allclose(np.var(upconv), gain / 64, rtol=0.05)  # each output sees one tap


@pytest.mark.parametrize("up", ["upconv", "bilinear_conv", "nearest_conv"])
def test_fact_9_translation_by_the_grid_is_exact(up):
    model = thin(up=up, depth=4)
    wide = np.random.default_rng(0).standard_normal((model.min_side + 48,) * 2 + (1,))
    wide = wide.astype(np.float32)
    side = model.min_side + 32
    images = np.stack([wide[:side, :side], wide[16 : 16 + side, 16 : 16 + side]])
    logits = apply(model, contract.random_variables(model, images.shape), images)["logits"]
    np.testing.assert_allclose(logits[0, 16:, 16:], logits[1, :-16, :-16], rtol=1e-4, atol=1e-5)
    assert np.std(logits) > 1e-2
    moved = np.abs(logits[0, 15:-1, 15:-1] - logits[1, :-16, :-16])
    assert moved.max() > 1e-3  # it is not that the logits are all alike


def test_same_padding_changes_the_edge_and_not_the_centre():
    """Padded and valid networks share parameters; logits differ only within the context."""
    images = np.random.default_rng(0).standard_normal((1, 108, 108, 3)).astype(np.float32)
    valid = thin()
    variables = contract.random_variables(valid, images.shape)
    inner = apply(valid, variables, images)["logits"]
    # Two pixels more, and the padded network's pooling windows lie where the valid one's do.
    framed = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    logits = apply(thin(padding="same"), variables, framed)["logits"]
    assert logits.shape == (1, 112, 112, 3)
    np.testing.assert_allclose(logits[:, 46:-46, 46:-46], inner, rtol=1e-4, atol=1e-4)
