"""Normalisation in one place gives the bits that its former places gave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from dense_jax.data import normalise, transforms
from dense_jax.infer import crf, predictor, program
from dense_jax.layers.crf_rnn import WithCrfRnn

NAMES = sorted(normalise.NORMALISATIONS)
SAMPLES = {
    "camvid": "camvid/train/*.jpg",
    "em_membrane": "em_membrane/images/*.png",
    "nuclei": "dsb2018_nuclei/images/*.png",
    "voc2012": "voc2012_sample/VOCdevkit/VOC2012/JPEGImages/*.jpg",
}


def drawn():
    rng = np.random.default_rng(0)
    plain = np.full((5, 7, 3), 77, np.uint8)
    return [rng.integers(0, 256, (24, 31, 3), np.uint8), plain]


@pytest.fixture(scope="module", params=["drawn", *SAMPLES])
def images(request):
    """Two images of a dataset."""
    if request.param == "drawn":
        return drawn()
    root = request.getfixturevalue("data_root")
    paths = sorted(root.glob(SAMPLES[request.param]))
    return [np.asarray(Image.open(path).convert("RGB")) for path in (paths[0], paths[-1])]


def test_the_table_is_the_former_one():
    assert normalise.NORMALISATIONS == transforms.NORMALISATIONS
    assert all(normalise.num_channels(name) == transforms.num_channels(name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_numpy_equals_the_former_transform(name, images):
    for image in images:
        former = transforms.Normalise(name)({"image": image})["image"]
        now = normalise.normalise(image, name)
        assert now.dtype == former.dtype == np.float32
        np.testing.assert_array_equal(now, former)
        transformed = normalise.Normalise(name)({"image": image, "name": "a"})
        np.testing.assert_array_equal(transformed["image"], former)
        assert transformed["name"] == "a"
        batch = predictor._normalise_and_pad(image, name, image.shape[:2])
        np.testing.assert_array_equal(batch[0], now)
        inverse = normalise.to_uint8(now, name)
        np.testing.assert_array_equal(inverse, transforms.to_uint8(former, name))
        assert inverse.dtype == np.uint8


@pytest.mark.parametrize("name", NAMES)
def test_jax_equals_the_former_program(name, images):
    for image in images:
        batch = jnp.asarray(image[None])
        for call in (lambda f: f, jax.jit):  # operation by operation, and compiled as one
            former = call(lambda x: program.normalise(x, name))(batch)
            now = call(lambda x: normalise.normalise_batch(x, name))(batch)
            assert now.dtype == jnp.float32
            np.testing.assert_array_equal(now, former)
            # NumPy sums and divides in another order: equal bits where neither happens.
            atol = 4e-5 if name.startswith("grey") else 3e-7 if name == "torchvision" else 0
            np.testing.assert_allclose(now[0], normalise.normalise(image, name), rtol=0, atol=atol)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "grey_image"])
def test_pixel_values_equal_those_of_both_former_crfs(name, images):
    mean, std = normalise.NORMALISATIONS[name]
    for image in images:
        inputs = jnp.asarray(normalise.normalise(image, name)[None])
        former = crf.pixel_values(inputs, name)
        now = normalise.PixelValues(name)(inputs)
        assert now.dtype == jnp.float32
        np.testing.assert_array_equal(now, former)
        np.testing.assert_array_equal(jax.jit(normalise.PixelValues(name))(inputs), former)
        if len(mean) == 3:
            layer = WithCrfRnn(nn.Module(), mean, std)
            np.testing.assert_array_equal(now, layer._colours(inputs))
            np.testing.assert_array_equal(now[0], image)
