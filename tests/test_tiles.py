"""Tiles agree with one another, mirrors lie at true edges, and views are turned back."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from dense_jax.infer.tiles import average_views, overlap_tile
from dense_jax.models.unet import UNet
from tests import contract

CONTEXT, GRID = 3, 4


class Corner(nn.Module):
    """A network that answers each label with the pixel ``CONTEXT`` above and left of it."""

    @nn.compact
    def __call__(self, images, *, train):
        return {"logits": images[:, : -2 * CONTEXT, : -2 * CONTEXT]}


class Padded(nn.Module):
    """A network with padding: as large as its input."""

    @nn.compact
    def __call__(self, images, *, train):
        return {"logits": 2 * images}


def padded_batch(sizes, shape, channels=1):
    """Random images of the given sizes in a batch filled up with large numbers."""
    rng = np.random.default_rng(0)
    images = [rng.standard_normal((*size, channels)).astype(np.float32) for size in sizes]
    batch = np.full((len(sizes), *shape, channels), 1e3, np.float32)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return images, batch, np.array(sizes, np.int32)


def run(predict, batch, sizes, variables=None, output="logits"):
    return np.asarray(jax.jit(predict)(variables or {}, batch, sizes)[output])


SIZES, SHAPE = [(9, 13), (16, 3), (1, 1), (2, 12)], (16, 13)


@pytest.mark.parametrize("mirror", ["reflect", "symmetric"])
@pytest.mark.parametrize("tile", [10, 13, 31])
def test_each_image_is_mirrored_at_its_own_edges(tile, mirror):
    images, batch, sizes = padded_batch(SIZES, SHAPE)
    predict = overlap_tile(Corner(), tile=tile, context=CONTEXT, grid=GRID, mirror=mirror)
    logits = run(predict, batch, sizes)
    assert logits.shape == batch.shape
    for image, found in zip(images, logits, strict=True):
        edge = ((CONTEXT, CONTEXT), (CONTEXT, CONTEXT), (0, 0))
        height, width, _ = image.shape
        expected = np.pad(image, edge, mode=mirror)[:height, :width]
        np.testing.assert_array_equal(found[:height, :width], expected)


class Coarse(nn.Module):
    """A network that answers with the first pixel of each block of ``GRID``, at that stride."""

    @nn.compact
    def __call__(self, images, *, train):
        return {"units": images[:, CONTEXT:-CONTEXT:GRID, CONTEXT:-CONTEXT:GRID]}


@pytest.mark.parametrize("tile", [10, 15, 30])
def test_an_output_of_another_stride(tile):
    images, batch, sizes = padded_batch([(9, 13), (16, 5)], (16, 16))
    options = dict(tile=tile, context=CONTEXT, grid=GRID, output="units", stride=GRID)
    units = run(overlap_tile(Coarse(), **options), batch, sizes, output="units")
    assert units.shape == (2, 4, 4, 1)
    for image, found in zip(images, units, strict=True):
        expected = image[::GRID, ::GRID]
        np.testing.assert_array_equal(found[: len(expected), : expected.shape[1]], expected)


def test_networks_with_padding_lose_their_edges():
    images, batch, sizes = padded_batch(SIZES, SHAPE)
    logits = run(overlap_tile(Padded(), tile=12, context=2, grid=4), batch, sizes)
    for image, found in zip(images, logits, strict=True):
        np.testing.assert_array_equal(found[: image.shape[0], : image.shape[1]], 2 * image)


def test_a_batch_may_be_filled_up_with_nothing():
    _, batch, sizes = padded_batch([(5, 6)], (8, 8))
    predict = overlap_tile(Corner(), tile=14, context=CONTEXT, grid=GRID)
    both = run(predict, np.concatenate([batch, 0 * batch]), np.concatenate([sizes, 0 * sizes]))
    np.testing.assert_array_equal(both[:1], run(predict, batch, sizes))
    assert np.isfinite(both).all()


def test_too_small_a_tile_is_refused():
    with pytest.raises(ValueError, match="give at least 10"):
        overlap_tile(Corner(), tile=9, context=CONTEXT, grid=GRID)


@functools.cache
def unet_and_variables():
    model = UNet(num_classes=2, width=2, dropout_rate=0.0)
    return model, contract.random_variables(model, (1, 188, 188, 1))


@functools.cache
def unet_logits(tile, grid):
    model, variables = unet_and_variables()
    _, batch, sizes = padded_batch([(100, 75), (61, 90)], (100, 90))
    predict = overlap_tile(model, tile=tile, context=model.context, grid=grid)
    return run(predict, batch, sizes, variables)


def test_fact_4_tiles_of_any_size_agree():
    """Output tiles of 36 and 68 pixels at steps of 32 and 64, and one tile for the whole image."""
    whole = unet_logits(188 + 6 * 16, 16)
    for tile in (220, 252):
        logits = unet_logits(tile, 16)
        assert np.abs(logits - whole).max() < 1e-4
    assert whole[0, :100, :75].std() > 0.1


def test_fact_4_the_wrong_step_shows_at_the_seams():
    """Steps of 36, the full output tile, are off the grid: the second tile pools out of phase."""
    whole, wrong = unet_logits(188 + 6 * 16, 16), unet_logits(220, 1)
    np.testing.assert_allclose(wrong[:, :36, :36], whole[:, :36, :36], atol=1e-4)
    off = np.abs(wrong - whole)[:, 36:, 36:]
    assert off.mean() > 0.1 * whole.std()


def test_the_padding_of_a_batch_does_not_matter():
    model, variables = unet_and_variables()
    (image, _), _, sizes = padded_batch([(100, 75), (61, 90)], (100, 90))
    predict = overlap_tile(model, tile=220, context=model.context, grid=model.grid)
    alone = run(predict, image[None], sizes[:1], variables)
    np.testing.assert_allclose(alone[0], unet_logits(220, 16)[0, :, :75], atol=1e-5)


def recording(record):
    """A prediction that notes its images and answers with two logits of each pixel's own."""

    def predict(variables, images, sizes):
        jax.debug.callback(lambda x, s: record.append((np.array(x), np.array(s))), images, sizes)
        return {"logits": images}

    return predict


