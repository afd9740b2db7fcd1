"""Published weights: every name of each release, and what becomes of the numbers in its files."""

import functools
import pathlib
import re
import typing
from collections import Counter
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dense_jax.errors import UserError
from dense_jax.layers import init
from dense_jax.layers.conv import conv
from dense_jax.models import deconvnet, deeplab, dilated, fcn, mask_rcnn, resnet, segnet
from dense_jax.tasks import import_weights
from dense_jax.weights import files, rules
from tests import contract
from tests.test_weights_caffe import blob, field, layer, old_layer

# The releases' layers, from their prototxts: name and shapes of blobs.
WIDTHS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)


def convs(layers, before, kernel=3) -> dict[str, Any]:
    """Blobs of convolutions that follow each other, from their names and widths."""
    blobs = {}
    for name, width in layers.items():
        blobs[name] = [(width, before, kernel, kernel), (width,)]
        before = width
    return blobs


ENCODER = {f"conv{s}_{i}": w for s, ws in enumerate(WIDTHS, 1) for i, w in enumerate(ws, 1)}
VGG = convs(ENCODER, 3)
ON_MAP = {
    "fc6": [(4096, 512, 7, 7), (4096,)],
    "fc7": [(4096, 4096, 1, 1), (4096,)],
}
DENSE = {"fc6": [(4096, 25088), (4096,)], "fc7": [(4096, 4096), (4096,)]}
SCORES = {"score_fr": 4096, "score_pool4": 512, "score_pool3": 256}


def scores(*names):
    return {name: [(21, SCORES[name], 1, 1), (21,)] for name in names}


def deconvs(**kernels):
    return {name: [(21, 21, k, k)] for name, k in kernels.items()}


# SegNet's decoder, from the coarsest to the finest, without the scores.
DECODER = {
    **{"conv5_3_D": 512, "conv5_2_D": 512, "conv5_1_D": 512, "conv4_3_D": 512, "conv4_2_D": 512},
    **{"conv4_1_D": 256, "conv3_3_D": 256, "conv3_2_D": 256, "conv3_1_D": 128, "conv2_2_D": 128},
    **{"conv2_1_D": 64, "conv1_2_D": 64},
}
BASIC = dict.fromkeys([f"conv{kind}{i}" for kind in ("", "_decode") for i in range(1, 5)], 64)


def normed(blobs):
    """The same with normalisation layers, whose scale and shift are [1, C, 1, 1]."""
    shapes = {f"{name}_bn": [(1, shape[0], 1, 1)] * 2 for name, (shape, _) in blobs.items()}
    return blobs | shapes


def context(prefix, widths, classes):
    names = [f"conv{i}" for i in ("1_1", "1_2", *(f"{n}_1" for n in range(2, len(widths) - 1)))]
    blobs = convs(
        dict(zip([f"{prefix}_{n}" for n in [*names, "fc1"]], widths, strict=True)), classes
    )
    return blobs | {f"{prefix}_final": [(classes, widths[-1], 1, 1), (classes,)]}


def final(name, classes):
    return {name: [(classes, 4096, 1, 1), (classes,)]}


# DeconvNet's way up; Deconvolution has input channels first.
UP = {
    "fc6-deconv": (4096, 512, 7),
    **{"deconv5_1": (512, 512, 3), "deconv5_2": (512, 512, 3), "deconv5_3": (512, 512, 3)},
    **{"deconv4_1": (512, 512, 3), "deconv4_2": (512, 512, 3), "deconv4_3": (512, 256, 3)},
    **{"deconv3_1": (256, 256, 3), "deconv3_2": (256, 256, 3), "deconv3_3": (256, 128, 3)},
    **{"deconv2_1": (128, 128, 3), "deconv2_2": (128, 64, 3)},
    **{"deconv1_1": (64, 64, 3), "deconv1_2": (64, 64, 3)},
}


