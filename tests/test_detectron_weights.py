"""Weights of detectron2 and Detectron: all names, moved rows, trunks, and what their files may do.

NumPy computes what detectron2 makes of its own tensors; the networks here must find the same.
"""

import functools
import pickle
import time
from collections import Counter
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dense_jax import start
from dense_jax.commands import export, import_weights
from dense_jax.data.normalise import NORMALISATIONS, normalise
from dense_jax.errors import UserError
from dense_jax.layers.norm import BatchNorm
from dense_jax.models import resnet
from dense_jax.models.rcnn.faster_rcnn import FasterRCNN
from dense_jax.models.rcnn.heads import Res5
from dense_jax.models.rcnn.mask_rcnn import MaskRCNN
from dense_jax.ops import anchors
from dense_jax.releases import catalogue, detectron2
from dense_jax.releases import detectron as detectron_releases
from dense_jax.tasks import trained
from dense_jax.weights import files, layouts, rules
from tests import contract, detectron_names, members
from tests.detectron_names import blank
from tests.test_export import make_run
from tests.weight_files import refused, same

RELEASES = {release.name: release for release in catalogue.releases()}
NECKS = ("C4", "DC5", "FPN")
NAMES = [
    (kind, trunk, neck)
    for kind in ("faster", "mask")
    for trunk in detectron_names.DEPTHS
    for neck in NECKS
]
TELLING = [("mask", "R_50", "FPN"), ("mask", "R_50", "C4")]
# Tensors of a file, and parameters without normalisations, of published networks.
SIZES = {
    ("mask", "R_50", "FPN"): (307, 44_343_216),
    ("mask", "R_101", "FPN"): (562, 63_283_120),
    ("mask", "X_101_32x8d", "FPN"): (562, 107_427_760),
    ("mask", "R_50", "C4"): (279, 35_909_612),
    ("mask", "R_101", "C4"): (534, 54_849_516),
}


@functools.cache
def template_of(kind, trunk, neck) -> Any:
    return rules.template_of(catalogue.build(f"{kind}_rcnn_{trunk}_{neck}"))


def statuses(account):
    assert account.unexplained == ()
    return Counter(row.status for row in account.rows)


@pytest.mark.parametrize(("name", "size"), SIZES.items(), ids=str)
def test_names_and_shapes_of_detectron2_add_up(name, size):
    shapes = detectron_names.detectron2(*name)
    total = sum(np.prod(shape) for key, shape in shapes.items() if ".norm." not in key)
    assert (len(shapes), total) == size


@pytest.mark.parametrize("name", members(NAMES, TELLING), ids="_".join)
def test_every_name_of_detectron2_is_explained_and_comes_back(name):
    kind, trunk, neck = name
    tensors = blank(detectron_names.detectron2(*name))
    template = template_of(*name)
    own = detectron_names.GROUPS.get(trunk, 1) > 1
    release = rules.choose(catalogue.releases(), template, tensors)
    assert release.name == f"detectron2's R-CNN on ResNe{'Xt' if own else 't'}-{neck}"
    assert release.normalisation == ("torchvision" if own else "detectron2")
    assert release.needs.endswith("3x3" if own else "1x1")
    assert rules.choose(catalogue.releases(), None, tensors) is release
    account = rules.match(template, tensors, release.rules)
    assert statuses(account) == {"loaded": len(tensors)}
    notes = {row.source: row.note for row in account.rows}
    assert [k for k, note in notes.items() if "channels reversed" in note] == [
        f"backbone.{'bottom_up.' if neck == 'FPN' else ''}stem.conv1.weight"
    ]
    swapped = sum("anchors permuted" in note for note in notes.values())
    assert swapped == (0 if neck == "FPN" else 4)
    assert sum("background first" in note for note in notes.values()) == 2
    assert sum("background added" in note for note in notes.values()) == (
        4 if kind == "mask" else 2
    )
    leaves: Any = traverse_util.flatten_dict(template)
    zeros = {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in leaves.items()}
    back = rules.unload(traverse_util.unflatten_dict(zeros), release.rules)
    assert {key: x.shape for key, x in back.items()} == detectron_names.detectron2(*name)


