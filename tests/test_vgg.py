import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.models import vgg
from dense_jax.models.vgg import Grid, Layer
from tests import contract

THIN = 1 / 64


def test_parameters_and_sizes_of_the_classification_network():
    outputs, variables = contract.shapes_of(vgg.vgg16(), (1, 224, 224, 3))
    params = variables["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_260_544
    assert params["fc6"]["kernel"].shape == (7, 7, 512, 4096)
    assert params["fc7"]["kernel"].shape == (1, 1, 4096, 4096)
    convs = [leaf.size for name in params if name[:4] == "conv" for leaf in params[name].values()]
    assert sum(convs) == 14_714_688
    sizes = [outputs[f"pool{i}"].shape[1:] for i in range(1, 6)]
    assert sizes == [(112, 112, 64), (56, 56, 128), (28, 28, 256), (14, 14, 512), (7, 7, 512)]
    assert outputs["fc7"].shape == (1, 1, 1, 4096)


def test_rounding_of_the_pools_and_padding_of_fc6():
    caffe, _ = contract.shapes_of(vgg.vgg16(width=THIN), (1, 225, 225, 3))
    same, _ = contract.shapes_of(vgg.vgg16(width=THIN, padding="same"), (1, 225, 225, 3))
    assert (caffe["pool5"].shape[1], same["pool5"].shape[1]) == (8, 7)
    assert (caffe["fc7"].shape[1], same["fc7"].shape[1]) == (2, 7)


def test_width_multiplier_never_reaches_zero():
    assert [vgg.scaled(c, 1 / 128) for c in (64, 128, 192, 256)] == [1, 1, 2, 2]
    assert vgg.scaled(96, 1 / 32, groups=2) == 4
    _, variables = contract.shapes_of(vgg.vgg16(width=1 / 4096), (1, 224, 224, 3))
    assert variables["params"]["conv1_1"]["kernel"].shape == (3, 3, 3, 1)


def test_a_network_may_stop_early():
    stack = vgg.vgg16(width=THIN, last="conv4_3")
    outputs, variables = contract.shapes_of(stack, (1, 32, 32, 3))
    assert "conv4_3" in outputs
    assert not {"pool4", "fc7"} & set(outputs)
    assert "conv5_1" not in variables["params"]


def test_no_gradient_reaches_frozen_layers():
    model = vgg.vgg16(width=1 / 16, last="conv4_1", frozen="pool2")
    variables = contract.random_variables(model, (1, 16, 16, 3))
    images = np.random.default_rng(0).standard_normal((1, 16, 16, 3), np.float32)

    @jax.jit
    @jax.grad
    def gradient(params):
        return jnp.sum(contract.apply(model, {"params": params}, images)["conv4_1"])

    for name, grads in gradient(variables["params"]).items():
        is_trained = name >= "conv3"
        assert all(np.any(grad) == is_trained for grad in grads.values()), name


def test_dropout_follows_both_connected_layers_and_only_in_training():
    stack = vgg.Stack((Layer("fc6", features=64), Layer("fc7", features=64)), dropout_rate=0.5)
    variables = contract.random_variables(stack, (1, 4, 4, 3))
    images = np.ones((1, 4, 4, 3), np.float32)
    still = contract.apply(stack, variables, images)
    moved = contract.apply(
        stack, variables, images, train=True, rngs={"dropout": jax.random.key(0)}
    )
    kept = moved["fc6"] != 0
    np.testing.assert_allclose(moved["fc6"][kept], 2 * still["fc6"][kept], rtol=1e-6)
    for name in ("fc6", "fc7"):
        assert np.mean(moved[name] == 0) > np.mean(still[name] == 0) + 0.15


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 1, 32, 32, 3)])
def test_wrong_rank_names_the_shape(shape):
    with pytest.raises(ValueError, match=r"received \(.*32, 32, 3\)"):
        contract.shapes_of(vgg.vgg16(width=THIN), shape)


def test_grid_of_up_conv_inverts_that_of_conv():
    grid = Grid().conv(16, 8, 4).up_conv(16, 8, 4)
    assert (grid.first, grid.step) == (0, 1)
    with pytest.raises(ValueError, match="No unit"):
        Grid(first=0.5).index_of(Grid())
    with pytest.raises(ValueError, match="No unit"):
        Grid(step=2).index_of(Grid())


def test_fields_and_centres_of_the_units():
    grids = vgg.grids(vgg.vgg16_layers(first_padding=100))
    found = {name: grids[name] for name in ("pool3", "pool4", "pool5", "fc7")}
    assert found == {
        "pool3": Grid(-95.5, 8, 44),
        "pool4": Grid(-91.5, 16, 100),
        "pool5": Grid(-83.5, 32, 212),
        "fc7": Grid(12.5, 32, 404),
    }


def test_fields_are_where_the_gradients_are():
    """A monotone image makes every pool choose the last (first) pixel that its unit sees."""
    columns, units = 480, {"pool3": 40, "pool4": 20, "pool5": 10, "fc7": 8}
    stack = vgg.vgg16(width=1 / 512, padding="same", dropout_rate=0.0)
    ramp = np.linspace(1, 2, columns, dtype=np.float32)
    images = np.stack([ramp, ramp[::-1]] * len(units))[:, None, :, None].repeat(3, axis=-1)
    images = images.repeat(32, axis=1)
    shapes = contract.shapes_of(stack, images.shape)[1]
    mean = jax.tree.map(lambda s: jnp.full(s.shape, 1 / max(1, np.prod(s.shape[:-1]))), shapes)
    variables = jax.tree.map(lambda leaf: leaf if leaf.ndim > 1 else 0 * leaf, mean)

    @jax.jit
    @jax.grad
    def gradient(images):
        outputs = contract.apply(stack, variables, images)
        pairs = enumerate(units.items())
        return sum(outputs[name][2 * n : 2 * n + 2, 0, unit].sum() for n, (name, unit) in pairs)

    seen = np.any(gradient(images), axis=(1, 3))
    for n, (name, unit) in enumerate(units.items()):
        grid = vgg.grids(vgg.vgg16_layers(1, 3))[name]
        centre, reach = grid.first + unit * grid.step, (grid.field - 1) / 2
        support = np.flatnonzero(seen[2 * n] | seen[2 * n + 1])
        assert (support[0], support[-1]) == (centre - reach, centre + reach), name


def test_layer_rows_default_to_a_pointwise_step():
    assert vgg.grids((Layer("norm1"),))["norm1"] == Grid()
