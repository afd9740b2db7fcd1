"""Networks of others: names and layouts without their files, known outputs with them."""

import contextlib
import csv
import dataclasses
import pathlib
import re
import subprocess
import sys
from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from PIL import Image

from dense_jax.errors import UserError
from dense_jax.metrics import semantic as metrics
from dense_jax.ops.resize import resize_bilinear
from dense_jax.tasks import training
from dense_jax.weights import rules
from examples import (
    finetune_camvid,
    mobilenet_deeplab,
    nuclei_unet,
    pancreatic_unet,
    resnet20_cifar,
    retina_unet,
)
from tests import contract, npz

ROOT = pathlib.Path(__file__).parent.parent
# Module, network, its channels and parameters, and one tensor as the file has it.
NETWORKS = [
    (nuclei_unet, nuclei_unet.NucleiUNet(), 1, 449_489, "upsamplers.1.1.weight", (32, 64, 1, 1)),
    (retina_unet, retina_unet.RetinaUNet(), 1, 471_010, "convolution2d_7.W", (64, 192, 3, 3)),
    (
        pancreatic_unet,
        pancreatic_unet.PancreaticUNet(),
        1,
        481_745,
        "conv2d_transpose_4.kernel",
        (2, 2, 64, 128),
    ),
    (resnet20_cifar, resnet20_cifar.ResNet20(), 3, 269_722, "linear.weight", (10, 64)),
    (
        mobilenet_deeplab,
        mobilenet_deeplab.MobileNetDeepLab(),
        3,
        688_357,
        "MobilenetV2/expanded_conv_13/depthwise/depthwise_weights",
        (1, 3, 3, 288),
    ),
]


def name_of(value):
    return value.__name__ if hasattr(value, "__name__") else ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "network", "channels", "num_params", "name", "shape"), NETWORKS, ids=name_of
)
def test_a_table_says_what_a_whole_file_is(
    module, network, channels, num_params, name, shape, tmp_path
):
    variables = contract.random_variables(network, (1, 32, 32, channels))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == num_params
    tensors = rules.unload(variables, module.RULES)
    assert tensors[name].shape == shape
    path = tmp_path / "weights.npz"
    np.savez(path, allow_pickle=False, **tensors)
    loaded, account = module.load(path)
    chex.assert_trees_all_equal(loaded, variables)
    assert {row.status for row in account.rows} == {"loaded"}
    np.savez(path, allow_pickle=False, **tensors, other=np.ones(3, np.float32))
    with pytest.raises(UserError, match=r"weights\.npz does not fit.*1 unexpected: other"):
        module.load(path)


def real(module, folder: pathlib.Path, file: str, num_tensors: int):
    """The variables of a real file of so many tensors, all explained."""
    variables, account = module.load(folder / file)
    assert len(account.rows) == num_tensors
    assert not account.unexplained
    return variables


def changed(variables, pattern, change):
    """The variables with some kernels changed, which stands for reading them wrongly."""
    leaves = traverse_util.flatten_dict(variables, sep="/")
    names = [name for name in leaves if re.fullmatch(pattern, name)]
    assert names
    return traverse_util.unflatten_dict(
        leaves | {name: change(leaves[name]) for name in names}, sep="/"
    )


