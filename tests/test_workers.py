"""Worker processes end with their training: after Ctrl-C, SIGTERM and kill."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from dense_jax.train.log import read_metrics

FLAGS = "--num-workers=2 --num-steps=100000 --eval-every=100000 --save-every=100000"


@pytest.fixture
def training(tmp_path):
    """A training with two workers that has made steps, in a process group of its own."""
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_ends_in_one_line(training, number):
    os.killpg(training.pid, number)
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


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="pgrep finds the workers")
def test_the_kill_of_a_worker_ends_in_one_line(training):
    found = subprocess.run(
        ["pgrep", "-P", str(training.pid), "-f", "spawn_main"], capture_output=True, text=True
    )
    for worker in found.stdout.split():
        os.kill(int(worker), signal.SIGKILL)
    _, errors = training.communicate(timeout=120)
    assert training.returncode == 2
    assert re.split(r"[\r\n]+", errors.strip())[-1].startswith("error: a worker process was killed")
