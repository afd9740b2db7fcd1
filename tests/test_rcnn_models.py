"""Counts, shapes, orders and gradients of Faster R-CNN; tests/parity has values of torchvision."""

import functools
import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dense_jax.errors import UserError
from dense_jax.layers.norm import BatchNorm
from dense_jax.models import resnet
from dense_jax.models.rcnn import faster_rcnn
from dense_jax.models.rcnn.faster_rcnn import FasterRCNN
from dense_jax.models.rcnn.fpn import FeaturePyramid
from dense_jax.models.rcnn.heads import BoxPredictor, Res5, TwoDense
from dense_jax.models.rcnn.rpn import ProposalHead
from tests import contract, members

vgg16, fast_vgg16 = faster_rcnn.faster_rcnn_vgg16, faster_rcnn.fast_rcnn_vgg16
v2 = faster_rcnn.fasterrcnn_resnet50_fpn_v2
zf = functools.partial(vgg16, backbone="zf")
coco_vgg16 = functools.partial(vgg16, anchor_sizes=(64, 128, 256, 512))

# What detectron2's networks have besides ours: a mask head, and no deltas of background.
PYRAMID_MASKS = 4 * (9 * 256 * 256 + 256) + 4 * 256 * 256 + 256 + 80 * 257 - 4 * 1025
C4_MASKS = 4 * 2048 * 256 + 256 + 80 * 257 - 4 * 2049
# Parameters without frozen normalisations. Values of torchvision are in its weights' metadata,
# those of detectron2 are counts of its Mask R-CNN.
COUNTS = {
    "torchvision v1": (FasterRCNN(91), 41_755_286),
    "torchvision v2": (v2(91), 43_712_278),
    "VGG-16 for VOC": (vgg16(21), 137_078_239),
    "VGG-16 for COCO": (coco_vgg16(81), 138_316_573),
    "Fast R-CNN on VGG-16": (fast_vgg16(21), 134_690_729),
    "ZF for VOC": (zf(21), 59_294_751),
    "R50-FPN": (FasterRCNN(81), 44_343_216 - PYRAMID_MASKS),
    "R101-FPN": (FasterRCNN(81, "resnet101"), 63_283_120 - PYRAMID_MASKS),
    "X101-32x8d-FPN": (FasterRCNN(81, "resnext101_32x8d"), 107_427_760 - PYRAMID_MASKS),
    "R50-C4": (FasterRCNN(81, neck="c4"), 35_909_612 - C4_MASKS),
    "R101-C4": (FasterRCNN(81, "resnet101", "c4"), 54_849_516 - C4_MASKS),
}
PARTS = {
    "torchvision v1": {
        "fpn": 3_344_384,
        "rpn": 593_935,
        "box_head": 13_895_680,
        "box_predictor": 466_375,
    },
    "VGG-16 for VOC": {"backbone": 14_714_688, "rpn": 2_387_510, "box_head": 119_545_856},
    "ZF for VOC": {"backbone": 3_726_464, "rpn": 603_958, "box_head": 54_534_144},
}
NORM = re.compile(r"/(bn[123]|downsample_1)/")


def traced(model) -> tuple[dict[str, Any], Any]:
    """Outputs and variables for one image, as shapes."""
    return contract.shapes_of(model, (1, 64, 64, 3))


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name):
    model, expected = COUNTS[name]
    variables = traced(model)[1]
    params = variables["params"]
    for part, count in PARTS.get(name, {}).items():
        assert sum(leaf.size for leaf in jax.tree.leaves(params[part])) == count
    leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    if model.bn == "frozen":
        leaves = {path: leaf for path, leaf in leaves.items() if not NORM.search(path)}
    assert sum(leaf.size for leaf in leaves.values()) == expected
    if name == "VGG-16 for VOC":  # weights of the two last layers, 512 * (4 + 2) * 9
        last = [params["rpn"][layer]["kernel"].size for layer in ("cls_logits", "bbox_pred")]
        assert last == [2 * 9 * 512, 4 * 9 * 512]
    if name == "torchvision v1":  # 44,178,993 parameters of its Mask R-CNN train, from layer2 on
        is_frozen = re.compile("|".join(model.frozen)).search
        trained = sum(leaf.size for path, leaf in leaves.items() if not is_frozen(path))
        assert trained == 44_178_993 - 2_360_320 - 285_787
        frozen = sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"]))
        frozen += sum(leaf.size for leaf in jax.tree.leaves(params)) - expected
        assert frozen == 44_507_633 - 44_401_393  # its Mask R-CNN with and without frozen values


