"""Rules, their account, and torchvision's tables at full size."""

import functools
import re
from collections import Counter
from typing import Any

import chex
import jax
import numpy as np
import pytest

from dense_jax.errors import UserError
from dense_jax.models import deeplab, dilated, fcn
from dense_jax.releases import catalogue
from dense_jax.weights import rules
from dense_jax.weights.rules import Rule
from tests.torchvision_names import num_keys, torch_leaves, torch_name, torch_shapes

# Where torchvision's vgg16 and vgg16_bn have their convolutions, counting ReLUs and poolings too.
VGG = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG_BN = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)
CONVS = [f"{s}_{i}" for s, depth in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, depth + 1)]
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
HEADS = {"classifier.0": (4096, 25088), "classifier.3": (4096, 4096), "classifier.6": (1000, 4096)}


def vgg_shapes(numbers, norm):
    """{torchvision's name: shape} of vgg16 or vgg16_bn."""
    shapes, before = {}, 3
    for number, width in zip(numbers, WIDTHS, strict=True):
        shapes |= {f"features.{number}.weight": (width, before, 3, 3)}
        shapes |= {f"features.{number}.bias": (width,)}
        for kind in ("weight", "bias", "running_mean", "running_var") if norm else ():
            shapes[f"features.{number + 1}.{kind}"] = (width,)
        before = width
    for name, shape in HEADS.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def state_dict(shapes):
    """A state dict of these shapes that needs no memory."""
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    counts = [name.replace("running_mean", "num_batches_tracked") for name in tensors]
    return tensors | {k: np.array(1) for k in counts if k.endswith("num_batches_tracked")}


def statuses(account):
    return {row.source or row.target: row.status for row in account.rows}


TORCHVISION = {
    "resnet50": 320,
    "resnet101": 626,
    "resnext101_32x8d": 626,
    "resnext101_64x4d": 626,
    "fcn_resnet50": 334,
    "fcn_resnet101": 640,
    "deeplabv3_resnet50": 370,
    "deeplabv3_resnet101": 676,
}


@functools.cache
def template_of(name) -> Any:
    return rules.template_of(catalogue.build(name, aux=True))


@pytest.mark.parametrize(("name", "number"), TORCHVISION.items(), ids=TORCHVISION)
def test_a_state_dict_of_torchvision_is_explained_and_made_again(name, number):
    template = template_of(name)
    tensors = state_dict(torch_shapes(template))
    assert len(tensors) == number == num_keys(torch_leaves(template))
    release = rules.choose(catalogue.releases(), template, tensors)
    tree, account = rules.load(template, tensors, release.rules)
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, template)
    for row in account.rows:
        counted = row.source.endswith("num_batches_tracked")
        assert row.status == ("ignored" if counted else "loaded")
        if not counted:  # by another rule, that of the tests
            assert torch_name(tuple(row.target.split("/")[1:])) == row.source
            assert (row.note == "permuted") == (len(row.source_shape or ()) > 1)
    back = rules.unload(tree, release.rules)
    assert {k: v.shape for k, v in back.items()} == torch_shapes(template)


# Network, the numbers, and how many tensors or parameters are loaded, new and ignored.
VGGS = {
    "vgg16": (catalogue.build("vgg16"), VGG, {"loaded": 30, "ignored": 2}),
    "fcn8s": (fcn.fcn8s(21), VGG, {"loaded": 30, "new": 6, "ignored": 2}),
    "dilated": (
        dilated.dilated_basic(21, pad="same"),
        VGG,
        {"loaded": 30, "new": 18, "ignored": 2},
    ),
    # Its fc6 and fc7 are of other shapes.
    "deeplab": (deeplab.deeplab_largefov(21), VGG, {"loaded": 26, "new": 6, "ignored": 2}),
    "segnet": (
        catalogue.build("segnet", 12),
        VGG_BN,
        {"loaded": 78, "new": 74, "ignored": 19},
    ),
    "deconvnet": (
        catalogue.build("deconvnet"),
        VGG_BN,
        {"loaded": 82, "new": 94, "ignored": 15},
    ),
}


