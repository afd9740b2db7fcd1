"""Published weights: every name of each release, and what becomes of the numbers in its files."""

import contextlib
import fnmatch
import functools
import pathlib
import re
import sys
from collections import Counter
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from dense_jax import __main__ as commands
from dense_jax import releases, start
from dense_jax.commands import import_weights
from dense_jax.errors import UserError
from dense_jax.layers import init
from dense_jax.layers.conv import conv
from dense_jax.models import deconvnet, deeplab, dilated, fcn, resnet, segnet
from dense_jax.releases import catalogue, mask_rcnn
from dense_jax.releases import resnet as resnet_releases
from dense_jax.train import cli
from dense_jax.weights import files, rules
from tests import contract, members
from tests.caffe_names import (
    DENSE,
    FCN8S,
    ON_MAP,
    RELEASES,
    VGG,
    bilinear,
    final,
    published,
    target,
)
from tests.test_weights_caffe import blob, field, layer, old_layer

BY_NAME = {release.name: release for release in catalogue.releases()}


@functools.cache
def template_of(name) -> Any:
    return rules.template_of(catalogue.build(name))


LARGE = {"deeplab_resnet101", "resnet101", "resnet50"}  # named as smaller ones are

# Layers that know the classes.
HEAD = re.compile(r"params/(score_.*|.*final|fc8.*|fc1?(_c.)?|seg-score|conv_.*er|conv1_1_D)/.*")


@pytest.mark.parametrize("case", members(RELEASES, RELEASES.keys() - LARGE))
def test_every_name_of_a_release_is_explained(case):
    model, name, normalisation, blobs, counts = RELEASES[case]
    template, tensors = template_of(model), published(blobs)
    release = rules.choose(catalogue.releases(), template, tensors)
    assert (release.name, release.normalisation) == (name, normalisation)
    account = rules.match(template, tensors, release.rules, absent=release.absent)
    assert Counter(row.status for row in account.rows) == counts
    for row in account.rows:
        if row.status == "loaded":
            assert row.target == target(row.source, name)
        if row.status == "new":
            assert row.target.startswith("batch_stats/")
    targets = [row.target for row in account.rows if row.status == "loaded"]
    first = next(row for row in account.rows if row.source in ("conv1_1.0", "conv1.0"))
    assert first.note.endswith("channels reversed")
    assert sum("channels reversed" in row.note for row in account.rows) == 1
    names = traverse_util.flatten_dict(template, sep="/")
    patterns = [pattern for pattern in release.trunk if fnmatch.filter(names, pattern)]
    assert patterns
    trunk = [set(fnmatch.filter(targets, pattern)) for pattern in patterns]
    assert all(trunk)
    assert set.union(*trunk).isdisjoint(head for head in targets if HEAD.fullmatch(head))


NAMES = [
    *("vgg16", "fcn32s", "fcn16s", "fcn8s", "fcn8s_at_once", "fcn_alexnet", "segnet"),
    *("segnet_basic", "deconvnet", "dilated_front_end", "dilation7", "dilation8", "dilation8_voc"),
    *("dilation10", "deeplab_largefov", "deeplab_vgg16", "deeplab_resnet101", "resnet50"),
    *("resnet101", "resnext101_32x8d", "resnext101_64x4d", "fcn_resnet50", "fcn_resnet101"),
    *("deeplabv3_resnet50", "deeplabv3_resnet101", "fasterrcnn_resnet50_fpn"),
    *("fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"),
    *(  # detectron2's
        f"{kind}_rcnn_{trunk}_{neck}"
        for kind in ("faster", "mask")
        for trunk in ("R_50", "R_101", "X_101_32x8d", "X_101_64x4d")
        for neck in ("C4", "DC5", "FPN")
    ),
    "keypointrcnn_resnet50_fpn",
]


def test_layers_of_a_head_are_no_trunk():
    name = "params/decoder1/conv1/kernel"  # of LinkNet, say, on torchvision's ResNet
    assert not any(fnmatch.fnmatchcase(name, pattern) for pattern in resnet_releases.TRUNK)


def test_every_name_is_found():
    assert sorted(catalogue.networks()) == sorted(NAMES)
    assert set(BY_NAME) == {
        *(name for _, name, *_ in RELEASES.values()),
        *(f"torchvision's {kind}" for kind in ("vgg16", "vgg16, features alone", "vgg16_bn")),
        *(f"torchvision's {kind}" for kind in ("ResNet", "FCN on ResNet", "DeepLabv3")),
        *(
            f"torchvision's {name}{kind}"
            for name in ("Faster R-CNN", "Mask R-CNN")
            for kind in ("", " of 2019", " v2")
        ),
        *(f"torchvision's Keypoint R-CNN{kind}" for kind in ("", " of 2019")),
        "Caffe's ZF",
        *(
            f"{code}'s R-CNN on {trunk}-{neck}"
            for code in ("Detectron", "detectron2")
            for trunk in ("ResNet", "ResNeXt")
            for neck in ("C4", "DC5", "FPN")
        ),
        *(
            f"{code}'s {trunk} for ImageNet"
            for code in ("Detectron", "detectron2")
            for trunk in ("ResNet", "ResNeXt")
        ),
        "detectron2's form of torchvision's ResNet",
    }
    with pytest.raises(UserError, match=r"unknown network 'vgg'; .* fcn32s, fcn16s, .* vgg16"):
        catalogue.build("vgg")


