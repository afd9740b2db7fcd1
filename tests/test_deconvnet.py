import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dense_jax.data import crops
from dense_jax.errors import UserError
from dense_jax.infer import ensemble, proposals
from dense_jax.infer.whole_image import ONE_PASS
from dense_jax.layers import init
from dense_jax.layers.conv import conv, up_conv
from dense_jax.models import deconvnet
from dense_jax.ops.crf import CrfParams
from dense_jax.ops.pool import max_pool, max_pool_with_switches, max_unpool
from dense_jax.tasks import training
from experiments import deconvnet as script
from tests import contract

FULL = (1, 224, 224, 3)
thin = functools.partial(
    deconvnet.DeconvNet, num_classes=3, input_size=32, fc_width=128, width=1 / 16
)
SMOKE = script.PRESETS["smoke"]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def changed(**flags: Any):
    return dataclasses.replace(SMOKE, **flags)


@pytest.fixture(scope="module")
def full():
    """(outputs, parameters) of the paper's network, as shapes."""
    outputs, variables = contract.shapes_of(deconvnet.DeconvNet(num_classes=21), FULL)
    return outputs, variables["params"]


def test_fact_1_parameters():
    contract.check_full(
        deconvnet.DeconvNet(num_classes=21),
        num_params=251_805_653,
        image_shape=FULL,
        num_classes=21,
    )


def test_parameters_of_each_layer(full):
    # Table 2 of the paper: kernel x kernel x in x out + out.
    per_layer = {
        "conv1_1": 1_792, "conv1_2": 36_928, "conv2_1": 73_856, "conv2_2": 147_584,
        "conv3_1": 295_168, "conv3_2": 590_080, "conv3_3": 590_080, "conv4_1": 1_180_160,
        "conv4_2": 2_359_808, "conv4_3": 2_359_808, "conv5_1": 2_359_808, "conv5_2": 2_359_808,
        "conv5_3": 2_359_808, "fc6": 102_764_544, "fc7": 16_781_312, "fc6-deconv": 102_760_960,
        "deconv5_1": 2_359_808, "deconv5_2": 2_359_808, "deconv5_3": 2_359_808,
        "deconv4_1": 2_359_808, "deconv4_2": 2_359_808, "deconv4_3": 1_179_904,
        "deconv3_1": 590_080, "deconv3_2": 590_080, "deconv3_3": 295_040,
        "deconv2_1": 147_584, "deconv2_2": 73_792, "deconv1_1": 36_928, "deconv1_2": 36_928,
        "seg-score": 1_365,
    }  # fmt: skip
    _, params = full
    norms = {name: leaf for name, leaf in params.items() if "bn" in name}
    assert {n: count(leaf) for n, leaf in params.items() if n not in norms} == per_layer
    assert len(norms) == 29
    assert count(norms) == 33_408


def test_fact_2_sizes(full):
    names = ["conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1", "pool5", "fc6"]
    names += ["fc6-deconv", *(f"deconv{stage}_1" for stage in (5, 4, 3, 2, 1))]
    sizes = [full[0][name].shape[1:3] for name in names]
    expected = [224, 112, 56, 28, 14, 7, 1, 7, 14, 28, 56, 112, 224]
    assert sizes == [(size, size) for size in expected]


def test_fact_3_share_of_fc6_and_fc6_deconv(full):
    _, params = full
    share = (count(params["fc6"]) + count(params["fc6-deconv"])) / count(params)
    assert share == pytest.approx(0.816, abs=5e-4)


def test_narrow_fc_layers_hold_a_quarter_and_a_sixteenth():
    _, variables = contract.shapes_of(deconvnet.deconvnet_fc1024(num_classes=21), FULL)
    params = variables["params"]
    assert params["fc6"]["kernel"].shape == (7, 7, 512, 1024)
    assert params["fc7"]["kernel"].shape == (1, 1, 1024, 1024)