def rolled(places=None):
    """The other order of what is concatenated in front of a kernel: half of it, or `places`."""
    return lambda kernel: np.roll(kernel, places or kernel.shape[2] // 2, axis=2)


def difference(ours, theirs):
    """The largest; channels first is what the files have."""
    theirs = np.asarray(theirs)
    theirs = theirs.transpose(0, 2, 3, 1) if theirs.ndim == 4 else theirs
    return np.abs(np.asarray(ours) - theirs).max()


@pytest.mark.slow
def test_nuclei_are_found_as_its_authors_do(weights_root):
    folder = weights_root / "unet2d_nuclei_broad"
    variables = real(nuclei_unet, folder, "tensors.npz", 36)
    image = nuclei_unet.standardise(np.load(folder / "test_input.npy")[0, 0])[None, :, :, None]
    expected = np.load(folder / "test_output.npy")

    def error(variables):
        return difference(jax.nn.sigmoid(nuclei_unet.apply(variables, image)["logits"]), expected)

    assert error(variables) < 2e-6
    assert error(changed(variables, "params/decoders_._0/kernel", rolled())) > 0.1


@pytest.mark.slow
def test_nuclei_are_measured(weights_root, data_root):
    root = data_root / "dsb2018_nuclei"
    with (root / "image_info.csv").open(newline="") as lines:
        names = [row["image_id"] for row in csv.DictReader(lines) if row["split"] == "val"]
    source: Any = []
    for name in names[:6]:
        image = np.asarray(Image.open(root / "images" / f"{name}.png").convert("RGB"))
        label = (np.asarray(Image.open(root / "instances" / f"{name}.png")) > 0).astype(np.uint8)
        source.append({"image": image, "label": label})
    variables, _ = nuclei_unet.load(weights_root / "unet2d_nuclei_broad/tensors.npz")
    ious = nuclei_unet.foreground_iou(variables, source)
    # Of the six one is in colour, and left out.
    np.testing.assert_allclose(ious, [0.7079, 0.6378, 0.8202, 0.5011, 0.4592], atol=5e-4)


@pytest.mark.slow
def test_vessels_need_flipped_kernels(weights_root, capsys):
    folder = weights_root / "retina_unet_drive"
    variables = real(retina_unet, folder, "test_best_weights.h5", 22)
    known = npz(folder / "reference_io.npz")

    def error(variables):
        logits = retina_unet.apply(variables, known["input_nchw"].transpose(0, 2, 3, 1))["logits"]
        return difference(jax.nn.softmax(logits), known["softmax_nchw"])

    assert error(variables) < 3e-6
    assert error(retina_unet.unflipped(variables)) > 0.1
    assert error(changed(variables, "params/convolution2d_7/kernel", rolled(64))) > 0.1
    retina_unet.main(folder / "test_best_weights.h5", folder / "reference_io.npz")
    assert "kernels not flipped: largest difference 0.99" in capsys.readouterr().out


@pytest.mark.slow  # another network of Keras is compared above
def test_cells_of_keras_agree_in_every_pixel(weights_root, capsys):
    folder = weights_root / "unet_pancreatic_keras2"
    file = "unet_pancreatic_cell_segmentation.h5"
    variables = real(pancreatic_unet, folder, file, 36)
    known = npz(folder / "reference_io.npz")

    def error(variables):
        images = known["input_nchw"].transpose(0, 2, 3, 1)
        logits = pancreatic_unet.apply(variables, images)["logits"]
        return difference(jax.nn.sigmoid(logits), known["probability_nchw"])

    assert error(variables) < 3e-6
    assert error(changed(variables, "params/conv2d_2[468]/kernel", rolled())) > 0.1
    turned = changed(variables, ".*transpose.*/kernel", lambda x: np.flip(x, (0, 1)))
    assert error(turned) > 0.01
    pancreatic_unet.main(folder / file, folder / "exampleImage.npy", folder / "resultImage.npy")
    assert "0 of 414720 pixels differ" in capsys.readouterr().out


def test_transposed_kernels_of_keras_are_not_read_as_others(weights_root, monkeypatch):
    table = tuple(rule._replace(layout="same") for rule in pancreatic_unet.RULES)
    monkeypatch.setattr(pancreatic_unet, "RULES", table)
    path = weights_root / "unet_pancreatic_keras2/unet_pancreatic_cell_segmentation.h5"
    with pytest.raises(UserError, match=r"3 mismatch: conv2d_transpose_4\.kernel"):
        pancreatic_unet.load(path)


def test_resnet20_agrees_at_each_stage(weights_root):
    folder = weights_root / "resnet20_cifar10"
    variables = real(resnet20_cifar, folder, "resnet20-12fca82f.th", 97)
    known = npz(folder / "reference_io.npz")
    outputs = resnet20_cifar.apply(variables, known["input_nchw"].transpose(0, 2, 3, 1))
    for stage in ("layer1", "layer2", "layer3", "logits"):
        assert difference(outputs[stage], known[stage]) < 2e-5
    bgr = changed(variables, "params/conv1/kernel", lambda kernel: kernel[:, :, ::-1])
    logits = resnet20_cifar.apply(bgr, known["input_nchw"].transpose(0, 2, 3, 1))["logits"]
    assert difference(logits, known["logits"]) > 0.1


@pytest.mark.slow  # its stages are compared above
def test_resnet20_names_objects_that_it_was_not_trained_on(weights_root, data_root, capsys):
    path = weights_root / "resnet20_cifar10/resnet20-12fca82f.th"
    resnet20_cifar.main(path, data_root / "voc2012_sample")
    assert "67.5% of 203 objects" in capsys.readouterr().out


@pytest.fixture(scope="module")
def deeplab(weights_root):
    return real(
        mobilenet_deeplab, weights_root / "deeplabv3_mobilenetv2_dm05_voc", "tensors.npz", 113
    )


@pytest.mark.slow
def test_deeplab_gives_every_class_of_tensorflow_lite(deeplab, weights_root):
    known = npz(weights_root / "deeplabv3_mobilenetv2_dm05_voc/reference_io.npz")
    images = known["images_uint8_nhwc"].astype(np.float32)

    def errors(variables, images):
        """Of the scores, and the number of pixels of another class."""
        outputs = [mobilenet_deeplab.apply(variables, image[None]) for image in images]
        scores, logits = (np.concatenate([o[k] for o in outputs]) for k in ("scores", "logits"))
        error = np.abs(scores - known["logits_33x33_nhwc"]).max()
        return error, np.sum(logits.argmax(-1) != known["argmax_257"])

    error, num_wrong = errors(deeplab, images)
    assert error < 5e-5
    assert num_wrong == 0
    for wrong in (
        errors(deeplab, images[:, :, :, ::-1]),  # BGR
        errors(changed(deeplab, "params/concat_projection/kernel", rolled()), images),
    ):
        assert wrong > (1, 100)
    half_pixel = resize_bilinear(known["logits_33x33_nhwc"], (257, 257), align_corners=False)
    assert np.sum(np.asarray(half_pixel).argmax(-1) != known["argmax_257"]) > 100


def test_tensorflows_padding():
    # 256 pixels at stride 2: 128 windows of 3 span 257, one pixel more than there are: behind.
    assert mobilenet_deeplab.same_padding(256, 3, 2, 1) == (0, 1)
    assert mobilenet_deeplab.same_padding(257, 3, 2, 1) == (1, 1)
    assert mobilenet_deeplab.same_padding(33, 3, 1, 4) == (4, 4)
    assert mobilenet_deeplab.same_padding(33, 1, 2, 1) == (0, 0)


@pytest.mark.slow  # test_nuclei_are_measured
def test_deeplab_is_measured(deeplab, data_root):
    root = data_root / "voc2012_sample/VOCdevkit/VOC2012"
    names = (root / "ImageSets/Segmentation/val.txt").read_text().split()[:6]
    source: Any = [
        {
            "image": np.asarray(Image.open(root / "JPEGImages" / f"{name}.jpg")),
            "label": np.asarray(Image.open(root / "SegmentationClass" / f"{name}.png")),
        }
        for name in names
    ]
    scores = metrics.summarise(mobilenet_deeplab.confusion(deeplab, source))
    assert scores["pixel_accuracy"] == pytest.approx(0.9505, abs=5e-4)
    assert scores["mean_iou"] == pytest.approx(0.7491, abs=2e-3)


@pytest.mark.slow  # test_import_weights starts runs too
def test_training_starts_from_the_weights_and_another_head(tmp_path, capsys, monkeypatch):
    def before_training(build, config):
        task, dataset = build(config, 6), training.load_dataset(config)
        with contextlib.ExitStack() as stack:
            return training._begin(task, dataset, optax.sgd(0.1), {}, stack)[2]

    monkeypatch.setattr(training, "run", before_training)
    network = mobilenet_deeplab.MobileNetDeepLab()
    variables = contract.random_variables(network, (1, 33, 33, 3))
    path = tmp_path / "tensors.npz"
    np.savez(path, allow_pickle=False, **rules.unload(variables, mobilenet_deeplab.RULES))
    smoke, workdir = finetune_camvid.PRESETS["smoke"], str(tmp_path / "run")
    state = finetune_camvid.main(dataclasses.replace(smoke, weights=str(path), workdir=workdir))
    printed = capsys.readouterr().out
    assert "108 of 110 parameters copied" in printed
    assert "kept as initialised: semantic/bias, semantic/kernel" in printed
    assert "warning" not in printed
    ours, theirs = dict(jax.device_get(state.params)), dict(variables["params"])
    assert ours.pop("semantic")["kernel"].shape != theirs.pop("semantic")["kernel"].shape
    chex.assert_trees_all_equal(ours, theirs)
    path.unlink()  # a run goes on without it
    (tmp_path / "run/checkpoints/1").mkdir(parents=True)
    finetune_camvid.main(dataclasses.replace(smoke, weights=str(path), workdir=workdir))


@pytest.mark.slow
def test_arrays_of_another_kind_are_refused(weights_root, tmp_path, data_root):
    folder = weights_root / "retina_unet_drive"
    file = folder / "test_best_weights.h5"
    with pytest.raises(UserError, match="has no input_nchw"):
        retina_unet.main(file, file)
    np.save(tmp_path / "odd.npy", np.zeros((1, 12, 16, 1), np.uint8))
    folder = weights_root / "unet_pancreatic_keras2"
    cells = folder / "unet_pancreatic_cell_segmentation.h5", folder / "exampleImage.npy"
    with pytest.raises(UserError, match="multiples of 8"):
        pancreatic_unet.main(*cells, tmp_path / "odd.npy")
    with pytest.raises(UserError, match="cannot be read"):
        pancreatic_unet.main(*cells, cells[0])
    np.save(tmp_path / "small.npy", np.zeros((1, 16, 16, 1), np.uint8))
    with pytest.raises(UserError, match=r"\(1, 576, 720, 1\): give the labels of this picture"):
        pancreatic_unet.main(*cells, tmp_path / "small.npy")
    voc = tmp_path / "VOC2012"
    voc.mkdir()
    for name in ("JPEGImages", "SegmentationClass", "ImageSets"):
        (voc / name).symlink_to(data_root / "voc2012_sample/VOCdevkit/VOC2012" / name)
    with pytest.raises(UserError, match=r"Annotations/.*xml cannot be read"):
        resnet20_cifar.objects(voc)


@pytest.mark.slow
def test_a_file_that_is_not_there_is_one_line(tmp_path):
    flags = [f"--weights={tmp_path}/no.h5", "--reference=x"]
    command = [sys.executable, "-m", "examples.retina_unet", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