def deconvnet_blobs():
    blobs = VGG | ON_MAP | {n: [(i, o, k, k), (o,)] for n, (i, o, k) in UP.items()}
    norms = {}
    for name, shapes in blobs.items():
        norm = {"fc6": "bnfc6", "fc7": "bnfc7", "fc6-deconv": "fc6-deconv-bn"}.get(name)
        norm = norm or name.replace("deconv", "debn").replace("conv", "bn")
        norms[norm] = [(1, *shapes[1], 1, 1)] * 2
    return blobs | norms | {"seg-score-voc": [(21, 64, 1, 1), (21,)]}


def residual(stages, conv1_bias=False):
    """Blobs of a residual network; of each stage the names of its blocks."""
    blobs: dict[str, list] = {"conv1": [(64, 3, 7, 7), *([(64,)] if conv1_bias else [])]}
    blobs |= {"bn_conv1": [(64,)] * 2, "scale_conv1": [(64,)] * 2}
    before = 64
    for stage, blocks in enumerate(stages, 2):
        inner = 64 * 2 ** (stage - 2)
        for i, block in enumerate(blocks):
            layers = {
                "2a": (inner, before, 1),
                "2b": (inner, inner, 3),
                "2c": (4 * inner, inner, 1),
            }
            if i == 0:
                layers["1"] = (4 * inner, before, 1)
            before = 4 * inner
            for branch, (features, channels, k) in layers.items():
                end = f"{stage}{block}_branch{branch}"
                blobs[f"res{end}"] = [(features, channels, k, k)]
                blobs |= {f"bn{end}": [(features,)] * 2, f"scale{end}": [(features,)] * 2}
    return blobs


LETTERS = ("abc", "abcd", "abcdef", "abc")
NUMBERS = ("abc", ["a", "b1", "b2", "b3"], ["a", *(f"b{i}" for i in range(1, 23))], "abc")
FC1000 = {"fc1000": [(1000, 2048), (1000,)]}
CLASSIFIERS = {f"fc1_voc12_c{i}": [(21, 2048, 3, 3), (21,)] for i in range(4)}


def branches(number):
    conv6, conv7 = [(1024, 512, 3, 3), (1024,)], [(1024, 1024, 1, 1), (1024,)]
    return {
        name: shapes
        for i in range(1, number + 1)
        for name, shapes in (
            (f"fc6_{i}", conv6), (f"fc7_{i}", conv7), (f"fc8_voc12_{i}", [(21, 1024, 1, 1), (21,)])
        )
    }  # fmt: skip


