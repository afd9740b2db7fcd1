"""Several processes train as one: same parameters, scores and rows, and one end for all.

``python -m tests.kill_and_resume --kills 6 --processes 2`` compares the bits of broken runs.
"""

import csv
import dataclasses
import json
import math
import signal
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest

from dense_jax.errors import UserError
from dense_jax.tasks import training
from dense_jax.train import processes
from dense_jax.train.config import RunConfig
from experiments import fcn
from tests.kill_and_resume import final_state, finish, last_step, started

STEPS = 16
# Of SGD, because Adam divides rounding errors of small gradients by their own size.
FLAGS: dict[str, Any] = {
    **{"num_steps": STEPS, "save_every": 4, "eval_every": 8, "eval_batch_size": 4},
    **{"optimizer": "sgd", "momentum": 0.9},
}


def script(workdir):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    return [sys.executable, "-m", "experiments.fcn", "smoke", f"--workdir={workdir}", *flags]


def wait_for(workdir, step, children):
    while last_step(workdir) < step:
        assert all(child.poll() is None for child in children)
        time.sleep(0.05)


def evaluation_of(workdir):
    record = json.loads((workdir / "evaluation.json").read_text())
    for name in ("command", "time", "device"):
        del record["protocol"][name]
    del record["digest"]
    return record


def rows_of(workdir, name):
    with (workdir / name).open() as file:
        return list(csv.DictReader(file))


def stop_and_kill(workdir):
    """Stops two processes by a signal to one of them, starts them again, and kills one."""
    with started(script(workdir), 2) as children:
        wait_for(workdir, 3, children)
        children[1].send_signal(signal.SIGTERM)
        output, silent = (child.communicate()[0] for child in children)
        assert [child.returncode for child in children] == [0, 0]
    begun = last_step(workdir)
    assert f"stopped and saved at step {begun};" in output
    assert "step" not in silent
    assert begun < STEPS
    with started(script(workdir), 2) as children:
        wait_for(workdir, begun + 2, children)
        children[1].kill()


@pytest.mark.parametrize("troubled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_are_one_run_of_four_devices(troubled, tmp_path):
    """In one go; and after they were stopped and killed."""
    one, two = tmp_path / "one", tmp_path / "two"
    config = dataclasses.replace(fcn.PRESETS["smoke"], workdir=str(one), **FLAGS)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by integers
        training.run(fcn.build, config)

    if troubled:
        stop_and_kill(two)
    finish(script(two), 2)

    expected, actual = final_state(one, STEPS), final_state(two, STEPS)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        if key == ("position",):
            assert actual[key] == value
        else:
            np.testing.assert_allclose(actual[key], value, atol=1e-6, err_msg="/".join(key))
    first, second = evaluation_of(one), evaluation_of(two)
    assert first["scores"].pop("loss") == pytest.approx(second["scores"].pop("loss"), rel=1e-5)
    assert first == second  # confusion matrix, table of classes, names of pictures
    for path in (one / "pictures").iterdir():
        assert path.read_bytes() == (two / "pictures" / path.name).read_bytes()
    for name in ("train.csv", "eval.csv"):
        ours, theirs = rows_of(one, name), rows_of(two, name)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for a, b in zip(ours, theirs, strict=True):
            assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
    assert len(rows_of(two, "train.csv")) == STEPS


def test_the_flags_go_together(monkeypatch):
    assert RunConfig(distributed=True).distributed  # a cluster says the rest
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"coordinator": "a:1"}, "go with --distributed"),
        ({"distributed": True, "coordinator": "a:1"}, "--process-id is missing"),
        (
            {"distributed": True, "coordinator": "a", "process_id": 0, "num_processes": 2},
            "give HOST:PORT",
        ),
        (
            {"distributed": True, "coordinator": "a:99999", "process_id": 0, "num_processes": 2},
            "give HOST:PORT",
        ),
        (
            {"distributed": True, "coordinator": "a:1", "process_id": 2, "num_processes": 2},
            "--process-id=2: give 0 to 1",
        ),
    ]
    for values, words in wrong:
        with pytest.raises(UserError, match=words):
            RunConfig(**values)
    for name in processes._RANKS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="no launcher says the number"):
        processes.rank(None)
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert (processes.rank(None), processes.rank(1)) == (3, 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")  # mpirun inside of a SLURM task
    assert processes.rank(None) == 2


def test_the_end_of_another_process_is_one_line(monkeypatch):
    def closed(*_):
        raise ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer\nmore")

    monkeypatch.setattr(processes, "are_many", lambda: True)
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", closed)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", closed)
    monkeypatch.setattr(processes.multihost_utils, "sync_global_devices", closed)
    for exchange in (
        lambda: processes.from_first(1),
        lambda: processes.gather({"a": np.arange(2)}),
        processes.wait,
    ):
        with pytest.raises(UserError, match=r"another process has ended \(UNKNOWN.*by peer\)"):
            exchange()


def test_one_process_does_everything_itself():
    """The same functions, without others."""
    assert processes.by_first(lambda: 3) == 3
    assert processes.from_first({"a": [1]}) == {"a": [1]}
    rows = {"a": np.arange(3)}
    assert processes.gather(rows)["a"] is rows["a"]
    assert processes.arrays_from_first(rows) is rows
    assert processes.from_all({"a": [1]}) == [{"a": [1]}]


def test_values_of_all_processes_come_in_their_order(monkeypatch):
    """Threads in place of processes."""
    values = [{"a": [0.1, math.pi]}, None, ["a longer \N{EURO SIGN}"] * 9]
    barrier, arrays = threading.Barrier(len(values)), [np.zeros(0)] * len(values)

    def allgather(array):
        arrays[int(threading.current_thread().name)] = array
        barrier.wait(10)
        joined = np.stack(arrays)
        barrier.wait(10)
        return joined

    monkeypatch.setattr(processes, "are_many", lambda: True)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", allgather)
    results = [None] * len(values)

    def run(i):
        results[i] = processes.from_all(values[i])

    threads = [
        threading.Thread(target=run, args=(i,), name=str(i), daemon=True)
        for i in range(len(values))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [values] * len(values)


def test_processes_with_other_flags_or_data_are_refused(monkeypatch):
    config = fcn.PRESETS["smoke"]
    data = training.load_dataset(config)
    training._check_same_everywhere(config, data)
    for other, words in ({"seed": 7}, "another seed .*0, not 7"), ({"data": "x"}, "another data"):
        monkeypatch.setattr(processes, "from_first", lambda own, other=other: own | other)
        with pytest.raises(UserError, match=words):
            training._check_same_everywhere(config, data)