@pytest.mark.slow
@pytest.mark.parametrize("code", ["detectron2", "detectron"])
def test_resnexts_have_pixels_and_strides_of_their_own(code):
    """Only the shape of their kernels tells them from ResNets."""
    for name in NAMES:
        tensors = blank(getattr(detectron_names, code)(*name))
        release = rules.choose(catalogue.releases(), None, tensors)
        is_resnext = name[1] in detectron_names.GROUPS
        assert ("ResNeXt" in release.name, "3x3" in release.needs) == (is_resnext, is_resnext)
        if code == "detectron2":
            assert (release.normalisation == "torchvision") == is_resnext


def test_old_files_of_detectron2_have_more():
    tensors = blank(detectron_names.detectron2("mask", "R_50", "FPN"))
    more = {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1)}
    more |= {f"proposal_generator.anchor_generator.cell_anchors.{i}": (3, 4) for i in range(5)}
    template = template_of("mask", "R_50", "FPN")
    tensors |= blank(more)
    release = rules.choose(catalogue.releases(), template, tensors)
    account = rules.match(template, tensors, release.rules)
    assert statuses(account) == {"loaded": 307, "ignored": 7}
    notes = {row.source: row.note for row in account.rows if row.status == "ignored"}
    assert notes["pixel_mean"] == "--normalisation has it"
    assert "--anchor-sizes" in notes["proposal_generator.anchor_generator.cell_anchors.4"]


@pytest.mark.parametrize("name", members(NAMES, TELLING), ids="_".join)
def test_every_name_of_detectron_is_explained(name):
    kind, trunk, neck = name
    tensors = blank(detectron_names.detectron(*name))
    template = template_of(*name)
    own = detectron_names.GROUPS.get(trunk, 1) > 1
    release = rules.choose(catalogue.releases(), template, tensors)
    assert release.name == f"Detectron's R-CNN on ResNe{'Xt' if own else 't'}-{neck}"
    assert release.normalisation == "fast_rcnn"
    assert "--bn-epsilon=0" in release.needs
    assert release.needs.endswith("3x3" if own else "1x1")
    account = rules.match(template, tensors, release.rules, absent=release.absent)
    counts = statuses(account)
    num_norms = 53 if trunk == "R_50" else 104
    assert counts["new"] == 2 * num_norms  # means and variances
    same_network = detectron_names.detectron2(kind, trunk, neck)
    assert counts["loaded"] == len(same_network) - 2 * num_norms
    notes = {row.note for row in account.rows if row.status == "ignored"}
    assert notes >= {"state of the optimiser", "scores of ImageNet's classes"}
    assert ("Detectron has no bias there" in notes) == (not own)
    assert not any("permuted" in row.note for row in account.rows if "rpn_cls" in row.source
                   and row.source.endswith("_b"))  # fmt: skip


AFFINE, OWN, CAFFE2 = (
    ("s", "b"),
    ("gamma", "beta", "running_mean", "running_var"),
    ("s", "b", "rm", "riv"),
)


TRUNKS = {
    "Detectron's R-50": ("R_50", AFFINE, "Detectron's ResNet for ImageNet", "fast_rcnn"),
    "R-50": ("R_50", OWN, "detectron2's ResNet for ImageNet", "detectron2"),
    "X-101": ("X_101_32x8d", OWN, "detectron2's ResNeXt for ImageNet", "torchvision"),
    "Caffe2's X-101": ("X_101_32x8d", CAFFE2, "detectron2's ResNeXt for ImageNet", "torchvision"),
}


