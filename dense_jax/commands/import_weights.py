"""Brings published weights into a folder that training starts from.

The file's names decide whose weights they are, and the network's names which of them it takes: any
network here that stands on a trunk of these names can start from them.
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
    "the table shows all; --num-classes=N makes room for scores of other classes, --new-head "
    "explains what stands on the trunk, --ignore=NAME a tensor to leave out"
)


def _names() -> Any:
    """Returns the type of --model, the names that are known when the command line is read."""
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
    if out is not None:
        names = (start.WEIGHTS, start.RECORD)
        if has_checkpoint(out) or any((out / name).exists() for name in names):
            raise UserError(f"--out={out} holds weights already: give another folder")
    if num_classes is not None:
        if num_classes < 1:
            raise UserError(f"--num-classes={num_classes}: give at least 1")
        if catalogue.network(model).num_classes is None:
            raise UserError(f"--num-classes={num_classes}: {model} has no classes, leave it out")
    path = start.path_of(source)
    file = start.read_published(path)
    for key in REMARKS:
        if key in file.info:
            print(f"{source}: {key}: {printable(file.info[key])}")
    for pattern in ignore:
        if not fnmatch.filter(file.tensors, pattern):
            raise UserError(f"--ignore={pattern}: {source} has no tensor of such a name")
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
    print(f"{release.name}; images are to come with --normalisation={release.normalisation}")
    if release.needs:
        print(f"to compute what it did, the network needs {release.needs}")
    if out is not None and not dry_run:
        print(f"start a run from it with --init=run:{out}")