ALEXNET = {
    "conv1": [(96, 3, 11, 11), (96,)],
    "conv2": [(256, 48, 5, 5), (256,)],
    "conv3": [(384, 256, 3, 3), (384,)],
    "conv4": [(384, 192, 3, 3), (384,)],
    "conv5": [(256, 192, 3, 3), (256,)],
    "fc6": [(4096, 256, 6, 6), (4096,)],
    "fc7": ON_MAP["fc7"],
}
FCN8S = deconvs(upscore2=4, upscore_pool4=4, upscore8=16) | scores(*SCORES)
SEGNET = normed(VGG | convs(DECODER, 512)) | {"conv1_1_D": [(11, 64, 3, 3), (11,)]}
BASIC_BLOBS = normed(convs(BASIC, 3, 7))
OLD_SCORES = [(11, 64, 1, 1), (11,)]
# --model, the release that has to be recognised, its normalisation, its blobs, and how many tensors
# or parameters are loaded, new and ignored.
RELEASES: dict[str, tuple[str, str, str, dict, dict]] = {
    "vgg16": (
        *("vgg16", "Caffe's VGG-16", "caffe", VGG | DENSE | {"fc8": [(1000, 4096), (1000,)]}),
        {"loaded": 30, "ignored": 2},
    ),
    "vgg16 on a map": (
        *("dilated_front_end", "Caffe's VGG-16", "caffe", VGG | ON_MAP),
        {"loaded": 30, "missing": 2},
    ),
    "fcn32s": (
        *("fcn32s", "Caffe's FCN", "caffe"),
        *(VGG | ON_MAP | scores("score_fr") | deconvs(upscore=64), {"loaded": 32, "ignored": 1}),
    ),
    "fcn16s": (
        *("fcn16s", "Caffe's FCN", "caffe"),
        VGG | ON_MAP | scores("score_fr", "score_pool4") | deconvs(upscore2=4, upscore16=32),
        {"loaded": 34, "ignored": 2},
    ),
    "fcn8s": (
        *("fcn8s", "Caffe's FCN", "caffe", VGG | ON_MAP | FCN8S),
        {"loaded": 36, "ignored": 3},
    ),
    "fcn8s_at_once": (
        *("fcn8s_at_once", "Caffe's FCN-8s trained at once", "caffe"),
        VGG | ON_MAP | FCN8S | {"scale_pool4": [(1,)], "scale_pool3": [(1,)]},
        {"loaded": 36, "ignored": 5},
    ),
    "fcn_alexnet": (
        *("fcn_alexnet", "Caffe's AlexNet", "caffe"),
        ALEXNET | scores("score_fr") | deconvs(upscore=63),
        {"loaded": 16, "ignored": 1},
    ),
    "segnet": (
        *("segnet", "Caffe's SegNet", "none", SEGNET),
        {"loaded": 4 * 25 + 2, "new": 2 * 25},
    ),
    "segnet_basic": (
        *("segnet_basic", "Caffe's SegNet-Basic", "none"),
        BASIC_BLOBS | {"conv_classifier": OLD_SCORES},
        {"loaded": 4 * 8 + 2, "new": 2 * 8},
    ),
    "segnet_basic of the zoo": (
        *("segnet_basic", "Caffe's SegNet-Basic", "none"),
        BASIC_BLOBS | {"dense_softmax_inner_prod": OLD_SCORES},
        {"loaded": 4 * 8 + 2, "new": 2 * 8},
    ),
    "deconvnet": (
        *("deconvnet", "Caffe's DeconvNet", "caffe", deconvnet_blobs()),
        {"loaded": 4 * 29 + 2, "new": 2 * 29},
    ),
    "dilation7": (
        *("dilation7", "fyu/dilation's dilation7 for KITTI", "dilation_kitti"),
        VGG | ON_MAP | final("final", 11) | context("ctx", [11] * 6, 11),
        {"loaded": 30 + 2 + 14},
    ),
    "dilation8": (
        *("dilation8", "fyu/dilation's dilation8 for CamVid", "dilation_camvid"),
        VGG | ON_MAP | final("final", 11) | context("ctx", [11] * 7, 11),
        {"loaded": 30 + 2 + 16},
    ),
    "dilation8_voc": (
        *("dilation8_voc", "fyu/dilation's dilation8 for VOC", "dilation_voc"),
        VGG | ON_MAP | final("fc-final", 21)
        | context("ct", [21 * n for n in (2, 2, 4, 8, 16, 32, 32)], 21),
        {"loaded": 30 + 2 + 16},
    ),
    "dilation10": (
        *("dilation10", "fyu/dilation's dilation10 for Cityscapes", "dilation_cityscapes"),
        VGG | ON_MAP | final("final", 19) | context("ctx", [19] * 9, 19)
        | {"ctx_upsample": [(19, 1, 16, 16)]},
        {"loaded": 30 + 2 + 20, "ignored": 1},
    ),
    "deeplab_largefov": (
        *("deeplab_largefov", "Caffe's DeepLab on VGG-16", "caffe"),
        VGG | {name.removesuffix("_1"): shapes for name, shapes in branches(1).items()},
        {"loaded": 32},
    ),
    "deeplab_vgg16": (
        *("deeplab_vgg16", "Caffe's DeepLab on VGG-16", "caffe", VGG | branches(4)),
        {"loaded": 26 + 24},
    ),
    "deeplab_resnet101": (
        *("deeplab_resnet101", "Caffe's DeepLab on ResNet-101", "caffe"),
        residual(NUMBERS) | CLASSIFIERS
        | {f"{name}_res{s}": b for name, b in CLASSIFIERS.items() for s in ("075", "05")},
        {"loaded": 5 * 104 + 8, "ignored": 16},
    ),
    "resnet50": (
        *("resnet50", "MSRA's ResNet-50", "caffe", residual(LETTERS, conv1_bias=True) | FC1000),
        {"loaded": 5 * 53 + 1 + 2},
    ),
    "resnet101": (
        *("resnet101", "MSRA's ResNet-101", "caffe", residual(NUMBERS) | FC1000),
        {"loaded": 5 * 104 + 2},
    ),
}  # fmt: skip


