"""Images are prepared, padded and cut alike wherever a network runs, on real images too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dense_jax.data import pipeline
from dense_jax.data.classes import IGNORE_LABEL, ClassTable
from dense_jax.data.normalise import NORMALISATIONS, Normalise, normalise, normalise_batch
from dense_jax.data.padded import cut, multiple_of, pad, padded_shapes, prepare, run_padded
from dense_jax.infer import predictor, program, proposals

NAMES = sorted(NORMALISATIONS)
SAMPLES = ("dsb2018_nuclei/images/*.png", "voc2012_sample/VOCdevkit/VOC2012/JPEGImages/*.jpg")


@pytest.fixture(scope="module", params=["drawn", *SAMPLES])
def paths(request, tmp_path_factory):
    """Files of a few images of different sizes."""
    if request.param != "drawn":
        found = sorted(request.getfixturevalue("data_root").glob(request.param))
        return [found[i] for i in np.linspace(0, len(found) - 1, 5).astype(int)]
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    result = []
    for height, width in ((1, 1), (20, 33), (64, 32), (40, 100)):
        result.append(folder / f"{height}x{width}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(result[-1])
    return sorted(result)


class Source:
    """A source of images without labels."""

    def __init__(self, paths):
        self.images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]

    def __len__(self):
        return len(self.images)

    def size(self, index):
        height, width, _ = self.images[index].shape
        return height, width

    def __getitem__(self, index):
        label = np.full(self.size(index), index, np.uint8)
        return {"image": self.images[index], "label": label, "name": str(index)}


def test_padded_shapes_joins_what_wastes_least():
    sizes = [(32, 32)] * 9 + [(30, 64), (31, 60), (96, 96)]
    joined = padded_shapes(sizes, "buckets", max_buckets=2)
    assert joined == {
        (32, 32): (32, 64),
        (30, 64): (32, 64),
        (31, 60): (32, 64),
        (96, 96): (96, 96),
    }


def test_an_image_has_the_shape_of_its_own_size_whatever_else_there_is():
    sizes = [(7, 9), (100, 31), (7, 9), (64, 64)]
    assert padded_shapes(sizes) == {size: size for size in sizes}
    shape_of = padded_shapes(sizes, padded_side=lambda side: -(-side // 8) * 8)
    assert shape_of == {(7, 9): (8, 16), (100, 31): (104, 32), (64, 64): (64, 64)}


def test_thousands_of_sizes_share_few_shapes():
    rng = np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in rng.integers(1, 1500, (4000, 2))]
    shape_of = padded_shapes(sizes, "buckets")
    assert set(shape_of) == set(sizes)
    assert len(set(shape_of.values())) == 4
    assert all(h <= y < 1536 and w <= x < 1536 for (h, w), (y, x) in shape_of.items())


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_resized_normalised_and_padded(name, scale, paths):
    """In this order: normalised pixels would be rounded, and padding is the mean colour."""
    for image in Source(paths).images:
        height, width = (max(1, round(side * scale)) for side in image.shape[:2])
        small = image
        if scale != 1:
            small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        (shape,) = padded_shapes([(height, width)], "buckets").values()
        images, sizes = prepare(image, name, shape, (height, width))
        assert images.dtype == np.float32
        assert sizes.dtype == np.int32
        assert sizes.tolist() == [[height, width]]
        assert images.shape[:3] == (1, *shape)
        np.testing.assert_array_equal(images[0, :height, :width], normalise(np.array(small), name))
        assert not images[0, height:].any()
        assert not images[0, :, width:].any()
        restored = cut(jnp.asarray(images[0]), (height, width))
        assert isinstance(restored, np.ndarray)
        np.testing.assert_array_equal(restored, images[0, :height, :width])


def test_labels_are_padded_with_ignored_pixels():
    example = {"image": np.ones((2, 3, 3), np.float32), "label": np.ones((2, 3), np.uint8)}
    padded = pad(example, (4, 4))
    expected = np.full((4, 4), IGNORE_LABEL)
    expected[:2, :3] = 1
    np.testing.assert_array_equal(padded["label"], expected)
    np.testing.assert_array_equal(padded["image"][..., 0], expected == 1)


@pytest.mark.parametrize("name", ["caffe", "grey_image"])
def test_all_loops_over_images_prepare_them_alike(name, paths, tmp_path):
    source = Source(paths)
    sizes = [source.size(i) for i in range(len(source))]
    shape_of = padded_shapes(sizes)
    prepared = [prepare(source[i]["image"], name, shape_of[size]) for i, size in enumerate(sizes)]
    # Evaluation, with other examples in the batch and rows that are padding.
    rows = []
    for batch in pipeline.eval_batches(source, [Normalise(name)], 2):
        for row, i in enumerate(batch["index"]):
            if i >= 0:
                rows.append(int(i))
                np.testing.assert_array_equal(batch["images"][row], prepared[i][0][0])
                np.testing.assert_array_equal(batch["size"][row], prepared[i][1][0])
    assert sorted(rows) == list(range(len(source)))

    # Prediction of a folder.
    seen = []

    def keep(images, sizes):
        seen.append((images, sizes))
        soft = np.broadcast_to(images[..., :1], (*images.shape[:3], 3))
        return {"labels": jnp.zeros(images.shape[:3]), "probabilities": jnp.asarray(soft)}

    def read(answers, image):
        labels, soft = (cut(answers[k], image.shape[:2]) for k in ("labels", "probabilities"))
        return predictor.Labels(image, labels, soft, classes)

    folder = tmp_path / "images"
    folder.mkdir()
    for path in paths:
        (folder / path.name).symlink_to(path)
    classes = ClassTable(["a", "b", "c"])
    each = predictor.Predictor(keep, read, name)
    predictor.predict_folder(each, classes, folder, tmp_path / "out", overlays=False)
    for expected, found in zip(prepared, seen, strict=True):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])

    # Labelling from boxes: the labels show which rows and columns are dark.
    def score(variables, images, boxes, valid):
        dark = (images.mean(-1, keepdims=True) < 0).astype(jnp.float32)
        return jnp.concatenate([jnp.full_like(dark, 0.5), dark], axis=-1)

    labels = proposals.label_images(
        score, {}, source, [[]] * len(source), normalisation=name, num=1, min_side=1
    )
    for (images, size), found in zip(prepared, labels, strict=True):
        height, width = size[0]
        expected = jnp.mean(images[0], -1) < 0
        np.testing.assert_array_equal(found, expected[:height, :width])


def surroundings(images, sizes):
    """A function of a pixel and of its neighbours, and the size that it is told."""
    sums = jax.lax.reduce_window(images, 0.0, jax.lax.add, (1, 5, 5, 1), (1, 1, 1, 1), "SAME")
    told = jnp.broadcast_to(sizes[:, None, None].astype(jnp.float32), (*sums.shape[:3], 2))
    return jnp.concatenate([sums, told], axis=-1)


@pytest.mark.parametrize("shape", [(2, 20, 33, 3), (1, 32, 64, 3), (1, 1, 1, 3)])
def test_traced_calls_pad_and_cut_as_the_host_does(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    ((size, padded_shape),) = padded_shapes([shape[1:3]], "buckets").items()
    expected, to_32 = [], functools.partial(multiple_of, multiple=32)
    for image in pixels:
        images, sizes = prepare(image, "caffe", padded_shape)
        expected.append(cut(surroundings(jnp.asarray(images), jnp.asarray(sizes))[0], size))

    def traced(images):
        return run_padded(surroundings, normalise_batch(images, "caffe"), to_32)

    label = program.program(
        lambda *inputs: {"logits": surroundings(*inputs)}, "caffe", padded_side=to_32
    )
    sizes_open = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b, h, w"), 3), jnp.uint8)
    for call in (jax.jit, lambda f: jax.export.export(jax.jit(f))(sizes_open).call):
        found = call(traced)(pixels)
        assert found.shape == (*shape[:3], 5)
        np.testing.assert_allclose(found, np.stack(expected), rtol=1e-6, atol=1e-4)
        np.testing.assert_array_equal(call(label)(pixels)["logits"], found)
    zeros, to_4 = jnp.zeros((1, 5, 5, 3)), functools.partial(multiple_of, multiple=4)
    assert run_padded(lambda x, sizes: x[..., :1] + x.shape[1], zeros, to_4).max() == 8