@pytest.mark.parametrize("case", members(TRUNKS, ("Detectron's R-50", "R-50")))
@pytest.mark.parametrize("neck", members(["", "FPN", "C4"], ("", "FPN")))
def test_trunks_of_imagenet(case, neck):
    """detectron2's files and Detectron's, in a classifier and two detectors."""
    trunk, norm, name, normalisation = TRUNKS[case]
    tensors = blank(detectron_names.imagenet(trunk, norm, biases=trunk == "R_50"))
    model: Any = {"R_50": resnet.resnet50, "X_101_32x8d": resnet.resnext101_32x8d}[trunk]
    template = rules.template_of(model(num_classes=1000))
    if neck:
        template = template_of("mask", trunk, neck)
    release = rules.choose(catalogue.releases(), template, tensors)
    assert (release.name, release.normalisation) == (name, normalisation)
    required = release.trunk if neck else ("*",)
    account = rules.match(
        template, tensors, release.rules, required=required, absent=release.absent
    )
    counts = statuses(account)
    convs = sum(len(x.shape) == 4 for x in tensors.values())
    assert counts["loaded"] == convs * (1 + len(norm)) + (0 if neck else 2)
    if norm is AFFINE:
        assert sum(r.status == "new" and r.target.startswith("batch_stats/backbone" if neck else
                   "batch_stats") for r in account.rows) >= 2 * 40  # fmt: skip
    if neck == "C4":
        targets = {row.target for row in account.rows if row.status == "loaded"}
        assert "params/box_head/layer4_2/conv3/kernel" in targets
    normalised = rules.choose(catalogue.releases(), None, tensors)
    assert normalised.normalisation == normalisation


TIMM = ("conv1.weight", "bn1.weight", "layer1.0.downsample.0.weight", "layer4.2.bn3.running_var")


@pytest.mark.parametrize(
    ("source", "prefix"), [("torchvision", ""), ("detectron2", "stem."), ("msra", "res")]
)
@pytest.mark.parametrize("neck", members(["fpn", "c4"], ("c4",)))
def test_other_trunks_start_detectors(source, prefix, neck, tmp_path, capsys):
    """torchvision's names, which timm's are too, also in detectron2's form; MSRA's in Caffe."""
    model = FasterRCNN(3, neck=neck, width=1 / 16)
    classifier = resnet.resnet50(num_classes=5, width=1 / 16)
    variables = contract.random_variables(classifier, (1, 32, 32, 3))
    name = {
        "torchvision": "torchvision's ResNet",
        "detectron2": "detectron2's form of torchvision's ResNet",
        "msra": "MSRA's ResNet-50",
    }[source]
    (release,) = (
        one
        for one in catalogue.releases()
        if one.name == name and "params/layer?_*" in one.trunk and "*/backbone/*" not in one.trunk
    )
    tensors: Any = rules.unload(variables, release.rules)
    if source == "torchvision":
        assert set(TIMM) < set(tensors)
    assert any(key.startswith(prefix) for key in tensors)
    np.savez(tmp_path / "trunk.npz", **tensors)
    loaded, normalisation = start.initial(
        f"file:{tmp_path / 'trunk.npz'}", rules.template_of(model)
    )
    assert normalisation == ("caffe" if source == "msra" else "torchvision")
    assert name in capsys.readouterr().out
    for kind, tree in variables.items():
        last = {k: x for k, x in tree.items() if k.startswith("layer4_")} if neck == "c4" else {}
        trunk = {k: x for k, x in tree.items() if k != "fc" and k not in last}
        expected = {"backbone": trunk} | ({"box_head": last} if last else {})
        chex.assert_trees_all_equal(loaded[kind], expected)


# Moved rows, against NumPy.

THIN: Any = dict(num_classes=4, backbone="resnet14", width=1 / 32)  # three classes of objects