@functools.cache
def template_of(name) -> Any:
    return import_weights.template_of(import_weights.build(name))


def bilinear(shape):
    """The filter on the diagonal of [i, o, k, k], by the release's formula."""
    k = shape[-1]
    factor = (k + 1) // 2
    centre = factor - 1 if k % 2 else factor - 0.5
    taps = 1 - abs(np.arange(k) - centre) / factor
    mixing = np.eye(shape[0])[:, : shape[1]] if shape[1] > 1 else np.ones(shape[:2])
    return (mixing[:, :, None, None] * np.outer(taps, taps)).astype(np.float32)


def published(blobs) -> dict[str, np.ndarray]:
    """Tensors of these blobs that need no memory, but for those that networks may have built in."""
    tensors: dict[str, np.ndarray] = {}
    for name, shapes in blobs.items():
        for i, shape in enumerate(shapes):
            tensors[f"{name}.{i}"] = np.broadcast_to(np.float32(0), shape)
            if name.startswith("upscore") or name == "ctx_upsample":
                tensors[f"{name}.{i}"] = bilinear(shape)
    for name, scale in (("scale_pool4.0", 0.01), ("scale_pool3.0", 0.0001)):
        if name in tensors:
            tensors[name] = np.array([scale], np.float32)
    return tensors


def target(name, release):
    """Where a tensor has to go, by another rule than the tables'."""
    layer_name, i = name.rsplit(".", 1)
    kind = ("kernel", "bias")[int(i)]
    if "ResNet" in release:
        stage = re.fullmatch(r"(res|bn|scale)(\d)([a-f])(\d*)_branch(1|2[abc])", layer_name)
        if name == "conv1.1":
            return "batch_stats/bn1/mean"
        if stage:
            what, number, letter, block, branch = stage.groups()
            at = f"layer{int(number) - 1}_{block or 'abcdef'.index(letter)}"
            ours = ("downsample_" if branch == "1" else "conv") if what == "res" else "bn"
            ours = "downsample_" if branch == "1" else ours
            end = ("0" if what == "res" else "1") if branch == "1" else "_abc".index(branch[-1])
            layer_name, kind = f"{at}/{ours}{end}", what
        elif layer_name in ("bn_conv1", "scale_conv1"):
            layer_name, kind = "bn1", layer_name.split("_")[0]
        layer_name = layer_name.replace("fc1000", "fc").replace("fc1_voc12", "fc1")
        if kind == "bn":
            return f"batch_stats/{layer_name}/{('mean', 'var')[int(i)]}"
        names = ("scale", "bias") if kind == "scale" else ("kernel", "bias")
        return f"params/{layer_name}/{names[int(i)]}"
    if "bn" in layer_name:
        kind = ("scale", "bias")[int(i)]
    theirs = {"fc-final": "final", "dense_softmax_inner_prod": "conv_classifier"}
    layer_name = theirs.get(layer_name, layer_name).replace("-voc", "").replace("fc8_voc12", "fc8")
    return f"params/{layer_name.replace('ct_', 'ctx_')}/{kind}"


@pytest.mark.parametrize("case", RELEASES)
def test_every_name_of_a_release_is_explained(case):
    model, name, normalisation, blobs, counts = RELEASES[case]
    template, tensors = template_of(model), published(blobs)
    release = rules.choose(import_weights.RELEASES, template, tensors)
    assert (release.name, release.normalisation) == (name, normalisation)
    account = rules.match(template, tensors, release.rules, absent=release.absent)
    assert Counter(row.status for row in account.rows) == counts
    for row in account.rows:
        if row.status == "loaded":
            assert row.target == target(row.source, name)
        if row.status == "new":
            assert row.target.startswith("batch_stats/")
    first = next(row for row in account.rows if row.source in ("conv1_1.0", "conv1.0"))
    assert first.note.endswith("channels reversed")
    assert sum("channels reversed" in row.note for row in account.rows) == 1


