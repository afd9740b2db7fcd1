import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dense_jax import viz
from dense_jax.data.classes import ClassTable
from dense_jax.errors import UserError
from dense_jax.infer.predictor import Labels, Predictor, predict_folder
from tests import npz

CLASSES = ClassTable(["red", "green", "blue"], ((255, 0, 0), (0, 255, 0), (0, 0, 255)))


@jax.jit
def answer(images, sizes):
    """The brightest channel is the class; padding would be class 0."""
    del sizes
    return {"labels": jnp.argmax(images, axis=-1), "probabilities": jax.nn.softmax(images)}


def read(answers, image):
    height, width = image.shape[:2]
    labels, soft = (answers[name][:height, :width] for name in ("labels", "probabilities"))
    return Labels(image, labels.astype(np.uint8), soft, CLASSES)


PREDICTOR = Predictor(answer, read, "none")


def save(path, height, width, **options):
    rng = np.random.default_rng(height * width)
    pixels = rng.permutation(256)[rng.integers(0, 256, (height, width, 3))].astype(np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def run(source, target, predict=PREDICTOR, **options):
    return predict_folder(predict, CLASSES, source, target, **options)


@pytest.mark.parametrize(("how", "num_shapes"), [("exact", 6), ("buckets", 4)])
def test_every_size_keeps_its_size(tmp_path, how, num_shapes):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    sizes = [(1, 1), (5, 9), (33, 20), (40, 70), (31, 32), (64, 100)]
    pixels = {f"{h}x{w}": save(source / f"{h}x{w}.png", h, w) for h, w in sizes}
    predict = dataclasses.replace(PREDICTOR, shapes=how)
    summary = run(source, out, predict, probabilities=True)
    assert not summary.failures
    assert len(summary.predicted) == len(sizes)
    assert len(summary.shapes) == num_shapes
    for name, image in pixels.items():
        labels = viz.load_label_png(out / "labels" / f"{name}.png")
        np.testing.assert_array_equal(labels, image.argmax(-1))
        with Image.open(out / "overlays" / f"{name}.png") as overlay:
            expected = viz.overlay(image, labels, CLASSES.palette())
            np.testing.assert_array_equal(np.asarray(overlay), expected)
        soft = npz(out / "probabilities" / f"{name}.npz")["probabilities"]
        assert soft.dtype == np.float16
        np.testing.assert_allclose(soft, jax.nn.softmax(image.astype(np.float32)), atol=1e-3)
    assert json.loads((out / "classes.json").read_text())["names"] == list(CLASSES.names)
    assert (out / "legend.png").exists()


def test_images_are_normalised_by_name(tmp_path):
    pixels = save(tmp_path / "a.png", 4, 4)
    seen = []

    def spy(images, sizes):
        seen.append(images)
        np.testing.assert_array_equal(sizes, [[4, 4]])
        return answer(images, sizes)

    caffe = Predictor(spy, read, "caffe", "buckets")
    predict_folder(caffe, CLASSES, tmp_path / "a.png", tmp_path / "out")
    mean = np.array([122.679, 116.669, 104.007], np.float32)
    assert seen[0].shape == (1, 32, 32, 3)
    np.testing.assert_allclose(seen[0][0, :4, :4], pixels - mean, atol=1e-4)
    assert not seen[0][0, 4:].any()


def test_bad_files_are_reported_and_the_rest_is_done(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    save(source / "good.jpg", 8, 8)
    save(source / "good.png", 8, 8)  # would write the same files
    Image.new("I;16", (4, 4)).save(source / "deep.png")
    (source / "empty.png").touch()
    (source / "text.png").write_text("no picture")
    save(source / "cut.jpg", 90, 90)
    (source / "cut.jpg").write_bytes((source / "cut.jpg").read_bytes()[:2000])
    (source / "notes.txt").write_text("not meant to be an image")
    Image.new("L", (5, 6)).save(source / "grey.png")
    Image.new("RGBA", (5, 6)).save(source / "alpha.png")
    summary = run(source, out)
    assert {path.name for path in summary.predicted} == {"good.jpg", "grey.png", "alpha.png"}
    bad = ["good.png", "deep.png", "empty.png", "text.png", "cut.jpg"]
    assert len(summary.failures) == len(bad)
    for name in bad:
        (line,) = [line for line in summary.failures if f"{name}:" in line]
        assert "\n" not in line
    assert len(list((out / "labels").iterdir())) == 3
    assert str(summary).splitlines()[0] == "3 images predicted, computed at 6x5, 8x8; 5 failed"
    assert len(str(summary).splitlines()) == 6


def test_optional_files_are_left_out(tmp_path):
    save(tmp_path / "a.png", 2, 3)
    run(tmp_path / "a.png", tmp_path / "out", overlays=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"labels", "classes.json", "legend.png"}


def test_nothing_to_do_or_nowhere_to_write(tmp_path):
    with pytest.raises(UserError, match="has no images"):
        run(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        run(tmp_path / "missing", tmp_path / "out")
    save(tmp_path / "a.png", 2, 3)
    with pytest.raises(UserError, match="cannot write to"):
        run(tmp_path / "a.png", tmp_path / "a.png")


def test_network_of_another_number_of_classes(tmp_path):
    save(tmp_path / "a.png", 2, 3)

    def two(images, sizes):
        answers = answer(images, sizes)
        return answers | {"probabilities": answers["probabilities"][..., :2]}

    with pytest.raises(ValueError, match=r"\(2, 3, 2\)"):
        predict_folder(Predictor(two, read, "none"), CLASSES, tmp_path / "a.png", tmp_path / "o")