def fake(neck, **options) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """A thin network, its variables, and the file of detectron2 that they come from."""
    model = MaskRCNN(neck=neck, **(THIN | options))
    template = rules.template_of(model)
    release = RELEASES[f"detectron2's R-CNN on ResNet-{neck.upper()}"]
    leaves: Any = traverse_util.flatten_dict(template)
    zeros = {path: np.zeros(leaf.shape, np.float32) for path, leaf in leaves.items()}
    blanks = rules.unload(traverse_util.unflatten_dict(zeros), release.rules)
    tensors = {}
    for i, (name, values) in enumerate(blanks.items()):
        wave = np.sin(np.arange(values.size) * (1 + 1 / (i + 2)) + i).astype(np.float32)
        tensors[name] = wave.reshape(values.shape) / np.float32(max(1, values[0].size) ** 0.5)
    tensors = {k: abs(x) + 1 if k.endswith("running_var") else x for k, x in tensors.items()}
    variables, account = rules.load(template, tensors, release.rules)
    assert statuses(account) == {"loaded": len(tensors)}
    back = rules.unload(variables, release.rules)
    assert back.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(back[name], values)
    return model, variables, tensors


def relu(x):
    return np.maximum(x, 0)


def theirs(tensors, layer):
    return tensors[f"roi_heads.{layer}.weight"], tensors[f"roi_heads.{layer}.bias"]


def predicted(tensors, features):
    """detectron2's class probabilities [R, K] and deltas [R, K, 4] of its K classes."""
    weight, bias = theirs(tensors, "box_predictor.cls_score")
    scores = np.exp(features @ weight.T + bias)
    probabilities = scores / scores.sum(1, keepdims=True)
    weight, bias = theirs(tensors, "box_predictor.bbox_pred")
    deltas = (features @ weight.T + bias).reshape(len(features), -1, 4)
    return probabilities[:, :-1], probabilities[:, -1], deltas  # background is the last


def drawn(tensors, x):
    """detectron2's masks [R, K, 2 P, 2 P] of a map [R, C, P, P]."""
    weight, bias = theirs(tensors, "mask_head.deconv")
    size = x.shape[-1]
    up = np.zeros((len(x), weight.shape[1], 2 * size, 2 * size))
    for a in range(2):
        for b in range(2):
            up[:, :, a::2, b::2] = np.einsum("rchw,co->rohw", x, weight[:, :, a, b])
    weight, bias_of_masks = theirs(tensors, "mask_head.predictor")
    masks = np.einsum("rchw,kc->rkhw", relu(up + bias[:, None, None]), weight[:, :, 0, 0])
    return masks + bias_of_masks[:, None, None]


def conv3(x, weight, bias):
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.einsum("rchwij,ocij->rohw", patches, weight) + bias[:, None, None]


