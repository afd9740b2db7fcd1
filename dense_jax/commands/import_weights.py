"""Writes published weights to a folder that training can start from.

The names in the file identify the release, and the names of the network decide which tensors it
takes. So any network that has a trunk with these names can start from the file.
"""

import fnmatch
import pathlib
from typing import Annotated, Any, Literal

import tyro

from dense_jax import start
from dense_jax.errors import UserError, printable
from dense_jax.releases import catalogue
from dense_jax.train.checkpoint import has_checkpoint
from dense_jax.weights import rules
from dense_jax.weights.tensors import REMARKS

_ADVICE = (
    "the table shows all; --num-classes=N sets the number of classes, --new-head lets the head "
    "differ, --ignore=NAME leaves a tensor out"
)


def _names() -> Any:
    """Returns the type of --model: the names that are known when the command line is parsed."""
    return Literal[tuple(catalogue.networks())]  # pyrefly: ignore[invalid-literal]


def run(
    *,
    model: Annotated[str, tyro.conf.arg(constructor_factory=_names)],
    source: Annotated[str, tyro.conf.arg(name="from")],
    out: pathlib.Path | None = None,
    dry_run: bool = False,
    new_head: bool = False,
    ignore: tuple[str, ...] = (),
    num_classes: int | None = None,
) -> None:
    """Write published weights to a folder that training can start from (--init=run:OUT).

    Prints what happens to each tensor of the file and each parameter of the network. A tensor or
    parameter without an explanation is an error, and the command then writes nothing.

    Args:
      model: network to fill. vgg16 has the names of FCN, DeepLab and the dilated front end;
        resnet* has the names of DeepLab v2. With --new-head, segnet and deconvnet also take
        vgg16_bn for their encoders, and networks on a ResNet take the ResNet alone.
      source: file of weights (.safetensors, .npz, .pth, .caffemodel, ...), the index of several
        (model.safetensors.index.json), or hub:OWNER/REPOSITORY for those on the Hugging Face Hub.
      out: folder to write; --dry-run needs none.
      dry_run: print, and write nothing.
      new_head: the head may be missing from the file or differ from the file's.
      ignore: names of tensors to leave out, or patterns such as "fc.*".
      num_classes: number of classes. Default: as published, such as 1000 for ImageNet, 21 for VOC
        and 11 for CamVid. vgg16 has none.
    """
    if out is None and not dry_run:
        raise UserError("give the folder to write with --out, or give --dry-run")
    if out is not None:
        names = (start.WEIGHTS, start.RECORD)
        if has_checkpoint(out) or any((out / name).exists() for name in names):
            raise UserError(f"--out={out} holds weights already: give another folder")
    if num_classes is not None:
        if num_classes < 1:
            raise UserError(f"--num-classes={num_classes}: give at least 1")
        if catalogue.network(model).num_classes is None:
            raise UserError(
                f"--num-classes={num_classes}: {model} has no classes; leave the flag out"
            )
    path = start.path_of(source)
    file = start.read_published(path)
    for key in REMARKS:
        if key in file.info:
            print(f"{source}: {key}: {printable(file.info[key])}")
    for pattern in ignore:
        if not fnmatch.filter(file.tensors, pattern):
            raise UserError(f"--ignore={pattern}: {source} has no tensor with such a name")
    aux = any(name.startswith("aux_classifier.") for name in file.tensors)
    template = rules.template_of(catalogue.build(model, num_classes, aux))
    release = rules.choose(catalogue.releases(), template, file.tensors, source)
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
        "from": source if source.startswith(start.HUB) else str(path.absolute()),
        "format": file.format,
        "release": release.name,
        "normalisation": release.normalisation,
        "needs": release.needs,
        "account": account.summary(),
    }
    if out is not None and not dry_run:
        start.save(out, variables, record)
    print(account)
    print(f"{release.name}; it expects images with --normalisation={release.normalisation}")
    if release.needs:
        print(f"to reproduce the published outputs, build the network with {release.needs}")
    if out is not None and not dry_run:
        print(f"start a run from these weights with --init=run:{out}")
