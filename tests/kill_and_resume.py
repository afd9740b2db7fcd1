"""Kills a training run at random moments, resumes it, and compares it with an unbroken one.

    python -m tests.kill_and_resume --kills 10
    python -m tests.kill_and_resume --kills 6 --processes 2
    python -m tests.kill_and_resume --script faster_rcnn

Each child process is killed with SIGKILL a random time after it started or made its first new
step: while starting, stepping, evaluating or saving. Of several processes that train together, one
is killed; the others end. The final state (parameters, moments, average, step) must be equal bit
for bit to that of a run nobody touched.
"""

import contextlib
import os
import pathlib
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import tyro
from flax import traverse_util

from dense_jax.train.checkpoint import Checkpoints
from dense_jax.train.log import read_metrics

_DEVICES = 4  # of all processes together


# Flags of random transforms and dropout.
_RANDOM = {
    "fcn": "--augment=mirror_scale --crop 32 32 --dropout-rate=0.5",
    "faster_rcnn": "--short-side 32 40 48 --max-side=64",
}


def command(workdir: pathlib.Path, num_steps: int, script: str = "fcn") -> list[str]:
    """A short run that saves and evaluates often, with random transforms."""
    flags = f"--num-steps={num_steps} --save-every=3 --eval-every=10 --ema-decay=0.9"
    flags += f" --shapes.num-train=64 {_RANDOM[script]}"
    words = [sys.executable, "-m", f"experiments.{script}", "smoke", f"--workdir={workdir}"]
    return [*words, *flags.split()]


@contextlib.contextmanager
def started(words: Sequence[str], processes: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts a command once, or in several processes that train together; ends them in any case."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    devices = f"--xla_force_host_platform_device_count={_DEVICES // processes}"
    together = ["--distributed", f"--coordinator=localhost:{port}", f"--num-processes={processes}"]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {devices}"  # programs like those of one process
    environment = os.environ | ({"XLA_FLAGS": flags} if processes > 1 else {})
    with contextlib.ExitStack() as stack:
        children = []
        for i in range(processes):
            own = [*words, *together, f"--process-id={i}"] if processes > 1 else words
            child = subprocess.Popen(
                own,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            children.append(stack.enter_context(child))
        try:
            yield children
        finally:
            for child in children:
                child.kill()


def finish(words: Sequence[str], processes: int) -> None:
    """Runs a command to its end."""
    with started(words, processes) as children:
        for child in children:
            child.communicate()
            assert child.returncode == 0, child.args


def last_step(workdir: pathlib.Path) -> int:
    """The newest step in metrics.jsonl."""
    return max((row["step"] for row in read_metrics(workdir / "metrics.jsonl")), default=0)


def final_state(workdir: pathlib.Path, num_steps: int) -> dict[Any, Any]:
    """All arrays of the last checkpoint by path, and the data position."""
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest_step == num_steps, checkpoints.latest_step
        state, position = checkpoints.read()
    return {**traverse_util.flatten_dict(state), ("position",): np.asarray(str(position))}


def run_killed(
    words: list[str], workdir: pathlib.Path, kills: int, rng: random.Random, processes: int
) -> int:
    """Runs to the end through ``kills`` kills; returns how many hit a run that had made steps."""
    stepped = 0
    for number in range(kills):
        begun = last_step(workdir)
        with started(words, processes) as children:
            victim = rng.choice(children)
            if number % 4 == 3:  # some die before their first step
                time.sleep(rng.uniform(0.5, 5.0))
            else:
                while victim.poll() is None and last_step(workdir) <= begun:
                    time.sleep(0.02)
                time.sleep(rng.uniform(0.0, 0.8))
            finished = victim.poll() is not None
            victim.kill()
        stepped += last_step(workdir) > begun
        print(f"kill {number + 1}: at step {last_step(workdir)}")
        if finished:
            raise RuntimeError("the run ended before it was killed: raise --num-steps")
    finish(words, processes)
    return stepped


def main(
    kills: int = 10,
    num_steps: int = 400,
    seed: int = 0,
    processes: int = 1,
    script: Literal["fcn", "faster_rcnn"] = "fcn",
) -> None:
    """Compares a run killed ``kills`` times with an unbroken one of ``num_steps`` steps."""
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = pathlib.Path(folder) / "whole", pathlib.Path(folder) / "broken"
        finish(command(whole, num_steps, script), processes)
        words = command(broken, num_steps, script)
        stepped = run_killed(words, broken, kills, random.Random(seed), processes)
        expected, actual = (final_state(path, num_steps) for path in (whole, broken))
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(actual[key], value, err_msg="/".join(key))
    print(f"{kills} kills ({stepped} after new steps): all {len(expected)} arrays are identical")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m tests.kill_and_resume")