def test_fact_6_deconvolution_of_stride_1_is_a_convolution():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 5, 6, 3)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 3, 4)), jnp.float32)
    deconvolved = up_conv(x, kernel, strides=1, padding=1)
    convolved = conv(x, kernel[::-1, ::-1], padding=1)
    np.testing.assert_allclose(deconvolved, convolved, rtol=1e-5, atol=1e-5)
    # Caffe and torch store a transposed kernel (in, out, h, w): swapped as well as turned around.
    torch = pytest.importorskip("torch")
    image, stored = (torch.tensor(np.asarray(a)) for a in (x, kernel))
    oracle = torch.nn.functional.conv_transpose2d(
        image.permute(0, 3, 1, 2), stored.permute(2, 3, 0, 1), padding=1
    )
    oracle = oracle.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(convolved, oracle, rtol=1e-5, atol=1e-5)


def test_fact_7_pooling_undoes_unpooling():
    x = jnp.maximum(jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 10, 3))), 0)
    pooled, switches = max_pool_with_switches(x, 2)
    image = max_unpool(pooled, switches, (8, 10), window=2)
    np.testing.assert_array_equal(max_pool(image, 2), pooled)


def test_fact_8_product_without_fcn_scores_is_background():
    rng = np.random.default_rng(0)
    deconv = jnp.asarray(rng.uniform(0, 5, (4, 21)), jnp.float32)
    fcn = rng.standard_normal((4, 21)).astype(np.float32)
    fcn[2] = -np.abs(fcn[2])
    product = ensemble.product_scores(deconv, jnp.asarray(fcn))
    np.testing.assert_allclose(product, deconv * np.where(fcn > 0, fcn, 0), rtol=1e-6)
    assert not np.any(product[2])
    assert jnp.argmax(product[2]) == 0
    assert np.any(np.argmax(product, axis=-1) > 0)


def test_mean_of_probabilities():
    a, b = (jax.random.normal(jax.random.key(i), (2, 3, 4)) for i in (0, 1))
    each = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b)]
    logits = ensemble.mean_probabilities([a, b])
    np.testing.assert_allclose(logits, np.log(np.mean(each, axis=0)), rtol=1e-5)
    np.testing.assert_allclose(np.exp(logits).sum(-1), 1, rtol=1e-5)


@pytest.mark.slow  # FCN's and SegNet's are fast
def test_contract():
    # Without batch normalisation, by which each image depends on the other.
    contract.check_model(
        deconvnet.DeconvNet(num_classes=21, bn=False),
        num_params=251_772_245,
        image_shape=FULL,
        num_classes=21,
        thin=thin(num_classes=21, bn=False),
        thin_shape=(2, 20, 40, 3),
        skips=["conv1_1", "fc6", "fc7", "fc6-deconv", "deconv3_3"],
    )


@pytest.mark.slow
def test_every_image_size_is_kept():
    for height, width in [(1, 1), (31, 33), (225, 2), (64, 96)]:
        outputs, _ = contract.shapes_of(thin(), (1, height, width, 3))
        assert outputs["logits"].shape == (1, height, width, 3)
    # Every 32 pixels beyond the input size are one more unit of fc7.
    outputs, _ = contract.shapes_of(thin(input_size=64), (1, 128, 97, 3))
    assert outputs["fc7"].shape[1:3] == (3, 3)
    assert outputs["fc6-deconv"].shape[1:3] == (4, 4)
    with pytest.raises(ValueError, match="multiple of 32"):
        contract.shapes_of(thin(input_size=100), (1, 32, 32, 3))


@functools.cache
def evaluated():
    """(apply, variables) of a thin network with batch normalisation, in evaluation."""
    model = thin(input_size=64)
    variables = contract.random_variables(model, (1, 64, 64, 3))
    return jax.jit(functools.partial(contract.apply, model)), variables


