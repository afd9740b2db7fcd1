"""Every name that the releases for Caffe have, and where it has to go, by rules of their own."""

import re
from typing import Any

import numpy as np

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
        *("fcn_alexnet", "Caffe's CaffeNet", "caffe"),
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