@pytest.mark.parametrize(("views", "count"), [("rot7", 7), ("d4", 8)])
def test_views_are_symmetries_of_the_picture_inside_its_padding(views, count):
    (image, _), batch, sizes = padded_batch([(3, 4), (5, 2)], (5, 6), channels=2)
    record = []
    run(average_views(recording(record), views), batch, sizes)
    jax.effects_barrier()
    assert len(record) == count
    seen = {x[0, : s[0, 0], : s[0, 1]].tobytes() for x, s in record}
    symmetries = [
        np.ascontiguousarray(np.rot90(side, turns))
        for side in (image, image[:, ::-1])
        for turns in range(4)
    ]
    assert len(seen) == count
    assert seen <= {view.tobytes() for view in symmetries}
    rotations = {np.ascontiguousarray(np.rot90(image, k)).tobytes() for k in range(4)}
    assert rotations <= seen
    for x, s in record:  # padding stays where it was: below and on the right
        for picture, (height, width) in zip(x, s, strict=True):
            assert (np.abs(picture[:height, :width]) < 100).all()
            assert (picture[height:] == 1e3).all()
            assert (picture[:, width:] == 1e3).all()


@pytest.mark.parametrize("views", ["rot7", "d4"])
def test_views_are_turned_back_and_probabilities_averaged(views):
    images, batch, sizes = padded_batch([(3, 4), (5, 2)], (5, 6), channels=3)
    logits = run(average_views(lambda variables, x, sizes: {"logits": 2 * x}, views), batch, sizes)
    assert logits.shape == batch.shape
    for image, found in zip(images, logits, strict=True):
        expected = jax.nn.log_softmax(2 * image)
        np.testing.assert_allclose(
            found[: image.shape[0], : image.shape[1]], expected, rtol=1e-5, atol=1e-5
        )

    def column_prediction(variables, x, sizes):  # knows left from right, so views disagree
        return {"logits": x * np.arange(x.shape[2], dtype=np.float32).reshape(1, 1, -1, 1)}

    squares, three = batch[:1, :3, :3], np.full((1, 2), 3, np.int32)
    averaged = run(average_views(column_prediction, views), squares, three)
    np.testing.assert_allclose(np.exp(averaged).sum(-1), 1, rtol=1e-5)
    if views == "d4":  # all symmetries: the mean commutes with turning the picture
        turned = np.ascontiguousarray(np.rot90(squares, axes=(1, 2)))
        found = run(average_views(column_prediction, views), turned, three)
        expected = np.rot90(averaged, axes=(1, 2))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_impossible_classes_stay_finite():
    batch = np.array([[[[300.0, 0, 0]]]], np.float32)
    predict = average_views(lambda variables, x, sizes: {"logits": x}, "d4")
    averaged = run(predict, batch, np.ones((1, 2), np.int32))
    assert np.isfinite(averaged).all()
