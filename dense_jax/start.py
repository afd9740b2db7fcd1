"""Reads ``--init``: the weights that a run starts from, and their normalisation.

The weights come from another run, a folder of imported weights, a file, or the Hugging Face Hub.
`dense_jax.releases` knows the published files.
"""

import pathlib
from typing import Any

import numpy as np
from flax import traverse_util

from dense_jax import runs
from dense_jax.data.normalise import NORMALISATIONS
from dense_jax.errors import UserError
from dense_jax.releases import catalogue
from dense_jax.train.checkpoint import read_variables
from dense_jax.weights import files, hub, rules

# The files of a folder of imported weights: parameters by their paths here, and their origin.
WEIGHTS, RECORD = "weights.npz", "weights.json"
HUB = "hub:"
_ADVICE = (
    "published weights have full width (--width=1) and fit one kind of trunk; "
    "python -m dense_jax import-weights --dry-run shows all"
)


def save(out: pathlib.Path, variables: Any, record: dict[str, Any]) -> None:
    """Writes a folder that ``--init=run:OUT`` reads.

    Args:
      out: the folder; old weights in it are replaced.
      variables: all variables of a network, or some.
      record: facts about the variables; a run that starts from them reads "normalisation" and
        "needs".
    """
    runs.make_folder(out)
    leaves: Any = traverse_util.flatten_dict(variables, sep="/")
    whole_record = record | runs.provenance()
    with runs.replacing_with_record(out / WEIGHTS, out / RECORD, whole_record) as stream:
        np.savez(stream, **leaves)  # writes views piece by piece, without copies


def initial(source: str, template: Any) -> tuple[dict[str, Any], str | None]:
    """Returns the variables that ``--init`` names, and the normalisation they expect if known.

    Args:
      source: run:PATH, the folder of a run or of imported weights; file:PATH, a file of published
        weights, whose head may differ; hub:OWNER/REPOSITORY, such a file on the Hugging Face Hub.
      template: the variables of the network that starts.

    Raises:
      UserError: there are no such weights, or their trunk does not fit the network.
    """
    kind, _, path = source.partition(":")
    if kind == "run" and path:
        folder = pathlib.Path(path).expanduser()
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
        return _expectations_of(pathlib.Path(path).expanduser())[0]
    if kind in ("file", "hub") and path:
        tensors = read_published(path_of(source)).tensors
        return rules.choose(catalogue.releases(), None, tensors, source).normalisation
    return None


def read_published(path: pathlib.Path) -> files.WeightFile:
    """Reads a file; takes wrappers off its names as long as more of them become known."""
    found = list(files.read(path).unwrapped())
    if len(found) == 1:
        return found[0]
    return max(found, key=lambda file: rules.num_known(catalogue.releases(), file.tensors))


def path_of(source: str) -> pathlib.Path:
    """Returns the local path of a file, given as PATH, file:PATH or hub:NAME."""
    if source.startswith(HUB):
        return hub.download(source.removeprefix(HUB))
    return pathlib.Path(source.removeprefix("file:")).expanduser()


def _expectations_of(folder: pathlib.Path) -> tuple[str | None, str]:
    """Returns the normalisation that a folder's weights expect, if known, and `Release.needs`.

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
            f"{path} has the unknown normalisation {normalisation!r}: use the version of dense_jax "
            "that wrote it"
        )
    return normalisation, str(record.get("needs", ""))


def _tell_needs(needs: str) -> None:
    if needs:
        print(f"init: to reproduce the published outputs, build the network with {needs}")
