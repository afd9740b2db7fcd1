"""Worker processes end with their training: after Ctrl-C and kill."""

import os
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


@pytest.fixture
def training(tmp_path):
    """A training with a worker that has made steps, in a process group of its own."""
    script = [sys.executable, "-m", "experiments.fcn", "smoke", f"--workdir={tmp_path / 'run'}"]
    with subprocess.Popen(
        [*script, *FLAGS.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while not list(read_metrics(tmp_path / "run" / "metrics.jsonl")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        yield process
        if is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


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


def test_a_signal_to_all_processes_ends_in_one_line(training):
    os.killpg(training.pid, signal.SIGINT)
    output, errors = training.communicate(timeout=120)
    assert training.returncode == 0
    assert re.search(r"stopped and saved at step \d+; the same command resumes", output)
    after_bar = [line for line in re.split(r"[\r\n]+", errors) if "step/s" not in line]
    assert not [line for line in after_bar if re.search("Trace|Error|Interrupt|leaked", line)]
    wait_for_end(training.pid)


def test_a_kill_leaves_no_worker_behind(training):
    training.kill()
    training.wait()
    wait_for_end(training.pid)


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