@pytest.mark.parametrize(("model", "numbers", "counts"), VGGS.values(), ids=VGGS)
def test_vgg_fills_the_networks_that_stand_on_it(model, numbers, counts):
    template = rules.template_of(model)
    tensors = state_dict(vgg_shapes(numbers, norm=numbers is VGG_BN))
    assert len(tensors) == (97 if numbers is VGG_BN else 32)
    release = rules.choose(catalogue.releases(), template, tensors)
    tree, account = rules.load(template, tensors, release.rules, required=release.trunk)
    assert Counter(row.status for row in account.rows) == counts
    targets = {row.source: row.target for row in account.rows}
    for number, name in zip(numbers, CONVS, strict=True):
        assert targets[f"features.{number}.weight"] == f"params/conv{name}/kernel"
        if numbers is VGG_BN:
            norm = f"bn{name}" if "bn1_1" in template["params"] else f"conv{name}_bn"
            assert targets[f"features.{number + 1}.weight"] == f"params/{norm}/scale"
            assert targets[f"features.{number + 1}.running_var"] == f"batch_stats/{norm}/var"
    back = rules.unload(tree, release.rules)
    assert all(values.shape == tensors[name].shape for name, values in back.items())


@pytest.mark.parametrize(
    ("source", "target"),
    [("fcn_resnet50", "deeplabv3_resnet50"), ("deeplabv3_resnet50", "fcn_resnet50")],
)
def test_a_head_of_another_kind_stays_in_the_file(source, target):
    tensors = state_dict(torch_shapes(template_of(source)))
    release = rules.choose(catalogue.releases(), template_of(target), tensors)
    _, account = rules.load(template_of(target), tensors, release.rules, required=release.trunk)
    left = [row.source for row in account.rows if row.status == "ignored"]
    assert all(re.match(r"classifier|.*num_batches_tracked", name) for name in left)
    new = [row.target for row in account.rows if row.status == "new"]
    assert new
    assert all("/classifier_" in name for name in new)
    with pytest.raises(UserError, match="unexpected: classifier"):
        rules.load(template_of(target), tensors, release.rules)


def test_networks_that_end_early_leave_the_rest_in_the_file():
    tensors = state_dict(vgg_shapes(VGG, norm=False))
    for model, last in ((fcn.FCN(21, stride=16, single_skip="pool4"), 4), (fcn.fcn8s(21), 5)):
        template = rules.template_of(model)
        release = rules.choose(catalogue.releases(), template, tensors)
        tree, _ = rules.load(template, tensors, release.rules, required=release.trunk)
        assert max(name for name in tree["params"] if name.startswith("conv"))[4] == str(last)
    for number, missing in ((17, "conv4_1"), (24, "conv5_1")):
        left = {name: x for name, x in tensors.items() if f"features.{number}." not in name}
        with pytest.raises(UserError, match=f"2 missing: params/{missing}"):
            rules.load(template, left, release.rules, required=release.trunk)


def test_vggs_features_alone_are_known_by_a_classifier_of_nan():
    tensors = state_dict(vgg_shapes(VGG, norm=False))
    template = template_of("fcn8s")
    for value, normalisation in ((1, "torchvision"), (np.nan, "torchvision_vgg16_features")):
        tensors["classifier.6.bias"] = np.full(1000, value)
        release = rules.choose(catalogue.releases(), template, tensors)
        assert release.normalisation == normalisation
    tree, account = rules.load(
        template, tensors, release.rules, required=release.trunk, absent=release.absent
    )
    assert "conv5_3" in tree["params"]
    assert {"params/fc6/kernel", "params/fc7/bias"} < {
        row.target for row in account.rows if row.status == "new"
    }


def test_timms_names_of_vggs_classifier():
    tensors = state_dict(vgg_shapes(VGG, norm=False))
    for i, shape in ((0, (4096, 512, 7, 7)), (3, (4096, 4096, 1, 1))):
        for kind in ("weight", "bias"):
            tensor = tensors.pop(f"classifier.{i}.{kind}")
            name = f"pre_logits.fc{1 if i == 0 else 2}.{kind}"
            tensors[name] = np.broadcast_to(np.float32(0), shape if kind == "weight" else 4096)
            assert tensors[name].size == tensor.size
    for kind in ("weight", "bias"):
        tensors[f"head.fc.{kind}"] = tensors.pop(f"classifier.6.{kind}")
    template = rules.template_of(catalogue.build("vgg16"))
    release = rules.choose(catalogue.releases(), template, tensors)
    _, account = rules.load(template, tensors, release.rules)
    assert Counter(row.status for row in account.rows) == {"loaded": 30, "ignored": 2}


TABLE = (
    *rules.conv("conv{i}", "conv{i}"),
    *rules.batch_norm("bn{i}", "bn{i}"),
    *rules.dense("fc", "score"),
)


