"""Published weights of Faster R-CNN, and of classifiers as its trunk."""

import functools
import re
from collections import Counter
from typing import Any

import chex
import jax
import numpy as np
import pytest
from flax import traverse_util

from dense_jax import start
from dense_jax.commands import import_weights
from dense_jax.errors import UserError
from dense_jax.models import resnet, vgg
from dense_jax.models.rcnn import faster_rcnn
from dense_jax.releases import catalogue
from dense_jax.releases import faster_rcnn as releases
from dense_jax.releases import resnet as resnet_releases
from dense_jax.releases import vgg as vgg_releases
from dense_jax.weights import rules
from tests import contract, members
from tests.parity import zoo

V1, V1_2019, V2 = releases.TORCHVISION
THIN: Any = dict(num_classes=3, width=1 / 16)


def published(name) -> dict[str, np.ndarray]:
    """torchvision's state dict in arrays that need no memory."""
    shapes, _ = zoo.kept(name)
    return {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}


def written(path, variables, release):
    """Writes variables under the names of a release."""
    tensors: Any = rules.unload(variables, release.rules)
    np.savez(path, **tensors)
    return path


def renamed_as_in_2019(tensors):
    """What torchvision's own file for COCO says; its layers had no number of their own yet."""
    pattern = re.compile(r"(fpn\.(?:inner|layer)_blocks\.\d)\.0\.|(rpn\.head\.conv)\.0\.0\.")
    return {pattern.sub(lambda m: f"{m[1] or m[2]}.", key): x for key, x in tensors.items()}


@pytest.mark.parametrize(
    ("name", "release", "num_loaded", "num_norms"),
    [
        ("fasterrcnn_resnet50_fpn", V1, 295, 53),
        ("fasterrcnn_resnet50_fpn", V1_2019, 295, 53),
        ("fasterrcnn_resnet50_fpn_v2", V2, 339, 65),
    ],
)
def test_every_name_of_faster_rcnn_is_explained(name, release, num_loaded, num_norms):
    tensors = published(name)
    assert len(tensors) == num_loaded + num_norms
    if release is V1_2019:
        tensors = renamed_as_in_2019(tensors)
        assert {"backbone.fpn.inner_blocks.3.bias", "rpn.head.conv.weight"} < set(tensors)
    template = rules.template_of(catalogue.build(name))
    assert rules.choose(catalogue.releases(), template, tensors) is release
    account = rules.match(template, tensors, release.rules)
    assert Counter(row.status for row in account.rows) == {
        "loaded": num_loaded,
        "ignored": num_norms,
    }
    ignored = {row.source for row in account.rows if row.status == "ignored"}
    assert all(source.endswith("num_batches_tracked") for source in ignored)
    trained = sum(row.source.endswith((".weight", ".bias")) for row in account.rows)
    assert trained == len(jax.tree.leaves(template["params"]))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), template)
    back = rules.unload(zeros, release.rules)
    assert {key: x.shape for key, x in back.items()} == {
        key: x.shape for key, x in tensors.items() if key not in ignored
    }


def test_files_of_2019_need_another_epsilon():
    assert V1_2019.needs == 'stride_in="3x3" and bn_epsilon=0'
    assert "bn_epsilon=1e-5, or 0" in V1.needs


def test_a_detector_starts_from_a_file_and_says_what_it_needs(tmp_path, monkeypatch, capsys):
    """Written under the names of 2019, for a network with other classes."""
    theirs = faster_rcnn.FasterRCNN(**THIN)
    variables = contract.random_variables(theirs, (1, 32, 32, 3))
    path = written(tmp_path / "coco.npz", variables, V1_2019)
    ours = rules.template_of(theirs.clone(num_classes=7))
    loaded, normalisation = start.initial(f"file:{path}", ours)
    said = capsys.readouterr().out
    assert "torchvision's Faster R-CNN of 2019" in said
    assert 'build the network with stride_in="3x3" and bn_epsilon=0' in said
    assert normalisation == "torchvision"
    params: Any = {k: v for k, v in variables["params"].items() if k != "box_predictor"}
    assert "box_predictor" not in loaded["params"]
    chex.assert_trees_all_equal(loaded, {**variables, "params": params})

    monkeypatch.setattr(catalogue, "build", lambda *_: theirs)
    options: Any = dict(model="fasterrcnn_resnet50_fpn", source=str(path), out=tmp_path / "out")
    import_weights.run(**options)
    assert "295 loaded" in capsys.readouterr().out
    chex.assert_trees_all_equal(start.initial(f"run:{tmp_path / 'out'}", None)[0], variables)