# Shapes.


@pytest.fixture
def short(monkeypatch):
    """Trunks of one block a stage, which compile faster."""
    build = functools.partial(resnet.ResNet, depths=(1, 1, 1, 1))
    monkeypatch.setitem(faster_rcnn._RESNETS, "resnet50", build)


@pytest.mark.slow
def test_sizes_are_rounded_up(short):
    size = (75, 98)
    thin = functools.partial(FasterRCNN, 5, width=1 / 16)
    necks: Any = {
        "fpn": {"p2": (19, 25), "p3": (10, 13), "p4": (5, 7), "p5": (3, 4), "p6": (2, 2)},
        "c4": {"c4": (5, 7)},
        "c5": {"c5": (3, 4)},
        "dc5": {"c5": (5, 7)},
        "vgg": {"c5": (5, 7)},
    }
    for neck, expected in necks.items():
        model = vgg16(5, width=1 / 16) if neck == "vgg" else thin(neck=neck)
        outputs, _ = contract.shapes_of(model, (1, *size, 3))
        maps = {name: x.shape[1:3] for name, x in outputs.items() if name[1:].isdigit()}
        assert maps == expected
        anchors = [len(sizes) * 3 for sizes in model.level_sizes]
        cells = [rows * columns for rows, columns in expected.values()]
        total = sum(n * a for n, a in zip(cells, anchors, strict=True))
        assert outputs["anchor_logits"].shape == (1, total)
        assert outputs["anchor_deltas"].shape == (1, total, 4)
        assert outputs["class_logits"].shape == (1, 1, 5)
        assert outputs["box_deltas"].shape == (1, 1, 5, 4)
        for stride, (rows, columns) in zip(model.strides, expected.values(), strict=True):
            assert (rows, columns) == (-(-75 // stride), -(-98 // stride))


def test_numbers_of_anchors_of_an_image(short):
    outputs, _ = contract.shapes_of(FasterRCNN(2, width=1 / 16), (1, 800, 1344, 3))
    assert outputs["anchor_logits"].shape == (1, 268_569)
    assert [len(sizes) for sizes in FasterRCNN(2).level_sizes] == [1] * 5
    outputs, _ = contract.shapes_of(FasterRCNN(2, neck="c4", width=1 / 16), (1, 800, 1344, 3))
    assert outputs["anchor_logits"].shape == (1, 63_000)
    # Caffe rounds sizes up when it pools: 63 x 38 of 1000 x 600 pixels.
    outputs, _ = contract.shapes_of(vgg16(2, width=1 / 16), (1, 600, 1000, 3))
    assert outputs["c5"].shape[1:3] == (38, 63)
    assert outputs["anchor_logits"].shape == (1, 21_546)
    # Its poolings are padded too: 1000, 500, 251, 126, 64.
    outputs, _ = contract.shapes_of(zf(2, width=1 / 16), (1, 600, 1000, 3))
    assert outputs["c5"].shape[1:3] == (39, 64)
    assert outputs["anchor_logits"].shape == (1, 9 * 39 * 64)


def test_strides():
    assert FasterRCNN(2).strides == (4, 8, 16, 32, 64)
    assert FasterRCNN(2).roi_strides == (4, 8, 16, 32)
    for model, stride in (
        (FasterRCNN(2, neck="c4"), 16),
        (FasterRCNN(2, neck="dc5"), 16),
        (FasterRCNN(2, neck="c5"), 32),
        (vgg16(2), 16),
    ):
        assert model.strides == model.roi_strides == (stride,)


@pytest.mark.parametrize("model", [FasterRCNN(5), v2(5), FasterRCNN(5, neck="c4"), vgg16(5)])
def test_layers_may_be_bfloat16(model, short):
    model = model.clone(dtype=jnp.bfloat16, width=1 / 16)
    outputs, variables = contract.shapes_of(model, (1, 64, 64, 3))
    for name, output in outputs.items():
        is_map = name[1:].isdigit()
        assert output.dtype == (jnp.bfloat16 if is_map else jnp.float32), name
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("stride", "bins"), [(1, 7), (2, 14)])
def test_res5_ends_in_7x7(stride, bins, short):
    seen = []

    def record(call, args, options, context):
        output = call(*args, **options)
        if isinstance(context.module, Res5):
            seen.append((args[0].shape, output.shape))
        return output

    model = FasterRCNN(5, neck="c4", width=1 / 16, res5_stride=stride)
    with nn.intercept_methods(record):
        contract.shapes_of(model, (1, 64, 64, 3))
    assert seen == [((1, bins, bins, 64), (1, 7, 7, 128))]


# Values of the parts.


def test_the_pyramid_adds_from_above_and_halves_its_last_level():
    """Convolutions that pass on their input leave the sums; sizes are halved and rounded up."""
    rng = np.random.default_rng(0)
    sizes = [(9, 11), (5, 6), (3, 3), (2, 2)]
    stages = [rng.standard_normal((2, *size, 4)).astype(np.float32) for size in sizes]
    eye = np.eye(4, dtype=np.float32)
    params = {}
    for i in range(4):
        centre = np.zeros((3, 3, 4, 4), np.float32)
        centre[1, 1] = eye * (i + 1)
        params[f"inner_blocks_{i}"] = {"kernel": eye[None, None], "bias": np.zeros(4, np.float32)}
        params[f"layer_blocks_{i}"] = {"kernel": centre, "bias": np.full(4, i, np.float32)}
    levels = FeaturePyramid(4).apply({"params": params}, stages)
    total: Any = 0
    expected = []
    for i, stage in reversed(list(enumerate(stages))):
        if i < 3:
            rows, columns = (
                np.arange(n) * m // n for n, m in zip(sizes[i], sizes[i + 1], strict=True)
            )
            total = total[:, rows][:, :, columns]
        total = stage + total
        expected.insert(0, (i + 1) * total + i)
    expected.append(expected[-1][:, ::2, ::2])
    assert len(levels) == 5
    for level, values in zip(levels, expected, strict=True):
        np.testing.assert_allclose(level, values, rtol=1e-5, atol=1e-5)
    assert levels[-1].shape == (2, 1, 1, 4)


def test_the_pyramid_of_v2_normalises_in_place_of_biases():
    norm = functools.partial(BatchNorm, momentum=0.9)
    shapes = [jax.ShapeDtypeStruct((1, n, n, 3), jnp.float32) for n in (8, 4, 2, 1)]
    pyramid = FeaturePyramid(4, norm)
    variables = jax.eval_shape(pyramid.init, jax.random.key(0), shapes)
    names = {"/".join(path) for path in traverse_util.flatten_dict(variables["params"])}
    assert names == {
        f"{kind}_{part}"
        for kind in ("inner", "layer")
        for part in (
            *(f"blocks_{i}/kernel" for i in range(4)),
            *(f"norms_{i}/{leaf}" for i in range(4) for leaf in ("scale", "bias")),
        )
    }


@pytest.mark.parametrize("objectness", ["sigmoid", "softmax"])
def test_anchors_are_in_torchvisions_order(objectness):
    """Locations in rows, the anchors of one are neighbours, and so are the four deltas of one."""
    num_anchors, levels = 3, [(2, 4), (1, 2)]
    maps = [np.arange(a * b, dtype=np.float32).reshape(1, a, b, 1) for a, b in levels]
    hidden = np.zeros((3, 3, 1, 1), np.float32)
    hidden[1, 1] = 1
    scores = np.array([0.0, 0.25, 0.5], np.float32)
    if objectness == "softmax":  # three backgrounds, then three objects
        scores = np.array([1, 2, 3, 1, 2.25, 3.5], np.float32)
    weights = np.zeros((1, 1, 1, len(scores)), np.float32)
    weights[..., -num_anchors:] = 1
    params = {
        "conv1": {"kernel": hidden, "bias": np.zeros(1, np.float32)},
        "cls_logits": {"kernel": weights, "bias": scores},
        "bbox_pred": {
            "kernel": np.full((1, 1, 1, 12), 100, np.float32),
            "bias": np.arange(12, dtype=np.float32),
        },
    }
    head: Any = ProposalHead(num_anchors, features=1, objectness=objectness)
    logits, deltas = jax.device_get(head.apply({"params": params}, maps))
    for level, (rows, columns) in enumerate(levels):
        shape = (1, rows * columns * num_anchors)
        assert (logits[level].shape, deltas[level].shape) == (shape, (*shape, 4))
        for location in range(rows * columns):
            for anchor in range(num_anchors):
                i = location * num_anchors + anchor
                assert logits[level][0, i] == location + anchor / 4
                expected = 100 * location + 4 * anchor + np.arange(4)
                np.testing.assert_array_equal(deltas[level][0, i], expected)


def test_predictions_of_a_class_are_neighbours():
    bias = np.arange(12, dtype=np.float32)
    params = {
        "cls_score": {"kernel": np.eye(2, 3, dtype=np.float32), "bias": bias[:3]},
        "bbox_pred": {"kernel": np.zeros((2, 12), np.float32), "bias": bias},
    }
    rois = np.array([[[[1, 2], [3, 4]]] * 2], np.float32)  # mean 2, 3
    for x in (rois, rois.mean((1, 2))):
        logits, deltas = BoxPredictor(3).apply({"params": params}, x)
        np.testing.assert_array_equal(logits, [[2, 4, 2]])
        np.testing.assert_array_equal(deltas, bias.reshape(1, 3, 4))


def test_the_head_of_vgg16_drops_units_in_training():
    head = TwoDense(512, dropout_rate=0.5)
    rois = np.random.default_rng(0).uniform(0, 1, (3, 2, 2, 4)).astype(np.float32)
    variables = head.init(jax.random.key(0), rois, train=False)
    still = head.apply(variables, rois, train=False)
    dropped = head.apply(variables, rois, train=True, rngs={"dropout": jax.random.key(1)})
    assert np.mean(dropped == 0) > np.mean(still == 0) + 0.15


@pytest.mark.slow
def test_initial_scales():
    """Deviations of the kernels; the input of fc6 is a map of 7x7 units."""
    stages = [jax.ShapeDtypeStruct((1, 1, 1, 128), jnp.float32)] * 4
    level = jax.ShapeDtypeStruct((1, 1, 1, 64), jnp.float32)
    rois = jax.ShapeDtypeStruct((1, 7, 7, 64), jnp.float32)
    vector = jax.ShapeDtypeStruct((1, 256), jnp.float32)

    @jax.jit
    def init(key, stages, level, rois, vector):
        return {
            **FeaturePyramid(64).init(key, stages)["params"],
            **ProposalHead(3, 64).init(key, [level])["params"],
            **TwoDense(256).init(key, rois, train=False)["params"],
            **{f"box_{k}": v for k, v in BoxPredictor(91).init(key, vector)["params"].items()},
        }

    expected = {
        "inner_blocks_1": 128**-0.5,
        "layer_blocks_0": (9 * 64) ** -0.5,
        "conv1": 0.01,
        "bbox_pred": 0.01,
        "fc6": (49 * 64) ** -0.5,
        "fc7": 256**-0.5,
        "box_cls_score": 0.01,
        "box_bbox_pred": 0.001,
    }
    inputs = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), (stages, level, rois, vector))
    params = init(jax.random.key(0), *inputs)
    for name, deviation in expected.items():
        assert np.std(params[name]["kernel"]) == pytest.approx(deviation, rel=0.1), name
        assert not np.any(params[name]["bias"]), name


