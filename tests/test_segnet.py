import dataclasses
import functools
import json
import re
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from dense_jax.data.classes import ClassTable
from dense_jax.data.dataset import Dataset
from dense_jax.data.datasets import camvid
from dense_jax.data.normalise import Normalise
from dense_jax.errors import UserError
from dense_jax.evaluation.record import Record
from dense_jax.infer.whole_image import ONE_PASS
from dense_jax.models import segnet
from dense_jax.models.segnet import SegNet, SegNetBasic
from dense_jax.objectives import pixels as losses
from dense_jax.ops.pool import max_pool_with_switches, max_unpool
from dense_jax.tasks import training
from dense_jax.train.config import from_json
from experiments import segnet as script
from tests import contract

CAMVID = (1, 360, 480, 3)
thin = functools.partial(SegNet, num_classes=3, width=1 / 64)
thin_basic = functools.partial(SegNetBasic, num_classes=3, width=1 / 16)


def flat_params(model, image_shape=(1, 32, 32, 3)):
    """Returns {"conv1/kernel": shape, ...}."""
    params = contract.shapes_of(model, image_shape)[1]["params"]
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    return {k: v.shape for k, v in flat.items()}


def count(model):
    return sum(int(np.prod(shape)) for shape in flat_params(model).values())


def run(model, variables, images, *, train=False, **options):
    """Returns the outputs."""

    @jax.jit
    def apply(variables, images):
        mutable = ["batch_stats"] if train else False
        outputs = contract.apply(model, variables, images, train, mutable=mutable, **options)
        return outputs[0] if train else outputs

    return apply(variables, images)


