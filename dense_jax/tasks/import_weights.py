"""Brings published weights into a folder that training starts from.

The file's names decide whose weights they are, and the network's names which of them it takes: any
network here that stands on a trunk of these names can start from them.
"""

import contextlib
import json
import pathlib
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import traverse_util

from dense_jax import runs
from dense_jax.errors import UserError
from dense_jax.models import deconvnet, deeplabv3, resnet, segnet, vgg
from dense_jax.train.checkpoint import has_checkpoint, read_variables
from dense_jax.weights import files, hub, rules
from dense_jax.weights.rules import Release

RELEASES: tuple[Release, ...] = (
    vgg.TORCHVISION,
    segnet.TORCHVISION,
    deconvnet.TORCHVISION,
    resnet.TORCHVISION,
    *deeplabv3.TORCHVISION,
)
# A folder of imported weights: the parameters by their paths here, and where they come from.
WEIGHTS, RECORD = "weights.npz", "weights.json"
_HUB = "hub:"

_IMAGENET, _VOC = 1000, 21  # classes of torchvision's weights

ModelName = Literal[
    "vgg16",
    "segnet",
    "deconvnet",
    "resnet50",
    "resnet101",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
]


def build(name: ModelName, num_classes: int | None = None, aux: bool = False) -> nn.Module:
    """Returns a network by name.

    Args:
      name: VGG-16 ends in fc7 and has the names of FCN, DeepLab and the dilated front end; segnet
        and deconvnet take vgg16_bn.
      num_classes: by default as published.
      aux: whether torchvision's segmentation networks have their second classifier.
    """
    of_pixels = num_classes or _VOC
    if name == "vgg16":
        return vgg.vgg16(padding="same")
    if name in ("segnet", "deconvnet"):
        return {"segnet": segnet.SegNet, "deconvnet": deconvnet.DeconvNet}[name](of_pixels)
    if name.startswith("res"):
        return getattr(resnet, name)(num_classes=num_classes or _IMAGENET)
    return getattr(deeplabv3, name)(of_pixels, aux=aux)


def template_of(model: nn.Module, num_channels: int = 3) -> Any:
    """Returns the shapes of a network's variables; nothing is computed, and no device is asked."""
    images = jax.ShapeDtypeStruct((1, 32, 32, num_channels), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


def run(
    *,
    model: ModelName,
    source: Annotated[str, tyro.conf.arg(name="from")],
    out: pathlib.Path | None = None,
    dry_run: bool = False,
    new_head: bool = False,
    ignore: tuple[str, ...] = (),
    num_classes: int | None = None,
) -> None:
    """Bring published weights into a folder that training starts from (--init=run:OUT).

    Prints what becomes of every tensor of the file and every parameter of the network; whatever is
    not explained is an error, and then nothing is written.

    Args:
      model: network to fill. vgg16 has the names of FCN, DeepLab and the dilated front end;
        resnet* those of DeepLab v2; segnet and deconvnet take vgg16_bn into their encoders;
        fcn_resnet* and deeplabv3_resnet* also take a ResNet alone, with --new-head.
      source: file of the weights, .safetensors, .npz, .pth, ..., or hub:OWNER/REPOSITORY with one
        of the Hugging Face Hub.
      out: folder to write; not needed with --dry-run.
      dry_run: print, and write nothing.
      new_head: what stands on the trunk may be missing from the file or be of another kind there.
      ignore: names of tensors to leave in the file, or patterns such as "fc.*".
      num_classes: classes of the network; by default as published, 1000 or 21. vgg16 has none.
    """
    if out is None and not dry_run:
        raise UserError("give a folder to write with --out, or --dry-run")
    if out is not None and (has_checkpoint(out) or (out / RECORD).exists()):
        raise UserError(f"--out={out} holds weights already: give another folder")
    if num_classes is not None and num_classes < 1:
        raise UserError(f"--num-classes={num_classes}: give at least 1")
    path = _on_disk(source)
    file = files.read(path)
    tensors = rules.outline(file.tensors)
    aux = any(name.startswith("aux_classifier.") for name in tensors)
    template = template_of(build(model, num_classes, aux))
    release = rules.choose(RELEASES, template, tensors)
    required = release.trunk if new_head else ("*",)
    options: dict[str, Any] = dict(required=required, ignore=ignore)
    account = rules.match(template, tensors, release.rules, **options)
    for key in ("container", "prefix", "left out"):  # what the reader took off or passed over
        if key in file.info:
            print(f"{source}: {key}: {file.info[key]}")
    print(account)
    account.check(source)
    print(f"{release.name}; images are to come with --normalisation={release.normalisation}")
    if dry_run or out is None:
        return
    variables, _ = rules.load(template, file.tensors, release.rules, **options)
    record = {
        "model": model,
        "from": source if source.startswith(_HUB) else str(path.absolute()),
        "format": file.format,
        "release": release.name,
        "normalisation": release.normalisation,
        "account": account.summary(),
        **runs.provenance(),
    }
    out.mkdir(parents=True, exist_ok=True)
    leaves: Any = traverse_util.flatten_dict(variables, sep="/")
    partial = (out / WEIGHTS).with_suffix(".tmp")
    with partial.open("wb") as stream:
        np.savez(stream, **leaves)  # goes through views piece by piece, without copies of them
    partial.replace(out / WEIGHTS)
    runs.write_json(out / RECORD, record)
    print(f"start a run from it with --init=run:{out}")


def initial(source: str, template: Any) -> tuple[dict[str, Any], str | None]:
    """Returns the variables that ``--init`` names, and the normalisation they expect, if known.

    Args:
      source: run:PATH, the folder of a run or of imported weights; file:PATH, a file of published
        weights whose head need not fit; hub:OWNER/REPOSITORY, such a file of the Hugging Face Hub.
      template: the variables of the network to start.

    Raises:
      UserError: there are none, or the file's trunk is of another network.
    """
    kind, _, path = source.partition(":")
    if kind == "run" and path:
        folder = pathlib.Path(path)
        if (folder / RECORD).exists():
            leaves = dict(files.read(folder / WEIGHTS).tensors)
            variables = traverse_util.unflatten_dict(leaves, sep="/")
            print(f"init: {path}, imported")
        else:
            variables, step = read_variables(path)
            print(f"init: {path} at step {step}")
        return variables, _normalisation_of(folder)
    if kind in ("file", "hub") and path:
        tensors = files.read(_on_disk(source if kind == "hub" else path)).tensors
        release = rules.choose(RELEASES, template, rules.outline(tensors))
        variables, account = rules.load(
            template, tensors, release.rules, required=release.trunk, path=source
        )
        print(f"init: {source} ({release.name}): {account.summary()}")
        return variables, release.normalisation
    raise UserError(
        f"--init={source}: give run:PATH with the folder of another run, file:PATH with a file of "
        "weights, or hub:OWNER/REPOSITORY"
    )


def _on_disk(source: str) -> pathlib.Path:
    """Returns a file that is named by its path or by hub:NAME."""
    if source.startswith(_HUB):
        return hub.download(source.removeprefix(_HUB))
    return pathlib.Path(source)


def _normalisation_of(folder: pathlib.Path) -> str | None:
    """What the network in a folder was fed with, as far as the folder tells."""
    for name in (RECORD, "config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not there, or damaged
            record = json.loads((folder / name).read_text())
            found = record.get("config", record).get("normalisation")
            if isinstance(found, str):
                return found
    return None