# Whole networks.


THIN = dict(num_classes=3, width=1 / 8)
WHOLE: dict[str, Any] = {
    "fpn": FasterRCNN(**THIN),
    "v2": v2(**THIN, trained_stages=5, roi_samples=1),
    "c4": FasterRCNN(**THIN, neck="c4", remat=True, res5_stride=1, roi_aligned=True),
    "dc5": FasterRCNN(**THIN, neck="dc5", trained_stages=0, roi_op="warp", roi_reduce="max"),
    "vgg16": vgg16(**THIN, dropout_rate=0.0),
    "zf": zf(**THIN, dropout_rate=0.0, trained_stages=3),
}


@pytest.mark.parametrize("name", members(WHOLE, ("fpn",)))
def test_gradients_reach_what_trains_and_nothing_else(name, short):
    model, shape = WHOLE[name], (2, 64, 64, 3)
    rng = np.random.default_rng(0)
    variables = contract.random_variables(model, shape)
    images = rng.uniform(-1, 1, shape).astype(np.float32)
    boxes = np.array(
        [[[3, 5, 40, 33], [8, 0, 64, 64]], [[0, 20, 17, 60], [1, 2, 3, 4]]], np.float32
    )

    def detect(network, images, boxes):
        levels = network.features(images, train=True)
        return levels, network.propose(levels), network.classify(levels, boxes, train=True)

    def loss(params, boxes):
        (_, proposals, detections), state = nn.apply(detect, model, mutable=["batch_stats"])(
            {**variables, "params": params}, images, boxes
        )
        total = sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves((proposals, detections)))
        return total, (detections, state)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (grads, box_grads), ((logits, deltas), state) = grad(variables["params"], boxes)
    assert (logits.shape, deltas.shape) == ((2, 2, 3), (2, 2, 3, 4))
    assert not np.any(box_grads)
    for values in (logits, deltas):  # each box has its own
        assert len(np.unique(np.round(values.reshape(4, -1), 4), axis=0)) == 4
    flat: dict[str, Any] = traverse_util.flatten_dict(grads, sep="/")
    for path, gradient in flat.items():
        assert np.all(np.isfinite(gradient)), path
        is_frozen = any(re.search(pattern, path) for pattern in model.frozen)
        assert np.any(gradient) != is_frozen, path
    for pattern in model.frozen:
        assert any(re.search(pattern, path) for path in flat), pattern
    if model.backbone not in ("vgg16", "zf"):
        same = jax.tree.map(np.array_equal, state["batch_stats"], variables["batch_stats"])
        assert all(jax.tree.leaves(same)) == (model.bn == "frozen")
        assert any(jax.tree.leaves(same)) == (model.bn == "frozen")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v2", "c4"])