def test_every_name_builds_a_network():
    assert {model for model, *_ in RELEASES.values()} <= set(catalogue.networks())
    for name in catalogue.networks():
        model: Any = catalogue.build(name, num_classes=7)
        assert getattr(model, "num_classes", 7) == 7
        assert getattr(catalogue.build(name, aux=True), "aux", True)


@pytest.fixture
def family(tmp_path, monkeypatch):
    """Puts a module into the folder of releases."""
    monkeypatch.setattr(releases, "__path__", [*releases.__path__, str(tmp_path)])

    def put(name, networks, tables="()"):
        monkeypatch.delitem(sys.modules, f"dense_jax.releases.{name}", raising=False)
        monkeypatch.setattr(releases, name, None, raising=False)
        (tmp_path / f"{name}.py").write_text(
            "from dense_jax.models import unet\n"
            "from dense_jax.releases.catalogue import Network\n"
            "from dense_jax.weights.rules import Release, Rule\n"
            f"NETWORKS = {{name: Network(unet.unet_same, 2) for name in {networks}}}\n"
            f"RELEASES = {tables}\n"
        )

    return put


def model_flag(monkeypatch, capsys, *flags):
    """Returns what the command line says, on one line and without frames."""
    monkeypatch.setattr(sys, "argv", ["dense_jax", "import-weights", *flags])
    monkeypatch.setattr(cli, "set_up_jax", lambda: None)
    with pytest.raises(SystemExit):
        commands.main()
    said = capsys.readouterr()
    return re.sub(r"[\s│]+", " ", said.out + said.err)


def test_a_file_in_the_folder_adds_its_names(family, tmp_path, monkeypatch, capsys):
    choices = re.escape("{" + ",".join(catalogue.networks()) + "}").replace(",", ", ?")
    assert re.search(f"--model {choices}", model_flag(monkeypatch, capsys, "--help"))
    said = model_flag(monkeypatch, capsys, "--model=own_unet", "--from=x.npz")
    assert "invalid choice 'own_unet' for argument '--model'" in said
    assert all(f"'{name}'" in said for name in NAMES)
    table = 'Release("somebody\'s U-Net", (Rule("a", None),), (), "none")'
    family("own", ["own_unet"], f"({table},)")
    assert catalogue.networks().keys() - set(NAMES) == {"own_unet"}
    assert "own_unet" in model_flag(monkeypatch, capsys, "--help")
    np.savez(tmp_path / "x.npz", a=np.ones(1))
    with pytest.raises(UserError, match="holds somebody's U-Net"):
        import_weights.run(model="own_unet", source=str(tmp_path / "x.npz"), dry_run=True)


def test_two_families_have_no_name_in_common(family):
    family("own", ["own_unet", "fcn8s"])
    with pytest.raises(ValueError, match=r"dense_jax\.releases\.own has fcn8s"):
        catalogue.networks()


def test_the_release_is_known_in_parts():
    """The trunk of FCN-8s starts DeepLab, a front end starts a network with context."""
    for model, blobs, name in (
        ("deeplab_largefov", VGG | ON_MAP | FCN8S, "Caffe's FCN"),
        ("dilation10", VGG | ON_MAP | final("fc-final", 21), "fyu/dilation's dilation8 for VOC"),
        ("segnet", VGG | DENSE, "Caffe's VGG-16"),
        ("deconvnet", VGG | ON_MAP, "Caffe's VGG-16"),
    ):
        release = rules.choose(catalogue.releases(), template_of(model), published(blobs))
        account = rules.match(
            template_of(model), published(blobs), release.rules, required=release.trunk
        )
        assert (release.name, account.unexplained) == (name, ())


