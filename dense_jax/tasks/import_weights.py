"""Brings published weights into a folder that training starts from.

The file's names decide whose weights they are, and the network's names which of them it takes: any
network here that stands on a trunk of these names can start from them.
"""

import contextlib
import fnmatch
import functools
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import traverse_util

from dense_jax import runs
from dense_jax.data.normalise import NORMALISATIONS
from dense_jax.errors import UserError, printable
from dense_jax.models import (
    deconvnet,
    deeplab,
    deeplabv3,
    dilated,
    fcn,
    resnet,
    segnet,
    vgg,
)
from dense_jax.train.checkpoint import has_checkpoint, read_variables
from dense_jax.weights import files, hub, rules
from dense_jax.weights.rules import Release
from dense_jax.weights.tensors import REMARKS

RELEASES: tuple[Release, ...] = (
    vgg.TORCHVISION,
    vgg.TORCHVISION_FEATURES,
    segnet.TORCHVISION,
    deconvnet.TORCHVISION,
    resnet.TORCHVISION,
    *deeplabv3.TORCHVISION,
    vgg.CAFFE,
    *fcn.CAFFE,
    *segnet.CAFFE,
    deconvnet.CAFFE,
    *dilated.CAFFE,
    *deeplab.CAFFE,
    *resnet.MSRA,
)
# A folder of imported weights: the parameters by their paths here, and where they come from.
_FILES = WEIGHTS, RECORD = "weights.npz", "weights.json"
_HUB = "hub:"
_ADVICE = (
    "the table shows all; --num-classes=N makes room for scores of other classes, --new-head "
    "explains what stands on the trunk, --ignore=NAME a tensor to leave out"
)
_INIT_ADVICE = (
    "published weights are of full width (--width=1) and of one kind of trunk; "
    "python -m dense_jax import-weights --dry-run shows all"
)

_IMAGENET, _VOC, _CAMVID, _CITYSCAPES = 1000, 21, 11, 19  # classes of what is published

ModelName = Literal[
    "vgg16",
    "fcn32s",
    "fcn16s",
    "fcn8s",
    "fcn8s_at_once",
    "fcn_alexnet",
    "segnet",
    "segnet_basic",
    "deconvnet",
    "dilated_front_end",
    "dilation7",
    "dilation8",
    "dilation8_voc",
    "dilation10",
    "deeplab_largefov",
    "deeplab_vgg16",
    "deeplab_resnet101",
    "resnet50",
    "resnet101",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
]
# Each with the classes it was published for; names of parameters depend on no other attribute.
_padded: dict[str, Any] = {"pad": "same"}  # so that networks can be traced on small images
_NETWORKS: dict[ModelName, tuple[Callable[..., nn.Module], int | None]] = {
    "vgg16": (functools.partial(vgg.vgg16, padding="same"), None),
    "fcn32s": (fcn.fcn32s, _VOC),
    "fcn16s": (fcn.fcn16s, _VOC),
    "fcn8s": (fcn.fcn8s, _VOC),
    "fcn8s_at_once": (fcn.fcn8s_at_once, _VOC),
    "fcn_alexnet": (fcn.fcn_alexnet, _VOC),
    "segnet": (segnet.SegNet, _CAMVID),
    "segnet_basic": (segnet.SegNetBasic, _CAMVID),
    "deconvnet": (deconvnet.DeconvNet, _VOC),
    "dilated_front_end": (functools.partial(dilated.front_end, **_padded), _VOC),
    "dilation7": (functools.partial(dilated.dilation7, **_padded), _CAMVID),  # KITTI has these too
    "dilation8": (functools.partial(dilated.dilation8, **_padded), _CAMVID),
    "dilation8_voc": (functools.partial(dilated.dilated_large, **_padded), _VOC),
    "dilation10": (functools.partial(dilated.dilation10, **_padded), _CITYSCAPES),
    "deeplab_largefov": (deeplab.deeplab_largefov, _VOC),
    "deeplab_vgg16": (deeplab.deeplab_vgg_aspp_l, _VOC),
    "deeplab_resnet101": (deeplab.deeplab_resnet101, _VOC),
    "resnet50": (resnet.resnet50, _IMAGENET),
    "resnet101": (resnet.resnet101, _IMAGENET),
    "resnext101_32x8d": (resnet.resnext101_32x8d, _IMAGENET),
    "resnext101_64x4d": (resnet.resnext101_64x4d, _IMAGENET),
    "fcn_resnet50": (deeplabv3.fcn_resnet50, _VOC),
    "fcn_resnet101": (deeplabv3.fcn_resnet101, _VOC),
    "deeplabv3_resnet50": (deeplabv3.deeplabv3_resnet50, _VOC),
    "deeplabv3_resnet101": (deeplabv3.deeplabv3_resnet101, _VOC),
}


