"""Alternating training of a detector: four runs that end in one trunk for proposals and head.

Reference: Ren, He, Girshick, Sun, "Faster R-CNN", NIPS 2015, arXiv:1506.01497, Section 3.2;
rbgirshick/py-faster-rcnn: tools/train_faster_rcnn_alt_opt.py, which flips proposals together with
images, as here. There the last layers of the head start anew in the fourth run; here they go on.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from dense_jax import runs
from dense_jax.errors import refuse
from dense_jax.tasks.detection import proposals_of_run
from dense_jax.train.config import RunConfig

Part = Literal["trunk", "rpn", "head"]
PARTS: tuple[Part, ...] = ("trunk", "rpn", "head")
ConfigT = TypeVar("ConfigT", bound=RunConfig)

# Flags of what does not learn in a run, without an effect.
_NO_RPN = {"rpn_cls": "on", "rpn_reg": "on", "rpn_lambda": 1.0}
OF_HEAD = {
    "head_loss": "both", "test_boxes": "moved", "test_scales": (1.0,), "test_merge": "suitable",
    "test_flip": "off", "test_nms": None, "test_score": 0.05,
}  # fmt: skip


def four_runs(config: ConfigT) -> Iterator[ConfigT]:
    """Yields the configurations of the four runs, whose folders are in that of the whole.

    1. The trunk and the proposals learn, from ``init``.
    2. The trunk and the head learn, from ``init``, on the proposals of 1.
    3. The proposals learn, on the trunk of 2.
    4. The head of 2 goes on, on the trunk of 2 and the proposals of 3.

    Args:
      config: the configuration of `experiments.faster_rcnn`, or one with its fields.

    Raises:
      UserError: a folder holds a run of another length that the next one has started from.
    """
    own: Any = config
    of_head = own.head_steps or max(1, config.num_steps // 2)

    def run(name: str, *learn: Part, **changes: Any) -> ConfigT:
        workdir = f"{config.workdir}/{name}"
        joint = {"train_mode": "joint", "head_steps": None, "learn": learn, "workdir": workdir}
        return dataclasses.replace(config, **joint, **changes)

    first = run("1_proposals", "trunk", "rpn", **OF_HEAD)
    given = {"proposal_source": "file", "proposals": str(proposals_of_run(first))}
    second = run("2_head", "trunk", "head", num_steps=of_head, **given, **_NO_RPN)
    third = run("3_proposals", "rpn", init=f"run:{second.workdir}", **OF_HEAD)
    last = {"rpn_lambda": 1.0, "num_steps": of_head}
    fourth = run("4_detector", "head", init=f"run:{third.workdir}", **last)
    for before, after in itertools.pairwise((first, second, third, fourth)):
        _check_goes_on(before, after)
    yield from (first, second, third, fourth)


def _check_goes_on(before: RunConfig, after: RunConfig) -> None:
    """Refuses to train a run further that another one has started from."""
    folder = pathlib.Path(before.workdir or "")
    if not (pathlib.Path(after.workdir or "") / "config.json").exists():
        return
    steps = runs.read_config(folder)["config"].get("num_steps")
    refuse(
        steps != before.num_steps,
        f"{folder} was trained for {steps} steps, not {before.num_steps}, and {after.workdir} has "
        "started from it: give the old --num-steps and --head-steps, or another --workdir",
    )