def agrees(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_heads_on_a_pyramid_are_detectron2s():
    model, variables, tensors = fake("fpn")
    rng = np.random.default_rng(0)
    boxes, masks = (rng.standard_normal((2, side, side, 8)).astype(np.float32) for side in (7, 14))

    def heads(net: Any, boxes: jax.Array, masks: jax.Array) -> Any:
        logits, deltas = net.box_predictor(net.box_head(boxes, train=False))
        return nn.softmax(logits), deltas, net.mask_predictor(net.mask_convs(masks, train=False))

    probabilities, deltas, drawings = nn.apply(heads, model)(variables, boxes, masks)
    features = boxes.transpose(0, 3, 1, 2).reshape(2, -1)
    for i in (1, 2):
        weight, bias = theirs(tensors, f"box_head.fc{i}")
        features = relu(features @ weight.T + bias)
    objects, background, expected = predicted(tensors, features)
    agrees(probabilities[:, 1:], objects)
    agrees(probabilities[:, 0], background)
    agrees(deltas[:, 1:], expected)
    x = masks.transpose(0, 3, 1, 2)
    for i in range(1, 5):
        x = relu(conv3(x, *theirs(tensors, f"mask_head.mask_fcn{i}")))
    agrees(drawings.transpose(0, 3, 1, 2)[:, 1:], drawn(tensors, x))
    # Nothing reads what is here in addition.
    assert not np.any(deltas[:, 0])
    assert not np.any(drawings[..., 0])


@pytest.mark.slow
def test_heads_and_anchors_of_c4_are_detectron2s():
    """detectron2 has all ratios of a size side by side, here are all sizes of a ratio."""
    sizes = (32.0, 64.0, 128.0, 256.0, 512.0)
    model, variables, tensors = fake("c4", anchor_sizes=sizes)
    features = np.random.default_rng(0).standard_normal((1, 2, 3, 32)).astype(np.float32)

    def parts(net: Any, maps: jax.Array) -> Any:
        logits, deltas = net.propose((maps,))
        maps = jnp.abs(jnp.tile(maps, (1, 1, 1, 2)))  # as those of layer4
        scores, boxes = net.box_predictor(maps)
        return logits[0], deltas[0], nn.softmax(scores), boxes, net.mask_predictor(maps)

    logits, deltas, scores, boxes, masks = nn.apply(parts, model)(variables, features)
    rpn = "proposal_generator.rpn_head"
    x = features.transpose(0, 3, 1, 2)
    x = relu(conv3(x, tensors[f"{rpn}.conv.weight"], tensors[f"{rpn}.conv.bias"]))
    outputs = [
        np.einsum("rchw,ac->rhwa", x, tensors[f"{rpn}.{name}.weight"][:, :, 0, 0])
        + tensors[f"{rpn}.{name}.bias"]
        for name in ("objectness_logits", "anchor_deltas")
    ]
    expected = {
        (size, ratio, y, x): (outputs[0][0, y, x, a], outputs[1][0, y, x, 4 * a : 4 * a + 4])
        for y in range(2)
        for x in range(3)
        for a, (size, ratio) in enumerate((s, r) for s in sizes for r in (0.5, 1.0, 2.0))
    }
    (ours,) = anchors.pyramid([(2, 3)], [16], sizes=[sizes], convention="detectron2")
    seen = set()
    for anchor, logit, moved in zip(ours, logits[0], deltas[0], strict=True):
        width, height = anchor[2:] - anchor[:2]
        x, y = np.rint((anchor[:2] + anchor[2:]) / 32).astype(int)
        key = (2.0 ** round(np.log2(width * height) / 2), 2.0 ** round(np.log2(height / width)))
        seen.add((*key, y, x))
        agrees(logit, expected[*key, y, x][0])
        agrees(moved, expected[*key, y, x][1])
    assert seen == set(expected)
    pooled = np.abs(np.tile(features, (1, 1, 1, 2)))
    objects, background, theirs_boxes = predicted(tensors, pooled.mean((1, 2)))
    agrees(scores[:, 1:], objects)
    agrees(scores[:, 0], background)
    agrees(boxes[:, 1:], theirs_boxes)
    # A map of 2 x 3 cells; both sides are the same kind of axis.
    square = pooled.transpose(0, 3, 1, 2)[..., :2]
    agrees(masks.transpose(0, 3, 1, 2)[:, 1:, :, :4], drawn(tensors, square))


@pytest.mark.parametrize("name", ["detectron2", "torchvision"])
def test_pixels_are_those_of_detectron2(name):
    """BGR - (103.53, 116.28, 123.675), divided by (57.375, 57.12, 58.395) for ResNeXts."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (7, 7, 3), np.uint8)
    theirs = rng.standard_normal((4, 3, 7, 7)).astype(np.float32)
    std = (57.375, 57.12, 58.395) if name == "torchvision" else (1, 1, 1)
    bgr = (image[..., ::-1] - np.array([103.53, 116.28, 123.675])) / std
    ours = layouts.load(theirs, "conv+bgr", (7, 7, 3, 4))
    agrees(
        np.einsum("hwi,hwio->o", normalise(image, name), ours),
        np.einsum("hwi,oihw->o", bgr, theirs),
    )
    detectrons = np.array(NORMALISATIONS["fast_rcnn"][0][::-1])
    np.testing.assert_array_equal(detectrons, (102.9801, 115.9465, 122.7717))


def test_affine_layers_are_exact_without_an_epsilon():
    """y = s x + b: mean 0 and variance 1 are initial values, which Detectron's files leave."""
    rng = np.random.default_rng(0)
    x, scale, bias = (rng.standard_normal(n).astype(np.float32) for n in ((2, 3, 4), 4, 4))
    norm = BatchNorm(use_running_average=True, frozen=True, epsilon=0)
    variables = norm.init(jax.random.key(0), x)
    variables["params"] = {"scale": scale, "bias": bias}
    ours: Any = norm.apply(variables, x)
    np.testing.assert_allclose(ours, scale * x + bias, rtol=0, atol=1e-6)
    for release in catalogue.releases():
        is_affine = release.name.startswith("Detectron's")
        assert is_affine == (release.absent == ("batch_stats/*/mean", "batch_stats/*/var"))
        assert is_affine == ("--bn-epsilon=0" in release.needs)


# Where blocks have their stride.


def test_strides_of_the_trunk_and_of_its_last_stage_are_in_one_place():
    maps = np.random.default_rng(0).standard_normal((1, 14, 14, 8)).astype(np.float32)
    odd = maps.copy()
    odd[:, 1::2] += 1
    odd[:, :, 1::2] += 1
    norm = functools.partial(nn.BatchNorm, dtype=None)

    def build(stride_in):
        def plain(scale_init=None, use_running_average=True, name=None):
            del scale_init
            return norm(use_running_average=use_running_average, name=name)

        return Res5(plain, depth=1, inner=4, features=16, stride_in=stride_in)

    variables = build("1x1").init(jax.random.key(0), maps, train=False)
    for stride_in, is_blind in (("1x1", True), ("3x3", False)):
        block = build(stride_in)
        even, other = (np.asarray(block.apply(variables, x, train=False)) for x in (maps, odd))
        assert np.array_equal(even, other) == is_blind  # the 1x1 convolution never sees odd cells
    for neck in ("fpn", "dc5", "c4"):
        model = FasterRCNN(**THIN, neck=neck, stride_in="1x1")
        assert model.bind({}).trunk.stride_in == "1x1"
    dilated = FasterRCNN(**THIN, neck="dc5", stride_in="1x1").bind({}).trunk
    assert dilated._geometry()[3] == (1, 2, 2)  # all blocks, as RES5_DILATION in detectron2
    with pytest.raises(UserError, match="vgg16 has no residual blocks"):
        FasterRCNN(3, "vgg16", "c5", stride_in="1x1").check()


# Files.


def waves(shapes):
    """Float32 arrays of distinct values, from a formula."""
    return {
        name: np.cos(np.arange(np.prod(shape), dtype=np.float32) / 7 + i).reshape(shape)
        if not name.endswith(("running_var", "riv"))
        else np.full(shape, 1 - 1e-5, np.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_arrays_is_mapped(tmp_path, protocol):
    arrays = waves({"a.weight": (70, 300), "b": (3,), "c": ()})
    arrays["turned"] = np.asfortranarray(arrays["a.weight"])
    content = {"model": arrays, "__author__": "somebody", "iteration": 7}
    path = tmp_path / "weights.bin"
    path.write_bytes(pickle.dumps(content, protocol))
    file = files.read(path)
    assert file.format == "pickle"
    assert file.info == {"__author__": "somebody", "iteration": "7", "container": "model"}
    assert file.tensors.keys() == arrays.keys()
    for name, values in arrays.items():
        same(file.tensors[name], values)
    is_mapped = not file.tensors["a.weight"].flags.owndata
    assert is_mapped


def test_a_pickle_of_python_2(tmp_path):
    arrays = waves({"conv1_w": (64, 300), "_[mask]_fcn1_w": (2, 3), "conv1_w_momentum": (2,)})
    path = tmp_path / "model_final.pkl"
    path.write_bytes(detectron_names.python2({"blobs": arrays}, cfg="MODEL: {}\n" * 20_000))
    assert pickle.loads(path.read_bytes(), encoding="latin1")["blobs"].keys() == arrays.keys()
    file = files.read(path)
    assert (file.format, file.info["container"]) == ("pickle", "blobs")
    for name, values in arrays.items():
        same(file.tensors[name], values)


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_runs_nothing(tmp_path, protocol):
    trace, path = tmp_path / "trace", tmp_path / "x.pkl"
    for call, name in (
        (Calls(exec, f"open({str(trace)!r}, 'w')"), "exec"),
        (Calls(getattr, np.ndarray, "dump"), "getattr"),
        (Calls(np.load, "x.npy"), "load"),
    ):
        content = {"model": {"a": np.ones(2, np.float32), "b": call}, "__author__": "x"}
        path.write_bytes(pickle.dumps(content, protocol))
        said = refused(path)
        assert "refused to load" in said
        assert name in said
    assert not trace.exists()


ARRAY = pickle.dumps(np.arange(30_000, dtype=np.float32), 2)
LENGTH = (120_000).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (ARRAY[:-5000], "damaged"),
        (pickle.dumps({"a": np.array([{}])}, 2), "no numbers"),
        (detectron_names.python2({"blobs": {"a": np.ones(30_000, np.float32)}})[:-9000], "remain"),
        (
            detectron_names.python2({"blobs": {"a": np.ones(30_000, np.float32)}}).replace(
                b"J" + (30_000).to_bytes(4, "little"), b"J" + (30_001).to_bytes(4, "little")
            ),
            "does not match its bytes",
        ),
        (b"\x80\x02}(U\x01a" + b"T" + (2**31 - 1).to_bytes(4, "little") + b"xu.", "damaged"),
        (b"\x80\x02T" + LENGTH + bytes(120_000) + b"K\x01s.", "damaged"),
        (b"\x80\x02}T" + LENGTH + bytes(120_000) + b"K\x01s.", "a key"),
        (b"\x80\x02}.", "no arrays"),
        (pickle.dumps([1, "x" * 100_000]), "no arrays"),
        (b"\x80\x02cnumpy.core.numeric\n_frombuffer\n)R.", "damaged"),
        (b"\x80\x02X" + LENGTH + b"\xff" * 120_000 + b".", "damaged"),
    ],
)
def test_damaged_pickles(tmp_path, content, reason):
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    assert reason in refused(path)


def test_text_of_another_protocol_is_no_weight_file(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"a": 1}, 0))
    assert "detectron2 .pkl" in refused(path)