def random_images(shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


# Fact 1: parameters.


@pytest.mark.parametrize(
    ("model", "num_params"),
    [(SegNet(11), 29_449_355), (SegNet(21), 29_455_125)],
)
def test_full_size(model, num_params):
    contract.check_full(
        model, num_params=num_params, image_shape=CAMVID, num_classes=model.num_classes
    )


@pytest.mark.parametrize(
    ("model", "num_params"),
    [
        (SegNet(12), 29_449_932),
        (SegNet(37), 29_464_357),
        (SegNet(38), 29_464_934),
        (SegNetBasic(21), 1_417_237),
        (SegNetBasic(11, conv_bias=False), 1_416_075),
    ],
)
def test_other_published_counts(model, num_params):
    assert count(model) == num_params


def test_encoder_has_the_parameters_of_vgg16():
    shapes = flat_params(SegNet(11))
    encoder = [v for k, v in shapes.items() if re.fullmatch(r"conv\d_\d/(kernel|bias)", k)]
    assert sum(map(np.prod, encoder)) == 14_714_688
    assert sum("kernel" in k for k in shapes) == 26


ENCODER = 9_472 + 3 * 200_768 + 4 * 128
SCORE = 65 * 11


@pytest.mark.parametrize(
    ("decoder", "extra", "published"),
    [
        ("indices", 4 * (200_768 + 128) + SCORE, 1.425),
        ("indices_add", 4 * (200_768 + 128) + SCORE, 1.425),
        ("single_channel", 4 * (50 * 64 + 128) + SCORE, 0.625),
        ("bilinear", SCORE, 0.625),
        ("fcn", 4 * 64 * 11 * 11 + 5 * SCORE, 0.65),
        ("fcn_noadd", 4 * 64 * 11 * 11 + SCORE, 0.65),
        ("fcn_nodimred", 4 * 64 * 64 * 64 + SCORE, 1.625),
        ("fcn_noadd_nodimred", 4 * 64 * 64 * 64 + SCORE, 1.625),
    ],
)
def test_decoders_of_table_1(decoder, extra, published):
    model = SegNetBasic(11, decoder=decoder)
    assert count(model) == ENCODER + extra
    assert count(model) == pytest.approx(1e6 * published, rel=0.025)
    outputs, _ = contract.shapes_of(model, CAMVID)
    assert outputs["logits"].shape == (1, 360, 480, 11)
    assert [outputs[f"dec{i}"].shape[1:3] for i in (4, 3, 2, 1)] == [
        (45, 60), (90, 120), (180, 240), (360, 480)
    ]  # fmt: skip


# Fact 2: sizes at 360x480, and any other size.


def test_sizes_of_camvid():
    outputs, _ = contract.shapes_of(SegNet(11), CAMVID)
    assert outputs["pool4"].shape == (1, 23, 30, 512)
    assert outputs["pool5"].shape == (1, 12, 15, 512)
    for stage, channels in enumerate((64, 128, 256, 512, 512), 1):
        size = [-(-side // 2 ** (stage - 1)) for side in (360, 480)]
        assert outputs[f"unpool{stage}"].shape == (1, *size, channels)
    assert outputs["logits"].shape == (1, 360, 480, 11)
    assert contract.shapes_of(SegNetBasic(11), CAMVID)[0]["pool4"].shape == (1, 23, 30, 64)


@pytest.mark.parametrize("size", [(17, 17), (31, 33), (45, 60), (225, 18)])
def test_every_image_size_is_kept(size):
    for model in (thin(), *(thin_basic(decoder=d) for d in get_args(segnet.Decoder))):
        outputs, _ = contract.shapes_of(model, (1, *size, 3))
        assert outputs["logits"].shape == (1, *size, 3)


def test_too_small_images_are_refused():
    for model, size in ((thin(), 16), (thin_basic(), 8)):
        with pytest.raises(ValueError, match="does not fit 1 pixels"):
            contract.shapes_of(model, (1, size, size, 3))
        contract.shapes_of(model, (1, size + 1, size + 1, 3))


# Facts 3 and 4: unpooling.


@pytest.mark.parametrize("size", [(8, 6), (7, 9)])
def test_unpooling_keeps_the_maximum_of_each_window_at_its_place(size):
    x = random_images((2, *size, 5))
    unpooled = np.asarray(max_unpool(*max_pool_with_switches(x, 2, ceil=True), size, window=2))
    for b, i, j, c in np.ndindex(2, -(-size[0] // 2), -(-size[1] // 2), 5):
        window = np.s_[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
        kept = unpooled[window] != 0
        assert kept.sum() == 1
        assert unpooled[window][kept] == x[window].max() == x[window][kept]


@pytest.mark.parametrize("size", [(8, 6), (7, 9)])
def test_pooling_undoes_unpooling_of_what_is_not_negative(size):
    _, switches = max_pool_with_switches(random_images((2, *size, 5)), 2, ceil=True)
    y = np.maximum(random_images(switches.shape, seed=1), 0)
    again, _ = max_pool_with_switches(max_unpool(y, switches, size, window=2), 2, ceil=True)
    np.testing.assert_array_equal(again, y)


# Fact 5: receptive fields.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "pool", "stride", "field", "unit"),
    [(thin(), "pool5", 32, 212, 5), (thin_basic(), "pool4", 16, 106, 4)],
)
def test_receptive_field(model, pool, stride, field, unit):
    """A column of NaN reaches a unit if and only if the unit sees it."""
    size = 12 * stride
    variables = contract.random_variables(model, (1, 2 * stride, size, 3))
    first = (stride - 1) // 2 - (field // 2 - 1) + unit * stride
    columns = [first - 1, first, first + field - 1, first + field]
    images = random_images((len(columns), 2 * stride, size, 3))
    for image, column in zip(images, columns, strict=True):
        image[:, column] = np.nan
    seen = np.isnan(run(model, variables, images)[pool][:, 0, unit : unit + 2, 0])
    assert seen[:, 0].tolist() == [False, True, True, False]
    assert seen[:, 1].tolist() == [False, False, True, True]  # the neighbour, one stride on


# Facts 6 and 8: weights of the loss.


def test_weighted_loss():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 2, (2, 4, 5, 3)), jnp.float32)
    labels = jnp.asarray(rng.choice([0, 1, 2, 255], (2, 4, 5)), jnp.int32)

    def loss(weights):
        total = losses.softmax_cross_entropy(logits, labels, class_weights=weights).sum()
        return total / losses.count_pixels(labels, jnp.ones(2, bool), "valid")

    log_p, truth = np.asarray(jax.nn.log_softmax(logits)), np.asarray(labels)
    scored = truth != 255
    mean = -log_p[scored, truth[scored]].mean()
    np.testing.assert_allclose(loss(None), mean, rtol=1e-5)
    np.testing.assert_allclose(loss(jnp.ones(3)), mean, rtol=1e-5)
    np.testing.assert_allclose(loss(jnp.full(3, 2.0)), 2 * mean, rtol=1e-5)
    # Of the true class, and not divided by the sum of the weights.
    only = loss(jnp.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(only, -log_p[truth == 1, 1].sum() / scored.sum(), rtol=1e-5)


def test_published_weights():
    weights = segnet.CAMVID_WEIGHTS
    assert tuple(weights) == camvid.CLASSES.names
    assert np.median(list(weights.values())) == 0.9051
    assert weights["road"] / weights["sign"] == pytest.approx(0.01469, abs=5e-6)


def test_measured_weights_of_camvid(data_root):
    """Both definitions on the real labels; neither gives the published list (sign: 9.6446)."""
    pairs = [pair for pair in camvid.find(data_root / "camvid").pairs if pair.split == "train"]
    assert len(pairs) == 367
    labels = [np.asarray(Image.open(pair.label)) for pair in pairs]
    expected: dict[losses.ClassFrequency, str] = {
        "pixels": "0.2663 0.1929 4.5642 0.1417 1 0.4614 3.8248 3.9814 0.7648 7.0182 15.3816",
        "eigen": "0.2794 0.2018 4.789 0.1491 1 0.4235 3.846 1.980 0.789 6.385 8.819",
    }
    for definition, weights in expected.items():
        found = losses.median_frequency_weights(labels, 11, definition=definition, ignore_label=11)
        np.testing.assert_allclose(found, np.array(weights.split(), float), rtol=5e-4)


# Fact 7: batch normalisation.


def test_batch_normalisation_follows_every_convolution_but_the_last():
    norms = {k.split("_bn")[0] for k in flat_params(SegNet(11)) if k.endswith("_bn/scale")}
    decoder = {name for name in norms if name.endswith("_D")}
    assert (len(norms - decoder), len(decoder)) == (13, 12)
    assert "conv1_1_D" not in norms


def test_normalisation_starts_as_released():
    names = ("conv1_bn", "conv_decode4_bn", "conv_classifier")

    @jax.jit
    def init(key):  # what is not returned is not computed
        params = thin_basic().init(key, jnp.zeros((1, 16, 16, 3)), train=False)["params"]
        return [params[name] for name in names]

    *norms, classifier = init(jax.random.key(0))
    for norm in norms:
        np.testing.assert_array_equal(norm["scale"], 1)
        np.testing.assert_allclose(norm["bias"], 0.001)
    assert not np.any(classifier["bias"])


# What every network promises, and what the sources leave open.


def test_contract():  # SegNet's gradients and the other decoders: see test_segnet_torch.py
    contract.check_model(
        SegNetBasic(11),
        num_params=1_416_587,
        image_shape=CAMVID,
        num_classes=11,
        thin=thin_basic(num_classes=11, axis_name="devices"),
        thin_shape=(2, 19, 26, 3),
        skips=["conv4", "conv_decode4", "conv_decode1"],
    )
    contract.check_without_jit(thin_basic(num_classes=11), image_shape=(1, 19, 26, 3))


def test_names_are_those_of_the_release():
    names = {k.split("/")[0] for k in flat_params(SegNet(11))}
    convs = {f"conv{s}_{i}" for s, n in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, n + 1)}
    convs |= {f"{name}_D" for name in convs}
    assert names == convs | {f"{name}_bn" for name in convs - {"conv1_1_D"}}
    stages = [f"conv{i}" for i in (1, 2, 3, 4)] + [f"conv_decode{i}" for i in (1, 2, 3, 4)]
    assert {k.split("/")[0] for k in flat_params(SegNetBasic(11))} == {
        *stages, *(f"{name}_bn" for name in stages), "conv_classifier"
    }  # fmt: skip


def test_the_last_convolution_of_a_stage_reduces_the_channels():
    shapes = flat_params(SegNet(11))
    assert shapes["conv4_2_D/kernel"] == (3, 3, 512, 512)
    assert shapes["conv4_1_D/kernel"] == (3, 3, 512, 256)
    assert shapes["conv2_1_D/kernel"] == (3, 3, 128, 64)


def test_fcn_decoders_are_dense_up_convolutions_without_normalisation():
    for decoder, channels in (("fcn", 11), ("fcn_nodimred", 64)):
        shapes = flat_params(SegNetBasic(11, decoder=decoder))
        for stage in (1, 2, 3, 4):
            assert shapes[f"upsample{stage}/kernel"] == (8, 8, channels, channels)
        assert sum(name.endswith("_bn/scale") for name in shapes) == 4


def test_up_convolutions_start_as_interpolation():
    @jax.jit
    def init(key):  # what is not returned is not computed
        model = thin_basic(decoder="fcn")
        return model.init(key, jnp.zeros((1, 16, 16, 3)), train=False)["params"]["upsample2"]

    kernel = init(jax.random.key(0))["kernel"]
    for row, column in np.ndindex(2, 2):  # each pixel of the enlarged map sees 4x4 of the 8x8 taps
        np.testing.assert_allclose(kernel[row::2, column::2].sum((0, 1)), np.eye(3), atol=1e-6)


def test_bilinear_steps_have_no_parameters():
    names = {name.split("/")[0] for name in flat_params(SegNetBasic(11, decoder="bilinear"))}
    encoder = [f"conv{i}" for i in (1, 2, 3, 4)]
    assert names == {*encoder, *(f"{name}_bn" for name in encoder), "conv_classifier"}


def test_biases_change_nothing_in_training():
    images = random_images((2, 16, 16, 3))
    variables = contract.random_variables(thin_basic(), images.shape)
    bare = {
        k: {n: v for n, v in layer.items() if n != "bias" or "_" in k}
        for k, layer in variables["params"].items()
    }
    for i in (1, 2, 3, 4):
        bare[f"conv_decode{i}"] = {"kernel": bare[f"conv_decode{i}"]["kernel"]}
    with_bias = run(thin_basic(), variables, images, train=True)["logits"]
    without = run(thin_basic(conv_bias=False), {**variables, "params": bare}, images, train=True)[
        "logits"
    ]
    np.testing.assert_allclose(without, with_bias, rtol=1e-3, atol=1e-4)


def test_lrn_comes_first():
    images = 255 * np.abs(random_images((1, 16, 16, 3)))
    variables = contract.random_variables(thin_basic(), images.shape)
    # Caffe divides alpha by the window, which holds all three channels; k is 1.
    scale = (1 + 1e-4 / 5 * np.square(images).sum(-1, keepdims=True)) ** -0.75
    expected = run(thin_basic(), variables, images * scale)["logits"]
    found = run(thin_basic(input_lrn=True), variables, images)["logits"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# Dropout.


@pytest.mark.slow
def test_dropout_follows_the_coarse_stages():
    images, key = random_images((2, 64, 64, 3)), {"dropout": jax.random.key(0)}
    model = SegNet(3, width=1 / 4, decoder_relu=False)
    variables = contract.random_variables(model, images.shape)
    kept = run(model, variables, images)
    dropped = run(model.clone(dropout_rate=0.5, sample_dropout=True), variables, images, rngs=key)
    # Unpooling shows what came from the coarser stage: one value a window, or zero if dropped.
    for stage, share in ((1, 1.0), (2, 0.5), (3, 0.5), (4, 0.5), (5, 0.5)):
        alive = [np.count_nonzero(outputs[f"unpool{stage}"]) for outputs in (kept, dropped)]
        assert alive[1] / alive[0] == pytest.approx(share, abs=0.1), stage
    for name, share in (("pool1", 1), ("pool2", 1), ("pool3", 0.5), ("pool4", 0.5), ("pool5", 0.5)):
        alive = [np.count_nonzero(outputs[name]) for outputs in (kept, dropped)]
        assert alive[1] / alive[0] == pytest.approx(share, abs=0.1), name


@pytest.mark.slow
def test_dropout_of_basic():
    images, key = random_images((2, 32, 32, 3)), {"dropout": jax.random.key(0)}
    model = SegNetBasic(3, width=1 / 2, dropout_rate=0.5, sample_dropout=True)
    variables = contract.random_variables(model, images.shape)
    outputs = run(model, variables, images, rngs=key)
    zeros = {i: np.mean(outputs[f"dec{i}"] == 0) for i in (1, 2, 3, 4)}
    assert zeros[1] == zeros[2] == 0
    assert zeros[3] == pytest.approx(0.5, abs=0.05)
    assert zeros[4] == pytest.approx(0.5, abs=0.05)
    evaluated = run(model.clone(sample_dropout=False), variables, images)
    assert not np.any(evaluated["dec4"] == 0)


# The script.


def config(**changes):
    return dataclasses.replace(script.PRESETS["smoke"], **changes)


def build(**changes):
    return script.build(config(**changes), 4).model


def test_flags_reach_the_network():
    assert isinstance(build(net="segnet"), SegNet)
    assert build(net="segnet").decoder_relu
    assert not build(net="segnet", decoder_relu="off").decoder_relu
    assert not build().decoder_relu
    assert build(decoder_relu="on").decoder_relu
    assert build(decoder="fcn_noadd").decoder == "fcn_noadd"
    assert build().conv_bias
    assert not build(conv_bias="off").conv_bias
    assert build(bn_epsilon=1e-5).bn_epsilon == 1e-5
    rates = {build(dropout=value).dropout_rate for value in ("enc_dec", "bayes")}
    assert rates == {0.5}
    assert build(dropout="none").dropout_rate == 0
    assert build(input_lrn="on", normalisation="none").input_lrn
    assert not build().input_lrn


def test_pixels_normalised_over_channels_are_those_of_0_to_255():
    raw = config(input_lrn="on", normalisation="none")
    assert Normalise("none") in script.build(raw, 4).transforms
    with pytest.raises(UserError, match="--input-lrn=on takes pixels of 0-255"):
        config(input_lrn="on", normalisation="caffe")


@pytest.mark.parametrize(
    ("norm", "normalisation", "lrn"),
    [("lrn", "none", "on"), ("none", "none", "off"), ("meanstd", "torchvision", "off")],
)
def test_runs_with_input_norm_open(norm, normalisation, lrn):
    """Earlier versions had one flag for both, and wrote the normalisation that it meant."""
    old = config(normalisation=normalisation).to_json()
    del old["input_lrn"], old["post"], old["crf"]
    opened = from_json(script.Config, old | {"input_norm": norm})
    assert opened == config(normalisation=normalisation, input_lrn=lrn)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"net": "segnet", "decoder": "fcn"}, "--net=basic"),
        ({"width": 0}, "--width=0"),
        ({"mc_samples": 0}, "--mc-samples=0"),
        ({"crop": (0, 8)}, "--crop 0 8"),
    ],
)
def test_flags_that_no_run_can_use(flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        config(**flags)


def test_class_balance():
    maps = [np.array([[0, 0, 0, 1]]), np.array([[0, 2, 2, 2]])]
    split = [{"label": label} for label in maps]
    three = Dataset("three", ClassTable(["a", "b", "c"]), {"train": split}, "", "")  # pyrefly: ignore
    assert script.class_weights("none", three) is None
    pixels = script.class_weights("median_pixels", three)
    assert pixels is not None
    np.testing.assert_allclose(pixels, [3 / 4, 3, 1])
    eigen = script.class_weights("median_eigen", three)
    assert eigen is not None
    np.testing.assert_allclose(eigen, [1, 2, 2 / 3])
    with pytest.raises(UserError, match="CamVid's 11 classes, not for three"):
        script.class_weights("published", three)
    real = Dataset("camvid", camvid.CLASSES, {}, "", "")
    published = script.class_weights("published", real)
    assert published is not None
    assert published[[0, 6, 10]].tolist() == pytest.approx([0.2595, 9.6446, 7.3614])


def test_rates_and_decays_are_those_of_the_release():
    for preset, shift_decay in (("paper", 1.0), ("paper_segnet", 0.0)):
        groups = script.build(script.PRESETS[preset], 4).groups
        found = {
            name: next(g for g in groups if re.search(g.pattern, name))
            for name in ("conv1_bn/scale", "conv1_bn/bias")
        }
        assert (found["conv1_bn/scale"].lr, found["conv1_bn/scale"].decay) == (1, 1)
        assert (found["conv1_bn/bias"].lr, found["conv1_bn/bias"].decay) == (1, shift_decay)
        assert not any(re.search(g.pattern, "conv1/bias") for g in groups)
        assert script.PRESETS[preset].bias_lr == 2


def test_a_task_is_what_the_flags_say(tmp_path):
    flags = dict(dropout="none", bn_stats="running", class_balance="median_pixels")
    task = script.build(config(**flags), 6)
    dataset = training.load_dataset(task.config)
    assert not task.posthoc_batch_stats
    weights = task.class_weights(dataset)
    assert weights is not None
    assert weights.shape == (6,)
    assert task.test_time == ONE_PASS
    assert not task.measures

    bayes = script.build(config(dropout="bayes", bn_stats="posthoc"), 6)
    assert bayes.posthoc_batch_stats
    assert "2 passes" in bayes.test_time
    variables = contract.random_variables(bayes.model.clone(axis_name=None), (1, 32, 32, 3))
    (measure,) = bayes.measures
    found = measure(bayes, variables, dataset, "val")
    scores = {score.name: score.value for score in found.scores}
    assert 0 <= scores["accuracy_doubtful_tenth"] <= 1
    assert scores["variance_wrong"] > 0
    Record("mean_iou", [found], {}).write(tmp_path, 1)
    record = json.loads((tmp_path / "uncertainty.json").read_text())
    assert record["scores"] == scores
    source = dataset.split("val")
    labels = [source[i]["label"] for i in range(len(source))]
    assert record["pixels"] == sum(np.count_nonzero(label != 255) for label in labels)
    assert "0-10 %" in (tmp_path / "uncertainty.md").read_text()
    pictures = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert pictures == [f"uncertainty_{i}.png" for i in (1, 2, 3, 4)]