@pytest.mark.slow
def test_filling_up_is_zeros_and_cut_off():
    apply, variables = evaluated()
    image = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    image[:, 50:], image[:, :, 41:] = 0, 0
    whole = apply(variables, image)["logits"]
    np.testing.assert_allclose(
        apply(variables, image[:, :50, :41])["logits"], whole[:, :50, :41], rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_overlapping_copies_are_averaged():
    """fc6-deconv of a constant fc7 is what one copy gives, summed over its kernel's places."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 1, 2)).astype(np.float32)
    params = {"params": {"kernel": kernel, "bias": np.array([1, 2], np.float32)}}

    def apply(x) -> Any:
        return deconvnet._OverlapMean(2, 3, init.he).apply(params, x)

    one = apply(np.ones((1, 1, 1, 1), np.float32))
    np.testing.assert_allclose(one, kernel.transpose(2, 0, 1, 3) + np.arange(1, 3), rtol=1e-6)
    x = rng.standard_normal((1, 4, 5, 1)).astype(np.float32)
    expected, copies = np.zeros((1, 6, 7, 2)), np.zeros((1, 6, 7, 1))
    for i in range(4):
        for j in range(5):
            expected[0, i : i + 3, j : j + 3] += x[0, i, j, 0] * kernel[:, :, 0]
            copies[0, i : i + 3, j : j + 3] += 1
    expected = expected / copies + [1, 2]
    np.testing.assert_allclose(apply(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_unpooling_kinds():
    x = np.arange(1, 5, dtype=np.float32).reshape(1, 2, 2, 1)
    image = np.zeros((1, 4, 4, 1), np.float32)
    image[0, [1, 0, 3, 2], [0, 3, 1, 2], 0] = x.ravel()
    _, switches = max_pool_with_switches(jnp.asarray(image), 2)

    def unpool(kind):
        return np.asarray(thin(unpool=kind)._unpool(jnp.asarray(x), switches))[0, :, :, 0]

    np.testing.assert_array_equal(unpool("switch"), image[0, :, :, 0])
    corner = [[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(unpool("fixed_corner"), corner)
    np.testing.assert_allclose(unpool("bilinear")[0], [1, 1.25, 1.75, 2])


@pytest.mark.slow
def test_one_image_would_be_normalised_away_at_the_1x1_maps():
    model = thin()
    variables = contract.random_variables(model, (1, 32, 32, 3))
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)

    def train(images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    with pytest.raises(UserError, match="batch normalisation bnfc6 sees one value per channel"):
        jax.eval_shape(train, images[:1])
    assert np.all(np.isfinite(jax.jit(train)(images)[0]["fc6"]))
    with pytest.raises(UserError, match="--bn=off"):
        changed(batch_size=8, accumulate=8)


@pytest.mark.slow
def test_initial_values_are_those_of_the_release():
    @functools.partial(jax.jit, static_argnums=1)
    def draw(key, decoder_init):
        model = thin(decoder_init=decoder_init)
        params = model.init(key, jnp.zeros((1, 32, 32, 3)), train=False)["params"]
        names = ("deconv5_2", "fc6-deconv", "bn5_1", "conv5_2", "seg-score")
        return {name: params[name] for name in names}

    params, thick = (draw(jax.random.key(0), kind) for kind in ("gaussian", "he"))
    assert np.all(params["bn5_1"]["scale"] == 1)
    assert np.all(params["bn5_1"]["bias"] == np.float32(0.001))
    for name in ("deconv5_2", "fc6-deconv"):
        assert np.std(params[name]["kernel"]) == pytest.approx(0.01, rel=0.1)
        assert not np.any(params[name]["bias"])
    he = np.sqrt(2 / np.prod(params["conv5_2"]["kernel"].shape[:3]))
    for layer in (params["conv5_2"], thick["deconv5_2"]):
        assert np.std(layer["kernel"]) == pytest.approx(he, rel=0.1)


# The script.


def test_paper_preset_builds_the_paper_network():
    paper = script.PRESETS["paper"]
    _, variables = contract.shapes_of(script.build(paper, 21).model, FULL)
    assert count(variables["params"]) == 251_805_653
    assert paper.batch_size // paper.accumulate == 8
    first, second = (dataclasses.replace(paper, workdir="runs/x")).each_stage()
    assert (first.num_steps, second.num_steps) == (20_000, 40_000)
    drops = [round(f * s.num_steps) for s in (first, second) for f in s.step_at]
    assert drops == [9_000, 18_000, 10_000, 20_000, 30_000]
    assert (first.workdir, second.workdir) == ("runs/x/stage1", "runs/x")
    assert (first.init, second.init) == (paper.init, "run:runs/x/stage1")
    assert (first.stages, second.stages) == ("stage1_only", "stage2_only")


def test_network_flags_reach_the_network():
    flags: dict[str, Any] = dict(
        bn="off",
        bn_epsilon=1e-5,
        unpool="bilinear",
        decoder_init="gaussian",
        input_size=64,
        resize=64,
        fc_width=32,
        width=0.5,
    )
    model = script.build(changed(**flags), 4).model
    assert (model.bn, model.unpool, model.input_size) == (False, "bilinear", 64)
    assert (model.decoder_init, model.bn_epsilon) == ("gaussian", 1e-5)
    _, variables = contract.shapes_of(model, (1, 64, 64, 3))
    assert variables["params"]["fc6"]["kernel"].shape == (2, 2, 256, 16)
    assert "batch_stats" not in variables


def test_transforms_of_windows_and_of_whole_images():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (90, 40, 3), np.uint8)
    example = {"image": image, "label": np.zeros((90, 40), np.uint8)}

    def shape(config):
        result = example
        for transform in script.build(config, 4).transforms:
            result = transform(result, np.random.default_rng(0))
        return result["image"].shape

    assert shape(SMOKE) == (32, 32, 3)
    whole = changed(stages="whole")
    assert shape(whole) == (90, 40, 3)
    assert shape(dataclasses.replace(whole, crop=(50, 60))) == (50, 60, 3)
    assert shape(dataclasses.replace(whole, scale=0.5)) == (45, 20, 3)
    scaled = shape(dataclasses.replace(whole, augment="mirror_scale"))
    assert scaled != (90, 40, 3)
    assert 0.75 * 90 <= scaled[0] <= 1.5 * 90


def test_windows_of_the_stages(monkeypatch):
    dataset = training.load_dataset(SMOKE)
    source = dataset.split("train")
    found = crops.find_objects(source, 0)
    rare = next(item for item in found if item.label == 1)
    objects = [item for item in found if item.label != 1 or item is rare]
    monkeypatch.setattr(crops, "find_objects", lambda *_: objects)

    def train(**flags) -> Any:
        return script.build(changed(**flags), 6).training_data(dataset).splits["train"]

    assert train(stages="whole") is source
    first = train(stages="stage1_only", balance="off")
    assert (len(first), first.background) == (len(objects), 0)
    assert first.fill == (124, 116, 104)  # torchvision's mean
    second = train(stages="stage2_only", balance="off")
    assert second.background is None
    assert len(second) > len(objects)
    assert len(train(stages="stage2_only", balance="on")) > len(second)
    assert len(train(stages="stage2_only", balance="off", min_iou=0.9)) < len(second)
    areas = [
        np.mean([np.prod(crop.size(i)) for i in range(len(crop))])
        for crop in (train(stages="stage1_only", enlarge=f) for f in (1.0, 1.5))
    ]
    assert areas[1] > 1.5 * areas[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"input_size": 40}, "--input-size=40"),
        ({"resize": 31}, "--resize=31"),
        ({"width": 0.0}, "--width"),
        ({"fc_width": 0}, "--fc-width=0"),
        ({"min_iou": 0.0}, "--min-iou"),
        ({"enlarge": 0.5}, "--enlarge"),
        ({"proposal_source": "file"}, "--proposals=FILE"),
        ({"stages": "two", "background": None}, "--background=None"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        changed(**flags)


@pytest.fixture(scope="module")
def labelled():
    """(variables, source) of the smoke preset; the network is not trained."""
    source = training.load_dataset(SMOKE).split("val")
    variables = contract.random_variables(script.build(SMOKE, 6).model, (1, 32, 32, 3))
    return variables, source


@pytest.mark.slow
def test_one_box_is_one_pass_of_an_image_of_the_input_size(labelled):
    variables, source = labelled
    images = np.stack([np.float32(source[i]["image"]) / 128 - 1 for i in range(2)])
    sizes = np.full((2, 2), 32, np.int32)
    boxes, one_pass = (
        jax.jit(script.build(changed(proposal_source=source), 6).predict)(variables, images, sizes)[
            "logits"
        ]
        for source in ("whole", "none")
    )
    assert boxes.shape == (2, 32, 32, 6)
    np.testing.assert_allclose(boxes, np.maximum(one_pass, 0), rtol=1e-4, atol=1e-4)
    assert np.any(boxes)


@pytest.mark.parametrize(
    ("flags", "num", "num_valid"),
    [
        ({}, 5, (5, 5)),
        ({"min_box": 15}, 5, (5, 1)),
        ({"num_proposals": 14, "min_box": 1}, 14, (14, 14)),
        ({"proposal_source": "whole", "min_box": 99}, 1, (1, 1)),
        ({"proposal_source": "gt", "num_proposals": 2}, 2, (2, 2)),
        ({"aggregate": "mean"}, 5, (5, 5)),
        ({"max_init": "neg_inf"}, 5, (5, 5)),
    ],
)
def test_inference_flags_reach_the_aggregation(monkeypatch, flags, num, num_valid):
    config = changed(**({"min_box": 12} | flags))
    sizes = jnp.array([[32, 32], [20, 30]], jnp.int32)

    def aggregate(network, images, boxes, valid, *, size, how, max_init):
        assert (size, how, max_init) == (32, config.aggregate, config.max_init)
        assert boxes.shape == (2, num, 4)
        assert tuple(valid.sum(axis=1)) == num_valid
        np.testing.assert_array_equal(boxes[:, 0], [[0, 0, 32, 32], [0, 0, 30, 20]])
        return images

    monkeypatch.setattr(proposals, "aggregate", aggregate)
    script.build(config, 6).predict({}, jnp.zeros((2, 32, 32, 3)), sizes)


@pytest.mark.slow
def test_scores_with_boxes_known_for_a_dataset(labelled, tmp_path, monkeypatch):
    variables, source = labelled
    dataset = training.load_dataset(SMOKE)

    def score(split="val", **flags):
        task = script.build(changed(**flags), 6)
        return [
            score.value
            for measure in task.measures
            for score in measure(task, variables, dataset, split).scores
            if score.name == "boxes_mean_iou"
        ]

    gt = {"proposal_source": "gt", "min_box": 8}
    (of_objects,) = score(**gt)
    assert 0 <= of_objects <= 1
    boxes = {source[i]["name"]: [] for i in range(len(source))}
    for item in crops.find_objects(source, 0):
        boxes[item.name].append(list(item.box))
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(boxes))
    shared = {"background": 0, "factor": 1.2}
    from_file = crops.known_boxes(source, proposals=str(path), **shared)
    assert from_file == crops.known_boxes(source, proposals=None, **shared)
    given = gt | {"proposal_source": "file", "proposals": str(path)}
    assert score(**given) == [of_objects]
    with pytest.raises(UserError, match="no boxes for image"):
        score("test", **given)
    assert score() == []
    # Their scores are refined where those of sliding windows are.
    seen = []

    def refine(scores, images, sizes, crf, normalisation):
        seen.append((scores.shape, images.shape, sizes.shape, crf, normalisation))
        return jnp.zeros_like(scores).at[..., 3].set(1.0)

    monkeypatch.setattr(proposals, "refine", refine)
    params = CrfParams(w1=1.0)
    assert score(**gt, post="crf", crf=params) != [of_objects]
    shapes = (1, 32, 32, 6), (1, 32, 32, 3), (1, 2)
    assert seen == [(*shapes, params, SMOKE.normalisation)]


def test_the_crf_refines_what_boxes_decide_together():
    assert script.build(SMOKE, 6).crf is None
    for source in ("sliding", "whole", "none"):
        config = changed(proposal_source=source, post="crf", crf=CrfParams(w1=2.0))
        assert script.build(config, 6).crf == config.crf
    release = script.PRESETS["paper"].crf
    assert (release.w1, release.sxy, release.srgb, release.w2, release.sg) == (5, 20, 3, 3, 3)


def test_protocol_names_what_was_done():
    assert "largest 5" in script.build(SMOKE, 4).test_time
    assert "one box" in script.build(changed(proposal_source="whole"), 4).test_time
    none = changed(proposal_source="none")
    assert script.build(none, 4).test_time == ONE_PASS


def test_stage_2_starts_from_stage_1():
    config = changed(stages="two", stage1_steps=7, bn_stats="posthoc", workdir="x")
    first, second = config.each_stage()
    assert (first.num_steps, first.init, first.workdir) == (7, None, "x/stage1")
    assert (second.num_steps, second.init, second.workdir) == (2, "run:x/stage1", "x")
    dataset = training.load_dataset(config)
    objects, windows = (
        script.build(stage, 6).training_data(dataset).split("train") for stage in (first, second)
    )
    assert len(windows) > len(objects)
    assert script.build(first, 6).posthoc_batch_stats
    assert "sliding windows" in script.build(first, 6).test_time
    assert not script.build(changed(bn="off", bn_stats="posthoc"), 6).posthoc_batch_stats
