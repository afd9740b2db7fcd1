"""What ``--init`` means: the weights that a run starts from, and what they expect of images.

They are those of another run, of a folder of imported weights, of a file or of the Hugging Face
Hub. Whose weights a file holds, `dense_jax.releases` knows.
"""

import contextlib
import pathlib
from typing import Any

import numpy as np
from flax import traverse_util

from dense_jax import runs
from dense_jax.data.transforms import NORMALISATIONS
from dense_jax.errors import UserError
from dense_jax.releases import catalogue
from dense_jax.train.checkpoint import read_variables
from dense_jax.weights import files, hub, rules

# A folder of imported weights: the parameters by their paths here, and where they come from.
WEIGHTS, RECORD = "weights.npz", "weights.json"
HUB = "hub:"
_ADVICE = (
    "published weights are of full width (--width=1) and of one kind of trunk; "
    "python -m dense_jax import-weights --dry-run shows all"
)


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
        tensors = read_published(path_of(source)).tensors
        release = rules.choose(catalogue.releases(), template, tensors, source)
        variables, account = rules.load(
            template,
            tensors,
            release.rules,
            required=release.trunk,
            absent=release.absent,
            path=source,
            advice=_ADVICE,
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
        tensors = read_published(path_of(source)).tensors
        return rules.choose(catalogue.releases(), None, tensors, source).normalisation
    return None


def read_published(path: pathlib.Path) -> files.WeightFile:
    """Reads a file; of names that are known but for a word in front of all, takes it off."""
    file = files.read(path)
    with contextlib.suppress(UserError):
        rules.choose(catalogue.releases(), None, file.tensors)
        return file
    first = next(iter(file.tensors))
    prefix = first[: first.find(".") + 1]  # such as "model.", as Lightning saves it
    if prefix and all(name.startswith(prefix) for name in file.tensors):
        with contextlib.suppress(UserError):
            bare = file.without(prefix)
            rules.choose(catalogue.releases(), None, bare.tensors)
            return bare
    return file


def path_of(source: str) -> pathlib.Path:
    """Returns a file that is named by its path, file:PATH or hub:NAME."""
    if source.startswith(HUB):
        return hub.download(source.removeprefix(HUB))
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
