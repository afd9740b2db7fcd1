"""Flags of ``predict`` for runs that find objects."""

import dataclasses
from typing import Annotated, Any

import numpy as np
import tyro

from dense_jax.errors import UserError, refuse
from dense_jax.infer.instances import Instances
from dense_jax.infer.predictor import Predictor
from dense_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class ObjectFlags:
    """What is written of objects."""

    min_score: float | None = None
    """Leave objects with lower scores out of all files. Default: all above the --test-score of the
    run."""
    shown_score: float | None = None
    """Pictures, masks and cut-outs show objects of at least this score. Default: 0.5."""
    mask_threshold: float | None = None
    """A pixel belongs to a mask from this probability on. Default: 0.5."""
    cutouts: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also cut each shown object out: cutouts/IMAGE/NUMBER_CLASS.png, transparent around it."""


def reading(predictor: Predictor, task: Task, flags: ObjectFlags) -> Predictor:
    """Returns a predictor whose objects are as the flags say.

    Args:
      predictor: that of a run.
      task: the task of the run.
      flags: what is written of objects.

    Raises:
      UserError: a flag is set, and the run finds no objects; or a value is impossible.
    """
    given = {
        name: value
        for name, value in vars(flags).items()
        if value is not None and value is not False
    }
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        refuse(not task.finds_objects, f"{flag} is for runs that find objects: leave it out")
        refuse(not 0 <= value <= 1, f"{flag} {value}: give a value from 0 to 1")
    if not given:
        return predictor
    least = getattr(task.config, "test_score", 0.0)
    if flags.min_score is not None and flags.min_score < least:
        raise UserError(
            f"--min-score {flags.min_score}: the run finds objects of scores above {least} alone; "
            f"add --change test-score={flags.min_score}"
        )
    if "mask_threshold" in given and "masks" not in task.reads:
        raise UserError("--mask-threshold is for runs that find masks: leave it out")
    changes = {"mask_threshold": "threshold"}
    own = {changes.get(name, name): value for name, value in given.items() if name != "min_score"}

    def read(answers: dict[str, np.ndarray], image: np.ndarray) -> Any:
        found = predictor.read(answers, image)
        assert isinstance(found, Instances)
        return dataclasses.replace(found.above(flags.min_score or 0.0), **own)

    return dataclasses.replace(predictor, read=read)
