"""Writes a finished run as a file that other programs can use without this library.

    program = jax.export.deserialize(pathlib.Path("model.stablehlo").read_bytes())
    program.call(images)["labels"]  # uint8 [B, H, W] of uint8 images [B, H, W, 3]
    program.call(images)["boxes"]  # of a detector: float32 [B, D, 4]

A JSON file with the same name and ".json" describes inputs, outputs and origin.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util
from jax import export

from dense_jax import runs
from dense_jax.data.normalise import NORMALISATIONS
from dense_jax.data.padded import BUCKET, multiple_of
from dense_jax.errors import UserError
from dense_jax.infer import onnx_file, program
from dense_jax.releases import catalogue
from dense_jax.tasks import trained
from dense_jax.tasks.semantic import Semantic, labelling
from dense_jax.tasks.task import Task
from dense_jax.weights import rules

Format = Literal["stablehlo", "safetensors", "onnx"]
Names = Literal["torchvision", "detectron2", "dense_jax"]

PLATFORMS = ("cpu", "cuda", "tpu")
_ANY_SIZE = "any batch, height and width from 1 up"


def run(
    *,
    run: pathlib.Path,
    to: Format,
    out: pathlib.Path | None = None,
    checkpoint: Literal["last", "best"] = "last",
    scores: Literal["probabilities", "logits"] = "probabilities",
    dtype: Literal["uint8", "float32"] = "uint8",
    shape: tuple[int, int, int] | None = None,
    names: Names | None = None,
    overwrite: bool = False,
) -> None:
    """Write a run as a file for other programs, and a JSON file that describes it.

    stablehlo holds the network with weights, normalisation and class map, for JAX on CPUs, CUDA and
    TPUs and images of any size; a detector with anchors, resizing and suppression, for images of
    one size. onnx holds the same for ONNX runtimes and images of one size. safetensors holds the
    parameters alone, under torchvision's names if torchvision has the network, or detectron2's. A
    CRF after the network is left out.

    Args:
      run: folder of a training run.
      to: kind of file.
      out: file to write. Default: RUN/model.KIND.
      checkpoint: which parameters to use.
      scores: the second output, after the labels.
      dtype: dtype of the images, RGB from 0 to 255.
      shape: batch, height and width, if they are fixed; onnx needs them. Default for detectors: one
        image as large as the network takes without resizing it.
      names: names and layouts in safetensors. Default: torchvision's if it has the network,
        otherwise those of this library.
      overwrite: replace an existing file.
    """
    out = out or run / f"model.{to}"
    description = out.with_name(f"{out.name}.json")
    for path in (out, description):
        if path.is_dir() or (path.exists() and not overwrite):
            raise UserError(f"{path} exists: give another --out, or --overwrite to replace a file")
    if out.suffix != f".{to}" and run.resolve() in out.resolve().parents:
        for path in (out, description):
            if path.exists():
                raise UserError(f"{path} belongs to the run: give another --out")
    if to == "safetensors" and (scores, dtype, shape) != ("probabilities", "uint8", None):
        raise UserError(
            "--to=safetensors holds parameters only: leave out --scores, --dtype and --shape"
        )
    if to != "safetensors" and names is not None:
        raise UserError(f"--names={names} is for --to=safetensors: leave it out")
    if to == "onnx" and shape is None:
        raise UserError("--to=onnx needs images of one size: give --shape BATCH HEIGHT WIDTH")
    if shape is not None and min(shape) < 1:
        raise UserError(f"--shape {' '.join(map(str, shape))}: give at least 1 1 1")
    opened = trained.load(run, checkpoint)
    record = _origin(opened) | {"format": to}
    if to == "safetensors":
        file, facts = parameters(opened, record, names)
    else:
        file, facts = _program(opened, to, scores, np.dtype(dtype), shape)
    runs.make_folder(out.parent)
    with runs.replacing_with_record(out, description, record | facts) as stream:
        stream.write(file)
    print(f"{out}: {len(file) / 1e6:.1f} MB; {description.name} describes it")


def _origin(opened: trained.Run) -> dict[str, Any]:
    """Returns the facts about the run for every kind of export."""
    name = opened.config.normalisation
    statistics: dict[str, Any] = dict(zip(("mean", "std"), NORMALISATIONS[name], strict=True))
    if name == "grey_image":
        statistics = dict(mean="of each image, in grey", std="of each image, at least 1")
    return {
        "run": {
            "folder": str(opened.workdir.absolute()),
            "script": opened.script,
            "step": opened.step,
            "commit": runs.read_config(opened.workdir).get("commit"),
            "config": opened.config.to_json(),
        },
        "classes": opened.classes.to_json(),
        "normalisation": {"name": name} | statistics,
        **runs.provenance(),
    }


def parameters(
    opened: trained.Run, record: dict[str, Any], names: Names | None = None
) -> tuple[bytes, dict[str, Any]]:
    """Returns a run's parameters as a safetensors file, and facts for its description.

    If torchvision has the network, names and layouts are torchvision's, and the file includes the
    batch counts that torch requires. torchvision's network loads the file if the run has full
    width; its scores are equal if the strides are. Otherwise the names are the paths of this
    library's parameter tree.

    Args:
      opened: the run.
      record: facts to store in the file as JSON.
      names: whose names; None for torchvision's, or ours.

    Raises:
      UserError: nobody of this name has the network.
    """
    found = None if names == "dense_jax" else _under_names_of(names or "torchvision", opened)
    if found is None and names not in (None, "dense_jax"):
        raise UserError(f"--names={names}: {names} has no such network; leave the flag out")
    named, tensors = found or (
        "dense_jax",
        traverse_util.flatten_dict(opened.variables, sep="/"),
    )
    facts = {"names": named}
    metadata = {"dense_jax": json.dumps(record | facts)}
    if found:
        metadata["format"] = "pt"  # the usual mark of torch's layouts
    print(f"names and layouts: {named}; the file holds no normalisation and no network")
    ordered = {name: np.asarray(values, order="C") for name, values in tensors.items()}
    return safetensors.numpy.save(ordered, metadata), facts


def _under_names_of(code: Names, opened: trained.Run) -> tuple[str, dict[str, np.ndarray]] | None:
    prefix = {"torchvision": "torchvision", "detectron2": "detectron2's R-CNN"}[code]
    for release in catalogue.releases():
        if not release.name.startswith(prefix):
            continue
        with contextlib.suppress(UserError):  # the release lacks one of the parameters
            tensors = rules.unload(opened.variables, release.rules)
            if release.sign is not None and not release.sign(tensors):
                continue
            norms = [name for name in tensors if name.endswith(".running_mean")]
            for name in norms if code == "torchvision" else ():
                count = name.replace("running_mean", "num_batches_tracked")
                tensors[count] = np.array(opened.step, np.int64)
            return release.name, tensors
    return None


def _program(
    opened: trained.Run,
    to: Format,
    scores: str,
    dtype: np.dtype,
    shape: tuple[int, int, int] | None,
) -> tuple[bytes, dict[str, Any]]:
    """Returns the network as a program, and facts for its description."""
    task, has_crf = opened.task, False
    if isinstance(task, Semantic):
        has_crf, task = task.crf is not None, dataclasses.replace(task, crf=None)
    elif scores != "probabilities":
        labelling(task, f"--scores={scores}")
    left_out = {"probabilities": "logits", "logits": "probabilities"}[scores]
    if shape is None and (default := task.export_size):
        shape = (1, *default)
        print(
            f"no --shape: one image of {default[0]} x {default[1]}, since this network is exported "
            "for one size; give that of your images"
        )

    def answer(images: jax.Array, sizes: jax.Array, *inputs: jax.Array) -> dict[str, jax.Array]:
        answers = task.answers(task.predict(opened.variables, images, sizes, *inputs))
        return {name: values for name, values in answers.items() if name != left_out}

    axes = shape or ("b", "h", "w")
    specs = {"images": (*axes, 3)} | {
        name: (axes[0], *spec.shape) for name, spec in task.inputs.items()
    }
    if to == "onnx" or shape:  # only StableHLO can leave named sides open
        open_sides = [
            name for name, sides in specs.items() if any(isinstance(s, str) for s in sides)
        ]
        if open_sides and to == "onnx":
            raise UserError(
                f"--to=onnx takes images alone, and this run also takes {open_sides[0]}: "
                "give --to=stablehlo"
            )
    dtypes = {"images": dtype} | {n: np.dtype(spec.dtype) for n, spec in task.inputs.items()}
    inputs = _arguments(specs, dtypes)
    steps: dict[str, Any] = {
        "input_size": task.input_size,
        "antialias": task.antialias,
        "in_pixels": task.in_pixels,
    }
    sizes = _ANY_SIZE
    if shape:
        steps["padded_side"] = task.padded_side
        sizes = "this shape alone"
        if (size := task.input_size(shape[1:])) != shape[1:]:
            sizes += f"; resized to {size[0]} x {size[1]} inside, as the run does"
    label = program.program(answer, opened.config.normalisation, **steps)
    try:
        outputs = jax.eval_shape(label, *inputs)
    except jax.errors.InconclusiveDimensionOperation:  # sizes left open give no whole steps
        steps["padded_side"] = functools.partial(multiple_of, multiple=BUCKET)
        label = program.program(answer, opened.config.normalisation, **steps)
        outputs = jax.eval_shape(label, *inputs)
        sizes = (
            f"{_ANY_SIZE}; zeros pad images to multiples of {BUCKET} pixels, and labels near the "
            "lower and right edges may differ from the run's own: a fixed shape does not pad"
        )
    facts: dict[str, Any] = {
        "input": {
            "name": "images",
            "shape": [*axes, 3],
            "dtype": dtype.name,
            "values": "RGB, 0 to 255; normalised inside",
        },
        "further_inputs": {
            name: {"shape": list(specs[name]), "dtype": spec.dtype, "values": spec.words}
            for name, spec in task.inputs.items()
        },
        "outputs": {
            name: {"shape": [*map(_side, x.shape)], "dtype": x.dtype.name}
            | ({"values": task.meanings[name]} if name in task.meanings else {})
            for name, x in outputs.items()
        },
        "sizes": sizes,
        **_card(task),
        "crf": "left out" if has_crf else "none",
    }
    if has_crf:
        print("the run's CRF is left out: labels and scores are the network's own")
    if to == "onnx":
        file, difference = onnx_file.convert(label, inputs[0])
        print(f"onnxruntime gives the same {scores}, to {difference:.1e} of the largest")
        return file, facts
    size = f"{shape[0]} x {shape[1]} x {shape[2]}" if shape else sizes
    print(f"{dtype.name} RGB images on {', '.join(PLATFORMS)}, of {size}")
    return stablehlo(label, inputs, has_shape=shape is not None), facts | {"platforms": PLATFORMS}


def _card(task: Task) -> dict[str, Any]:
    return {"test_time_options": task.card["test_time_options"]}


def _side(side: Any) -> Any:
    return side if isinstance(side, int) else str(side)


def _arguments(
    specs: Mapping[str, tuple[Any, ...]], dtypes: Mapping[str, np.dtype]
) -> list[jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of a program's arguments; sides with a name have any length."""
    names = sorted({side for sides in specs.values() for side in sides if isinstance(side, str)})
    symbols = (
        dict(zip(names, export.symbolic_shape(", ".join(names)), strict=True)) if names else {}
    )
    return [
        jax.ShapeDtypeStruct([symbols.get(side, side) for side in sides], dtypes[name])
        for name, sides in specs.items()
    ]


def stablehlo(
    label: Callable[..., dict[str, jax.Array]],
    inputs: Sequence[jax.ShapeDtypeStruct],
    *,
    has_shape: bool,
) -> bytes:
    """Serialises a function of images [B, H, W, 3] with `jax.export`, for `PLATFORMS`.

    Args:
      label: the function.
      inputs: shapes and dtypes of its arguments.
      has_shape: whether their sizes are fixed.

    Raises:
      UserError: JAX cannot export the function, or only with fixed sizes.
    """
    try:
        return bytes(export.export(jax.jit(label), platforms=PLATFORMS)(*inputs).serialize())
    except Exception as error:  # JAX has no error class for functions that it cannot export
        reason = str(error).splitlines()[0]
        advice = "" if has_shape else ": fixed sizes may help, such as --shape 1 480 640"
        raise UserError(f"this network cannot be exported ({reason:.200}){advice}") from error