@pytest.mark.slow
def test_a_file_of_v2_does_not_fit_v1(tmp_path):
    v2 = faster_rcnn.fasterrcnn_resnet50_fpn_v2(**THIN)
    variables = contract.random_variables(v2, (1, 32, 32, 3))
    path = written(tmp_path / "v2.npz", variables, V2)
    template = rules.template_of(faster_rcnn.FasterRCNN(**THIN))
    with pytest.raises(
        UserError, match=r"8 missing: params/fpn/inner_blocks_0/bias, .* unexpected: "
    ):
        start.initial(f"file:{path}", template)


TRUNKS: dict[str, Any] = {
    "fpn": (faster_rcnn.FasterRCNN, resnet.resnet50, resnet_releases.TORCHVISION, "torchvision"),
    "c4": (
        functools.partial(faster_rcnn.FasterRCNN, neck="c4", backbone="resnext101_32x8d"),
        *(resnet.resnext101_32x8d, resnet_releases.TORCHVISION, "torchvision"),
    ),
    "torchvision's VGG-16": (
        *(faster_rcnn.faster_rcnn_vgg16, vgg.vgg16, vgg_releases.TORCHVISION, "torchvision"),
    ),
    "Caffe's VGG-16": (faster_rcnn.fast_rcnn_vgg16, vgg.vgg16, vgg_releases.CAFFE, "caffe"),
}


@pytest.mark.parametrize(
    "case",
    members(TRUNKS, TRUNKS.keys() - {"fpn"}),
)
def test_a_detector_starts_from_a_classifier(case, tmp_path):
    build, trunk, release, normalisation = TRUNKS[case]
    is_vgg = trunk is vgg.vgg16
    classifier = trunk(width=1 / 16) if is_vgg else trunk(width=1 / 16, num_classes=5)
    variables = contract.random_variables(classifier, (1, 224, 224, 3))
    path = written(tmp_path / "classifier.npz", variables, release)
    template = rules.template_of(build(**THIN))
    loaded, found = start.initial(f"file:{path}", template)
    assert found == normalisation
    moved = "fc" if is_vgg else "layer4" if case == "c4" else "nothing"
    for kind, tree in variables.items():
        layers = {name: x for name, x in tree.items() if is_vgg or name != "fc"}
        head = {name: x for name, x in layers.items() if name.startswith(moved)}
        if is_vgg:  # fc7 is a dense layer here
            head["fc7"] = {**head["fc7"], "kernel": head["fc7"]["kernel"][0, 0]}
        expected = {"backbone": {name: x for name, x in layers.items() if name not in head}}
        chex.assert_trees_all_equal(loaded[kind], expected | ({"box_head": head} if head else {}))
    names = set(traverse_util.flatten_dict(template["params"], sep="/"))
    assert set(traverse_util.flatten_dict(loaded["params"], sep="/")) < names


def test_zf_starts_from_caffes_classifier(tmp_path):
    """Caffe stores [out, in, height, width] for BGR, and dense layers channels first."""
    model = faster_rcnn.faster_rcnn_vgg16(**THIN, backbone="zf")
    template = rules.template_of(model)
    params, tensors, rng = template["params"], {}, np.random.default_rng(0)
    for place in ("backbone", "box_head"):
        for name, layer in params[place].items():
            kernel = rng.normal(size=layer["kernel"].shape).astype(np.float32)
            # fc7 sees half of fc6 there in testing (dropout with scale_train: false).
            theirs = 2 * kernel.T if name == "fc7" else kernel.transpose(3, 2, 0, 1)
            if name == "conv1":
                theirs = theirs[:, ::-1]
            tensors[f"{name}.0"] = theirs.reshape(len(theirs), -1) if name == "fc6" else theirs
            tensors[f"{name}.1"] = rng.normal(size=layer["bias"].shape).astype(np.float32)
            params[place][name] = {"kernel": kernel, "bias": tensors[f"{name}.1"]}
    tensors["fc8.0"], tensors["fc8.1"] = np.zeros((5, 4), np.float32), np.zeros(5, np.float32)
    np.savez(tmp_path / "zf.npz", **tensors)
    loaded, found = start.initial(f"file:{tmp_path / 'zf.npz'}", template)
    assert found == "fast_rcnn"
    expected = {place: params[place] for place in ("backbone", "box_head")}
    chex.assert_trees_all_equal(loaded["params"], expected)
