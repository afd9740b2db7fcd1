"""The script of the dilated networks: its stages, its flags, and how it predicts."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.data.datasets import shapes
from dense_jax.data.datasets.shapes import ShapesSpec
from dense_jax.errors import UserError
from dense_jax.infer.whole_image import ONE_PASS
from dense_jax.layers.crf_rnn import WithCrfRnn
from dense_jax.objectives.pixels import labels_at
from dense_jax.ops import crf
from dense_jax.ops.crf import CrfParams
from dense_jax.train.state import num_parameters
from experiments import dilated as script
from tests import contract

THIN = dataclasses.replace(script.PRESETS["smoke"], width=1 / 64)


def thin_config(**changes):
    return dataclasses.replace(THIN, **changes)


def valid_config(**changes):
    return thin_config(front_pad="valid_reflect", crop=(404, 404), **changes)


def test_presets_are_the_stages_of_the_paper():
    def runs(preset):
        return [
            (s.train_mode, s.num_steps, s.batch_size, s.crop, s.learning_rate, s.momentum)
            for s in dataclasses.replace(script.PRESETS[preset], workdir="run").each_stage()
        ]

    assert runs("paper") == [
        ("front", 60_000, 14, (500, 500), 1e-3, 0.9),
        ("context", 20_000, 60, (900, 900), 1e-3, 0.9),
    ]
    assert runs("paper_camvid") == [
        ("front", 20_000, 8, (628, 628), 1e-4, 0.99),
        ("joint", 20_000, 1, (852, 852), 1e-5, 0.9),
    ]
    assert runs("paper_kitti") == [
        ("front", 10_000, 8, (628, 628), 1e-4, 0.99),
        ("joint", 20_000, 1, (900, 900), 1e-5, 0.99),
    ]
    assert runs("paper_cityscapes") == [
        ("front", 40_000, 8, (628, 628), 1e-4, 0.99),
        ("context", 24_000, 100, (1396, 1396), 1e-4, 0.99),
        ("joint", 60_000, 1, (1396, 1396), 1e-5, 0.99),
    ]
    counts = {"paper": (21, 141_149_720), "paper_cityscapes": (19, 134_368_179)}
    for preset, (num_classes, num_params) in counts.items():
        model = script.build(script.PRESETS[preset], num_classes).model
        assert num_parameters(contract.shapes_of(model, (1, 381, 381, 3))[1]) == num_params


def test_each_stage_starts_from_the_last_in_its_own_folder():
    config = thin_config(
        workdir="run", init="run:vgg", first=script.Stage("front"), second=script.Stage("context")
    )
    stages = list(config.each_stage())
    assert [(s.train_mode, s.workdir, s.init) for s in stages] == [
        ("front", "run/front", "run:vgg"),
        ("context", "run/context", "run:run/front"),
        ("joint", "run/joint", "run:run/context"),
    ]
    models = [script.build(stage, 3).model for stage in stages]
    assert [(m.context, m.frozen_front) for m in models] == [
        ("none", False), ("basic", True), ("basic", False),
    ]  # fmt: skip
    assert [bool(script.build(stage, 4).groups) for stage in stages] == [False, True, False]
    (alone,) = thin_config(workdir="run").each_stage()
    assert (alone.workdir, alone.init) == ("run", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0.0}, "--width=0.0"),
        ({"dropout_rate": 1.0}, "--dropout-rate=1.0"),
        ({"train_mode": "context", "context": "none"}, "trains nothing"),
        ({"first": script.Stage("context"), "context": "none"}, "trains nothing"),
        ({"front_pad": "valid_reflect"}, "needs --crop and --scale=1"),
        ({"front_pad": "valid_reflect", "crop": (404, 404), "scale": 0.5}, "needs --crop and"),
        ({"front_pad": "valid_reflect", "crop": (404, 404), "tile": 379}, "give at least 380"),
        ({"front_pad": "valid_reflect", "crop": (404, 500)}, None),
        ({"front_pad": "valid_reflect", "crop": (404, 372)}, r"sides of 372 \+ 8 m"),
        (
            {"front_pad": "valid_reflect", "crop": (404, 402)},
            r"--crop 404 402: .* scores at stride 8",
        ),
        ({"first": script.Stage("front", crop=(33, 32))}, r"--crop 33 32: .* sides of 0 \+ 8 m"),
        ({"front_pools": "strided", "crop": (64, 72)}, "scores at stride 32"),
    ],
)
def test_flags_that_do_not_go_together(changes, message):
    if message is None:
        thin_config(**changes)
        return
    with pytest.raises(UserError, match=message):
        thin_config(**changes)


def test_a_context_module_is_not_trained_on_nothing():
    with pytest.raises(UserError, match=r"give --init=run:PATH, or --first\.train-mode=front"):
        list(thin_config(train_mode="context").each_stage())


def test_whole_images_must_fit_the_loss():
    spec = ShapesSpec(size=(36, 32), num_train=2, num_val=2, num_test=2)
    dataset = shapes.load(None, **dataclasses.asdict(spec))
    with pytest.raises(UserError, match="images of 36x32 are seen whole"):
        script.build(thin_config(), 3).training_data(dataset)
    script.build(thin_config(upsample_loss="on"), 3).training_data(dataset)
    script.build(thin_config(crop=(32, 32)), 3).training_data(dataset)


def test_training_windows_bring_their_surroundings():
    rng = np.random.default_rng(0)
    config = valid_config(augment="none", normalisation="none")
    example = {
        "image": rng.integers(0, 255, (40, 48, 3), np.uint8),
        "label": np.arange(40 * 48, dtype=np.int64).reshape(40, 48),
    }
    result = example
    for transform in script.build(config, 4).transforms:
        result = transform(result, rng)
    assert result["image"].shape == (404, 404, 3)
    assert result["label"].shape == (32, 32)
    top, left = divmod(int(result["label"][0, 0]), 48)
    inner = result["image"][186:-186, 186:-186]
    np.testing.assert_array_equal(inner, example["image"][top : top + 32, left : left + 32])
    # The label of unit r is that of pixel 8 r.
    labels = labels_at(jnp.asarray(result["label"]), (4, 4), align_corners=False)
    np.testing.assert_array_equal(labels, result["label"][::8, ::8])


def padded_images(sizes):
    """Random images, and a batch that they lie in."""
    rng = np.random.default_rng(0)
    images = [rng.standard_normal((*size, 3)).astype(np.float32) for size in sizes]
    batch = np.full((len(sizes), 40, 40, 3), 7, np.float32)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    return images, batch, np.array(sizes, np.int32)


def predict_in_tiles(batch, sizes, **changes):
    config = valid_config(**changes)
    task = script.build(config, 3)
    model = task.model.clone(axis_name=None)
    variables = contract.random_variables(model, (1, 404, 404, 3))
    return model, variables, np.asarray(jax.jit(task.predict)(variables, batch, sizes)["logits"])


@pytest.mark.slow
def test_tiles_give_what_one_pass_over_an_image_and_its_surroundings_does():
    images, batch, sizes = padded_images([(21, 40), (40, 17)])
    model, variables, logits = predict_in_tiles(batch, sizes, tile=388, context="none")
    # Down to the end of the last unit.
    edge = ((186, 186 + 3), (186, 186), (0, 0))
    whole = np.pad(images[0], edge, mode="reflect")[None]
    outputs = jax.jit(model.apply, static_argnames="train")(variables, whole, train=False)
    expected = outputs["logits"][0, :21]
    np.testing.assert_allclose(logits[0, :21, :40], expected, rtol=1e-4, atol=1e-5)
    assert np.std(expected) > 1e-3


@pytest.mark.slow
def test_tiles_of_any_size_agree_behind_the_context_module():
    _, batch, sizes = padded_images([(21, 40), (40, 17)])
    flags = dict(context="basic", context_layers=7, upsample_loss="on")
    results = [predict_in_tiles(batch, sizes, tile=tile, **flags)[2] for tile in (396, 412)]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert np.std(results[0]) > 1e-3


def test_what_predicting_says_of_itself():
    assert script.build(thin_config(), 4).test_time == ONE_PASS
    assert "tiles of 404 pixels" in script.build(valid_config(tile=404), 4).test_time
    config = thin_config(post="crf")
    assert script.build(config, 3).crf == config.crf


def test_a_learned_crf_needs_the_pixels_of_the_images():
    with pytest.raises(UserError, match="--normalisation=grey_image"):
        thin_config(post="crf_rnn", normalisation="grey_image")


def test_a_learned_crf_stands_behind_the_last_stage():
    config = thin_config(
        post="crf_rnn", crf=CrfParams(iterations=2, sxy=8.0), workdir="run",
        first=script.Stage("front"), second=script.Stage("context"),
    )  # fmt: skip
    stages = list(config.each_stage())
    assert [stage.post for stage in stages] == ["none", "none", "crf_rnn"]
    outputs = [term.output for stage in stages for term in script.build(stage, 3).loss_terms]
    assert outputs == ["scores", "scores", "logits"]
    assert "CRF-RNN, 2 iterations" in script.build(config, 4).test_time
    frozen, kept = script.build(thin_config(train_mode="context", post="crf_rnn"), 4).groups
    paths = ("conv1_1/kernel", "ctx_final/kernel", "crf_rnn/compatibility")
    assert [bool(re.search(frozen.pattern, path)) for path in paths] == [True, False, False]
    assert [bool(re.search(kept.pattern, path)) for path in paths] == [False, False, True]
    assert (frozen.lr, kept.lr, kept.decay) == (0, 1, 0)


@pytest.mark.parametrize("front_pad", ["same", "valid_reflect"])
def test_a_learned_crf_that_learned_nothing_is_the_crf(front_pad, monkeypatch):
    def exact(logits, images, params, sizes):
        del sizes
        one = functools.partial(crf.exact_mean_field, params=params)
        return jax.vmap(one)(logits, images)

    monkeypatch.setattr(crf, "mean_field", exact)  # the lattice takes long to compile
    _, batch, sizes = padded_images([(21, 40), (40, 17)])
    changes = {"crop": (404, 404), "tile": 388} if front_pad == "valid_reflect" else {}
    params = CrfParams(w1=2.0, sxy=8.0, srgb=20.0, w2=1.0, sg=1.0, iterations=2)
    config = thin_config(front_pad=front_pad, context="none", crf=params, post="crf", **changes)
    plain = script.build(config, 3).model.clone(axis_name=None)
    side = 40 if front_pad == "same" else 404
    params = contract.random_variables(plain, (1, side, side, 3))["params"]
    wanted = jax.jit(script.build(config, 3).predict)({"params": params}, batch, sizes)["logits"]
    config = dataclasses.replace(config, post="crf_rnn")
    task = script.build(config, 3)
    assert isinstance(task.model, WithCrfRnn)
    assert task.crf is None
    start = {
        "bilateral_weights": np.full(3, 2, np.float32),
        "spatial_weights": np.ones(3, np.float32),
        "compatibility": np.eye(3, dtype=np.float32),
    }
    variables = {"params": {**params, "crf_rnn": start}}
    found = jax.jit(task.predict)(variables, batch, sizes)["logits"]
    for i, (height, width) in enumerate(sizes):
        np.testing.assert_allclose(
            np.exp(found[i, :height, :width]), np.exp(wanted[i, :height, :width]), atol=2e-3
        )