def test_a_trunk_that_does_not_learn_passes_no_gradient_and_keeps_its_statistics(name):
    model: Any = WHOLE[name].clone(trunk_learns=False, bn="train")
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    variables = contract.random_variables(model, images.shape)

    def total(params):
        given = {**variables, "params": params}
        levels, state = model.apply(
            given, images, train=True, method="features", mutable=["batch_stats"]
        )
        return sum(jnp.sum(jnp.sin(x)) for x in levels), state["batch_stats"]

    grads, statistics = jax.jit(jax.grad(total, has_aux=True))(variables["params"])
    assert not any(np.any(x) for x in jax.tree.leaves(grads))
    for part, own in statistics.items():
        chex.assert_trees_all_equal(own, variables["batch_stats"][part])
    paths: dict[str, Any] = traverse_util.flatten_dict(variables["params"], sep="/")
    for path in paths:
        is_frozen = any(re.search(pattern, path) for pattern in model.frozen)
        assert is_frozen == path.startswith(("backbone/", "fpn/")), path


@pytest.mark.parametrize(("trained", "frozen"), [(5, 0), (3, 2), (1, 4), (0, 5)])
def test_names_of_what_is_frozen(trained, frozen):
    parts = ["(conv1|bn1)/", "layer1_", "layer2_", "layer3_", "layer4_"]
    patterns = v2(3, trained_stages=trained).frozen
    assert patterns == tuple(f"^backbone/{part}" for part in parts[:frozen])
    patterns = FasterRCNN(3, neck="c4", trained_stages=trained).frozen
    assert len(patterns) == min(frozen, 4) + 1
    assert len(vgg16(3, trained_stages=trained).frozen) == frozen
    assert len(zf(3, trained_stages=trained).frozen) == frozen


def test_fast_rcnn_takes_boxes_that_are_given():
    model: Any = fast_vgg16(3, width=1 / 16)
    outputs, variables = traced(model)
    assert set(outputs) == {"c5", "class_logits", "box_deltas"}
    assert set(variables["params"]) == {"backbone", "box_head", "box_predictor"}
    with pytest.raises(ValueError, match="no anchors"):
        jax.eval_shape(lambda v: model.apply(v, (), method="propose"), variables)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(backbone="vgg16"), "vgg16 has no fpn: give neck=c5"),
        (dict(backbone="zf", neck="c4"), "zf has no c4: give neck=c5"),
        (dict(backbone="vgg16", neck="c5", remat=True), "leave remat and stride_in out"),
        (dict(neck="c4", heads="v2"), "neck=c4 has none: give neck=fpn, or heads=v1"),
        (dict(roi_op="pool"), "roi_op=pool crops from a single map: give roi_op=align"),
        (dict(anchor_sizes=(32, 64)), r"anchor_sizes=\(32, 64\): give 5"),
    ],
)
def test_options_that_do_not_go_together(options, words):
    model: Any = FasterRCNN(3, **options)
    with pytest.raises(UserError, match=words):
        traced(model)
