"""Finished runs as files, used by programs that know nothing of this library."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import pathlib
import subprocess
import sys
import types
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from jax.extend import core
from PIL import Image

from dense_jax import runs
from dense_jax.commands import export
from dense_jax.data import padded
from dense_jax.data.normalise import NORMALISATIONS, Normalise
from dense_jax.errors import UserError
from dense_jax.infer import onnx_file, predictor, program
from dense_jax.ops.resize import rescaled, resize_bilinear
from dense_jax.releases import catalogue
from dense_jax.tasks import semantic, trained, training
from dense_jax.train.checkpoint import Checkpoints
from dense_jax.weights import files, rules
from tests import contract, npz, torchvision_names

RUNS = {
    "fcn": {},
    "hypercolumns": {},
    "deconvnet": {"proposal_source": "none"},
    "segnet": {"dropout": "none", "scale": 0.5},
    "unet": {"padding": "valid", "tile": 204, "depth": 4},
    "dilated": {},
    "deeplab": {"msc_inputs": "max", "post": "crf"},
    "deeplab deeplabv3": {"backbone": "resnet50", "head": "deeplabv3"},
    "deeplab fcn": {"backbone": "resnet50", "head": "fcn", "aux": "on"},
}
FAST = ["fcn", "unet", "deeplab"]
# "deeplab fcn" is deeplabv3 but for its head.
OTHERS = [name for name in RUNS if name not in (*FAST, "deeplab fcn")]
# Sizes that are no multiples of anything, and other batches.
SHAPES = ((2, 40, 33), (1, 65, 50))


def make_run(workdir, name, **flags):
    """A run folder with parameters from NumPy, as training would leave it."""
    script = importlib.import_module(f"experiments.{name}")
    config = dataclasses.replace(script.PRESETS["smoke"], workdir=str(workdir), **flags)
    dataset = training.load_dataset(config)
    runs.prepare(config, dataset)
    model = script.build(config, dataset.classes.num_classes).model
    side = flags.get("tile", 32)
    state, params = flax.core.pop(contract.random_variables(model, (1, side, side, 3)), "params")
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(7, {"params": params, "model_state": state}, {"next_batch": 7})
        checkpoints.wait()
    return workdir


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Makes a run of `RUNS` once."""
    made = {}

    def run(name):
        if name not in made:
            workdir = tmp_path_factory.mktemp("run")
            made[name] = make_run(workdir, name.split()[0], **RUNS[name])
        return made[name]

    return run