def build(name: ModelName, num_classes: int | None = None, aux: bool = False) -> nn.Module:
    """Returns a network by name.

    Args:
      name: VGG-16 ends in fc7 and has the names of FCN, DeepLab and the dilated front end.
      num_classes: by default as published.
      aux: whether torchvision's segmentation networks have their second classifier.
    """
    make, published = _NETWORKS[name]
    options: dict[str, Any] = {"aux": aux} if name.startswith(("fcn_resnet", "deeplabv3")) else {}
    if published is not None:
        options["num_classes"] = num_classes or published
    return make(**options)


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
      model: network to fill. vgg16 has the names of FCN, DeepLab and the dilated front end, and
        resnet* those of DeepLab v2. segnet and deconvnet also take vgg16_bn into their encoders,
        and networks on a ResNet a ResNet alone, with --new-head.
      source: file of the weights, .safetensors, .npz, .pth, .caffemodel, ..., or
        hub:OWNER/REPOSITORY with one of the Hugging Face Hub.
      out: folder to write; not needed with --dry-run.
      dry_run: print, and write nothing.
      new_head: what stands on the trunk may be missing from the file or be of another kind there.
      ignore: names of tensors to leave in the file, or patterns such as "fc.*".
      num_classes: classes of the network; by default as published, such as 1000 of ImageNet, 21
        of VOC, 11 of CamVid. vgg16 has none.
    """
    if out is None and not dry_run:
        raise UserError("give a folder to write with --out, or --dry-run")
    if out is not None and (has_checkpoint(out) or any((out / name).exists() for name in _FILES)):
        raise UserError(f"--out={out} holds weights already: give another folder")
    if num_classes is not None and (num_classes < 1 or _NETWORKS[model][1] is None):
        least = "give at least 1" if num_classes < 1 else f"{model} has no classes, leave it out"
        raise UserError(f"--num-classes={num_classes}: {least}")
    path = _on_disk(source)
    file = _read_published(path)
    for key in REMARKS:
        if key in file.info:
            print(f"{source}: {key}: {printable(file.info[key])}")
    for pattern in ignore:
        if not fnmatch.filter(file.tensors, pattern):
            raise UserError(f"--ignore={pattern}: {source} has no tensor of such a name")
    aux = any(name.startswith("aux_classifier.") for name in file.tensors)
    template = template_of(build(model, num_classes, aux))
    release = rules.choose(RELEASES, template, file.tensors, source)
    required = release.trunk if new_head else ("*",)
    account = rules.match(
        template,
        rules.outline(file.tensors, release.rules),
        release.rules,
        required=required,
        absent=release.absent,
        ignore=ignore,
    )
    if account.unexplained:
        print(account)
        account.check(source, _ADVICE)
    variables = rules.fill(template, file.tensors, account, source)
    record = {
        "model": model,
        "from": source if source.startswith(_HUB) else str(path.absolute()),
        "format": file.format,
        "release": release.name,
        "normalisation": release.normalisation,
        "needs": release.needs,
        "account": account.summary(),
    }
    if out is not None and not dry_run:
        save(out, variables, record)
    print(account)
    print(f"{release.name}; images are to come with --normalisation={release.normalisation}")
    if release.needs:
        print(f"to compute what it did, the network needs {release.needs}")
    if out is not None and not dry_run:
        print(f"start a run from it with --init=run:{out}")


def save(out: pathlib.Path, variables: Any, record: dict[str, Any]) -> None:
    """Writes a folder that ``--init=run:OUT`` reads.

    Args:
      out: the folder; what it holds of this kind is replaced.
      variables: all of a network's, or some.
      record: what is known of them; "normalisation" and "needs" are told to whoever starts.
    """
    runs.make_folder(out)
    leaves: Any = traverse_util.flatten_dict(variables, sep="/")
    told = record | runs.provenance()
    with runs.replacing_with_record(out / WEIGHTS, out / RECORD, told) as stream:
        np.savez(stream, **leaves)  # goes through views piece by piece, without copies of them


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
        normalisation, needs = _expectations_of(folder)
        _tell_needs(needs)
        return variables, normalisation
    if kind in ("file", "hub") and path:
        tensors = _read_published(_on_disk(source)).tensors
        release = rules.choose(RELEASES, template, tensors, source)
        variables, account = rules.load(
            template,
            tensors,
            release.rules,
            required=release.trunk,
            absent=release.absent,
            path=source,
            advice=_INIT_ADVICE,
        )
        print(f"init: {source} ({release.name}): {account.summary()}")
        _tell_needs(release.needs)
        return variables, release.normalisation
    raise UserError(
        f"--init={source}: give run:PATH with the folder of another run, file:PATH with a file of "
        "weights, or hub:OWNER/REPOSITORY"
    )


def normalisation_of(source: str) -> str | None:
    """Returns the normalisation that the weights of ``--init`` expect, if known.

    Raises:
      UserError: there are no such weights.
    """
    kind, _, path = source.partition(":")
    if kind == "run" and path:
        return _expectations_of(pathlib.Path(path))[0]
    if kind in ("file", "hub") and path:
        tensors = _read_published(_on_disk(source)).tensors
        return rules.choose(RELEASES, None, tensors, source).normalisation
    return None


def _read_published(path: pathlib.Path) -> files.WeightFile:
    """Reads a file; of names that are known but for a word in front of all, takes it off."""
    file = files.read(path)
    with contextlib.suppress(UserError):
        rules.choose(RELEASES, None, file.tensors)
        return file
    first = next(iter(file.tensors))
    prefix = first[: first.find(".") + 1]  # such as "model.", as Lightning saves it
    if prefix and all(name.startswith(prefix) for name in file.tensors):
        with contextlib.suppress(UserError):
            bare = file.without(prefix)
            rules.choose(RELEASES, None, bare.tensors)
            return bare
    return file


def _on_disk(source: str) -> pathlib.Path:
    """Returns a file that is named by its path, file:PATH or hub:NAME."""
    if source.startswith(_HUB):
        return hub.download(source.removeprefix(_HUB))
    return pathlib.Path(source.removeprefix("file:"))


def _expectations_of(folder: pathlib.Path) -> tuple[str | None, str]:
    """Returns the normalisation that a folder's weights expect, if known, and what else they need.

    Raises:
      UserError: the record of imported weights, or the configuration of a run, is damaged.
    """
    path = folder / RECORD
    if path.exists():
        record = runs.read_json(path, {"normalisation": str}, "import the weights again")
    elif (path := folder / "config.json").exists():
        record = runs.read_config(folder)["config"]
    else:
        return None, ""
    normalisation = record.get("normalisation")
    if normalisation not in list(NORMALISATIONS):
        raise UserError(
            f"{path} tells of the normalisation {normalisation!r}, which is not known here: use "
            "the version that wrote it"
        )
    return normalisation, str(record.get("needs", ""))


def _tell_needs(needs: str) -> None:
    if needs:
        print(f"init: to compute what it did, the network needs {needs}")