@pytest.mark.parametrize("neck", members(["fpn", "c4"], ("fpn",)))
def test_a_thin_file_is_imported_and_starts_a_run(tmp_path, monkeypatch, capsys, neck):
    """Through the commands, as a pickle; a run with other classes takes all but the last layers."""
    options = dict(anchor_sizes=(32, 64)) if neck == "c4" else {}
    model, variables, tensors = fake(neck, **options)
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": tensors, "__author__": "Detectron2 Model Zoo"}))
    monkeypatch.setattr(catalogue, "build", lambda *_: model)
    name: Any = f"mask_rcnn_R_50_{neck.upper()}"
    import_weights.run(model=name, source=str(path), out=tmp_path / "out")
    said = capsys.readouterr().out
    assert f"{len(tensors)} loaded" in said
    assert "--normalisation=detectron2" in said
    assert "--recipe=detectron2 --stride-in=1x1" in said
    loaded, normalisation = start.initial(f"run:{tmp_path / 'out'}", None)
    assert normalisation == "detectron2"
    chex.assert_trees_all_equal(loaded, variables)
    other = rules.template_of(model.clone(num_classes=7))
    loaded, normalisation = start.initial(f"file:{path}", other)
    assert normalisation == "detectron2"
    assert set(loaded["params"]) >= {"backbone", "rpn", "mask_predictor"}
    assert "box_predictor" not in loaded["params"]
    assert set(loaded["params"]["mask_predictor"]) == {"conv5_mask"}
    wrong = FasterRCNN(**THIN, neck="dc5")
    with pytest.raises(UserError, match="does not fit the network"):
        start.initial(f"file:{path}", rules.template_of(wrong))


