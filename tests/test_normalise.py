"""Normalisation both ways: NumPy against its formula, JAX against NumPy, on real images too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dense_jax.data.normalise import (
    NORMALISATIONS,
    Normalise,
    PixelValues,
    normalise,
    normalise_batch,
    num_channels,
    to_uint8,
)

NAMES = sorted(NORMALISATIONS)
SAMPLES = {
    "camvid": "camvid/train/*.jpg",
    "em_membrane": "em_membrane/images/*.png",
    "nuclei": "dsb2018_nuclei/images/*.png",
    "voc2012": "voc2012_sample/VOCdevkit/VOC2012/JPEGImages/*.jpg",
}


@pytest.fixture(scope="module", params=["drawn", *SAMPLES])
def images(request):
    """Two images: drawn ones, the second without contrast, or real ones."""
    if request.param == "drawn":
        noise = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
        return [noise, np.full((24, 31, 3), 77, np.uint8)]
    root = request.getfixturevalue("data_root")
    paths = sorted(root.glob(SAMPLES[request.param]))
    return [np.asarray(Image.open(path).convert("RGB")) for path in (paths[0], paths[-1])]


@pytest.mark.parametrize("name", NAMES)
def test_the_formula(name, images):
    mean, std = (np.array(values) for values in NORMALISATIONS[name])
    for image in images:
        pixels = image.astype(np.float64)
        if num_channels(name) == 1:
            pixels = pixels @ np.array([[0.299], [0.587], [0.114]])
        if name == "grey_image":
            mean, std = pixels.mean(), max(pixels.std(), 1)
        found = normalise(image, name)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, (pixels - mean) / std, rtol=1e-4, atol=4e-5)
        example = Normalise(name)({"image": image, "name": "a"})
        assert example["name"] == "a"
        np.testing.assert_array_equal(example["image"], found)


@pytest.mark.parametrize("name", NAMES)
def test_jax_equals_numpy(name, images):
    """Bit for bit, but where one sums or divides in another order than the other."""
    atol = 4e-5 if name.startswith("grey") else 3e-7 if name == "torchvision" else 0
    if name == "grey_image":  # the mean is a sum over all pixels, in the compiler's order
        atol = 2e-4
    for image in images:
        found = jax.jit(lambda x: normalise_batch(x, name))(jnp.asarray(image[None]))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[0], normalise(image, name), rtol=0, atol=atol)


@pytest.mark.parametrize("name", NAMES)
def test_images_of_a_batch_are_normalised_one_by_one(name):
    batch = np.random.default_rng(0).integers(0, 256, (3, 9, 11, 3), np.uint8)
    batch[1] = 77  # no scale of its own
    expected = np.stack([normalise(image, name) for image in batch])
    for dtype in (jnp.uint8, jnp.float32):
        found = normalise_batch(jnp.asarray(batch, dtype), name)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if num_channels(name) == 3])
def test_pixels_come_back_as_the_integers_they_were(name, images):
    for image in images:
        inputs = normalise(image, name)
        np.testing.assert_array_equal(to_uint8(inputs, name), image)
        pixels = jax.jit(PixelValues(name))(jnp.asarray(inputs[None]))
        assert pixels.dtype == jnp.float32
        np.testing.assert_array_equal(pixels[0], image)


def test_grey_comes_back_in_three_channels(images):
    for image in images:
        inputs = normalise(image, "grey")
        luma = np.broadcast_to((image @ np.array([0.299, 0.587, 0.114]))[..., None], image.shape)
        assert to_uint8(inputs, "grey").dtype == np.uint8
        np.testing.assert_allclose(to_uint8(inputs, "grey"), luma, atol=0.51)
        pixels = PixelValues("grey")(jnp.asarray(inputs[None]))
        np.testing.assert_allclose(pixels[0], luma, atol=0.51)
    greys = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    np.testing.assert_array_equal(to_uint8(normalise(greys, "grey"), "grey"), greys)


@pytest.mark.parametrize("name", NAMES)
def test_padding_becomes_the_mean_colour(name):
    if name == "grey_image":
        with pytest.raises(ValueError, match="'grey_image' are lost"):
            PixelValues(name)
        return
    mean = np.broadcast_to(NORMALISATIONS[name][0], 3)
    pixels = PixelValues(name)(jnp.zeros((1, 2, 2, num_channels(name))))
    np.testing.assert_array_equal(pixels[0, 0, 0], np.rint(mean))
    assert PixelValues(name) == PixelValues(name)


def test_each_grey_image_has_its_own_scale():
    image = np.arange(100, 120, dtype=np.uint8).repeat(3).reshape(4, 5, 3)
    own = normalise(image, "grey_image")
    np.testing.assert_allclose([own.mean(), own.std()], [0, 1], atol=1e-5)
    picture = to_uint8(own, "grey_image")[..., 0].ravel()  # mean and scale are lost, order is not
    assert np.all(np.diff(picture.astype(int)) >= 0)
    assert picture.min() < 50 < 200 < picture.max()
    plain = normalise(np.full((2, 2, 3), 7, np.uint8), "grey_image")
    np.testing.assert_allclose(plain, 0, atol=1e-5)


def test_the_table_is_the_published_one_in_rgb():
    mean, std = NORMALISATIONS["torchvision"]
    np.testing.assert_allclose(np.array(mean) / 255, [0.485, 0.456, 0.406])
    np.testing.assert_allclose(np.array(std) / 255, [0.229, 0.224, 0.225])
    assert NORMALISATIONS["caffe"][0][0] > NORMALISATIONS["caffe"][0][2]  # red first
    assert {name for name in NAMES if num_channels(name) == 1} == {"grey", "grey_image"}
    for make in (Normalise, PixelValues):
        with pytest.raises(ValueError, match="unknown normalisation 'vgg'"):
            make("vgg")
