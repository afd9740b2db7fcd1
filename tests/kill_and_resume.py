"""Kills a training run at random moments, resumes it, and compares it with an unbroken one.

    python -m tests.kill_and_resume --kills 10

Each child process is killed with SIGKILL a random time after it started or made its first new
step: while starting, stepping, evaluating or saving. The final state (parameters, moments,
average, step) must be equal bit for bit to that of a run nobody touched.
"""

import pathlib
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import tyro
from flax import traverse_util

from dense_jax.train.checkpoint import Checkpoints
from dense_jax.train.log import read_metrics


def command(workdir: pathlib.Path, num_steps: int) -> list[str]:
    """A short run that saves and evaluates often, with random transforms and dropout."""
    flags = f"--num-steps={num_steps} --save-every=3 --eval-every=10 --ema-decay=0.9"
    flags += " --augment=mirror_scale --crop 32 32 --dropout-rate=0.5 --shapes.num-train=64"
    script = [sys.executable, "-m", "experiments.fcn", "smoke", f"--workdir={workdir}"]
    return [*script, *flags.split()]


def last_step(workdir: pathlib.Path) -> int:
    """The newest step in metrics.jsonl."""
    return max((row["step"] for row in read_metrics(workdir / "metrics.jsonl")), default=0)


def final_state(workdir: pathlib.Path, num_steps: int) -> dict[Any, Any]:
    """All arrays of the last checkpoint by path, and the data position."""
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest_step == num_steps, checkpoints.latest_step
        state, position = checkpoints.read()
    return {**traverse_util.flatten_dict(state), ("position",): np.asarray(str(position))}


def run_killed(workdir: pathlib.Path, num_steps: int, kills: int, rng: random.Random) -> int:
    """Runs to the end through ``kills`` kills; returns how many hit a run that had made steps."""
    stepped = 0
    for number in range(kills):
        begun = last_step(workdir)
        with subprocess.Popen(
            command(workdir, num_steps), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            if number % 4 == 3:  # some die before their first step
                time.sleep(rng.uniform(0.5, 5.0))
            else:
                while process.poll() is None and last_step(workdir) <= begun:
                    time.sleep(0.02)
                time.sleep(rng.uniform(0.0, 0.8))
            finished = process.poll() is not None
            process.kill()
        stepped += last_step(workdir) > begun
        print(f"kill {number + 1}: at step {last_step(workdir)} of {num_steps}")
        if finished:
            raise RuntimeError("the run ended before it was killed: raise --num-steps")
    subprocess.run(command(workdir, num_steps), check=True, capture_output=True)
    return stepped


def main(kills: int = 10, num_steps: int = 400, seed: int = 0) -> None:
    """Compares a run killed ``kills`` times with an unbroken one of ``num_steps`` steps."""
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = pathlib.Path(folder) / "whole", pathlib.Path(folder) / "broken"
        subprocess.run(command(whole, num_steps), check=True, capture_output=True)
        stepped = run_killed(broken, num_steps, kills, random.Random(seed))
        expected, actual = (final_state(path, num_steps) for path in (whole, broken))
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(actual[key], value, err_msg="/".join(key))
    print(f"{kills} kills ({stepped} after new steps): all {len(expected)} arrays are identical")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m tests.kill_and_resume")