def test_every_name_builds_a_network():
    names = typing.get_args(import_weights.ModelName)
    assert set(names) == set(import_weights._NETWORKS)
    assert {model for model, *_ in RELEASES.values()} <= set(names)
    for name in names:
        model: Any = import_weights.build(name, num_classes=7)
        assert getattr(model, "num_classes", 7) == 7
        assert getattr(import_weights.build(name, aux=True), "aux", True)


def test_the_release_is_known_in_parts():
    """The trunk of FCN-8s starts DeepLab, a front end starts a network with context."""
    for model, blobs, name in (
        ("deeplab_largefov", VGG | ON_MAP | FCN8S, "Caffe's FCN"),
        ("dilation10", VGG | ON_MAP | final("fc-final", 21), "fyu/dilation's dilation8 for VOC"),
        ("segnet", VGG | DENSE, "Caffe's VGG-16"),
        ("deconvnet", VGG | ON_MAP, "Caffe's VGG-16"),
    ):
        release = rules.choose(import_weights.RELEASES, template_of(model), published(blobs))
        account = rules.match(
            template_of(model), published(blobs), release.rules, required=release.trunk
        )
        assert (release.name, account.unexplained) == (name, ())


def written(
    tensors: dict[str, np.ndarray], path: pathlib.Path, form: str = "layer", norms: str = "-"
) -> pathlib.Path:
    """Writes a .caffemodel; BatchNorms are the layers that begin with `norms`."""
    layers: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors):
        layers.setdefault(name.rsplit(".", 1)[0], []).append(tensors[name])
    content = field(1, "written by a test")
    for name, blobs in layers.items():
        if name.startswith(norms):
            factor = np.float32(0.25)
            blobs = [*(values * factor for values in blobs), np.array([factor])]
        kind = "BatchNorm" if name.startswith(norms) else "Convolution"
        if form == "layers":
            content += old_layer(name, 4, *(blob(old(name, b), four_axes) for b in blobs))
        else:
            content += layer(name, kind, *map(blob, blobs))
    path.write_bytes(content)
    return path


def old(name, values):
    """As files of 2014 have it: four axes, dense layers last, channels of normalisations second."""
    if values.ndim == 1:
        return values.reshape((1, -1, 1, 1) if "bn" in name else (1, 1, 1, -1))
    if name in ("fc6", "fc7", "fc8"):
        return values.reshape(1, 1, len(values), -1)
    return values


def four_axes(*dims):
    return b"".join(field(number, dim) for number, dim in enumerate(dims, 1))


THIN = dict(width=1 / 32)
RESNET_101 = resnet.resnet101(num_classes=5, width=1 / 64)
# A thin network and the release that its weights are written and read as.
ROUNDS: dict[str, tuple[Any, rules.Release, str, str]] = {
    "fcn8s": (fcn.fcn8s(5, pad_mode="same", **THIN), fcn.CAFFE[0], "layers", "-"),
    "fcn32s": (fcn.fcn32s(5, upsample="learned_all", **THIN), fcn.CAFFE[0], "layer", "-"),
    "fcn16s": (fcn.fcn16s(5, upsample="learned_inner", **THIN), fcn.CAFFE[0], "layer", "-"),
    "alexnet": (fcn.fcn_alexnet(5, **THIN), fcn.CAFFE[2], "layer", "-"),
    "segnet": (segnet.SegNet(5, **THIN), segnet.CAFFE[0], "layer", "-"),
    "segnet_basic": (segnet.SegNetBasic(5, **THIN), segnet.CAFFE[1], "layers", "-"),
    "deconvnet": (
        deconvnet.DeconvNet(5, input_size=64, fc_width=64, **THIN), deconvnet.CAFFE, "layers", "-"
    ),
    "dilation_voc": (
        dilated.dilated_large(3, pad="same", **THIN), dilated.CAFFE[0], "layer", "-"
    ),
    "dilation10": (dilated.dilation10(3, pad="same", **THIN), dilated.CAFFE[3], "layer", "-"),
    "deeplab": (deeplab.deeplab_vgg_aspp_l(5, **THIN), deeplab.CAFFE[0], "layer", "-"),
    "resnet50": (
        resnet.resnet50(num_classes=5, width=1 / 64), resnet.MSRA[0], "layer", "bn"
    ),
    "resnet101": (RESNET_101, resnet.MSRA[1], "layer", "bn"),
}  # fmt: skip