def small(**changes) -> tuple[Any, dict[str, np.ndarray]]:
    """A template, and tensors that fit but for these changes (None removes one)."""
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    template = {
        "params": {
            "conv1": {"kernel": f32((3, 3, 2, 4))},
            "bn1": {"scale": f32((4,)), "bias": f32((4,))},
            "score": {"kernel": f32((4, 5)), "bias": f32((5,))},
        },
        "batch_stats": {"bn1": {"mean": f32((4,)), "var": f32((4,))}},
    }
    names = {"conv1.weight": (4, 2, 3, 3), "fc.weight": (5, 4), "fc.bias": (5,)}
    names |= {f"bn1.{kind}": (4,) for kind in ("weight", "bias", "running_mean", "running_var")}
    tensors = {name: np.full(shape, 0.5, np.float32) for name, shape in names.items()}
    tensors |= {"bn1.num_batches_tracked": np.array(7)}
    tensors |= {name.replace("_", "."): value for name, value in changes.items()}
    return template, {name: value for name, value in tensors.items() if value is not None}


ZEROS = np.zeros((4, 2, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc_bias": None}, "1 missing: params/score/bias"),
        ({"extra": ZEROS}, "1 unexpected: extra"),
        ({"conv2_weight": ZEROS}, "1 unexpected: conv2.weight (no params/conv2/kernel here)"),
        ({"conv1_weight": ZEROS[:3]}, "1 mismatch: conv1.weight ((3, 2, 3, 3) does not become"),
        ({"conv1_weight": ZEROS[0]}, "1 mismatch: conv1.weight ((2, 3, 3) does not become"),
        ({"conv1_weight": ZEROS.astype(int)}, "1 mismatch: conv1.weight (dtype int64)"),
        ({f"x{i}": ZEROS for i in range(5)}, "5 unexpected: x0, x1, x2 and 2 more"),
    ],
)
def test_what_is_not_explained_is_refused(changes, message):
    template, tensors = small(**changes)
    with pytest.raises(UserError, match=r"net\.pth does not fit") as caught:
        rules.load(template, tensors, TABLE, path="net.pth")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_stands_on_the_trunk_may_differ():
    template, tensors = small(fc_weight=np.ones((9, 4), np.float32), fc_bias=None, extra=ZEROS)
    trunk = ("*/conv?/*", "*/bn?/*")
    tree, account = rules.load(template, tensors, TABLE, required=trunk, ignore=["ex*"])
    assert "score" not in tree["params"]
    assert Counter(row.status for row in account.rows) == {"loaded": 5, "new": 2, "ignored": 2}
    assert statuses(account)["fc.weight"] == statuses(account)["params/score/bias"] == "new"
    with pytest.raises(UserError, match="2 missing"):
        rules.load(*small(conv1_weight=None, bn1_bias=None), TABLE, required=trunk)


def test_narrow_and_wide_numbers_are_cast_and_said():
    template, tensors = small(conv1_weight=ZEROS.astype(np.float16))
    tensors["bn1.bias"] = np.full(4, 0.25, jax.numpy.bfloat16)
    tree, account = rules.load(template, tensors, TABLE)
    assert tree["params"]["conv1"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(tree["params"]["bn1"]["bias"], np.full(4, 0.25, np.float32))
    notes = {row.source: row.note for row in account.rows}
    assert notes["conv1.weight"] == "permuted, cast from float16"
    assert notes["bn1.bias"] == "cast from bfloat16"
    assert account.summary() == "7 loaded (2 permuted, 2 cast), 1 ignored"


def test_loading_copies_nothing_that_only_changes_its_layout():
    template, tensors = small()
    tree, _ = rules.load(template, tensors, TABLE)
    assert np.shares_memory(tree["params"]["conv1"]["kernel"], tensors["conv1.weight"])


@pytest.mark.parametrize("value", [np.nan, [np.inf, -np.inf]])
def test_numbers_that_are_none_are_refused(value):
    template, tensors = small()
    values = tensors["bn1.running_var"] = np.ones(4, np.float32)
    values[1:3] = value
    with pytest.raises(UserError, match=r"x\.npz: bn1\.running_var holds NaN, or numbers beyond"):
        rules.load(template, tensors, TABLE, path="x.npz")


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [("bn1.weight", 1e300, "beyond float32"), ("bn1.running_var", -1, "variance below 0")],
)
def test_numbers_that_no_parameter_can_be_are_refused(name, value, fault):
    template, tensors = small()
    tensors[name] = np.full(4, float(value))
    with pytest.raises(UserError, match=rf"x\.npz: {name} holds .*{fault}"):
        rules.load(template, tensors, TABLE, path="x.npz")