@pytest.mark.slow
@pytest.mark.parametrize("case", [*RELEASES, "torchvision's vgg16_bn", "torchvision's ResNet"])
def test_the_order_of_releases_does_not_matter(case):
    """Files of several networks at once too, of which each has a table of its own."""
    known = catalogue.releases()
    if case in RELEASES:
        models, tensors = [None, RELEASES[case][0]], published(RELEASES[case][3])
    else:
        models = [None, "segnet", "deconvnet", "vgg16", "fcn_resnet50", "resnet50"]
        release = next(release for release in known if release.name == case)
        names = (rule.source.format(s=1, b=0, i=1) for rule in release.rules)
        tensors = {name: np.zeros(1) for name in names}
    for model in models:
        template = None if model is None else template_of(model)
        chosen = []
        for order in (1, -1):
            with contextlib.suppress(UserError):  # of another network
                chosen.append(rules.choose(known[::order], template, tensors))
        assert chosen[1:] == chosen[:1]


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
# A thin network and the release that its weights are written and read as.
ROUNDS: dict[str, tuple[Any, str, str, str]] = {
    "fcn8s": (fcn.fcn8s(5, pad_mode="same", **THIN), "Caffe's FCN", "layers", "-"),
    "fcn32s": (fcn.fcn32s(5, upsample="learned_all", **THIN), "Caffe's FCN", "layer", "-"),
    "fcn16s": (fcn.fcn16s(5, upsample="learned_inner", **THIN), "Caffe's FCN", "layer", "-"),
    "alexnet": (fcn.fcn_alexnet(5, **THIN), "Caffe's CaffeNet", "layer", "-"),
    "segnet": (segnet.SegNet(5, **THIN), "Caffe's SegNet", "layer", "-"),
    "segnet_basic": (segnet.SegNetBasic(5, **THIN), "Caffe's SegNet-Basic", "layers", "-"),
    "deconvnet": (
        deconvnet.DeconvNet(5, input_size=64, fc_width=64, **THIN),
        *("Caffe's DeconvNet", "layers", "-"),
    ),
    "dilation_voc": (
        dilated.dilated_large(3, pad="same", **THIN),
        *("fyu/dilation's dilation8 for VOC", "layer", "-"),
    ),
    "dilation10": (
        dilated.dilation10(3, pad="same", **THIN),
        *("fyu/dilation's dilation10 for Cityscapes", "layer", "-"),
    ),
    "deeplab": (deeplab.deeplab_vgg_aspp_l(5, **THIN), "Caffe's DeepLab on VGG-16", "layer", "-"),
    "resnet50": (
        resnet.resnet50(num_classes=5, width=1 / 64), "MSRA's ResNet-50", "layer", "bn"
    ),
    "resnet101": (
        resnet.resnet101(num_classes=5, width=1 / 64), "MSRA's ResNet-101", "layer", "bn"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", members(ROUNDS, ROUNDS.keys() - LARGE))
def test_what_is_written_is_read_back(case, tmp_path):
    model, name, form, norms = ROUNDS[case]
    release = BY_NAME[name]
    variables = contract.random_variables(model, (1, 32, 32, 3))
    if release.absent:
        variables = {"params": variables["params"]}
    tensors = rules.unload(variables, release.rules)
    if case == "resnet50":
        tensors["conv1.1"] = np.full(len(tensors["conv1.0"]), 0.5, np.float32)
        norm = variables["batch_stats"]["bn1"]
        norm["mean"] = norm["mean"] - tensors["conv1.1"]
    file = files.read(written(tensors, tmp_path / "x.caffemodel", form, norms))
    template = rules.template_of(model)
    found = rules.choose(catalogue.releases(), template, file.tensors)
    assert found.name == release.name
    tree, account = rules.load(template, file.tensors, found.rules, absent=found.absent)
    assert not account.unexplained
    chex.assert_trees_all_equal(tree, variables)
    assert form == "layer" or any("reshaped" in row.note for row in account.rows)


@pytest.fixture
def fcn8s_file(tmp_path, monkeypatch) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """A file of a thin FCN-8s as it is published, and its tensors."""
    model = ROUNDS["fcn8s"][0]
    monkeypatch.setattr(catalogue, "build", lambda *_: model)
    variables = contract.random_variables(model, (1, 32, 32, 3))
    tensors: Any = rules.unload(variables, BY_NAME["Caffe's FCN"].rules)
    for name, k in (("upscore2", 4), ("upscore_pool4", 4), ("upscore8", 16)):
        tensors[f"{name}.0"] = bilinear((5, 5, k, k))
    return written(tensors, tmp_path / "fcn8s.caffemodel"), tensors


def test_fcn8s_sees_in_rgb_what_caffe_saw_in_bgr(fcn8s_file, tmp_path, capsys):
    path, tensors = fcn8s_file
    import_weights.run(model="fcn8s", source=str(path), out=tmp_path / "out")
    said = capsys.readouterr().out
    assert "36 loaded (18 permuted, 1 channels reversed), 3 ignored" in said
    assert "Caffe's FCN; it expects images with --normalisation=caffe" in said
    assert "build the network with --pad-mode=100" in said
    model = ROUNDS["fcn8s"][0]
    loaded, _ = start.initial(f"run:{tmp_path / 'out'}", None)
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
    with pytest.raises(UserError, match=r"1 mismatch: upscore8.0 \(its values differ"):
        import_weights.run(**options, dry_run=True)
    assert not (tmp_path / "out").exists()
    import_weights.run(**options, ignore=("upscore8.*",))
    learned = rules.template_of(ROUNDS["fcn8s"][0].clone(upsample="learned_all"))
    tree, _ = start.initial(f"file:{path}", learned)
    kernel = tree["params"]["upscore8"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :, 0, 3], tensors["upscore8.0"][3, 3])


def test_a_network_without_statistics_says_so(tmp_path, monkeypatch, capsys):
    model, name, form, _ = ROUNDS["segnet_basic"]
    monkeypatch.setattr(catalogue, "build", lambda *_: model)
    variables = contract.random_variables(model, (1, 32, 32, 3))
    tensors = rules.unload({"params": variables["params"]}, BY_NAME[name].rules)
    path = written(tensors, tmp_path / "x.caffemodel", form)
    import_weights.run(model="segnet_basic", source=str(path), out=tmp_path / "out")
    said = capsys.readouterr().out
    assert "build the network with --input-lrn=on" in said
    assert "16 new" in said
    loaded, normalisation = start.initial(f"run:{tmp_path / 'out'}", None)
    assert (list(loaded), normalisation) == (["params"], "none")
    assert (
        "init: to reproduce the published outputs, build the network with --input-lrn=on"
        in capsys.readouterr().out
    )


def test_caffes_deconvolution_of_stride_1_is_a_convolution_here():
    rng = np.random.default_rng(0)
    theirs = rng.standard_normal((4, 2, 3, 3)).astype(np.float32)  # [i, o, h, w]
    x = rng.standard_normal((5, 6, 4)).astype(np.float32)
    want = np.zeros((7, 8, 2))
    for h, w in np.ndindex(5, 6):  # each input places a copy of the kernel
        want[h : h + 3, w : w + 3] += np.einsum("i,iohw->hwo", x[h, w], theirs)
    template = {"params": {"deconv4_3": {"kernel": np.zeros((3, 3, 4, 2), np.float32)}}}
    table = [rule for rule in BY_NAME["Caffe's DeconvNet"].rules if rule.source == "deconv4_3.0"]
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
    ("rpn/conv1", "rpn.head.conv.0.0", "rpn.head.conv", (3, 3, 256, 256), (256, 256, 3, 3)),
    ("rpn/cls_logits", *["rpn.head.cls_logits"] * 2, (1, 1, 256, 3), (3, 256, 1, 1)),
    ("rpn/bbox_pred", *["rpn.head.bbox_pred"] * 2, (1, 1, 256, 12), (12, 256, 1, 1)),
    ("box_head/fc6", *["roi_heads.box_head.fc6"] * 2, (7, 7, 256, 1024), (1024, 12544)),
    ("box_head/fc7", *["roi_heads.box_head.fc7"] * 2, (1024, 1024), (1024, 1024)),
    ("box_predictor/cls_score", *["roi_heads.box_predictor.cls_score"] * 2,
     (1024, 91), (91, 1024)),
    ("box_predictor/bbox_pred", *["roi_heads.box_predictor.bbox_pred"] * 2,
     (1024, 364), (364, 1024)),
    *(
        (f"mask_head/mask_fcn{i + 1}", f"roi_heads.mask_head.{i}.0",
         f"roi_heads.mask_head.mask_fcn{i + 1}", (3, 3, 256, 256), (256, 256, 3, 3))
        for i in range(4)
    ),
    ("mask_predictor/conv5_mask", *["roi_heads.mask_predictor.conv5_mask"] * 2, (2, 2, 256, 256),
     (256, 256, 2, 2)),
    ("mask_predictor/mask_fcn_logits", *["roi_heads.mask_predictor.mask_fcn_logits"] * 2,
     (1, 1, 256, 91), (91, 256, 1, 1)),
]  # fmt: skip


def zeros(template):
    """Arrays of these shapes that need no memory."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), template)


@pytest.mark.parametrize("form", [0, 1])
def test_every_name_of_mask_rcnn_is_explained(form):
    leaves: dict[str, Any] = {}
    tensors: dict[str, np.ndarray] = {}
    backbone = rules.template_of(resnet.resnet50())
    for path, leaf in traverse_util.flatten_dict(backbone, sep="/").items():
        kind, name = path.split("/", 1)
        leaves[f"{kind}/backbone/{name}"] = leaf
    body = rules.unload(zeros(backbone), resnet_releases.TORCHVISION.rules)
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
    back = rules.unload(zeros(template), release.rules)
    assert {k: v.shape for k, v in back.items()} == {
        k: v.shape for k, v in tensors.items() if v.ndim
    }
