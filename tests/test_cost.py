import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from dense_jax.analysis import cost
from dense_jax.layers.conv import Conv, UpConv
from dense_jax.models import fcn, vgg


class One(nn.Module):
    """A network of one layer."""

    layer: nn.Module

    def __call__(self, images, *, train):
        return {"logits": self.layer(images)}


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (Conv(6, 3), 2 * 120 * 9 * 4 * 6),
        (Conv(6, 3, strides=2, padding=0), 2 * 5 * 4 * 9 * 4 * 6),
        (Conv(6, 3, groups=2), 2 * 120 * 9 * 2 * 6),
        # Each value of the 120 input places meets each tap once.
        (UpConv(6, 4, 2), 2 * 120 * 16 * 4 * 6),
        (UpConv(6, (3, 5), 2, groups=2), 2 * 120 * 15 * 2 * 6),
        (UpConv(4, 16, 8, groups=4), 2 * 120 * 256 * 4),
        (nn.Dense(5), 2 * 120 * 4 * 5),
    ],
)
def test_flops_of_one_layer(layer, macs):
    (row,) = cost.summarise(One(layer), (2, 12, 10, 4))
    assert (row.name, row.flops) == ("layer", 2 * macs)


def test_flops_inside_loops_and_inner_programs():
    class Power(nn.Module):
        def __call__(self, images, *, train):
            x = images[0, :, :, 0]
            return jax.lax.fori_loop(0, 3, lambda _, y: jax.jit(jnp.matmul)(x, y), x)

    (row,) = cost.summarise(Power(), (1, 8, 8, 1))
    assert row == cost.Row("(model)", (8, 8), 0, 3 * 2 * 8**3)


def test_vgg16_costs_what_the_literature_says():
    rows = cost.summarise(vgg.vgg16(), (1, 224, 224, 3))
    assert [row.name for row in rows][:3] == ["conv1_1", "conv1_2", "conv2_1"]
    assert sum(row.num_params for row in rows) == 134_260_544
    assert sum(row.flops for row in rows) == 2 * (15_470_264_320 - 4096 * 1000)  # No scores.


def test_rows_of_a_whole_network():
    rows = {row.name: row for row in cost.summarise(fcn.fcn8s(num_classes=21), (1, 500, 500, 3))}
    assert rows["fc6"] == cost.Row("fc6", (1, 16, 16, 4096), 102_764_544, 2 * 256 * 102_760_448)
    assert rows["upscore8"] == cost.Row("upscore8", (1, 568, 568, 21), 0, 2 * 70 * 70 * 256 * 21)
    assert sum(row.num_params for row in rows.values()) == 134_362_751


def test_work_outside_of_layers_is_counted():
    class Gram(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            x = Conv(3, 1, name="inner")(images)
            return {"logits": jnp.einsum("bhwc,bhwd->bcd", x, x)}

    inner, outer = cost.summarise(Gram(), (1, 8, 8, 2))
    assert (inner.name, inner.flops) == ("inner", 2 * 64 * 2 * 3)
    assert (outer.name, outer.flops) == ("(model)", 2 * 64 * 3 * 3)


def test_table_ends_with_the_sums():
    table = cost.format_table(cost.summarise(fcn.fcn32s(num_classes=21), (1, 64, 64, 3)))
    header, *_, total = table.splitlines()
    assert header.split() == ["layer", "output", "parameters", "GFLOPs"]
    assert total.split()[:2] == ["total", "134,346,581"]
    assert len({len(line) for line in table.splitlines()}) == 1
