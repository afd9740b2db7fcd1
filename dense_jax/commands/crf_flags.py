"""The flags ``--crf`` and ``--crf.*`` that several commands take."""

import dataclasses
from typing import Annotated

import tyro

from dense_jax.errors import UserError
from dense_jax.ops.crf import CrfParams
from dense_jax.tasks.semantic import labelling
from dense_jax.tasks.task import Task

CrfFlag = Annotated[bool | None, tyro.conf.arg(constructor=bool)]  # --crf, --no-crf or neither
CrfFlags = Annotated[CrfParams, tyro.conf.arg(name="crf", help="The CRF of --crf.")]


def with_flags(task: Task, crf: bool | None, params: CrfParams) -> Task:
    """Returns a task with the CRF of the flags, with none, or with its own.

    Raises:
      UserError: parameters of a CRF that is not in use, or a task without labels to refine.
    """
    if params != CrfParams() and not crf:
        raise UserError("--crf.* are the parameters of a CRF that is not in use: give --crf too")
    if crf is None:
        return task
    return dataclasses.replace(labelling(task, "--crf"), crf=params if crf else None)
