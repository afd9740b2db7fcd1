"""Worker processes end with their training: after Ctrl-C and kill."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from dense_jax.data import pipeline
from dense_jax.errors import UserError
from dense_jax.train.log import read_metrics

FLAGS = "--num-workers=1 --num-steps=100000 --eval-every=100000 --save-every=100000"
# A process whose batches come from a worker, without a network.
READER = """
from dense_jax.data import pipeline
from dense_jax.tasks import training
from experiments import fcn

config = fcn.PRESETS["smoke"]
data = training.load_dataset(config)
transforms = fcn.build(config, data.classes.num_classes).transforms
batches = pipeline.train_batches(data.split("train"), transforms, 2, 0, num_workers=1)
next(batches)
print("ready", flush=True)
input()
"""


@contextlib.contextmanager
def started(*words):
    """A program in a process group of its own, which ends with the context."""
    with subprocess.Popen(
        [sys.executable, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        yield process
        if is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def is_there(process):
    return process.poll() is None or pytest.fail(process.communicate()[1])


def is_alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_end(group):
    deadline = time.monotonic() + 20
    while is_alive(group):
        assert time.monotonic() < deadline, "workers are alive"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_signal_to_all_processes_ends_in_one_line(tmp_path):
    """Of a training that has made steps."""
    words = ["-m", "experiments.fcn", "smoke", f"--workdir={tmp_path / 'run'}", *FLAGS.split()]
    with started(*words) as training:
        while not list(read_metrics(tmp_path / "run" / "metrics.jsonl")):
            assert is_there(training)
            time.sleep(0.1)
        os.killpg(training.pid, signal.SIGINT)
        output, errors = training.communicate(timeout=120)
    assert training.returncode == 0
    assert re.search(r"stopped and saved at step \d+; the same command resumes", output)
    after_bar = [line for line in re.split(r"[\r\n]+", errors) if "step/s" not in line]
    assert not [line for line in after_bar if re.search("Trace|Error|Interrupt|leaked", line)]
    wait_for_end(training.pid)


@pytest.mark.slow  # the campaign of tests.faults kills too
def test_a_kill_leaves_no_worker_behind():
    with started("-c", READER) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        children = pathlib.Path(f"/proc/{reader.pid}/task/{reader.pid}/children")
        assert children.read_text().split()  # a worker, which is in the group
        reader.kill()
        reader.wait()
        wait_for_end(reader.pid)


def test_the_kill_of_a_worker_is_told(monkeypatch):
    """Grain says it in a RuntimeError."""
    batches = pipeline.TrainBatches(_batches(), _batches(), 1, 0)
    message = "Worker process was terminated unexpectedly with exit code -9."
    monkeypatch.setattr(batches, "_iterator", _raising(RuntimeError(message)))
    with pytest.raises(UserError, match=r"a worker process was killed.*resumes"):
        next(batches)
    monkeypatch.setattr(batches, "_iterator", _raising(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        next(batches)


def _batches() -> Any:
    return None


def _raising(error):
    def generate():
        raise error
        yield

    return generate()