def images(shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def predicted(run, pictures, folder, shapes: Any = "exact"):
    """The run's own logits of each picture, and its labels as files."""
    opened = trained.load(run)
    task = dataclasses.replace(semantic.labelling(opened.task, ""), crf=None)
    predict = jax.jit(task.predict)
    seen = []

    def keep(*inputs) -> Any:
        outputs = predict(opened.variables, *inputs)
        seen.append(np.asarray(outputs["logits"]))
        return task.answers(outputs)

    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{i}.png")

    def read(answers, image):
        return task.read(answers, image, opened.classes)

    each = predictor.Predictor(keep, read, opened.config.normalisation, shapes)
    predictor.predict_folder(each, opened.classes, folder, folder / "out", overlays=False)
    labels = [np.asarray(Image.open(folder / f"out/labels/{i}.png")) for i in range(len(pictures))]
    height, width = pictures.shape[1:3]
    return np.concatenate(seen)[:, :height, :width], np.stack(labels)


# Another program: JAX, NumPy and a file.
RELOAD = """
import json, pathlib, sys
import jax, jax.export
import numpy as np

for file, shapes in json.loads(sys.argv[1]).items():
    program = jax.export.deserialize(pathlib.Path(file).read_bytes())
    assert program.platforms == ("cpu", "cuda", "tpu")
    call = jax.jit(program.call)
    for i, shape in enumerate(shapes):
        images = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        np.savez(f"{file}.{i}.npz", **call(images))
assert not {"dense_jax", "flax", "experiments"} & set(sys.modules)
"""


@pytest.mark.parametrize("names", [FAST, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_programs_label_as_the_runs_do_without_this_library(names, run_of, tmp_path):
    jobs = {}
    for name in names:
        file = tmp_path / f"{name}.stablehlo"
        export.run(run=run_of(name), to="stablehlo", out=file, scores="logits")
        jobs[str(file)] = SHAPES if name == "fcn" else SHAPES[:1]
    arguments = [sys.executable, "-c", RELOAD, json.dumps(jobs)]
    subprocess.run(arguments, cwd=tmp_path, check=True)
    for name in names:
        file = tmp_path / f"{name}.stablehlo"
        for i, shape in enumerate(jobs[str(file)]):
            folder = tmp_path / f"{name} {i}"
            # Sizes left open are padded where nothing else is possible, and are told so.
            sizes = json.loads(file.with_name(f"{file.name}.json").read_text())["sizes"]
            is_padded = "zeros pad images to multiples of 32 pixels" in sizes
            assert is_padded == (name in ("segnet", "deeplab"))
            shapes = "buckets" if is_padded else "exact"
            logits, labels = predicted(run_of(name), images(shape), folder, shapes)
            found = npz(f"{file}.{i}.npz")
            tolerance = 1e-5 * np.max(np.abs(logits))
            np.testing.assert_allclose(
                found["logits"], logits, rtol=0, atol=tolerance, err_msg=name
            )
            assert np.std(logits) > 0.001, name
            assert np.mean(found["labels"] == labels) > 0.999, name
            assert found["labels"].dtype == np.uint8


@pytest.mark.slow
def test_the_description_says_what_goes_in_and_comes_out(run_of, tmp_path, capsys):
    file = tmp_path / "new" / "x.stablehlo"
    export.run(run=run_of("deeplab"), to="stablehlo", out=file, dtype="float32")
    assert "CRF is left out" in capsys.readouterr().out
    record = json.loads((tmp_path / "new" / "x.stablehlo.json").read_text())
    assert record["input"]["shape"] == ["b", "h", "w", 3]
    assert record["input"]["dtype"] == "float32"
    assert record["outputs"]["probabilities"]["shape"] == ["b", "h", "w", 6]
    assert record["classes"]["names"][0] == "background"
    assert record["normalisation"]["mean"] == list(NORMALISATIONS["torchvision"][0])
    assert record["run"]["step"] == 7
    assert record["crf"] == "left out"
    assert record["sizes"].startswith("any")
    assert "commit" in record
    # The command's file is the function's program: floats are taken as they are.
    loaded = jax.export.deserialize(bytearray(file.read_bytes()))
    assert [aval.dtype for aval in loaded.in_avals] == [np.float32]
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "x.stablehlo",
        "x.stablehlo.json",
    ]


def test_statistics_of_each_image_are_told_as_such(run_of):
    opened = trained.load(run_of("fcn"))
    config = dataclasses.replace(opened.config, normalisation="grey_image")
    task = dataclasses.replace(opened.task, config=config)
    told = export._origin(dataclasses.replace(opened, task=task))["normalisation"]
    assert told["name"] == "grey_image"
    assert told["mean"].startswith("of each image")


def test_one_shape_is_the_only_one(run_of, tmp_path):
    file = tmp_path / "x.stablehlo"
    export.run(run=run_of("fcn"), to="stablehlo", out=file, shape=(1, 48, 64))
    loaded = jax.export.deserialize(bytearray(file.read_bytes()))
    assert loaded.in_avals[0].shape == (1, 48, 64, 3)
    assert json.loads((tmp_path / "x.stablehlo.json").read_text())["sizes"] == "this shape alone"


def test_a_program_pads_with_the_mean_colour_and_tells_sizes():
    def answer(images, sizes, extra):
        assert images.shape == (2, 32, 64, 3)
        one = jnp.sum(images, axis=-1, keepdims=True) + extra
        two = jnp.broadcast_to(sizes[:, None, None, :1].astype(jnp.float32), one.shape)
        logits = jnp.concatenate([one, two], axis=-1).at[:, 5:].set(jnp.inf)
        return {"labels": jnp.argmax(logits, axis=-1), "logits": logits, "extra": extra}

    run = program.program(answer, "none", padded_side=lambda side: padded.multiple_of(side, 32))
    outputs = run(jnp.full((2, 5, 33, 3), 2, jnp.uint8), jnp.float32(1.0))
    np.testing.assert_array_equal(outputs["labels"], np.zeros((2, 5, 33)))  # 2 + 2 + 2 + 1 > 5
    np.testing.assert_array_equal(outputs["logits"][0, 0, 0], [7, 5])  # 5, the height
    assert outputs["extra"] == 1  # is no picture, and not cut


@pytest.mark.parametrize("size", [(9, 3), (3, 9), (60, 12)])  # Pillow's first axis differs
def test_a_program_resizes_as_files_are_and_rounds_floats_for_it(size):
    def answer(images, sizes):
        return {"images": images, "sizes": sizes}

    def back(answers, size):
        return {**answers, "size": size}

    run = program.program(answer, "none", input_size=lambda size: (4, 5), in_pixels=back)
    pixels = images((1, *size))
    noise = np.random.default_rng(1).uniform(-0.4, 0.4, pixels.shape)
    expected = np.asarray(Image.fromarray(pixels[0]).resize((5, 4), Image.Resampling.BILINEAR))
    for given in (pixels, (pixels + noise).astype(np.float32)):
        outputs = run(jnp.asarray(given))
        np.testing.assert_array_equal(outputs["images"][0], expected)
        np.testing.assert_array_equal(outputs["sizes"], [[4, 5]])
        assert outputs["size"] == size


@pytest.mark.parametrize("align_corners", [False, True])
def test_sizes_left_open_resize_as_known_ones_do(align_corners):
    def enlarge(x):
        return resize_bilinear(x, (3 * x.shape[1] - 1, x.shape[2] + 5), align_corners=align_corners)

    sizes = jax.export.symbolic_shape("b, h, w", constraints=["h >= 2"])
    spec = jax.ShapeDtypeStruct((*sizes, 2), jnp.float32)
    exported = jax.export.export(jax.jit(enlarge))(spec)
    x = np.random.default_rng(0).standard_normal((2, 700, 3, 2)).astype(np.float32)
    np.testing.assert_allclose(exported.call(x), enlarge(x), rtol=1e-5, atol=1e-6)


def test_lengths_are_scaled_in_whole_numbers():
    assert [rescaled(n, 0.75) for n in (0, 1, 2, 3, 4)] == [0, 1, 2, 2, 3]
    assert rescaled(100, 0.35) == 35
    assert rescaled(7, 1.6) == 11


def test_parameters_under_torchvisions_names_come_back(run_of, tmp_path):
    file = tmp_path / "x.safetensors"
    export.run(run=run_of("deeplab fcn"), to="safetensors", out=file)
    variables = trained.load(run_of("deeplab fcn")).variables
    found = files.read(file)
    names = set(torchvision_names.torch_shapes(variables))
    assert names < set(found.tensors)
    assert len(found.tensors) == torchvision_names.num_keys(names)
    count = found.tensors["backbone.bn1.num_batches_tracked"]
    assert (count, count.shape) == (7, ())
    assert "aux_classifier.4.weight" in names
    release = rules.choose(catalogue.releases(), variables, rules.outline(found.tensors))
    again, account = rules.load(variables, found.tensors, release.rules)
    assert not account.unexplained
    jax.tree.map(np.testing.assert_array_equal, again, variables)
    with safetensors.safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    record = json.loads(metadata["dense_jax"])
    assert record["normalisation"]["name"] == "torchvision"
    assert record["names"] == release.name


def test_parameters_of_other_networks_keep_our_names(run_of, tmp_path, capsys):
    file = tmp_path / "x.safetensors"
    export.run(run=run_of("fcn"), to="safetensors", out=file)
    assert "names and layouts: dense_jax" in capsys.readouterr().out
    found, params = files.read(file), trained.load(run_of("fcn")).variables["params"]
    np.testing.assert_array_equal(
        found.tensors["params/conv1_1/kernel"], params["conv1_1"]["kernel"]
    )
    assert len(found.tensors) == len(jax.tree.leaves(params))


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs a disk that is full")
def test_without_its_description_no_file_is_left(run_of, tmp_path):
    (tmp_path / "x.safetensors.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        export.run(run=run_of("fcn"), to="safetensors", out=tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_done_is_said_and_nothing_is_written(run_of, tmp_path, monkeypatch):
    run, out = run_of("fcn"), tmp_path / "x"
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(to="onnx"), "--shape BATCH HEIGHT WIDTH"),
        (dict(to="stablehlo", shape=(1, 0, 3)), "--shape 1 0 3"),
        (dict(to="safetensors", shape=(1, 2, 3)), "holds parameters only"),
        (dict(to="safetensors", scores="logits"), "holds parameters only"),
        (dict(to="stablehlo", run=tmp_path), "config.json cannot be read"),
    ]
    for options, match in wrong:
        with pytest.raises(UserError, match=match):
            export.run(**(dict(run=run, out=out) | options))
    assert not list(tmp_path.iterdir())
    out.write_text("mine")
    with pytest.raises(UserError, match=r"x exists.*--overwrite"):
        export.run(run=run, to="safetensors", out=out)
    assert out.read_text() == "mine"
    export.run(run=run, to="safetensors", out=out, overwrite=True)
    assert files.read(out).format == "safetensors"
    with pytest.raises(UserError, match="exists"):
        export.run(run=run, to="safetensors", out=tmp_path, overwrite=True)
    with pytest.raises(UserError, match=r"config\.json belongs to the run"):
        export.run(run=run, to="safetensors", out=run / "config.json", overwrite=True)
    with pytest.raises(UserError, match=r"config\.json belongs to the run"):
        export.run(run=run, to="safetensors", out=run / "config", overwrite=True)
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(UserError, match="needs jax2onnx: pip install jax2onnx onnxruntime"):
        export.run(run=run, to="onnx", shape=(1, 2, 3), out=tmp_path / "y")


def test_a_network_that_calls_back_is_refused():
    def label(images):
        shape = jax.ShapeDtypeStruct(images.shape, jnp.float32)
        return {"labels": jax.pure_callback(np.float32, shape, images)}

    with pytest.raises(UserError, match=r"cannot be exported \(.*callback.*\)$"):
        export.stablehlo(label, [jax.ShapeDtypeStruct((1, 2, 2, 3), np.uint8)], has_shape=True)
    inputs = export._arguments({"images": ("b", "h", "w", 3)}, {"images": np.dtype("uint8")})
    with pytest.raises(UserError, match="fixed sizes may help, such as --shape 1 480 640"):
        export.stablehlo(lambda x: {"labels": x[: int(x.shape[1])]}, inputs, has_shape=False)


@jax.custom_vjp
def _twice(x):
    return 2 * x


_twice.defvjp(lambda x: (2 * x, None), lambda _, grad: (2 * grad,))


def primitives(jaxpr):
    """Names of all operations, those inside others too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(value):
                yield from primitives(value.jaxpr)


def _is_program(value):
    return isinstance(value, core.ClosedJaxpr)


def test_programs_are_reduced_to_what_a_cpu_does():
    def fn(x):
        def body(carry, row):
            row = jax.lax.platform_dependent(row, cpu=jnp.sin, default=jnp.cos)
            return carry + _twice(jax.nn.relu(row)), jax.jit(jnp.tanh)(row)

        carry, rows = jax.lax.scan(body, jnp.zeros(3), jax.lax.optimization_barrier(x))
        first = jax.lax.cond(carry[0] > 1, jnp.exp, lambda y: jax.nn.relu(-y), carry)
        return {"a": first, "b": rows}

    x = np.linspace(-1, 3, 12, dtype=np.float32).reshape(4, 3)
    reduced = onnx_file.reduce_program(fn, jax.ShapeDtypeStruct(x.shape, x.dtype))
    names = set(primitives(reduced.jaxpr))
    assert {"scan", "cond", "sin", "tanh"} <= names
    assert not {"cos", "platform_index", "optimization_barrier", "custom_vjp_call"} & names
    assert not {"jit", "custom_jvp_call"} & names
    for found, expected in zip(core.jaxpr_as_fun(reduced)(x), fn(x).values(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")  # jax2onnx leaves out whatever warns when it is imported
@pytest.mark.parametrize("name", ["fcn", "unet", "segnet", "dilated", "deeplab deeplabv3"])
def test_onnxruntime_labels_as_the_run_does(name, run_of, tmp_path):
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    file, shape = tmp_path / "x.onnx", (2, 40, 33)
    export.run(run=run_of(name), to="onnx", out=file, shape=shape, scores="logits")
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    labels, logits = session.run(["labels", "logits"], {"images": images(shape)})
    expected, expected_labels = predicted(run_of(name), images(shape), tmp_path / "images")
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.max(np.abs(expected)))
    assert np.mean(labels == expected_labels) > 0.999


@pytest.mark.filterwarnings("ignore")
def test_networks_that_jax2onnx_does_not_know_are_refused(run_of, tmp_path):
    pytest.importorskip("jax2onnx")
    with pytest.raises(UserError, match=r"^jax2onnx [0-9.]+ cannot convert this network \(.*\)"):
        export.run(run=run_of("hypercolumns"), to="onnx", out=tmp_path / "x", shape=(1, 32, 32))
    assert not list(tmp_path.iterdir())


def test_what_is_converted_wrongly_is_refused(monkeypatch):
    """A converter and a run time that agree with each other and not with JAX."""

    class Session:
        def run(self, names, inputs):
            return [np.zeros(2, np.float32), np.array([1, 1.5], np.float32)]

    class Runtime:
        SessionOptions = type("Options", (), {})
        InferenceSession = staticmethod(lambda *args, **kwargs: Session())

    class Converter:
        to_onnx = staticmethod(lambda *args, **kwargs: Converter)
        SerializeToString = staticmethod(bytes)
        graph = types.SimpleNamespace(value_info=["wrong"])

    monkeypatch.setitem(sys.modules, "jax2onnx", Converter)
    monkeypatch.setitem(sys.modules, "onnxruntime", Runtime)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9")
    spec = jax.ShapeDtypeStruct((2,), jnp.uint8)

    def fn(x, last):
        return {"labels": jnp.argmax(x), "scores": jnp.array([1, last])}

    assert onnx_file.convert(lambda x: fn(x, 1.5), spec) == (b"", 0.0)
    assert not Converter.graph.value_info
    with pytest.raises(UserError, match=r"jax2onnx 9 converts this network wrongly.*2\.5e-01 off"):
        onnx_file.convert(lambda x: fn(x, 2.0), spec)


@pytest.mark.parity
def test_torchvision_loads_the_parameters_and_gives_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") is None:  # it may not be importable as it is
        pytest.skip("needs torchvision")
    theirs = importlib.import_module("tests.parity.theirs")
    run = make_run(
        tmp_path / "run", "deeplab", backbone="resnet50", head="fcn", aux="on", width=1.0
    )
    file = tmp_path / "x.safetensors"
    export.run(run=run, to="safetensors", out=file)
    torch_file = importlib.import_module("safetensors.torch")
    build = theirs.import_torchvision().models.segmentation.fcn_resnet50
    network = build(weights=None, weights_backbone=None, num_classes=6, aux_loss=True).eval()
    network.load_state_dict(torch_file.load_file(file), strict=True)
    batch = images((1, 64, 64))  # nothing to pad
    x = np.stack([Normalise("torchvision")({"image": image})["image"] for image in batch])
    with torch.inference_mode():
        found = network(torch.from_numpy(x).permute(0, 3, 1, 2))["out"].permute(0, 2, 3, 1).numpy()
    expected, _ = predicted(run, batch, tmp_path / "images")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))
