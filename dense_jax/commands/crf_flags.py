"""The flags ``--crf`` and ``--crf.*`` of several commands."""

import dataclasses
from typing import Annotated

import tyro

from dense_jax.errors import UserError
from dense_jax.ops.crf import CrfParams
from dense_jax.tasks.semantic import labelling
from dense_jax.tasks.task import Task

CrfFlag = Annotated[bool | None, tyro.conf.arg(constructor=bool)]  # --crf, --no-crf or neither
CrfFlags = Annotated[CrfParams, tyro.conf.arg(name="crf", help="Parameters of --crf.")]


def with_flags(task: Task, crf: bool | None, params: CrfParams) -> Task:
    """Returns a task with the CRF of the flags, without a CRF, or with its own.

    Args:
      task: the task of the run.
      crf: True for the CRF of `params`, False for no CRF, None for the task's own choice.
      params: parameters of the CRF.

    Raises:
      UserError: `params` are set without ``--crf``, or the task does not label pixels.
    """
    if params != CrfParams() and not crf:
        raise UserError("--crf.* are the parameters of a CRF that is not in use: give --crf too")
    if crf is None:
        return task
    return dataclasses.replace(labelling(task, "--crf"), crf=params if crf else None)
