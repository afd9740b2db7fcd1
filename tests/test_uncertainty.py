"""Monte-Carlo prediction, and what its variance says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.data.datasets import shapes
from dense_jax.errors import UserError
from dense_jax.evaluation import report, uncertainty
from dense_jax.evaluation.record import Record
from dense_jax.infer.monte_carlo import MonteCarlo
from dense_jax.train.config import RunConfig


def noisy(variables, images, sizes, key):
    """A pass that draws: the logits are the image, plus noise for each pixel."""
    del sizes
    return images + variables["scale"] * jax.random.normal(key, images.shape)


def test_monte_carlo_is_the_mean_and_variance_of_its_samples():
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (3, 4, 5, 6)), jnp.float32)
    variables, sizes = {"scale": jnp.float32(2)}, jnp.zeros((3, 2), jnp.int32)
    predict = MonteCarlo(noisy, num_samples=7, seed=3)
    keys = jax.random.split(jax.random.key(3), 7)
    samples = np.array(
        [[noisy(variables, x[None], sizes, key)[0] for x in images] for key in keys], np.float64
    )
    samples = np.exp(samples) / np.exp(samples).sum(-1, keepdims=True)
    found = jax.jit(predict)(variables, images, sizes)
    np.testing.assert_allclose(np.exp(found["logits"]), samples.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["variance"], samples.var(0).mean(-1), rtol=1e-4)
    # An image alone gives what it gives in a batch.
    alone = predict(variables, images[1:2], sizes[1:2])
    np.testing.assert_allclose(alone["logits"], found["logits"][1:2], rtol=1e-4)
    one = MonteCarlo(noisy, num_samples=1)(variables, images, sizes)
    assert not np.any(one["variance"])


def test_monte_carlo_stays_finite_without_any_probability():
    images = jnp.array([[[[1e4, 0.0]]]])
    predict = MonteCarlo(noisy, num_samples=2)
    outputs = predict({"scale": jnp.float32(0)}, images, jnp.zeros((1, 2)))
    assert np.all(np.isfinite(outputs["logits"]))


def test_bands_sort_pixels_by_confidence():
    rng = np.random.default_rng(0)
    variance = rng.permutation(1000).astype(np.float32)
    bands = uncertainty.band_accuracies(variance, variance < 250)
    np.testing.assert_allclose(bands, [1, 1, 0.5, *[0] * 7])
    lines = uncertainty.markdown(bands).splitlines()
    assert lines[4] == "| 20-30 % | 50.00 | 83.33 |"
    assert len(lines) == 12
    assert np.isnan(uncertainty.band_accuracies(variance[:3], variance[:3] < 2)[-1])


class Unsure:
    """Labels every pixel right, and doubts the lower ones more."""

    config = RunConfig(normalisation="none", eval_batch_size=4)

    antialias = True

    def input_size(self, size):
        return size

    def padded_side(self, side):
        return side

    def predict(self, variables, images, sizes):
        del variables, sizes
        colours = (jnp.broadcast_to(jnp.float32(c), images.shape) for c in shapes.CLASSES.colours)
        logits = -jnp.stack([jnp.sum((images - c) ** 2, axis=-1) for c in colours], axis=-1)
        return {"logits": logits, "variance": jnp.cumsum(jnp.ones(images.shape[:3]), axis=1)}


def test_a_split_without_images_is_told():
    dataset = shapes.load(None, size=(24, 20), num_train=1, num_val=1, num_test=0)
    with pytest.raises(UserError, match="no images"):
        uncertainty.measure(Unsure(), {"unused": np.zeros(1)}, dataset, "test")


def test_report_shows_the_bands_and_the_pictures(tmp_path):
    dataset = shapes.load(None, size=(24, 20), num_train=1, num_val=2, num_test=1)
    found = uncertainty.measure(Unsure(), {"unused": np.zeros(1)}, dataset, "val")
    assert [score.name for score in found.scores][2:] == ["variance_right", "variance_wrong"]
    Record("mean_iou", [found], {"images_scored": 2, "split": "val"}).write(tmp_path, 1)
    config = {"script": "experiments.segnet", "config": {}, "classes": dataset.classes.to_json()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = report.write_report(tmp_path).read_text()
    assert "Uncertainty" in page
    assert "<td>80-90 %</td><td>" in page
    assert page.count("data:image/png;base64") == 2
