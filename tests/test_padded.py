"""Preparing, padding and cutting give what each place that did so gave, on real images too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dense_jax.data import padded, pipeline
from dense_jax.data.classes import ClassTable
from dense_jax.data.normalise import NORMALISATIONS, Normalise, normalise_batch
from dense_jax.data.transforms import Resize, window
from dense_jax.infer import predictor, program

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


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_former_places(name, paths, tmp_path):
    source = Source(paths)
    sizes = [source.size(i) for i in range(len(source))]
    shape_of = padded.padded_shapes(sizes)
    assert shape_of == pipeline.padded_shapes(sizes, 32, 4)
    prepared = [
        padded.prepare(source[i]["image"], name, shape_of[sizes[i]]) for i in range(len(source))
    ]
    for i, (images, size) in enumerate(prepared):
        assert images.dtype == np.float32
        assert size.dtype == np.int32
        assert size.tolist() == [list(sizes[i])]
        # As infer.proposals does.
        former = window(Normalise(name)(source[i]), 0, 0, shape_of[sizes[i]])
        np.testing.assert_array_equal(images[0], former["image"])
        np.testing.assert_array_equal(
            padded.pad(Normalise(name)(source[i]), shape_of[sizes[i]])["label"], former["label"]
        )
    # As infer.predictor does.
    seen = []

    def keep(images, sizes):
        seen.append((images, sizes))
        return jnp.asarray(np.broadcast_to(images[..., :1], (*images.shape[:3], 3)))

    folder = tmp_path / "images"
    folder.mkdir()
    for path in paths:
        (folder / path.name).symlink_to(path)
    classes = ClassTable(["a", "b", "c"])
    predictor.predict_folder(keep, classes, name, folder, tmp_path / "out", overlays=False)
    for now, former in zip(prepared, seen, strict=True):
        np.testing.assert_array_equal(now[0], former[0])
        np.testing.assert_array_equal(now[1], former[1])
    # As data.pipeline does.
    for batch in pipeline.eval_batches(source, [Normalise(name)], 2):
        for row, i in enumerate(batch["index"]):
            if i >= 0:
                np.testing.assert_array_equal(batch["images"][row], prepared[i][0][0])
                np.testing.assert_array_equal(batch["size"][row], prepared[i][1][0])


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("name", ["caffe", "grey_image"])
def test_scaled_images_equal_the_former_ones(name, scale, paths):
    """As tasks.box_masks does."""
    source = Source(paths)
    for example in (source[i] for i in range(len(source))):
        height, width = example["label"].shape
        size = max(1, round(height * scale)), max(1, round(width * scale))
        (shape,) = padded.padded_shapes([size]).values()
        image = Normalise(name)(Resize(size)(example))["image"]
        former = np.zeros((1, *shape, image.shape[2]), np.float32)
        former[0, : size[0], : size[1]] = image
        images, sizes = padded.prepare(example["image"], name, shape, scale)
        np.testing.assert_array_equal(images, former)
        assert sizes.tolist() == [list(size)]
        assert padded.scaled((height, width), scale) == size


def neighbours(images, sizes):
    """A function of a pixel and of others: sums over a window, and the size that it is told."""
    wide = jax.lax.reduce_window(images, 0.0, jax.lax.add, (1, 5, 5, 1), (1, 1, 1, 1), "SAME")
    return jnp.concatenate(
        [wide, jnp.broadcast_to(sizes[:, None, None].astype(jnp.float32), (*wide.shape[:3], 2))], -1
    )


@pytest.mark.parametrize("shape", [(2, 20, 33, 3), (1, 32, 64, 3), (1, 1, 1, 3)])
def test_traced_calls_equal_the_former_ones(shape):
    """As infer.program does."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    label = program.label_fn(lambda _, *inputs: neighbours(*inputs), None, "caffe", "logits")

    def now(x):
        return padded.run_padded(neighbours, normalise_batch(x, "caffe"))

    open_sizes = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b, h, w"), 3), jnp.uint8)
    for call in (
        jax.jit,
        lambda f: jax.export.export(jax.jit(f))(open_sizes).call,
    ):
        former = call(label)(pixels)["logits"]
        np.testing.assert_array_equal(call(now)(pixels), former)
        assert former.shape == (*shape[:3], 5)