@pytest.mark.parametrize("case", ROUNDS)
def test_what_is_written_is_read_back(case, tmp_path):
    model, release, form, norms = ROUNDS[case]
    variables = contract.random_variables(model, (1, 32, 32, 3))
    if release.absent:
        variables = {"params": variables["params"]}
    tensors = rules.unload(variables, release.rules)
    if case == "resnet50":
        tensors["conv1.1"] = np.arange(len(tensors["conv1.0"]), dtype=np.float32)
        norm = variables["batch_stats"]["bn1"]
        norm["mean"] = norm["mean"] - tensors["conv1.1"]
    file = files.read(written(tensors, tmp_path / "x.caffemodel", form, norms))
    template = import_weights.template_of(model)
    found = rules.choose(import_weights.RELEASES, template, file.tensors)
    assert found.name == release.name
    tree, account = rules.load(template, file.tensors, found.rules, absent=found.absent)
    assert not account.unexplained
    chex.assert_trees_all_equal(tree, variables)
    assert form == "layer" or any("reshaped" in row.note for row in account.rows)


@pytest.fixture
def fcn8s_file(tmp_path, monkeypatch) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """A file of a thin FCN-8s as it is published, and its tensors."""
    model = ROUNDS["fcn8s"][0]
    monkeypatch.setattr(import_weights, "build", lambda *_: model)
    variables = contract.random_variables(model, (1, 32, 32, 3))
    tensors: Any = rules.unload(variables, fcn.CAFFE[0].rules)
    for name, k in (("upscore2", 4), ("upscore_pool4", 4), ("upscore8", 16)):
        tensors[f"{name}.0"] = bilinear((5, 5, k, k))
    return written(tensors, tmp_path / "fcn8s.caffemodel"), tensors