def test_one_tensor_is_one_parameter():
    template, tensors = small()
    twice = (*TABLE, Rule("old_fc.bias", "params/score/bias"))
    with pytest.raises(UserError, match=r"fc.bias and old_fc.bias both become params/score/bias"):
        rules.match(template, {**tensors, "old_fc.bias": tensors["fc.bias"]}, twice)
    with pytest.raises(ValueError, match=r"Two rules match fc\.bias"):
        rules.match(template, tensors, (*TABLE, Rule("fc.bias", "params/bn1/bias")))
    with pytest.raises(ValueError, match=r"Two rules match params/score/bias"):
        rules.unload({"params": {"score": {"bias": np.ones(5)}}}, twice)
    with pytest.raises(UserError, match="no name for params/other"):
        rules.unload({"params": {"other": np.ones(5)}}, TABLE)


def test_names_of_other_files_are_not_used_on_the_way_back():
    template, tensors = small()
    table = (*TABLE, Rule("old_fc.bias", "params/score/bias", role="alias"))
    bias = tensors.pop("fc.bias")
    tree, _ = rules.load(template, {**tensors, "old_fc.bias": bias}, table)
    back = rules.unload(tree, table)
    np.testing.assert_array_equal(back["fc.bias"], bias)
    assert "old_fc.bias" not in back


def test_parts_are_added():
    template, tensors = small()
    table = (*TABLE, Rule("own.bias", "batch_stats/bn1/mean", "ones+minus", role="part"))
    bias = np.arange(4, dtype=np.float32)
    for names in (["own.bias", *tensors], [*tensors, "own.bias"]):
        given = {name: {**tensors, "own.bias": bias.reshape(1, 4)}[name] for name in names}
        tree, account = rules.load(template, given, table)
        np.testing.assert_array_equal(tree["batch_stats"]["bn1"]["mean"], 0.5 - bias)
        notes = {row.source: row.note for row in account.rows}
        assert notes["own.bias"] == "reshaped, negated, added"
        assert "own.bias" not in rules.unload(tree, table)
    del tensors["bn1.running_mean"]
    choices: list[dict] = [{}, {"required": ("*/conv1/*",)}, {"absent": ("batch_stats/*",)}]
    for options in choices:
        with pytest.raises(UserError, match="1 missing: batch_stats/bn1/mean"):
            rules.load(template, {**tensors, "own.bias": bias}, table, **options)


def test_what_a_release_never_has_stays_as_initialised():
    template, tensors = small()
    tensors = {name: values for name, values in tensors.items() if "running" not in name}
    with pytest.raises(UserError, match="2 missing: batch_stats/bn1/mean, batch_stats/bn1/var"):
        rules.load(template, tensors, TABLE)
    tree, account = rules.load(template, tensors, TABLE, absent=("batch_stats/*",))
    assert "batch_stats" not in tree
    assert Counter(row.status for row in account.rows) == {"loaded": 5, "new": 2, "ignored": 1}


def test_the_release_that_knows_a_file_best_is_chosen():
    template = {"params": {"a": np.ones(1)}}
    tables = {
        "other": (Rule("b", "params/a"), Rule("c", "params/a", role="alias")),
        "more": (Rule("a", "params/a"), Rule("b", None), Rule("c", None)),
        "exact": (Rule("a", "params/a"), Rule("b", None)),
        "less": (Rule("a", "params/a"),),
        "same": (Rule("a", "params/a"),),
    }
    releases = [rules.Release(name, table, (), "none") for name, table in tables.items()]

    def chosen(*names, order=1):
        tensors = {name: np.ones(1) for name in names}
        return rules.choose(releases[::order], template, tensors).name

    for order in (1, -1):  # of equals not the first, but the last by name
        assert chosen("a", order=order) == "same"
        assert chosen("a", "b", order=order) == "exact"
        assert chosen("a", "b", "c", order=order) == "more"
    with pytest.raises(UserError, match=r"tensors of unknown names \(d, \.\.\.\)"):
        chosen("d")


def test_a_field_met_twice_is_one_number():
    rule = Rule("conv_{n}.conv_{n}_W", "params/conv{n}/kernel")
    template = {"params": {"conv3": {"kernel": np.zeros(2, np.float32)}}}
    ones = np.ones(2, np.float32)
    assert rules.load(template, {"conv_3.conv_3_W": ones}, [rule])[0]["params"]
    with pytest.raises(UserError, match=r"conv_3\.conv_4_W"):
        rules.load(template, {"conv_3.conv_4_W": ones}, [rule])


def test_the_account_is_an_aligned_table():
    template, tensors = small(extra=ZEROS)
    lines = str(rules.match(template, tensors, TABLE)).splitlines()
    row = "loaded      conv1.weight             4x2x3x3  params/conv1/kernel   3x3x2x4  permuted"
    assert row in lines
    assert lines[-1] == "7 loaded (2 permuted), 1 ignored, 1 unexpected"
    column = lines[0].index("parameter here")
    assert all(line[column - 1 : column].strip() == "" for line in lines[:-1])