FULL = [(code, *name) for code in ("detectron2", "detectron") for name in NAMES]


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids="_".join)
def test_full_files_are_imported_in_seconds(case, tmp_path, capsys):
    code, kind, trunk, neck = case
    tensors = waves(getattr(detectron_names, code)(kind, trunk, neck))
    path = tmp_path / "model_final.pkl"
    if code == "detectron":
        path.write_bytes(detectron_names.python2({"blobs": tensors}, cfg="MODEL: {}"))
    else:
        path.write_bytes(pickle.dumps({"model": tensors, "__author__": "a test"}, 2 + len(neck)))
    began = time.perf_counter()
    name: Any = f"{kind}_rcnn_{trunk}_{neck}"
    import_weights.run(model=name, source=str(path), out=tmp_path / "out")
    assert time.perf_counter() - began < 60
    assert "unexpected" not in capsys.readouterr().out
    loaded, _ = start.initial(f"run:{tmp_path / 'out'}", None)
    if code == "detectron2":
        release = rules.choose(catalogue.releases(), None, tensors)
        back = rules.unload(loaded, release.rules)
        assert back.keys() == tensors.keys()
        for key, values in tensors.items():
            np.testing.assert_array_equal(back[key], values)


# The way back.


@pytest.mark.parametrize(
    ("names", "neck", "release"),
    [
        ("detectron2", "fpn", "detectron2's R-CNN on ResNet-FPN"),
        ("detectron2", "c4", "detectron2's R-CNN on ResNet-C4"),
        (None, "fpn", "torchvision's Mask R-CNN"),
        (None, "c4", "dense_jax"),
        ("dense_jax", "fpn", "dense_jax"),
    ],
)
def test_runs_are_exported_under_a_codes_names(names, neck, release, tmp_path, capsys):
    flags: Any = {} if neck == "fpn" else dict(neck=neck, anchor_sizes=(16, 32))
    run = make_run(tmp_path / "run", "mask_rcnn", **flags)
    file = tmp_path / "x.safetensors"
    export.run(run=run, to="safetensors", out=file, names=names)
    assert f"names and layouts: {release};" in capsys.readouterr().out
    tensors = files.read(file).tensors
    variables = trained.load(run).variables
    if release == "dense_jax":
        assert "params/rpn/conv1/kernel" in tensors
        return
    chosen = rules.choose(catalogue.releases(), variables, tensors)
    assert chosen.name == release
    again, account = rules.load(variables, tensors, chosen.rules)
    assert account.unexplained == ()
    # Nothing reads deltas and masks of background, which detectron2 does not have.
    for tree in (again, variables) if names == "detectron2" else ():
        flat: Any = traverse_util.flatten_dict(tree, sep="/")
        for path, rows in (("box_predictor/bbox_pred", 4), ("mask_predictor/mask_fcn_logits", 1)):
            for leaf in ("kernel", "bias"):
                values = np.array(flat[f"params/{path}/{leaf}"])
                values[..., :rows] = 0
                flat[f"params/{path}/{leaf}"] = values
        tree.clear()
        tree.update(traverse_util.unflatten_dict(flat, sep="/"))
    chex.assert_trees_all_equal(again, variables)


def test_names_that_do_not_fit_are_said(tmp_path):
    run = make_run(tmp_path / "run", "fcn")
    with pytest.raises(UserError, match="--names=detectron2: detectron2 has no such network"):
        export.run(run=run, to="safetensors", out=tmp_path / "x", names="detectron2")
    with pytest.raises(UserError, match="--names=torchvision is for --to=safetensors"):
        export.run(run=run, to="stablehlo", out=tmp_path / "x", names="torchvision")


def test_every_table_has_a_network():
    names = {f"{kind}_rcnn_{trunk}_{neck}" for kind, trunk, neck in NAMES}
    assert names == set(detectron2.NETWORKS)
    for name in names:
        model: Any = catalogue.build(name)
        assert model.stride_in == ("3x3" if "_X_" in name else "1x1")
        assert (model.num_classes, model.roi_aligned, model.roi_samples) == (81, True, None)
    assert detectron_releases.NETWORKS == {}