def test_fcn8s_sees_in_rgb_what_caffe_saw_in_bgr(fcn8s_file, tmp_path, capsys):
    path, tensors = fcn8s_file
    import_weights.run(model="fcn8s", source=str(path), out=tmp_path / "out")
    said = capsys.readouterr().out
    assert "36 loaded (18 permuted, 1 channels reversed), 3 ignored" in said
    assert "Caffe's FCN; images are to come with --normalisation=caffe" in said
    model = ROUNDS["fcn8s"][0]
    loaded, _ = import_weights.initial(f"run:{tmp_path / 'out'}", None)
    rgb = np.random.default_rng(0).uniform(-100, 100, (1, 64, 32, 3)).astype(np.float32)
    run = jax.jit(functools.partial(model.apply, train=False))
    got: Any = run(loaded, rgb)

    # Caffe's own first layer, on the image in BGR.
    bgr = np.pad(rgb[0, :, :, ::-1], ((1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(bgr, (3, 3), (0, 1))
    want = np.einsum("hwcyx,ocyx->hwo", windows, tensors["conv1_1.0"]) + tensors["conv1_1.1"]
    np.testing.assert_allclose(got["conv1_1"][0], np.maximum(want, 0), rtol=1e-4, atol=1e-3)
    # And the whole network, as if it read BGR.
    theirs = {**loaded["params"], "conv1_1": dict(loaded["params"]["conv1_1"])}
    theirs["conv1_1"]["kernel"] = tensors["conv1_1.0"].transpose(2, 3, 1, 0)
    want = run({"params": theirs}, rgb[..., ::-1])["logits"]
    scale = np.abs(want).max()
    np.testing.assert_allclose(got["logits"], want, atol=1e-5 * scale)
    unswapped = run({"params": theirs}, rgb)["logits"]
    assert np.abs(unswapped - want).max() > 0.1 * scale


def test_other_filters_than_the_bilinear_ones_are_refused(fcn8s_file, tmp_path):
    path, tensors = fcn8s_file
    tensors["upscore8.0"] = tensors["upscore8.0"] * np.float32(1.01)
    written(tensors, path)
    options: Any = dict(model="fcn8s", source=str(path), out=tmp_path / "out")
    with pytest.raises(UserError, match=r"1 misfit: upscore8.0 \(not what is built in"):
        import_weights.run(**options, dry_run=True)
    assert not (tmp_path / "out").exists()
    import_weights.run(**options, ignore=("upscore8.*",))
    learned = import_weights.template_of(ROUNDS["fcn8s"][0].clone(upsample="learned_all"))
    tree, _ = import_weights.initial(f"file:{path}", learned)
    kernel = tree["params"]["upscore8"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, 0, 3], tensors["upscore8.0"][3, 3])


def test_a_network_without_statistics_says_so(tmp_path, monkeypatch, capsys):
    model, release, form, _ = ROUNDS["segnet_basic"]
    monkeypatch.setattr(import_weights, "build", lambda *_: model)
    variables = contract.random_variables(model, (1, 32, 32, 3))
    tensors = rules.unload({"params": variables["params"]}, release.rules)
    path = written(tensors, tmp_path / "x.caffemodel", form)
    import_weights.run(model="segnet_basic", source=str(path), out=tmp_path / "out")
    said = capsys.readouterr().out
    assert "the network needs input_lrn=True" in said
    assert "16 new" in said
    loaded, normalisation = import_weights.initial(f"run:{tmp_path / 'out'}", None)
    assert (list(loaded), normalisation) == (["params"], "none")


def test_caffes_deconvolution_of_stride_1_is_a_convolution_here():
    rng = np.random.default_rng(0)
    theirs = rng.standard_normal((4, 2, 3, 3)).astype(np.float32)  # [i, o, h, w]
    x = rng.standard_normal((5, 6, 4)).astype(np.float32)
    want = np.zeros((7, 8, 2))
    for h, w in np.ndindex(5, 6):  # each input places a copy of the kernel
        want[h : h + 3, w : w + 3] += np.einsum("i,iohw->hwo", x[h, w], theirs)
    template = {"params": {"deconv4_3": {"kernel": np.zeros((3, 3, 4, 2), np.float32)}}}
    table = [rule for rule in deconvnet.CAFFE.rules if rule.source == "deconv4_3.0"]
    kernel = rules.load(template, {"deconv4_3.0": theirs}, table)[0]["params"]["deconv4_3"]
    got = conv(jnp.asarray(x[None]), jnp.asarray(kernel["kernel"]))[0]
    np.testing.assert_allclose(got, want[1:-1, 1:-1], atol=1e-5)


def test_the_constants_are_those_of_the_layers():
    """What tables call built in is what networks compute with."""
    for k in (4, 16, 63):
        np.testing.assert_allclose(
            init.bilinear()(None, (k, k, 1, 3)), bilinear((3, 1, k, k)).transpose(2, 3, 1, 0)
        )


# torchvision's maskrcnn_resnet50_fpn but for its backbone: ours, theirs, theirs in 2019, and the
# shapes of weights here and there.
LEVELS = (256, 512, 1024, 2048)
HEADS = [
    *(
        (f"fpn/inner_blocks_{i}", f"backbone.fpn.inner_blocks.{i}.0",
         f"backbone.fpn.inner_blocks.{i}", (1, 1, width, 256), (256, width, 1, 1))
        for i, width in enumerate(LEVELS)
    ),
    *(
        (f"fpn/layer_blocks_{i}", f"backbone.fpn.layer_blocks.{i}.0",
         f"backbone.fpn.layer_blocks.{i}", (3, 3, 256, 256), (256, 256, 3, 3))
        for i in range(4)
    ),
    ("rpn/conv", "rpn.head.conv.0.0", "rpn.head.conv", (3, 3, 256, 256), (256, 256, 3, 3)),
    ("rpn/cls_logits", *["rpn.head.cls_logits"] * 2, (1, 1, 256, 3), (3, 256, 1, 1)),
    ("rpn/bbox_pred", *["rpn.head.bbox_pred"] * 2, (1, 1, 256, 12), (12, 256, 1, 1)),
    ("box_head/fc6", *["roi_heads.box_head.fc6"] * 2, (7, 7, 256, 1024), (1024, 12544)),
    ("box_head/fc7", *["roi_heads.box_head.fc7"] * 2, (1024, 1024), (1024, 1024)),
    ("box_head/cls_score", *["roi_heads.box_predictor.cls_score"] * 2, (1024, 91), (91, 1024)),
    ("box_head/bbox_pred", *["roi_heads.box_predictor.bbox_pred"] * 2, (1024, 364), (364, 1024)),
    *(
        (f"mask_head/mask_fcn{i + 1}", f"roi_heads.mask_head.{i}.0",
         f"roi_heads.mask_head.mask_fcn{i + 1}", (3, 3, 256, 256), (256, 256, 3, 3))
        for i in range(4)
    ),
    ("mask_head/conv5_mask", *["roi_heads.mask_predictor.conv5_mask"] * 2, (2, 2, 256, 256),
     (256, 256, 2, 2)),
    ("mask_head/mask_fcn_logits", *["roi_heads.mask_predictor.mask_fcn_logits"] * 2,
     (1, 1, 256, 91), (91, 256, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("form", [0, 1])
def test_every_name_of_mask_rcnn_is_explained(form):
    leaves: dict[str, Any] = {}
    tensors: dict[str, np.ndarray] = {}
    backbone = import_weights.template_of(resnet.resnet50())
    for path, leaf in traverse_util.flatten_dict(backbone, sep="/").items():
        kind, name = path.split("/", 1)
        leaves[f"{kind}/backbone/{name}"] = leaf
    body = rules.unload(backbone_zeros(backbone), resnet.TORCHVISION.rules)
    tensors |= {f"backbone.body.{name}": values for name, values in body.items()}
    for ours, *theirs, shape, their_shape in HEADS:
        features = their_shape[1] if "conv5_mask" in ours else their_shape[0]
        leaves[f"params/{ours}/kernel"] = jax.ShapeDtypeStruct(shape, np.float32)
        leaves[f"params/{ours}/bias"] = jax.ShapeDtypeStruct((features,), np.float32)
        tensors[f"{theirs[form]}.weight"] = np.broadcast_to(np.float32(0), their_shape)
        tensors[f"{theirs[form]}.bias"] = np.broadcast_to(np.float32(0), (features,))
    assert len(tensors) == 307
    num_parameters = sum(values.size for name, values in tensors.items() if "running" not in name)
    assert num_parameters == 44_401_393 + 53_120  # with the frozen scales and shifts
    template = traverse_util.unflatten_dict(leaves, sep="/")
    release = rules.choose(mask_rcnn.TORCHVISION, template, tensors)
    assert release is mask_rcnn.TORCHVISION[form]
    if form:  # files of 2019 may have these
        tensors["backbone.body.bn1.num_batches_tracked"] = np.array(1)
    account = rules.match(template, tensors, release.rules)
    assert Counter(row.status for row in account.rows) == {"loaded": 307} | (
        {"ignored": 1} if form else {}
    )
    targets = {row.source: row.target for row in account.rows}
    for ours, *theirs, _, _ in HEADS:
        assert targets[f"{theirs[form]}.weight"] == f"params/{ours}/kernel"
    back = rules.unload(
        jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), template),
        release.rules,
    )
    assert {k: v.shape for k, v in back.items()} == {
        k: v.shape for k, v in tensors.items() if v.ndim
    }


def backbone_zeros(template):
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), template)
